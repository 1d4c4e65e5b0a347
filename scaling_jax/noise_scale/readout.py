"""The loss of a readout without its logits: some positions at a time, forwards and again backwards.

With a large vocabulary the logits [B, L, V] are the largest array of a training step. Here a slice of them is made, reduced to a loss a
token and dropped; the backward pass makes it again from h and W, one product more in three. One slice is some positions of one
sequence of every shard, so that each sequence's contribution to the gradient of W is finished before the next begins, and its squared
norm is there to take, as in `per_example`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from scaling_jax.noise_scale.per_example import _check_probe
from scaling_jax.noise_scale.sequence_sums import squares
from scaling_jax.noise_scale.shards import Shards, as_shards, by_shard, check_shards, over_shards


def token_losses(logits_BxLxV: Array, targets_BxL: Array) -> Array:
    """Cross-entropy of every token in nats: [B, L], float32."""
    return jax.nn.logsumexp(logits_BxLxV, axis=-1) - jnp.sum(jnp.where(_is_target(logits_BxLxV, targets_BxL), logits_BxLxV, 0.0), axis=-1)


def _is_target(logits_BxLxV: Array, targets_BxL: Array) -> Array:
    """A mask and not a gather: the vocabulary may lie across devices."""
    vocab_V = jnp.arange(logits_BxLxV.shape[-1])
    return targets_BxL[..., None] == jnp.expand_dims(vocab_V, tuple(range(targets_BxL.ndim)))


def readout_losses(
    h_BxLxD: Array,
    w_DxV: Array,
    targets_BxL: Array,
    probe_B: Array | None = None,
    metric_DxV: Array | None = None,
    tied: tuple[Array, Array] | None = None,
    *,
    chunk: int,
    shards: int | Shards = 1,
) -> Array:
    """`token_losses(h·W, targets)`, holding the logits of at most `chunk` tokens of each shard at a time.

    Args:
      h_BxLxD: final hidden states.
      w_DxV: readout, float32; cast to the dtype of h for the products. Of a tied pair the table, transposed.
      targets_BxL: token ids.
      probe_B: float32 zeros, whose cotangent is the squared norm of each sequence's gradient of W, or None.
      metric_DxV: P, not negative; the probe is then [B, 2].
      tied: tokens_BxL and carrier_BxLxD of `embed_tied`, of a tied pair with a probe, which must be the same.
      chunk: tokens; positions are divided evenly, into pieces of the largest divisor of L up to it.
      shards: devices that shard the batch; divides B.

    Returns:
      losses_BxL in nats, float32. There are no forward-mode and no second derivatives.
    """
    shards = as_shards(shards)
    check_shards(h_BxLxD.shape[0], shards)
    if probe_B is not None:
        _check_probe(probe_B, metric_DxV)
    length = h_BxLxD.shape[1]
    piece = next(n for n in range(min(chunk, length), 0, -1) if length % n == 0)
    return _losses(piece, shards, probe_B is not None, h_BxLxD, w_DxV, targets_BxL, probe_B, metric_DxV, tied)


def _slices(x_BxL: Array, piece: int, shards: Shards) -> Array:
    """[B, L, …] -> [sequences of a shard, pieces, shards, piece, …]."""
    x_NxSxL = by_shard(x_BxL, shards)
    return x_NxSxL.reshape(*x_NxSxL.shape[:2], -1, piece, *x_NxSxL.shape[3:]).swapaxes(1, 2)


def _whole(x_NxCxSxP: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_slices`."""
    return jnp.moveaxis(x_NxCxSxP, 2, 0).reshape(shape)


def _each_shard(function: Callable[..., Any], shards: Shards) -> Callable[..., Any]:
    """`function` of one shard's arrays for arrays with a leading axis, the shards. XLA's CPU backend is slow at an axis of length 1."""
    if shards.count > 1:
        return jax.vmap(function)
    return lambda *args: jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], args)))


def _logits(h_PxD: Array, w_DxV: Array) -> Array:
    return jnp.matmul(h_PxD, w_DxV, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _losses(piece, shards, probed, h_BxLxD, w_DxV, targets_BxL, probe_B, metric_DxV, tied):
    h, targets = (_slices(x, piece, shards) for x in (h_BxLxD, targets_BxL))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (h, targets))
    w_DxV = w_DxV.astype(h_BxLxD.dtype)
    one = _each_shard(lambda h_PxD, targets_P: token_losses(_logits(h_PxD, w_DxV), targets_P), shards)
    return _whole(jax.lax.map(lambda slice: one(*slice), flat).reshape(targets.shape), targets_BxL.shape)


def _losses_fwd(piece, shards, probed, h_BxLxD, w_DxV, targets_BxL, probe_B, metric_DxV, tied):
    losses_BxL = _losses(piece, shards, probed, h_BxLxD, w_DxV, targets_BxL, probe_B, metric_DxV, tied)
    tokens_BxL = None if tied is None else tied[0]
    return losses_BxL, (h_BxLxD, w_DxV, targets_BxL, metric_DxV, tokens_BxL)


def _losses_bwd(piece, shards, probed, residuals, dlosses_BxL):
    h_BxLxD, w_DxV, targets_BxL, metric_DxV, tokens_BxL = residuals
    inputs = tuple(_slices(x, piece, shards) for x in (h_BxLxD, targets_BxL, dlosses_BxL))
    tokens_NxSxL = None if tokens_BxL is None else by_shard(tokens_BxL, shards)
    cast_DxV = w_DxV.astype(h_BxLxD.dtype)
    zeros_SxDxV = jnp.zeros((shards.count, *w_DxV.shape), jnp.float32)

    def backward(product_DxV, u_LxD, h_PxD, targets_P, dlosses_P, tokens_L):
        """One slice: what it adds to the gradient of W and, of a tied pair, to u; and its dh."""
        logits_PxV = _logits(h_PxD, cast_DxV)
        dlogits_PxV = jax.nn.softmax(logits_PxV) - _is_target(logits_PxV, targets_P).astype(jnp.float32)
        dlogits_PxV = (dlogits_PxV * dlosses_P[:, None]).astype(h_PxD.dtype)
        product_DxV += jnp.matmul(h_PxD.T, dlogits_PxV, preferred_element_type=jnp.float32)
        if tokens_L is not None:
            u_LxD += jnp.matmul(dlogits_PxV[:, tokens_L].T, h_PxD, preferred_element_type=jnp.float32)
        return product_DxV, u_LxD, jnp.matmul(dlogits_PxV, cast_DxV.T)

    def sequence(total_SxDxV, xs):
        slices, tokens_SxL = xs
        u_SxLxD = None if tokens_SxL is None else jnp.zeros((*tokens_SxL.shape, h_BxLxD.shape[2]), jnp.float32)

        def add(sums, slice):
            product_SxDxV, u_SxLxD, dh_SxPxD = _each_shard(backward, shards)(*sums, *slice, tokens_SxL)
            return (product_SxDxV, u_SxLxD), dh_SxPxD

        if not probed:  # all sequences in one sum
            (total_SxDxV, _), dh = jax.lax.scan(add, (total_SxDxV, None), slices)
            return total_SxDxV, (dh, None, None)
        (product_SxDxV, u_SxLxD), dh = jax.lax.scan(add, (zeros_SxDxV, u_SxLxD), slices)
        u_SxLxD = None if u_SxLxD is None else u_SxLxD.astype(h_BxLxD.dtype)  # as the carrier is
        return total_SxDxV + product_SxDxV, (dh, u_SxLxD, jax.vmap(squares, in_axes=(0, None))(product_SxDxV, metric_DxV))

    total_SxDxV, (dh, u_NxSxLxD, sq_norms_NxS) = jax.lax.scan(sequence, zeros_SxDxV, (inputs, tokens_NxSxL))
    dh_BxLxD = _whole(dh, h_BxLxD.shape)
    dw_DxV = over_shards(total_SxDxV, shards, h_BxLxD.dtype).astype(w_DxV.dtype)
    if not probed:
        return dh_BxLxD, dw_DxV, None, None, None, None
    sq_norms_B = sq_norms_NxS.swapaxes(0, 1).reshape(-1, *sq_norms_NxS.shape[2:])
    dtied = None if u_NxSxLxD is None else (None, u_NxSxLxD.swapaxes(0, 1).reshape(h_BxLxD.shape))
    return dh_BxLxD, dw_DxV, None, sq_norms_B, None, dtied


_losses.defvjp(_losses_fwd, _losses_bwd)
