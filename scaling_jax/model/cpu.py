"""Parts of the model as XLA's CPU backend runs them fast: the same functions, with backward passes of their own. Reverse mode only."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from scaling_jax.model.attention import SAVED
from scaling_jax.model.layers import ACTIVATIONS


def from_input(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """`function`, elementwise, with a backward pass that keeps its input only and computes the rest again: cheaper than reading it."""

    def backward(x: Array, dy: Array) -> tuple[Array]:
        # Without the barrier XLA would keep what the forward pass computed.
        _, vjp = jax.vjp(function, jax.lax.optimization_barrier(x))
        return vjp(dy)

    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda x: (function(x), x), backward)
    return wrapped


CPU_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {name: from_input(function) for name, function in ACTIVATIONS.items()}


def blocked_attention(q_BxHxLxK: Array, k_BxGxLxK: Array, v_BxGxLxK: Array, scale: float, dtype: str) -> Array:
    """`causal_attention` as XLA's CPU backend runs it fast, with products of operands in `dtype`; reverse mode only.

    Some queries at a time, so that most of what causality hides is not computed. Products are in orientations that the backend has fast
    kernels for, and the backward pass takes Σ_m w·dw of each query as dy·y (Dao et al. 2022), so that fewer arrays of L² entries are
    read and written.
    """
    heads, groups = q_BxHxLxK.shape[1], k_BxGxLxK.shape[1]
    k_BxHxLxK, v_BxHxLxK = (x if groups == heads else jnp.repeat(x, heads // groups, 1) for x in (k_BxGxLxK, v_BxGxLxK))
    return checkpoint_name(_blocked(scale, jnp.dtype(dtype), q_BxHxLxK, k_BxHxLxK, v_BxHxLxK), SAVED)


def _ends(length: int) -> list[tuple[int, int]]:
    """Start and end of each block of queries, which see the keys before their end."""
    blocks = next(n for n in (4, 2, 1) if n == 1 or length % n == 0 and length // n >= 64)
    return [(i * length // blocks, (i + 1) * length // blocks) for i in range(blocks)]


def _multiply(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _turned(x_BxHxLxM: Array) -> Array:
    """[B, H, M, L] as an array of its own: with one more axis, or XLA would fold the transpose into the product that reads it."""
    return jnp.moveaxis(x_BxHxLxM[:, :, None], 4, 2)[:, :, :, 0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(scale, dtype, q_BxHxLxK, k_BxHxLxK, v_BxHxLxK):
    return _blocked_fwd(scale, dtype, q_BxHxLxK, k_BxHxLxK, v_BxHxLxK)[0]


def _blocked_fwd(scale, dtype, q_BxHxLxK, k_BxHxLxK, v_BxHxLxK):
    given, ys, kept = q_BxHxLxK.dtype, [], []
    q_BxHxLxK, k_BxHxLxK, v_BxHxLxK = (x.astype(dtype) for x in (q_BxHxLxK, k_BxHxLxK, v_BxHxLxK))
    for start, end in _ends(q_BxHxLxK.shape[2]):
        logits_BxHxLxM = _multiply("bhlk,bhmk->bhlm", q_BxHxLxK[:, :, start:end], k_BxHxLxK[:, :, :end]) * scale
        seen_LxM = np.arange(end)[None, :] <= np.arange(start, end)[:, None]
        logits_BxHxLxM = jnp.where(seen_LxM[None, None], logits_BxHxLxM, -1e30)
        exp_BxHxLxM = jnp.exp(logits_BxHxLxM - jnp.max(logits_BxHxLxM, axis=-1, keepdims=True))
        weights_BxHxLxM = (exp_BxHxLxM * (1 / jnp.sum(exp_BxHxLxM, axis=-1, keepdims=True))).astype(dtype)
        ys.append(_multiply("bhlm,bhmk->bhlk", weights_BxHxLxM, v_BxHxLxK[:, :, :end]).astype(given))
        kept.append(weights_BxHxLxM)
    y_BxHxLxK = jnp.concatenate(ys, axis=2)
    return y_BxHxLxK, (q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, y_BxHxLxK, kept)


def _blocked_bwd(scale, dtype, residuals, dy_BxHxLxK):
    q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, y_BxHxLxK, kept = residuals
    length, given = q_BxHxLxK.shape[2], y_BxHxLxK.dtype
    along_BxHxLx1 = jnp.sum(dy_BxHxLxK.astype(jnp.float32) * y_BxHxLxK.astype(jnp.float32), axis=-1, keepdims=True)
    dy_BxHxLxK, dqs, dks, dvs = dy_BxHxLxK.astype(dtype), [], [], []
    for (start, end), weights_BxHxLxM in zip(_ends(length), kept, strict=True):
        q, dy, along = (x[:, :, start:end] for x in (q_BxHxLxK, dy_BxHxLxK, along_BxHxLx1))
        dweights_BxHxLxM = _multiply("bhlk,bhmk->bhlm", dy, v_BxHxLxK[:, :, :end])
        dlogits_BxHxLxM = (weights_BxHxLxM.astype(jnp.float32) * ((dweights_BxHxLxM - along) * scale)).astype(dtype)
        dqs.append(_multiply("bhlm,bhmk->bhlk", dlogits_BxHxLxM, k_BxHxLxK[:, :, :end]))
        ahead = (0, 0), (0, 0), (0, length - end), (0, 0)
        dks.append(jnp.pad(_multiply("bhml,bhlk->bhmk", _turned(dlogits_BxHxLxM), q), ahead))
        dvs.append(jnp.pad(_multiply("bhml,bhlk->bhmk", _turned(weights_BxHxLxM), dy), ahead))
    dk_BxHxLxK, dv_BxHxLxK = (sum(parts).astype(given) for parts in (dks, dvs))
    return jnp.concatenate(dqs, axis=2).astype(given), dk_BxHxLxK, dv_BxHxLxK


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
