"""Rival forms told apart by what they are for: each is fitted to the smaller scales and judged on the largest, which it has not seen."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.fit import LEVEL, bootstrap_weights, refits, residual_space
from scaling_jax.laws.form import Form
from scaling_jax.laws.observations import Observations

_FEW = 4  # held-out runs below which nothing is told apart


class Rival(NamedTuple):
    """`held_out` and `fitted` are root mean squares of the residuals beyond, and within, what was fitted, in the residual space. `low` and
    `high`: 95% interval of its mean squared error beyond, less that of the best; both 0 for the best itself."""

    form: str
    held_out: float
    fitted: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Rivals, best first. Held out are the `points` with `by` above `beyond`; `clusters` counts the independent runs in all. `tied` are
    those that the data cannot tell from the best, itself among them."""

    by: str
    beyond: float
    points: int
    clusters: int
    rivals: list[Rival]
    best: str
    tied: list[str]
    statement: str


def compare(forms: Sequence[Form], data: Observations, by: str, share: float = 0.25, resamples: int = 200, seed: int = 0) -> Comparison:
    """Fits every form to the points with the smaller `by`, and compares their errors at the largest.

    Args:
      forms: of one target and residual space.
      data: the observations.
      by: the input to extrapolate in; need not be one of every form's inputs, but in `data.x`.
      share: at least this share of the points is held out: as few of the largest values of `by` as give it, never the smaller half of them.
      resamples, seed: of the bootstrap over clusters, in which every form is fitted anew and judged with the same weights.

    Raises:
      UserError: `by` has fewer than three values, or too few points remain to fit.
    """
    values = np.unique(data.x[by])
    if len(values) < 3:
        raise UserError(f"rivals are compared by extrapolation in {by}, which needs 3 different values or more; there are {len(values)}")
    upper = values[-max(1, len(values) // 2) :]
    beyond = values[-2]
    for value in upper[::-1]:
        beyond = values[np.searchsorted(values, value) - 1]
        if np.mean(data.x[by] > beyond) >= share:
            break
    out_N = data.x[by] > beyond
    most = max(len(form.parameters) for form in forms)
    if (~out_N).sum() <= most:
        raise UserError(f"{(~out_N).sum()} points with {by} up to {beyond:g} cannot fix {most} parameters; no rivals are compared")
    weight_RxN = bootstrap_weights(data.cluster, resamples, seed)
    errors_sq = {form.name: _errors_sq(form, data, out_N, weight_RxN) for form in forms}
    beyond_R = {name: _mean(sq[:, out_N], weight_RxN[:, out_N]) for name, (sq, _) in errors_sq.items()}
    order = sorted(errors_sq, key=lambda name: errors_sq[name][1][out_N].mean())
    best, rivals, tied = order[0], [], [order[0]]
    held_out_clusters = len(np.unique(data.cluster[out_N]))
    for name in order:
        low, high = np.quantile(beyond_R[name] - beyond_R[best], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        held_out, fitted = (float(np.sqrt(errors_sq[name][1][rows].mean())) for rows in (out_N, ~out_N))
        rivals.append(Rival(name, held_out, fitted, float(low), float(high)))
        if name != best and (low <= 0 or held_out_clusters < _FEW):
            tied.append(name)
    where = f"beyond {by} {beyond:.3g} ({int(out_N.sum())} points held out)"
    errors_text = ", ".join(f"{rival.form} {rival.held_out:.3g}" for rival in rivals)
    if held_out_clusters < _FEW:
        where += f", from {held_out_clusters} independent runs, which are too few to tell by"
    if len(tied) == 1:
        statement = f"{best} predicts best {where}: root mean square errors {errors_text}"
    else:
        statement = f"{', '.join(tied[:-1])} and {tied[-1]} cannot be told apart {where}: root mean square errors {errors_text}"
    return Comparison(by, float(beyond), int(out_N.sum()), len(np.unique(data.cluster)), rivals, best, tied, statement)


def _errors_sq(form: Form, data: Observations, out_N: np.ndarray, weight_RxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared residuals of all rows by fits to those that are not held out: of each resample [R, n], and of the plain fit [n]."""
    y = residual_space(form, data)
    predicted = form.predict_many(refits(form, data, ~out_N, weight_RxN), data.x)
    errors_sq = (y - (np.log(predicted) if form.space == "log" else predicted)) ** 2
    return errors_sq[1:], errors_sq[0]


def _mean(values_RxN: np.ndarray, weight_RxN: np.ndarray) -> np.ndarray:
    return (values_RxN * weight_RxN).sum(axis=1) / weight_RxN.sum(axis=1)
