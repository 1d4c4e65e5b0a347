"""The layout of a step on a pod that is fastest of those that fit: predicted for all, then compiled for the best.

A layout is what a config may change without another run coming of it: the mesh, what is computed again, and into how many
microbatches the batch is cut. `train.batch_tokens` is not changed; a device's share of it follows.

Times are predicted as `pods.roofline` takes them of a compiled program, from the least traffic (`pods.traffic`) and from the products that
the model has. Memory is predicted by `predicted_bytes`, which says how well. Only what the compiler says of the best is believed.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.fields import FIELDS
from scaling_jax.mesh import make_mesh
from scaling_jax.pods.chips import Topology
from scaling_jax.pods.compile import CompiledStep, DoesNotFit, compile_step, topology_devices
from scaling_jax.pods.predict import predicted_bytes, predicted_flops, state_bytes
from scaling_jax.pods.roofline import Roofline, least_hbm_bytes, roofline, route
from scaling_jax.pods.traffic import least_traffic
from scaling_jax.train.step import Trainer, transformer_config

SLACK = 1.15  # of the capacity: what is predicted to need up to so much is tried
FLAGS = ("mesh.replica", "mesh.fsdp", "mesh.tensor", "model.remat", "train.accumulation")  # a layout


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to carry out the step, as predicted; bytes of one device."""

    config: ConfigDict
    memory_bytes: float
    memory_share: float  # of the capacity
    wire_bytes: float  # the mesh's least
    roofline: Roofline
    fsdp_dimensions: int  # of the torus, that a group along fsdp spans

    @property
    def flags(self) -> dict[str, str | int]:
        return layout_of(self.config)

    @property
    def order(self) -> tuple[float, ...]:
        """Of two layouts the lesser is the better one.

        The bound comes first, to three digits. Then fsdp along one dimension of the torus, as several whole ones make XLA reduce gradients
        twice (below); then the sum of all times, for nothing overlaps in full; then memory.
        """
        times = self.roofline[:4]
        return float(f"{max(times):.2e}"), float(self.fsdp_dimensions > 1), sum(times), self.memory_bytes


class Tried(NamedTuple):
    """A layout and what the compiler made of it: a step, or why there is none."""

    layout: Layout
    step: CompiledStep | None
    reason: str = ""

    @property
    def fits(self) -> bool:
        return self.step is not None and self.step.memory.share <= 1

    @property
    def order(self) -> tuple[float, ...]:
        """What fits first, then as `Layout.order`, but compiled."""
        if self.step is None:
            return 1.0, math.inf
        times = self.step.roofline[:4]
        return float(not self.fits), float(f"{max(times):.2e}"), sum(times)


def layout_of(config: ConfigDict) -> dict[str, str | int]:
    """The fields of FLAGS and their values."""
    values = config_lib.flatten(config)
    return {name: values[name] for name in FLAGS}


def layouts(config: ConfigDict, topology: Topology) -> list[Layout]:
    """Every valid layout of a config on a topology, the best as predicted first; `pods.compile.prepare` must have been called.

    Raises:
      UserError: there is none.
    """
    devices = topology_devices(topology)
    params = Trainer(config).abstract_state.params
    found = []
    for mesh_config in _meshes(config, topology, len(devices)):
        axes = [mesh_config.mesh[axis] for axis in ("replica", "fsdp", "tensor", "member")]
        mesh = make_mesh(*axes, devices=devices)
        way = route(topology, mesh, ("fsdp",))
        for accumulation, remat in itertools.product(_accumulations(mesh_config), FIELDS["model.remat"].choices):
            candidate = mesh_config.copy_and_resolve_references()
            candidate.train.accumulation, candidate.model.remat = accumulation, remat
            least = least_traffic(candidate, params)
            if way.whole > 1:  # XLA then adds gradients up everywhere and cuts the sum, which is twice the bytes
                least = least._replace(gradients=2 * least.gradients)
            state, needed = state_bytes(candidate, params), predicted_bytes(candidate, params)
            moved = least_hbm_bytes(state, state, accumulation * (needed - state))  # every microbatch writes anew
            model_flops = transformer_config(candidate).causal_flops_per_token * candidate.train.batch_tokens
            sent = least.collectives(mesh.shape, topology.slices)
            times = roofline(topology, mesh, predicted_flops(candidate), moved, sent, model_flops)
            share = needed / topology.chip.compiler_hbm_bytes
            found.append(Layout(candidate, needed, share, least.total, times, len(way.dimensions)))
    if not found:
        sequences = config_lib.sequences_per_batch(config)
        raise UserError(
            f"no mesh of the {len(devices)} devices of --topology={topology.name} divides the config: heads {config_lib.heads(config)}, "
            f"width {config.model.width}, vocab_size {config.model.vocab_size} and batch_tokens, {sequences} sequences"
        )
    return sorted(found, key=lambda layout: layout.order)


def _meshes(config: ConfigDict, topology: Topology, devices: int) -> Iterator[ConfigDict]:
    """The config with every mesh that is valid without accumulation."""
    for fsdp, tensor in itertools.product(_divisors(devices), repeat=2):
        if devices % (fsdp * tensor) or devices // (fsdp * tensor) % topology.slices:
            continue
        candidate = config.copy_and_resolve_references()
        candidate.mesh.update(replica=devices // (fsdp * tensor), fsdp=fsdp, tensor=tensor)
        candidate.train.accumulation = 1
        try:
            config_lib.validate(candidate, devices)
        except UserError:
            continue
        yield candidate


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _accumulations(config: ConfigDict) -> Iterator[int]:
    """1, 2, 4, … as far as they divide the sequences of every batch that is to come."""
    candidate = config.copy_and_resolve_references()
    for power in itertools.count():
        candidate.train.accumulation = 1 << power
        try:
            config_lib.validate(candidate)
        except UserError:
            return
        yield 1 << power


def find(
    config: ConfigDict, topology: Topology, wanted: int, ranked: list[Layout], compile: Callable[..., CompiledStep] = compile_step
) -> Iterator[Tried]:
    """Compiles layouts, the best first, until so many fit; each is yielded when it is done.

    Left out is what is predicted to need more than SLACK of the capacity, and what is predicted to need more than another with the same
    remat that did not fit. If all are to be left out, the smallest is tried.
    """
    tried = [layout for layout in ranked if layout.memory_share <= SLACK] or [min(ranked, key=lambda layout: layout.memory_bytes)]
    too_much: dict[str, float] = {}
    fitting = 0
    for layout in tried:
        remat = layout.config.model.remat
        if fitting == wanted or layout.memory_bytes >= too_much.get(remat, math.inf):
            continue
        try:
            result = Tried(layout, compile(layout.config, topology))
        except DoesNotFit as error:
            result = Tried(layout, None, f"does not fit: {error}")
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            result = Tried(layout, None, f"the compiler fails, or its program is not understood: {str(error).splitlines()[0]}")
        if result.fits:
            fitting += 1
        elif result.step or result.reason.startswith("does not fit"):
            too_much[remat] = layout.memory_bytes
        yield result
