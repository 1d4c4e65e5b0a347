"""x·W and its two gradients, in the orientations in which each backend multiplies fast.

XLA's CPU backend has units for bfloat16 (AMX) at its disposal only in products that yield float32 and whose operands lie as in x·W:
elsewhere it first converts both to float32, at an eighth of the speed. So what is to be transposed is transposed in memory before.
Other backends see to that themselves.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from scaling_jax.noise_scale.shards import Shards

_TILE = 128  # rows that are transposed together


class Dtypes(NamedTuple):
    """Of a product."""

    x: jnp.dtype  # as it is given, and as its gradient is given back
    operands: jnp.dtype  # that x, W and dy are cast to
    y: jnp.dtype

    @classmethod
    def of(cls, x: Array, operands: jnp.dtype | None, y: jnp.dtype | None) -> "Dtypes":
        """Those that are not given are that of x."""
        return cls(*(jnp.dtype(dtype or x.dtype) for dtype in (None, operands, y)))


def product(x_BxLxI: Array, w_IxO: Array, shards: Shards, dtypes: Dtypes) -> Array:
    """x·W. Where nothing is sharded B and L are one axis, since XLA's CPU backend is slow at the gradient of the other form."""
    if shards.count > 1:
        x_BxLxI, w_IxO = x_BxLxI.astype(dtypes.operands), w_IxO.astype(dtypes.operands)
        return jnp.einsum("bli,io->blo", x_BxLxI, w_IxO, preferred_element_type=dtypes.y)
    x_MxI = x_BxLxI.reshape(-1, x_BxLxI.shape[2])
    y_MxO = _matmul(x_MxI, w_IxO, dtypes.y) if dtypes.operands == jnp.float32 else _matmul_16(dtypes, x_MxI, w_IxO)
    return y_MxO.reshape(*x_BxLxI.shape[:2], -1)


def input_gradient(dy_BxLxO: Array, w_IxO: Array, shards: Shards, out_dtype: jnp.dtype) -> Array:
    """dy·Wᵀ of operands in the dtype of dy. Not differentiable."""
    if shards.count > 1 or dy_BxLxO.dtype == jnp.float32:
        return product(dy_BxLxO, w_IxO.T, shards, Dtypes.of(dy_BxLxO, None, out_dtype))
    return _input_gradient(dy_BxLxO.reshape(-1, dy_BxLxO.shape[2]), w_IxO.astype(dy_BxLxO.dtype), out_dtype).reshape(
        *dy_BxLxO.shape[:2], -1
    )


def _matmul(x_MxI: Array, w_IxO: Array, out_dtype: jnp.dtype) -> Array:
    return jnp.matmul(x_MxI, w_IxO, preferred_element_type=out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_16(dtypes: Dtypes, x_MxI: Array, w_IxO: Array) -> Array:
    def on_cpu(x_MxI: Array, w_IxO: Array) -> Array:
        return _matmul(x_MxI, w_IxO, jnp.float32).astype(dtypes.y)

    x_MxI, w_IxO = x_MxI.astype(dtypes.operands), w_IxO.astype(dtypes.operands)
    return jax.lax.platform_dependent(x_MxI, w_IxO, cpu=on_cpu, default=partial(_matmul, out_dtype=dtypes.y))


def _matmul_16_fwd(dtypes, x_MxI, w_IxO):
    return _matmul_16(dtypes, x_MxI, w_IxO), (x_MxI.astype(dtypes.operands), w_IxO)


def _matmul_16_bwd(dtypes, residuals, dy_MxO):
    x_MxI, w_IxO = residuals
    dy_MxO = dy_MxO.astype(dtypes.operands)
    dw_IxO = weight_gradient(x_MxI, dy_MxO).astype(dtypes.operands).astype(w_IxO.dtype)
    return _input_gradient(dy_MxO, w_IxO.astype(dtypes.operands), dtypes.x), dw_IxO


_matmul_16.defvjp(_matmul_16_fwd, _matmul_16_bwd)


def _input_gradient(dy_MxO: Array, w_IxO: Array, out_dtype: jnp.dtype) -> Array:
    def on_cpu(dy_MxO: Array, w_IxO: Array) -> Array:
        return _matmul(dy_MxO, transposed(w_IxO), jnp.float32).astype(out_dtype)

    def elsewhere(dy_MxO: Array, w_IxO: Array) -> Array:
        return _matmul(dy_MxO, w_IxO.T, out_dtype)

    return jax.lax.platform_dependent(dy_MxO, w_IxO, cpu=on_cpu, default=elsewhere)


def weight_gradient(x_MxI: Array, dy_MxO: Array) -> Array:
    """xᵀ·dy, float32."""

    def plain(x_MxI: Array, dy_MxO: Array) -> Array:
        return _matmul(x_MxI.T, dy_MxO, jnp.float32)

    if x_MxI.dtype == jnp.float32:
        return plain(x_MxI, dy_MxO)

    def on_cpu(x_MxI: Array, dy_MxO: Array) -> Array:
        # With the barrier, as of a transpose of this product (a tied table's) XLA would make a product that its CPU backend has not.
        return jax.lax.optimization_barrier(_matmul(transposed(x_MxI), dy_MxO, jnp.float32))

    return jax.lax.platform_dependent(x_MxI, dy_MxO, cpu=on_cpu, default=plain)


def transposed(x_MxN: Array) -> Array:
    """xᵀ as an array of its own. Written with one more axis, or XLA would fold the transpose into the product that reads it."""
    tile = _TILE if x_MxN.shape[0] % _TILE == 0 else 1
    return jnp.moveaxis(x_MxN.reshape(-1, tile, x_MxN.shape[1]), 2, 0).reshape(x_MxN.shape[::-1])
