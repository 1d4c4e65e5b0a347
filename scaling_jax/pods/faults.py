"""What must not be in a step that is to run on a pod: faults of a compiled program's collectives, by name."""

from collections.abc import Mapping, Sequence

from scaling_jax.pods.collectives import Collective
from scaling_jax.pods.traffic import Least

NEGLIGIBLE = 1e-3  # of all bytes on the wire: scalars, squared norms, token ids
WEIGHTS, ALL = 1.2, 1.3  # allowed times the least


def faults(collectives: Sequence[Collective], least: Least, depth: int) -> list[str]:
    """One line for each fault, empty where there is none.

    - A collective over a wider group of devices than one axis: the partitioner has lost track of a layout.
    - An all-to-all inside the loop over blocks.
    - More bytes along replica and fsdp than weights and gradients need (times WEIGHTS), or in all (times ALL): something else than they,
      such as activations, travels there.

    Args:
      collectives: of the program.
      least: of the same step.
      depth: blocks of the model; a loop of about so many iterations is the loop over blocks.
    """
    total = sum(c.wire_bytes for c in collectives)
    found = []
    for c in collectives:
        what = f"{c.kind} over {'+'.join(c.axes)}, {c.count} times, {c.wire_bytes / 1e9:.3g} GB, {c.dtype} ({c.op_name or c.name})"
        if len(c.axes) > 1 and c.wire_bytes > NEGLIGIBLE * total:
            found.append(f"wider than one axis: {what}")
        if c.kind == "all-to-all" and any(loop.trips >= depth - 2 for loop in c.loops) and depth > 2:
            found.append(f"all-to-all inside the loop over blocks: {what}")
    of_weights = sum(c.wire_bytes for c in collectives if "tensor" not in c.axes)
    for name, bytes_, wanted in (
        ("along replica and fsdp", of_weights, WEIGHTS * least.of_weights + least.embedding),
        ("in all", total, ALL * least.total),
    ):
        if bytes_ > wanted * (1 + NEGLIGIBLE):
            found.append(f"{name} {bytes_ / 1e9:.4g} GB, where {wanted / 1e9:.4g} GB are allowed")
    return found


def grown(small: Sequence[Collective], large: Sequence[Collective], factor: float) -> dict[tuple[str, ...], float]:
    """Of a step, and the same with `factor` times the batch: bytes, by axes, that grew although they are not along tensor.

    What depends on the batch has its share of the bytes multiplied; weights and gradients stay. So the growth over (factor − 1) is what
    depends on it.
    """
    before, after = _by_axes(small), _by_axes(large)
    return {axes: (after[axes] - before.get(axes, 0.0)) / (factor - 1) for axes in after if "tensor" not in axes}


def _by_axes(collectives: Sequence[Collective]) -> Mapping[tuple[str, ...], float]:
    sums: dict[tuple[str, ...], float] = {}
    for c in collectives:
        sums[c.axes] = sums.get(c.axes, 0.0) + c.wire_bytes
    return sums
