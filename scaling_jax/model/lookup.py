"""Rows of an embedding table that lies across devices."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from scaling_jax.mesh import batch_shards, is_ours, spec
from scaling_jax.noise_scale.per_example import rows_of


def look_up(table_VxD: Array, tokens_BxL: Array, dtype: jnp.dtype) -> Array:
    """`rows_of(table, tokens, dtype)` [B, L, D], laid out as the residual stream is.

    Rows of the table lie along tensor, its columns along fsdp. Each device reads, for all sequences of its replica, its columns of the
    rows that it has. Along tensor these are added up, one device having a row and the others zeros, and the length is divided; along fsdp
    columns are exchanged for sequences. The gradient goes the same way back, into each device's own part of the table. Left to itself the
    partitioner copies the table, or its gradient, to every device.
    """
    if not is_ours():
        return rows_of(table_VxD, tokens_BxL, dtype)
    mesh, batch = jax.sharding.get_abstract_mesh(), tokens_BxL.shape[0]
    tensor = mesh.shape["tensor"]
    if batch == 1 or table_VxD.shape[0] % tensor or table_VxD.shape[1] % mesh.shape["fsdp"]:
        return rows_of(table_VxD, tokens_BxL, dtype)
    if batch % batch_shards():
        raise ValueError(f"a batch of {batch} sequences cannot be divided among {batch_shards()} devices along replica and fsdp")
    divided = tokens_BxL.shape[1] % tensor == 0

    def local(table_VxD: Array, tokens_BxL: Array) -> Array:
        at_BxL = tokens_BxL - jax.lax.axis_index("tensor") * table_VxD.shape[0]
        here_BxL = (at_BxL >= 0) & (at_BxL < table_VxD.shape[0])
        x_BxLxD = jnp.where(here_BxL[..., None], rows_of(table_VxD, jnp.where(here_BxL, at_BxL, 0), dtype), jnp.zeros((), dtype))
        if divided:
            x_BxLxD = jax.lax.psum_scatter(x_BxLxD, "tensor", scatter_dimension=1, tiled=True)
        else:
            x_BxLxD = jax.lax.psum(x_BxLxD, "tensor")
        return jax.lax.all_to_all(x_BxLxD, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    given = spec("vocab", "embed"), PartitionSpec("replica")
    yielded = spec("batch", "sequence" if divided else "length", "residual")
    return jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=yielded)(table_VxD, tokens_BxL)
