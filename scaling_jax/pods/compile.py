"""A training step compiled for a pod that is not there: what it needs, sends, and could at best reach.

XLA's compiler for TPUs works on any x86 machine, from the package libtpu. A config and a topology give the very program that the pod
would run: its memory as the compiler planned it, its products and collectives read from its text, and times from published rates. Nothing
is measured, and no program was ever run on a TPU by this.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.mesh import make_mesh
from scaling_jax.model import BLOCK
from scaling_jax.pods.chips import Topology
from scaling_jax.pods.collectives import Collective, collectives
from scaling_jax.pods.faults import faults
from scaling_jax.pods.flops import dot_flops, jaxpr_dot_flops
from scaling_jax.pods.hlo import pallas_kernels
from scaling_jax.pods.roofline import Roofline, least_hbm_bytes, roofline
from scaling_jax.pods.traffic import Least, least_traffic
from scaling_jax.train.step import Trainer, transformer_config

_ENVIRONMENT = {  # libtpu otherwise asks Google's metadata service who it is, and lets one process load it
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # whatever is compiled for; without one libtpu complains
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}  # of [L, L] by head_dim, in each of splash attention's kernels


class DoesNotFit(Exception):
    """The compiler found no room in memory; the message has its words."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler planned them."""

    arguments: int  # parameters, optimizer state, noise statistics, tokens
    outputs: int  # most of them in the arguments' place
    temporaries: int
    code: int
    peak: int  # of arguments, outputs and temporaries together
    capacity: int

    @property
    def share(self) -> float:
        """Of the capacity that is used at the peak, code included."""
        return (self.peak + self.code) / self.capacity


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step as compiled. FLOPs, bytes and times are of one device and one step."""

    config: ConfigDict
    total_params: int  # of one member
    topology: Topology
    mesh: Mesh
    measured: bool  # whether the step measures the noise scale
    compile_s: float
    memory: Memory
    product_flops: int  # from the compiled text
    traced_flops: float  # the same from the traced program, all devices' share
    kernel_flops: float  # of attention kernels, by arithmetic
    collectives: list[Collective]
    least: Least
    roofline: Roofline
    members: int = 1  # runs that train together; of each of them is what the config says

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def tokens_per_second(self) -> float:
        """All chips together, at most."""
        return self.members * self.config.train.batch_tokens / self.roofline.step_s

    @property
    def seconds(self) -> float:
        """For the whole budget, at least."""
        return self.config.train.tokens / self.config.train.batch_tokens * self.roofline.step_s

    @property
    def faults(self) -> list[str]:
        """Of its collectives: see `scaling_jax.pods.faults`."""
        return faults(self.collectives, self.least, self.config.model.depth, self.config.train.accumulation)

    @property
    def wire_bytes(self) -> float:
        """That one device sends in all."""
        return sum(c.wire_bytes for c in self.collectives)


def prepare() -> None:
    """Makes XLA's TPU compiler available to this process; before JAX's first use of a device.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, which has XLA's compiler for TPUs, is not installed: pip install 'scaling_jax[tpu]' (it needs no TPU)")
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def topology_devices(topology: Topology) -> list[Any]:
    """Devices to compile for; there are none to run on."""
    given: dict[str, Any] = {"num_slices": topology.slices, "chips_per_host_bounds": list(topology.host_shape)}
    if topology.chip.name == "v4":  # by default two devices of half a chip, which no v4 machine shows
        given["chip_config_name"] = "megacore"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **given).devices)


def resolved(config: ConfigDict, topology: Topology, devices: int) -> ConfigDict:
    """A copy with mesh.fsdp resolved for the topology.

    Raises:
      UserError: the config does not fit so many devices.
    """
    config = config.copy_and_resolve_references()
    config_lib.resolve_mesh(config, devices)
    try:
        config_lib.validate(config, devices)
    except UserError as error:
        of = f"{topology.slices} x {topology.name}" if topology.slices > 1 else topology.name
        raise UserError(f"{error}\n(on --topology={of}, {devices} devices)") from None
    if config.mesh.replica % topology.slices:
        raise UserError(f"config.mesh.replica is {config.mesh.replica}: must be a multiple of the slices, --slices={topology.slices}")
    return config


def compile_step(config: ConfigDict, topology: Topology, measure: bool | None = None) -> CompiledStep:
    """Compiles the step of a config for a topology; `prepare` must have been called.

    Args:
      config: valid; mesh.fsdp may be -1.
      topology: chips, and how many slices of them.
      measure: whether the step measures noise; by default as the config says.

    Raises:
      UserError: the config does not fit the topology's devices.
      DoesNotFit: the program does not fit their memory.
    """
    devices = topology_devices(topology)
    config = resolved(config, topology, len(devices))
    measure = bool(config.noise_scale.every) if measure is None else measure
    mesh = make_mesh(*(config.mesh[axis] for axis in ("replica", "fsdp", "tensor", "member")), devices=devices)
    trainer = Trainer(config, mesh)
    traced = trainer.trace_step(config_lib.sequences_per_batch(config), measure)
    return compile_traced(traced, trainer, topology, measure)


def compile_traced(traced: jax.stages.Traced, trainer: Trainer, topology: Topology, measure: bool, members: int = 1) -> CompiledStep:
    """Compiles a traced step and reads it.

    Args:
      traced: `trainer.trace_step(…)`, or the step of `members` such runs side by side, sharded over the mesh's axis `member`.
      trainer: of one run, on a mesh of the topology's devices.
      measure: whether the step measures noise.

    Raises:
      DoesNotFit: the program does not fit the devices' memory.
    """
    config, mesh = trainer.config, trainer.mesh
    of_device = members / mesh.shape["member"]
    with jax.set_mesh(mesh):
        lowered = traced.lower()
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_room(str(error))) from None
    compile_s = time.monotonic() - started
    text, planned = compiled.as_text(), compiled.memory_analysis()
    memory = Memory(
        arguments=planned.argument_size_in_bytes,
        outputs=planned.output_size_in_bytes,
        temporaries=planned.temp_size_in_bytes,
        code=planned.generated_code_size_in_bytes,
        peak=planned.peak_memory_in_bytes,
        capacity=topology.chip.compiler_hbm_bytes,
    )
    flops, kernels = dot_flops(text), of_device * attention_flops(config, pallas_kernels(text))
    sent = collectives(text, mesh.shape, [device.id for device in mesh.devices.flat])
    moved = least_hbm_bytes(memory.arguments, memory.outputs, memory.temporaries)
    model_flops = members * transformer_config(config).causal_flops_per_token * config.train.batch_tokens
    return CompiledStep(
        config=config,
        total_params=sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params)),
        topology=topology,
        mesh=mesh,
        measured=measure,
        compile_s=compile_s,
        memory=memory,
        product_flops=flops,
        traced_flops=jaxpr_dot_flops(traced.jaxpr) / mesh.size,
        kernel_flops=kernels,
        collectives=sent,
        least=Least(*(of_device * sent_bytes for sent_bytes in least_traffic(config, trainer.abstract_state.params))),
        roofline=roofline(topology, mesh, flops + kernels, moved, sent, model_flops),
        members=members,
    )


def attention_flops(config: ConfigDict, kernel_calls: dict[str, int]) -> float:
    """FLOPs of the attention kernels that one device runs in a step, from how often it calls each.

    A kernel multiplies whole blocks on and below the diagonal; that is (1 + n) / 2n of all, with n blocks a side.
    """
    if not kernel_calls:
        return 0.0
    model, mesh = config.model, config.mesh
    blocks = model.context // next(size for size in (512, 256, BLOCK) if model.context % size == 0)
    sequences = config_lib.sequences_per_batch(config) / (mesh.replica * mesh.fsdp * config.train.accumulation)
    product = 2 * model.context**2 * model.head_dim * (1 + blocks) / (2 * blocks) * sequences * config_lib.heads(config) / mesh.tensor
    total = 0.0
    for name, calls in kernel_calls.items():
        kind = next((kind for kind in _PRODUCTS if kind in name), None)
        if kind is None:
            raise ValueError(f"no rule for the FLOPs of kernel {name!r}")
        total += calls * _PRODUCTS[kind] * product
    return total


def _room(message: str) -> str:
    """The compiler's words about memory, in one line."""
    found = re.search(r"(Used [\d.]+[KMG] of [\d.]+[KMG] hbm[^\n]*|HLO temporaries \([^\n]*)", message)
    return (found[1] if found else message.splitlines()[0]).rstrip(". ")


def human_bytes(count: float) -> str:
    """'12.3 GB', decimal."""
    power = 0 if count < 1 else min(4, int(math.log10(count) // 3))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
