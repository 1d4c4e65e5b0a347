"""A loss without its logits against the one with them: value, gradients, squared norms, and what it holds in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scaling_jax import noise_scale as ns

B, L, D, V = 6, 12, 5, 11


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


H_BxLxD, W_DxV = 2 * random(0, B, L, D), random(1, D, V)
TOKENS_BxL = jax.random.randint(jax.random.key(2), (B, L), 0, 4)  # each sequence repeats some
TARGETS_BxL = jax.random.randint(jax.random.key(3), (B, L), 0, V)
COTANGENT_BxL = random(4, B, L)  # any weights of the losses, not a mean's
METRIC_DxV = jax.random.exponential(jax.random.key(5), (D, V))


def plain_losses(h_BxLxD, w_DxV, targets_BxL):
    return optax.softmax_cross_entropy_with_integer_labels(jnp.einsum("bld,dv->blv", h_BxLxD, w_DxV), targets_BxL)


@pytest.mark.parametrize(("chunk", "shards"), [(1, 1), (4, 2), (5, 3), (12, 1), (100, 6)])
def test_equals_the_loss_with_all_logits(chunk, shards):
    """To 1e-6; 5 positions do not divide 12, so that pieces have 4."""

    def loss(h_BxLxD, w_DxV, probe_B=None, metric_DxV=None):
        losses_BxL = ns.readout_losses(h_BxLxD, w_DxV, TARGETS_BxL, probe_B, metric_DxV, chunk=chunk, shards=shards)
        return jnp.sum(COTANGENT_BxL * losses_BxL), losses_BxL

    def plain(h_BxLxD, w_DxV, targets_BxL, cotangent_BxL):
        return jnp.sum(cotangent_BxL * plain_losses(h_BxLxD, w_DxV, targets_BxL))

    each = jax.vmap(lambda h, t, c: jax.grad(plain, argnums=1)(h[None], W_DxV, t[None], c[None]))(H_BxLxD, TARGETS_BxL, COTANGENT_BxL)
    dh_BxLxD = jax.grad(plain)(H_BxLxD, W_DxV, TARGETS_BxL, COTANGENT_BxL)
    square_BxDxV = np.square(np.asarray(each, np.float64))

    grads, losses_BxL = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(H_BxLxD, W_DxV)
    close(losses_BxL, plain_losses(H_BxLxD, W_DxV, TARGETS_BxL))
    close(grads[0], dh_BxLxD)
    close(grads[1], each.sum(0))
    probed = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    grads, _ = probed(H_BxLxD, W_DxV, jnp.zeros((B, 2)), METRIC_DxV)
    close(grads[0], dh_BxLxD)
    close(grads[1], each.sum(0))
    close(grads[2][:, 0], square_BxDxV.sum((1, 2)), 2e-6)
    close(grads[2][:, 1], (square_BxDxV * np.asarray(METRIC_DxV)[None]).sum((1, 2)), 2e-6)


@pytest.mark.parametrize(("chunk", "shards"), [(4, 1), (12, 3)])
def test_tied_pair_has_its_cross_term(chunk, shards):
    table_VxD = random(1, V, D)

    def loss(table_VxD, probe_B, metric_VxD):
        x_BxLxD, carrier_BxLxD = ns.embed_tied(table_VxD, TOKENS_BxL, probe_B, metric_VxD)
        tied = TOKENS_BxL, carrier_BxLxD
        of = jnp.sin(x_BxLxD), table_VxD.T, TARGETS_BxL, probe_B, metric_VxD.T, tied
        return jnp.sum(COTANGENT_BxL * ns.readout_losses(*of, chunk=chunk, shards=shards))

    def plain(table_VxD, tokens_L, targets_L, cotangent_L):
        return jnp.sum(cotangent_L * plain_losses(jnp.sin(table_VxD[tokens_L])[None], table_VxD.T, targets_L[None])[0])

    each = jax.vmap(lambda *x: jax.grad(plain)(table_VxD, *x))(TOKENS_BxL, TARGETS_BxL, COTANGENT_BxL)
    dtable_VxD, norms_Bx2 = jax.jit(jax.grad(loss, argnums=(0, 1)))(table_VxD, jnp.zeros((B, 2)), METRIC_DxV.T)
    square = np.square(np.asarray(each, np.float64))
    close(dtable_VxD, each.sum(0))
    close(norms_Bx2[:, 0], square.sum((1, 2)), 2e-6)
    close(norms_Bx2[:, 1], (square * np.asarray(METRIC_DxV.T)[None]).sum((1, 2)), 2e-6)


def test_bfloat16_sums_in_float32():
    """Against float32 at the same rounded numbers: dlogits are rounded once more, sums are not."""
    h, w = H_BxLxD.astype(jnp.bfloat16), W_DxV.astype(jnp.bfloat16).astype(jnp.float32)

    def loss(h, w, probe_B):
        return ns.readout_losses(h, w, TARGETS_BxL, probe_B, chunk=4).sum()

    (dh, dw, norms_B), losses = jax.grad(loss, argnums=(0, 1, 2))(h, w, jnp.zeros(B)), ns.readout_losses(h, w, TARGETS_BxL, chunk=4)
    close(losses, plain_losses(h.astype(jnp.float32), w, TARGETS_BxL), 1e-5)
    exact = jax.grad(loss, argnums=(0, 1, 2))(h.astype(jnp.float32), w, jnp.zeros(B))
    assert dh.dtype == jnp.bfloat16 and dw.dtype == norms_B.dtype == jnp.float32
    close(dw, exact[1], 1e-2)
    close(norms_B, exact[2], 2e-2)


@pytest.mark.parametrize("probed", [False, True])
def test_no_array_is_as_large_as_the_logits(probed):
    """At GPT-2's vocabulary the compiled gradient needs less memory than the logits alone would."""
    sequences, length, width, vocab = 8, 256, 16, 50_304
    shapes = [(sequences, length, width), (width, vocab), (sequences, length)]
    h, w, targets = (jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, (jnp.float32, jnp.float32, jnp.int32), strict=True))

    def loss(h, w, targets, probe_B=None):
        return ns.readout_losses(h, w, targets, probe_B, chunk=64).mean()

    given = (h, w, targets, *([jax.ShapeDtypeStruct((sequences,), jnp.float32)] if probed else []))
    arguments = (0, 1, 3) if probed else (0, 1)
    memory = jax.jit(jax.grad(loss, argnums=arguments)).lower(*given).compile().memory_analysis()
    logits = sequences * length * vocab * 4
    assert memory.temp_size_in_bytes < 0.2 * logits

    def all_at_once(h, w, targets):
        return plain_losses(h, w, targets).mean()

    held = jax.jit(jax.grad(all_at_once, argnums=(0, 1))).lower(h, w, targets).compile().memory_analysis()
    assert held.temp_size_in_bytes >= logits
