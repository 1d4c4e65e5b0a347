"""Whether widths are alike: the best learning rate, the sensitivity to it, B* and B_crit at equal batch size and tokens, as a hypothesis.

μP is to make them so (Yang et al. 2022, arXiv 2203.03466; Filatov et al. 2024, arXiv 2410.05838). Tested is the slope of the logarithm of
each in ln width, among cells of the same batch size and horizon. The slope of each batch size, over all its horizons, is one measurement,
since its horizons are of the same runs; those slopes are taken for normal with one mean and one variance, so that the mean has Student's
interval and the hypothesis 0 its p-value. A p-value that is not small shows nothing by itself: the interval says which shift is excluded.
"""

from typing import NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.batch_optimum import measure_batches
from scaling_jax.laws.critical_growth import COLUMNS, noise_points
from scaling_jax.laws.finding import Analysis, Finding, Number, counted
from scaling_jax.laws.lr_optimum import Optima, count_runs, measure, minima
from scaling_jax.laws.observations import different
from scaling_jax.laws.sensitivity import sensitivity_points
from scaling_jax.laws.settings import confounded

SOURCE = "Yang et al. 2022, arXiv 2203.03466; Filatov et al. 2024, arXiv 2410.05838"
WHAT = "equality across widths"
_OF_RUNS = "from the noise of the runs"


class Slope(NamedTuple):
    """Of ln y in ln width. `low`, `high`: 95% interval; `p`: of the slope 0; all nan where not known. `clusters`: what it is a mean of."""

    slope: float
    low: float
    high: float
    p: float
    clusters: int


def width_slope(frame, column: str) -> Slope | None:
    """The slope of ln `column` in ln width at equal batch_tokens and tokens, each batch size a measurement of it.

    None where no batch size and horizon has two widths.
    """
    usable = frame[frame[column].gt(0) & np.isfinite(frame[column])]
    slopes = []
    for _, of_batch in usable.groupby("batch_tokens", dropna=False):
        level = of_batch.groupby("tokens")["width"].transform(lambda w: np.log(w).mean())
        x = (np.log(of_batch["width"].astype(float)) - level).to_numpy()
        if x @ x > 1e-12:
            slopes.append(x @ np.log(of_batch[column].to_numpy(float)) / (x @ x))
    return _student(np.array(slopes)) if slopes else None


def _student(slopes: np.ndarray) -> Slope:
    from scipy.stats import t  # only here: slow to import

    count, mean = len(slopes), float(slopes.mean())
    if count < 3:
        return Slope(mean, np.nan, np.nan, np.nan, count)
    se = slopes.std(ddof=1) / np.sqrt(count)
    half = t.ppf(0.975, count - 1) * se
    p = float(2 * t.sf(abs(mean) / se, count - 1)) if se > 0 else 1.0 if mean == 0 else 0.0
    return Slope(mean, float(mean - half), float(mean + half), p, count)


def batch_slope(batches, width_of, resamples: int = 1000, seed: int = 0) -> Slope | None:
    """The slope of ln B* in ln width at equal tokens; its interval is from the noise of the runs, which all horizons share."""
    points = batches.points
    inside = (points["censored"] == "").to_numpy()
    if inside.sum() < 2:
        return None
    kept = points[inside].assign(log_width=np.log(np.asarray(width_of, float)[inside]))
    x = (kept["log_width"] - kept.groupby("tokens")["log_width"].transform("mean")).to_numpy()
    if x @ x < 1e-12:
        return None
    weights = x / (x @ x)
    slope = float(weights @ np.log(kept["batch_tokens"]))
    drawn = batches.draws(resamples, seed)["log_batch"][:, inside] @ weights
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 100:
        return Slope(slope, np.nan, np.nan, np.nan, int(inside.sum()))
    from scipy.special import erfc

    low, high = np.percentile(drawn, [2.5, 97.5])
    return Slope(slope, float(low), float(high), float(erfc(abs(slope) / drawn.std() / np.sqrt(2))), int(inside.sum()))


def find(table) -> Finding:
    """Slopes in ln width of η*, of the sensitivity to it, of B* and of B_crit, for each parametrization that the table has."""
    if "width" not in table:
        raise UserError("the table has no width; equality across widths needs models of several")
    different(table["width"].dropna(), "widths", 2, WHAT)
    kinds = sorted(table["parametrization"].dropna().unique()) if "parametrization" in table else []
    numbers: list[Number] = []
    statements: list[str] = []
    frames = []
    for kind in kinds or [None]:
        part = table if kind is None else table[table["parametrization"] == kind]
        if part["width"].nunique() < 2:
            continue
        under = "" if kind is None else f" under {kind}"
        optima = measure(part)
        frames.append(minima(part, optima).assign(parametrization=kind or ""))
        statements += confounded(optima.points)
        for what, slope, how in _slopes(part, optima):
            if slope is None:
                statements.append(f"{what}{under}: not measured at two widths with the same batch size and horizon.")
                continue
            ends = (None if np.isnan(end) else end for end in (slope.low, slope.high))
            note = how if np.isnan(slope.p) else f"{how}; p of no slope {slope.p:.2g}"
            numbers.append(Number(f"slope of ln {what} in ln width{under}", slope.slope, *ends, note=note))
            statements.append(_said(f"{what}{under}", slope, how))
    import pandas

    frame = pandas.concat(frames, ignore_index=True)
    return Finding("width_equality", "Equality across widths", {}, None, numbers, statements, frame, count_runs(table))


def _slopes(table, optima: Optima):
    """Quantity, slope and how the interval was made."""
    points = minima(table, optima)
    yield "η*", width_slope(points, "lr"), _how(points)
    relative = points.assign(relative=points["curvature"] / points["loss"])
    yield "curvature/L", width_slope(relative, "relative"), _how(points)
    cells, _ = sensitivity_points(table, optima)
    cells = cells[~cells["censored"]]
    yield "sensitivity/L", width_slope(cells.assign(relative=cells["sensitivity"] / cells["loss"]), "relative"), _how(cells)
    batches = measure_batches(table, optima)
    yield "B*", batch_slope(batches, batches.points["width"]), _OF_RUNS
    for column in COLUMNS:
        if column in table and table[column].notna().any():
            try:
                noise = noise_points(table, column, optima)
            except UserError:
                continue
            name = "B_crit (noise)" if column == COLUMNS[0] else "B_crit (preconditioned)"
            yield name, width_slope(noise[~noise["censored"]], "batch_crit_tokens"), _how(noise)


def _how(points) -> str:
    return f"by {counted(points['batch_tokens'].nunique(), 'batch size')}, their slopes taken for normal"


def _said(what: str, slope: Slope, how: str) -> str:
    factor = 2**slope.slope
    if np.isnan(slope.p):
        few = f"{counted(slope.clusters, 'batch size')} {'is' if slope.clusters == 1 else 'are'} too few"
        why = "the noise of the runs is not known" if how == _OF_RUNS else few
        return f"{what}: a doubling of the width moves it by a factor {factor:.3f}; no interval, since {why}."
    if slope.p < 0.05:
        by = f"{factor:.3f} ({2**slope.low:.3f} to {2**slope.high:.3f}; p {slope.p:.2g})"
        return f"{what} is not the same at all widths: a doubling moves it by a factor {by}."
    most = 2 ** max(abs(slope.low), abs(slope.high))
    shown = f"{what}: no difference between widths is shown (p {slope.p:.2g})"
    return f"{shown}; that a doubling moves it by more than {most - 1:.1%} is excluded at 95%."


ANALYSES = (Analysis("width_equality", "Equality across widths", ("width", "batch_tokens", "tokens", "lr", "loss"), find, SOURCE),)
