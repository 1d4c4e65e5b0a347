"""What a public sweep says of the best learning rate and batch size, by the laws of this package, and what it leaves open.

    python benchmarks/steplaw_public.py --csv=dense_lr_bs_loss.csv

The file is StepLaw's (github.com/step-law/steplaw, data/dense_lr_bs_loss.csv; arXiv 2503.04715): AdamW, standard parametrization, 0.2B to
1.1B parameters, 4B to 100B tokens, 17 grids of learning rate and batch size. Printed are: their laws of the best pair (η, B), fitted,
beside what they publish; the rivals of η*(B, D, N), fitted to the minima in ln η, with intervals by resampling the 17 grids, and what they
predict of budgets that they were not fitted to; the bend of η*(B) in each grid with six batch sizes or more, by either form; and what
becomes of η*(B) in each grid by no form.
"""

import argparse
import os
from collections import defaultdict
from pathlib import Path

from scaling_jax import results
from scaling_jax.laws.critical_batch import kink_fit
from scaling_jax.laws.finding import Number
from scaling_jax.laws.lr_bend import find as find_bend
from scaling_jax.laws.lr_optimum import lr_points
from scaling_jax.laws.lr_surface import find as find_surface
from scaling_jax.laws.other_laws import find_deepseek, find_steplaw
from scaling_jax.train.metrics import human

CONTEXT = 2048
COLUMNS = {"params": "N", "tokens": "D", "loss": "smooth loss"}
LEAST = 6  # batch sizes, for a bend


def load(path: Path):
    """Their table under our names, with `batch_tokens`."""
    table = results.load(path, columns=COLUMNS)
    return table.assign(batch_tokens=table["bs"].astype(float) * CONTEXT)


def main() -> None:
    shared = Path(os.environ.get("SCALING_JAX_SHARED", "../shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=shared / "data/steplaw/dense_lr_bs_loss.csv", help="StepLaw's dense_lr_bs_loss.csv")
    args = parser.parse_args()
    if not args.csv.is_file():
        raise SystemExit(f"--csv={args.csv}: no such file; it is data/dense_lr_bs_loss.csv of github.com/step-law/steplaw")
    table = load(args.csv)
    for finding in (find_steplaw(table), find_deepseek(table)):
        print(f"\n{finding.title}\n\n| | value | 95% | published |\n|---|---|---|---|")
        for name, fitted in finding.fits.items():
            for p in fitted.form.parameters:
                ends = _ends(Number("", fitted.values[p.name], *fitted.intervals[p.name]))
                print(f"| {name}: {p.name} | {fitted.values[p.name]:.3g} | {ends} | {p.published:g} |")
        print("\n" + "\n".join(finding.statements))
    surface = find_surface(table, cluster_by=("params", "tokens"))
    print(f"\n{surface.title}: {len(surface.points)} cells, {int((~surface.points['censored']).sum())} with a minimum inside their grid\n")
    print("| form | rms of ln η | parameter | value | 95% |\n|---|---|---|---|---|")
    for name, fitted in surface.fits.items():
        for parameter, value in fitted.values.items():
            print(f"| {name} | {fitted.rms:.3f} | {parameter} | {value:.3g} | {_ends(Number('', value, *fitted.intervals[parameter]))} |")
    print("\n" + "\n".join(surface.statements))
    bends(table)
    verdicts = find_bend(table).points.groupby(["params", "tokens"])["verdict"].first()
    print("\n" + "; ".join(f"{verdict}: {count}" for verdict, count in verdicts.value_counts().items()))


def bends(table) -> None:
    """The bend of η*(B) in each grid by both forms, and the residuals of both and of a power law, which has none."""
    points = lr_points(table)
    points = points[points["censored"] == ""]
    print("\n| N, D | `kink_surge`, M tokens | `kink_plateau`, M tokens | residuals: surge, plateau, power |\n|---|---|---|---|")
    squares: dict[str, list[float]] = defaultdict(list)
    for (params, tokens), cell in points.groupby(["params", "tokens"]):
        if len(cell) < LEAST:
            continue
        rows = [{"batch_tokens": float(b), "lr": float(lr)} for b, lr in cell[["batch_tokens", "lr"]].to_numpy()]
        fits = {form: kink_fit(rows, form) for form in ("surge", "plateau", "power")}
        for form, fitted in fits.items():
            squares[form].append(fitted.rms**2)
        both = " | ".join(_bend(fits[form]) for form in ("surge", "plateau"))
        print(f"| {human(params)}, {human(tokens)} | {both} | {', '.join(f'{fitted.rms:.2f}' for fitted in fits.values())} |")
    means = ", ".join(f"{form} {(sum(values) / len(values)) ** 0.5:.3f}" for form, values in squares.items())
    print(f"\n{len(squares['surge'])} sets; root mean square over all: {means}")


def _ends(number: Number) -> str:
    low, high = ("…" if end is None else f"{end:.3g}" for end in (number.low, number.high))
    return f"{low} to {high}"


def _bend(fitted) -> str:
    value, low, high = (None if x is None else x / 1e6 for x in (fitted.batch_tokens, fitted.low, fitted.high))
    ends = f"{'0' if low is None else f'{low:.2g}'} to {'∞' if high is None else f'{high:.2g}'}"
    return f"{'none' if value is None or (high is None and value > 100) else f'{value:.2g}'} ({ends})"


if __name__ == "__main__":
    main()
