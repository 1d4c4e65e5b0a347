"""How much a wrong learning rate costs, against tokens and size.

Two measures. The *sensitivity* is the mean over ln η, across a stated range about η*, of min(L(η), L_init) − L*: what a blind choice within
the range loses (after Wortsman et al. 2023, arXiv 2309.14322). L_init is the loss before training, ln of the vocabulary, which a diverged
run counts as. The *curvature* is d²L/d(ln η)² at the minimum: a factor f off costs ½·curvature·(ln f)².
"""

from typing import Any

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import LawFit, fit
from scaling_jax.laws.form import Form
from scaling_jax.laws.lr_optimum import Cell, Optima, count_runs, measure, minima
from scaling_jax.laws.observations import Observations, different, enough
from scaling_jax.laws.powers import Power, product_form, reference, with_run_noise
from scaling_jax.laws.settings import confounded

SOURCE = "after Wortsman et al. 2023, arXiv 2309.14322; Filatov et al. 2024, arXiv 2410.05838"
RANGES = (16.0, 8.0, 4.0, 2.0)  # from the lowest lr to the highest, η* in the middle
HUBER_DELTA = 0.2  # of their logarithms: a curvature's error is about a tenth
WHAT = "a law of the sensitivity to the learning rate"
_STEPS = 128  # of the mean over ln η


def sensitivity_points(table, optima: Optima | None = None):
    """Sensitivity and curvature of each cell with a minimum inside its grid, a DataFrame, and the range of η that the former is of.

    The range is the widest of 16, 8, 4 and 2 that the grids of half of the cells cover. Between tried lrs the loss is interpolated in ln η;
    from the lowest lr that diverged on it is L_init. `censored`: the cell's grid does not cover the range, or a run diverged and the table
    has no vocab_size to tell L_init by. Columns besides: params, width, batch_tokens, tokens, sensitivity, curvature (nats per token),
    curvature_se.
    """
    optima = optima or measure(table)
    minima(table, optima)
    start = float(np.log(table["vocab_size"].iloc[0])) if "vocab_size" in table and table["vocab_size"].notna().all() else None
    inside = (optima.points["censored"] == "").to_numpy()
    cells = [cell for cell, kept in zip(optima.cells, inside, strict=True) if kept]
    values = []
    for span in RANGES:
        values = [_mean_excess(cell, span, start) for cell in cells]
        if np.isfinite(values).mean() >= 0.5:
            break
    points = optima.points[inside][["params", "width", "batch_tokens", "tokens", "curvature", "curvature_se", "loss"]].reset_index(
        drop=True
    )
    return points.assign(sensitivity=values, censored=~np.isfinite(values)), span


def _mean_excess(cell: Cell, span: float, start: float | None) -> float:
    """nan where the grid does not cover the range."""
    assert cell.valley is not None
    low, high = (np.log(cell.valley.lr) + side * np.log(span) / 2 for side in (-1, 1))
    log_lr = low + (high - low) * (np.arange(_STEPS) + 0.5) / _STEPS
    lrs, losses = np.log(cell.lr), cell.loss
    above = cell.diverged[cell.diverged > cell.lr.max()]
    if len(above):
        if start is None and np.log(above.min()) <= high:
            return np.nan
        if start is not None:
            lrs, losses = np.append(lrs, np.log(above)), np.append(losses, np.full(len(above), start))
    covered = lrs[0] - 1e-9 <= low and (len(above) > 0 or high <= lrs[-1] + 1e-9)
    if not covered:
        return np.nan
    loss = np.interp(log_lr, lrs, losses)
    return float(np.mean(np.minimum(loss, np.inf if start is None else start)) - cell.valley.loss)


def find(table, resamples: int = 400, seed: int = 0) -> Finding:
    """Power laws of sensitivity and curvature in T, and in N where there are several sizes."""
    optima = measure(table)
    points, span = sensitivity_points(table, optima)
    different(points["tokens"], "tokens", 2, WHAT)
    enough(points, 4, WHAT)
    inside = (optima.points["censored"] == "").to_numpy()
    log_curvature = optima.draws(resamples, seed)["curvature"][:, inside]
    log_curvature = np.log(np.where(log_curvature > 0, log_curvature, np.nan))
    fits, numbers, statements = {}, [], []
    try:
        data = _observations(points[~points["censored"]], "sensitivity", points)
        fits["sensitivity"] = fit(_form("sensitivity", "S", data), data)
    except UserError as error:
        statements.append(f"No law of the sensitivity: {error}.")
    data = _observations(points, "curvature", points)
    fits["curvature"] = with_run_noise(fit(_form("curvature", "d²L/d(ln η)²", data), data), data, log_curvature)
    relative = 0.5 * points["curvature"] * np.log(2) ** 2 / points["loss"]
    note = f"median over cells, which have {relative.min():.3g} to {relative.max():.3g}"
    numbers.append(Number("loss of a factor 2 in η, relative", float(relative.median()), note=note))
    for name, fitted in fits.items():
        numbers += _exponents(name, fitted)
        statements += _said(name, fitted)
    covered = int((~points["censored"]).sum())
    statements.append(
        f"Sensitivity: the mean over ln η of min(L, L_init) − L* from η*/{np.sqrt(span):.3g} to {np.sqrt(span):.3g}·η*, a factor {span:g}; "
        f"the grids of {covered} of {len(points)} cells cover it."
    )
    statements += confounded(optima.points)
    return Finding(
        "sensitivity", "Sensitivity to the learning rate", fits, "curvature" if fits["curvature"].identified else None, numbers, statements,
        points.assign(range_of_lr=span), count_runs(table),
    )  # fmt: skip


def _observations(points, target: str, frame) -> Observations:
    enough(points, 4, WHAT)
    names = ["tokens", *(["params"] if points["params"].nunique() > 1 else [])]
    cluster = points.groupby(["params", "width", "batch_tokens"], dropna=False, sort=False).ngroup().to_numpy()
    origin = f"{target} about the minima of {len(points)} cells"
    return Observations({name: points[name].to_numpy(float) for name in names}, points[target].to_numpy(float), cluster, origin, frame)


def law_form(name: str, symbol: str, tokens: float, params: float | None = None) -> Form:
    """`name` = c·(T/T0)^a[·(N/N0)^b], in nats per token; T0 and N0 are `tokens` and `params`."""
    powers = [Power("tokens", "tokens_exponent", "T", tokens)]
    powers += [] if params is None else [Power("params", "params_exponent", "N", params)]
    return product_form(name, name, symbol, "nats per token", powers, SOURCE, HUBER_DELTA, scale=name)


def _form(name: str, symbol: str, data: Observations) -> Form:
    return law_form(name, symbol, reference(data.x["tokens"]), reference(data.x["params"]) if "params" in data.x else None)


def _exponents(name: str, fitted: LawFit) -> list[Number]:
    symbols = {"tokens_exponent": "T", "params_exponent": "N"}
    return [Number(f"{name} ∝ {s}^x", fitted.values[p], *fitted.intervals[p]) for p, s in symbols.items() if p in fitted.values]


def _said(name: str, fitted: LawFit) -> list[str]:
    said: list[Any] = []
    for parameter, what in (("tokens_exponent", "the horizon"), ("params_exponent", "the size")):
        low, high = fitted.intervals.get(parameter, (None, None))
        if low is None or high is None:
            continue
        trend = "rises with" if low > 0 else "falls with" if high < 0 else "shows no trend beyond its error in"
        said.append(f"The {name} {trend} {what}.")
    return said


ANALYSES = (Analysis("sensitivity", "Sensitivity to the learning rate", ("batch_tokens", "tokens", "lr", "loss"), find, SOURCE),)
