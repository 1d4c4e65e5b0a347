"""AdamW by the table against the algorithm written out, and schedules against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling_jax import optimizer
from scaling_jax.config import default_config
from scaling_jax.parametrization import Rule


def test_adamw_is_the_algorithm_with_each_parameters_own_values():
    """Against a float64 loop of Loshchilov & Hutter's algorithm, with clipping, for two parameters of different rules."""
    config = default_config()
    o = config.optimizer
    o.lr, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm = 0.1, 0.8, 0.9, 1e-2, 0.3, 1.5
    rules = {"a": Rule(1.0, lr=0.25, weight_decay=4.0, eps=0.5), "b": Rule(1.0)}
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=(3, 2)).astype(np.float32) for name in rules}
    params = nnx.State({name: nnx.Param(jnp.asarray(start[name]), rule=rules[name]) for name in rules})
    tx = optimizer.adamw(config)
    state = tx.init(params)

    expected = {name: start[name].astype(np.float64) for name in rules}
    m, v = ({name: 0.0 for name in rules} for _ in range(2))
    for t in range(1, 6):
        grads = {name: rng.normal(size=(3, 2)) for name in rules}
        fraction = 1.0 - 0.1 * t
        tree = nnx.State({name: nnx.Param(jnp.asarray(grads[name], jnp.float32), rule=rules[name]) for name in rules})
        updates, state = tx.update(tree, state, params, lr_fraction=jnp.float32(fraction))
        params = jax.tree.map(jnp.add, params, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, r in rules.items():
            g = grads[name] * min(1.0, o.clip_norm / norm)
            m[name] = o.b1 * m[name] + (1 - o.b1) * g
            v[name] = o.b2 * v[name] + (1 - o.b2) * g**2
            direction = m[name] / (1 - o.b1**t) / (np.sqrt(v[name] / (1 - o.b2**t)) + o.eps * r.eps)
            decay = o.weight_decay * r.weight_decay * expected[name]
            expected[name] = expected[name] - fraction * o.lr * r.lr * (direction + decay)
    for name in rules:
        np.testing.assert_allclose(params[name][...], expected[name], rtol=1e-5, atol=1e-6)


def fractions(tokens, name, total=1000, **fields):
    config = default_config()
    config.train.tokens, config.train.batch_tokens, config.schedule.name = total, 1, name
    for key, value in fields.items():
        config.schedule[key] = value
    return np.asarray(jax.vmap(optimizer.schedule(config))(jnp.asarray(tokens, jnp.float32)))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_warmup_is_linear_from_zero_and_reaches_the_peak(name):
    found = fractions([0, 50, 100], name, warmup_tokens=100, decay_tokens=200)
    np.testing.assert_allclose(found, [0, 0.5, 1], atol=1e-6)


def test_courses_after_warmup():
    at = [100, 325, 550, 775, 1000]
    floor = {"warmup_tokens": 100, "final_lr_fraction": 0.1}
    np.testing.assert_allclose(fractions(at, "constant", **floor), 1)
    np.testing.assert_allclose(fractions(at, "linear", **floor), [1, 0.775, 0.55, 0.325, 0.1], atol=1e-6)
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.array([0, 0.25, 0.5, 0.75, 1]))) / 2
    np.testing.assert_allclose(fractions(at, "cosine", **floor), cosine, atol=1e-6)
    np.testing.assert_allclose(fractions([100, 800, 900, 1000], "wsd", decay_tokens=200, **floor), [1, 1, 0.55, 0.1], atol=1e-6)


def test_without_room_to_decay_the_lr_stays():
    np.testing.assert_allclose(fractions([100, 999], "wsd", warmup_tokens=100), 1)
    np.testing.assert_allclose(fractions([500, 1000], "cosine", warmup_tokens=1000), [0.5, 1])


def test_the_end_is_that_of_the_last_whole_step():
    """A budget that is no whole number of steps: the last step's middle lies beyond it, and still has an lr."""
    config = default_config()
    config.train.tokens, config.train.batch_tokens, config.schedule.name = 1001, 100, "linear"
    np.testing.assert_allclose(optimizer.schedule(config)(1050.0), 50 / 1100, rtol=1e-5)


def test_beyond_the_end_the_floor_holds():
    np.testing.assert_allclose(fractions([1000, 5000], "cosine", final_lr_fraction=0.2), 0.2, atol=1e-6)


def test_large_token_counts_keep_their_precision():
    """Tokens are counted in float32 here: 10¹³ of them must still place the schedule to 10⁻⁶."""
    np.testing.assert_allclose(fractions([2.5e12, 7.5e12], "linear", total=10**13), [0.75, 0.25], atol=1e-6)
