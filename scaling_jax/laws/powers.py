"""Products of powers, c·(x/x0)^a·(z/z0)^b…: the form of most laws of tokens and parameters."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from scaling_jax.laws.fit import LEVEL, LawFit
from scaling_jax.laws.form import Form, Parameter
from scaling_jax.laws.observations import Observations

MOST = 20.0  # an exponent's size; in the loss they are large


class Power(NamedTuple):
    """One factor, (`column`/`reference`)^`exponent`: `symbol` is the column's in the formula, `published` the source's exponent."""

    column: str
    exponent: str
    symbol: str
    reference: float = 1.0
    published: float | None = None


def reference(values) -> float:
    """The geometric mean, to three figures: a scale for a power law to be about, stated in its formula."""
    return float(f"{np.exp(np.mean(np.log(np.asarray(values, float)))):.3g}")


def product_form(
    name: str,
    target: str,
    symbol: str,
    unit: str,
    powers: Sequence[Power],
    source: str,
    huber_delta: float,
    *,
    scale: str = "scale",
    published: float | None = None,
) -> Form:
    """`target` = c·Π (x/x0)^e.

    Args:
      name: of the form.
      target, symbol, unit: the column, what the formula calls it, and the unit of c, whose parameter is named `scale`.
      powers: the factors.
      source: of the law; `published` is its c.
      huber_delta: of residuals of ln target.
    """
    factors = "".join(f"·{p.symbol}^{p.exponent}" if p.reference == 1 else f"·({p.symbol}/{p.reference:g})^{p.exponent}" for p in powers)
    at = ", ".join(f"{p.symbol} {p.reference:g}" for p in powers)
    parameters = [Parameter(scale, unit, f"{symbol} at {at}", "log", 1e-100, 1e100, (1.0,), published)]
    parameters += [Parameter(p.exponent, "", f"of {symbol} in {p.symbol}", "plain", -MOST, MOST, (0.0,), p.published) for p in powers]
    function = _product(scale, tuple((p.column, p.exponent) for p in powers))
    constants = tuple((f"{p.column}0", p.reference) for p in powers)
    columns = tuple(p.column for p in powers)
    starts = functools.partial(_straight, tuple((p.column, p.reference) for p in powers))
    return Form(
        name, f"{symbol} = {scale}{factors}", source, target, columns, tuple(parameters), function, "log", huber_delta, starts, constants
    )


def product(p, x, scale: str, factors: tuple[tuple[str, str], ...]):
    """The logarithm of the parameter `scale` times, for each (column, exponent), (column/column0)^exponent."""
    import jax.numpy as jnp

    logs = jnp.log(p[scale])
    for column, exponent in factors:
        logs = logs + p[exponent] * jnp.log(x[column] / p[f"{column}0"])
    return logs


@functools.cache  # one function for all laws of these columns, and so one program
def _product(scale: str, factors: tuple[tuple[str, str], ...]) -> Callable:
    return functools.partial(product, scale=scale, factors=factors)


def with_run_noise(fitted: LawFit, data: Observations, log_y_RxN: np.ndarray, shared: bool = False) -> LawFit:
    """A fitted product of powers, its intervals from draws of the points instead of a bootstrap over them.

    For points that were measured on the same runs at several horizons, whose errors are not independent: resampled one by one they would
    give intervals that are too narrow, and the runs are too few to be resampled whole.

    Args:
      fitted: of a `product_form`.
      data: what it was fitted to.
      log_y_RxN: draws of ln y, as the noise of the runs moves all points together; rows with nan are left out.
      shared: several of the points that `fitted` resampled one by one are of the same runs.

    Returns:
      The same values. Deviations of the parameters are those of a least-squares plane through the draws', scaled up where the points
      scatter more about the law than the draws do, never down. Without draws it is returned as it was, or where runs are `shared` with
      no interval.
    """
    log_y_RxN = log_y_RxN[np.isfinite(log_y_RxN).all(axis=1)]
    constants = dict(fitted.form.constants)
    design = np.stack([np.ones(len(data.y)), *(np.log(data.x[name] / constants[f"{name}0"]) for name in fitted.form.inputs)], axis=1)
    if fitted.unidentified or len(log_y_RxN) < 100 or len(data.y) <= design.shape[1]:
        return _opened(fitted) if shared else fitted
    deviations_RxN = log_y_RxN - log_y_RxN.mean(axis=0)
    moved_RxP = deviations_RxN @ np.linalg.pinv(design).T
    left_RxN = deviations_RxN - moved_RxP @ design.T
    scatter = np.sum(fitted.residuals**2) / np.mean(np.sum(left_RxN**2, axis=1))
    best_P = fitted.form.transformed([[fitted.values[name] for name in fitted.form.names]])[0]
    draws_RxP = best_P + np.sqrt(max(1.0, scatter)) * moved_RxP
    ends = fitted.form.natural(np.quantile(draws_RxP, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0))
    return fitted._replace(
        draws_RxP=fitted.form.natural(draws_RxP),
        intervals={name: (float(ends[0, i]), float(ends[1, i])) for i, name in enumerate(fitted.form.names)},
        se=dict(zip(fitted.form.names, draws_RxP.std(axis=0, ddof=1).tolist(), strict=True)),
        correlations_PxP=np.atleast_2d(np.corrcoef(draws_RxP.T)),
        widen=1.0,
    )


def _opened(fitted: LawFit) -> LawFit:
    names = fitted.form.names
    why = "has no interval: its points are of the same runs, and the noise of these is not known"
    return fitted._replace(
        draws_RxP=np.zeros((0, len(names))),
        intervals=dict.fromkeys(names, (None, None)),
        se=dict.fromkeys(names, np.nan),
        correlations_PxP=np.full((len(names), len(names)), np.nan),
        unidentified={name: f"{name} {why}" for name in names} | fitted.unidentified,
    )


def _straight(factors: tuple[tuple[str, float], ...], x: dict[str, np.ndarray], y: np.ndarray) -> np.ndarray:
    """The least-squares plane, where descents start; `y` is in the residual space."""
    design = np.stack([np.ones(len(y)), *(np.log(x[column] / at) for column, at in factors)], axis=1)
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    return np.concatenate([np.exp(coefficients[:1]), coefficients[1:]])
