"""Products of powers: the formula, the start, and intervals from the noise of runs."""

import numpy as np
import pytest

from scaling_jax.laws.fit import fit
from scaling_jax.laws.observations import Observations
from scaling_jax.laws.powers import Power, product_form, reference, with_run_noise

FORM = product_form(
    "law", "y", "y", "tokens", [Power("tokens", "a", "T", 1e6), Power("params", "b", "N")], "here", 0.1, scale="c", published=5.0
)


def test_the_formula_is_what_is_computed():
    assert FORM.formula == "y = c·(T/1e+06)^a·N^b"
    assert dict(FORM.constants) == {"tokens0": 1e6, "params0": 1.0}
    x = {"tokens": np.array([1e6, 4e6]), "params": np.array([9.0, 4.0])}
    assert FORM.predict({"c": 2.0, "a": 0.5, "b": -0.5}, x) == pytest.approx([2 / 3, 2 * 2 / 2])
    assert FORM.parameters[0].published == 5.0 and FORM.parameters[0].unit == "tokens"
    assert reference([1e6, 4e6]) == 2e6 and reference([123456.0]) == 123000.0


def test_it_starts_at_the_least_squares_plane():
    rng = np.random.default_rng(0)
    x = {"tokens": rng.uniform(1e5, 1e7, 30), "params": rng.uniform(1.0, 9.0, 30)}
    y = FORM.predict({"c": 3e-40, "a": 0.3, "b": -0.7}, x)
    assert np.squeeze(FORM.all_starts(x, np.log(y))) == pytest.approx([3e-40, 0.3, -0.7], rel=1e-6)


def test_run_noise_gives_the_interval_that_resampled_points_miss():
    """One run, whose 16 horizons share an error in the slope: a bootstrap takes each point for itself."""
    rng = np.random.default_rng(1)
    form = product_form("law", "y", "y", "", [Power("tokens", "a", "T", 1e6)], "here", 0.2)
    tokens = 1e6 * 2.0 ** np.arange(-8, 8)
    log_t = np.log(tokens / 1e6)

    def errors(count):
        shared = 0.03 * rng.normal(size=(count, 1)) * log_t
        return shared + 0.01 * rng.normal(size=(count, 16))

    inside, naive = [], []
    for noise in errors(40):
        data = Observations({"tokens": tokens}, np.exp(0.5 * log_t + noise), np.arange(16), "")
        plain = fit(form, data, resamples=200)
        better = with_run_noise(plain, data, np.log(data.y) + errors(400))
        assert better.values == plain.values
        naive.append(plain.intervals["a"][0] < 0.5 < plain.intervals["a"][1])
        low, high = better.intervals["a"]
        inside.append(low < 0.5 < high)
        assert better.se["a"] == pytest.approx(0.03, rel=0.4)
        assert (low, high) == pytest.approx(np.quantile(better.draws_RxP[:, 1], [0.025, 0.975]))
    assert np.mean(inside) > 0.85 > 0.6 > np.mean(naive)
    assert with_run_noise(plain, data, np.full((400, 16), np.nan)) is plain


def test_run_noise_is_scaled_up_where_the_points_scatter_more():
    rng = np.random.default_rng(2)
    form = product_form("law", "y", "y", "", [Power("tokens", "a", "T", 1e6)], "here", 0.2)
    tokens = 1e6 * 2.0 ** np.arange(-8, 8)
    data = Observations({"tokens": tokens}, np.exp(0.1 * rng.normal(size=16)), np.arange(16), "")
    fitted = fit(form, data, resamples=200)
    small, large = (with_run_noise(fitted, data, np.log(data.y) + sd * rng.normal(size=(1000, 16))).se["a"] for sd in (0.01, 0.3))
    straight = 0.1 / np.sqrt(np.sum((np.log(tokens) - np.log(tokens).mean()) ** 2))
    assert small == pytest.approx(straight, rel=0.5) and large == pytest.approx(3 * straight, rel=0.2)
