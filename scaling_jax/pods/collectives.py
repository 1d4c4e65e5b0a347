"""What one step of a compiled program sends between devices: every collective, the mesh axes it spans, how often it runs, its bytes.

The bytes are those that one device puts on the wire, for the algorithms whose volume is least (Thakur, Rabenseifner & Gropp 2005): with n
devices in a group and b bytes of operand on each,

    all-gather (n − 1)·b       reduce-scatter, all-to-all (n − 1)/n·b       all-reduce 2(n − 1)/n·b       collective-permute b

They are read from the compiled text, so they hold padding and whatever precision the compiler chose. What TPU programs do with collectives
has to be known to count them:

- An asynchronous collective that compute hides stands in several fusions, from `AsyncCollectiveStart` to `AsyncCollectiveDone`, which
  share a channel and a chain: it is counted where it starts.
- A reduce-scatter may be a fusion `all-reduce-scatter`, which holds an all-reduce whose result is cut: it is counted as reduce-scatter.
- A product whose operand is gathered while it is multiplied ("windowed") is a loop of collective-permutes. They keep this kind; their axes
  tell what they gather or scatter.
- Of a program for several slices the text is that of one slice, and what crosses the data-centre network is a transfer to the host's
  runtime ("megascale"), by its own devices' ids.

A device in `replica_groups` and `source_target_pairs` is a position in the program's device assignment: for `jax.jit` over a Mesh, the
position in `mesh.devices.flat`; with several slices, the position among the slice's own devices there.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scaling_jax.pods.hlo import ArrayType, Computation, Instruction, Loop, Program, parse_program, walk

_WIRE: dict[str, Callable[[int, int], float]] = {  # bytes that one device sends, of operand bytes and group size
    "all-gather": lambda operand, n: (n - 1) * operand,
    "reduce-scatter": lambda operand, n: (n - 1) / n * operand,
    "all-reduce": lambda operand, n: 2 * (n - 1) / n * operand,
    "all-to-all": lambda operand, n: (n - 1) / n * operand,
    "collective-permute": lambda operand, n: operand if n > 1 else 0,
}
_MEGASCALE = {
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_SLICE = 100_000  # the TPU client numbers devices 100000·(slice + 1) + i where there are several slices


class Collective(NamedTuple):
    """One collective instruction of a program."""

    kind: str  # all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute
    axes: tuple[str, ...]  # the mesh axes along which the devices of a group differ, in mesh order; empty for groups of one
    group_size: int  # of a collective-permute, the product of its axes' sizes
    count: int  # times that one call of the program runs it
    wire_bytes: float  # that one device sends in one call, all counts together
    op_name: str  # of the traced operation that it comes from, or else of the nearest fusion or loop around it that has one
    loops: tuple[Loop, ...]  # those it stands in, outermost first
    dtype: str  # as XLA writes it, "bf16+f32" where one instruction sends several
    dcn: bool  # over the data-centre network, between slices; otherwise within a slice
    name: str  # of the instruction


class Traffic(NamedTuple):
    """All collectives of one kind over the same axes."""

    kind: str
    axes: tuple[str, ...]
    dcn: bool
    count: int
    wire_bytes: float


def collectives(compiled_text: str, mesh_shape: Mapping[str, int], device_ids: Sequence[int] = ()) -> list[Collective]:
    """Every collective that one call of a program runs, in the program's order.

    Args:
      compiled_text: `jax.jit(f).lower(...).compile().as_text()`, of the TPU's or the CPU's compiler.
      mesh_shape: sizes of the mesh's axes, in its order: `mesh.shape`.
      device_ids: `[device.id for device in mesh.devices.flat]`; needed only where the devices are in several slices.

    Raises:
      ValueError: a collective that this module does not understand, or that is not of this mesh; the message names the instruction. Also a
        loop around a collective whose trip count the text does not determine. Of a conditional's branches the one that sends most is taken.
    """
    program = parse_program(compiled_text)
    place = _Placement(program, mesh_shape, device_ids)
    reached, started, followed = set(), set(), {}

    def read(computation: Computation, i: Instruction, callers: tuple[Instruction, ...]) -> Collective | None:
        kind = _kind(computation, i)
        if kind is None:
            return None
        reached.add((computation.name, i.name))
        chain = re.search(r'\bchain_id="(\d+)"', i.attributes)
        if chain:
            key = chain[1], _channel(i)
            if not _starts_a_chain(computation, i):
                followed[key] = i.name
                return None
            started.add(key)
        dcn = i.opcode == "send"
        groups = place.of_targets(i) if dcn else place.of_pairs(i) if kind == "collective-permute" else place.of_groups(i)
        axes = place.axes(groups)
        size = math.prod(mesh_shape[axis] for axis in axes) if kind == "collective-permute" else groups.shape[-1]
        operands = i.operands[:1] if dcn else i.operands  # the other is a token
        arrays = [array for operand in operands for array in computation.instructions[operand].arrays]
        wire_bytes = _WIRE[kind](sum(array_bytes(array) for array in arrays), size)
        op_name = next((at.op_name for at in (i, *reversed(callers)) if at.op_name), "")
        dtype = "+".join(sorted({array.dtype for array in arrays}))
        return Collective(kind, axes, size, 1, wire_bytes, op_name, (), dtype, dcn, i.name)

    runs = walk(program, read, weight=lambda found: found.wire_bytes)
    for computation in program.computations.values():
        for i in computation.instructions.values():
            if _kind(computation, i) and (computation.name, i.name) not in reached:
                raise ValueError(f"collective {i.name}: it stands in {computation.name}, and how that comes to run is not understood")
    if followed.keys() - started:
        raise ValueError(f"collective {followed[min(followed.keys() - started)]}: part of an asynchronous chain that starts nowhere")
    return [run.found._replace(count=run.times, wire_bytes=run.times * run.found.wire_bytes, loops=run.loops) for run in runs]


def summary(found: Sequence[Collective]) -> list[Traffic]:
    """Counts and bytes by kind, axes and network; the most bytes first. Groups of one send nothing and are left out."""
    rows: dict[tuple[str, tuple[str, ...], bool], Traffic] = {}
    for c in found:
        if c.axes:
            row = rows.get((c.kind, c.axes, c.dcn), Traffic(c.kind, c.axes, c.dcn, 0, 0.0))
            rows[row[:3]] = row._replace(count=row.count + c.count, wire_bytes=row.wire_bytes + c.wire_bytes)
    return sorted(rows.values(), key=lambda row: -row.wire_bytes)


def array_bytes(array: ArrayType) -> float:
    """Bytes of an array's elements; of a type that holds none (a token) 0."""
    if array.dtype in ("token", "opaque"):
        return 0
    bits = re.match(r"(?:f|bf|s|u|c)(\d+)", array.dtype)
    if bits is None and array.dtype != "pred":
        raise ValueError(f"no rule for the size of an XLA array of type {array.dtype!r}")
    return math.prod(array.shape) * (int(bits[1]) / 8 if bits else 1)


# -------------------------------------------------------------------------------------------------------------- which collective it is


def _kind(computation: Computation, i: Instruction) -> str | None:
    """None: not a collective, or the second half of one."""
    if i.opcode == "send" and "_xla_megascale" in i.attributes:
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
        if transfer is None or transfer[1] not in _MEGASCALE:
            raise ValueError(f"collective {i.name}: no rule for its transfer type between slices: {i.attributes[:300]}")
        return _MEGASCALE[transfer[1]]
    if i.opcode in ("send", "recv"):
        if "is_host_transfer=true" not in i.attributes:
            raise ValueError(f"collective {i.name}: no rule for a {i.opcode} from device to device")
        return None  # the host's, or the half of a megascale pair that receives
    kind = i.opcode.removesuffix("-start")
    if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
        return "reduce-scatter"
    if kind in _WIRE:
        if "slice_sizes=" in i.attributes:
            raise ValueError(f"collective {i.name}: no rule for a {i.opcode} of slices in place")
        return kind
    if re.match(r"all-|reduce-scatter|collective-|ragged-all", i.opcode) and not i.opcode.endswith("-done"):
        raise ValueError(f"collective {i.name}: no rule for {i.opcode}")
    return None


def _channel(i: Instruction) -> str:
    channel = re.search(r"\bchannel_id=(\d+)", i.attributes)
    return channel[1] if channel else ""


def _starts_a_chain(computation: Computation, i: Instruction) -> bool:
    return any(
        i.name in other.operands and 'custom_call_target="AsyncCollectiveStart"' in other.attributes
        for other in computation.instructions.values()
    )


# -------------------------------------------------------------------------------------------------------------- which devices take part


class _Placement:
    """Where the devices that a program's text names stand in the mesh. Groups are arrays [..., n] of positions in the flat mesh."""

    def __init__(self, program: Program, mesh_shape: Mapping[str, int], device_ids: Sequence[int]):
        self.mesh_shape = dict(mesh_shape)
        self.device_ids = list(device_ids)
        devices = math.prod(self.mesh_shape.values())
        named = {key: int(n) for key, n in re.findall(r"\b(num_partitions|replica_count)=(\d+)", program.header)}
        self.replicas, self.partitions = named.get("replica_count", 1), named.get("num_partitions", 1)
        taking_part = self.replicas * self.partitions
        if taking_part == devices:
            self.positions_SxP = np.arange(devices)[None]
            return
        if self.device_ids and len(self.device_ids) != devices:
            raise ValueError(f"{len(self.device_ids)} device ids, but the mesh {self.mesh_shape} has {devices} devices")
        slices = np.asarray(self.device_ids, int) // _SLICE
        if not self.device_ids or any(np.sum(slices == s) != taking_part for s in slices):
            hint = "" if self.device_ids else "; of a program for several slices give device_ids"
            raise ValueError(f"the program is for {taking_part} devices, but the mesh {self.mesh_shape} has {devices}{hint}")
        self.positions_SxP = np.stack([np.flatnonzero(slices == s) for s in np.unique(slices)])

    def axes(self, groups: np.ndarray) -> tuple[str, ...]:
        """The axes along which devices of a group differ."""
        coordinates = np.unravel_index(groups, tuple(self.mesh_shape.values()))
        return tuple(axis for axis, at in zip(self.mesh_shape, coordinates, strict=True) if np.any(at != at[..., :1]))

    def of_pairs(self, i: Instruction) -> np.ndarray:
        """Of a collective-permute: [slices, pairs, 2]."""
        pairs = re.search(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", i.attributes)
        if pairs is None:
            raise ValueError(f"collective {i.name}: its source_target_pairs are of an unknown form")
        return self._positions(i, np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2))

    def of_groups(self, i: Instruction) -> np.ndarray:
        """[slices, groups, n]. Without a channel the devices that are named are replicas, which are one each in a partitioned program."""
        ids = _replica_groups(i)
        by_replica = not _channel(i)
        if by_replica and self.replicas == 1:
            return self.positions_SxP[..., None]
        if not by_replica and not i.opcode.startswith("all-to-all") and "use_global_device_ids=true" not in i.attributes:
            raise ValueError(f"collective {i.name}: no rule for groups across replicas and partitions (no use_global_device_ids)")
        if by_replica and self.partitions > 1:
            raise ValueError(f"collective {i.name}: no rule for groups of replicas in a program of several replicas and partitions")
        return self._positions(i, np.arange(self.replicas * self.partitions)[None] if ids.size == 0 else ids)

    def of_targets(self, i: Instruction) -> np.ndarray:
        """Of a transfer between slices: [groups, n], from `"{1,2}x{0:7}"`, `{{id,id},...}` or `{{id->id},...}`."""
        target = re.search(r"_xla_megascale_target=(\"\{([\d,]+)\}x\{(\d+):(\d+)\}\"|\{(?:\{\d+(?:(?:,|->)\d+)*\},?)+\})", i.attributes)
        if target is None:
            raise ValueError(f"collective {i.name}: its devices in other slices are of an unknown form: {i.attributes[:300]}")
        if target[2]:
            slices = np.array(target[2].split(","), int)
            ids = _SLICE * slices + np.arange(int(target[3]), int(target[4]) + 1)[:, None]
        else:
            ids = _rectangle(i, [re.findall(r"\d+", group) for group in re.findall(r"\{([^{}]+)\}", target[1])])
        position = {device: at for at, device in enumerate(self.device_ids)}
        if not np.isin(ids, self.device_ids).all():
            raise ValueError(f"collective {i.name}: names devices that are not in device_ids")
        return np.vectorize(position.__getitem__)(ids)

    def _positions(self, i: Instruction, ids: np.ndarray) -> np.ndarray:
        if ids.size and ids.max() >= self.positions_SxP.shape[1]:
            raise ValueError(f"collective {i.name}: names device {ids.max()}, but the program is for {self.positions_SxP.shape[1]}")
        return self.positions_SxP[:, ids]


def _replica_groups(i: Instruction) -> np.ndarray:
    """[groups, n] of ids; empty for `{}`, which means all in one group. XLA writes them in three ways.

    {{0,1},{2,3}}
    [2,2]<=[2,2]T(1,0)                                            an iota of the second shape, transposed, reshaped to the first
    mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x','y':(1)2}    along axes, or parts of axes, of a mesh of its own
    """
    text = i.attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{((?:\{[\d,]*\},?)*)\}", text):
        return _rectangle(i, [group.split(",") for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[2]).reshape(_ints(iota[1]))
    if mesh := re.match(r"mesh\[([^\]]+)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = np.arange(math.prod(sizes.values()))
        if mesh[2]:
            ids = _iota(mesh[2]) if "T(" in mesh[2] else np.array(_ints(mesh[2]))
        along = [(name, _ints(part)) for name, part in re.findall(r"'([^']+)'(?::\((\d+\)\d+))?", mesh[3])]
        # Every axis is cut into what stands before the part, the part, and what stands after; the part moves to the end.
        shape, moved = [], []
        for name, size in sizes.items():
            before, part = next((part or [1, size] for axis, part in along if axis == name), [size, 1])
            moved += [len(shape) + 1] if any(axis == name for axis, _ in along) else []
            shape += [before, part, size // (before * part)]
        if len(moved) == len(along) and ids.size == math.prod(shape):
            n = math.prod(shape[k] for k in moved)
            stay = [k for k in range(len(shape)) if k not in moved]
            return ids.reshape(shape).transpose(stay + moved).reshape(-1, n)
    raise ValueError(f"collective {i.name}: its replica_groups are of an unknown form: {text[:200]}")


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`, flat."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (ids.transpose(_ints(order)) if order else ids).ravel()


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _rectangle(i: Instruction, groups: list[list[str]]) -> np.ndarray:
    if len({len(group) for group in groups}) > 1:
        raise ValueError(f"collective {i.name}: no rule for groups of different sizes")
    return np.array(groups, int)
