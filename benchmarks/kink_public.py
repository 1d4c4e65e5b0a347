"""Where the best learning rate bends, on a public sweep: two forms fit alike, and disagree on where.

    python benchmarks/kink_public.py --csv=dense_lr_bs_loss.csv

The file is StepLaw's (github.com/step-law/steplaw, data/dense_lr_bs_loss.csv; arXiv 2503.04715): AdamW, 0.2B to 1.1B parameters, 4B to
100B tokens. For each (N, D) with six batch sizes or more whose best lr is inside the grid, the bend by both forms, with 95%
intervals, and the root mean square of the residuals of log η*, beside those of a power law, which has no bend.
"""

import argparse
import csv
import os
from collections import defaultdict
from pathlib import Path

from scaling_jax.errors import UserError
from scaling_jax.laws.critical_batch import kink_fit
from scaling_jax.laws.lr_optimum import lr_optima
from scaling_jax.train.metrics import human

CONTEXT = 2048
LEAST = 6  # batch sizes


def main() -> None:
    shared = Path(os.environ.get("SCALING_JAX_SHARED", "../shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=shared / "data/steplaw/dense_lr_bs_loss.csv", help="StepLaw's dense_lr_bs_loss.csv")
    args = parser.parse_args()
    if not args.csv.is_file():
        raise SystemExit(f"--csv={args.csv}: no such file; it is data/dense_lr_bs_loss.csv of github.com/step-law/steplaw")
    cells: dict[tuple[float, float], list[dict[str, float]]] = defaultdict(list)
    with args.csv.open() as file:
        for row in csv.DictReader(file):
            point = {"batch_tokens": float(row["bs"]) * CONTEXT, "lr": float(row["lr"]), "loss": float(row["smooth loss"])}
            cells[float(row["N"]), float(row["D"])].append(point)
    print("| N, D | `kink_surge`, M tokens | `kink_plateau`, M tokens | residuals: surge, plateau, power |")
    print("|---|---|---|---|")
    rms: dict[str, list[float]] = defaultdict(list)
    for (params, tokens), table in sorted(cells.items()):
        optima = _optima(table)
        if len(optima) < LEAST:
            continue
        fits = {form: kink_fit(optima, form) for form in ("surge", "plateau", "power")}
        for form, fit in fits.items():
            rms[form].append(fit.rms)
        bends = " | ".join(_bend(fits[form]) for form in ("surge", "plateau"))
        print(f"| {human(params)}, {human(tokens)} | {bends} | {', '.join(f'{fit.rms:.2f}' for fit in fits.values())} |")
    means = ", ".join(f"{form} {(sum(r * r for r in values) / len(values)) ** 0.5:.3f}" for form, values in rms.items())
    print(f"\n{len(rms['surge'])} sets; root mean square over all: {means}")


def _optima(table: list[dict[str, float]]) -> list[dict[str, float]]:
    found = []
    for batch_tokens in sorted({row["batch_tokens"] for row in table}):
        try:
            found += lr_optima([row for row in table if row["batch_tokens"] == batch_tokens])
        except UserError:  # the best lr is at the edge of its grid
            continue
    return [{key: row[key] for key in ("batch_tokens", "lr")} for row in found]


def _bend(fit) -> str:
    value, low, high = (None if x is None else x / 1e6 for x in (fit.batch_tokens, fit.low, fit.high))
    ends = f"{'0' if low is None else f'{low:.2g}'} to {'∞' if high is None else f'{high:.2g}'}"
    return f"{'none' if value is None or high is None and value > 100 else f'{value:.2g}'} ({ends})"


if __name__ == "__main__":
    main()
