"""The table of logical axes, and that without a mesh nothing happens. What sharding does is tested on eight devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from scaling_jax import mesh


def test_spec_follows_the_table():
    assert mesh.spec("batch", "length", "heads") == PartitionSpec(("replica", "fsdp"), None, "tensor")
    assert mesh.spec("layer", "embed", "mlp") == PartitionSpec(None, "fsdp", "tensor")
    assert mesh.spec(None, "vocab") == PartitionSpec(None, "tensor")


def test_unknown_logical_axis_is_an_error():
    with pytest.raises(KeyError, match="width"):
        mesh.spec("width")


def test_every_table_entry_is_an_axis_of_the_mesh():
    for axes in mesh.LOGICAL_AXES.values():
        assert set([axes] if isinstance(axes, str) else axes or ()) <= set(mesh.AXES)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert mesh.constrain(x, "batch", "length") is x and mesh.batch_shards() == 1


def test_somebody_elses_mesh_is_left_alone():
    theirs = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(theirs):
        x = jnp.ones((2, 3))
        assert mesh.constrain(x, "batch", "length") is x and mesh.batch_shards() == 1
