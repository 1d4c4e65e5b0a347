"""Planted power laws and other forms: the fit finds them, and its interval is the right size."""

import numpy as np
import pytest

from scaling_jax.laws.power_law import power_law


def planted(rng, exponent, sd, points=12, claimed_sd=None):
    """x, y, low, high with log-normal errors `sd`; the intervals claim `claimed_sd`."""
    x = np.geomspace(1e4, 1e7, points)
    y = 3.0 * x**exponent * np.exp(rng.normal(size=points) * sd)
    half = 1.959963985 * np.broadcast_to(sd if claimed_sd is None else claimed_sd, points)
    return x, y, y * np.exp(-half), y * np.exp(half)


def test_exact_law():
    x, y, low, high = planted(np.random.default_rng(0), 0.6, 0.0, claimed_sd=0.1)
    law = power_law(x, y, low, high)
    assert law.exponent == pytest.approx(0.6, abs=1e-12)
    assert law.log_scale == pytest.approx(np.log(3.0), abs=1e-10)
    assert law.points == 12
    np.testing.assert_allclose(law(x), y, rtol=1e-10)


def test_equals_numpy_and_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(1)
    sd = rng.uniform(0.05, 0.5, 12)
    x, y, low, high = planted(rng, 0.4, sd)
    law = power_law(x, y, low, high)
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1, w=1 / sd)
    assert (law.exponent, law.log_scale) == pytest.approx((slope, intercept), rel=1e-9)
    _, covariance = optimize.curve_fit(lambda u, a, b: a + b * u, np.log(x), np.log(y), sigma=sd, absolute_sigma=True)
    _, scaled = optimize.curve_fit(lambda u, a, b: a + b * u, np.log(x), np.log(y), sigma=sd, absolute_sigma=False)
    assert law.exponent_se == pytest.approx(np.sqrt(max(covariance[1, 1], scaled[1, 1])), rel=1e-5)


@pytest.mark.parametrize("claimed, lowest", [(1.0, 0.93), (0.25, 0.88)])
def test_interval_covers_the_truth(claimed, lowest):
    # With honest intervals the larger of two standard errors covers a little more than 95%. With intervals four times too narrow the
    # scatter alone sets it, and 1.96 in place of Student's t with 10 degrees of freedom covers about 92%.
    rng = np.random.default_rng(2)
    sd = np.geomspace(0.05, 0.3, 12)
    laws = [power_law(*planted(rng, 0.5, sd, claimed_sd=claimed * sd)) for _ in range(600)]
    covered = np.mean([abs(law.exponent - 0.5) < 1.96 * law.exponent_se for law in laws])
    assert lowest < covered < 0.99


def test_unusable_points_are_left_out():
    x, y, low, high = planted(np.random.default_rng(3), 0.6, 0.1)
    whole = power_law(x[5:], y[5:], low[5:], high[5:])
    y[0], low[1], high[2], low[3], high[4] = np.nan, 0.0, np.inf, -1.0, low[4]
    assert power_law(x, y, low, high) == whole
    assert whole.points == 7


def test_too_few_points():
    x, y, low, high = planted(np.random.default_rng(4), 0.6, 0.1, points=3)
    assert power_law(x, y, low, high).points == 3
    high[0] = np.inf
    assert power_law(x, y, low, high) is None
    assert power_law([], [], [], []) is None
    assert power_law([5.0] * 4, [1.0] * 4, [0.9] * 4, [1.1] * 4) is None  # no slope through one x


def test_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        power_law([1.0, 2.0], [1.0], [1.0], [1.0])


def test_height_and_slope_err_independently_about_the_centre():
    """The interval of the law itself holds the truth in 95% of fits, at the ends of the measurements and beyond them."""
    rng = np.random.default_rng(5)
    sd = np.geomspace(0.05, 0.3, 12)
    laws = [power_law(*planted(rng, 0.5, sd)) for _ in range(600)]
    for x in (1e3, 1e4, 1e6, 1e8):
        low, high = np.array([law.interval(x) for law in laws]).T
        assert 0.93 < np.mean((low < 3.0 * x**0.5) & (3.0 * x**0.5 < high)) < 0.99
    low, high = laws[0].interval(np.exp(laws[0].centre))
    assert np.log(high / low) == pytest.approx(2 * 1.959963985 * laws[0].centre_se)
    # The weights alone give the height's error at the centre where the scatter does not exceed them.
    assert min(law.centre_se for law in laws) == pytest.approx(np.sum(sd**-2) ** -0.5)


def test_without_intervals_the_scatter_alone_counts():
    stats = pytest.importorskip("scipy.stats")
    x, y, _, _ = planted(np.random.default_rng(6), 0.5, 0.01)
    law, line = power_law(x, y), stats.linregress(np.log(x), np.log(y))
    assert (law.exponent, law.exponent_se) == pytest.approx((line.slope, line.stderr), rel=1e-9)
    low, high = law.interval(1.0)  # log y at log x = 0 is the intercept
    assert np.log(high / low) / (2 * 1.959963985) == pytest.approx(line.intercept_stderr, rel=1e-6)
    with pytest.raises(ValueError, match="together"):
        power_law(x, y, low=y)
