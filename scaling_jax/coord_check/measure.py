"""What a coordinate check looks at: the sizes of activations, of updates and of weight decay, over a few steps at several sizes.

Tensor Programs V (arXiv 2203.03466), appendix D.1, watches activations only. Updates and shrinkage are watched here too, since a
wrong learning rate, epsilon or weight decay of one parameter can hide in activations for many steps.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from scaling_jax import optimizer
from scaling_jax.model import Transformer
from scaling_jax.train.step import Trainer, TrainState

ACTIVATION, CHANGE, UPDATE, DECAY = "activation", "change", "update", "decay"
QUARTERS = 4


class Coordinate(NamedTuple):
    """One measured number.

    `quantity` is `activation` (mean |x|), `change` (mean |x - x at step 1|), `update` (mean |ΔW| over lr) or `decay` (shrinkage of the
    parameter in one step, over lr·weight_decay; at step 0, of no seed). `kind` is the activation's or the parameter's name, `role` the
    parameter's ('' for activations). Steps count from 1: what step t shows has seen t - 1 updates, and ΔW is the t-th.
    """

    axis: str  # width or depth
    size: int
    seed: int
    step: int
    quantity: str
    kind: str
    role: str
    value: float


def check_config(config: ConfigDict, axis: str, size: int, lr: float | None = None, heads: int = 0) -> ConfigDict:
    """The config at one size, under the conditions of the check.

    A constant lr, a readout that starts at zero (so that all logits are learned), float32, no weight decay in the trajectory (it is
    measured apart), one device. With `heads` that many heads whatever the width, so that head_dim grows, and queries that start at
    zero (random ones give attention logits that shrink as 1/sqrt(head_dim)); by default head_dim is the config's.
    """
    config = config.copy_and_resolve_references()
    config.model[axis] = size
    if heads:
        config.model.head_dim = config.model.width // heads
        config.parametrization.query_init = "zero"
    config.model.compute_dtype = "float32"
    config.parametrization.output_init = "zero"
    config.optimizer.lr, config.optimizer.weight_decay = lr or config.optimizer.lr, 0.0
    config.schedule.name, config.schedule.warmup_tokens = "constant", 0
    config.train.accumulation = 1
    for mesh_axis in config.mesh:
        config.mesh[mesh_axis] = 1
    return config


def coordinates(
    config: ConfigDict,
    axis: str,
    size: int,
    seeds: Iterable[int],
    steps: int,
    tokens_BxL: np.ndarray,
    model: Callable[..., nnx.Module] = Transformer,
) -> Iterator[list[Coordinate]]:
    """Measures one size: yields the coordinates of one seed at a time, with the first those of the weight decay.

    Args:
      config: as `check_config` made it.
      axis, size: what is varied, and its value; recorded.
      seeds: of the initial parameters.
      steps: optimizer steps, all on the one batch.
      tokens_BxL: [sequences, context + 1].
      model: as `Trainer` takes it. Activations are shown by a `tap` argument of its call, if it has one.
    """
    trainer = Trainer(config, model=model)
    found = [Coordinate(axis, size, 0, 0, DECAY, *of, value) for of, value in _decay(trainer).items()]
    observe = jax.jit(partial(_observe, trainer), donate_argnums=0)
    tokens_1xBxL = jnp.asarray(tokens_BxL)[None]
    for seed in seeds:
        state = trainer.init(seed)
        start = jax.tree.map(jnp.copy, state.params)
        for step in range(1, steps + 1):
            state, values = observe(state, start, tokens_1xBxL)
            found += [Coordinate(axis, size, seed, step, *of, float(value)) for of, value in jax.device_get(values).items()]
        yield found
        found = []


def _observe(trainer: Trainer, state: TrainState, start: nnx.State, tokens_1xBxL: Array) -> tuple[TrainState, dict]:
    """One step, and {(quantity, kind, role): value}."""
    after, _ = trainer.pure_step(state, tokens_1xBxL, measure=False)
    inputs_BxL = tokens_1xBxL[0, :, :-1]
    now, before = (_activations(nnx.merge(trainer.graph, params), inputs_BxL) for params in (state.params, start))
    values = {}
    for kind, x in now.items():
        values[ACTIVATION, kind, ""] = _mean_abs(x)
        values[CHANGE, kind, ""] = _mean_abs(x - before[kind])
    change = jax.tree.map(jnp.subtract, after.params, state.params)
    for of, dw in _by_parameter(change).items():
        values[UPDATE, *of] = _mean_abs(dw) / trainer.config.optimizer.lr
    return after, values


def _activations(model: nnx.Module, tokens_BxL: Array) -> dict[str, Array]:
    """Every activation that the model shows; the residual stream after each quarter of the depth, between blocks by interpolation."""
    seen: dict[str, Array] = {}
    taps = "tap" in inspect.signature(type(model).__call__).parameters
    logits = model(tokens_BxL, tap=seen.__setitem__) if taps else model(tokens_BxL)
    seen.setdefault("logits", logits)
    if "residual" in seen:
        after_NxBxLxD = jnp.concatenate([seen["embedding"][None], seen.pop("residual")])  # 0, 1, … depth blocks
        for quarter in range(1, QUARTERS + 1):
            blocks = quarter * (len(after_NxBxLxD) - 1) / QUARTERS
            below, part = int(blocks), blocks % 1
            x_BxLxD = (1 - part) * after_NxBxLxD[below] + part * after_NxBxLxD[math.ceil(blocks)]
            seen[f"residual {quarter}/{QUARTERS}"] = x_BxLxD
    return seen


def _decay(trainer: Trainer) -> dict[tuple[str, str], float]:
    """What one step without gradient takes off a parameter that is 1, over lr·weight_decay."""
    config = trainer.config.copy_and_resolve_references()
    config.optimizer.weight_decay = 1.0
    chain = optimizer.adamw(config)

    def shrinkage() -> dict[tuple[str, str], Array]:
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), trainer.abstract_state.params)
        zeros = jax.tree.map(jnp.zeros_like, ones)
        updates, _ = chain.update(zeros, chain.init(ones), ones, lr_fraction=jnp.float32(1))
        return {of: -jnp.mean(u) / config.optimizer.lr for of, u in _by_parameter(updates).items()}

    return {of: float(value) for of, value in jax.jit(shrinkage)().items()}


def _by_parameter(tree: nnx.State) -> dict[tuple[str, str], Array]:
    """{(name, role): value}"""
    return {(".".join(map(str, path)), leaf.get_metadata()["role"]): leaf[...] for path, leaf in nnx.to_flat_state(tree)}


def _mean_abs(x: Any) -> Array:
    return jnp.mean(jnp.abs(x.astype(jnp.float32)))
