"""The device mesh, and the one table from logical axis to mesh axis.

Arrays name their logical axes; only this table knows which of them are sharded. `constrain` and `batch_shards` read the mesh
that `jax.set_mesh` has made current and do nothing without one, so the same model code runs on one device, on a pod, and inside
somebody else's program.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("replica", "fsdp", "tensor", "member")

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("replica", "fsdp"),
    "replica": "replica",
    "microbatch": None,
    "length": None,
    "residual": None,
    # parameters and the activations that they produce
    "layer": None,
    "embed": "fsdp",  # the residual dimension of a matrix
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
}


def make_mesh(replica: int = 1, fsdp: int = 1, tensor: int = 1, member: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh over the given devices (default: all), with the axes of AXES."""
    return jax.make_mesh((replica, fsdp, tensor, member), AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def spec(*logical_axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names; None is an axis that is never sharded."""
    return PartitionSpec(*(LOGICAL_AXES[axis] if axis else None for axis in logical_axes))


def sharding(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x`, told to the partitioner to lie as its logical axes say; as it is where there is no current mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if on_one_device() or set(AXES) - set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def on_one_device() -> bool:
    """Whether there is no current mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def batch_shards() -> int:
    """Number of pieces that the current mesh cuts a batch into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    shape = dict(mesh.shape)
    return shape.get("replica", 1) * shape.get("fsdp", 1)
