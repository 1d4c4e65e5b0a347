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

ACTIVATION, CHANGE, UPDATE, DECAY, EPSILON = "activation", "change", "update", "decay", "epsilon"
PROBED = (DECAY, EPSILON)  # of the optimizer alone: exact, and of no seed
QUARTERS = 4


class Coordinate(NamedTuple):
    """One measured number.

    `quantity` is `activation` (mean |x|), `change` (mean |x - x at step 1|), `update` (mean |ΔW| over lr), `decay` (shrinkage of the
    parameter in one step, over lr·weight_decay) or `epsilon` (first step of a gradient far below epsilon, over lr·gradient/epsilon);
    the last two at step 0, of no seed. `kind` is the activation's or the parameter's name, `role` the parameter's ('' for activations).
    Steps count from 1: what step t shows has seen t - 1 updates, and ΔW is the t-th.

    Two kinds are made here: `attention scale` is mean |attention logits| over mean |q·k|, and `target logit` the mean, with its sign, of
    the change of the right token's logit over all logits' mean: what is random in logits averages out of it.
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

    A constant lr, a readout that starts at zero (so that all logits are learned), float32, no dropout, no weight decay in the trajectory
    (it is measured apart), one device. With `heads` that many heads whatever the width, so that head_dim grows, and queries that start
    at zero (random ones give attention logits that shrink as 1/sqrt(head_dim)); by default head_dim is the config's.
    """
    config = config.copy_and_resolve_references()
    config.model[axis] = size
    if heads:
        config.model.head_dim = config.model.width // heads
        config.parametrization.query_init = "zero"
    config.model.compute_dtype, config.model.dropout = "float32", 0.0
    config.parametrization.output_init = "zero"
    config.optimizer.lr, config.optimizer.weight_decay = lr or config.optimizer.lr, 0.0
    config.schedule.name, config.schedule.warmup_tokens = "constant", 0
    config.batch.schedule, config.batch.stages, config.batch.lr_rule = "constant", (), "none"
    config.noise_scale.preconditioned = False
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
    """Measures one size: yields the coordinates of one seed at a time, with the first those of the optimizer alone.

    Args:
      config: as `check_config` made it.
      axis, size: what is varied, and its value; recorded.
      seeds: of the initial parameters.
      steps: optimizer steps, all on the one batch.
      tokens_BxL: [sequences, context + 1].
      model: as `Trainer` takes it. Activations are shown by a `tap` argument of its call, if it has one.
    """
    trainer = Trainer(config, model=model)
    found = [Coordinate(axis, size, 0, 0, *of, float(value)) for of, value in _optimizer(trainer).items()]
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
    inputs_BxL, targets_BxL = tokens_1xBxL[0, :, :-1], tokens_1xBxL[0, :, 1:]
    now, before = (activations(nnx.merge(trainer.graph, params), inputs_BxL) for params in (state.params, start))
    values = {}
    for kind, x in now.items():
        values[ACTIVATION, kind, ""] = _mean_abs(x)
        values[CHANGE, kind, ""] = _mean_abs(x.astype(jnp.float32) - before[kind].astype(jnp.float32))
    change_BxLxV = now["logits"] - before["logits"]
    values[CHANGE, "target logit", ""] = jnp.mean(jnp.take_along_axis(change_BxLxV, targets_BxL[..., None], axis=2)) - jnp.mean(
        change_BxLxV
    )
    if {"q", "k", "attention logits"} <= now.keys():
        q_NxBxHxLxK, k_NxBxGxLxK = now["q"], now["k"]
        k_NxBxHxLxK = jnp.repeat(k_NxBxGxLxK, q_NxBxHxLxK.shape[2] // k_NxBxGxLxK.shape[2], axis=2)
        products = _mean_abs(jnp.tril(jnp.einsum("nbhlk,nbhmk->nbhlm", q_NxBxHxLxK, k_NxBxHxLxK)))
        values[ACTIVATION, "attention scale", ""] = jnp.where(products > 0, values[ACTIVATION, "attention logits", ""] / products, 0.0)
    change = jax.tree.map(jnp.subtract, after.params, state.params)
    for of, dw in _by_parameter(change).items():
        values[UPDATE, *of] = _mean_abs(dw) / trainer.config.optimizer.lr
    return after, values


def activations(model: nnx.Module, tokens_BxL: Array) -> dict[str, Array]:
    """Every activation that the model shows to its `tap`, and the logits.

    `residual`, if it is [depth, *shape of `embedding`], becomes the stream after each quarter of the depth, between blocks by
    interpolation. ValueError for a kind that is shown twice.
    """
    seen: dict[str, Array] = {}

    def tap(kind: str, activation: Array) -> None:
        if kind in seen:
            raise ValueError(f"tap shows {kind!r} twice: give each its own name, or stack them")
        seen[kind] = activation

    takes_tap = "tap" in inspect.signature(type(model).__call__).parameters
    logits = model(tokens_BxL, tap=tap) if takes_tap else model(tokens_BxL)
    seen.setdefault("logits", logits)
    if "residual" in seen and "embedding" in seen and seen["residual"].shape[1:] == seen["embedding"].shape:
        after_NxBxLxD = jnp.concatenate([seen["embedding"][None], seen.pop("residual")])  # 0, 1, … depth blocks
        for quarter in range(1, QUARTERS + 1):
            blocks = quarter * (len(after_NxBxLxD) - 1) / QUARTERS
            below, part = int(blocks), blocks % 1
            x_BxLxD = (1 - part) * after_NxBxLxD[below] + part * after_NxBxLxD[math.ceil(blocks)]
            seen[f"residual {quarter}/{QUARTERS}"] = x_BxLxD
    return seen


def _optimizer(trainer: Trainer) -> dict[tuple[str, str, str], Array]:
    """What AdamW does to parameters that are 1: in a step without gradient, and in one whose gradient is far below epsilon."""
    config = trainer.config.copy_and_resolve_references()
    lr, eps = config.optimizer.lr, config.optimizer.eps
    tiny = 1e-5 * eps

    def first_step(weight_decay: float, gradient: float) -> dict[tuple[str, str], Array]:
        config.optimizer.weight_decay = weight_decay
        chain = optimizer.adamw(config)
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), trainer.abstract_state.params)
        updates, _ = chain.update(jax.tree.map(lambda x: gradient * x, ones), chain.init(ones), ones, lr_fraction=jnp.float32(1))
        return {of: -jnp.mean(u) / lr for of, u in _by_parameter(updates).items()}

    def probe() -> dict[tuple[str, str, str], Array]:
        found = {(DECAY, *of): value for of, value in first_step(1.0, 0.0).items()}
        if tiny > 1e-15:  # whose square float32 still holds
            found |= {(EPSILON, *of): value * eps / tiny for of, value in first_step(0.0, tiny).items()}
        return found

    return jax.jit(probe)()


def _by_parameter(tree: nnx.State) -> dict[tuple[str, str], Array]:
    """{(name, role): value}"""
    return {(".".join(map(str, path)), leaf.get_metadata()["role"]): leaf[...] for path, leaf in nnx.to_flat_state(tree)}


def _mean_abs(x: Any) -> Array:
    return jnp.mean(jnp.abs(x.astype(jnp.float32)))
