"""The device mesh, and the one table from logical axis to mesh axis.

Arrays name their logical axes; only this table knows which of them are sharded. `constrain` and `batch_shards` read the mesh
that `jax.set_mesh` has made current and do nothing without one, or on one with other axes, so the same model code runs on one device, on
a pod, and inside somebody else's program (whose mesh has Auto axes).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scaling_jax.errors import UserError
from scaling_jax.noise_scale import Shards
from scaling_jax.noise_scale.shards import Products

Axes = tuple[str | None, ...]  # logical

AXES = ("replica", "fsdp", "tensor", "member")

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("replica", "fsdp"),
    "replica": "replica",
    "microbatch": None,
    "length": None,
    "sequence": "tensor",  # the length, where the residual stream is between two blocks' products
    "residual": None,
    # parameters and the activations that they produce
    "layer": None,
    "embed": "fsdp",  # the residual dimension of a matrix
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
}


def make_mesh(replica: int = 1, fsdp: int = 1, tensor: int = 1, member: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the given devices (default: all), with the axes of AXES.

    On TPUs every axis lies along the torus as well as it can, and slices, which only the data-centre network joins, lie along `replica`.

    Raises:
      UserError: `replica` is no multiple of the number of slices.
    """
    shape = (replica, fsdp, tensor, member)
    devices = jax.devices() if devices is None else list(devices)
    if devices[0].platform != "tpu" or len(devices) == 1:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if replica % slices:
        raise UserError(f"config.mesh.replica is {replica}: must be a multiple of the {slices} slices, which lie along it")
    if slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within, across = (replica // slices, *shape[1:]), (slices, 1, 1, 1)
        array = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 4)


def spec(*logical_axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names; None is an axis that is never sharded."""
    return PartitionSpec(*(LOGICAL_AXES[axis] if axis else None for axis in logical_axes))


def sharding(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x`, told to the partitioner to lie as its logical axes say; as it is where there is no current mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if not is_ours():
        return x
    # A length that cannot be divided, as in the evaluation of odd contexts, is not.
    axes = [None if axis == "sequence" and size % mesh.shape["tensor"] else axis for axis, size in zip(logical_axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def constrain_both_ways(x: jax.Array, forward: Axes, backward: Axes) -> jax.Array:
    """`x` told to lie as `forward` says, and its cotangent as `backward` says.

    Where an array is gathered for a product, its cotangent is a sum over devices of which each needs a part, and the other way
    round: `constrain` would have both gathered.
    """
    return _constrain_both_ways(forward, backward, x) if is_ours() else x


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _constrain_both_ways(forward: Axes, backward: Axes, x: jax.Array) -> jax.Array:
    return constrain(x, *forward)


_constrain_both_ways.defvjp(
    lambda forward, backward, x: (constrain(x, *forward), None),
    lambda forward, backward, _, cotangent: (constrain(cotangent, *backward),),
)


def on_one_device() -> bool:
    """Whether there is no current mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def is_ours() -> bool:
    """Whether there is a current mesh of several devices, with the axes of AXES."""
    return not on_one_device() and set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)


def batch_shards() -> int:
    """Number of pieces that the current mesh cuts a batch into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    shape = dict(mesh.shape)
    return shape.get("replica", 1) * shape.get("fsdp", 1)


def shards_of(*logical_axes: str | None) -> Shards:
    """The pieces of a batch on the current mesh, for the gradient of a matrix whose dimensions have these logical names.

    Each device multiplies its own sequences by its own rows or columns along tensor. Devices along fsdp exchange the parts of a sum that
    each keeps; then replicas add up their parts. It is said outright, because the partitioner, left to itself, gives every device the
    whole sum first.
    """
    shards, mesh = batch_shards(), jax.sharding.get_abstract_mesh()
    if not is_ours():
        return Shards(shards)
    kept, batch = spec(*logical_axes), LOGICAL_AXES["batch"]
    whole = tuple(None if axis == "fsdp" else axis for axis in kept)  # what a device multiplies by

    def add_up(x_IxO: jax.Array) -> jax.Array:
        if "fsdp" in kept:
            x_IxO = jax.lax.psum_scatter(x_IxO, "fsdp", scatter_dimension=kept.index("fsdp"), tiled=True)
        else:
            x_IxO = jax.lax.psum(x_IxO, "fsdp")
        return jax.lax.psum(x_IxO, "replica")

    def run(products: Products, x: jax.Array, dy: jax.Array, metric: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        def of_device(x: jax.Array, dy: jax.Array, metric: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            c_IxO, squares_B = products(x, dy, metric)
            if "tensor" in kept:
                squares_B = jax.lax.psum(squares_B, "tensor")
            return add_up(c_IxO.astype(x.dtype)).astype(jnp.float32), squares_B

        given = PartitionSpec(batch, None, whole[0]), PartitionSpec(batch, None, whole[1]), PartitionSpec(*whole)
        return jax.shard_map(of_device, mesh=mesh, in_specs=given, out_specs=(kept, PartitionSpec(batch)), check_vma=False)(x, dy, metric)

    total = jax.shard_map(lambda x: add_up(x[0]), mesh=mesh, in_specs=PartitionSpec(batch, *whole), out_specs=kept)
    return Shards(shards, total, run)
