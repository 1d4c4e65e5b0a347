"""One optimizer step, as a pure function of (state, tokens).

    loss and gradient, and with them every sequence's squared gradient norms  ->  noise scale  ->  AdamW

`Trainer` builds the step for a config and a mesh. To try an idea, change `_train_step`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax import optimizer
from scaling_jax.errors import UserError
from scaling_jax.mesh import sharding, spec
from scaling_jax.model import BLOCK, Probe, Transformer, TransformerConfig, token_losses
from scaling_jax.noise_scale import NoiseScale, NoiseScaleState
from scaling_jax.optimizer import Decay
from scaling_jax.parametrization import Parametrization
from scaling_jax.train.batch_size import microbatches
from scaling_jax.train.noise import Measured, NoiseMeter

_DROPOUT = int.from_bytes(b"drop")  # folded into the seed's key; initial parameters fold in 0, 1, …


class TrainState(NamedTuple):
    """All that a run is between two steps."""

    params: nnx.State
    opt_state: Any
    noise: dict[str, NoiseScaleState]  # by metric: `scaling_jax.train.noise`
    step: Array  # int32, steps taken
    sequences: Array  # int32, sequences seen; the whole state of the data


class StepMetrics(NamedTuple):
    """What one step saw. Losses in nats per token; lr is the peak lr at base sizes times the schedule, and the batch's factor."""

    loss: Array
    lr: Array
    grad_norm: Array  # of the batch-mean gradient, before clipping
    noise: dict[str, NoiseScale] | None  # by metric, over the window, this step included; None where the step did not measure
    noise_step: dict[str, Measured] | None  # this step's own estimates


class Values(NamedTuple):
    """What runs that are one program may differ in, beside what their states hold. Scalars, or [members] of a population."""

    lr: Array  # peak, at the base sizes
    seed: Array  # uint32
    decay: Decay

    @classmethod
    def of(cls, config: ConfigDict) -> "Values":
        decay = Decay(*map(np.float32, optimizer.decay_of(config)))
        return cls(np.float32(config.optimizer.lr), np.uint32(config.train.seed), decay)


def transformer_config(config: ConfigDict, platform: str = "cpu", one_device: bool = True) -> TransformerConfig:
    """The model's shape, with the attention that `auto` means on a platform, and the form that is fast there."""
    model = dict(config.model)
    if model["attention"] == "auto":
        kernel = platform == "tpu" and config.model.context % BLOCK == 0 and not config.model.dropout
        model["attention"] = "splash" if kernel else "einsum"
    elif model["attention"] == "splash" and platform != "tpu":
        model["attention"] = "splash_interpreted"
    return TransformerConfig(**model, for_cpu=platform == "cpu" and one_device)


def parametrization(config: ConfigDict) -> Parametrization:
    return Parametrization(**config.parametrization, decay_mode=config.optimizer.decay_mode)


class Trainer:
    """The compiled functions of a run: `init(seed)`, `step(state, tokens)`, `eval(params, tokens)`.

    Args:
      config: a valid config.
      mesh: a mesh with the axes of `scaling_jax.mesh.AXES`, or None for the default device.
      model: makes the module, `model(TransformerConfig, Parametrization, rngs=)`. One of your own maps tokens [B, L] to logits
        [B, L, V], or has `losses`; if noise is to be measured it has `new_probe` and takes `probe=`, and `metric=`, as the Transformer
        does; `dropout_keys_B=` if config.model.dropout is set.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh | None = None, model: Callable[..., nnx.Module] = Transformer):
        if config.model.compute_dtype == config_lib.FASTEST:
            raise UserError("config.model.compute_dtype is 'fastest': only a run finds that, as it begins; must be float32 or bfloat16")
        self.config, self.mesh, self.model = config, mesh, model
        self.platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self.optimizer = optimizer.adamw(config)
        abstract = nnx.eval_shape(self._model)
        self.graph, _ = nnx.split(abstract)
        probed = config.noise_scale.every and hasattr(abstract, "new_probe")
        self.meter = NoiseMeter(config, abstract.new_probe(1), nnx.state(abstract, nnx.Param)) if probed else None
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
        self._jit_eval = jax.jit(self.pure_eval)

    def _model(self, key: Array | int = 0) -> nnx.Module:
        shape = transformer_config(self.config, self.platform, self.mesh is None)
        return self.model(shape, parametrization(self.config), rngs=nnx.Rngs(key))

    def _init(self, key: Array) -> TrainState:
        params = nnx.state(self._model(key), nnx.Param)
        noise = self.meter.init() if self.meter else {}
        return TrainState(params, self.optimizer.init(params), noise, jnp.int32(0), jnp.int32(0))

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

    def pure_step(
        self, state: TrainState, tokens_AxBxL: Array, measure: bool = True, values: Values | None = None
    ) -> tuple[TrainState, StepMetrics]:
        """`step` as a function to trace into a program of one's own, in which `values` need not be the config's."""
        return _train_step(self, state, tokens_AxBxL, measure, values)

    def read_noise(self, state: TrainState) -> dict[str, tuple[float | None, float | None, float | None]]:
        """The running noise scale by metric: (value, low, high) in tokens; None where unknown or, for high, unbounded."""
        return self.meter.read_tokens(state.noise) if self.meter else {}

    def eval(self, params: nnx.State, tokens_BxL: Array) -> Array:
        """Loss of every token [B, context] of sequences of context + 1 tokens, in nats."""
        return self._in_mesh(self._jit_eval, params, tokens_BxL)

    def pure_eval(self, params: nnx.State, tokens_BxL: Array) -> Array:
        """`eval` as a function to trace into a program of one's own."""
        return _token_losses(self.graph, params, tokens_BxL)

    def trace_step(self, sequences: int, measure: bool = True) -> jax.stages.Traced:
        """The step for a batch of so many sequences, traced and not compiled."""
        accumulation = microbatches(self.config, sequences)
        shape = (accumulation, sequences // accumulation, self.config.model.context + 1)
        tokens_AxBxL = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        return self._in_mesh(self._jit_step.trace, self.abstract_sharded_state, tokens_AxBxL, measure)

    def lower_step(self, sequences: int, measure: bool = True) -> jax.stages.Lowered:
        """The same, lowered."""
        traced = self.trace_step(sequences, measure)
        return self._in_mesh(traced.lower)


def _train_step(
    trainer: Trainer, state: TrainState, tokens_AxBxL: Array, measure: bool, values: Values | None
) -> tuple[TrainState, StepMetrics]:
    config = trainer.config
    lr, seed, decay = (config.optimizer.lr, config.train.seed, None) if values is None else values
    sequences = tokens_AxBxL.shape[0] * tokens_AxBxL.shape[1]
    batch_tokens = sequences * config.model.context

    if measure and trainer.meter is None:
        raise UserError("this model has no new_probe, so its gradient noise cannot be measured: set config.noise_scale.every=0")
    # P of this step comes from the moments before it: with its own the estimates would be biased.
    metric = optimizer.preconditioner(config, state.opt_state, lr) if measure and config.noise_scale.preconditioned else None
    loss, grads, sq_norms_BxGxM = _loss_and_gradient(trainer, state.params, metric, tokens_AxBxL, measure, state.sequences, seed)

    noise, reading, measured = state.noise, None, None
    if measure:
        meter = trainer.meter
        grad_sq_GxM = jnp.stack([meter.of_gradient(grads, p) for p in ((None,) if metric is None else (None, metric))], axis=1)
        stands_for_tokens = float(batch_tokens * config.noise_scale.every)  # its own, and those of the steps not measured
        noise, measured = meter.update(noise, sq_norms_BxGxM, grad_sq_GxM, stands_for_tokens, state.step == 0)
        reading = meter.read(noise)

    # The schedule at the middle of the step's tokens: the summed lr per token then does not depend on the batch size.
    tokens_seen = (state.sequences.astype(jnp.float32) + sequences / 2) * config.model.context
    lr_fraction = optimizer.batch_lr_factor(config, batch_tokens) * optimizer.schedule(config, decay)(tokens_seen)
    updates, opt_state = trainer.optimizer.update(grads, state.opt_state, state.params, lr_fraction=lr_fraction)
    params = jax.tree.map(jnp.add, state.params, updates)

    metrics = StepMetrics(loss, lr * lr_fraction, optax.tree.norm(grads), reading, measured)
    return TrainState(params, opt_state, noise, state.step + 1, state.sequences + sequences), metrics


def _loss_and_gradient(
    trainer: Trainer,
    params: nnx.State,
    metric: nnx.State | None,
    tokens_AxBxL: Array,
    measure: bool,
    first_sequence: Array | int = 0,
    seed: Array | int | None = None,
) -> tuple[Array, nnx.State, Array | None]:
    """Mean loss, its gradient, and ‖g_b‖² per group and metric [sequences, G, M], summed over microbatches."""
    microbatches, micro, _ = tokens_AxBxL.shape
    sequences = microbatches * micro
    keys_AxB = _dropout_keys(trainer.config, first_sequence, sequences, seed)
    keys_AxB = None if keys_AxB is None else keys_AxB.reshape(microbatches, micro)

    def loss_fn(params, probe, tokens_BxL, keys_B):
        return jnp.sum(jnp.mean(_token_losses(trainer.graph, params, tokens_BxL, probe, metric, keys_B), axis=1)) / sequences

    def microbatch(tokens_BxL, keys_B):
        if not measure:
            return *jax.value_and_grad(loss_fn)(params, None, tokens_BxL, keys_B), None
        probe = nnx.merge(trainer.graph, params).new_probe(micro, **({} if metric is None else {"metric": True}))
        loss, (grads, cotangent) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, probe, tokens_BxL, keys_B)
        sq_norms_BxG = trainer.meter.of_sequences(cotangent) * float(sequences) ** 2  # of a mean: contributions carry 1 / sequences
        return loss, grads, sq_norms_BxG.reshape(*sq_norms_BxG.shape[:2], -1)

    if microbatches == 1:
        return microbatch(tokens_AxBxL[0], None if keys_AxB is None else keys_AxB[0])

    def add(total, tokens_and_keys):
        # The barrier keeps XLA's TPU compiler from moving sums over devices out of this loop, at which it fails (libtpu 0.0.42).
        loss, grads, sq_norms_BxGxM = jax.lax.optimization_barrier(microbatch(*tokens_and_keys))
        return jax.tree.map(jnp.add, total, (loss, grads)), sq_norms_BxGxM

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    (loss, grads), sq_norms_AxBxGxM = jax.lax.scan(add, zeros, (tokens_AxBxL, keys_AxB))
    return loss, grads, sq_norms_AxBxGxM.reshape(sequences, *sq_norms_AxBxGxM.shape[2:]) if measure else None


def _dropout_keys(config: ConfigDict, first_sequence: Array | int, count: int, seed: Array | int | None = None) -> Array | None:
    """A key for each sequence of the run, by its number: the same whatever the batch, the microbatches and the mesh."""
    if not config.model.dropout:
        return None
    key = jax.random.fold_in(jax.random.key(config.train.seed if seed is None else seed), _DROPOUT)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first_sequence + jnp.arange(count))


def _token_losses(
    graph: Any,
    params: nnx.State,
    tokens_BxL: Array,
    probe: Probe | None = None,
    metric: nnx.State | None = None,
    dropout_keys_B: Array | None = None,
) -> Array:
    model, inputs, targets = nnx.merge(graph, params), tokens_BxL[:, :-1], tokens_BxL[:, 1:]
    # A model of one's own need know only what its run asks for.
    given = {"probe": probe, "metric": None if metric is None else nnx.merge(graph, metric), "dropout_keys_B": dropout_keys_B}
    given = {name: value for name, value in given.items() if value is not None}
    return model.losses(inputs, targets, **given) if hasattr(model, "losses") else token_losses(model(inputs, **given), targets)


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
