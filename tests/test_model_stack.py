"""Blocks written out against the same blocks in a loop, and against a loop in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.model.stack import loop, written_out

DEPTH, SHAPE = 5, (3, 4, 6)


def block(x_BxLxD, layer):
    """Two parameters, and one that some callers leave out; yields a dict of what is seen on the way, and what it was not given."""
    w_DxD, gain_D, index, absent = layer
    h_BxLxD = jnp.tanh(x_BxLxD @ w_DxD) * jnp.broadcast_to(gain_D, x_BxLxD.shape)
    return x_BxLxD + h_BxLxD, ({"hidden": h_BxLxD, "of block": index, "scalar": jnp.sum(h_BxLxD)}, absent)


@pytest.fixture(scope="module")
def layers():
    keys = jax.random.split(jax.random.key(0), 2)
    w_NxDxD, gain_NxD = jax.random.normal(keys[0], (DEPTH, 6, 6)) / 3, 1 + jax.random.normal(keys[1], (DEPTH, 6))
    return w_NxDxD, gain_NxD, jnp.arange(DEPTH), None


@pytest.fixture(scope="module")
def x_BxLxD():
    return jax.random.normal(jax.random.key(1), SHAPE)


def loss(through, x_BxLxD, w_NxDxD, gain_NxD):
    x_BxLxD, (seen, _) = through(block, x_BxLxD, (w_NxDxD, gain_NxD, jnp.arange(DEPTH), None))
    return jnp.sum(x_BxLxD**2) + jnp.sum(jnp.sin(seen["hidden"])) + jnp.sum(seen["scalar"] ** 3)  # what is yielded has gradients too


def test_values_and_what_is_yielded(layers, x_BxLxD):
    x, hidden = np.asarray(x_BxLxD, np.float64), []
    for w_DxD, gain_D in zip(*(np.asarray(array, np.float64) for array in layers[:2]), strict=True):
        hidden.append(np.tanh(x @ w_DxD) * gain_D)
        x = x + hidden[-1]
    for through in (written_out, loop):
        found, (seen, absent) = jax.jit(through, static_argnums=0)(block, x_BxLxD, layers)
        assert absent is None and set(seen) == {"hidden", "of block", "scalar"}
        np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(seen["hidden"], np.stack(hidden), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(seen["scalar"], np.sum(hidden, axis=(1, 2, 3)), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(seen["of block"], np.arange(DEPTH))
        assert seen["of block"].dtype == layers[2].dtype


def test_gradients_are_those_of_the_loop(layers, x_BxLxD):
    grads = [jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)(f, x_BxLxD, *layers[:2]) for f in (written_out, loop)]
    for found, expected in zip(*grads, strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_gradient_is_put_together_once(layers, x_BxLxD):
    """Each stack's gradient is one concatenation: no zero-padded arrays that are added up, and no updates in place."""
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(2, 3)), static_argnums=0)(written_out, x_BxLxD, *layers[:2]))
    assert f"f32[{DEPTH},6,6] = concatenate" in text and f"f32[{DEPTH},6] = concatenate" in text
    assert not any(name in text for name in (" pad[", "dynamic_update_slice", "scatter", "scan["))
    assert f"f32[{DEPTH},6,6] = add" not in text


def test_blocks_that_yield_nothing_and_a_single_block(x_BxLxD):
    def plain(x_BxLxD, factor):
        return x_BxLxD * factor, None

    for depth in (1, 3):
        found, yielded = written_out(plain, x_BxLxD, jnp.full(depth, 2.0))
        assert yielded is None
        np.testing.assert_array_equal(found, x_BxLxD * 2**depth)


def test_what_has_no_parameters_of_its_own_takes_what_every_block_has(x_BxLxD):
    """As a block that is shared does: of the layers only the number is its own."""
    found, numbers = written_out(lambda x, layer: (x + layer[1].astype(jnp.float32), layer[1]), x_BxLxD, (None, jnp.arange(4)))
    np.testing.assert_array_equal(numbers, np.arange(4))
    np.testing.assert_allclose(found, x_BxLxD + 6, rtol=1e-6)
