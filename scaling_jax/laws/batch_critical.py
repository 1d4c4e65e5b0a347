"""The best batch size beside the critical one, by every definition that a table has: do they go together, and how far apart are they?

Both grow with the tokens seen, and any two quantities that do are correlated. So besides the correlation of their logarithms there is the
correlation of what is left of each when its own trend in T is taken out.
"""

from typing import Any

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.batch_optimum import BatchOptima, measure_batches
from scaling_jax.laws.critical_batch import kink_fit
from scaling_jax.laws.critical_growth import COLUMNS, noise_points
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.lr_optimum import count_runs
from scaling_jax.laws.observations import different, enough

SOURCE = "Filatov et al. 2024, arXiv 2410.05838"
DEFINITIONS = {COLUMNS[0]: "noise", COLUMNS[1]: "preconditioned"}
WHAT = "comparing the best with the critical batch size"
LEAST = 4  # points of a correlation


def critical_points(table, batches: BatchOptima):
    """B_crit by each definition at the sizes and horizons of `batches`, a DataFrame.

    Columns: definition (noise, preconditioned, kink_surge, kink_plateau), params, width, tokens, batch_crit_tokens, its 95% interval low
    and high (nan where unknown, inf where open), best_batch_tokens (B*), and `censored`: B* is a bound. The noise scales are those near the
    best lr, at B* by interpolation in ln B; the kinks are the bends of η*(B) at that horizon by the two forms.
    """
    import pandas

    rows: list[dict[str, Any]] = []
    noise = {column: noise_points(table, column, batches.optima) for column in COLUMNS if column in table and table[column].notna().any()}
    optima = batches.optima.points
    for point in batches.points.itertuples():
        shared = {"params": point.params, "width": point.width, "tokens": point.tokens}
        shared |= {"best_batch_tokens": point.batch_tokens, "censored": point.censored != ""}
        for column, frame in noise.items():
            near = _alike(frame, point)
            near = near[~near["censored"]].sort_values("batch_tokens")
            if len(near) and np.isfinite(point.batch_tokens):
                logs = np.log(near[["batch_tokens", "batch_crit_tokens"]].to_numpy(float)).T
                value = float(np.exp(np.interp(np.log(point.batch_tokens), *logs)))
                rows.append({"definition": DEFINITIONS[column], "batch_crit_tokens": value, "low": np.nan, "high": np.nan} | shared)
        best = _alike(optima[optima["censored"] == ""], point)
        if best["batch_tokens"].nunique() < LEAST:
            continue
        lrs = [{"batch_tokens": float(b), "lr": float(lr)} for b, lr in best[["batch_tokens", "lr"]].to_numpy()]
        for form in ("surge", "plateau"):
            bend = kink_fit(lrs, form)
            if bend.batch_tokens is not None:
                ends = {"low": 0.0 if bend.low is None else bend.low, "high": np.inf if bend.high is None else bend.high}
                rows.append({"definition": f"kink_{form}", "batch_crit_tokens": bend.batch_tokens} | ends | shared)
    if not rows:
        raise UserError(
            "the table has no critical batch size to compare with: no noise_scale_tokens, and too few batch sizes for a bend of the best lr"
        )
    return pandas.DataFrame(rows)


def _alike(frame, point):
    """The rows of a point's size and horizon."""
    same = frame["tokens"] == point.tokens
    for name in ("params", "width"):
        value = getattr(point, name)
        same &= frame[name].isna() if np.isnan(value) else frame[name] == value
    return frame[same]


def find(table, resamples: int = 2000, seed: int = 0) -> Finding:
    """B* against B_crit by every definition: correlation of the logarithms, the ratio, and their intervals."""
    batches = measure_batches(table)
    different(batches.optima.points["batch_tokens"], "batch_tokens", 3, WHAT)
    frame = critical_points(table, batches)
    usable = frame[~frame["censored"] & np.isfinite(frame["best_batch_tokens"])]
    enough(usable, LEAST, WHAT)
    numbers: list[Number] = []
    statements: list[str] = []
    rng = np.random.default_rng(seed)
    for definition, points in usable.groupby("definition", sort=False):
        if len(points) < LEAST:
            statements.append(f"{definition}: {len(points)} points are too few for a correlation.")
            continue
        found = _compared(definition, points, rng.exponential(size=(resamples, len(points))))
        numbers += found
        statements.append(_said(definition, *found))
    if not numbers:
        raise UserError(f"{WHAT}: {' '.join(statements)}")
    closed = [d for d, points in frame.groupby("definition", sort=False) if not np.isfinite(points["low"]).any()]
    if closed:
        statements.append(
            f"The points of {', '.join(closed)} are means over runs with closed intervals; runs with an open one are left out."
        )
    statements.append("Intervals resample sizes and horizons one by one; horizons of one run share a part of their noise.")
    return Finding("batch_critical", "B* against B_crit", {}, None, numbers, statements, frame, count_runs(table))


def _compared(definition: str, points, weight_RxN: np.ndarray) -> tuple[Number, Number, Number]:
    log_best, log_crit = (np.log(points[name].to_numpy(float)) for name in ("best_batch_tokens", "batch_crit_tokens"))
    log_t = np.log(points["tokens"].to_numpy(float))
    whole = np.ones((1, len(points)))
    found = []
    for name, measure in (
        (f"correlation of ln B* and ln B_crit ({definition})", lambda w: _correlation(log_best, log_crit, w)),
        (
            f"the same beyond the trends in T ({definition})",
            lambda w: _correlation(_detrended(log_best, log_t), _detrended(log_crit, log_t), w),
        ),
        (f"B*/B_crit ({definition})", lambda w: np.exp(w @ (log_best - log_crit) / w.sum(axis=1))),
    ):
        drawn = measure(weight_RxN)
        known = np.isfinite(drawn).mean() > 0.9
        low, high = np.nanpercentile(drawn, [2.5, 97.5]) if known else (None, None)
        value = float(measure(whole)[0])
        ends = (None if end is None else float(end) for end in (low, high))
        found.append(Number(name, value if np.isfinite(value) else None, *ends, note=f"{len(points)} points"))
    return found[0], found[1], found[2]


def _correlation(x: np.ndarray, y: np.ndarray, weight_RxN: np.ndarray) -> np.ndarray:
    """Of each set of weights, [R]."""
    weight_RxN = weight_RxN / weight_RxN.sum(axis=1, keepdims=True)
    x_RxN, y_RxN = x - (weight_RxN @ x)[:, None], y - (weight_RxN @ y)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(np.sum(weight_RxN * x_RxN**2, axis=1) * np.sum(weight_RxN * y_RxN**2, axis=1))
        return np.where(spread > 1e-12, np.sum(weight_RxN * x_RxN * y_RxN, axis=1) / spread, np.nan)


def _detrended(y: np.ndarray, log_t: np.ndarray) -> np.ndarray:
    design = np.stack([np.ones(len(y)), log_t], axis=1)
    return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]


def _said(definition: str, correlation: Number, beyond: Number, ratio: Number) -> str:
    if correlation.low is None or correlation.value is None:
        return f"{definition}: no correlation with B* can be told."
    together = (
        "go together"
        if correlation.low > 0
        else "go against each other"
        if correlation.high < 0
        else "show no correlation beyond its error"
    )
    said = f"B* and B_crit by {definition} {together}; B* is {ratio.value:.2g} of it."
    if correlation.low > 0 and beyond.low is not None and beyond.low <= 0:
        said += " Nothing of that is left once the trend of each in T is taken out: both grow with T, and no more is shown."
    return said


ANALYSES = (Analysis("batch_critical", "B* against B_crit", ("batch_tokens", "tokens", "lr", "loss"), find, SOURCE),)
