"""A group of runs that train together, compiled for a slice that is not there."""

import math
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.mesh import make_mesh
from scaling_jax.pods.chips import Topology
from scaling_jax.pods.compile import CompiledStep, compile_traced, resolved, topology_devices


def compile_group(
    config: ConfigDict, members: int, topology: Topology, population: Callable[[ConfigDict, int, Mesh], Any], measure: bool | None = None
) -> CompiledStep:
    """Compiles the step of runs that differ in values alone; `scaling_jax.pods.compile.prepare` must have been called.

    Args:
      config: of any of them, valid; its mesh is that of one member, and the devices that it leaves lie along the axis `member`.
      members: that train together; filled up to a multiple of that axis, as a group is that trains.
      topology: one slice.
      population: makes what is compiled, `population(config, members, mesh)`: it has `trace_step` and, of one run, `trainer`
        (`scaling_jax.sweep.population.Population`).
      measure: whether the step measures noise; by default as the config says.

    Raises:
      UserError: the config does not fit the topology's devices.
      DoesNotFit: the program does not fit their memory.
    """
    devices = topology_devices(topology)
    mesh = config.mesh
    own = math.prod((mesh.replica, mesh.fsdp, mesh.tensor)) if mesh.fsdp > 0 else len(devices)
    if topology.slices > 1 or len(devices) % own:
        raise UserError(
            f"config.mesh is replica {mesh.replica} x fsdp {mesh.fsdp} x tensor {mesh.tensor} = {own} devices for each member: must divide "
            f"the {len(devices)} of one slice, --topology={topology.name}"
        )
    along = len(devices) // own
    config = resolved(config, topology, own)
    members = -(-members // along) * along
    measure = bool(config.noise_scale.every) if measure is None else measure
    made = population(config, members, make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor, along, devices))
    return compile_traced(made.trace_step(config_lib.sequences_per_batch(config), measure), made.trainer, topology, measure, members)
