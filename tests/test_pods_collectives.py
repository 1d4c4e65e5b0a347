"""Collectives read from programs' texts: short ones of every form, and programs of known collectives compiled for TPU topologies."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scaling_jax.pods.collectives import Collective, Traffic, array_bytes, collectives, summary
from scaling_jax.pods.hlo import ArrayType

MESH = {"a": 2, "b": 2, "c": 2}
ROW_0, ROW_1 = "{0,1,2,3}", "{4,5,6,7}"
COMPUTATIONS = """
%all-reduce-scatter.1 (input: f32[16,4]) -> f32[8,4] {
  %input = f32[16,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.9 = f32[16,4]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true
  ROOT %cut = f32[8,4]{1,0} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={8,4}
}

%hidden_start (w: f32[8,4]) -> (f32[8,4], f32[16,4], u32[]) {
  %w = f32[8,4]{1,0} parameter(0)
  %all-gather.1 = f32[16,4]{1,0} all-gather(%w), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %start = (f32[8,4]{1,0}, f32[16,4]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%hidden_middle (w.1: f32[8,4], g: f32[16,4], u: u32[]) -> (f32[16,4], f32[16,4]) {
  %w.1 = f32[8,4]{1,0} parameter(0)
  %g = f32[16,4]{1,0} parameter(1)
  %u = u32[] parameter(2)
  %all-gather.2 = f32[16,4]{1,0} all-gather(%w.1), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %both = (f32[16,4]{1,0}, f32[16,4]{1,0}) tuple(%all-gather.2, %g)
}

%hidden_done (w.2: f32[8,4], g.2: f32[16,4]) -> f32[16,4] {
  %w.2 = f32[8,4]{1,0} parameter(0)
  %g.2 = f32[16,4]{1,0} parameter(1)
  %all-gather.3 = f32[16,4]{1,0} all-gather(%w.2), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %done = f32[16,4]{1,0} custom-call(%w.2, %g.2, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%wrapped (p.1: f32[8,4]) -> f32[8,4] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  ROOT %all-to-all.5 = f32[8,4]{1,0} all-to-all(%p.1), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %hidden = (f32[8,4], f32[16,4], u32[]) fusion(%x), calls=%hidden_start, metadata={op_name="of the fusion"}
  %sum = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true
  ROOT %after = (s32[], f32[8,4]{1,0}) tuple(%next, %sum)
}

%condition (state.1: (s32[], f32[8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(12)
  ROOT %test = pred[] compare(%n.1, %limit), direction=LT
}
"""  # noqa: E501


def program(*lines: str, partitions: int = 8) -> str:
    """An entry with the lines, and the computations that they name; its %x is f32[8,4], 128 bytes, and its %h bf16[6], 12 bytes."""
    text = "\n".join(["  %x = f32[8,4]{1,0} parameter(0)", "  %h = bf16[6]{0} parameter(1)", *(f"  {line}" for line in lines)])
    text = f"ENTRY %main (x: f32[8,4], h: bf16[6]) -> f32[8,4] {{\n{text}\n}}\n"
    for computation in reversed(COMPUTATIONS.strip().split("\n\n")):  # each before those that call it
        if f"={computation.split()[0]}" in text:
            text = f"{computation}\n\n{text}"
    return f"HloModule m, num_partitions={partitions}\n\n{text}"


def found(*lines: str) -> list[Collective]:
    return collectives(program(*lines), MESH)


def only(*lines: str) -> Collective:
    (one,) = found(*lines)
    return one


@pytest.mark.parametrize(
    "groups, axes, size",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("c",), 2),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("b",), 2),
        ("{{0,3,5,6},{1,2,4,7}}", ("a", "b", "c"), 4),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
        ("{}", ("a", "b", "c"), 8),
        ("[4,2]<=[8]", ("c",), 2),
        ("[2,4]<=[8]", ("b", "c"), 4),
        ("[4,2]<=[2,4]T(1,0)", ("a",), 2),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("b",), 2),
        ("[1,8]<=[8]", ("a", "b", "c"), 8),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", ("a", "b", "c"), 8),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_1'}", (), 1),
        ("mesh['x'=2,'y'=4] {'x'}", ("a",), 2),
        ("mesh['x'=2,'y'=4] {'y'}", ("b", "c"), 4),
        ("mesh['x'=2,'y'=4] {'y':(1)2}", ("b",), 2),
        ("mesh['x'=2,'y'=4] {'y':(2)2}", ("c",), 2),
        ("mesh['x'=2,'y'=4] {'x','y':(2)2}", ("a", "c"), 4),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", ("b", "c"), 4),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", ("a",), 2),
        ("mesh['x'=2,'y'=4], device_ids=([[0,2,4,6],[1,3,5,7]]) {'x'}", ("c",), 2),
    ],
)
def test_groups_in_every_syntax(groups, axes, size):
    c = only(f"%g = f32[8,4]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add")
    assert (c.axes, c.group_size) == (axes, size)
    assert c.wire_bytes == 2 * (size - 1) / size * 128


IN_FOURS = f"channel_id=1, replica_groups={{{ROW_0},{ROW_1}}}, use_global_device_ids=true"


@pytest.mark.parametrize(
    "line, kind, dtype, wire_bytes",
    [
        (f"f32[32,4]{{1,0}} all-gather(%x), dimensions={{0}}, {IN_FOURS}", "all-gather", "f32", 3 * 128),
        (f"(f32[8,4], f32[32,4]) all-gather-start(%x), dimensions={{0}}, {IN_FOURS}", "all-gather", "f32", 3 * 128),
        (f"f32[2,4]{{1,0}} reduce-scatter(%x), dimensions={{0}}, {IN_FOURS}", "reduce-scatter", "f32", 3 / 4 * 128),
        (f"f32[8,4]{{1,0}} all-reduce(%x), {IN_FOURS}, to_apply=%add", "all-reduce", "f32", 2 * 3 / 4 * 128),
        (f"f32[8,4]{{1,0}} all-reduce-start(%x), {IN_FOURS}, to_apply=%add", "all-reduce", "f32", 2 * 3 / 4 * 128),
        (f"(f32[8,4], /*index=1*/bf16[6]) all-reduce(%x, %h), {IN_FOURS}", "all-reduce", "bf16+f32", 2 * 3 / 4 * (128 + 12)),
        (f"f32[8,4]{{1,0}} all-to-all(%x), dimensions={{0}}, channel_id=1, replica_groups={{{ROW_0},{ROW_1}}}", "all-to-all", "f32", 96),
        (f"(bf16[6], bf16[6]) all-to-all(%h, %h), {IN_FOURS}", "all-to-all", "bf16", 3 / 4 * 24),
        ("bf16[6]{0} collective-permute(%h), channel_id=1, source_target_pairs={{0,2},{2,0}}", "collective-permute", "bf16", 12),
    ],
)
def test_bytes_of_every_kind(line, kind, dtype, wire_bytes):
    c = only(f'%c.1 = {line}, metadata={{op_name="jit(f)/layer/x" stack_frame_id=3}}')
    assert (c.kind, c.dtype, c.wire_bytes) == (kind, dtype, pytest.approx(wire_bytes, rel=1e-12))
    assert (c.count, c.loops, c.op_name, c.dcn, c.name) == (1, (), "jit(f)/layer/x", False, "c.1")


def test_two_halves_are_one_collective():
    permute, exchange, offloaded = found(
        "%s = (f32[8,4], f32[8,4], u32[], u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,4},{4,0}}",
        "%d = f32[8,4]{1,0} collective-permute-done(%s)",
        "%t = ((f32[8,4]), f32[8,4], u32[]) async-start(%x), calls=%wrapped",
        "%u = ((f32[8,4]), f32[8,4], u32[]) async-update(%t), calls=%wrapped",
        "%e = f32[8,4]{1,0} async-done(%u), calls=%wrapped",
        '%v = ((f32[8,4], token[]), f32[8,4]) call-start(%x), async_execution_thread="sparsecore", to_apply=%wrapped',
        "%w.8 = f32[8,4]{1,0} call-done(%v)",
    )
    assert offloaded == exchange
    assert (permute.kind, permute.axes, permute.wire_bytes) == ("collective-permute", ("a",), 128)
    assert (exchange.kind, exchange.axes, exchange.wire_bytes) == ("all-to-all", ("b", "c"), 96)


START = '%s = (f32[8,4], f32[16,4], u32[]) fusion(%x), kind=kCustom, calls=%hidden_start, metadata={op_name="of the fusion"}'
MIDDLE = "%m = (f32[16,4], f32[16,4]) fusion(%x, %x, %x), kind=kOutput, calls=%hidden_middle"
DONE = "%d = f32[16,4]{1,0} fusion(%x, %x), kind=kCustom, calls=%hidden_done"


def test_an_asynchronous_chain_is_one_collective():
    c = only(START, MIDDLE, MIDDLE.replace("%m", "%m.2"), DONE)
    assert (c.kind, c.axes, c.count, c.wire_bytes, c.op_name) == ("all-gather", ("c",), 1, 128, "of the fusion")
    with pytest.raises(ValueError, match=r"all-gather\.[23].*starts nowhere"):
        found(MIDDLE, DONE)


def test_an_all_reduce_that_is_cut_is_a_reduce_scatter():
    c = only("%big = f32[16,4]{1,0} broadcast(%x)", "%f = f32[8,4]{1,0} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1")
    assert (c.kind, c.axes, c.wire_bytes) == ("reduce-scatter", ("c",), 256 / 2)


def test_a_loop_multiplies():
    gather, reduce = found(
        "%zero.1 = s32[] constant(0)",
        "%begin = (s32[], f32[8,4]{1,0}) tuple(%zero.1, %x)",
        '%w.9 = (s32[], f32[8,4]{1,0}) while(%begin), condition=%condition, body=%body, metadata={op_name="of the loop"}',
    )
    assert (reduce.kind, reduce.axes, reduce.count, reduce.wire_bytes) == ("all-reduce", ("c",), 12, 12 * 128)
    assert (gather.kind, gather.count, gather.wire_bytes) == ("all-gather", 12, 12 * 128)
    assert [(loop.body, loop.trips, loop.op_name) for loop in reduce.loops] == [("body", 12, "of the loop")]
    assert (gather.op_name, reduce.op_name) == ("of the fusion", "of the loop")  # the nearest that has a name


def test_a_permutation_is_of_the_axes_along_which_it_sends():
    def permute(pairs):
        return only(f"%p = f32[8,4]{{1,0}} collective-permute(%x), channel_id=1, source_target_pairs={pairs}")

    ring = permute("{{0,1},{1,3},{3,2},{2,0},{4,5},{5,7},{7,6},{6,4}}")
    assert (ring.axes, ring.group_size, ring.wire_bytes) == (("b", "c"), 4, 128)
    assert permute("{{0,4},{1,1},{2,2}}").axes == ("a",)
    still = permute("{{0,0},{1,1}}")
    assert (still.axes, still.group_size, still.wire_bytes) == ((), 1, 0)


@pytest.mark.parametrize(
    "line, message",
    [
        ("f32[8,4]{1,0} ragged-all-to-all(%x), channel_id=1", "ragged-all-to-all"),
        ("f32[8,4]{1,0} collective-broadcast(%x), channel_id=1, replica_groups={{0,1}}", "collective-broadcast"),
        ("f32[8,4]{1,0} collective-new-start(%x), channel_id=1", "collective-new"),
        ("(f32[8,4], u32[], token[]) send(%x), channel_id=1, frontend_attributes={_xla_send_recv_source_target_pairs={{0,1}}}", "send"),
        ("f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=new<3>, use_global_device_ids=true", "replica_groups.*new<3>"),
        ("f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=mesh['x'=8] {'y'}, use_global_device_ids=true", "replica_groups"),
        ("f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2}}, use_global_device_ids=true", "different sizes"),
        ("f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,8}}, use_global_device_ids=true", "device 8"),
        ("f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0}}", "use_global_device_ids"),
        ("f32[8,4]{1,0} collective-permute(%x), channel_id=1, source_target_pairs=new<3>", "source_target_pairs"),
        ("f32[8,4]{1,0} collective-permute(%x, %x, %x, %x), channel_id=1, source_target_pairs={{0,1}}, slice_sizes={{1}}", "in place"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(line, message):
    with pytest.raises(ValueError, match=f"collective odd.7: .*{message}"):
        found(f"%odd.7 = {line}")


def test_a_collective_that_nothing_known_runs_is_refused():
    with pytest.raises(ValueError, match=r"collective all-to-all.5: it stands in wrapped"):
        found("%c = f32[8,4]{1,0} custom-call(%x), new_computation=%wrapped")


def test_transfers_to_the_host_and_groups_of_replicas_send_nothing_between_devices():
    assert not found('%s = (f32[8,4], u32[], token[]) send(%x, %x), is_host_transfer=true, frontend_attributes={handler="callback"}')
    alone = only("%r = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0}}")  # no channel: of replicas, and there is one
    assert (alone.axes, alone.wire_bytes) == ((), 0)


SLICES = {"b": 2, "a": 2, "c": 4}  # slices stand on the axis in the middle
SLICE_IDS = [100_000 * (1 + a) + 2 * c + b for b in range(2) for a in range(2) for c in range(4)]


def megascale(kind: str, target: str) -> str:
    attributes = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"'
    return f"(f32[8,4], u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={{{attributes}}}"


@pytest.mark.parametrize(
    "line, kind, axes, wire_bytes",
    [
        (megascale("ALL_REDUCE", '"{1,2}x{0:7}"'), "all-reduce", ("a",), 128),
        (megascale("ALL_GATHER", "{{100000,200000},{100003,200003}}"), "all-gather", ("a",), 128),
        (megascale("REDUCE_SCATTER", "{{100000,200001}}"), "reduce-scatter", ("b", "a"), 64),
        (megascale("ALL_TO_ALL", "{{100000,200000},{100001,200001}}"), "all-to-all", ("a",), 64),
        (megascale("ONE_TO_ONE", "{{100000->200000},{200000->100000}}"), "collective-permute", ("a",), 128),
    ],
)
def test_between_slices(line, kind, axes, wire_bytes):
    (c,) = collectives(program(f"%s = {line}"), SLICES, SLICE_IDS)
    assert (c.kind, c.axes, c.wire_bytes, c.dcn) == (kind, axes, wire_bytes, True)


def test_within_slices():
    """Ids are positions in the slice's part of the mesh, whose order is not that of the devices' ids."""
    groups = "{{0,1,2,3},{4,5,6,7}}", "{{0,4},{1,5},{2,6},{3,7}}", "{}"
    reduce = "%g = f32[8,4]{1,0} all-reduce(%x), channel_id=1, use_global_device_ids=true, replica_groups="
    found = [collectives(program(reduce + of), SLICES, SLICE_IDS)[0] for of in groups]
    assert [c.axes for c in found] == [("c",), ("b",), ("b", "c")]
    assert not any(c.dcn for c in found)


def test_devices_that_do_not_fit():
    reduce = "%g = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={}, use_global_device_ids=true"
    with pytest.raises(ValueError, match="program is for 8 devices, but the mesh .* has 16; .* give device_ids"):
        collectives(program(reduce), SLICES)
    with pytest.raises(ValueError, match="program is for 4 devices, but the mesh .* has 16$"):
        collectives(program(reduce, partitions=4), SLICES, SLICE_IDS)
    with pytest.raises(ValueError, match="15 device ids"):
        collectives(program(reduce), SLICES, SLICE_IDS[1:])
    for kind, target, message in (
        ("ALL_REDUCE", '"{1,3}x{0:7}"', "names devices that are not in device_ids"),
        ("NEW", '"{1,2}x{0:7}"', "no rule for its transfer type"),
        ("ALL_REDUCE", '"{1,2}"', "unknown form"),
    ):
        with pytest.raises(ValueError, match=f"collective s: .*{message}"):
            collectives(program("%s = " + megascale(kind, target)), SLICES, SLICE_IDS)


def test_array_bytes():
    sizes = {"f32": 4, "bf16": 2, "pred": 1, "s8": 1, "u4": 0.5, "f8e4m3fn": 1, "c64": 8, "token": 0}
    assert {dtype: array_bytes(ArrayType(dtype, (3, 2))) / 6 for dtype in sizes} == sizes
    assert array_bytes(ArrayType("f32", ())) == 4
    with pytest.raises(ValueError, match="'tuple'"):
        array_bytes(ArrayType("tuple", ()))


def test_summary():
    def reduce(name, groups):
        return f"%{name} = f32[8,4]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true"

    assert summary(found(reduce("p", "[4,2]<=[8]"), reduce("q", "[1,8]<=[8]"), reduce("r", "[4,2]<=[8]"), reduce("s", "[8,1]<=[8]"))) == [
        Traffic("all-reduce", ("c",), False, 2, 256.0),
        Traffic("all-reduce", ("a", "b", "c"), False, 1, 224.0),
    ]


ON_TPUS = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from scaling_jax.pods.collectives import collectives

def compiled(mesh, f, *shapes):  # f acts on one device's own arrays; each of these shapes stands once on every device
    spec = P(*mesh.axis_names)
    own = lambda *xs: jax.tree.map(lambda y: y[None, None, None], f(*(x[0, 0, 0] for x in xs)))
    step = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(spec,) * len(shapes), out_specs=spec, check_vma=False))
    args = [jax.ShapeDtypeStruct(mesh.devices.shape + s, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for s in shapes]
    return collectives(step.lower(*args).compile().as_text(), mesh.shape, [d.id for d in mesh.devices.flat])

def of(topology, shape, order=(0, 1, 2), **options):
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices).reshape(shape)
    return Mesh(devices.transpose(order), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)

def one_slice(x, y, z):
    def layer(h, w):
        g = lax.all_gather(w, "b", tiled=True)
        h = lax.psum(jnp.sin(h) * g[:1024], "c")
        s = lax.psum_scatter(jnp.tile(h, (4, 1)), "b", tiled=True)
        h = h + lax.ppermute(s, "a", [(0, 1), (1, 0)])
        return h + lax.all_to_all(h, ("b", "c"), 0, 0, tiled=True), None
    return (
        lax.psum(x * 2, "b"), lax.psum(jnp.sin(x), ("a", "c")),
        lax.all_gather(x + 1, "b", tiled=True), lax.all_gather(x + 3, "c", tiled=True, axis=1),
        lax.psum_scatter(jnp.cos(x), "a", tiled=True), lax.psum_scatter(jnp.tanh(x), "b", tiled=True),
        lax.ppermute(x * 5, "b", [(0, 1), (1, 2), (2, 3), (3, 0)]), lax.all_to_all(x * 7, "b", 0, 1, tiled=True),
        lax.scan(layer, y, z)[0],
    )

def two_slices(x, z):
    return (
        lax.psum(x * 2, "b"), lax.all_gather(x + 1, "b", tiled=True), lax.psum_scatter(jnp.cos(x), "b", tiled=True),
        lax.all_to_all(x * 9, "b", 0, 0, tiled=True), lax.ppermute(x * 7, "b", [(0, 1), (1, 0)]),
        lax.all_gather(x + 2, "a", tiled=True), lax.psum(x * 5, "c"),
        lax.scan(lambda h, w: (lax.psum(jnp.sin(h + w), "b"), None), x, z)[0],
    )

X = (1024, 256)
found = {
    "one": compiled(of("v5e:4x4", (2, 4, 2)), one_slice, X, X, (7, *X)),
    "sparsecore": compiled(of("tpu7x:2x2x2", (2, 4, 2)), one_slice, X, X, (7, *X)),  # 2 devices a chip
    "two": compiled(of("v5p:2x2x2", (2, 2, 4), (1, 0, 2), num_slices=2), two_slices, X, (5, *X)),  # slices on b
}
for which, cs in found.items():
    found[which] = [[c.kind, c.axes, c.group_size, c.count, c.wire_bytes, c.dtype, c.dcn, [loop.trips for loop in c.loops]] for c in cs]
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, which holds XLA's TPU compiler, is not installed")
def test_known_collectives_compiled_for_tpus():
    root = Path(__file__).parents[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    env |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    ran = subprocess.run([sys.executable, "-c", ON_TPUS], env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    x = 1024 * 256 * 2  # bytes of a bf16 array

    def expected(kind, axes, n, count, per_call, dcn=False):
        return [kind, list(axes), n, count, count * per_call, "bf16", dcn, [count] if count > 1 else []]

    one = [
        expected("all-reduce", "b", 4, 1, 2 * 3 / 4 * x),
        expected("all-reduce", "ac", 4, 1, 2 * 3 / 4 * x),
        expected("all-gather", "b", 4, 1, 3 * x),
        expected("all-gather", "c", 2, 1, x),
        expected("reduce-scatter", "a", 2, 1, x / 2),
        expected("reduce-scatter", "b", 4, 1, 3 / 4 * x),
        expected("collective-permute", "b", 4, 1, x),
        expected("all-to-all", "b", 4, 1, 3 / 4 * x),
        expected("all-gather", "b", 4, 7, 3 * x),
        expected("all-reduce", "c", 2, 7, x),
        expected("reduce-scatter", "b", 4, 7, 3 / 4 * 4 * x),
        expected("collective-permute", "a", 2, 7, x),
        expected("all-to-all", "bc", 8, 7, 7 / 8 * x),
    ]
    two = [
        expected("all-reduce", "b", 2, 1, x, True),
        expected("all-gather", "b", 2, 1, x, True),
        expected("reduce-scatter", "b", 2, 1, x / 2, True),
        expected("all-to-all", "b", 2, 1, x / 2, True),
        expected("collective-permute", "b", 2, 1, x, True),
        expected("all-gather", "a", 2, 1, x),
        expected("all-reduce", "c", 4, 1, 2 * 3 / 4 * x),
        expected("all-reduce", "b", 2, 5, x, True),
    ]
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    assert sorted(found["one"]) == sorted(found["sparsecore"]) == sorted(one)
    assert sorted(found["two"]) == sorted(two)
