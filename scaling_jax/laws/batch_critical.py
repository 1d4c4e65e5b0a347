"""The best batch size beside the critical one, by every definition that a table has: do they go together, and how far apart are they?

Both grow with the tokens seen, and any two quantities that do are correlated. So besides the correlation of their logarithms there is the
correlation of what is left of each when its own trend in T, and its level at each size, is taken out.
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
    log_batch_RxN = batches.draws(resamples, seed)["log_batch"]
    for definition, points in usable.groupby("definition", sort=False):
        if len(points) < LEAST:
            statements.append(f"{definition}: {len(points)} points are too few for a correlation.")
            continue
        found = _compared(definition, points, log_batch_RxN[:, _rows(batches, points)])
        numbers += found
        statements.append(_said(definition, *found))
    if not numbers:
        raise UserError(f"{WHAT}: {' '.join(statements)}")
    closed = [d for d, points in frame.groupby("definition", sort=False) if not np.isfinite(points["low"]).any()]
    if closed:
        statements.append(
            f"The points of {', '.join(closed)} are means over runs with closed intervals; runs with an open one are left out."
        )
    statements.append("Correlations take sizes and horizons for independent; the horizons of one run share a part of their noise.")
    if usable["definition"].str.startswith("kink").any():
        statements.append("A bend is measured on the runs that B* is: their errors go together, which is in that correlation too.")
    return Finding("batch_critical", "B* against B_crit", {}, None, numbers, statements, frame, count_runs(table))


def _rows(batches: BatchOptima, points) -> list[int]:
    """Which of the points of `batches` these are."""
    keys = ["params", "width", "tokens"]
    at = {tuple(row): i for i, row in enumerate(batches.points[keys].fillna(-1.0).to_numpy(float))}
    return [at[tuple(row)] for row in points[keys].fillna(-1.0).to_numpy(float)]


def _compared(definition: str, points, log_best_RxN: np.ndarray) -> tuple[Number, Number, Number]:
    """The correlation, that beyond the trends, and the ratio; `log_best_RxN` are draws of ln B* of the points."""
    log_best, log_crit = (np.log(points[name].to_numpy(float)) for name in ("best_batch_tokens", "batch_crit_tokens"))
    trend_NxK = _trend(points)
    left = [y - trend_NxK @ np.linalg.lstsq(trend_NxK, y, rcond=None)[0] for y in (log_best, log_crit)]
    note = f"{len(points)} points"
    return (
        Number(f"correlation of ln B* and ln B_crit ({definition})", *correlation(log_best, log_crit), note=note),
        Number(f"the same beyond the trends in T ({definition})", *correlation(*left, trend_NxK.shape[1] - 1), note=note),
        Number(f"B*/B_crit ({definition})", *_ratio(log_best - log_crit, log_best_RxN), note=note),
    )


def correlation(x: np.ndarray, y: np.ndarray, taken_out: int = 0) -> tuple[float | None, float | None, float | None]:
    """Pearson's r and its 95% interval: of one width in Fisher's z = artanh r, so wide that 0 is outside where Student's t rejects it.

    Args:
      x, y: [n].
      taken_out: regressors, besides the mean, that x and y are residuals of; as many degrees of freedom are gone.

    Returns:
      r (None where x or y does not vary), and the ends, None where fewer than 3 + `taken_out` points leave nothing to know it by.
    """
    from scipy.special import stdtrit  # only here: slow to import

    x, y = x - x.mean(), y - y.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    dof = len(x) - 2 - taken_out
    if spread < 1e-12:
        return None, None, None
    r = float(np.clip(x @ y / spread, -1, 1))
    if dof < 1:
        return r, None, None
    half = np.arcsinh(stdtrit(dof, 0.975) / np.sqrt(dof))
    z = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    return r, float(np.tanh(z - half)), float(np.tanh(z + half))


def _trend(points) -> np.ndarray:
    """A level for each size and one slope in ln T, [n, K]."""
    size = points.groupby(["params", "width"], dropna=False, sort=False).ngroup().to_numpy()
    return np.column_stack([np.eye(size.max() + 1)[size], np.log(points["tokens"].to_numpy(float))])


def _ratio(log_ratio: np.ndarray, log_best_RxN: np.ndarray) -> tuple[float, float, float]:
    """The geometric mean; its error is the larger of the scatter's and of what the runs' noise makes it, which horizons share."""
    from scipy.special import stdtrit  # only here: slow to import

    mean, count = log_ratio.mean(), len(log_ratio)
    drawn = log_best_RxN.mean(axis=1)
    drawn = drawn[np.isfinite(drawn)]
    half = stdtrit(count - 1, 0.975) * log_ratio.std(ddof=1) / np.sqrt(count)
    half = max(half, 1.96 * drawn.std()) if len(drawn) > 1 else half
    return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half))


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
    if beyond.low is None:
        return f"{said} The points are too few to tell what is left once the trend of each in T is taken out."
    if beyond.high < 0:
        return f"{said} Once the trend of each in T is taken out they go against each other."
    if correlation.low > 0 and beyond.low <= 0:
        said += " Nothing of that is shown once the trend of each in T is taken out: both grow with T, and no more is shown."
    return said


ANALYSES = (Analysis("batch_critical", "B* against B_crit", ("batch_tokens", "tokens", "lr", "loss"), find, SOURCE),)
