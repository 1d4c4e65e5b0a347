"""The estimators from two batch sizes: identities, planted truth, agreement with the exact one and with Optax's statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scaling_jax import noise_scale
from scaling_jax.noise_scale import estimator
from scaling_jax.noise_scale.any_model import per_example_sq_norms
from scaling_jax.noise_scale.two_batches import microbatch_estimates, shard_estimates, two_batch_estimates

SIZE, MEAN = 12, 0.5  # the planted gradient: |G|² = 12·0.25, one component of another variance
GRAD_SQ, TRACE = SIZE * MEAN**2, (SIZE - 1) * 4.0 + 1.0


def gradients(seed, *shape):
    rng = np.random.default_rng(seed)
    return MEAN + rng.standard_normal((*shape, SIZE)) * np.array([1.0] + [2.0] * (SIZE - 1))


def sq_norm(x):
    return np.sum(x**2, axis=-1)


def test_microbatches_of_one_are_the_exact_estimator():
    g_BxP = gradients(0, 8)
    sq_norms_BxG, grad_sq_G = jnp.asarray(sq_norm(g_BxP)[:, None]), jnp.asarray(sq_norm(g_BxP.mean(0))[None])
    exact = noise_scale.estimates(sq_norms_BxG, grad_sq_G)
    np.testing.assert_allclose(microbatch_estimates(sq_norms_BxG, 1, grad_sq_G), exact, rtol=1e-5)
    np.testing.assert_allclose(two_batch_estimates(sq_norms_BxG.mean(0), 1, grad_sq_G, 8), exact, rtol=1e-5)


def assert_unbiased(draws, truth):
    """Within 3 standard errors, which are small enough to tell."""
    se = draws.std() / np.sqrt(len(draws))
    assert abs(draws.mean() - truth) < 3 * se < 0.15 * truth


@pytest.mark.parametrize(("small", "big", "nested"), [(2, 8, True), (2, 16, False), (4, 8, True), (1, 64, False)])
def test_any_two_batch_sizes_are_unbiased(small, big, nested):
    """The small batch may be part of the large one, or another altogether."""
    big_NxBxP = gradients(1, 10_000, big)
    small_NxBxP = big_NxBxP[:, :small] if nested else gradients(2, 10_000, small)
    norms_N = [jnp.asarray(sq_norm(g.mean(1)), jnp.float32) for g in (small_NxBxP, big_NxBxP)]
    grad_sq_N, trace_N = two_batch_estimates(norms_N[0], small, norms_N[1], big)
    assert_unbiased(np.asarray(grad_sq_N), GRAD_SQ)
    assert_unbiased(np.asarray(trace_N), TRACE)
    assert grad_sq_N.min() < 0  # not clamped


def test_microbatches_are_unbiased_and_vary_as_so_many_sequences():
    g_NxMxBxP = gradients(3, 10_000, 4, 3)
    small_NxMxP = g_NxMxBxP.mean(2)
    norms = [jnp.asarray(x, jnp.float32) for x in (sq_norm(small_NxMxP), sq_norm(small_NxMxP.mean(1)))]
    grad_sq_N, trace_N = microbatch_estimates(norms[0].T, 3, norms[1])  # draws as groups
    assert_unbiased(np.asarray(grad_sq_N), GRAD_SQ)
    assert_unbiased(np.asarray(trace_N), TRACE)
    four = gradients(4, 10_000, 4)  # 4 sequences in place of 4 microbatches of 3
    _, of_four_N = noise_scale.estimates(jnp.asarray(sq_norm(four).T, jnp.float32), jnp.asarray(sq_norm(four.mean(1)), jnp.float32))
    np.testing.assert_allclose(np.var(trace_N), np.var(of_four_N), rtol=0.1)
    _, of_last_N = two_batch_estimates(norms[0][:, -1], 3, norms[1], 12)
    assert np.var(of_last_N) > 4 * np.var(trace_N)


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]) ** 2)


def test_exact_and_microbatch_estimates_of_a_model_agree_within_their_intervals():
    """200 batches of 32 at fixed parameters. The truth is there too: a population of 4,096 examples."""
    keys = jax.random.split(jax.random.key(0), 5)
    population = {"x": jax.random.normal(keys[0], (4096, 1, 6)), "y": jax.random.normal(keys[1], (4096, 1, 3))}
    params = {"w": jax.random.normal(keys[2], (6, 8)), "v": 0.3 * jax.random.normal(keys[3], (8, 3))}
    result = jax.jit(lambda batch: per_example_sq_norms(loss_fn, params, batch, chunk=512))(population)
    grad_sq, trace = (float(x[0]) for x in noise_scale.estimates(result.sq_norms_BxG, result.grad_sq_G))

    @jax.jit
    def measure(picks_NxB):
        def step(states, picks_B):
            batch = jax.tree.map(lambda x: x[picks_B], population)
            exact = per_example_sq_norms(loss_fn, params, batch, chunk=32)
            micro = jax.tree.map(lambda x: x.reshape(4, 8, *x.shape[1:]), batch)
            grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, micro)
            sq_norms_MxG = sum(jnp.sum(g.reshape(4, -1) ** 2, axis=1, keepdims=True) for g in jax.tree.leaves(grads))
            estimates = (
                noise_scale.estimates(exact.sq_norms_BxG, exact.grad_sq_G),
                microbatch_estimates(sq_norms_MxG, 8, exact.grad_sq_G),
            )
            return [estimator.update(state, 32.0, *e, 1e9) for state, e in zip(states, estimates, strict=True)], None

        states, _ = jax.lax.scan(step, [estimator.init(1)] * 2, picks_NxB)
        return [estimator.read(state, 1e9) for state in states]

    readings = measure(jax.random.randint(keys[4], (200, 32), 0, 4096))
    for reading in readings:
        assert reading.low[0] < trace / grad_sq < reading.high[0] < 3 * reading.low[0]
    exact, micro = readings
    assert exact.high[0] - exact.low[0] < micro.high[0] - micro.low[0]  # one sequence at a time is best


def test_optax_per_element_statistics_give_the_same():
    """Optax keeps, of every parameter, the mean and the summed squared differences over the batch: tr Σ is their sum over B − 1."""
    aggregating = pytest.importorskip("optax.experimental").aggregating

    keys = jax.random.split(jax.random.key(1), 4)
    batch = {"x": jax.random.normal(keys[0], (16, 2, 6)), "y": jax.random.normal(keys[1], (16, 2, 3))}
    params = {"w": jax.random.normal(keys[2], (6, 8)), "v": jax.random.normal(keys[3], (8, 3))}
    result = per_example_sq_norms(loss_fn, params, batch)
    grad_sq_G, trace_G = noise_scale.estimates(result.sq_norms_BxG, result.grad_sq_G)

    per_example = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, jax.tree.map(lambda x: x[:, None], batch))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tx = aggregating.add_mean_variance_to_opt(optax.sgd(1.0), ema_decay=0.0)
        _, state = tx.update(per_example, tx.init(params))
        mean, variance = aggregating.get_unbiased_mean_and_variance_ema(state)
    trace = sum(float(jnp.sum(v)) for v in jax.tree.leaves(variance))
    np.testing.assert_allclose(trace_G[0], trace, rtol=1e-5)
    mean_sq = sum(float(jnp.sum(m**2)) for m in jax.tree.leaves(mean))
    np.testing.assert_allclose(grad_sq_G[0], mean_sq - trace / 16, rtol=1e-5)


@pytest.mark.parametrize(("small", "big"), [(8, 8), (9, 8), (0, 8)])
def test_batch_sizes_that_tell_nothing_are_refused(small, big):
    with pytest.raises(ValueError, match=f"not small_batch {small} and big_batch {big}"):
        two_batch_estimates(jnp.ones(1), small, jnp.ones(1), big)


def test_one_microbatch_and_one_shard_are_refused():
    with pytest.raises(ValueError, match="at least 2 microbatches, not 1"):
        microbatch_estimates(jnp.ones((1, 1)), 8, jnp.ones(1))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="at least 2 shards of the batch, and axis 'data' has 1"):
        jax.shard_map(
            lambda g: shard_estimates(g, "data", 4), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P()
        )(jnp.ones((1, 3)))  # fmt: skip
