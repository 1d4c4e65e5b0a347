"""A batch that lies across devices, in contiguous pieces: each device sums over its own sequences, then the devices' sums are added."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def total_at_once(x_DxIxO: Array) -> Array:
    """The sum over the leading axis in the dtype of x; where that axis lies across devices, everyone has the whole of it."""
    return jax.lax.reduce(x_DxIxO, np.zeros((), x_DxIxO.dtype), jax.lax.add, (0,))


Products = Callable[[Array, Array, Array | None], tuple[Array, Array]]  # x_BxLxI, dy_BxLxO, metric_IxO -> C_IxO, squares_B


@dataclasses.dataclass(frozen=True)
class Shards:
    """How many there are, and how sums over them are carried out. Those of `scaling_jax.mesh.shards_of` know the mesh.

    Attributes:
      count: of the shards; divides the batch.
      total: [shards, I, O] -> [I, O], in the dtype that it is given. One that knows the mesh leaves to each device only what it keeps.
      run: `run(products, x, dy, metric)` runs products on every device's own sequences, and on its part of I and O where matrices are
        divided, and adds up. None: the shards are one more axis of the arrays, and it is the partitioner's to see what that means.
    """

    count: int = 1
    total: Callable[[Array], Array] = total_at_once
    run: Callable[[Products, Array, Array, Array | None], tuple[Array, Array]] | None = None


def as_shards(shards: int | Shards) -> Shards:
    return Shards(shards) if isinstance(shards, int) else shards


def check_shards(batch: int, shards: Shards) -> None:
    if batch % shards.count:
        raise ValueError(f"a batch of {batch} sequences cannot be divided among {shards.count} shards")


def by_shard(x_B: Array, shards: Shards) -> Array:
    """[B, …] -> [B / shards, shards, …], where axis 1 lies across the devices as B did."""
    return x_B.reshape(shards.count, -1, *x_B.shape[1:]).swapaxes(0, 1)


def over_shards(x_DxIxO: Array, shards: Shards, dtype: jnp.dtype) -> Array:
    """The sum over the shards, float32. What devices exchange is in `dtype`, as it is of a gradient that autodiff makes."""
    return x_DxIxO[0] if shards.count == 1 else shards.total(x_DxIxO.astype(dtype)).astype(jnp.float32)
