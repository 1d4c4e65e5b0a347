"""Published laws of the best learning rate and batch size, fitted to a table and set beside their constants: StepLaw, DeepSeek, Bjorck.

All three say what to set from sizes alone. StepLaw and DeepSeek are of the best pair (η, B) of a model and budget, found together; Bjorck
keeps B and asks how η* falls with the budget.
"""

from typing import Any

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import fit
from scaling_jax.laws.form import Form
from scaling_jax.laws.lr_optimum import count_runs, measure, minima
from scaling_jax.laws.observations import Observations, checked, different, enough
from scaling_jax.laws.powers import Power, product_form

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


def joint_optima(table):
    """The best pair (η, B) of each size and horizon, by a quadratic in (ln η, ln B) through all cells within 2% of the lowest loss.

    Returns:
      A DataFrame: params, tokens, flops, lr, batch_tokens, loss (of the quadratic there, nats per token), cells (that it is fitted to), rms
      (of its residuals, nats per token), runs, and `censored` with `why`: too few cells, no minimum, or one outside of those cells.
    """
    import pandas

    rows = checked(table, ("loss", "lr", "batch_tokens"))
    horizon = "horizon_tokens" if "horizon_tokens" in rows else "tokens"
    if "params" not in rows or horizon not in rows:
        raise UserError("the table has no params or no tokens; the best pair is that of a size and a budget")
    flops = rows["flops"].astype(float) if "flops" in rows else 6 * rows["params"].astype(float) * rows[horizon].astype(float)
    rows = rows.assign(_tokens=rows[horizon].astype(float), _flops=flops)
    found = []
    for (params, tokens), cell in rows.groupby(["params", "_tokens"]):
        grid = cell.groupby(["lr", "batch_tokens"])["loss"].mean().reset_index()
        shared = {"params": float(params), "tokens": float(tokens), "flops": float(cell["_flops"].mean()), "runs": len(cell)}
        found.append(shared | _quadratic(*(grid[name].to_numpy(float) for name in ("lr", "batch_tokens", "loss"))))
    return pandas.DataFrame(found)


def _quadratic(lr: np.ndarray, batch: np.ndarray, loss: np.ndarray) -> dict[str, Any]:
    at = int(np.argmin(loss))
    near = loss <= loss[at] * (1 + WITHIN)
    x, z, y = np.log(lr[near] / lr[at]), np.log(batch[near] / batch[at]), loss[near]
    bound = {"lr": float(lr[at]), "batch_tokens": float(batch[at]), "loss": float(loss[at]), "cells": int(near.sum()), "rms": np.nan}
    if near.sum() < _LEAST_CELLS or np.ptp(x) == 0 or np.ptp(z) == 0:
        return bound | {"censored": True, "why": "too few cells near the lowest loss"}
    design = np.stack([x * x, x * z, z * z, x, z, np.ones_like(x)], axis=1)
    c, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    curve = np.array([[2 * c[0], c[1]], [c[1], 2 * c[2]]])
    if rank < 6 or np.linalg.eigvalsh(curve).min() <= 0:
        return bound | {"censored": True, "why": "no minimum near the lowest loss"}
    shift = -np.linalg.solve(curve, c[3:5])
    if not (x.min() <= shift[0] <= x.max() and z.min() <= shift[1] <= z.max()):
        return bound | {"censored": True, "why": "the minimum lies outside of the cells near the lowest loss"}
    rms = float(np.sqrt(np.mean((y - design @ c) ** 2)))
    found = {"lr": float(lr[at] * np.exp(shift[0])), "batch_tokens": float(batch[at] * np.exp(shift[1]))}
    return bound | found | {"loss": float(c[5] + 0.5 * c[3:5] @ shift), "rms": rms, "censored": False, "why": ""}


def _fitted(name: str, title: str, table, forms: list[Form], source: str, least: dict[str, int]) -> Finding:
    frame = joint_optima(table)
    points = frame[~frame["censored"]]
    enough(points, 3, title)
    for column, count in least.items():
        different(points[column], column, count, title)
    fits, numbers = {}, []
    for form in forms:
        x = {column: points[column].to_numpy(float) for column in form.inputs}
        origin = f"best pairs of {len(points)} of {len(frame)} sizes and budgets"
        data = Observations(x, points[form.target].to_numpy(float), np.arange(len(points)), origin, frame)
        fits[form.name] = fit(form, data)
        numbers += _beside(form, fits[form.name], source)
    statements = [
        f"{len(points)} of {len(frame)} sizes and budgets have their best pair inside the grid, by a quadratic in (ln η, ln B) through "
        f"what is within {WITHIN:.0%} of the lowest loss."
    ]
    statements += [said for form in forms for said in _against(form, fits[form.name])]
    return Finding(name, title, fits, None, numbers, statements, frame, count_runs(table))


def _beside(form: Form, fitted, source: str) -> list[Number]:
    names = {parameter.name: parameter for parameter in form.parameters if parameter.published is not None}
    return [
        Number(f"{form.name}: {name}", fitted.values[name], *fitted.intervals[name], p.unit, p.published, source)
        for name, p in names.items()
    ]


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
    return _fitted("steplaw", "StepLaw", table, steplaw_forms(), STEPLAW, {"params": 2, "tokens": 3})


def find_deepseek(table) -> Finding:
    """η and B as powers of compute."""
    found = _fitted("deepseek", "DeepSeek", table, deepseek_forms(), DEEPSEEK, {"flops": 3})
    said = "DeepSeek's law is of budgets that are spent on the best size for each; a grid of all sizes at all budgets mixes others in."
    return found._replace(statements=[*found.statements, said])


def find_bjorck(table) -> Finding:
    """η* = c·N^a·D^b at the batch size with most minima."""
    optima = measure(table)
    points = minima(table, optima)
    batch = points["batch_tokens"].value_counts().sort_index().idxmax()
    here = points[points["batch_tokens"] == batch]
    several = here["params"].nunique() > 1
    enough(here, 4, "Bjorck's law")
    different(here["tokens"], "tokens", 3, "Bjorck's law")
    form = bjorck_form(several)
    x = {column: here[column].to_numpy(float) for column in form.inputs}
    origin = f"{len(here)} minima in ln η at batch size {batch:.4g} tokens"
    data = Observations(
        x, here["lr"].to_numpy(float), np.arange(len(here)), origin, points.assign(censored=points["batch_tokens"] != batch)
    )
    fitted = fit(form, data)
    statements = [
        f"At one batch size, {batch:.4g} tokens, which has most minima; at another the exponent may be another.",
        *_against(form, fitted),
    ]
    return Finding(
        "bjorck", "Bjorck et al.", {form.name: fitted}, None, _beside(form, fitted, BJORCK), statements, data.frame, count_runs(table)
    )


_NEEDS = ("params", "tokens", "batch_tokens", "lr", "loss")
ANALYSES = (
    Analysis("steplaw", "StepLaw", _NEEDS, find_steplaw, STEPLAW),
    Analysis("deepseek", "DeepSeek", _NEEDS, find_deepseek, DEEPSEEK),
    Analysis("bjorck", "Bjorck et al.", ("tokens", "batch_tokens", "lr", "loss"), find_bjorck, BJORCK),
)
