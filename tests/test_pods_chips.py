"""Chips against sums of what is published of pods, slices against the documented tables and against what libtpu and xpk have."""

import math

import pytest

from scaling_jax.errors import UserError
from scaling_jax.pods.chips import CHIPS, Topology, parse_topology, shapes

# From the tables of the Cloud TPU pages: shape, TensorCores (v4, v5p, tpu7x) or chips (v5e, v6e) as in the accelerator type, hosts.
DOCUMENTED = """
v5p:2x2x1 v5p-8 4 1
v5p:2x2x2 v5p-16 8 2
v5p:2x4x4 v5p-64 32 8
v5p:4x4x4 v5p-128 64 16
v5p:4x4x8 v5p-256 128 32
v5p:4x8x8 v5p-512 256 64
v5p:8x8x8 v5p-1024 512 128
v5p:8x8x16 v5p-2048 1024 256
v5p:8x16x16 v5p-4096 2048 512
v5p:16x16x16 v5p-8192 4096 1024
v5p:16x16x24 v5p-12288 6144 1536
v5e:1x1 v5litepod-1 1 1
v5e:2x2 v5litepod-4 4 1
v5e:2x4 v5litepod-8 8 1
v5e:4x4 v5litepod-16 16 4
v5e:16x16 v5litepod-256 256 64
v6e:1x1 v6e-1 1 1
v6e:2x4 v6e-8 8 1
v6e:8x16 v6e-128 128 32
v4:2x2x1 v4-8 4 1
v4:4x4x4 v4-128 64 16
v4:8x16x16 v4-4096 2048 512
tpu7x:2x2x1 tpu7x-8 4 1
tpu7x:4x4x4 tpu7x-128 64 16
"""


@pytest.mark.parametrize("row", DOCUMENTED.split("\n")[1:-1])
def test_documented_slices(row):
    name, accelerator_type, chips, hosts = row.split()
    topology = parse_topology(name)
    assert topology.name == name and topology.accelerator_type == accelerator_type
    assert (topology.chips, topology.hosts) == (int(chips), int(hosts))
    assert (topology.slice_chips, topology.slice_hosts, topology.slice_devices) == (topology.chips, topology.hosts, topology.devices)


@pytest.mark.parametrize("name", ["v5p:8x8x8", "v5e:2x4", "tpu7x:4x4x4"])
def test_several_slices_have_so_many_times_as_much(name):
    one, three = parse_topology(name), parse_topology(name, slices=3)
    for each in ("chips", "hosts", "devices"):
        assert getattr(three, each) == 3 * getattr(one, each)
    assert three.name == one.name and three.accelerator_type == one.accelerator_type  # those are of a slice


@pytest.mark.parametrize("name, side, bisection", [("v5e", 16, 1.6e12), ("v6e", 16, 3.2e12), ("v4", None, 24e12)])
def test_a_link_carries_what_the_published_bisection_of_a_pod_needs(name, side, bisection):
    """A torus of n x n is cut across 2n links; that of 16x16x16, across 2·16². One direction: both would be twice as much."""
    links = 2 * side if side else 2 * 16**2
    assert links * CHIPS[name].ici_link_bytes_per_s == pytest.approx(bisection, rel=0.07)


@pytest.mark.parametrize(
    "name, both_ways_GB, links, pod_PFLOPs, pod_chips",
    [("v5e", 400, 4, 50.63, 256), ("v6e", 800, 4, 234.9, 256), ("v5p", 1200, 6, None, None), ("tpu7x", 1200, 6, 42500 / 2, 9216)],
)
def test_published_sums(name, both_ways_GB, links, pod_PFLOPs, pod_chips):
    """The interconnect of a chip in both directions; the FLOP rate of a pod (of tpu7x half of its 42.5 EFLOP/s at 8 bits)."""
    chip = CHIPS[name]
    assert chip.ici_links == links and 2 * chip.ici_bytes_per_s == both_ways_GB * 1e9
    if pod_PFLOPs:
        assert pod_chips * chip.flops_bf16 == pytest.approx(pod_PFLOPs * 1e15, rel=0.01)


def test_the_network_of_a_pod_of_v5e():
    """6.4 Tbit/s, published, over the hosts of 256 chips."""
    topology = parse_topology("v5e:16x16")
    assert topology.hosts * topology.chip.dcn_bytes_per_s * 8 == 6.4e12


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_shape_is_parsed_and_fits_hosts(chip):
    found = shapes(chip)
    assert len(set(found)) == len(found) and max(map(math.prod, found)) == chip.max_chips
    for shape in found[:60] + found[-5:]:
        topology = parse_topology(f"{chip.name}:{'x'.join(map(str, shape))}")
        assert topology == Topology(chip, shape)
        padded = (*shape, 1)[:3]
        assert all(side % host == 0 for side, host in zip(padded, topology.host_shape, strict=True))
        assert topology.slice_hosts * math.prod(topology.host_shape) == topology.slice_chips


@pytest.mark.parametrize("name, slices, message", [
    ("v5p", 1, "v5p has 2x2x1, 2x2x2, 2x2x4, 2x4x4, and AxBxC of at most 6144 chips"),
    ("v5p:8x4x4", 1, "A ≤ B ≤ C"),
    ("v5p:4x4x6", 1, "multiples of 4"),
    ("v5p:16x20x28", 1, "at most 6144 chips"),
    ("v5p:4x4x", 1, "topology is 'v5p:4x4x'"),
    ("v5p:4x4x-4", 1, "topology is 'v5p:4x4x-4'"),
    ("v5p:0x4x4", 1, "multiples of 4"),
    ("v5p:4x4x٤", 1, "multiples of 4"),
    ("v5p:4x4x" + "9" * 5000, 1, "multiples of 4"),
    ("v5e:4x4x4", 1, "v5e has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
    ("v5e:8x4", 1, "v5e has 1x1"),
    ("v5e:4x4", 1001, "slices is 1001: must be at most 1000"),
    ("v5litepod:4x4", 1, "chips are v4, v5e, v5p, v6e, tpu7x"),
    ("", 1, "such as v5p:4x4x4"),
    ("v5e:4x4", 0, "slices is 0: must be at least 1"),
])  # fmt: skip
def test_bad_topologies_are_told_with_those_that_there_are(name, slices, message):
    with pytest.raises(UserError) as error:
        parse_topology(name, slices)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_libtpu_has_the_same_devices_and_hosts():
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    import os

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    for name in (
        "v5e:1x1",
        "v5e:2x4",
        "v5e:4x8",
        "v6e:2x2",
        "v6e:16x16",
        "v5p:2x2x1",
        "v5p:2x4x4",
        "v5p:4x4x12",
        "tpu7x:4x4x4",
        "tpu7x:2x2x1",
    ):
        for slices in (1, 2):
            topology = parse_topology(name, slices)
            options = {"chips_per_host_bounds": list(topology.host_shape), "num_slices": slices}
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
            assert (len(devices), len({device.process_index for device in devices})) == (topology.devices, topology.hosts), name
