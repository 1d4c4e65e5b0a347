"""Parameters used several times: squared norms of the sum over uses, against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax import noise_scale as ns

B, L, D, USES = 6, 7, 5, 4


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


X_BxLxD, W_DxD, BIAS_D = random(0, B, L, D), 0.6 * random(1, D, D), random(2, D)


def plain(w_DxD, bias_D, x_BxLxD):
    for _ in range(USES):
        x_BxLxD = x_BxLxD + jnp.tanh(jnp.einsum("bli,io->blo", x_BxLxD, w_DxD) + bias_D[None, None])
    return jnp.sum(x_BxLxD**2)


def probed(shards, remat, w_DxD, bias_D, probe_B, metric=(None, None)):
    carriers = ns.open_uses(w_DxD, probe_B, metric[0], uses=USES, length=L, shards=shards)
    bias_BxD = ns.per_sequence(bias_D, probe_B, metric[1])

    def step(x_BxLxD, carriers):
        return x_BxLxD + jnp.tanh(ns.use(x_BxLxD, w_DxD, carriers, shards=shards) + bias_BxD[:, None]), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(step) if remat else step, X_BxLxD, carriers)[0] ** 2)


@pytest.mark.parametrize(("shards", "remat"), [(1, False), (3, True)])
def test_uses_are_summed_before_they_are_squared(shards, remat):
    """The shares that a probe for each use would give, 0.52 at two uses to 0.13 at eight, are far from 1: cross terms matter."""
    each = jax.vmap(lambda x: jax.grad(plain, argnums=(0, 1))(W_DxD, BIAS_D, x[None]))(X_BxLxD)
    squares = [np.square(np.asarray(g, np.float64)).reshape(B, -1) for g in each]

    def loss(*args):
        return probed(shards, remat, *args)

    close(loss(W_DxD, BIAS_D, jnp.zeros(B)), plain(W_DxD, BIAS_D, X_BxLxD))
    dw_DxD, dbias_D, norms_B = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(W_DxD, BIAS_D, jnp.zeros(B))
    close(dw_DxD, each[0].sum(0))
    close(dbias_D, each[1].sum(0))
    close(norms_B, squares[0].sum(1) + squares[1].sum(1))
    metric = jax.random.exponential(jax.random.key(3), (D, D)), jax.random.exponential(jax.random.key(4), (D,))
    _, _, norms_Bx2 = jax.grad(loss, argnums=(0, 1, 2))(W_DxD, BIAS_D, jnp.zeros((B, 2)), metric)
    weighed = sum((s * np.asarray(m).reshape(1, -1)).sum(1) for s, m in zip(squares, metric, strict=True))
    close(norms_Bx2[:, 0], squares[0].sum(1) + squares[1].sum(1))
    close(norms_Bx2[:, 1], weighed)

    def one_by_one(w_DxD, probe_B):  # what a shared probe makes of several uses
        x_BxLxD = X_BxLxD
        for _ in range(USES):
            x_BxLxD = x_BxLxD + jnp.tanh(ns.dense(x_BxLxD, w_DxD, probe_B) + BIAS_D[None, None])
        return jnp.sum(x_BxLxD**2)

    assert np.max(jax.grad(one_by_one, argnums=1)(W_DxD, jnp.zeros(B)) / squares[0].sum(1)) < 0.8


def test_a_table_of_positions_is_each_sequences_own():
    """A use in every sequence at every row: nothing to sum but over sequences."""
    table_LxD = random(5, L, D)

    def loss(table_LxD, probe_B, x_BxLxD):
        return jnp.sum(jnp.sin(x_BxLxD + ns.per_sequence(table_LxD, probe_B)) ** 2)

    def alone(table_LxD, x_LxD):
        return jnp.sum(jnp.sin(x_LxD + table_LxD) ** 2)

    each = jax.vmap(jax.grad(alone), in_axes=(None, 0))(table_LxD, X_BxLxD)
    dtable_LxD, norms_B = jax.grad(loss, argnums=(0, 1))(table_LxD, jnp.zeros(B), X_BxLxD)
    close(dtable_LxD, each.sum(0))
    close(norms_B, np.square(np.asarray(each, np.float64)).sum((1, 2)))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="6 sequences cannot be divided among 4 shards"):
        ns.open_uses(W_DxD, jnp.zeros(B), uses=2, length=L, shards=4)
    with pytest.raises(ValueError, match="two columns with a metric"):
        ns.per_sequence(BIAS_D, jnp.zeros(B), BIAS_D)
