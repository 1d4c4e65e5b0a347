"""Runs that differ in values alone, trained as one program: the step of one run, vmapped over members.

Members have one shape, one batch size and one course of the data, each in its own order; their learning rates, decays, seeds and init
scales are arrays. Where there is a mesh, its axis `member` shards them, and the other axes shard each member as they do a single run.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax import optimizer
from scaling_jax.sweep.study import VALUES
from scaling_jax.train.batch_size import microbatches
from scaling_jax.train.step import StepMetrics, Trainer, TrainState, Values

MEMBER = "member"  # axis of the mesh


class Population:
    """The compiled functions of members that train together; a state is that of one run, each array with a leading axis of members.

    Args:
      config: of any member. They may differ in `scaling_jax.sweep.study.VALUES` and in how long they train.
      members: how many; with a mesh a multiple of its axis `member`.
      mesh: with the axes of `scaling_jax.mesh.AXES`, or None for the default device.
    """

    def __init__(self, config: ConfigDict, members: int, mesh: Mesh | None = None):
        self.config, self.members, self.mesh = config, members, mesh
        self.trainer = Trainer(config, mesh)
        self.meter = self.trainer.meter
        self.eval_sharding = self.trainer.eval_sharding
        self.batch_sharding = self._sharding = None
        if mesh is not None:
            self.batch_sharding = _stacked(self.trainer.batch_sharding)
            self._sharding = jax.tree.map(_stacked, self.trainer.state_sharding)
        self.abstract_state = self._abstract_state()
        shardings = {} if mesh is None else {"out_shardings": (self._sharding, None)}
        self._jit_step = jax.jit(self._step, static_argnums=3, donate_argnums=0, **shardings)
        self._jit_eval = jax.jit(self._each(lambda params, tokens_BxL: self.trainer.pure_eval(params, tokens_BxL), (0, None)))
        self._read_noise = jax.jit(jax.vmap(self.meter.read)) if self.meter else None
        self._initial: dict[tuple[float, float], Trainer] = {}

    def _each(self, function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
        """`function` of each member. A single one is run as it is: an axis of length 1 would hide its products' shapes from XLA."""
        if self.members > 1:
            return jax.vmap(function, in_axes, **({} if self.mesh is None else {"spmd_axis_name": MEMBER}))

        def of_one(*args: Any) -> Any:
            axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
            own = [arg if axis is None else jax.tree.map(lambda x: x[0], arg) for arg, axis in zip(args, axes, strict=True)]
            return jax.tree.map(lambda x: x[None], function(*own))

        return of_one

    def _step(self, states: TrainState, values: Values, tokens_MxAxBxL: Array, measure: bool) -> tuple[TrainState, StepMetrics]:
        def of_member(state: TrainState, values: Values, tokens_AxBxL: Array) -> tuple[TrainState, StepMetrics]:
            return self.trainer.pure_step(state, tokens_AxBxL, measure, values)

        return self._each(of_member)(states, values, tokens_MxAxBxL)

    def _abstract_state(self) -> TrainState:
        one = SingleDeviceSharding(jax.devices()[0])
        shardings = self._sharding or jax.tree.map(lambda _: one, self.trainer.abstract_state)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct((self.members, *x.shape), x.dtype, sharding=s), self.trainer.abstract_state, shardings
        )

    def _in_mesh(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.mesh is None:
            return function(*args)
        with jax.set_mesh(self.mesh):
            return function(*args)

    def abstract_members(self, count: int) -> TrainState:
        """The state of the first `count` members, laid out so that it can be saved and restored on any number of devices."""
        if count == self.members:
            return self.abstract_state

        def of(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            own = NamedSharding(x.sharding.mesh, PartitionSpec(None, *x.sharding.spec[1:]))
            return jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=own)

        return jax.tree.map(of, self.abstract_state)

    def members_of(self, state: TrainState, count: int) -> TrainState:
        """The first `count` of them."""
        return state if count == self.members else jax.tree.map(lambda x: x[:count], state)

    def fill(self, state: TrainState) -> TrainState:
        """The inverse: the last one again in every place that is left."""

        def of(x: Array, abstract: jax.ShapeDtypeStruct) -> Array:
            missing = abstract.shape[0] - x.shape[0]
            return jax.device_put(jnp.concatenate([x, *([x[-1:]] * missing)]), abstract.sharding) if missing else x

        return jax.tree.map(of, state, self.abstract_state)

    def init(self, configs: Sequence[ConfigDict]) -> TrainState:
        """The members' states, each that of a run of its own config, bit for bit."""
        states = [jax.tree.leaves(jax.device_get(self._init(config))) for config in configs]
        # By leaves: a parameter's metadata has its own rule's init scale.
        abstract, structure = jax.tree.flatten(self.abstract_state)
        stacked = [jax.device_put(np.stack(leaves), x.sharding) for x, *leaves in zip(abstract, *states, strict=True)]
        return jax.tree.unflatten(structure, stacked)

    def _init(self, config: ConfigDict) -> TrainState:
        scales = config.parametrization.embedding_std, config.parametrization.hidden_std
        if scales not in self._initial:  # one program for all seeds
            same = scales == (self.config.parametrization.embedding_std, self.config.parametrization.hidden_std)
            self._initial[scales] = self.trainer if same else Trainer(config, self.mesh)
        state = self._initial[scales].init(config.train.seed)
        *others, _ = state.opt_state
        return state._replace(opt_state=(*others, optimizer.roles_of(config, state.params)))

    def step(self, states: TrainState, values: Values, tokens_MxAxBxL: Array, measure: bool = True) -> tuple[TrainState, StepMetrics]:
        """One step of every member on [members, accumulation, B / accumulation, context + 1] tokens; `states` is donated."""
        return self._in_mesh(self._jit_step, states, values, tokens_MxAxBxL, measure)

    def eval(self, params: nnx.State, tokens_BxL: Array) -> Array:
        """Loss of every token [members, B, context], in nats, of the same sequences for all."""
        return self._in_mesh(self._jit_eval, params, tokens_BxL)

    def read_noise(self, states: TrainState) -> list[dict[str, tuple[float | None, float | None, float | None]]]:
        """Of each member the running noise scale by metric: (value, low, high) in tokens, as `Trainer.read_noise` has it."""
        if self.meter is None:
            return [{} for _ in range(self.members)]
        readings = jax.device_get(self._read_noise(states.noise))
        return [self.meter.in_tokens(jax.tree.map(lambda x, i=i: x[i], readings)) for i in range(self.members)]

    def place(self, tokens_MxNxL: np.ndarray) -> Array | np.ndarray:
        """A batch of N sequences for each member, on the devices, as `step` takes it."""
        members, sequences, length = tokens_MxNxL.shape
        accumulation = microbatches(self.config, sequences)
        tokens_MxAxBxL = tokens_MxNxL.reshape(members, accumulation, sequences // accumulation, length)
        return tokens_MxAxBxL if self.batch_sharding is None else jax.device_put(tokens_MxAxBxL, self.batch_sharding)

    def trace_step(self, sequences: int, measure: bool = True) -> jax.stages.Traced:
        """The step for a batch of so many sequences of each member, traced and not compiled."""
        accumulation = microbatches(self.config, sequences)
        shape = (self.members, accumulation, sequences // accumulation, self.config.model.context + 1)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        return self._in_mesh(self._jit_step.trace, self.abstract_state, stack_values([self.config] * self.members), tokens, measure)


def stack_values(configs: Sequence[ConfigDict]) -> Values:
    """What the members' configs differ in, [members] each."""
    return jax.tree.map(lambda *values: np.stack(values), *(Values.of(config) for config in configs))


def _stacked(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(MEMBER, *sharding.spec))


def program(config: ConfigDict) -> str:
    """What a population's program depends on, as JSON of a config: everything but its members' values and where the run ends."""
    config = config.copy_and_resolve_references()
    template = config_lib.default_config()
    for name in (*VALUES, "train.tokens", "schedule.decay_tokens"):
        section, key = name.split(".")
        config[section][key] = template[section][key]
    return json.dumps(config_lib.to_json(config))
