"""Planted laws of learning rate and batch size: form, truth and simulated studies, for the coverage of their intervals.

form, truth, make = PLANTED["surge"]
data = make(numpy.random.default_rng(0))     # Observations
"""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np

from scaling_jax.laws.batch_optimum import batch_form
from scaling_jax.laws.critical_growth import forms as growth_forms
from scaling_jax.laws.form import Form
from scaling_jax.laws.lr_surface import bend_form, power_form
from scaling_jax.laws.observations import Observations
from scaling_jax.laws.other_laws import bjorck_form, deepseek_forms, steplaw_forms
from scaling_jax.laws.sensitivity import law_form as sensitivity_form

BATCHES = 2.0 ** np.arange(8, 14)
HORIZONS = 2.0 ** np.arange(17, 23)
SIZES = np.array([24576.0, 98304.0, 393216.0])
OWN_SD, SHARED_SD = 0.05, 0.02  # of ln η*: of a point by itself, and of all horizons of a size and batch size


def grid(**columns: np.ndarray) -> dict[str, np.ndarray]:
    """All combinations, [n] each."""
    rows = np.array(list(itertools.product(*columns.values())), float)
    return dict(zip(columns, rows.T, strict=True))


def study(form: Form, truth: dict, x: dict, cluster: np.ndarray, own: float, shared: float, rng: np.random.Generator) -> Observations:
    """The truth with log-normal errors, a part of them common to a cluster."""
    labels = np.unique(cluster, return_inverse=True)[1]
    errors = own * rng.normal(size=len(labels)) + shared * rng.normal(size=labels.max() + 1)[labels]
    return Observations(x, form.predict(truth, x) * np.exp(errors), cluster, "planted")


def cells(x: dict[str, np.ndarray], *names: str) -> np.ndarray:
    return np.unique(np.stack([x[name] for name in names], axis=1), axis=0, return_inverse=True)[1].ravel()


def _planted() -> dict[str, tuple[Form, dict[str, float], Callable[[np.random.Generator], Observations]]]:
    made = {}

    def add(name, form, truth, x, cluster, own=OWN_SD, shared=SHARED_SD):
        made[name] = (form, truth, partial(study, form, truth, x, cluster, own, shared))

    # The best learning rate: the runs of a size and batch size serve all horizons.
    widths = grid(width=np.array([32.0, 64.0]), batch_tokens=BATCHES, tokens=HORIZONS)
    sizes = grid(params=SIZES, batch_tokens=BATCHES, tokens=HORIZONS)
    tokens, size, ends = 7.4e5, 1e5, (BATCHES[0], BATCHES[-1])
    for name in ("surge", "plateau"):
        truth = {"lr_crit": 0.012, "lr_crit_tokens_exponent": -0.15, "batch_crit": 2000.0, "batch_crit_tokens_exponent": 0.6}
        more = {"lr_crit_params_exponent": -0.4, "batch_crit_params_exponent": -0.3}
        add(name, bend_form(name, tokens, ends, 0.01), truth, widths, cells(widths, "width", "batch_tokens"))
        add(f"{name}_sizes", bend_form(name, tokens, ends, 0.01, size), truth | more, sizes, cells(sizes, "params", "batch_tokens"))
    truth = {"lr": 0.009, "batch_exponent": 0.4, "tokens_exponent": -0.3}
    add("power", power_form(tokens, 1450.0), truth, widths, cells(widths, "width", "batch_tokens"))
    add("power_sizes", power_form(tokens, 1450.0, size), truth | {"params_exponent": -0.4}, sizes, cells(sizes, "params", "batch_tokens"))

    # One point for each size and horizon.
    budgets = grid(params=SIZES, tokens=HORIZONS)
    each = np.arange(len(budgets["tokens"]))
    truth = {"batch": 1400.0, "tokens_exponent": 0.45}
    shape = Observations({"tokens": budgets["tokens"]}, each, each, "")
    add("batch_optimum", batch_form(shape), truth, budgets, each, 0.1, 0.0)
    shape = Observations(budgets, each, each, "")
    add("batch_optimum_sizes", batch_form(shape), truth | {"params_exponent": -0.2}, budgets, each, 0.1, 0.0)

    # The noise scale, by tokens and by loss.
    x = dict(sizes)
    x["loss"] = 1.0 + 22.0 / x["params"] ** 0.34 + 45.0 / x["tokens"] ** 0.28
    truth = {"batch_crit": 3000.0, "tokens_exponent": 0.6, "loss_exponent": -4.5, "params_exponent": -0.1, "batch_exponent": 0.3}
    for form in growth_forms(Observations(x, x["loss"], each, "")):
        own = {name: truth[name] for name in form.names}
        add(form.name, form, own, x, cells(x, "params", "batch_tokens"), 0.1, 0.05)

    for name, symbol in (("sensitivity", "S"), ("curvature", "d²L/d(ln η)²")):
        form = sensitivity_form(name, symbol, tokens, size)
        truth = {name: 0.1, "tokens_exponent": -0.2, "params_exponent": -0.05}
        add(name, form, truth, sizes, cells(sizes, "params", "batch_tokens"), 0.1, 0.03)

    # Grids as StepLaw's: sizes of 0.2B to 1B, each at its own budgets.
    params = np.repeat([2.1e8, 2.7e8, 4.3e8, 5.4e8, 1.1e9], 4)
    x = {"params": params, "tokens": params * np.tile([20.0, 50.0, 100.0, 250.0], 5)}
    x |= {"flops": 6 * x["params"] * x["tokens"]}
    each = np.arange(len(params))
    truths = {
        "steplaw_lr": {"lr": 1.79, "params_exponent": -0.713, "tokens_exponent": 0.307},
        "steplaw_batch": {"batch": 0.58, "tokens_exponent": 0.571},
        "deepseek_lr": {"lr": 0.3118, "flops_exponent": -0.125},
        "deepseek_batch": {"batch": 0.292, "flops_exponent": 0.3271},
        "bjorck": {"lr": 60.0, "params_exponent": -0.23, "tokens_exponent": -0.32},
    }
    for form in (*steplaw_forms(), *deepseek_forms(), bjorck_form(True)):
        add(form.name, form, truths[form.name], x, each, 0.1, 0.0)
    return made


PLANTED = _planted()
