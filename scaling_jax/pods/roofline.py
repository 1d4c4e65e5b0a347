"""The least time that a compiled step can take on its chips, and what bounds it.

Williams, Waterman & Patterson 2009, with a line for each network: work divided by the published rate of what does it, as if arithmetic,
memory and both networks ran beside each other without ever waiting. The longest of the four is a bound and no forecast. It errs to the
short side, since it takes that

- every product runs at the rate of bfloat16, at any shape and precision;
- memory is touched as little as `least_hbm_bytes` says;
- all links of a chip send at once, whatever axis of the mesh a collective is along; that a link joins two devices of one chip (tpu7x) and
  is faster is not known here;
- the chips of a host share its network evenly, and nothing else uses it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from scaling_jax.pods.chips import Topology
from scaling_jax.pods.collectives import Collective


class Roofline(NamedTuple):
    """Least seconds of one step for each of what it uses, all on every device, and what they allow."""

    compute_s: float
    memory_s: float
    interconnect_s: float  # between the chips of a slice
    network_s: float  # of the data centre, between slices
    interconnect_s_by_axes: dict[tuple[str, ...], float]  # the same, of the collectives along these axes of the mesh
    mfu: float  # the highest model-FLOPs utilisation that the step can have (Chowdhery et al. 2022, App. B)

    @property
    def step_s(self) -> float:
        return max(self[:4])

    @property
    def bound(self) -> str:
        """What takes longest: compute, memory, interconnect or network."""
        return max(("compute", "memory", "interconnect", "network"), key=lambda name: getattr(self, f"{name}_s"))


def least_hbm_bytes(argument_bytes: int, output_bytes: int, temp_bytes: int) -> int:
    """Bytes of memory that one device reads and writes in a step, at the least.

    Every argument is read once (parameters, optimizer state, tokens), every output written once (a donated argument is both), every
    temporary written once and read once. What a layer reads again, and memory that serves several temporaries in turn, is not seen: the
    true number is larger by far. The three sizes are those of `compiled.memory_analysis()`: argument_size_in_bytes, output_size_in_bytes,
    temp_size_in_bytes (as allocated, with padding).
    """
    return argument_bytes + output_bytes + 2 * temp_bytes


def roofline(
    topology: Topology, devices: int, flops: float, hbm_bytes: float, collectives: Sequence[Collective], model_flops: float
) -> Roofline:
    """Times of one step and its highest model-FLOPs utilisation.

    Args:
      topology: all slices of chips that the step runs on.
      devices: of the mesh; where a chip is several devices (tpu7x), they share what it has.
      flops: that one device carries out: `pods.flops.dot_flops` and the arithmetic of its kernels.
      hbm_bytes: that one device moves, see `least_hbm_bytes`.
      collectives: from `pods.collectives.collectives`.
      model_flops: of the whole batch: the model's `flops_per_token` times tokens. What a step computes again counts in `flops` only.

    Raises:
      ValueError: the devices are not one or several for each chip.
    """
    if devices < 1 or devices % topology.chips:
        raise ValueError(f"{devices} devices cannot be shared evenly by the {topology.chips} chips of {topology.name}")
    chip, chips_per_device = topology.chip, topology.chips / devices
    link_rate = chip.ici_bytes_per_s * chips_per_device
    network_rate = chip.dcn_bytes_per_s / chip.chips_per_host * chips_per_device
    by_axes: dict[tuple[str, ...], float] = {}
    for c in collectives:
        if c.axes and not c.dcn:
            by_axes[c.axes] = by_axes.get(c.axes, 0.0) + c.wire_bytes / link_rate
    times = (
        flops / (chip.flops_bf16 * chips_per_device),
        hbm_bytes / (chip.hbm_bytes_per_s * chips_per_device),
        sum(by_axes.values()),
        sum(c.wire_bytes for c in collectives if c.dcn) / network_rate,
    )
    return Roofline(*times, by_axes, model_flops / (max(times) * chip.flops_bf16 * topology.chips))
