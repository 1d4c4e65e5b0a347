"""Fits from a stated likelihood: normal residuals of log y. Only such a fit has profile intervals and an AICc; Huber's loss has neither."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Likeliest(NamedTuple):
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
    intervals_of: Sequence[str] | None = None,
) -> Likeliest:
    """The most likely of several descents from `starts`, the residuals of log y being independent and normal, with profile intervals.

    Args:
      form: of the parameters, in the order of `bounds`, to the fitted log y, [points].
      log_y: measurements, [points]; more of them than parameters.
      bounds: parameter name to (lowest, highest); either may be infinite.
      starts: values of the parameters to start from, one or more sets.
      sd: standard deviation of each log y. Without it all weigh the same and the scatter alone gives the intervals; with it the scatter
        can widen them, never narrow them.
      intervals_of: parameters whose interval is wanted; all of them by default, each costs some twenty descents.

    Returns:
      The fit. An interval holds the values with which, all other parameters fitted anew, half the sum of squares exceeds the least one by
      no more than ½·t²·s², t being Student's and s² the residual variance. On a plane that is the usual t interval; where a parameter
      runs away the profile flattens and the end is open.
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
        if free and np.isinf(options["bounds"]).all():
            options = {"method": "lm"}  # the same minimum, several times faster
        found = descend(residuals, inside, xtol=1e-12, ftol=1e-12, gtol=1e-12, **options)
        whole[free] = found.x
        return whole.copy(), found.cost

    best, cost = min((fitted(start) for start in starts), key=lambda result: result[1])
    residuals = log_y - form(*best)
    variance = np.sum((residuals / unit) ** 2) / dof
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
    return Likeliest(dict(zip(names, best.tolist(), strict=True)), intervals, residuals, float(cost))


def aicc(residuals: ArrayLike, parameters: int) -> float:
    """Akaike's criterion for small samples (Hurvich and Tsai 1989) of normal residuals whose variance is fitted as well.

    n·ln(Σr²/n) + 2k + 2k(k+1)/(n−k−1), k = parameters + 1, less a constant of n: for forms fitted by `least_squares` to the same
    points. inf where n ≤ k + 1.
    """
    residuals = np.asarray(residuals, float)
    n, k = len(residuals), parameters + 1
    if n <= k + 1:
        return float(np.inf)
    return float(n * np.log(np.mean(residuals**2)) + 2 * k + 2 * k * (k + 1) / (n - k - 1))
