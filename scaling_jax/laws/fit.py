"""The engine that fits laws to measurements: straight lines on log-log axes and any form in the log, both with honest intervals."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_Z = 1.959963985  # of a 95% interval
_SD_PER_INTERVAL = 1 / (2 * _Z)  # a 95% interval is this many times wider than the standard deviation is


class PowerLaw(NamedTuple):
    """y = exp(log_scale) · x^exponent.

    `exponent_se` is the standard error of the exponent, `points` the number of measurements that entered. `centre` is the log x about
    which slope and height are independent, and `centre_se` the standard error of log y there.
    """

    exponent: float
    exponent_se: float
    log_scale: float
    points: int
    centre: float = 0.0
    centre_se: float = 0.0

    def __call__(self, x: ArrayLike) -> np.ndarray:
        return np.exp(self.log_scale) * np.asarray(x, float) ** self.exponent

    def interval(self, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """95% interval of the law (not of a new measurement) at x, from 1.96 standard errors of log y."""
        half = _Z * np.hypot(self.centre_se, self.exponent_se * (np.log(np.asarray(x, float)) - self.centre))
        return self(x) * np.exp(-half), self(x) * np.exp(half)


def power_law(x: ArrayLike, y: ArrayLike, low: ArrayLike | None = None, high: ArrayLike | None = None) -> PowerLaw | None:
    """Weighted least squares of log y on log x.

    Args:
      x, y: positive measurements, [points].
      low, high: 95% interval of each y. A point's weight is 1/sd², sd = (log high − log low) / (2·1.96). Without them all points weigh
        the same, and the standard errors come from the scatter alone.

    Returns:
      The law, or None where fewer than three usable points at two or more different x remain. A point is left out where any of its
      numbers is missing (nan), infinite or not positive: an interval with an open end says that the value is unknown, and no width is
      invented for it. The standard errors are those that the intervals imply, scaled up by √(χ²/dof) where the points scatter more than
      their intervals allow, and never scaled down.
    """
    if (low is None) != (high is None):
        raise ValueError("low and high go together")
    bare = low is None
    x, y = np.asarray(x, float), np.asarray(y, float)
    low, high = (y / np.exp(_Z), y * np.exp(_Z)) if bare else (np.asarray(low, float), np.asarray(high, float))
    if not x.shape == y.shape == low.shape == high.shape or x.ndim != 1:
        raise ValueError(f"x, y, low and high must be lists of one length, not of shapes {x.shape}, {y.shape}, {low.shape}, {high.shape}")
    usable = np.all([np.isfinite(values) & (values > 0) for values in (x, y, low, high)], axis=0) & (high > low)
    points = int(usable.sum())
    if points < 3:
        return None
    log_x, log_y = np.log(x[usable]), np.log(y[usable])
    weight = ((np.log(high[usable]) - np.log(low[usable])) * _SD_PER_INTERVAL) ** -2.0
    centre = np.average(log_x, weights=weight)  # about the centre, slope and intercept are independent
    spread = np.sum(weight * (log_x - centre) ** 2)
    if np.ptp(log_x) == 0:
        return None
    exponent = np.sum(weight * (log_x - centre) * log_y) / spread
    log_scale = np.average(log_y, weights=weight) - exponent * centre
    chi_sq_per_dof = np.sum(weight * (log_y - log_scale - exponent * log_x) ** 2) / (points - 2)
    variance = chi_sq_per_dof if bare else max(1.0, chi_sq_per_dof)
    exponent_se, centre_se = np.sqrt(variance / spread), np.sqrt(variance / weight.sum())
    return PowerLaw(float(exponent), float(exponent_se), float(log_scale), points, float(centre), float(centre_se))


class Fit(NamedTuple):
    """A form fitted by `least_squares`.

    `values` are its parameters by name, `intervals` their 95% intervals: an end is -inf or inf where the measurements rule out nothing
    up to the parameter's bound. `residuals` are observed minus fitted log y, [points]. `cost` is what was minimized.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    residuals: np.ndarray
    cost: float


def least_squares(
    form: Callable[..., np.ndarray],
    log_y: ArrayLike,
    bounds: dict[str, tuple[float, float]],
    starts: Sequence[Sequence[float]],
    *,
    sd: ArrayLike | None = None,
    huber_delta: float | None = None,
    intervals_of: Sequence[str] | None = None,
) -> Fit:
    """The best of several descents from `starts` on the residuals of log y, squared or by Huber's loss, with profile intervals.

    Args:
      form: of the parameters, in the order of `bounds`, to the fitted log y, [points].
      log_y: measurements, [points]; more of them than parameters.
      bounds: parameter name to (lowest, highest); either may be infinite.
      starts: values of the parameters to start from, one or more sets.
      sd: standard deviation of each log y. Without it all weigh the same and the scatter alone gives the intervals; with it the scatter
        can widen them, never narrow them.
      huber_delta: the residual (in log units, or in sd where those are given) beyond which the loss grows linearly. None: squares.
      intervals_of: parameters whose interval is wanted; all of them by default, each costs some twenty descents.

    Returns:
      The fit. An interval holds the values with which, all other parameters fitted anew, the loss exceeds the least one by no more than
      ½·t²·s², t being Student's, s² = Σψ²/dof / mean ψ′ (squares: the residual variance; with Huber's ψ, Ronchetti's robust test).
      On a plane that is the usual t interval; where a parameter runs away the profile flattens and the end is open.
    """
    from scipy.optimize import brentq  # only here: slow to import
    from scipy.optimize import least_squares as descend
    from scipy.special import stdtrit

    names, log_y = list(bounds), np.asarray(log_y, float)
    lowest, highest = np.array(list(bounds.values()), float).T
    dof = len(log_y) - len(names)
    if dof < 1:
        raise ValueError(f"{len(log_y)} points cannot fix {len(names)} parameters and their errors")
    unit = np.ones_like(log_y) if sd is None else np.asarray(sd, float)

    def fitted(start, fixed=None):
        """Parameters and cost; `fixed` is (index, value) of one that stays."""
        free = [i for i in range(len(names)) if fixed is None or i != fixed[0]]
        whole = np.array(start, float)
        if fixed is not None:
            whole[fixed[0]] = fixed[1]

        def residuals(values):
            whole[free] = values
            return (log_y - form(*whole)) / unit

        inside = np.clip(whole[free], lowest[free], highest[free])
        options = {"bounds": (lowest[free], highest[free])}
        if huber_delta is not None:
            options |= {"loss": "huber", "f_scale": huber_delta}
        elif free and np.isinf(options["bounds"]).all():
            options = {"method": "lm"}  # the same minimum, several times faster
        found = descend(residuals, inside, xtol=1e-12, ftol=1e-12, gtol=1e-12, **options)
        whole[free] = found.x
        return whole.copy(), found.cost

    best, cost = min((fitted(start) for start in starts), key=lambda result: result[1])
    residuals = log_y - form(*best)
    scaled = np.abs(residuals / unit)
    inner = np.ones_like(scaled, bool) if huber_delta is None else scaled <= huber_delta
    variance = np.sum(np.where(inner, scaled, huber_delta or 0.0) ** 2) / dof / max(inner.mean(), 1 / len(inner))
    variance = variance if sd is None else max(1.0, variance)
    limit = cost + 0.5 * stdtrit(dof, 0.975) ** 2 * variance + 1e-18  # the last: exact measurements

    def end(i, sign, bound):
        def excess(value):
            return fitted(best, (i, value))[1] - limit

        near, step = best[i], 0.05
        while (far := best[i] + sign * step) * sign < bound * sign:
            if excess(far) > 0:
                return float(brentq(excess, near, far, xtol=1e-4))
            near, step = far, 2 * step
        return float(sign * np.inf if not np.isfinite(bound) or excess(bound) <= 0 else brentq(excess, near, bound, xtol=1e-4))

    wanted = {names.index(name) for name in (names if intervals_of is None else intervals_of)}
    intervals = {names[i]: (end(i, -1, lowest[i]), end(i, 1, highest[i])) for i in sorted(wanted)}
    return Fit(dict(zip(names, best.tolist(), strict=True)), intervals, residuals, float(cost))
