"""Least times of a step, by hand, from the published figures of a chip and the places of devices on its torus."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from jax.sharding import Mesh

from scaling_jax.model.shape import TransformerConfig
from scaling_jax.pods.chips import parse_topology
from scaling_jax.pods.collectives import Collective
from scaling_jax.pods.roofline import least_hbm_bytes, roofline, route

AXES = ("replica", "fsdp", "tensor", "member")


class Device(SimpleNamespace):
    __hash__ = object.__hash__  # as a mesh asks of its devices


def a_mesh(topology, shape: tuple[int, int, int], order=(0, 1, 2, 3, 4)) -> Mesh:
    """Devices by slice, x, y, z and core, their dimensions then transposed, cut into (replica, fsdp, tensor)."""
    sides = (*topology.shape, 1)[:3]
    devices = np.empty((topology.slices, *sides, topology.chip.devices_per_chip), object)
    for at in itertools.product(*map(range, devices.shape)):
        devices[at] = Device(coords=list(at[1:4]), core_on_chip=at[4], slice_index=at[0], platform="tpu", id=0)
    return Mesh(devices.transpose(order).reshape(*shape, 1), AXES)


def sends(wire_bytes: float, *axes: str, dcn: bool = False, kind: str = "all-gather") -> Collective:
    return Collective(kind, axes, 4, 1, wire_bytes, "", (), "bf16", dcn, "g")


V5P = parse_topology("v5p:4x4x4", slices=2)  # 128 chips: 459 TFLOP/s, 2765 GB/s, links of 100 GB/s, 200 Gbit/s for 4 chips
MESH = a_mesh(V5P, (2, 64, 1))  # slices along replica, all of one along fsdp: 6 links
SECOND = {"flops": 459e12, "hbm_bytes": 2765e9, "collectives": [sends(600e9, "fsdp"), sends(200e9 / 8 / 4, "replica", dcn=True)]}


def test_work_at_the_published_rates_takes_a_second():
    found = roofline(V5P, MESH, **SECOND, model_flops=1.0)
    assert found[:4] == pytest.approx((1, 1, 1, 1), rel=1e-12)


@pytest.mark.parametrize("bound", ["compute", "memory", "interconnect", "network"])
def test_the_longest_is_the_bound(bound):
    work = {
        "flops": 459e12 * (3 if bound == "compute" else 1),
        "hbm_bytes": 2765e9 * (3 if bound == "memory" else 1),
        "collectives": [
            sends(600e9 * (3 if bound == "interconnect" else 1), "fsdp"),
            sends(6.25e9 * (3 if bound == "network" else 1), "replica", dcn=True),
        ],
    }
    found = roofline(V5P, MESH, **work, model_flops=459e12 * 128)
    assert found.bound == bound
    assert (found.step_s, found.mfu) == pytest.approx((3, 1 / 3), rel=1e-12)


@pytest.mark.parametrize(
    "topology, shape, axis, dimensions, whole, links",
    [
        ("v5p:8x8x16", (8, 8, 16), "replica", (0,), 1, 2),  # once around
        ("v5p:8x8x16", (8, 8, 16), "tensor", (2,), 1, 2),
        ("v5p:8x8x16", (64, 16, 1), "replica", (0, 1), 2, 4),
        ("v5p:8x8x16", (1, 1024, 1), "fsdp", (0, 1, 2), 3, 6),
        ("v5p:8x8x16", (8, 32, 4), "tensor", (2,), 0, 1),  # 4 neighbours of 16: a line
        ("v5p:8x8x16", (8, 32, 4), "fsdp", (1, 2), 1, 3),
        ("v5p:2x2x4", (4, 4, 1), "fsdp", (2,), 1, 1),  # less than a cube does not close
        ("v5e:16x16", (16, 16, 1), "fsdp", (1,), 1, 2),
        ("v5e:8x16", (8, 16, 1), "replica", (0,), 1, 1),
        ("v5e:8x16", (8, 16, 1), "fsdp", (1,), 1, 2),
        ("v6e:4x4", (1, 16, 1), "fsdp", (0, 1), 2, 2),
    ],
)
def test_links_that_carry_a_collective(topology, shape, axis, dimensions, whole, links):
    topology = parse_topology(topology)
    found = route(topology, a_mesh(topology, shape), (axis,))
    assert (found.dimensions, found.whole, found.links, found.of_a_chip) == (dimensions, whole, links, 1)
    assert found.devices == shape[("replica", "fsdp", "tensor").index(axis)]


def test_several_axes_are_one_group_and_other_slices_are_no_part_of_it():
    topology = parse_topology("v5p:4x4x4", slices=2)
    mesh = a_mesh(topology, (8, 4, 4))
    assert route(topology, mesh, ("fsdp", "tensor")).dimensions == (1, 2)
    within = route(topology, mesh, ("replica",))
    assert (within.dimensions, within.links, within.devices) == ((0,), 2, 4)


def test_collectives_of_one_dimension_wait_and_others_do_not():
    mesh = a_mesh(parse_topology("v5p:4x4x16"), (8, 4, 8))  # replica is x and half of y, fsdp the rest of y and half of z
    topology = parse_topology("v5p:4x4x16")
    assert [route(topology, mesh, (axis,)).dimensions for axis in AXES[:3]] == [(0, 1), (1, 2), (2,)]
    work = [sends(30e9, "replica"), sends(20e9, "fsdp"), sends(10e9, "tensor"), sends(10e9, "fsdp"), sends(0)]
    found = roofline(topology, mesh, 1.0, 1.0, work, 1.0)
    assert found.interconnect_s_by_axes == pytest.approx({("replica",): 0.1, ("fsdp",): 0.15, ("tensor",): 0.1}, rel=1e-12)
    assert found.interconnect_s == pytest.approx(0.25, rel=1e-12)  # along y, and along z as well
    apart = roofline(topology, mesh, 1.0, 1.0, [sends(30e9, "replica"), sends(10e9, "tensor")], 1.0)
    assert apart.interconnect_s == pytest.approx(0.1, rel=1e-12)


def test_network_by_host():
    found = roofline(V5P, MESH, 1.0, 1.0, [sends(5e9, "replica", dcn=True), sends(1.25e9, "replica", dcn=True)], 1.0)
    assert (found.network_s, found.interconnect_s) == (pytest.approx(1.0, rel=1e-12), 0)


IRONWOOD = parse_topology("tpu7x:4x4x4")


def test_two_devices_of_a_chip_share_what_it_has():
    mesh = a_mesh(IRONWOOD, (2, 64, 1), order=(0, 4, 1, 2, 3))  # replica is the core
    found = roofline(IRONWOOD, mesh, 2307e12 / 2, 7380e9 / 2, [sends(300e9, "fsdp")], 1.0)
    assert found[:3] == pytest.approx((1, 1, 1), rel=1e-12)
    assert roofline(IRONWOOD, mesh, 1, 1, [sends(12.5e9 / 2, "fsdp", dcn=True)], 1).network_s == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("kind, times", [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 1), ("all-to-all", 2)])
def test_two_devices_of_a_chip_in_one_group(kind, times):
    """Of 7 parts that each of 8 devices receives, 6 come from other chips, for both the same; but an all-to-all has other ones for each."""
    mesh = a_mesh(IRONWOOD, (16, 8, 1))  # fsdp is z, and the core
    way = route(IRONWOOD, mesh, ("fsdp",))
    assert (way.dimensions, way.links, way.devices, way.of_a_chip) == ((2,), 2, 8, 2)
    found = roofline(IRONWOOD, mesh, 1.0, 1.0, [sends(70e9, "fsdp", kind=kind)], 1.0)
    assert found.interconnect_s == pytest.approx(times * 60e9 / 200e9, rel=1e-12)


def test_within_a_chip_no_link_is_needed():
    found = roofline(IRONWOOD, a_mesh(IRONWOOD, (64, 1, 2)), 1.0, 1.0, [sends(1e12, "tensor")], 1.0)
    assert found.interconnect_s == 0 and found.interconnect_s_by_axes == {("tensor",): 0}


def test_devices_that_are_not_those_of_the_chips():
    with pytest.raises(ValueError, match="64 devices .* 128 chips of v5p:4x4x4"):
        roofline(V5P, a_mesh(parse_topology("v5p:4x4x4"), (1, 64, 1)), 1.0, 1.0, [], 1.0)


def test_utilisation_of_a_transformer_with_full_remat():
    """A forward pass computed twice is 8 FLOPs where the model needs 6: three quarters, without attention."""
    model = TransformerConfig(vocab_size=256, width=4096, depth=32, head_dim=128, context=1)
    tokens, attention = 2**20, 12 * model.depth * model.context * model.width
    flops = 8 * model.params * tokens / math.prod(MESH.shape.values())
    found = roofline(V5P, MESH, flops, 0.0, [], (model.flops_per_token - attention) * tokens)
    assert (found.bound, found.mfu) == ("compute", pytest.approx(6 / 8, rel=1e-12))


def test_least_hbm_bytes():
    assert least_hbm_bytes(argument_bytes=5, output_bytes=3, temp_bytes=7) == 5 + 3 + 7 + 7
