"""Σ_b x_bᵀ·dy_b, the gradient of a matrix, and the squared norm of every sequence's part of it."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from scaling_jax.noise_scale.products import weight_gradient
from scaling_jax.noise_scale.shards import Shards, by_shard, over_shards

_LARGEST_PRODUCT = 1 << 24  # entries of products that are held at a time: 64 MB
_CACHED_PRODUCTS = 1 << 20  # entries of products that a CPU reads again from its caches: 4 MB


def sum_of_products(x_BxLxI: Array, dy_BxLxO: Array, metric_IxO: Array | None, *, shards: Shards) -> tuple[Array, Array]:
    """C = Σ_b x_bᵀ·dy_b and the squares of each C_b, float32; of a large matrix with O ≥ I, a readout's, some rows at a time.

    Rows and not columns, as it is the columns of such a matrix that lie across devices.
    """
    if shards.run is not None:
        return shards.run(partial(_by_rows, shards=Shards()), x_BxLxI, dy_BxLxO, metric_IxO)
    if shards.count > 1:
        return _by_rows(x_BxLxI, dy_BxLxO, metric_IxO, shards=shards)
    elsewhere = partial(_by_rows, shards=shards)
    return jax.lax.platform_dependent(x_BxLxI, dy_BxLxO, metric_IxO, cpu=_on_cpu, default=elsewhere)


def _by_rows(x_BxLxI: Array, dy_BxLxO: Array, metric_IxO: Array | None, *, shards: Shards) -> tuple[Array, Array]:
    (_, length, rows), columns = x_BxLxI.shape, dy_BxLxO.shape[2]
    fitting = (n for n in range(1, rows + 1) if rows % n == 0 and rows // n * columns <= _LARGEST_PRODUCT)
    tiles = next(fitting, 1) if columns >= rows else 1
    if tiles == 1:
        product_DxIxO, sq_norms_B = _by_sequence(x_BxLxI, dy_BxLxO, shards, metric_IxO)
        return over_shards(product_DxIxO, shards, x_BxLxI.dtype), sq_norms_B
    x_TxBxLxI = jnp.moveaxis(x_BxLxI.reshape(-1, length, tiles, rows // tiles), 2, 0)
    metric_TxIxO = None if metric_IxO is None else metric_IxO.reshape(tiles, -1, columns)

    def add(sq_norms_B, tile):
        product_DxIxO, more_B = _by_sequence(tile[0], dy_BxLxO, shards, tile[1])
        return sq_norms_B + more_B, product_DxIxO

    zeros_B = jnp.zeros(x_BxLxI.shape[:1] + (() if metric_IxO is None else (2,)), jnp.float32)
    sq_norms_B, products_TxDxIxO = jax.lax.scan(add, zeros_B, (x_TxBxLxI, metric_TxIxO))
    products_DxIxO = products_TxDxIxO.swapaxes(0, 1).reshape(shards.count, rows, columns)
    return over_shards(products_DxIxO, shards, x_BxLxI.dtype), sq_norms_B


def _by_sequence(x_BxLxI: Array, dy_BxLxO: Array, shards: Shards, metric_IxO: Array | None) -> tuple[Array, Array]:
    """The same, one sequence of each shard at a time; C is that of each shard, [shards, I, O]."""
    if shards.count == 1:  # XLA's CPU backend is faster at products of two dimensions than of three

        def add_one(total_IxO, x_and_dy):
            product_IxO = jnp.einsum("li,lo->io", *x_and_dy, preferred_element_type=jnp.float32)
            return total_IxO + product_IxO, squares(product_IxO, metric_IxO)

        zeros_IxO = jnp.zeros((x_BxLxI.shape[2], dy_BxLxO.shape[2]), jnp.float32)
        total_IxO, sq_norms_B = jax.lax.scan(add_one, zeros_IxO, (x_BxLxI, dy_BxLxO))
        return total_IxO[None], sq_norms_B

    x_NxDxLxI, dy_NxDxLxO = by_shard(x_BxLxI, shards), by_shard(dy_BxLxO, shards)

    def add(total_DxIxO, x_and_dy):
        product_DxIxO = jnp.einsum("dli,dlo->dio", *x_and_dy, preferred_element_type=jnp.float32)
        return total_DxIxO + product_DxIxO, jax.vmap(squares, in_axes=(0, None))(product_DxIxO, metric_IxO)

    zeros_DxIxO = jnp.zeros((shards.count, x_BxLxI.shape[2], dy_BxLxO.shape[2]), jnp.float32)
    total_DxIxO, sq_norms_NxD = jax.lax.scan(add, zeros_DxIxO, (x_NxDxLxI, dy_NxDxLxO))
    return total_DxIxO, sq_norms_NxD.swapaxes(0, 1).reshape(-1, *sq_norms_NxD.shape[2:])


def _on_cpu(x_BxLxI: Array, dy_BxLxO: Array, metric_IxO: Array | None) -> tuple[Array, Array]:
    """On a CPU, where reading and writing products takes as long as making them.

    In 16 bits, whose products are the fastest, the gradient is one product, and ‖C_b‖² = Σ_{l,m} (x_l·x_m)(dy_l·dy_m) comes from two
    small ones. Else some sequences at a time: the sum is read and written once for all of them, while their products are in the caches.
    """
    (batch, length, rows), columns = x_BxLxI.shape, dy_BxLxO.shape[2]
    if x_BxLxI.dtype != jnp.float32 and metric_IxO is None and length * (rows + columns) <= 6 * rows * columns:
        total_IxO = weight_gradient(x_BxLxI.reshape(-1, rows), dy_BxLxO.reshape(-1, columns))
        gram_x, gram_dy = (jnp.einsum("bli,bmi->blm", a, a, preferred_element_type=jnp.float32) for a in (x_BxLxI, dy_BxLxO))
        return total_IxO, jnp.sum(gram_x * gram_dy, axis=(1, 2))
    parts = [n for n in range(1, batch) if batch % n == 0]
    together = max((n for n in parts if n <= 2 or n * rows * columns <= _CACHED_PRODUCTS), default=1)
    if together * rows * columns > _LARGEST_PRODUCT:
        together = 1
    if rows > columns and together > 1:  # a wide product is made faster than a tall one
        total_OxI, sq_norms_B = _on_cpu(dy_BxLxO, x_BxLxI, None if metric_IxO is None else metric_IxO.T)
        return total_OxI.T, sq_norms_B
    if together == 1:
        return _by_rows(x_BxLxI, dy_BxLxO, metric_IxO, shards=Shards())

    def add(total_IxO, x_and_dy):
        product_NxIxO = jnp.einsum("nli,nlo->nio", *x_and_dy, preferred_element_type=jnp.float32)
        # Added one by one, and not by a sum over the axis, which XLA's CPU backend takes four times as long for.
        return sum(product_NxIxO, start=total_IxO), jax.vmap(squares, in_axes=(0, None))(product_NxIxO, metric_IxO)

    # In two parts at least: what a loop yields is written down, and not added up anew by each of its readers.
    zeros_IxO = jnp.zeros((rows, columns), jnp.float32)
    by_part = tuple(a.reshape(-1, together, *a.shape[1:]) for a in (x_BxLxI, dy_BxLxO))
    total_IxO, sq_norms_PxN = jax.lax.scan(add, zeros_IxO, by_part)
    return total_IxO, sq_norms_PxN.reshape(batch, *sq_norms_PxN.shape[2:])


def squares(product: Array, metric: Array | None) -> Array:
    """Σ C² of one sequence; with a metric [Σ C², Σ P·C²]."""
    square = jnp.sum(jnp.square(product))
    # Not the square times P: XLA's CPU backend would write it down for both sums.
    return square if metric is None else jnp.stack([square, jnp.sum(product * (product * metric.astype(jnp.float32)))])
