"""An optimizer that keeps the noise scale: the estimator by hand, and the optimizer's own updates to the last bit."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from scaling_jax import noise_scale
from scaling_jax.noise_scale import estimator
from scaling_jax.noise_scale.any_model import per_example_sq_norms
from scaling_jax.noise_scale.tracking import TrackedState, track, tracked

WINDOW, STEPS, B = 100.0, 12, 4
pytestmark = pytest.mark.usefixtures("quick_compilation")


def groups(path):
    return "late" if "v" in path.split(".value")[0] else "early"


def params():
    return {"w": jax.random.normal(jax.random.key(0), (3, 4)), "v": jax.random.normal(jax.random.key(1), (4,))}


GRADS = {"w": jax.random.normal(jax.random.key(2), (STEPS, 3, 4)), "v": jax.random.normal(jax.random.key(3), (STEPS, 4))}
SQ_NORMS_NxBxG = 20 + jax.random.normal(jax.random.key(4), (STEPS, B, 2)) ** 2
TOKENS_N = 10.0 + np.arange(STEPS)


def inner():
    return optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1e-2, momentum=0.9))


@cache
def by_hand():
    @jax.jit
    def step(state, grads, sq_norms_BxG, tokens):
        grad_sq_G = jnp.stack([jnp.sum(grads["w"] ** 2), jnp.sum(grads["v"] ** 2)])
        return estimator.update(state, tokens, *noise_scale.estimates(sq_norms_BxG, grad_sq_G), WINDOW)

    state = estimator.init(2)
    for i in range(STEPS):
        state = step(state, jax.tree.map(lambda g, i=i: g[i], GRADS), SQ_NORMS_NxBxG[i], TOKENS_N[i])
    return state


def run(tx, plain=False):
    """The last state, and all updates."""

    @jax.jit
    def step(state, grads, sq_norms_BxG, tokens):
        extra = {} if plain else {"sq_norms_BxG": sq_norms_BxG, "tokens": tokens}
        return tx.update(grads, state, params(), **extra)

    state, all_updates = tx.init(params()), []
    for i in range(STEPS):
        updates, state = step(state, jax.tree.map(lambda g, i=i: g[i], GRADS), SQ_NORMS_NxBxG[i], TOKENS_N[i])
        all_updates.append(updates)
    return state, all_updates


def assert_same(state, expected=None):
    for found, wanted in zip(state, expected or by_hand(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_estimate_is_the_estimators_and_the_updates_are_the_optimizers():
    state, updates = run(track(inner(), WINDOW, groups=groups))
    plain_state, plain_updates = run(inner(), plain=True)
    assert isinstance(state, TrackedState)
    assert_same(tracked(state))
    for found, wanted in zip(jax.tree.leaves((state.inner, updates)), jax.tree.leaves((plain_state, plain_updates)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    reading = estimator.read(tracked(state), WINDOW)
    np.testing.assert_allclose(reading.grad_trace, estimator.read(by_hand(), WINDOW).grad_trace, rtol=1e-5)


def test_it_is_found_in_chains_and_wrappers():
    chained, updates = run(optax.chain(track(optax.identity(), WINDOW, groups=groups), inner()))
    assert_same(tracked(chained))
    _, plain_updates = run(inner(), plain=True)
    for found, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(plain_updates), strict=True):
        np.testing.assert_array_equal(found, wanted)
    wrapped, _ = run(optax.apply_if_finite(track(inner(), WINDOW, groups=groups), 3))
    assert_same(tracked(wrapped))
    with pytest.raises(ValueError, match="holds 0"):
        tracked(inner().init(params()))
    with pytest.raises(ValueError, match="holds 2"):
        tracked(track(track(inner(), WINDOW), WINDOW).init(params()))


def test_apply_if_finite_leaves_a_step_that_is_not_finite_out_of_the_window():
    tx = optax.apply_if_finite(track(optax.sgd(0.1), WINDOW, groups=groups), 3)
    good = jax.tree.map(lambda g: g[0], GRADS)
    extra = {"sq_norms_BxG": SQ_NORMS_NxBxG[0], "tokens": 10.0}
    _, state = tx.update(good, tx.init(params()), params(), **extra)
    _, after = tx.update(jax.tree.map(lambda g: g * jnp.nan, good), state, params(), **extra)
    assert_same(tracked(after), tracked(state))


def test_around_multi_steps_every_microbatch_counts_with_its_own_norms():
    multi = optax.MultiSteps(inner(), every_k_schedule=4).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"):  # optax divides by its count of steps
        state, updates = run(track(multi, WINDOW, groups=groups))
        plain_state, plain_updates = run(multi, plain=True)
    assert_same(tracked(state))
    for found, wanted in zip(jax.tree.leaves((state.inner, updates)), jax.tree.leaves((plain_state, plain_updates)), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_other_arguments_are_passed_on():
    def update(updates, state, params=None, *, value, **extra):
        assert not extra
        return jax.tree.map(lambda g: value * g, updates), state

    tx = track(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update), WINDOW)
    updates, _ = tx.update(params(), tx.init(params()), params(), sq_norms_BxG=jnp.ones((B, 1)), tokens=5, value=3.0)
    np.testing.assert_array_equal(updates["w"], 3 * params()["w"])


def test_a_given_squared_norm_is_taken_instead():
    tx = track(optax.sgd(0.1), WINDOW)
    extra = {"sq_norms_BxG": SQ_NORMS_NxBxG[0, :, :1], "tokens": 10.0, "grad_sq_G": jnp.asarray([7.0])}
    _, state = tx.update(params(), tx.init(params()), params(), **extra)
    expected = estimator.update(estimator.init(1), 10.0, *noise_scale.estimates(extra["sq_norms_BxG"], jnp.asarray([7.0])), WINDOW)
    assert_same(tracked(state), expected)


def test_with_any_model_under_nnx_optimizer():
    net = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    batch = {"x": jax.random.normal(jax.random.key(5), (B, 3)), "y": jax.random.normal(jax.random.key(6), (B, 2))}
    by_name = lambda path: "kernel" if "kernel" in path else "bias"  # noqa: E731
    optimizer = nnx.Optimizer(net, track(optax.sgd(1e-2), WINDOW, groups=by_name), wrt=nnx.Param)
    graph, state = nnx.split(net, nnx.Param)
    loss_fn = lambda state, batch: jnp.mean((nnx.merge(graph, state)(batch["x"]) - batch["y"]) ** 2)  # noqa: E731
    result = per_example_sq_norms(loss_fn, state, batch, groups=by_name, check=False)
    before = jax.tree.map(lambda p: p + 0, state)
    optimizer.update(net, result.grads, sq_norms_BxG=result.sq_norms_BxG, tokens=32.0)
    for old, new, grad in zip(*map(jax.tree.leaves, (before, nnx.state(net, nnx.Param), result.grads)), strict=True):
        np.testing.assert_allclose(new, old - 1e-2 * grad, rtol=1e-5)
    expected = estimator.update(estimator.init(2), 32.0, *noise_scale.estimates(result.sq_norms_BxG, result.grad_sq_G), WINDOW)
    assert all(isinstance(x, jax.Array) for x in tracked(optimizer.opt_state))
    assert_same(tracked(optimizer.opt_state), expected)
    assert float(estimator.read(tracked(optimizer.opt_state), WINDOW).grad_trace[2]) > 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "update needs sq_norms_BxG and tokens by keyword"),
        ({"tokens": 10.0}, "update needs sq_norms_BxG by keyword"),
        ({"sq_norms_BxG": SQ_NORMS_NxBxG[0]}, "update needs tokens by keyword"),
        ({"sq_norms_BxG": SQ_NORMS_NxBxG[0, :, :1], "tokens": 10.0}, r"of shape \[B, 2\], a column for each group, not \(4, 1\)"),
        ({"sq_norms_BxG": SQ_NORMS_NxBxG[0, 0], "tokens": 10.0}, r"of shape \[B, 2\], a column for each group, not \(2,\)"),
    ],
)
def test_errors(extra, message):
    tx = track(inner(), WINDOW, groups=groups)
    with pytest.raises(ValueError, match=message):
        tx.update(params(), tx.init(params()), params(), **extra)
