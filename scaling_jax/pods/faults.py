"""What must not be in a step that is to run on a pod: faults of a compiled program's collectives, by name."""

from collections.abc import Sequence

from scaling_jax.pods.collectives import Collective, Traffic, summary
from scaling_jax.pods.traffic import Least

NEGLIGIBLE = 1e-3  # of all bytes on the wire: scalars, squared norms, token ids
WEIGHTS, ALL = 1.2, 1.3  # allowed times the least


def faults(collectives: Sequence[Collective], least: Least, depth: int, accumulation: int = 1) -> list[str]:
    """One line for each fault, empty where there is none.

    - A collective over a wider group of devices than one axis: the partitioner has lost track of a layout.
    - A collective between members of a group that trains together: they have nothing to tell each other.
    - An all-to-all inside the loop over blocks.
    - More bytes along replica and fsdp than weights and gradients need (times WEIGHTS), or in all (times ALL): something else than they,
      such as activations, travels there.

    Args:
      collectives: of the program.
      least: of the same step.
      depth: blocks of the model; a loop of about so many iterations is the loop over blocks.
      accumulation: microbatches; an outermost loop of so many iterations is the loop over them.
    """
    total = sum(c.wire_bytes for c in collectives)
    found = []
    for c in collectives:
        what = f"{c.kind} over {'+'.join(c.axes)}, {c.count} times, {c.wire_bytes / 1e9:.3g} GB, {c.dtype} ({c.op_name or c.name})"
        if len(c.axes) > 1 and c.wire_bytes > NEGLIGIBLE * total:
            found.append(f"wider than one axis: {what}")
        if "member" in c.axes:
            found.append(f"between members: {what}")
        loops = c.loops[1:] if accumulation > 1 and c.loops and c.loops[0].trips == accumulation else c.loops
        if c.kind == "all-to-all" and any(loop.trips >= depth - 2 for loop in loops) and depth > 2:
            found.append(f"all-to-all inside the loop over blocks: {what}")
    of_weights = sum(c.wire_bytes for c in collectives if "tensor" not in c.axes)
    for name, bytes_, wanted in (
        ("along replica and fsdp", of_weights, WEIGHTS * least.of_weights + least.embedding),
        ("in all", total, ALL * least.total),
    ):
        if bytes_ > wanted * (1 + NEGLIGIBLE):
            found.append(f"{name} {bytes_ / 1e9:.4g} GB, where {wanted / 1e9:.4g} GB are allowed")
    return found


def grown(before: Sequence[Collective], after: Sequence[Collective]) -> list[Traffic]:
    """What one program sends more than another, by kind and axes, where it is not negligible.

    Of two steps that differ in the batch alone it is what carries activations; along replica and fsdp that should be the embedding's
    exchange (an all-to-all) and nothing else.
    """
    had = {row[:3]: row.wire_bytes for row in summary(before)}
    total = sum(c.wire_bytes for c in after)
    more = [row._replace(wire_bytes=row.wire_bytes - had.get(row[:3], 0.0)) for row in summary(after)]
    return [row for row in more if row.wire_bytes > NEGLIGIBLE * total]
