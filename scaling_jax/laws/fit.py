"""The engine that fits laws: many starts, Huber's loss on the residuals, a bootstrap over runs, and a word on what is not identified.

    fitted = fit(form, data)
    fitted.values, fitted.intervals, fitted.unidentified

What is minimized is Σ huber_δ(residual), a sum and not a mean (Hoffmann et al. 2022, app. D.3; Besiroglu et al. 2024 on why). It is no
likelihood: it has no AICc and no profile intervals; `likelihood` has those. Intervals come from the Bayesian bootstrap (Rubin 1981): every
resample gives each cluster, a run with all its horizons, a random weight of mean 1, and is fitted anew from the best fit and its rivals. No
cluster is ever left out altogether, so that a grid keeps its corners. The weights are exponential, with more variance the more leverage a
cluster has: residuals are smaller there than errors are (MacKinnon and White 1985, HC2 and HC3).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from scaling_jax.errors import UserError
from scaling_jax.laws.descent import descend
from scaling_jax.laws.form import Form
from scaling_jax.laws.observations import Observations

LEVEL = 0.95  # of all intervals
_Z = 1.959963985
_FIRST, _POLISHED, _KEPT = 60, 600, 32  # iterations of every start, of the best; how many those are
_RIVALS = 3  # optima that a resample is fitted from
_IDLE, _PART, _FAR = 1e-7, 0.02, 1e3  # of a direction without effect: its singular value; a parameter's part in it; how far it is followed
_MOST_LEVERAGE = 0.9  # beyond, a cluster alone decides something, and its weight would be 0 most of the time


class LawFit(NamedTuple):
    """A fitted form.

    `values` by parameter, natural units; `intervals` their 95% intervals, an end None where the data rule out nothing up to the bound, or
    where there are too few clusters for any; `se` the standard error of what is fitted (of the logarithm, where the parameter's transform
    is "log"). `draws_RxP` are the bootstrap's parameters in natural units, as fitted: deviations are to be widened by `widen`, but of the
    number that is asked for (`widened`), since parameters often lie along a curved valley. `correlations_PxP` are those of what is fitted.
    `objective` is the summed loss, `rms` and `residuals` (observed minus fitted, [n]) are in the residual space. `unidentified` has a
    sentence for each parameter that the data do not fix: its value is not to be used. `ranges` are the smallest and largest of each input.
    """

    form: Form
    values: dict[str, float]
    intervals: dict[str, tuple[float | None, float | None]]
    se: dict[str, float]
    draws_RxP: np.ndarray
    correlations_PxP: np.ndarray
    objective: float
    rms: float
    residuals: np.ndarray
    points: int
    clusters: int
    unidentified: dict[str, str]
    ranges: dict[str, tuple[float, float]]
    origin: str
    widen: float = 1.0

    @property
    def identified(self) -> bool:
        return not self.unidentified

    def predict(self, x: Mapping[str, ArrayLike]) -> np.ndarray:
        """The law at the inputs, [n]."""
        return self.form.predict(self.values, x)

    def draw_predictions(self, x: Mapping[str, ArrayLike]) -> np.ndarray:
        """The law at the inputs by every resample, [R, n], widened about the fit's."""
        return widened(self.predict(x), self.form.predict_many(self.draws_RxP, x), self.widen, log=self.form.space == "log")

    def interval(self, x: Mapping[str, ArrayLike]) -> tuple[np.ndarray, np.ndarray]:
        """95% interval of the law (not of a new measurement) at the inputs, two of [n]; nan where there are too few clusters for one."""
        predictions = self.draw_predictions(x)
        if len(predictions) == 0:
            return np.full(predictions.shape[1], np.nan), np.full(predictions.shape[1], np.nan)
        low, high = np.quantile(predictions, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method="weibull")
        return low, high

    def inside(self, x: Mapping[str, float]) -> bool:
        """Whether the inputs lie in the measured range, each by itself."""
        return all(low * (1 - 1e-9) <= x[name] <= high * (1 + 1e-9) for name, (low, high) in self.ranges.items())


def widened(value: ArrayLike, drawn_R: np.ndarray, widen: float, log: bool = True) -> np.ndarray:
    """Draws of a number, [R, …], their deviations from its value at the fit widened for few clusters; of its logarithm where `log`."""
    value, drawn_R = np.asarray(value, float), np.asarray(drawn_R, float)
    return value * (drawn_R / value) ** widen if log else value + widen * (drawn_R - value)


def fit(
    form: Form,
    data: Observations,
    *,
    resamples: int = 400,
    seed: int = 0,
    huber_delta: float | None = None,
    starts: ArrayLike | None = None,
) -> LawFit:
    """Fits a form to observations.

    Args:
      form: what to fit.
      data: the observations; `cluster` labels are what the bootstrap resamples.
      resamples: of the bootstrap; 0 for none, and then no intervals.
      seed: of the bootstrap.
      huber_delta: instead of the form's.
      starts: parameters to start from, [S, P] in natural units, instead of the form's.

    Returns:
      The best of all descents. For few clusters G the bootstrap's deviations are widened by √((G+1)/G)·t(f)/1.96, f being the lesser of
      G − 1 and n − P (points less parameters): of a straight line this gives Student's interval. With G ≤ P every interval is open.

    Raises:
      UserError: no more points than parameters, fewer than three clusters, or values that the form cannot take.
    """
    delta = form.huber_delta if huber_delta is None else huber_delta
    count, free = len(data.y), len(form.parameters)
    if count <= free:
        raise UserError(
            f"{form.name}: {count} points cannot fix {free} parameters ({', '.join(form.names)}); at least {free + 1} are needed"
        )
    y = residual_space(form, data)
    clusters = len(np.unique(data.cluster))
    if clusters < 3:
        raise UserError(f"{form.name}: its {count} points come from {clusters} independent runs; at least 3 are needed")
    fitted, objective, rivals_KxP = _best(form, data.x, y, delta, starts)
    values = dict(zip(form.names, form.natural(fitted).tolist(), strict=True))
    residuals = y - _log_or_plain(form, values, data.x)
    slope_NxP = _slope(form, fitted, data.x)
    variance_G = _variance(slope_NxP, data.cluster, np.abs(residuals) <= delta)
    weight_RxN, idle_KxP = bootstrap_weights(data.cluster, resamples, seed, variance_G), _idle_directions(slope_NxP)
    raw_RxP = _reweighted(form, data.x, y, weight_RxN, rivals_KxP, delta)
    if len(idle_KxP) and len(raw_RxP):
        raw_RxP = _along(form, data.x, y, weight_RxN, raw_RxP, idle_KxP, delta, seed)
    widen = _widening(count, clusters, free)
    draws_RxP = raw_RxP if np.isfinite(widen) else raw_RxP[:0]
    intervals, unidentified = _intervals(form, fitted, draws_RxP, len(raw_RxP), clusters, widen, idle_KxP)
    spread_RxP = draws_RxP if len(draws_RxP) > 1 else np.full((2, free), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.atleast_2d(np.corrcoef(spread_RxP.T))
    return LawFit(
        form=form,
        values=values,
        intervals=intervals,
        se=dict(zip(form.names, (widen * spread_RxP.std(axis=0, ddof=1)).tolist(), strict=True)),
        draws_RxP=form.natural(draws_RxP),
        correlations_PxP=correlations,
        objective=objective,
        rms=float(np.sqrt(np.mean(residuals**2))),
        residuals=residuals,
        points=count,
        clusters=clusters,
        unidentified=unidentified,
        ranges={name: (float(np.min(data.x[name])), float(np.max(data.x[name]))) for name in form.inputs},
        origin=data.origin,
        widen=widen,
    )


def refits(form: Form, data: Observations, rows_N: np.ndarray, weight_RxN: np.ndarray) -> np.ndarray:
    """The parameters that fit some of the rows (a mask, [n]) best, [1 + R, P]: with all weights 1, then with each of the weights [R, n]."""
    y = residual_space(form, data)
    fitted_P, _, rivals_KxP = _best(form, data.x, y, form.huber_delta, rows_N=rows_N)
    again_RxP = _reweighted(form, data.x, y, np.where(rows_N, weight_RxN, 0.0), rivals_KxP, form.huber_delta)
    return form.natural(np.concatenate([fitted_P[None], again_RxP]))


def bootstrap_weights(cluster: np.ndarray, resamples: int, seed: int, variance_G: np.ndarray | float = 1.0) -> np.ndarray:
    """Weights of the rows, [R, n], one for each cluster: gamma distributed of mean 1, exponential where the variance is 1."""
    clusters, cluster_N = np.unique(cluster, return_inverse=True)
    weight_RxG = np.random.default_rng(seed).gamma(1 / np.asarray(variance_G), variance_G, size=(resamples, len(clusters)))
    weight_RxG *= len(clusters) / weight_RxG.sum(axis=1, keepdims=True)
    return weight_RxG[:, cluster_N]


def residual_space(form: Form, data: Observations) -> np.ndarray:
    """The target as it is fitted, [n]; UserError where the form cannot take a value."""
    y = np.asarray(data.y, float)
    lengths = {name: len(values) for name, values in data.x.items()} | {form.target: len(y), "cluster": len(data.cluster)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of several lengths: {lengths}")
    for name, values in [(form.target, y), *((name, np.asarray(data.x[name], float)) for name in form.inputs)]:
        positive = name != form.target or form.space == "log"
        faulty = np.flatnonzero(~np.isfinite(values) | ((values <= 0) if positive else False))
        if len(faulty):
            kind = "positive" if positive else "finite"
            raise UserError(f"{form.name}: {name} is {values[faulty[0]]:g} in point {faulty[0] + 1}; must be a {kind} number")
    return np.log(y) if form.space == "log" else y


def _log_or_plain(form: Form, values: Mapping[str, float], x: Mapping[str, np.ndarray]) -> np.ndarray:
    predicted = form.predict(values, x)
    return np.log(predicted) if form.space == "log" else predicted


def _best(form, x, y, delta, starts=None, rows_N=None) -> tuple[np.ndarray, float, np.ndarray]:
    """The best fit [P], its objective, and the optima worth starting resamples from [K, P], itself first."""
    rows_N = np.ones(len(y), bool) if rows_N is None else rows_N
    if starts is None:
        starts = form.all_starts({name: values[rows_N] for name, values in x.items()}, y[rows_N])
    start_SxP = form.transformed(np.atleast_2d(np.asarray(starts, float)))
    weight_1xN = rows_N.astype(float)[None]  # rows without weight, not fewer rows: one program for all
    first = descend(form, x, y[None], weight_1xN, start_SxP, delta, _FIRST)
    kept = np.argsort(first.objective_Q, kind="stable")[:_KEPT]
    last = descend(form, x, y[None], weight_1xN, first.fitted_QxP[kept], delta, _POLISHED)
    order = np.argsort(last.objective_Q, kind="stable")
    if not np.isfinite(last.objective_Q[order[0]]):
        raise UserError(f"{form.name}: no start of its parameters gives finite predictions for these points")
    rivals: list[int] = []
    for i in order:  # optima that differ, and are not far worse
        apart = all(np.abs(last.fitted_QxP[i] - last.fitted_QxP[j]).max() > 1e-2 for j in rivals)
        if apart and last.objective_Q[i] <= 1.5 * last.objective_Q[order[0]] + 1e-300 and len(rivals) < _RIVALS:
            rivals.append(i)
    return last.fitted_QxP[order[0]], float(last.objective_Q[order[0]]), last.fitted_QxP[rivals]


def _reweighted(form, x, y, weight_RxN, rivals_KxP, delta) -> np.ndarray:
    """What is fitted of every resample, [R, P]: the best of the descents from all rivals."""
    resamples, rivals = len(weight_RxN), len(rivals_KxP)
    if not resamples:
        return np.zeros((0, rivals_KxP.shape[1]))
    found = descend(form, x, y[None], np.tile(weight_RxN, (rivals, 1)), np.repeat(rivals_KxP, resamples, axis=0), delta, 2 * _FIRST)
    objective_KxR = found.objective_Q.reshape(rivals, resamples)
    return found.fitted_QxP.reshape(rivals, resamples, -1)[objective_KxR.argmin(axis=0), np.arange(resamples)]


def _widening(count: int, clusters: int, free: int) -> float:
    """Of the bootstrap's deviations for few clusters; inf where there are too few for any interval."""
    from scipy.special import stdtrit  # only here: slow to import

    if clusters <= free:
        return np.inf
    return float(np.sqrt((clusters + 1) / clusters) * stdtrit(min(clusters - 1, count - free), (1 + LEVEL) / 2) / _Z)


def _intervals(form, fitted_P, draws_RxP, resamples, clusters, widen, idle_KxP):
    """Intervals in natural units, each parameter by itself, and what is not identified."""
    low_P, high_P = form.transformed([[p.low for p in form.parameters], [p.high for p in form.parameters]])
    unidentified: dict[str, str] = {}
    tail = (1 - LEVEL) / 2
    if len(draws_RxP):
        draws_RxP = np.clip(fitted_P + widen * (draws_RxP - fitted_P), low_P, high_P)
    intervals = {}
    for i, parameter in enumerate(form.parameters):
        reach = 1e-3 * min(high_P[i] - low_P[i], 1e3)
        at_low, at_high = (np.mean(np.abs(draws_RxP[:, i] - bound) <= reach) if len(draws_RxP) else 1.0 for bound in (low_P[i], high_P[i]))
        low, high = np.quantile(draws_RxP[:, i], [tail, 1 - tail], method="weibull") if len(draws_RxP) else (np.nan, np.nan)
        ends = [None if open_ > tail else float(form.natural(_at(fitted_P, i, end))[i]) for open_, end in ((at_low, low), (at_high, high))]
        together = np.any(np.abs(idle_KxP) > _PART, axis=0) & np.any(np.abs(idle_KxP[:, [i]]) > _PART)
        ends = [None, None] if together[i] else ends
        intervals[parameter.name] = (ends[0], ends[1])
        if together[i] and resamples:
            others = " and ".join(name for j, name in enumerate(form.names) if together[j] and j != i)
            why = f"the data fix it only together with {others}" if others else "nothing in the data depends on it"
            unidentified[parameter.name] = f"{parameter.name} is not identified: {why}"
        elif abs(fitted_P[i] - low_P[i]) <= reach or abs(fitted_P[i] - high_P[i]) <= reach:
            unidentified[parameter.name] = (
                f"{parameter.name} is not identified: the best fit runs to the bound, {form.natural(fitted_P)[i]:.3g}"
            )
        elif len(draws_RxP) and ends == [None, None]:
            unidentified[parameter.name] = f"{parameter.name} is not identified: its interval is open at both ends"
        elif len(draws_RxP) and None in ends:
            known = f"above {ends[0]:.3g}" if ends[0] is not None else f"below {ends[1]:.3g}"
            unidentified[parameter.name] = f"{parameter.name} is not identified: the data say no more than {known}"
        elif not len(draws_RxP) and resamples:
            needed = f"{len(form.parameters)} parameters need at least {len(form.parameters) + 1}"
            unidentified[parameter.name] = f"{parameter.name} has no interval: {clusters} independent runs, and {needed}"
    return intervals, unidentified


def _slope(form: Form, fitted_P: np.ndarray, x: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of the predictions in what is fitted, [n, P]; 0 where it is not finite."""
    steps_PxP = np.diag(1e-5 * np.maximum(1.0, np.abs(fitted_P)))
    ends = form.predict_many(form.natural(np.concatenate([fitted_P + steps_PxP, fitted_P - steps_PxP])), x)
    ends = np.log(ends) if form.space == "log" else ends
    return np.nan_to_num((ends[: len(steps_PxP)] - ends[len(steps_PxP) :]).T / (2 * np.diag(steps_PxP)))


def _variance(slope_NxP: np.ndarray, cluster: np.ndarray, squared_N: np.ndarray) -> np.ndarray:
    """Of each cluster's weight, [G], by its leverage h, how much of its own prediction its observations decide: 1/(1 − h)² of a single
    point (HC3); of several, whose h is that of their most decisive combination, 1/(1 − h) (HC2). Only residuals that count by their square
    (a mask, [n]) are shrunk by leverage; beyond Huber's δ all pull alike.
    """
    basis_NxP, size_P, _ = np.linalg.svd(slope_NxP, full_matrices=False)
    basis_NxP = basis_NxP[:, size_P > 1e-9 * size_P.max()]
    clusters, rows = np.unique(cluster, return_counts=True)
    leverage_G = np.array([np.linalg.norm(basis_NxP[cluster == one], 2) ** 2 for one in clusters])
    leverage_G *= [np.mean(squared_N[cluster == one]) for one in clusters]
    return (1 - np.minimum(leverage_G, _MOST_LEVERAGE)) ** np.where(rows == 1, -2.0, -1.0)


def _idle_directions(slope_NxP: np.ndarray) -> np.ndarray:
    """Directions of what is fitted along which no prediction changes, [K, P]: what only together means something, as the powers of two
    inputs that are proportional do. No descent and no resample moves along them, so they would look certain."""
    size_P = np.linalg.norm(slope_NxP, axis=0)
    size_P = np.where(size_P > 0, size_P, 1.0)
    _, singular, rows_PxP = np.linalg.svd(slope_NxP / size_P, full_matrices=True)
    idle_KxP = rows_PxP[np.concatenate([singular, np.zeros(len(rows_PxP) - len(singular))]) < _IDLE * max(singular.max(), 1e-300)]
    return idle_KxP / size_P / np.linalg.norm(idle_KxP / size_P, axis=1, keepdims=True) if len(idle_KxP) else idle_KxP


def _along(form, x, y, weight_RxN, draws_RxP, idle_KxP, delta, seed):
    """The draws moved along directions that the data leave free, anywhere within the bounds, and fitted anew from there. Each is still
    a fit of its resample, but they spread over all that fit as well: so predictions off the data are as open as they should be."""
    low_P, high_P = form.transformed([[p.low for p in form.parameters], [p.high for p in form.parameters]])
    rng, moved_RxP = np.random.default_rng(seed), draws_RxP
    for idle_P in idle_KxP:
        sign_Rx1 = rng.choice([-1.0, 1.0], size=(len(draws_RxP), 1))
        end_RxP = _within(moved_RxP, _FAR * sign_Rx1 * idle_P, low_P, high_P)
        moved_RxP = moved_RxP + rng.uniform(size=sign_Rx1.shape) ** 3 * (end_RxP - moved_RxP)  # more of them near than far
    before_R = descend(form, x, y[None], weight_RxN, draws_RxP, delta, 0).objective_Q
    found = descend(form, x, y[None], weight_RxN, moved_RxP, delta, 2 * _FIRST)
    as_good_R = found.objective_Q <= before_R * (1 + 1e-3) + 1e-12 * len(y)
    return np.where(as_good_R[:, None], found.fitted_QxP, draws_RxP)


def _within(fitted_P, move_RxP, low_P, high_P):
    """From each point along its move, as far as the bounds let it go."""
    room_RxP = np.where(move_RxP > 0, high_P - fitted_P, fitted_P - low_P)
    with np.errstate(divide="ignore", invalid="ignore"):
        share_RxP = np.where(move_RxP != 0, room_RxP / np.abs(move_RxP), np.inf)
    return fitted_P + np.minimum(1.0, share_RxP.min(axis=1, keepdims=True)) * move_RxP


def _at(fitted_P: np.ndarray, index: int, value: float) -> np.ndarray:
    changed = fitted_P.copy()
    changed[index] = value
    return changed
