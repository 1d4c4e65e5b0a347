"""The least time that a compiled step can take on its chips, and what bounds it.

Williams, Waterman & Patterson 2009, with a line for each network: work divided by the published rate of what does it, as if arithmetic,
memory and both networks ran beside each other without ever waiting. The longest of the four is a bound and no forecast. It errs to the
short side, since it takes that

- every product runs at the rate of bfloat16, at any shape and precision;
- memory is touched as little as `least_hbm_bytes` says;
- a collective uses all links of the torus dimensions that its devices span, evenly and at once, and none of the others (`Route`);
- collectives that have no dimension in common run beside each other; those that have one wait for each other;
- what two devices of one chip (tpu7x) send each other takes no time;
- the chips of a host share its network evenly, and nothing else uses it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from scaling_jax.pods.chips import CUBE, Topology
from scaling_jax.pods.collectives import Collective


class Route(NamedTuple):
    """What a collective along some axes of a mesh has to travel on, within a slice."""

    dimensions: tuple[int, ...]  # of the torus, along which the devices of a group differ
    whole: int  # of these, those that a group has from end to end
    links: int  # that a chip of the group has there, at least: 2 where the group goes once around, else 1, since it has two ends
    devices: int  # of a group
    of_a_chip: int  # devices of a group that are one chip


class Roofline(NamedTuple):
    """Least seconds of one step for each of what it uses, all on every device, and what they allow."""

    compute_s: float
    memory_s: float
    interconnect_s: float  # between the chips of a slice
    network_s: float  # of the data centre, between slices
    interconnect_s_by_axes: dict[tuple[str, ...], float]  # of the collectives along these axes of the mesh, were they alone
    mfu: float  # the highest model-FLOPs utilisation that the step can have (Chowdhery et al. 2022, App. B)

    @property
    def step_s(self) -> float:
        return max(self[:4])

    @property
    def bound(self) -> str:
        """What takes longest: compute, memory, interconnect or network."""
        return max(("compute", "memory", "interconnect", "network"), key=lambda name: getattr(self, f"{name}_s"))


def least_hbm_bytes(argument_bytes: float, output_bytes: float, temp_bytes: float) -> float:
    """Bytes of memory that one device reads and writes in a step, at the least.

    Every argument is read once (parameters, optimizer state, tokens), every output written once (a donated argument is both), every
    temporary written once and read once. What a layer reads again, and memory that serves several temporaries in turn, is not seen: the
    true number is larger by far. The three sizes are those of `compiled.memory_analysis()`: argument_size_in_bytes, output_size_in_bytes,
    temp_size_in_bytes (as allocated, with padding).
    """
    return argument_bytes + output_bytes + 2 * temp_bytes


def route(topology: Topology, mesh: Mesh, axes: Sequence[str]) -> Route:
    """Of a collective along these axes. All groups lie alike on the torus; the first is looked at.

    Args:
      topology: that the mesh's devices are of.
      mesh: of devices with `coords` and, where there are several slices, `slice_index`.
    """
    group = mesh.devices[tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)].ravel()
    slices = [getattr(device, "slice_index", None) for device in group]
    places = np.array([device.coords for device, at in zip(group, slices, strict=True) if at == slices[0]])
    extents = {k: len(np.unique(places[:, k])) for k in range(len(topology.shape))}
    spanned = tuple(k for k, extent in extents.items() if extent > 1)
    whole = [k for k in spanned if extents[k] == topology.shape[k]]
    links = len(spanned) + sum(_closed(topology, k) for k in whole)
    return Route(spanned, len(whole), links, len(places), len(places) // len(np.unique(places, axis=0)))


def _closed(topology: Topology, dimension: int) -> bool:
    """Whether the torus closes there: of cubes every dimension, of a plane the one of full length."""
    if topology.chip.torus_dimensions == 2:
        return topology.shape[dimension] == 16
    return all(side % CUBE == 0 for side in topology.shape)


def roofline(
    topology: Topology, mesh: Mesh, flops: float, hbm_bytes: float, collectives: Sequence[Collective], model_flops: float
) -> Roofline:
    """Times of one step and its highest model-FLOPs utilisation.

    Args:
      topology: all slices of chips that the step runs on.
      mesh: of all their devices; where a chip is several devices (tpu7x), they share what it has.
      flops: that one device carries out: `pods.flops.dot_flops` and the arithmetic of its kernels.
      hbm_bytes: that one device moves, see `least_hbm_bytes`.
      collectives: from `pods.collectives.collectives`.
      model_flops: of the whole batch: the model's `flops_per_token` times tokens. What a step computes again counts in `flops` only.

    Raises:
      ValueError: the devices are not one or several for each chip.
    """
    if mesh.size < 1 or mesh.size % topology.chips:
        raise ValueError(f"{mesh.size} devices cannot be shared evenly by the {topology.chips} chips of {topology.name}")
    chip, devices_per_chip = topology.chip, mesh.size // topology.chips
    by_axes: dict[tuple[str, ...], float] = {}
    network_bytes = 0.0
    for c in collectives:
        if c.dcn:
            network_bytes += c.wire_bytes * devices_per_chip
        elif c.axes:
            by_axes.setdefault(c.axes, 0.0)
    routes = {axes: route(topology, mesh, axes) for axes in by_axes}
    for c in collectives:
        if c.axes and not c.dcn and routes[c.axes].links:
            sent = _leaves_chip(c, routes[c.axes]) * devices_per_chip
            by_axes[c.axes] += sent / (routes[c.axes].links * chip.ici_link_bytes_per_s)
    busy = [sum(seconds for axes, seconds in by_axes.items() if k in routes[axes].dimensions) for k in range(len(topology.shape))]
    times = (
        flops * devices_per_chip / chip.flops_bf16,
        hbm_bytes * devices_per_chip / chip.hbm_bytes_per_s,
        max(busy),
        network_bytes / (chip.dcn_bytes_per_s / chip.chips_per_host),
    )
    return Roofline(*times, by_axes, model_flops / (max(times) * chip.flops_bf16 * topology.chips))


def _leaves_chip(c: Collective, way: Route) -> float:
    """Of what one device sends, its share of what must leave the chip.

    What devices of one chip gather is the same, and what they scatter they can add up first: only an all-to-all has other bytes for each.
    """
    outside = (way.devices - way.of_a_chip) / (way.devices - 1)
    return c.wire_bytes * outside / (1 if c.kind == "all-to-all" else way.of_a_chip)
