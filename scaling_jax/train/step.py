"""One optimizer step, as a pure function of (state, tokens).

    loss and gradient, and with them every sequence's squared gradient norm  ->  noise scale  ->  AdamW

`Trainer` builds the step for a config and a mesh. To try an idea, change `_train_step`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from ml_collections import ConfigDict

from scaling_jax import noise_scale, optimizer
from scaling_jax.mesh import sharding, spec
from scaling_jax.model import KINDS, Transformer, TransformerConfig, parameter_kind, sequence_losses
from scaling_jax.noise_scale import NoiseScale, NoiseScaleState
from scaling_jax.parametrization import Parametrization


class TrainState(NamedTuple):
    """All that a run is between two steps."""

    params: nnx.State
    opt_state: Any
    noise: NoiseScaleState
    step: Array  # int32, steps taken
    sequences: Array  # int32, sequences seen; the whole state of the data


class StepMetrics(NamedTuple):
    """What one step saw. Losses in nats per token; lr is the peak lr at base sizes times the schedule."""

    loss: Array
    lr: Array
    grad_norm: Array  # of the batch-mean gradient, before clipping
    noise: NoiseScale  # over the window, this step included; None where the step did not measure
    grad_sq_step: Array  # this step's own unbiased |G|², all parameters
    grad_trace_step: Array  # and tr Σ, per sequence


def transformer_config(config: ConfigDict) -> TransformerConfig:
    return TransformerConfig(**config.model)


def parametrization(config: ConfigDict) -> Parametrization:
    return Parametrization(**config.parametrization, decay_mode=config.optimizer.decay_mode)


def noise_window(config: ConfigDict) -> float:
    """Tokens that the running noise scale looks back."""
    return float(config.noise_scale.window_tokens or config.train.tokens / 8)


class Trainer:
    """The compiled functions of a run: `init(seed)`, `step(state, tokens)`, `eval(params, tokens)`.

    Args:
      config: a valid config.
      mesh: a mesh with the axes of `scaling_jax.mesh.AXES`, or None for the default device.
      model: makes the module, `model(TransformerConfig, Parametrization, rngs=)`. One of your own maps tokens [B, L] to logits
        [B, L, V], and takes a probe as second argument if noise is to be measured.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh | None = None, model: Callable[..., nnx.Module] = Transformer):
        self.config, self.mesh, self.model = config, mesh, model
        self.optimizer = optimizer.adamw(config)
        self.graph, _ = nnx.split(nnx.eval_shape(self._model))
        self.abstract_state: TrainState = jax.eval_shape(self._init, jax.random.key(0))
        self.state_sharding = self.batch_sharding = self.eval_sharding = None
        if mesh is not None:
            self.state_sharding = _state_sharding(mesh, self.abstract_state)
            self.batch_sharding = sharding(mesh, "microbatch", "batch", "length")
            self.eval_sharding = sharding(mesh, "batch", "length")
        self.abstract_sharded_state = _with_sharding(self.abstract_state, self.state_sharding)
        shardings = {} if mesh is None else {"out_shardings": self.state_sharding}
        # One program, so that the values do not depend on the mesh.
        self._jit_init = jax.jit(self._init, **shardings)
        shardings = {} if mesh is None else {"out_shardings": (self.state_sharding, None)}
        self._jit_step = jax.jit(self.pure_step, static_argnums=2, donate_argnums=0, **shardings)
        self._jit_eval = jax.jit(lambda params, tokens_BxL: _sequence_losses(self.graph, params, tokens_BxL, None))

    def _model(self, key: Array | int = 0) -> nnx.Module:
        return self.model(transformer_config(self.config), parametrization(self.config), rngs=nnx.Rngs(key))

    def _init(self, key: Array) -> TrainState:
        params = nnx.state(self._model(key), nnx.Param)
        return TrainState(params, self.optimizer.init(params), noise_scale.estimator.init(len(KINDS)), jnp.int32(0), jnp.int32(0))

    def _in_mesh(self, f: Any, *args: Any) -> Any:
        if self.mesh is None:
            return f(*args)
        with jax.set_mesh(self.mesh):
            return f(*args)

    def init(self, seed: int) -> TrainState:
        return self._in_mesh(self._jit_init, jax.random.key(seed))

    def step(self, state: TrainState, tokens_AxBxL: Array, measure: bool = True) -> tuple[TrainState, StepMetrics]:
        """One step on [accumulation, B / accumulation, context + 1] tokens; `state` is donated."""
        return self._in_mesh(self._jit_step, state, tokens_AxBxL, measure)

    def pure_step(self, state: TrainState, tokens_AxBxL: Array, measure: bool = True) -> tuple[TrainState, StepMetrics]:
        """`step` as a function to trace into a program of one's own."""
        return _train_step(self, state, tokens_AxBxL, measure)

    def eval(self, params: nnx.State, tokens_BxL: Array) -> Array:
        """Losses [B] of sequences of context + 1 tokens, nats per token."""
        return self._in_mesh(self._jit_eval, params, tokens_BxL)

    def lower_step(self, sequences: int, measure: bool = True) -> jax.stages.Lowered:
        """The step for a batch of so many sequences, lowered and not compiled."""
        accumulation = self.config.train.accumulation
        shape = (accumulation, sequences // accumulation, self.config.model.context + 1)
        tokens_AxBxL = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        return self._in_mesh(self._jit_step.lower, self.abstract_sharded_state, tokens_AxBxL, measure)


def _train_step(trainer: Trainer, state: TrainState, tokens_AxBxL: Array, measure: bool) -> tuple[TrainState, StepMetrics]:
    config = trainer.config
    sequences = tokens_AxBxL.shape[0] * tokens_AxBxL.shape[1]
    batch_tokens = sequences * config.model.context

    loss, grads, sq_norms_BxG = _loss_and_gradient(trainer.graph, state.params, tokens_AxBxL, measure)

    grad_sq_G = _sq_norm_by_kind(grads)
    noise, reading, estimates = state.noise, None, (jnp.float32(jnp.nan),) * 2
    if measure:
        grad_sq, grad_trace = noise_scale.estimates(sq_norms_BxG, grad_sq_G)
        stands_for_tokens = float(batch_tokens * config.noise_scale.every)  # its own, and those of the steps not measured
        noise = noise_scale.estimator.update(noise, stands_for_tokens, grad_sq, grad_trace, noise_window(config))
        reading = noise_scale.estimator.read(noise, noise_window(config))
        estimates = (grad_sq.sum(), grad_trace.sum())

    # The schedule at the middle of the step's tokens: the summed lr per token then does not depend on the batch size.
    tokens_seen = (state.sequences.astype(jnp.float32) + sequences / 2) * config.model.context
    lr_fraction = optimizer.schedule(config)(tokens_seen)
    updates, opt_state = trainer.optimizer.update(grads, state.opt_state, state.params, lr_fraction=lr_fraction)
    params = jax.tree.map(jnp.add, state.params, updates)

    metrics = StepMetrics(loss, config.optimizer.lr * lr_fraction, jnp.sqrt(grad_sq_G.sum()), reading, *estimates)
    return TrainState(params, opt_state, noise, state.step + 1, state.sequences + sequences), metrics


def _loss_and_gradient(graph: Any, params: nnx.State, tokens_AxBxL: Array, measure: bool) -> tuple[Array, nnx.State, Array | None]:
    """Mean loss, its gradient, and ‖g_b‖² per kind [sequences, G], summed over microbatches."""
    microbatches, micro, _ = tokens_AxBxL.shape
    sequences = microbatches * micro

    def loss_fn(params, probe_BxG, tokens_BxL):
        return jnp.sum(_sequence_losses(graph, params, tokens_BxL, probe_BxG)) / sequences

    def microbatch(tokens_BxL):
        if not measure:
            return *jax.value_and_grad(loss_fn)(params, None, tokens_BxL), None
        probe_BxG = jnp.zeros((micro, len(KINDS)), jnp.float32)
        loss, (grads, sq_norms_BxG) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, probe_BxG, tokens_BxL)
        return loss, grads, sq_norms_BxG * float(sequences) ** 2  # the loss is a mean: each contribution carries 1 / sequences

    if microbatches == 1:
        return microbatch(tokens_AxBxL[0])

    def add(total, tokens_BxL):
        loss, grads, sq_norms_BxG = microbatch(tokens_BxL)
        return jax.tree.map(jnp.add, total, (loss, grads)), sq_norms_BxG

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    (loss, grads), sq_norms_AxBxG = jax.lax.scan(add, zeros, tokens_AxBxL)
    return loss, grads, sq_norms_AxBxG.reshape(sequences, -1) if measure else None


def _sequence_losses(graph: Any, params: nnx.State, tokens_BxL: Array, probe_BxG: Array | None) -> Array:
    model, inputs = nnx.merge(graph, params), tokens_BxL[:, :-1]
    return sequence_losses(model(inputs) if probe_BxG is None else model(inputs, probe_BxG), tokens_BxL[:, 1:])


def _sq_norm_by_kind(grads: nnx.State) -> Array:
    sums = dict.fromkeys(KINDS, jnp.float32(0))
    for path, grad in nnx.to_flat_state(grads):
        sums[parameter_kind(path)] += jnp.sum(jnp.square(grad[...]))
    return jnp.stack(list(sums.values()))


def _with_sharding(state: TrainState, shardings: TrainState | None) -> TrainState:
    if shardings is None:
        one = SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _state_sharding(mesh: Mesh, state: TrainState) -> TrainState:
    """Where each array of the state lies: by the logical axes that its parameter carries, else on every device."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable) and leaf.ndim:
            axes = leaf.get_metadata()["axes"]
            stacked = ("layer",) * (leaf.ndim - len(axes))
            return leaf.replace(NamedSharding(mesh, spec(*stacked, *axes)))
        replicated = NamedSharding(mesh, PartitionSpec())
        return leaf.replace(replicated) if isinstance(leaf, nnx.Variable) else replicated

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
