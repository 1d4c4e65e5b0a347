"""A laws.json whose laws and errors were chosen, not fitted: what a plan must say follows from them in closed form."""

from pathlib import Path

import numpy as np
import pandas

from scaling_jax.laws import store
from scaling_jax.laws.chinchilla_form import BESIROGLU, CHINCHILLA
from scaling_jax.laws.compare import Comparison
from scaling_jax.laws.finding import Finding, Number
from scaling_jax.laws.fit import LawFit
from scaling_jax.laws.lr_surface import bend_form, power_form
from scaling_jax.laws.powers import Power, product_form

T0, N0 = 1e9, 1e7
TOKENS, PARAMS, BATCHES = (1e8, 1e10), (1e6, 1e8), (1e4, 1e6)
SURGE = {"lr_crit": 0.01, "lr_crit_tokens_exponent": -0.2, "batch_crit": 1e5, "batch_crit_tokens_exponent": 0.5}
POWER = {"lr": 0.005, "batch_exponent": 0.3, "tokens_exponent": -0.25}
BATCH = {"batch": 6e4, "tokens_exponent": 0.4}
CURVATURE = {"curvature": 0.2, "tokens_exponent": -0.1}
GROWTH = {"batch_crit": 2e5, "tokens_exponent": 0.5}
SHARES = {"": 2e-3, ", least": 1e-3, ", most": 4e-3}  # what a factor 2 in B costs, relative


def fitted(form, values, se, ranges, unidentified=(), resamples=400):
    """A fit with these values; `se` is that of everything that is fitted."""
    rng = np.random.default_rng(len(form.name))
    best_P = form.transformed([[values[name] for name in form.names]])[0]
    draws_RxP = form.natural(best_P + se * rng.normal(size=(resamples, len(best_P))))
    ends = np.quantile(draws_RxP, [0.025, 0.975], axis=0) if resamples else np.full((2, len(best_P)), np.nan)
    intervals = {name: (float(ends[0, i]), float(ends[1, i])) if resamples else (None, None) for i, name in enumerate(form.names)}
    return LawFit(
        form=form, values=dict(values), intervals=intervals, se=dict.fromkeys(form.names, se), draws_RxP=draws_RxP,
        correlations_PxP=np.eye(len(best_P)), objective=0.1, rms=0.01, residuals=np.zeros(0), points=36, clusters=12,
        unidentified={name: f"{name} is not identified: so it was made" for name in unidentified}, ranges=dict(ranges), origin="made",
    )  # fmt: skip


def findings(**changes):
    """Findings by law, some replaced: by a sentence, why a law could not be fitted, or by None, left out."""
    at = Power("tokens", "tokens_exponent", "T", T0)
    surface = {"batch_tokens": BATCHES, "tokens": TOKENS}
    surge, power = bend_form("surge", T0, BATCHES, 0.01), power_form(T0, 1e5)
    batch = product_form("batch_optimum", "batch_tokens", "B*", "tokens", [at], "made", 0.2, scale="batch")
    curvature = product_form("curvature", "curvature", "c", "nats per token", [at], "made", 0.2, scale="curvature")
    growth = product_form("growth_tokens", "batch_crit_tokens", "B_crit", "tokens", [at], "made", 0.1, scale="batch_crit")
    made = {
        "lr_surface": {"surge": fitted(surge, SURGE, 0.02, surface), "power": fitted(power, POWER, 0.02, surface)},
        "batch_optimum": {"batch_optimum": fitted(batch, BATCH, 0.05, {"tokens": TOKENS})},
        "critical_growth": {"growth_tokens": fitted(growth, GROWTH, 0.02, {"tokens": TOKENS})},
        "sensitivity": {"curvature": fitted(curvature, CURVATURE, 0.05, {"tokens": TOKENS})},
        "chinchilla_3": {"chinchilla_3": fitted(CHINCHILLA, BESIROGLU, 0.002, {"params": PARAMS, "tokens": TOKENS})},
    }
    made |= {name: fits for name, fits in changes.items() if not isinstance(fits, str | type(None))}
    found = {}
    for name, fits in made.items():
        tied = name in changes and len(fits) > 1
        names = list(fits)
        comparison = Comparison("tokens", 1e9, 9, 12, [], names[0], names if tied else names[:1], "made")
        numbers = [Number(f"loss of a factor 2 in B, relative{end}", v) for end, v in SHARES.items()] if name == "batch_optimum" else []
        found[name] = Finding(name, name, fits, names[0], numbers, [], pandas.DataFrame(), 36, comparison)
    said = ["η* under mup: no difference between widths is shown."]
    found["width_equality"] = Finding("width_equality", "widths", {}, None, [], said, pandas.DataFrame(), 36)
    found |= {name: why for name, why in changes.items() if isinstance(why, str)}
    return {name: finding for name, finding in found.items() if changes.get(name, finding) is not None}


def surge_lr(batch, tokens):
    """The lr by `SURGE`."""
    ratio = batch / (SURGE["batch_crit"] * (tokens / T0) ** SURGE["batch_crit_tokens_exponent"])
    return SURGE["lr_crit"] * (tokens / T0) ** SURGE["lr_crit_tokens_exponent"] * 2 / (np.sqrt(ratio) + 1 / np.sqrt(ratio))


def write(path: Path, base=None, parametrization="mup", params=PARAMS, **changes) -> Path:
    """A laws.json of them, of a table with sizes from and to `params`."""
    ends = {"params": params, "tokens": TOKENS, "batch_tokens": BATCHES}
    table = pandas.DataFrame({**ends, "loss": [3.0, 2.9], "status": "finished", "parametrization": parametrization, "context": 64})
    store.write(path, store.record(table, findings(**changes), "runs/made", base or {}))
    return path
