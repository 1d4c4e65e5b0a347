"""The estimator against planted truths, and its interval against its own promise: 95% coverage."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from scaling_jax import noise_scale
from scaling_jax.noise_scale import estimator
from scaling_jax.noise_scale.two_batches import microbatch_estimates, two_batch_estimates

_SPEC = importlib.util.spec_from_file_location("noise_coverage", Path(__file__).parents[1] / "benchmarks" / "noise_coverage.py")
noise_coverage = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(noise_coverage)

DRAWS, BATCH, DIMS = 10_000, 8, 32


def planted(population: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of the sequences of many steps [draws, batch, dims], and the true |G|² and tr Σ of each step. B_noise is about 10·B."""
    rng = np.random.default_rng(["isotropic", "heavy-tailed", "anisotropic", "drifting"].index(population))
    mean, std = np.full((DRAWS, DIMS), 0.1), np.ones((DRAWS, DIMS))
    noise = rng.standard_normal((DRAWS, BATCH, DIMS))
    if population == "heavy-tailed":  # a sequence as a whole is loud or quiet; Student's t, with a finite eighth moment
        noise *= np.sqrt(7 / rng.chisquare(9, (DRAWS, BATCH, 1)))
    if population == "anisotropic":
        std[:] = np.logspace(-5, 0, DIMS)
        mean *= std[:, ::-1]
    if population == "drifting":
        mean *= np.linspace(2, 0.5, DRAWS)[:, None]
        std *= np.geomspace(1, 3, DRAWS)[:, None]
    return mean[:, None] + std[:, None] * noise, (mean**2).sum(1), (std**2).sum(1)


def by_sequences(grads, big_sq):
    return jax.vmap(noise_scale.estimates)((grads**2).sum(2)[..., None].astype(np.float32), big_sq)


def by_microbatches(grads, big_sq):
    micro = grads.reshape(DRAWS, BATCH // 2, 2, DIMS).mean(2)
    return jax.vmap(lambda small, big: microbatch_estimates(small, 2, big))((micro**2).sum(2)[..., None].astype(np.float32), big_sq)


def by_two_batches(grads, big_sq):
    small_sq = (grads[:, :3].mean(1) ** 2).sum(1)[:, None].astype(np.float32)
    return jax.vmap(lambda small, big: two_batch_estimates(small, 3, big, BATCH))(small_sq, big_sq)


@pytest.mark.parametrize("estimate", [by_sequences, by_microbatches, by_two_batches])
@pytest.mark.parametrize("population", ["isotropic", "heavy-tailed", "anisotropic", "drifting"])
def test_estimates_are_unbiased_for_planted_gradients(population, estimate):
    """Within 3 standard errors over 10,000 draws, and no error of 5% would be small enough for that in tr Σ."""
    grads, grad_sq, grad_trace = planted(population)
    big_sq = (grads.mean(1) ** 2).sum(1)[:, None].astype(np.float32)
    found = estimate(grads, big_sq)
    for values, truth in zip(found, (grad_sq, grad_trace), strict=True):
        error = np.asarray(values, np.float64)[:, 0] - truth
        assert abs(error.mean()) < 3 * error.std() / np.sqrt(DRAWS)
    assert error.std() / np.sqrt(DRAWS) < 0.05 / 3 * grad_trace.mean()
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


interval = jax.jit(noise_scale.ratio_interval)


@jax.jit
def read(state, window_tokens, sums_RxG=None, decay_tokens=None):
    return estimator.read(state, window_tokens, sums_RxG, decay_tokens=decay_tokens)


@jax.jit
def updated(steps, tokens_N, grad_sq_NxG, grad_trace_NxG, window_tokens):
    def step(n, state):
        return estimator.update(state, tokens_N[n], grad_sq_NxG[n], grad_trace_NxG[n], window_tokens)

    return jax.lax.fori_loop(0, steps, step, estimator.init(grad_sq_NxG.shape[1]))


def run(tokens, grad_sq, grad_trace, window_tokens):
    """Feeds arrays [steps] or [steps, G] to the estimator; returns the final state."""
    steps = len(grad_sq)
    columns = [np.reshape(x, (steps, -1)) for x in (np.broadcast_to(tokens, steps), grad_sq, grad_trace)]
    padded = [jnp.asarray(np.pad(x, ((0, 5000 - steps), (0, 0))), jnp.float32) for x in columns]  # compiled once for any number of steps
    return updated(steps, padded[0][:, 0], *padded[1:], window_tokens)


@pytest.mark.parametrize("steps", [1, 5, 63, 64, 65, 200, 1000, 5000])
def test_window_mean_is_that_of_the_newest_steps(steps):
    """The window is some whole number of newest steps, between half and all of what it promises; its mean is theirs."""
    rng = np.random.default_rng(steps)
    grad_sq, grad_trace = rng.normal(1, 0.1, steps), rng.normal(9, 1, steps)
    window_steps = 500
    found = read(run(10.0, grad_sq, grad_trace, window_steps * 10.0), window_steps * 10.0)
    promised = min(window_steps, steps / 2)
    tails = {n: grad_sq[-n:].mean() for n in range(1, steps + 1)}
    matching = [n for n, mean in tails.items() if abs(mean - found.grad_sq[0]) < 2e-6]
    assert matching and any(promised * 0.9 <= n <= promised * 1.15 + 1 for n in matching), (matching, promised)
    n = next(n for n in matching if promised * 0.9 <= n <= promised * 1.15 + 1)
    np.testing.assert_allclose(found.grad_trace[0], grad_trace[-n:].mean(), rtol=1e-5)
    np.testing.assert_allclose(found.sequences[0], grad_trace[-n:].mean() / grad_sq[-n:].mean(), rtol=1e-5)


def test_means_are_weighted_by_tokens_not_steps():
    tokens = np.array([100.0] * 10 + [300.0] * 10)
    values = np.array([1.0] * 10 + [2.0] * 10)
    state = run(tokens, values, values, 1e9)
    found = read(state, 1e9)  # the later half of 4,000 tokens is 7 steps of 300
    np.testing.assert_allclose(found.grad_sq[0], 2.0, rtol=1e-6)
    assert float(state.tokens_K @ np.ones(64, np.float32)) == 4000
    np.testing.assert_allclose(float(state.grad_sq_KxG.sum()), 10 * 100 * 1 + 10 * 300 * 2, rtol=1e-6)


def test_last_entry_is_the_sum_of_groups():
    rng = np.random.default_rng(3)
    grad_sq, grad_trace = rng.normal(1, 0.1, (100, 3)), rng.normal([1, 5, 9], 0.1, (100, 3))
    found = read(run(1.0, grad_sq, grad_trace, 1e6), 1e6)
    np.testing.assert_allclose(found.grad_trace[3], found.grad_trace[:3].sum(), rtol=1e-5)
    np.testing.assert_allclose(found.sequences[3], found.grad_trace[:3].sum() / found.grad_sq[:3].sum(), rtol=1e-5)


def test_exponential_weights_are_those_of_a_moving_average():
    """While every block is one step the weights are exact; the window is the later half of what was seen."""
    rng = np.random.default_rng(9)
    grad_sq, grad_trace = rng.normal(1, 0.1, 60), rng.normal(9, 1, 60)
    found = read(run(10.0, grad_sq, grad_trace, 1e9), 1e9, decay_tokens=70.0)
    weights = np.where(np.arange(60) >= 30, np.exp(np.arange(60) * 10 / 70), 0)
    np.testing.assert_allclose(found.grad_sq[0], np.average(grad_sq, weights=weights), rtol=1e-5)
    np.testing.assert_allclose(found.grad_trace[0], np.average(grad_trace, weights=weights), rtol=1e-5)


def test_mean_age_of_exponential_weights_is_the_decay():
    times = np.arange(5000.0)
    found = read(run(10.0, times, times, 1e9), 1e9, decay_tokens=2500.0)  # a tenth of the window
    np.testing.assert_allclose(5000 - found.grad_sq[0], 250, rtol=0.03)


def test_simulated_norms_have_the_law_of_gradients():
    """Moments against gradients that are drawn in full, at the first step, after many, and after the batch has doubled."""
    runs, dims = 40_000, 3
    draws = noise_coverage.draw(np.random.default_rng(3), runs, dims, np.array([2] * 12 + [4] * 3), rho=0.7)
    noise = np.random.default_rng(4).standard_normal((4, runs, dims))
    for n, parts in ((0, 2), (11, 2), (12, 4), (14, 4)):
        unit = noise[:parts] * np.sqrt(parts)  # of a mean over `parts` that has variance 1
        mean = unit.mean(0)
        drawn = mean[:, 0], (mean**2).sum(1), ((unit - mean) ** 2).sum((0, 2)) / parts
        for simulated, expected in zip(draws, drawn, strict=True):
            for moment in (1, 2, 3):
                a, b = simulated[n].astype(float) ** moment, expected**moment
                assert abs(a.mean() - b.mean()) < 4.5 * np.hypot(a.std(), b.std()) / np.sqrt(runs)
    for values, lag in [(x, lag) for x in draws for lag in (1, 3)]:
        np.testing.assert_allclose(np.corrcoef(values[5], values[5 + lag])[0, 1], 0.7**lag, atol=0.02)


@pytest.mark.parametrize(("rho", "steps"), [(0.0, 400), pytest.param(0.9, 10_000, marks=pytest.mark.slow)])
def test_interval_covers_the_true_ratio_in_95_percent_of_runs(rho, steps, quick_compilation):
    """One-sequence and microbatch estimates, a batch that doubles, a truth that drifts; flat and exponential weights; B_noise from
    0.3 to 30 times B. Standard errors for independent steps would be too small by √19 at autocorrelation 0.9, and cover 35%."""
    rng, dims = np.random.default_rng(7), 16
    runs = [(np.full(steps, noise_coverage.SEQUENCES), noise_coverage.equal_batches(rng, 1000, dims, steps, rho))]
    if rho == 0:  # the benchmark has it at 0.9 too
        runs.append(noise_coverage.doubling_batch(rng, 1000, dims, steps, rho))
    for batches, settings in runs:
        tokens = batches * 64.0
        result = noise_coverage.coverage(tokens, list(settings.values()), tokens.sum() / 2, tokens.sum() / 10)
        shares = dict(zip(settings, result.covered_2xG.T, strict=True))
        assert all(0.92 <= share <= 0.98 for pair in shares.values() for share in pair), shares
        if rho == 0 and ("sequences", 30.0) in settings:
            # Open is where |G|² is within t standard errors of zero: here its variance is known, by the moments of chi-squares.
            parts, variance = noise_coverage.SEQUENCES, noise_coverage.RATIOS[-1] / dims
            of_a_step = 4 * variance + 2 * dims * variance**2 + 2 * dims / (parts - 1) * variance**2
            expected = scipy.stats.nct.cdf(scipy.stats.t.ppf(0.975, 16), 16, 1 / np.sqrt(of_a_step / (steps / 2)))
            open_share = dict(zip(settings, result.open_2xG[0], strict=True))
            assert open_share["sequences", 0.3] == open_share["sequences", 3.0] == 0
            np.testing.assert_allclose(open_share["sequences", 30.0], expected, atol=0.05)


def fieller(w, a, b):
    """Ratio and interval by definition, in double precision: r is inside if mean tr Σ − r·|G|² is within t standard errors of zero.

    Its standard error comes from residuals about a weighted line, each added to its neighbour; the scale and the degrees of freedom from
    the eigenvalues of that quadratic form, for independent blocks.
    """
    kept = w > 0
    w, a, b = (np.asarray(x, np.float64)[kept] for x in (w / w.sum(), a, b))
    n = len(w)
    design = np.stack([np.ones(n), np.arange(n)], axis=1)

    def squares(x):  # a quadratic form of the blocks x
        residual = w * (x - design @ np.linalg.lstsq(design * np.sqrt(w)[:, None], x * np.sqrt(w), rcond=None)[0])
        return sum(np.square(np.append(residual, 0)[i] + np.append(0, residual)[i]) for i in range(n + 1))

    unit = np.eye(n)
    form = np.array([[(squares(i + j) - squares(i - j)) / 4 for i in unit] for j in unit])
    eigen = np.linalg.eigvalsh(form)
    scale, t = np.sum(w**2) / eigen.sum(), scipy.stats.t.ppf(0.975, eigen.sum() ** 2 / (eigen**2).sum())

    def excess(r):
        d = b - r * a
        return (w @ d) ** 2 - t**2 * scale * d @ form @ d

    at = np.array([0.0, 1.0, -1.0]) * abs(w @ b) / abs(w @ a)
    ends = np.sort(np.roots(np.polyfit(at, [excess(r) for r in at], 2)))
    return w @ b / (w @ a), *ends


@pytest.mark.parametrize("weights", [np.ones(20), np.append(np.zeros(5), np.exp(np.arange(25) / 8)), np.arange(1.0, 31.0) % 7 + 1])
def test_interval_is_fiellers(weights):
    rng = np.random.default_rng(5)
    a, b = rng.normal(1, 0.5, len(weights)), rng.normal(10, 3, len(weights)) + np.linspace(0, 20, len(weights))
    found = interval(*(jnp.asarray(x, jnp.float32) for x in (weights, a, b)))
    np.testing.assert_allclose(found, fieller(weights, a, b), rtol=2e-3)
    assert found[1] < found[0] < found[2]


def test_steady_drift_is_not_noise():
    """The line's slope widens nothing; the means are those over the window."""
    rng = np.random.default_rng(5)
    a, b, slope = rng.normal(1, 0.1, 20), rng.normal(10, 0.3, 20), np.linspace(-1, 1, 20)
    without, with_drift = (
        interval(*(jnp.asarray(x, jnp.float32) for x in (np.ones(20), a + drift * slope, b - 5 * drift * slope))) for drift in (0, 0.5)
    )
    np.testing.assert_allclose(with_drift, without, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("sequences", [1, 125_000])
def test_float32_suffices_where_the_trace_is_a_million_times_the_gradient(scale, sequences):
    """All of it against double precision: |G|² of 1e-12 and 1e12, B_noise of 1e6 sequences, batches of 8 and of 1e6."""
    rng, steps, parts, dims = np.random.default_rng(2), 400, 8, 16
    draws = noise_coverage.draw(rng, 1, dims, np.full(steps, parts), 0.0)
    batch_variance = np.full(steps, scale * 1e6 / (parts * sequences))
    big, small = (x[:, 0] for x in noise_coverage.squared_norms(draws, dims, np.full(steps, scale), batch_variance))
    found = jax.vmap(lambda small, big: microbatch_estimates(jnp.full((parts, 1), small), sequences, big[None]))(small, big)
    reading = read(run(2.0**30, *found, 1e15), 1e15, np.ones((1, 1)))
    big, small = np.asarray(big, np.float64), np.asarray(small, np.float64)
    grad_sq, grad_trace = (parts * big - small) / (parts - 1), sequences * (small - big) * parts / (parts - 1)
    blocks = [x[-200:].reshape(25, 8).mean(1) for x in (grad_sq, grad_trace)]  # 50 blocks of 8 steps, of which the later half
    ratio, *ends = fieller(np.ones(25), *blocks)
    np.testing.assert_allclose(reading.grad_sq, blocks[0].mean(), rtol=1e-3)
    np.testing.assert_allclose(reading.grad_trace, blocks[1].mean(), rtol=1e-5)
    if sequences == 1:  # hopeless: 100 dimensions' worth of noise for one of signal
        assert np.isinf(reading.high[0])
        np.testing.assert_allclose(reading.low[0], max(ends), rtol=3e-3)
    else:
        np.testing.assert_allclose([reading.sequences[0], reading.low[0], reading.high[0]], [ratio, *ends], rtol=3e-3)


@pytest.mark.parametrize("scale", [1e-14, 1e-6, 1e6, 1e14])
def test_interval_does_not_depend_on_the_units(scale):
    rng = np.random.default_rng(5)
    w, a, b = (jnp.asarray(x, jnp.float32) for x in (np.ones(20), rng.normal(1, 0.5, 20), rng.normal(10, 3, 20)))
    for found, expected in zip(interval(w, a * scale, b * scale), interval(w, a, b), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_interval_is_open_above_where_the_gradient_cannot_be_told_from_zero():
    rng = np.random.default_rng(6)
    a, b, w = rng.normal(0, 1, 20), rng.normal(10, 1, 20), np.ones(20)
    a += 0.1 - a.mean()
    ratio, low, high = (float(x) for x in interval(*(jnp.asarray(x, jnp.float32) for x in (w, a, b))))
    np.testing.assert_allclose(ratio, b.mean() / 0.1, rtol=1e-4)
    assert np.isinf(high) and 0 < low < ratio
    np.testing.assert_allclose(low, fieller(w, a, b)[2], rtol=2e-3)  # all but the stretch between the ends is inside; the other is negative


def test_negative_gradient_estimate_gives_no_ratio():
    a = np.random.default_rng(6).normal(0, 3, 20)
    ratio, low, high = interval(jnp.ones(20), jnp.asarray(a - a.mean() - 1, jnp.float32), jnp.ones(20))
    assert np.isnan(ratio) and np.isinf(high) and low >= 0


def test_too_few_blocks_give_no_interval():
    _, low, high = interval(jnp.ones(7), jnp.linspace(1.0, 1.6, 7), jnp.ones(7))
    assert np.isnan(low) and np.isnan(high)


def test_t_quantile():
    for dof in (3, 5.5, 10, 31, 63):
        np.testing.assert_allclose(estimator._t_quantile(jnp.float32(dof)), scipy.stats.t.ppf(0.975, dof), rtol=2e-3)


def test_state_survives_in_pieces():
    """Stopping and continuing from the state changes nothing: it is all there is."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(1, 1, 300).astype(np.float32), rng.normal(9, 1, 300).astype(np.float32)
    step = jax.jit(lambda state, x, y: estimator.update(state, 7.0, x, y, 700.0))
    states = [estimator.init(1), estimator.init(1)]
    for i in range(300):
        if i == 150:
            states[1] = estimator.NoiseScaleState(*(jnp.asarray(np.array(x)) for x in states[1]))
        states = [step(state, a[i : i + 1], b[i : i + 1]) for state in states]
    for x, y, z in zip(*states, run(7.0, a, b, 700.0), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(x, z, rtol=1e-4, atol=1e-4)  # another program may round sums otherwise


def test_a_state_can_be_donated():
    update = jax.jit(estimator.update, static_argnums=4, donate_argnums=0)
    state = estimator.init(1)
    for _ in range(2):
        state = update(state, 1.0, jnp.ones(1), jnp.ones(1), 10.0)
    assert float(state.seen_tokens) == 2


def test_nothing_is_known_before_the_first_step():
    assert all(np.isnan(x).all() for x in estimator.read(estimator.init(2), 10.0, decay_tokens=3.0))


def test_a_step_that_is_not_finite_is_left_out():
    steps = np.arange(1.0, 41.0)[:, None] * np.ones((1, 2))
    spoilt, without = steps.copy(), np.delete(steps, 20, axis=0)
    spoilt[20, 1] = np.nan
    for found, wanted in zip(*(estimator.read(run(1.0, x, 3 * x, 1e9), 1e9) for x in (spoilt, without)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("tokens", [2.0**-10, 2.0**30])
def test_tokens_may_be_counted_in_any_unit(tokens):
    """And weights that fall fast never leave the reading without any: the newest block counts as one."""
    steps = np.linspace(1.0, 2.0, 200)
    whole = estimator.read(run(1.0, steps, 3 * steps, 1e3), 1e3, decay_tokens=20.0)
    scaled = estimator.read(run(tokens, steps, 3 * steps, 1e3 * tokens), 1e3 * tokens, decay_tokens=20.0 * tokens)
    for found, wanted in zip(scaled, whole, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
    newest = estimator.read(run(tokens, steps, 3 * steps, 1e3 * tokens), 1e3 * tokens, decay_tokens=1e-3 * tokens)
    np.testing.assert_allclose(newest.grad_sq[0], 2.0, rtol=0.02)
    assert np.isnan(newest.low[0]) and np.isnan(newest.high[0])


def test_an_odd_number_of_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks is 7: must be even"):
        estimator.init(1, 7)
