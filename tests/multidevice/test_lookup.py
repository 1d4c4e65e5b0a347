"""Rows of a table that lies across 8 devices: what `jnp.take` reads, laid out as it should be, and a gradient in each device's own part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling_jax.mesh import make_mesh, sharding
from scaling_jax.model.lookup import look_up
from scaling_jax.pods.collectives import collectives

pytestmark = pytest.mark.usefixtures("quick_compilation")
VOCAB, WIDTH, SEQUENCES = 24, 16, 16
MESHES = [
    {"fsdp": 8},
    {"tensor": 8},
    {"replica": 8},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "tensor": 4},
    {"replica": 2, "fsdp": 2, "tensor": 2},
]


def named(sizes: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in sizes.items())


def problem(length: int):
    keys = jax.random.split(jax.random.key(length), 3)
    table, dx = jax.random.normal(keys[0], (VOCAB, WIDTH)), jax.random.normal(keys[2], (SEQUENCES, length, WIDTH))
    return table, jax.random.randint(keys[1], (SEQUENCES, length), 0, VOCAB), dx


def read(table, tokens, dx, dtype):
    x, pull = jax.vjp(lambda table: look_up(table, tokens, dtype), table)
    return x, pull(dx.astype(dtype))[0]


def on(sizes: dict[str, int], length: int, dtype=jnp.float32):
    """Rows and gradient, on the mesh; and the compiled program."""
    mesh = make_mesh(**sizes)
    table, tokens, dx = problem(length)
    table = jax.device_put(table, sharding(mesh, "vocab", "embed"))
    tokens, dx = (jax.device_put(x, NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))) for x in (tokens, dx))
    with jax.set_mesh(mesh):
        program = jax.jit(read, static_argnums=3).lower(table, tokens, dx, dtype).compile()
        return *program(table, tokens, dx), program, mesh


@pytest.mark.parametrize("length", [8, 13])
@pytest.mark.parametrize("sizes", MESHES, ids=named)
def test_rows_and_their_gradient(sizes, length):
    """A length that the tensor axis does not divide is not divided."""
    table, tokens, dx = (np.asarray(x) for x in problem(length))
    x, gradient, _, mesh = on(sizes, length)
    np.testing.assert_array_equal(x, table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, dx)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    divided = length % sizes.get("tensor", 1) == 0
    assert x.sharding.is_equivalent_to(sharding(mesh, "batch", "sequence" if divided else "length", "residual"), 3)
    assert gradient.sharding.is_equivalent_to(sharding(mesh, "vocab", "embed"), 2)


@pytest.mark.parametrize("sizes", MESHES, ids=named)
def test_the_table_stays_where_it_is(sizes):
    """Only activations and token ids travel, and between replicas the gradient."""
    *_, program, mesh = on(sizes, 8)
    activations = SEQUENCES * 8 * WIDTH * 4 / sizes.get("replica", 1)  # of a replica
    for c in collectives(program.as_text(), mesh.shape):
        assert len(c.axes) < 2
        if c.axes == ("replica",):
            assert c.kind == "all-reduce" and c.wire_bytes < 2 * VOCAB * WIDTH * 4 / (8 / sizes["replica"])
        elif c.axes == ("fsdp",):  # exchanged, or token ids gathered
            assert c.kind == "all-to-all" or c.dtype == "s32"
            assert c.wire_bytes <= activations / sizes["fsdp"] / sizes.get("tensor", 1)
        else:
            assert c.wire_bytes <= activations / sizes.get("fsdp", 1)


def test_rows_in_the_dtype_that_is_asked_for():
    table, tokens, _ = problem(8)
    x, gradient, *_ = on(MESHES[-1], 8, jnp.bfloat16)
    assert x.dtype == jnp.bfloat16 and gradient.dtype == jnp.float32
    np.testing.assert_array_equal(x, jnp.take(table, tokens, axis=0).astype(jnp.bfloat16))


def test_without_a_mesh_and_on_somebody_elses():
    table, tokens, dx = problem(8)
    np.testing.assert_array_equal(look_up(table, tokens, jnp.float32), np.asarray(table)[np.asarray(tokens)])
    theirs = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(theirs):
        x, gradient = jax.jit(read, static_argnums=3)(table, tokens, dx, jnp.float32)
    np.testing.assert_array_equal(x, np.asarray(table)[np.asarray(tokens)])
    np.testing.assert_allclose(gradient.sum(0), dx.sum((0, 1)), rtol=1e-4, atol=1e-4)
