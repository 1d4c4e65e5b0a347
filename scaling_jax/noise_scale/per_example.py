"""Layers whose backward pass also yields every sequence's squared gradient norm.

For y = x·W with x[B, L, I] and upstream gradient dy[B, L, O], sequence b contributes C_b = x_bᵀ·dy_b to dW = Σ_b C_b. Taking
that sum one sequence at a time costs the same multiplications as taking it at once, and ‖C_b‖² falls out on the way. So each
layer takes one more argument, `probe_B`, which the forward pass ignores and whose cotangent the backward rule defines as
‖C_b‖². Layers that share a probe add up in it, because reverse mode sums cotangents: through scans over layers, remat,
accumulation and any sharding,

    grads, sq_norms_B = jax.grad(loss, argnums=(0, 1))(params, jnp.zeros(B))

gives the gradient and every sequence's squared gradient norm together. A probe for each group of layers gives the same per group.

With a `metric`, an array P like the parameter, the probe is [B, 2]: the second column's cotangent is Σ P·C_b², the squared norm in
that metric. With an optimizer's own P, from its moments before this batch, that is what tr(PΣ)/(GᵀPG) needs. P is not differentiated.

The contributions are those of the loss as it is written: under a mean over B sequences each C_b carries 1/B, and the squared
norm of sequence b's own gradient is B²·‖C_b‖².

A parameter may be used once per pass (the pair `embed_tied`, `unembed_tied` counts as one use and handles its cross term):
squared norms of several uses do not add up to the squared norm of their sum.

`shards` is the number of devices over which the batch is sharded, in contiguous pieces: the sum then runs over each device's
own sequences at the same time. It changes the order of the sum and nothing else. `Shards` says as well how the devices' sums are added.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from scaling_jax.noise_scale.products import Dtypes, input_gradient, product
from scaling_jax.noise_scale.sequence_sums import squares, sum_of_products
from scaling_jax.noise_scale.shards import Shards, as_shards, by_shard, check_shards


def dense(
    x_BxLxI: Array,
    w_IxO: Array,
    probe_B: Array | None = None,
    metric_IxO: Array | None = None,
    *,
    shards: int | Shards = 1,
    dtype: jnp.dtype | None = None,
    out_dtype: jnp.dtype | None = None,
) -> Array:
    """y = x·W of operands in `dtype`; with a probe the gradient of W is summed in float32.

    Without one it is what autodiff makes of it: summed in float32 and rounded to `dtype`.

    Args:
      x_BxLxI: inputs.
      w_IxO: weights, float32.
      probe_B: float32 zeros, or None for the plain layer (which in float32 also has forward-mode and second derivatives).
      metric_IxO: P, not negative, of any float dtype; the probe is then [B, 2].
      shards: devices that shard the batch; divides B.
      dtype: that x, W and dy are cast to for the products; default that of x.
      out_dtype: of y; default that of x. Logits are wanted in float32.

    Returns:
      y_BxLxO. The cotangent of probe_B is ‖x_bᵀ·dy_b‖².
    """
    return _plain_or_probed(x_BxLxI, w_IxO, probe_B, None if metric_IxO is None else (metric_IxO,), shards, dtype, out_dtype)


def dense_many(
    x_BxLxI: Array,
    ws_IxO: Sequence[Array],
    probe_B: Array | None = None,
    metrics_IxO: Sequence[Array] | None = None,
    *,
    shards: int | Shards = 1,
    dtype: jnp.dtype | None = None,
    joined: bool,
) -> list[Array]:
    """[dense(x, w, probe) for each w], as one wide product if `joined`: fewer and larger products, which pays on one device.

    Where the output dimension is sharded, leave `joined` off: joining would move the shards.
    """
    if not joined or len(ws_IxO) == 1:
        metrics_IxO = metrics_IxO or [None] * len(ws_IxO)
        return [dense(x_BxLxI, w_IxO, probe_B, p_IxO, shards=shards, dtype=dtype) for w_IxO, p_IxO in zip(ws_IxO, metrics_IxO, strict=True)]
    metrics_IxO = None if metrics_IxO is None else tuple(metrics_IxO)  # joined in the backward pass: the forward would keep them twice
    y_BxLxO = _plain_or_probed(x_BxLxI, jnp.concatenate(ws_IxO, axis=1), probe_B, metrics_IxO, shards, dtype, None)
    ends = list(itertools.accumulate(w_IxO.shape[1] for w_IxO in ws_IxO))
    return jnp.split(y_BxLxO, ends[:-1], axis=2)


def _plain_or_probed(x_BxLxI, w_IxO, probe_B, metrics_IxO, shards, dtype, out_dtype):
    shards, dtypes = as_shards(shards), Dtypes.of(x_BxLxI, dtype, out_dtype)
    if probe_B is None:
        return product(x_BxLxI, w_IxO, shards, dtypes)
    check_shards(x_BxLxI.shape[0], shards)
    _check_probe(probe_B, metrics_IxO)
    return _dense(shards, dtypes, x_BxLxI, w_IxO, probe_B, metrics_IxO)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(shards, dtypes, x_BxLxI, w_IxO, probe_B, metrics_IxO):
    return product(x_BxLxI, w_IxO, shards, dtypes)


def _dense_fwd(shards, dtypes, x_BxLxI, w_IxO, probe_B, metrics_IxO):
    return _dense(shards, dtypes, x_BxLxI, w_IxO, probe_B, metrics_IxO), (x_BxLxI.astype(dtypes.operands), w_IxO, metrics_IxO)


def _dense_bwd(shards, dtypes, residuals, dy_BxLxO):
    x_BxLxI, w_IxO, metrics_IxO = residuals
    metric_IxO = None if metrics_IxO is None else jnp.concatenate(metrics_IxO, axis=1)
    dy_BxLxO = dy_BxLxO.astype(dtypes.operands)
    dx_BxLxI = input_gradient(dy_BxLxO, w_IxO, shards, dtypes.x)
    dw_IxO, sq_norms_B = sum_of_products(x_BxLxI, dy_BxLxO, metric_IxO, shards=shards)
    return dx_BxLxI, dw_IxO.astype(w_IxO.dtype), sq_norms_B, None


_dense.defvjp(_dense_fwd, _dense_bwd)


def _check_probe(probe_B: Array, metric: Any) -> None:
    wanted = probe_B.shape[:1] if metric is None else (*probe_B.shape[:1], 2)
    if probe_B.shape != wanted:
        raise ValueError(f"a probe of shape {probe_B.shape}: must be {wanted}, one column, or two columns with a metric")


def scale(x_BxLxD: Array, gain_D: Array, probe_B: Array | None = None, metric_D: Array | None = None) -> Array:
    """y = x·gain, elementwise. The cotangent of probe_B is ‖Σ_l dy_bl·x_bl‖²: summed over positions first, then squared."""
    if probe_B is None:
        return x_BxLxD * gain_D.astype(x_BxLxD.dtype)[None, None]
    _check_probe(probe_B, metric_D)
    return _scale(x_BxLxD, gain_D, probe_B, metric_D)


@jax.custom_vjp
def _scale(x_BxLxD, gain_D, probe_B, metric_D):
    return x_BxLxD * gain_D.astype(x_BxLxD.dtype)[None, None]


def _scale_fwd(x_BxLxD, gain_D, probe_B, metric_D):
    return _scale(x_BxLxD, gain_D, probe_B, metric_D), (x_BxLxD, gain_D, metric_D)


def _scale_bwd(residuals, dy_BxLxD):
    x_BxLxD, gain_D, metric_D = residuals
    product_BxD = jnp.sum(dy_BxLxD.astype(jnp.float32) * x_BxLxD.astype(jnp.float32), axis=1)
    sq_norms_B = jax.vmap(squares, in_axes=(0, None))(product_BxD, metric_D)
    return dy_BxLxD * gain_D.astype(dy_BxLxD.dtype)[None, None], product_BxD.sum(0).astype(gain_D.dtype), sq_norms_B, None


_scale.defvjp(_scale_fwd, _scale_bwd)


def bias(x_BxLxD: Array, bias_D: Array, probe_B: Array | None = None, metric_D: Array | None = None) -> Array:
    """y = x + bias. The cotangent of probe_B is ‖Σ_l dy_bl‖²."""
    if probe_B is None:
        return x_BxLxD + bias_D.astype(x_BxLxD.dtype)[None, None]
    _check_probe(probe_B, metric_D)
    return _bias(x_BxLxD, bias_D, probe_B, metric_D)


@jax.custom_vjp
def _bias(x_BxLxD, bias_D, probe_B, metric_D):
    return x_BxLxD + bias_D.astype(x_BxLxD.dtype)[None, None]


def _bias_fwd(x_BxLxD, bias_D, probe_B, metric_D):
    return _bias(x_BxLxD, bias_D, probe_B, metric_D), (bias_D, metric_D)


def _bias_bwd(residuals, dy_BxLxD):
    bias_D, metric_D = residuals
    sum_BxD = jnp.sum(dy_BxLxD.astype(jnp.float32), axis=1)
    sq_norms_B = jax.vmap(squares, in_axes=(0, None))(sum_BxD, metric_D)
    return dy_BxLxD, sum_BxD.sum(0).astype(bias_D.dtype), sq_norms_B, None


_bias.defvjp(_bias_fwd, _bias_bwd)


LookUp = Callable[[Array, Array, jnp.dtype], Array]


def rows_of(table_VxD: Array, tokens_BxL: Array, dtype: jnp.dtype) -> Array:
    """Rows of the table [B, L, D] in `dtype`."""
    return jnp.take(table_VxD, tokens_BxL, axis=0).astype(dtype)


def embed(
    table_VxD: Array,
    tokens_BxL: Array,
    probe_B: Array | None = None,
    metric_VxD: Array | None = None,
    *,
    dtype: jnp.dtype = jnp.float32,
    look_up: LookUp = rows_of,
    shards: int | Shards = 1,
) -> Array:
    """Rows of the table, in `dtype`; their gradient is summed in float32.

    The cotangent of probe_B is Σ_{l,m} [token_l = token_m]·(dx_l·dx_m), the squared norm of the per-sequence scatter-add
    without its [V, D] array. `look_up` is `rows_of`, or one that says how they get from where the table lies to where activations do.
    """
    if probe_B is None:
        return look_up(table_VxD, tokens_BxL, dtype)
    return embed_tied(table_VxD, tokens_BxL, probe_B, metric_VxD, dtype=dtype, look_up=look_up, shards=shards)[0]


def embed_tied(
    table_VxD: Array,
    tokens_BxL: Array,
    probe_B: Array,
    metric_VxD: Array | None = None,
    *,
    dtype: jnp.dtype = jnp.float32,
    look_up: LookUp = rows_of,
    shards: int | Shards = 1,
) -> tuple[Array, Array]:
    """The embedding of a tied pair: rows of the table, and an all-zero carrier to hand to `unembed_tied`.

    Both uses of the table contribute to one gradient, so the squared norm has a cross term 2·Σ_l dx_l·u_l, with
    u_l = Σ_m dlogits[m, token_l]·h_m. The carrier brings u_l back: it is what `unembed_tied` returns as its cotangent.

    Returns:
      x_BxLxD, carrier_BxLxD (zeros); both in `dtype`.
    """
    _check_probe(probe_B, metric_VxD)
    shards = as_shards(shards)
    check_shards(tokens_BxL.shape[0], shards)
    return _rows(look_up, shards, look_up(table_VxD, tokens_BxL, dtype), tokens_BxL, probe_B, metric_VxD)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(look_up, shards, x_BxLxD, tokens_BxL, probe_B, metric_VxD):
    return x_BxLxD, jnp.zeros_like(x_BxLxD)


def _rows_fwd(look_up, shards, x_BxLxD, tokens_BxL, probe_B, metric_VxD):
    return _rows(look_up, shards, x_BxLxD, tokens_BxL, probe_B, metric_VxD), (tokens_BxL, metric_VxD)


def _rows_bwd(look_up, shards, residuals, cotangents):
    tokens_BxL, metric_VxD = residuals
    metric_BxLxD = None if metric_VxD is None else look_up(metric_VxD, tokens_BxL, jnp.float32)

    def sq_norms(tokens_BxL: Array, dx_BxLxD: Array, u_BxLxD: Array, metric_BxLxD: Array | None) -> Array:
        dx_BxLxD, u_BxLxD = dx_BxLxD.astype(jnp.float32), u_BxLxD.astype(jnp.float32)
        same_BxLxL = tokens_BxL[:, :, None] == tokens_BxL[:, None, :]

        def weighed(weighed_BxLxD: Array) -> Array:  # dx, times its rows of the metric
            gram_BxLxL = jnp.einsum("bld,bmd->blm", weighed_BxLxD, dx_BxLxD)
            return jnp.sum(jnp.where(same_BxLxL, gram_BxLxL, 0.0), axis=(1, 2)) + 2 * jnp.sum(weighed_BxLxD * u_BxLxD, axis=(1, 2))

        if metric_BxLxD is None:
            return weighed(dx_BxLxD)
        return jnp.stack([weighed(dx_BxLxD), weighed(dx_BxLxD * metric_BxLxD)], axis=1)

    of = tokens_BxL, *cotangents, metric_BxLxD
    if shards.count == 1:
        return cotangents[0], None, sq_norms(*of), None
    # One sequence of each device at a time, as a gram of all would be among the largest arrays of a step.
    each_NxS = jax.lax.map(lambda one: sq_norms(*one), jax.tree.map(lambda x: by_shard(x, shards), of))
    return cotangents[0], None, each_NxS.swapaxes(0, 1).reshape(-1, *each_NxS.shape[2:]), None


_rows.defvjp(_rows_fwd, _rows_bwd)


def unembed(
    h_BxLxD: Array,
    w_DxV: Array,
    probe_B: Array | None = None,
    metric_DxV: Array | None = None,
    *,
    shards: int | Shards = 1,
    dtype: jnp.dtype | None = None,
) -> Array:
    """Logits h·W of a readout of its own, float32 whatever the dtype of h: `dense` under the name that one looks for."""
    return dense(h_BxLxD, w_DxV, probe_B, metric_DxV, shards=shards, dtype=dtype, out_dtype=jnp.float32)


def unembed_tied(
    h_BxLxD: Array,
    table_VxD: Array,
    tokens_BxL: Array,
    carrier_BxLxD: Array,
    probe_B: Array,
    metric_VxD: Array | None = None,
    *,
    shards: int | Shards = 1,
) -> Array:
    """Logits h·tableᵀ of a tied pair.

    Args:
      h_BxLxD: final hidden states.
      table_VxD: the table that `embed_tied` read, float32.
      tokens_BxL: the tokens that it read.
      carrier_BxLxD: the carrier that it returned.
      probe_B: the same probe.
      metric_VxD: the same metric.
      shards: devices that shard the batch; divides B.

    Returns:
      logits_BxLxV, float32.
    """
    shards = as_shards(shards)
    check_shards(h_BxLxD.shape[0], shards)
    _check_probe(probe_B, metric_VxD)
    return _unembed_tied(shards, h_BxLxD, table_VxD, tokens_BxL, carrier_BxLxD, probe_B, metric_VxD)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unembed_tied(shards, h_BxLxD, table_VxD, tokens_BxL, carrier_BxLxD, probe_B, metric_VxD):
    return product(h_BxLxD, table_VxD.T, shards, Dtypes.of(h_BxLxD, None, jnp.float32))


def _unembed_tied_fwd(shards, h_BxLxD, table_VxD, tokens_BxL, carrier_BxLxD, probe_B, metric_VxD):
    logits_BxLxV = _unembed_tied(shards, h_BxLxD, table_VxD, tokens_BxL, carrier_BxLxD, probe_B, metric_VxD)
    return logits_BxLxV, (h_BxLxD, table_VxD, tokens_BxL, metric_VxD)


def _unembed_tied_bwd(shards, residuals, dlogits_BxLxV):
    h_BxLxD, table_VxD, tokens_BxL, metric_VxD = residuals
    dlogits_BxLxV = dlogits_BxLxV.astype(h_BxLxD.dtype)
    dh_BxLxD = product(dlogits_BxLxV, table_VxD, shards, Dtypes.of(dlogits_BxLxV, None, None))
    metric_DxV = None if metric_VxD is None else metric_VxD.T
    dtable_DxV, sq_norms_B = sum_of_products(h_BxLxD, dlogits_BxLxV, metric_DxV, shards=shards)
    read_BxMxL = jnp.take_along_axis(dlogits_BxLxV, tokens_BxL[:, None, :], axis=2)
    u_BxLxD = jnp.einsum("bml,bmd->bld", read_BxMxL, h_BxLxD, preferred_element_type=jnp.float32)
    return dh_BxLxD, dtable_DxV.T.astype(table_VxD.dtype), None, u_BxLxD.astype(h_BxLxD.dtype), sq_norms_B, None


_unembed_tied.defvjp(_unembed_tied_fwd, _unembed_tied_bwd)
