"""Hoffmann's parametric loss on the points of their own figure: what its constants are, and what the five highest losses do to them.

    python benchmarks/chinchilla_public.py --csv=svg_extracted_data.csv

The file is data/svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla (Besiroglu et al. 2024, 2404.10102): 245
points read off Fig. 4 of Hoffmann et al. 2022. All 4,500 starts, then 1,000 resamples, without the five highest losses, as they do it;
and all points as they are. Published are the constants of Besiroglu et al., with their standard errors. Judge a fit by its objective: A and
B lie along a valley, and differ between minimizers that agree in the rest.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scaling_jax import results
from scaling_jax.laws import chinchilla
from scaling_jax.laws.chinchilla_form import BESIROGLU, BESIROGLU_SE, CHINCHILLA, GOPHER_FLOPS, ROUNDED, UNROUNDED, allocation
from scaling_jax.laws.fit import LawFit, fit


def main() -> None:
    shared = Path(os.environ.get("SCALING_JAX_SHARED", "../shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=shared / "data/epoch_chinchilla/svg_extracted_data.csv", help="svg_extracted_data.csv")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args()
    if not args.csv.is_file():
        raise SystemExit(
            f"--csv={args.csv}: no such file; it is data/svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla"
        )
    table = results.load(args.csv, columns={"params": "Model Size", "flops": "Training FLOP"}, required=("params", "tokens", "loss"))
    rows = chinchilla.rows_of(table, "this")
    data = chinchilla.observed(chinchilla.without_highest(rows, 5), "")
    best, seconds_starts = timed(lambda: fit(CHINCHILLA, data, resamples=0))
    again = [[best.values[name] for name in CHINCHILLA.names]]
    law, seconds_resamples = timed(lambda: fit(CHINCHILLA, data, resamples=args.resamples, starts=again))
    every = fit(CHINCHILLA, chinchilla.observed(rows, ""), resamples=0)
    spread = dict(zip(CHINCHILLA.names, law.draws_RxP.std(axis=0, ddof=1), strict=True))
    print(f"| | {law.points} points | standard error | published | its error | ratio of errors | {every.points} points |")
    print("|---|---|---|---|---|---|---|")
    for name, value in law.values.items():
        ratio = spread[name] / BESIROGLU_SE[name]
        print(
            f"| {name} | {value:.5g} | {spread[name]:.3g} | {BESIROGLU[name]:.5g} | {BESIROGLU_SE[name]:.3g} | {ratio:.2f} "
            f"| {every.values[name]:.5g} |"
        )
    print(f"| objective | {law.objective:.9f} | | {objective(data, BESIROGLU):.9f} | | | {every.objective:.9f} |")
    drawn = allocation(**dict(zip(CHINCHILLA.names, law.draws_RxP.T, strict=True)))
    per_size = drawn.tokens(GOPHER_FLOPS) / drawn.params(GOPHER_FLOPS)
    low, high = np.quantile(per_size, [0.025, 0.975])
    of = [allocation(**k) for k in (law.values, BESIROGLU, every.values, UNROUNDED, ROUNDED)]
    ours, theirs, all_points, unrounded, rounded = (float(a.tokens(GOPHER_FLOPS) / a.params(GOPHER_FLOPS)) for a in of)
    print(f"| D/N at {GOPHER_FLOPS:.3g} FLOP | {ours:.3g} ({low:.3g} to {high:.3g}) | | {theirs:.3g} | | | {all_points:.3g} |")
    print(f"\nD/N there by Hoffmann's own constants: {unrounded:.3g}, rounded as printed {rounded:.3g}")
    print(f"4,500 starts: {seconds_starts}, compiling included; {args.resamples} resamples: {seconds_resamples}")


def timed(call: Callable[[], LawFit]) -> tuple[LawFit, str]:
    wall, cpu = time.perf_counter(), time.process_time()
    law = call()
    return law, f"{time.perf_counter() - wall:.1f} s ({time.process_time() - cpu:.1f} s of all cores)"


def objective(data, values) -> float:
    """Σ huber_δ of the log residuals."""
    size = np.abs(np.log(data.y) - np.log(CHINCHILLA.predict(values, data.x)))
    delta = CHINCHILLA.huber_delta
    return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum())


if __name__ == "__main__":
    main()
