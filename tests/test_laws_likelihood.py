"""Fits from a stated likelihood: closed forms of the straight line, and of two valleys."""

import math

import numpy as np
import pytest

from scaling_jax.laws.likelihood import aicc, least_squares


def line(u, bound=np.inf, **options):
    return lambda y: least_squares(lambda a, b: a + b * u, y, {"a": (-np.inf, np.inf), "b": (-bound, bound)}, [(0.0, 0.0)], **options)


def test_on_a_straight_line_intervals_are_students():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(7)
    u = rng.normal(size=9)
    y = 1 + 2 * u + 0.3 * rng.normal(size=9)
    known, fit = stats.linregress(u, y), line(u)(y)
    t = stats.t.ppf(0.975, 7)
    assert (fit.values["a"], fit.values["b"]) == pytest.approx((known.intercept, known.slope), rel=1e-6)
    assert fit.intervals["b"] == pytest.approx((known.slope - t * known.stderr, known.slope + t * known.stderr), rel=1e-4)
    assert fit.intervals["a"] == pytest.approx(
        (known.intercept - t * known.intercept_stderr, known.intercept + t * known.intercept_stderr), rel=1e-4
    )
    np.testing.assert_allclose(fit.residuals, y - known.intercept - known.slope * u, atol=1e-6)
    sharp = line(u, sd=np.full(9, 0.01), intervals_of=["b"])(y)  # claimed errors too small: the scatter widens them
    assert sharp.intervals == {"b": pytest.approx(fit.intervals["b"], rel=1e-4)}
    honest = line(u, sd=np.full(9, 3.0), intervals_of=["b"])(y)  # claimed errors large: they count
    half = t * 3.0 / np.sqrt(np.sum((u - u.mean()) ** 2))
    assert honest.intervals["b"] == pytest.approx((known.slope - half, known.slope + half), rel=1e-4)
    assert line(u, bound=known.slope + 0.5 * known.stderr)(y).intervals["b"][1] == np.inf
    near = line(u, bound=fit.intervals["b"][1] + 0.001)(y)  # beyond the end, but within the search's next stride
    assert near.intervals["b"] == pytest.approx(fit.intervals["b"], rel=1e-4)


def test_several_starts_find_the_lower_of_two_valleys():
    u = np.linspace(0, 6, 40)
    wave = least_squares(lambda w: np.sin(w * u), np.sin(3.0 * u), {"w": (0.1, 10.0)}, [(0.3,), (2.8,), (9.0,)])
    assert wave.values["w"] == pytest.approx(3.0)
    assert wave.intervals["w"] == pytest.approx((3.0, 3.0), abs=1e-4)  # exact: no width
    with pytest.raises(ValueError, match="2 points cannot fix 2"):
        line(np.ones(2))(np.ones(2))


def test_aicc_is_that_of_the_normal_likelihood():
    """−2 ln of the likelihood at the fitted variance, plus 2k(1 + (k+1)/(n−k−1)), less n·(1 + ln 2π)."""
    residuals = np.random.default_rng(3).normal(size=12)
    variance, k = np.mean(residuals**2), 3
    log_likelihood = sum(-0.5 * math.log(2 * math.pi * variance) - r * r / (2 * variance) for r in residuals)
    wanted = -2 * log_likelihood + 2 * k + 2 * k * (k + 1) / (12 - k - 1) - 12 * (1 + math.log(2 * math.pi))
    assert aicc(residuals, 2) == pytest.approx(wanted)
    assert aicc(residuals[:4], 2) == np.inf
