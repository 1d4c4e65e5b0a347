"""The estimator against planted truths, and its interval against its own promise: 95% coverage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from scaling_jax import noise_scale
from scaling_jax.noise_scale import estimator


def test_estimates_are_unbiased_for_planted_gradients():
    """Per-sequence gradients with known mean and anisotropic covariance over 4 decades: both means within 4 standard errors."""
    rng = np.random.default_rng(0)
    dims, batch, draws = 40, 8, 20_000
    mean = rng.normal(size=dims) * 0.05
    std = np.logspace(-2, 0, dims)
    grads = mean + std * rng.standard_t(df=12, size=(draws, batch, dims)) / np.sqrt(12 / 10)
    sq_norms = jnp.asarray((grads**2).sum(2)[..., None], jnp.float32)
    grad_sq = jnp.asarray((grads.mean(1) ** 2).sum(1)[:, None], jnp.float32)
    found = jax.vmap(noise_scale.estimates)(sq_norms, grad_sq)
    for values, truth in zip(found, (np.sum(mean**2), np.sum(std**2)), strict=True):
        values = np.asarray(values, np.float64)[:, 0]
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(draws)
    assert np.asarray(found[0]).min() < 0  # never clamped: a clamped |G|² would be biased upward


def test_estimates_equal_the_two_batch_formula():
    """McCandlish et al. 2018, App. A, at B_small = 1 and B_big = B."""
    rng = np.random.default_rng(1)
    grads = rng.normal(size=(5, 3)) + 1
    small, big = (grads**2).sum(1).mean(), (grads.mean(0) ** 2).sum()
    grad_sq, grad_trace = noise_scale.estimates(jnp.asarray((grads**2).sum(1)[:, None], jnp.float32), jnp.asarray([big], jnp.float32))
    np.testing.assert_allclose(grad_sq[0], (5 * big - 1 * small) / (5 - 1), rtol=1e-5)
    np.testing.assert_allclose(grad_trace[0], (small - big) / (1 / 1 - 1 / 5), rtol=1e-5)


def test_one_sequence_is_refused():
    with pytest.raises(ValueError, match="at least 2 sequences"):
        noise_scale.estimates(jnp.ones((1, 1)), jnp.ones(1))


def run(tokens, grad_sq, grad_trace, window_tokens, blocks=64):
    """Feeds arrays [steps] or [steps, G] to the estimator; returns the final state."""
    grad_sq, grad_trace = (np.asarray(x, np.float32).reshape(len(x), -1) for x in (grad_sq, grad_trace))

    def step(state, x):
        return estimator.update(state, *x, window_tokens), None

    tokens = jnp.broadcast_to(jnp.asarray(tokens, jnp.float32), (len(grad_sq),))
    return jax.lax.scan(step, estimator.init(grad_sq.shape[1], blocks), (tokens, jnp.asarray(grad_sq), jnp.asarray(grad_trace)))[0]


@pytest.mark.parametrize("steps", [1, 5, 63, 64, 65, 200, 1000, 5000])
def test_window_mean_is_that_of_the_newest_steps(steps):
    """The window is some whole number of newest steps, between half and all of what it promises; its mean is theirs."""
    rng = np.random.default_rng(steps)
    grad_sq, grad_trace = rng.normal(1, 0.1, steps), rng.normal(9, 1, steps)
    window_steps = 500
    read = estimator.read(run(10.0, grad_sq, grad_trace, window_steps * 10.0), window_steps * 10.0)
    promised = min(window_steps, steps / 2)
    tails = {n: grad_sq[-n:].mean() for n in range(1, steps + 1)}
    matching = [n for n, mean in tails.items() if abs(mean - read.grad_sq[0]) < 2e-6]
    assert matching and any(promised * 0.9 <= n <= promised * 1.15 + 1 for n in matching), (matching, promised)
    n = next(n for n in matching if promised * 0.9 <= n <= promised * 1.15 + 1)
    np.testing.assert_allclose(read.grad_trace[0], grad_trace[-n:].mean(), rtol=1e-5)
    np.testing.assert_allclose(read.sequences[0], grad_trace[-n:].mean() / grad_sq[-n:].mean(), rtol=1e-5)


def test_means_are_weighted_by_tokens_not_steps():
    tokens = np.array([100.0] * 10 + [300.0] * 10)
    values = np.array([1.0] * 10 + [2.0] * 10)
    state = run(tokens, values, values, 1e9)
    read = estimator.read(state, 1e9)  # the later half of 4,000 tokens is 7 steps of 300
    np.testing.assert_allclose(read.grad_sq[0], 2.0, rtol=1e-6)
    assert float(state.tokens_K @ np.ones(64, np.float32)) == 4000
    np.testing.assert_allclose(float(state.grad_sq_KxG.sum()), 10 * 100 * 1 + 10 * 300 * 2, rtol=1e-6)


def test_last_entry_is_the_sum_of_groups():
    rng = np.random.default_rng(3)
    grad_sq, grad_trace = rng.normal(1, 0.1, (100, 3)), rng.normal([1, 5, 9], 0.1, (100, 3))
    read = estimator.read(run(1.0, grad_sq, grad_trace, 1e6), 1e6)
    np.testing.assert_allclose(read.grad_trace[3], read.grad_trace[:3].sum(), rtol=1e-5)
    np.testing.assert_allclose(read.sequences[3], read.grad_trace[:3].sum() / read.grad_sq[:3].sum(), rtol=1e-5)


def autoregressive(rng, runs, steps, rho):
    x = np.zeros((runs, steps))
    x[:, 0] = rng.normal(size=runs)
    shocks = rng.normal(size=(runs, steps)) * np.sqrt(1 - rho**2)
    for t in range(1, steps):
        x[:, t] = rho * x[:, t - 1] + shocks[:, t]
    return x


@pytest.mark.parametrize(("rho", "steps"), [(0.0, 400), (0.9, 6000)])
def test_interval_covers_the_true_ratio_in_95_percent_of_runs(rho, steps):
    """Naive standard errors would cover under 40% at rho = 0.9."""
    rng = np.random.default_rng(7)
    runs = 600
    grad_sq = 1 + 1.5 * autoregressive(rng, runs, steps, rho)  # a step's |G|² is often negative
    grad_trace = 20 + 5 * autoregressive(rng, runs, steps, rho)
    window = 1e9

    @jax.jit
    @jax.vmap
    def read(a, b):
        def step(state, x):
            return estimator.update(state, 1.0, x[0][None], x[1][None], window), None

        return estimator.read(jax.lax.scan(step, estimator.init(1), (a, b))[0], window)

    result = read(jnp.asarray(grad_sq, jnp.float32), jnp.asarray(grad_trace, jnp.float32))
    covered = (np.asarray(result.low[:, 0]) <= 20) & (np.asarray(result.high[:, 0]) >= 20)
    assert 0.92 <= covered.mean() <= 0.98


def test_interval_is_fiellers():
    """Against the definition: r is inside exactly if the mean of tr Σ − r·|G|² is within t standard errors of zero."""
    rng = np.random.default_rng(5)
    a, b, w = rng.normal(1, 0.5, 20), rng.normal(10, 3, 20), np.ones(20)
    ratio, low, high = (float(x) for x in noise_scale.ratio_interval(*(jnp.asarray(x, jnp.float32) for x in (w, a, b))))
    np.testing.assert_allclose(ratio, b.mean() / a.mean(), rtol=1e-5)
    for end in (low, high):
        d = b - end * a
        t = abs(d.mean()) / (d.std(ddof=1) / np.sqrt(len(d)))
        np.testing.assert_allclose(t, scipy.stats.t.ppf(0.975, 19), rtol=2e-3)
    assert low < ratio < high


@pytest.mark.parametrize("scale", [1e-14, 1e-6, 1e6, 1e14])
def test_interval_does_not_depend_on_the_units(scale):
    rng = np.random.default_rng(5)
    w, a, b = (jnp.asarray(x, jnp.float32) for x in (np.ones(20), rng.normal(1, 0.5, 20), rng.normal(10, 3, 20)))
    for found, expected in zip(noise_scale.ratio_interval(w, a * scale, b * scale), noise_scale.ratio_interval(w, a, b), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_interval_is_open_above_where_the_gradient_cannot_be_told_from_zero():
    rng = np.random.default_rng(6)
    a, b, w = rng.normal(0, 1, 20), rng.normal(10, 1, 20), np.ones(20)
    a += 0.1 - a.mean()
    ratio, low, high = (float(x) for x in noise_scale.ratio_interval(*(jnp.asarray(x, jnp.float32) for x in (w, a, b))))
    np.testing.assert_allclose(ratio, b.mean() / 0.1, rtol=1e-4)
    assert np.isinf(high) and 0 < low < ratio
    d = b - low * a
    np.testing.assert_allclose(abs(d.mean()) / (d.std(ddof=1) / np.sqrt(20)), scipy.stats.t.ppf(0.975, 19), rtol=2e-3)


def test_negative_gradient_estimate_gives_no_ratio():
    w, a, b = jnp.ones(20), -jnp.ones(20) + jnp.linspace(-5, 5, 20), jnp.ones(20)
    ratio, low, high = noise_scale.ratio_interval(w, a, b)
    assert np.isnan(ratio) and np.isinf(high) and low >= 0


def test_too_few_blocks_give_no_interval():
    _, low, high = noise_scale.ratio_interval(jnp.ones(7), jnp.linspace(1.0, 1.6, 7), jnp.ones(7))
    assert np.isnan(low) and np.isnan(high)


def test_t_quantile():
    for dof in (7, 10, 31, 63):
        np.testing.assert_allclose(estimator._t_quantile(jnp.float32(dof)), scipy.stats.t.ppf(0.975, dof), rtol=2e-3)


def test_state_survives_in_pieces():
    """Stopping and continuing from the state changes nothing: it is all there is."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(1, 1, 300).astype(np.float32), rng.normal(9, 1, 300).astype(np.float32)
    step = jax.jit(lambda state, x, y: estimator.update(state, 7.0, x, y, 700.0))
    state = estimator.init(1)
    for i in range(300):
        if i == 150:
            state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
        state = step(state, jnp.asarray(a[i : i + 1]), jnp.asarray(b[i : i + 1]))
    whole = run(7.0, a, b, 700.0)
    for x, y in zip(state, whole, strict=True):
        np.testing.assert_array_equal(x, y)
