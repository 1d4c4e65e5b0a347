"""A straight line on log-log axes with honest intervals."""

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
