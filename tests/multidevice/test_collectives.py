"""Collectives of programs that the CPU's compiler makes for 8 devices: kinds, axes, counts and bytes that are known beforehand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from scaling_jax.pods.collectives import collectives, summary

X = 16 * 32 * 4  # bytes of the f32[16, 32] that every device holds


def a_mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])


def manual(f: Callable[..., jax.Array], *shapes: tuple[int, ...]):
    """Of f on one device's own arrays: (kind, axes, group size, count, bytes, trips of the loops)."""
    spec = P("a", "b")
    own = jax.shard_map(lambda *xs: f(*(x[0, 0] for x in xs))[None, None], mesh=a_mesh(), in_specs=(spec,) * len(shapes), out_specs=spec)
    text = jax.jit(own).lower(*(jnp.ones((2, 4, *shape)) for shape in shapes)).compile().as_text()
    return [
        (c.kind, c.axes, c.group_size, c.count, c.wire_bytes, [loop.trips for loop in c.loops]) for c in collectives(text, a_mesh().shape)
    ]


def varying(x, *axes):
    """As different on every device, which shard_map asks of what leaves it."""
    return lax.pcast(x, axes, to="varying")


RING = [(0, 1), (1, 2), (2, 3), (3, 0)]


@pytest.mark.parametrize(
    "f, kind, axes, size, wire_bytes",
    [
        (lambda x: varying(lax.psum(x, "b"), "b"), "all-reduce", ("b",), 4, 2 * 3 / 4 * X),
        (lambda x: varying(lax.psum(x, ("a", "b")), "a", "b"), "all-reduce", ("a", "b"), 8, 2 * 7 / 8 * X),
        (lambda x: varying(lax.pmax(x, "a"), "a"), "all-reduce", ("a",), 2, X),
        (lambda x: lax.all_gather(x, "b", tiled=True), "all-gather", ("b",), 4, 3 * X),
        (lambda x: lax.all_gather(x, "a", axis=1), "all-gather", ("a",), 2, X),
        (lambda x: lax.psum_scatter(x, "b", tiled=True), "reduce-scatter", ("b",), 4, 3 / 4 * X),
        (lambda x: lax.ppermute(x, "b", RING), "collective-permute", ("b",), 4, X),
        (lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True), "all-to-all", ("b",), 4, 3 / 4 * X),
        (lambda x: lax.all_to_all(x, "b", 0, 1, tiled=True), "all-to-all", ("b",), 4, 3 / 4 * X),
    ],
)
def test_one_collective(f, kind, axes, size, wire_bytes):
    assert manual(lambda x: f(jnp.sin(x)), (16, 32)) == [(kind, axes, size, 1, wire_bytes, [])]


def test_in_a_scan_of_a_scan():
    def inner(h, w):
        return varying(lax.psum(jnp.sin(h + w), "b"), "b"), None

    def outer(h, ws):
        return lax.ppermute(lax.scan(inner, h, ws)[0], "a", [(0, 1), (1, 0)]), None

    assert sorted(manual(lambda x, ws: lax.scan(outer, x, ws)[0], (16, 32), (5, 3, 16, 32))) == [
        ("all-reduce", ("b",), 4, 15, 15 * 2 * 3 / 4 * X, [5, 3]),
        ("collective-permute", ("a",), 2, 5, 5 * X, [5]),
    ]


def test_what_the_partitioner_adds():
    """Layers of matrices sharded over b, data over a and b: every layer gathers its matrix, and its gradient is summed over the batch."""
    layers, rows, width = 6, 64, 128

    def loss(w_LxDxD, x_BxD):
        whole = NamedSharding(a_mesh(), P(None, None))

        def layer(x_BxD, w_DxD):
            return jnp.tanh(x_BxD @ lax.with_sharding_constraint(w_DxD, whole)), None

        return jnp.sum(lax.scan(layer, x_BxD, w_LxDxD)[0])

    def put(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(a_mesh(), P(*spec)))

    arguments = put((layers, width, width), None, "b", None), put((rows, width), ("a", "b"), None)
    step = jax.jit(jax.grad(loss), out_shardings=arguments[0].sharding)
    found = collectives(step.lower(*arguments).compile().as_text(), a_mesh().shape)
    matrix = width * width * 4
    assert {(row.kind, row.axes): (row.count, row.wire_bytes) for row in summary(found)} == {
        ("all-gather", ("b",)): (layers, layers * 3 / 4 * matrix),
        ("all-reduce", ("a", "b")): (layers, layers * 2 * 7 / 8 * matrix),
    }
    assert all("while/body" in c.op_name and [loop.trips for loop in c.loops] == [layers] for c in found)
