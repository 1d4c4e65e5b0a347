"""Published laws of the best learning rate and batch size, fitted to a table and set beside their constants: StepLaw, DeepSeek, Bjorck.

All three say what to set from sizes alone. StepLaw and DeepSeek are of the best pair (η, B) of a model and budget, found together; Bjorck
keeps B and asks how η* falls with the budget.
"""

from typing import Any, NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Analysis, Finding
from scaling_jax.laws.fit import LawFit, fit
from scaling_jax.laws.form import Form
from scaling_jax.laws.lr_optimum import Optima, count_runs, measure, minima
from scaling_jax.laws.observations import Observations, different, enough
from scaling_jax.laws.powers import Power, product_form, with_run_noise
from scaling_jax.laws.settings import confounded, one_setting, runs_shared

STEPLAW = "Li et al. 2025, arXiv 2503.04715"
DEEPSEEK = "Bi et al. 2024, arXiv 2401.02954"
BJORCK = "Bjorck et al. 2024, arXiv 2409.19913"
HUBER_DELTA = 0.2  # of ln η* and ln B* of a whole grid: good to 0.1 or so, and a step of the grid is 0.35 and 0.7
WITHIN = 0.02  # of the lowest loss: what the quadratic is fitted to
_LEAST_CELLS = 8  # of a quadratic in two variables, which has 6 coefficients


def steplaw_forms() -> list[Form]:
    """η = c·N^a·D^b and B = c·D^d; N without embeddings, D and B in tokens."""
    size = Power("params", "params_exponent", "N", published=-0.713)
    lr = product_form(
        "steplaw_lr", "lr", "η*", "", [size, Power("tokens", "tokens_exponent", "D", published=0.307)], STEPLAW, HUBER_DELTA,
        scale="lr", published=1.79,
    )  # fmt: skip
    power = [Power("tokens", "tokens_exponent", "D", published=0.571)]
    batch = product_form("steplaw_batch", "batch_tokens", "B*", "tokens", power, STEPLAW, HUBER_DELTA, scale="batch", published=0.58)
    return [lr, batch]


def deepseek_forms() -> list[Form]:
    """η = c·C^a and B = c·C^b, C in FLOPs, B in tokens."""
    made = []
    for name, target, symbol, unit, c, exponent in (
        ("deepseek_lr", "lr", "η*", "", 0.3118, -0.1250),
        ("deepseek_batch", "batch_tokens", "B*", "tokens", 0.2920, 0.3271),
    ):
        power = [Power("flops", "flops_exponent", "C", published=exponent)]
        scale = "lr" if target == "lr" else "batch"
        made.append(product_form(name, target, symbol, unit, power, DEEPSEEK, HUBER_DELTA, scale=scale, published=c))
    return made


def bjorck_form(several_sizes: bool) -> Form:
    """η* = c·N^a·D^b at one batch size; they write the exponents as −a and −b."""
    powers = [Power("tokens", "tokens_exponent", "D", published=-0.32)]
    powers += [Power("params", "params_exponent", "N", published=-0.23)] if several_sizes else []
    return product_form("bjorck", "lr", "η*", "", powers, BJORCK, HUBER_DELTA, scale="lr")


class Pairs(NamedTuple):
    """Best pairs (η, B). `points` has a row for each size and horizon: params, tokens, flops, lr, batch_tokens, loss (of the quadratic
    there, nats per token), cells (that it is fitted to), rms (of its residuals, nats per token), runs, and `censored` with `why`: too few
    cells, no minimum, or one outside of those cells. `log_lr` and `log_batch` [resamples, points] are draws of both as the runs' noise
    moves them together; nan where censored, where nothing is known of the noise, or where the quadratic turns over."""

    points: Any
    log_lr: np.ndarray
    log_batch: np.ndarray


def joint_optima(table, optima: Optima | None = None, resamples: int = 1000, seed: int = 0) -> Pairs:
    """The best pair (η, B) of each size and horizon, by a quadratic in (ln η, ln B) through all cells within 2% of the lowest loss.

    Seeds are averaged, and an lr where one of them diverged is left out.

    Raises:
      UserError: rows of one size and horizon are of settings, or shapes, that differ.
    """
    import pandas

    _sized(table)
    optima = optima or measure(table)
    cells = optima.points
    one_setting(cells, ("params", "batch_tokens", "tokens"))
    noise = optima.noise(resamples, seed)
    sizes, horizons = (table[name].astype(float) for name in ("params", "horizon_tokens" if "horizon_tokens" in table else "tokens"))
    found, drawn = [], []
    for (params, tokens), here in cells.groupby(["params", "tokens"]):
        members = [optima.cells[i] for i in here.index]
        lr, loss = (np.concatenate([getattr(cell, name) for cell in members]) for name in ("lr", "loss"))
        batch = np.repeat(here["batch_tokens"].to_numpy(float), [len(cell.lr) for cell in members])
        shared = {"params": float(params), "tokens": float(tokens), "runs": int(here["runs"].sum())}
        shared["flops"] = _flops(table[sizes.eq(params) & horizons.eq(tokens)], 6.0 * params * tokens)
        row, moved = _quadratic(lr, batch, loss, np.concatenate([noise[i] for i in here.index], axis=1))
        found.append(shared | row)
        drawn.append(moved)
    log_lr, log_batch = np.stack(drawn, axis=2)
    return Pairs(pandas.DataFrame(found), log_lr, log_batch)


def _sized(table) -> None:
    if "params" not in table or table["params"].isna().all() or not {"tokens", "horizon_tokens"} & set(table):
        raise UserError("the table has no params or no tokens; the best pair is that of a size and a budget")


def _flops(rows, otherwise: float) -> float:
    return float(rows["flops"].mean()) if "flops" in rows and rows["flops"].notna().any() else otherwise


def _quadratic(lr: np.ndarray, batch: np.ndarray, loss: np.ndarray, noise_RxN: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """What there is of a minimum, and draws of ln η* and ln B*, [2, R]."""
    unknown = np.full((2, len(noise_RxN)), np.nan)
    if not len(loss):
        nothing = dict.fromkeys(("lr", "batch_tokens", "loss", "rms"), np.nan)
        return nothing | {"cells": 0, "censored": True, "why": "no run that did not diverge"}, unknown
    at = int(np.argmin(loss))
    near = loss <= loss[at] * (1 + WITHIN)
    x, z, y = np.log(lr[near] / lr[at]), np.log(batch[near] / batch[at]), loss[near]
    bound = {"lr": float(lr[at]), "batch_tokens": float(batch[at]), "loss": float(loss[at]), "cells": int(near.sum()), "rms": np.nan}
    if near.sum() < _LEAST_CELLS or np.ptp(x) == 0 or np.ptp(z) == 0:
        return bound | {"censored": True, "why": "too few cells near the lowest loss"}, unknown
    design = np.stack([x * x, x * z, z * z, x, z, np.ones_like(x)], axis=1)
    c, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    if rank < 6 or np.isnan(shift := _lowest(c)).any():
        return bound | {"censored": True, "why": "no minimum near the lowest loss"}, unknown
    if not (x.min() <= shift[0] <= x.max() and z.min() <= shift[1] <= z.max()):
        return bound | {"censored": True, "why": "the minimum lies outside of the cells near the lowest loss"}, unknown
    rms = float(np.sqrt(np.mean((y - design @ c) ** 2)))
    found = {"lr": float(lr[at] * np.exp(shift[0])), "batch_tokens": float(batch[at] * np.exp(shift[1]))}
    found |= {"loss": float(c[5] + 0.5 * c[3:5] @ shift), "rms": rms, "censored": False, "why": ""}
    moved_Rx2 = _lowest(c + (y * noise_RxN[:, near]) @ np.linalg.pinv(design).T)
    moved = np.clip(moved_Rx2.T, [[-np.ptp(x)], [-np.ptp(z)]], [[np.ptp(x)], [np.ptp(z)]])
    return bound | found, moved + np.log([[lr[at]], [batch[at]]])


def _lowest(c: np.ndarray) -> np.ndarray:
    """Where quadratics of coefficients of x², xz, z², x, z and 1, [..., 6], are lowest, [..., 2]; nan where they are no valley."""
    xx, xz, zz, x, z, _ = np.moveaxis(c, -1, 0)
    determinant = 4 * xx * zz - xz**2
    with np.errstate(invalid="ignore", divide="ignore"):
        at = np.stack([xz * z - 2 * zz * x, xz * x - 2 * xx * z], axis=-1) / determinant[..., None]
    return np.where(((xx > 0) & (determinant > 0))[..., None], at, np.nan)


def _fitted(name: str, title: str, table, forms: list[Form], least: dict[str, int]) -> Finding:
    _sized(table)
    optima = measure(table)
    pairs = joint_optima(table, optima)
    frame = pairs.points
    inside = (~frame["censored"]).to_numpy()
    points = frame[inside]
    enough(points, 3, title)
    for column, count in least.items():
        different(points[column], column, count, title)
    fits = {}
    for form in forms:
        x = {column: points[column].to_numpy(float) for column in form.inputs}
        origin = f"best pairs of {len(points)} of {len(frame)} sizes and budgets"
        data = Observations(x, points[form.target].to_numpy(float), np.arange(len(points)), origin, frame)
        drawn = pairs.log_lr if form.target == "lr" else pairs.log_batch
        fits[form.name] = _of_runs(fit(form, data), data, drawn[:, inside], table)
    statements = [
        f"{len(points)} of {len(frame)} sizes and budgets have their best pair inside the grid, by a quadratic in (ln η, ln B) through "
        f"what is within {WITHIN:.0%} of the lowest loss."
    ]
    statements += [said for form in forms for said in _against(form, fits[form.name])]
    return Finding(name, title, fits, None, [], [*statements, *confounded(optima.points)], frame, count_runs(table))


def _of_runs(fitted: LawFit, data: Observations, log_y_RxN: np.ndarray, table) -> LawFit:
    """With intervals from the noise of the runs where horizons share them; else each point is a run's own and the bootstrap's hold."""
    return with_run_noise(fitted, data, log_y_RxN, shared=True) if runs_shared(table) else fitted


def _against(form: Form, fitted) -> list[str]:
    """Whether the published exponents are within the intervals. The scales go with them and are not compared by themselves."""
    said = []
    for parameter in form.parameters:
        low, high = fitted.intervals[parameter.name]
        if parameter.published is None or parameter.transform == "log" or low is None or high is None:
            continue
        verdict = "agrees with" if low <= parameter.published <= high else "differs from"
        said.append(f"{form.name}: {parameter.name} {fitted.values[parameter.name]:.3f} {verdict} the published {parameter.published:g}.")
    return said


def find_steplaw(table) -> Finding:
    """η = c·N^a·D^b and B = c·D^d."""
    return _fitted("steplaw", "StepLaw", table, steplaw_forms(), {"params": 2, "tokens": 3})


def find_deepseek(table) -> Finding:
    """η and B as powers of compute."""
    found = _fitted("deepseek", "DeepSeek", table, deepseek_forms(), {"flops": 3})
    said = "DeepSeek's law is of budgets that are spent on the best size for each; a grid of all sizes at all budgets mixes others in."
    return found._replace(statements=[*found.statements, said])


def find_bjorck(table) -> Finding:
    """η* = c·N^a·D^b at the batch size with most minima, the middle one where several have as many."""
    optima = measure(table)
    points = minima(table, optima)
    counts = points["batch_tokens"].value_counts().sort_index()
    most = counts.index[counts == counts.max()]
    batch = most[(len(most) - 1) // 2]
    inside = (optima.points["batch_tokens"].eq(batch) & optima.points["censored"].eq("")).to_numpy()
    here = optima.points[inside]
    several = here["params"].nunique() > 1
    enough(here, 4, "Bjorck's law")
    different(here["tokens"], "tokens", 3, "Bjorck's law")
    form = bjorck_form(several)
    x = {column: here[column].to_numpy(float) for column in form.inputs}
    origin = f"{len(here)} minima in ln η at batch size {batch:.4g} tokens"
    data = Observations(
        x, here["lr"].to_numpy(float), np.arange(len(here)), origin, points.assign(censored=points["batch_tokens"] != batch)
    )
    fitted = _of_runs(fit(form, data), data, optima.draws(1000)["log_lr"][:, inside], table)
    why = "which has most minima" if len(most) == 1 else f"the middle one of {len(most)} that have {counts.max()} minima each, the most"
    statements = [
        f"At one batch size, {batch:.4g} tokens, {why}; at another the exponent may be another.",
        *_against(form, fitted),
        *confounded(optima.points),
    ]
    return Finding("bjorck", "Bjorck et al.", {form.name: fitted}, None, [], statements, data.frame, count_runs(table))


_NEEDS = ("params", "tokens", "batch_tokens", "lr", "loss")
ANALYSES = (
    Analysis("steplaw", "StepLaw", _NEEDS, find_steplaw, STEPLAW),
    Analysis("deepseek", "DeepSeek", _NEEDS, find_deepseek, DEEPSEEK),
    Analysis("bjorck", "Bjorck et al.", ("tokens", "batch_tokens", "lr", "loss"), find_bjorck, BJORCK),
)
