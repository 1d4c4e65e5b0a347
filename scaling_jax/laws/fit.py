"""The engine that fits laws to measurements. For now: straight lines on log-log axes, with an honest standard error."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_SD_PER_INTERVAL = 1 / (2 * 1.959963985)  # a 95% interval is this many times wider than the standard deviation is


class PowerLaw(NamedTuple):
    """y = exp(log_scale) · x^exponent.

    `exponent_se` is the standard error of the exponent, `points` the number of measurements that entered.
    """

    exponent: float
    exponent_se: float
    log_scale: float
    points: int

    def __call__(self, x: ArrayLike) -> np.ndarray:
        return np.exp(self.log_scale) * np.asarray(x, float) ** self.exponent


def power_law(x: ArrayLike, y: ArrayLike, low: ArrayLike, high: ArrayLike) -> PowerLaw | None:
    """Weighted least squares of log y on log x.

    Args:
      x, y: positive measurements, [points].
      low, high: 95% interval of each y. A point's weight is 1/sd², sd = (log high − log low) / (2·1.96).

    Returns:
      The law, or None where fewer than three usable points at two or more different x remain. A point is left out where any of its four
      numbers is missing (nan), infinite or not positive: an interval with an open end says that the value is unknown, and no width is
      invented for it. The standard error is the one that the intervals imply, scaled up by √(χ²/dof) where the points scatter more than
      their intervals allow, and never scaled down.
    """
    x, y, low, high = (np.asarray(values, float) for values in (x, y, low, high))
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
    return PowerLaw(float(exponent), float(np.sqrt(max(1.0, chi_sq_per_dof) / spread)), float(log_scale), points)
