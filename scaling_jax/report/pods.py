"""What a compiled step comes to, and the layouts of a search, as text and as plain values."""

from collections.abc import Sequence
from typing import Any

from scaling_jax import batch_schedule
from scaling_jax.pods.collectives import summary
from scaling_jax.pods.compile import CompiledStep, human_bytes
from scaling_jax.pods.find import FLAGS, Layout, Tried
from scaling_jax.pods.roofline import Roofline
from scaling_jax.train.batch_size import microbatches
from scaling_jax.train.metrics import human
from scaling_jax.train.step import transformer_config

NEGLIGIBLE = 1e-3  # of all bytes on the wire: scalars, norms, token ids


def pod_table(step: CompiledStep) -> str:
    """All of it, a line or a few for each subject."""
    config, topology, roof = step.config, step.topology, step.roofline
    model, mesh = transformer_config(config), config.mesh
    several = f"{topology.slices} slices of " if topology.slices > 1 else ""
    cell = config.train.batch_tokens // config.model.context // (mesh.replica * mesh.fsdp)
    rows = [
        ("topology", f"{several}{topology.name}, {topology.chips:,} chips on {topology.hosts:,} hosts, {step.devices:,} devices"),
        ("mesh", f"replica {mesh.replica} x fsdp {mesh.fsdp} x tensor {mesh.tensor}{_member_axis(step)}"),
        ("model", f"N {human(model.params)}, {human(step.total_params)} parameters in all"),
        ("step", f"{config.train.batch_tokens:,} tokens, {cell} sequences of {config.model.context:,} for each of replica x fsdp"),
        (
            "",
            f"remat {config.model.remat}, accumulation {config.train.accumulation}, noise {'' if step.measured else 'not '}measured",
        ),
        *([("members", f"{step.members} that train together; batch, model and budget are those of each")] if step.members > 1 else []),
        *_batch_rows(step),
        ("compiled in", f"{step.compile_s:.0f} s"),
        *_memory_rows(step),
        (
            "FLOPs a device",
            f"{step.product_flops:.4e} in products ({step.product_flops / step.traced_flops:.4f} of the traced program's share),",
        ),
        ("", f"{step.kernel_flops:.3e} in attention kernels (by arithmetic)"),
        *_traffic_rows(step),
        ("least times", f"compute {_ms(roof.compute_s)}, memory {_ms(roof.memory_s)}, interconnect {_ms(roof.interconnect_s)},"),
        ("", f"data-centre network {_ms(roof.network_s)}; {roof.bound} bounds"),
        (
            "utilisation",
            f"at most {roof.mfu:.0%} of {topology.chip.name}'s {topology.chip.flops_bf16 / 1e12:.0f} TFLOP/s, in the model's FLOPs "
            "(attention counted causally)",
        ),
        ("speed", f"at most {human(step.tokens_per_second)} tokens/s{', all members together' if step.members > 1 else ''}"),
        (
            "the run",
            f"{human(config.train.tokens)} tokens: at least {_long(step.seconds)}, {step.seconds / 3600 * topology.chips:,.0f} chip-hours",
        ),
    ]
    rows += [("fault", fault) for fault in step.faults]
    rows.append(("rates from", topology.chip.source))
    return "\n".join(f"{name:<16}{text}" for name, text in rows)


def _member_axis(step: CompiledStep) -> str:
    return f" x member {step.mesh.shape['member']}" if step.members > 1 else ""


def _batch_rows(step: CompiledStep) -> list[tuple[str, str]]:
    """What was not compiled, where the batch changes in the course of the run."""
    config = step.config
    if config.batch.schedule == "constant":
        return []
    stages = batch_schedule.stages(config)
    largest = batch_schedule.max_tokens(config) if config.batch.schedule == "follow" else max([s.batch_tokens for s in stages])
    later = microbatches(config, largest // config.model.context)
    return [
        ("", f"batch.schedule is {config.batch.schedule}: this is its first batch; one of {largest:,} tokens takes {later} microbatches")
    ]


def _memory_rows(step: CompiledStep) -> list[tuple[str, str]]:
    memory, of_chip = step.memory, step.topology.chip.devices_per_chip
    fits = "fits" if memory.share <= 1 else "DOES NOT FIT"
    each = "device, two to a chip" if of_chip == 2 else "chip"
    return [
        (
            "memory",
            f"{human_bytes(memory.peak + memory.code)} at the peak of {human_bytes(memory.capacity)} a {each}, {memory.share:.0%}: {fits}",
        ),
        ("", f"arguments {human_bytes(memory.arguments)}, temporaries {human_bytes(memory.temporaries)}, code {human_bytes(memory.code)}"),
    ]


def _traffic_rows(step: CompiledStep) -> list[tuple[str, str]]:
    """Kinds of collectives that matter, and all of them against the least."""
    found = summary(step.collectives)
    matter = [t for t in found if t.wire_bytes > NEGLIGIBLE * step.wire_bytes or t.dcn]
    rows = []
    for traffic in matter:
        where = "+".join(traffic.axes) + (", between slices" if traffic.dcn else "")
        rows.append(f"{traffic.kind:<20}{where:<24}{traffic.count:>6,} x {human_bytes(traffic.wire_bytes):>9}")
    left = len(found) - len(matter)
    rows.append(
        f"in all {human_bytes(step.wire_bytes)} sent by a device, {step.wire_bytes / max(1, step.least.total):.2f} of the mesh's least"
    )
    if left:
        rows[-1] += f"; {left} kinds below a thousandth of it not listed"
    return [("collectives" if i == 0 else "", row) for i, row in enumerate(rows)]


def pod_json(step: CompiledStep) -> dict[str, Any]:
    """The same as plain values; bytes, FLOPs and seconds of one device and step."""
    config, topology, roof, memory = step.config, step.topology, step.roofline, step.memory
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "hosts": topology.hosts,
        "devices": step.devices,
        "mesh": {axis: config.mesh[axis] for axis in ("replica", "fsdp", "tensor")},
        "remat": config.model.remat,
        "accumulation": config.train.accumulation,
        "batch_tokens": config.train.batch_tokens,
        "measured": step.measured,
        "members": step.members,
        "params": transformer_config(config).params,
        "total_params": step.total_params,
        "compile_s": round(step.compile_s, 1),
        "memory": {name: getattr(memory, name) for name in ("arguments", "outputs", "temporaries", "code", "peak", "capacity")},
        "memory_share": memory.share,
        "fits": memory.share <= 1,
        "product_flops": step.product_flops,
        "traced_flops": step.traced_flops,
        "kernel_flops": step.kernel_flops,
        "collectives": [traffic._asdict() | {"axes": list(traffic.axes)} for traffic in summary(step.collectives)],
        "wire_bytes": step.wire_bytes,
        "least_bytes": step.least._asdict() | {"total": step.least.total},
        "times_s": _times(roof),
        "bound": roof.bound,
        "mfu_bound": roof.mfu,
        "tokens_per_second_bound": step.tokens_per_second,
        "days_bound": step.seconds / 86400,
        "chip_hours_bound": step.seconds / 3600 * topology.chips,
        "faults": step.faults,
    }


def _times(roof: Roofline) -> dict[str, float]:
    return {name: getattr(roof, f"{name}_s") for name in ("compute", "memory", "interconnect", "network")}


def tried_line(tried: Tried) -> str:
    """What the compiler made of one layout."""
    step, flags = tried.step, tried.layout.flags
    name = f"{_mesh(flags)}, remat {flags['model.remat']}, accumulation {flags['train.accumulation']}"
    if step is None:
        return f"{name}: {tried.reason}"
    found = "fits" if tried.fits else "does not fit"
    return f"{name}: {found}, {human_bytes(step.memory.peak + step.memory.code)}, at least {_ms(step.roofline.step_s)} a step"


def _mesh(flags: dict[str, str | int]) -> str:
    return " x ".join(f"{axis} {flags[f'mesh.{axis}']}" for axis in ("replica", "fsdp", "tensor"))


HEADER = (
    "replica",
    "fsdp",
    "tensor",
    "remat",
    "microbatches",
    "memory",
    "(predicted)",
    "least time",
    "(predicted)",
    "MFU",
    "x least",
    "faults",
)


def find_table(tried: Sequence[Tried], ranked: Sequence[Layout], more: int = 5) -> str:
    """The ranking: what was compiled, the best first; then some that are only predicted, to fit as well; then the flags of the best."""
    rows = [HEADER]
    for one in sorted(tried, key=lambda one: one.order):
        rows.append(_row(one.layout, one.step))
    seen = [one.layout for one in tried]
    rest = [layout for layout in ranked if not any(layout is other for other in seen)]
    shown = [layout for layout in rest if layout.memory_share <= 1][:more]
    rows += [_row(layout, None) for layout in shown]
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEADER))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(rest) > len(shown):
        lines.append(f"and {len(rest) - len(shown)} more layouts, predicted to be slower or too large")
    return "\n".join([*lines, "", best_line(tried)])


def best_line(tried: Sequence[Tried]) -> str:
    """The flags to give."""
    fitting = [one for one in tried if one.fits]
    if not fitting:
        return "none fits" if tried else "none was compiled"
    flags = min(fitting, key=lambda one: one.order).layout.flags
    return " ".join(["best:", *(f"--config.{name}={flags[name]}" for name in FLAGS)])


def _row(layout: Layout, step: CompiledStep | None) -> tuple[str, ...]:
    flags = [str(value) for value in layout.flags.values()]
    predicted = human_bytes(layout.memory_bytes), _ms(layout.roofline.step_s)
    if step is None:
        return (*flags, "-", predicted[0], "-", predicted[1], f"{layout.roofline.mfu:.0%}", "-", "-")
    memory, roof = human_bytes(step.memory.peak + step.memory.code), step.roofline
    over = f"{step.wire_bytes / step.least.total:.2f}" if step.least.total else "-"
    return (*flags, memory, predicted[0], _ms(roof.step_s), predicted[1], f"{roof.mfu:.0%}", over, str(len(step.faults)))


def find_json(tried: Sequence[Tried], ranked: Sequence[Layout]) -> dict[str, Any]:
    """The whole ranking as plain values: what was compiled, the best first, then all other layouts as predicted."""
    seen = [one.layout for one in tried]
    rest = [Tried(layout, None, "not compiled") for layout in ranked if not any(layout is other for other in seen)]
    return {
        "best": best_line(tried),
        "ranking": [
            {
                "layout": one.layout.flags,
                "predicted": {
                    "memory_bytes": one.layout.memory_bytes,
                    "memory_share": one.layout.memory_share,
                    "wire_bytes": one.layout.wire_bytes,
                    "times_s": _times(one.layout.roofline),
                    "bound": one.layout.roofline.bound,
                    "mfu_bound": one.layout.roofline.mfu,
                },
                "fits": one.fits if one.step or one.reason != "not compiled" else None,
                "reason": one.reason,
                "compiled": pod_json(one.step) if one.step else None,
            }
            for one in [*sorted(tried, key=lambda one: one.order), *rest]
        ],
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _long(seconds: float) -> str:
    return (
        f"{seconds / 86400:.1f} days"
        if seconds > 86400
        else f"{seconds / 3600:.1f} hours"
        if seconds > 3600
        else f"{seconds / 60:.1f} minutes"
    )
