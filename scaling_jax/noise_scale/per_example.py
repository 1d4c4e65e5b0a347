"""Layers whose backward pass also yields every sequence's squared gradient norm.

For y = x·W with x[B, L, I] and upstream gradient dy[B, L, O], sequence b contributes C_b = x_bᵀ·dy_b to dW = Σ_b C_b. Taking
that sum one sequence at a time costs the same multiplications as taking it at once, and ‖C_b‖² falls out on the way. So each
layer takes one more argument, `probe_B`, which the forward pass ignores and whose cotangent the backward rule defines as
‖C_b‖². Layers that share a probe add up in it, because reverse mode sums cotangents: through scans over layers, remat,
accumulation and any sharding,

    grads, sq_norms_B = jax.grad(loss, argnums=(0, 1))(params, jnp.zeros(B))

gives the gradient and every sequence's squared gradient norm together. Slices of a probe [B, groups] give the same per group.

The contributions are those of the loss as it is written: under a mean over B sequences each C_b carries 1/B, and the squared
norm of sequence b's own gradient is B²·‖C_b‖².

A parameter may be used once per pass (the pair `embed_tied`, `unembed_tied` counts as one use and handles its cross term):
squared norms of several uses do not add up to the squared norm of their sum.

`shards` is the number of devices over which the batch is sharded, in contiguous pieces: the sum then runs over each device's
own sequences at the same time. It changes the order of the sum and nothing else.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def dense(x_BxLxI: Array, w_IxO: Array, probe_B: Array | None = None, *, shards: int = 1, out_dtype: jnp.dtype | None = None) -> Array:
    """y = x·W, computed in the dtype of x; with a probe the gradient of W is summed in float32.

    Without one it is what autodiff makes of it: summed in float32 and rounded to the dtype of x.

    Args:
      x_BxLxI: inputs.
      w_IxO: weights, float32; cast to the dtype of x for the product.
      probe_B: float32 zeros, or None for the plain layer (which then also has forward-mode and second derivatives).
      shards: devices that shard the batch; divides B.
      out_dtype: of y; default that of x. Logits are wanted in float32.

    Returns:
      y_BxLxO. The cotangent of probe_B is ‖x_bᵀ·dy_b‖².
    """
    if probe_B is None:
        return _product(x_BxLxI, w_IxO.astype(x_BxLxI.dtype), shards, out_dtype)
    _check_shards(x_BxLxI.shape[0], shards)
    return _dense(shards, out_dtype, x_BxLxI, w_IxO, probe_B)


def dense_many(x_BxLxI: Array, ws_IxO: Sequence[Array], probe_B: Array | None = None, *, shards: int = 1, joined: bool) -> list[Array]:
    """[dense(x, w, probe) for each w], as one wide product if `joined`: fewer and larger products, which pays on one device.

    Where the output dimension is sharded, leave `joined` off: joining would move the shards.
    """
    if not joined:
        return [dense(x_BxLxI, w_IxO, probe_B, shards=shards) for w_IxO in ws_IxO]
    y_BxLxO = dense(x_BxLxI, jnp.concatenate(ws_IxO, axis=1), probe_B, shards=shards)
    ends = list(itertools.accumulate(w_IxO.shape[1] for w_IxO in ws_IxO))
    return jnp.split(y_BxLxO, ends[:-1], axis=2)


def _product(x_BxLxI: Array, w_IxO: Array, shards: int, out_dtype: jnp.dtype | None = None) -> Array:
    """x·W. Where nothing is sharded B and L are one axis, since XLA's CPU backend is slow at the gradient of the other form."""
    if shards > 1:
        return jnp.einsum("bli,io->blo", x_BxLxI, w_IxO, preferred_element_type=out_dtype)
    y_MxO = jnp.matmul(x_BxLxI.reshape(-1, x_BxLxI.shape[2]), w_IxO, preferred_element_type=out_dtype)
    return y_MxO.reshape(*x_BxLxI.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(shards, out_dtype, x_BxLxI, w_IxO, probe_B):
    return _product(x_BxLxI, w_IxO.astype(x_BxLxI.dtype), shards, out_dtype)


def _dense_fwd(shards, out_dtype, x_BxLxI, w_IxO, probe_B):
    return _dense(shards, out_dtype, x_BxLxI, w_IxO, probe_B), (x_BxLxI, w_IxO)


def _dense_bwd(shards, out_dtype, residuals, dy_BxLxO):
    x_BxLxI, w_IxO = residuals
    dy_BxLxO = dy_BxLxO.astype(x_BxLxI.dtype)
    dx_BxLxI = _product(dy_BxLxO, w_IxO.T.astype(x_BxLxI.dtype), shards)
    dw_IxO, sq_norms_B = _sum_of_products(x_BxLxI, dy_BxLxO, shards)
    return dx_BxLxI, dw_IxO.astype(w_IxO.dtype), sq_norms_B


_dense.defvjp(_dense_fwd, _dense_bwd)


def _sum_of_products(x_BxLxI: Array, dy_BxLxO: Array, shards: int) -> tuple[Array, Array]:
    """Σ_b x_bᵀ·dy_b and ‖x_bᵀ·dy_b‖², float32, summed one sequence of each shard at a time."""
    if shards == 1:  # XLA's CPU backend is faster at products of two dimensions than of three

        def add_one(total_IxO, x_and_dy):
            product_IxO = jnp.einsum("li,lo->io", *x_and_dy, preferred_element_type=jnp.float32)
            return total_IxO + product_IxO, jnp.sum(jnp.square(product_IxO))

        zeros_IxO = jnp.zeros((x_BxLxI.shape[2], dy_BxLxO.shape[2]), jnp.float32)
        return jax.lax.scan(add_one, zeros_IxO, (x_BxLxI, dy_BxLxO))

    x_NxDxLxI, dy_NxDxLxO = _by_shard(x_BxLxI, shards), _by_shard(dy_BxLxO, shards)

    def add(total_DxIxO, x_and_dy):
        product_DxIxO = jnp.einsum("dli,dlo->dio", *x_and_dy, preferred_element_type=jnp.float32)
        return total_DxIxO + product_DxIxO, jnp.sum(jnp.square(product_DxIxO), axis=(1, 2))

    zeros_DxIxO = jnp.zeros((shards, x_BxLxI.shape[2], dy_BxLxO.shape[2]), jnp.float32)
    total_DxIxO, sq_norms_NxD = jax.lax.scan(add, zeros_DxIxO, (x_NxDxLxI, dy_NxDxLxO))
    return total_DxIxO.sum(0), sq_norms_NxD.T.reshape(-1)


def _by_shard(x_B: Array, shards: int) -> Array:
    """[B, …] -> [B / shards, shards, …], where axis 1 lies across the devices as B did."""
    return x_B.reshape(shards, -1, *x_B.shape[1:]).swapaxes(0, 1)


def _check_shards(batch: int, shards: int) -> None:
    if batch % shards:
        raise ValueError(f"a batch of {batch} sequences cannot be divided among {shards} shards")


def scale(x_BxLxD: Array, gain_D: Array, probe_B: Array | None = None) -> Array:
    """y = x·gain, elementwise. The cotangent of probe_B is ‖Σ_l dy_bl·x_bl‖²: summed over positions first, then squared."""
    if probe_B is None:
        return x_BxLxD * gain_D.astype(x_BxLxD.dtype)[None, None]
    return _scale(x_BxLxD, gain_D, probe_B)


@jax.custom_vjp
def _scale(x_BxLxD: Array, gain_D: Array, probe_B: Array) -> Array:
    return x_BxLxD * gain_D.astype(x_BxLxD.dtype)[None, None]


def _scale_fwd(x_BxLxD, gain_D, probe_B):
    return _scale(x_BxLxD, gain_D, probe_B), (x_BxLxD, gain_D)


def _scale_bwd(residuals, dy_BxLxD):
    x_BxLxD, gain_D = residuals
    product_BxD = jnp.sum(dy_BxLxD.astype(jnp.float32) * x_BxLxD.astype(jnp.float32), axis=1)
    return dy_BxLxD * gain_D.astype(dy_BxLxD.dtype)[None, None], product_BxD.sum(0).astype(gain_D.dtype), jnp.sum(product_BxD**2, axis=1)


_scale.defvjp(_scale_fwd, _scale_bwd)


def bias(x_BxLxD: Array, bias_D: Array, probe_B: Array | None = None) -> Array:
    """y = x + bias. The cotangent of probe_B is ‖Σ_l dy_bl‖²."""
    if probe_B is None:
        return x_BxLxD + bias_D.astype(x_BxLxD.dtype)[None, None]
    return _bias(x_BxLxD, bias_D, probe_B)


@jax.custom_vjp
def _bias(x_BxLxD: Array, bias_D: Array, probe_B: Array) -> Array:
    return x_BxLxD + bias_D.astype(x_BxLxD.dtype)[None, None]


def _bias_fwd(x_BxLxD, bias_D, probe_B):
    return _bias(x_BxLxD, bias_D, probe_B), bias_D


def _bias_bwd(bias_D, dy_BxLxD):
    sum_BxD = jnp.sum(dy_BxLxD.astype(jnp.float32), axis=1)
    return dy_BxLxD, sum_BxD.sum(0).astype(bias_D.dtype), jnp.sum(sum_BxD**2, axis=1)


_bias.defvjp(_bias_fwd, _bias_bwd)


def embed(table_VxD: Array, tokens_BxL: Array, probe_B: Array | None = None, *, dtype: jnp.dtype = jnp.float32) -> Array:
    """Rows of the table, in `dtype`; their gradient is summed in float32.

    The cotangent of probe_B is Σ_{l,m} [token_l = token_m]·(dx_l·dx_m), the squared norm of the per-sequence scatter-add
    without its [V, D] array.
    """
    if probe_B is None:
        return jnp.take(table_VxD, tokens_BxL, axis=0).astype(dtype)
    return embed_tied(table_VxD, tokens_BxL, probe_B, dtype=dtype)[0]


def embed_tied(table_VxD: Array, tokens_BxL: Array, probe_B: Array, *, dtype: jnp.dtype = jnp.float32) -> tuple[Array, Array]:
    """The embedding of a tied pair: rows of the table, and an all-zero carrier to hand to `unembed_tied`.

    Both uses of the table contribute to one gradient, so the squared norm has a cross term 2·Σ_l dx_l·u_l, with
    u_l = Σ_m dlogits[m, token_l]·h_m. The carrier brings u_l back: it is what `unembed_tied` returns as its cotangent.

    Returns:
      x_BxLxD, carrier_BxLxD (float32 zeros).
    """
    return _embed(dtype, table_VxD, tokens_BxL, probe_B)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(dtype, table_VxD, tokens_BxL, probe_B):
    x_BxLxD = jnp.take(table_VxD, tokens_BxL, axis=0).astype(dtype)
    return x_BxLxD, jnp.zeros(x_BxLxD.shape, jnp.float32)


def _embed_fwd(dtype, table_VxD, tokens_BxL, probe_B):
    return _embed(dtype, table_VxD, tokens_BxL, probe_B), (table_VxD, tokens_BxL)


def _embed_bwd(dtype, residuals, cotangents):
    table_VxD, tokens_BxL = residuals
    dx_BxLxD, u_BxLxD = (c.astype(jnp.float32) for c in cotangents)
    dtable_VxD = jnp.zeros(table_VxD.shape, jnp.float32).at[tokens_BxL].add(dx_BxLxD)
    same_BxLxL = tokens_BxL[:, :, None] == tokens_BxL[:, None, :]
    gram_BxLxL = jnp.einsum("bld,bmd->blm", dx_BxLxD, dx_BxLxD)
    sq_norms_B = jnp.sum(jnp.where(same_BxLxL, gram_BxLxL, 0.0), axis=(1, 2)) + 2 * jnp.sum(dx_BxLxD * u_BxLxD, axis=(1, 2))
    return dtable_VxD.astype(table_VxD.dtype), None, sq_norms_B


_embed.defvjp(_embed_fwd, _embed_bwd)


def unembed_tied(h_BxLxD: Array, table_VxD: Array, tokens_BxL: Array, carrier_BxLxD: Array, probe_B: Array, *, shards: int = 1) -> Array:
    """Logits h·tableᵀ of a tied pair.

    Args:
      h_BxLxD: final hidden states.
      table_VxD: the table that `embed_tied` read, float32.
      tokens_BxL: the tokens that it read.
      carrier_BxLxD: the carrier that it returned.
      probe_B: the same probe.
      shards: devices that shard the batch; divides B.

    Returns:
      logits_BxLxV, float32.
    """
    _check_shards(h_BxLxD.shape[0], shards)
    return _unembed_tied(shards, h_BxLxD, table_VxD, tokens_BxL, carrier_BxLxD, probe_B)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unembed_tied(shards, h_BxLxD, table_VxD, tokens_BxL, carrier_BxLxD, probe_B):
    return _product(h_BxLxD, table_VxD.T.astype(h_BxLxD.dtype), shards, jnp.float32)


def _unembed_tied_fwd(shards, h_BxLxD, table_VxD, tokens_BxL, carrier_BxLxD, probe_B):
    return _unembed_tied(shards, h_BxLxD, table_VxD, tokens_BxL, carrier_BxLxD, probe_B), (h_BxLxD, table_VxD, tokens_BxL)


def _unembed_tied_bwd(shards, residuals, dlogits_BxLxV):
    h_BxLxD, table_VxD, tokens_BxL = residuals
    dlogits_BxLxV = dlogits_BxLxV.astype(h_BxLxD.dtype)
    dh_BxLxD = _product(dlogits_BxLxV, table_VxD.astype(h_BxLxD.dtype), shards)
    dtable_DxV, sq_norms_B = _sum_of_products(h_BxLxD, dlogits_BxLxV, shards)
    read_BxMxL = jnp.take_along_axis(dlogits_BxLxV, tokens_BxL[:, None, :], axis=2)
    u_BxLxD = jnp.einsum("bml,bmd->bld", read_BxMxL, h_BxLxD, preferred_element_type=jnp.float32)
    return dh_BxLxD, dtable_DxV.T.astype(table_VxD.dtype), None, u_BxLxD, sq_norms_B


_unembed_tied.defvjp(_unembed_tied_fwd, _unembed_tied_bwd)
