"""AdamW whose learning rate, weight decay and epsilon differ by parameter, as the parametrization's table says.

The chain is Optax's own clip and Adam moments, and one transformation here that applies the table. Its state holds every
parameter's lr, weight decay and epsilon as arrays: what a run applies can be read back from its state, and runs that differ in
these values alone are one program.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from scaling_jax.batch_schedule import lr_end_tokens
from scaling_jax.errors import UserError

Schedule = Callable[[Array | float], Array]


class RoleState(NamedTuple):
    """Per-parameter scalars, each a tree like the parameters': peak lr, decay per lr, epsilon."""

    lr: Any
    weight_decay: Any
    eps: Any


class Decay(NamedTuple):
    """Where the lr begins to fall and where it ends, in tokens; arrays where runs that differ in this are one program."""

    start: Array | float
    end: Array | float


def decay_of(config: ConfigDict) -> Decay:
    """Of a run's schedule. Floats, since token counts overflow int32."""
    end = float(lr_end_tokens(config))
    return Decay(end - config.schedule.decay_tokens if config.schedule.name == "wsd" else float(config.schedule.warmup_tokens), end)


def schedule(config: ConfigDict, decay: Decay | None = None) -> Schedule:
    """The course of the lr: tokens seen -> fraction of the peak.

    Linear warmup from 0 over warmup_tokens, then `constant`, `linear` or `cosine` to final_lr_fraction at train.tokens, or `wsd`:
    constant until the last decay_tokens, then linear to final_lr_fraction. The run ends with its last whole step. `decay`, if given, is
    in the place of the config's own.
    """
    s = config.schedule
    name, floor, warmup = s.name, s.final_lr_fraction, float(s.warmup_tokens)
    start, end = decay_of(config) if decay is None else decay

    def fraction(tokens: Array | float) -> Array:
        tokens = jnp.asarray(tokens, jnp.float32)
        progress = jnp.clip((tokens - start) / jnp.maximum(end - start, 1.0), 0.0, 1.0)
        if name == "constant":
            decay = jnp.float32(1.0)
        elif name == "cosine":
            decay = floor + (1 - floor) * 0.5 * (1 + jnp.cos(math.pi * progress))
        else:
            decay = floor + (1 - floor) * (1 - progress)
        return decay * jnp.minimum(tokens / warmup, 1.0) if warmup else decay

    return fraction


def batch_lr_factor(config: ConfigDict, batch_tokens: int) -> float:
    """What batch.lr_rule multiplies the lr with at a batch other than train.batch_tokens."""
    return (batch_tokens / config.train.batch_tokens) ** {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[config.batch.lr_rule]


def with_rules(params: nnx.State, value: Callable[[Any], float]) -> Any:
    """A tree like `params` of float32 scalars, `value(rule)` of each parameter's rule; UserError for one that has none."""

    def of(path: tuple, param: nnx.Variable) -> Any:
        rule = param.get_metadata().get("rule")
        if rule is None:
            raise UserError(f"parameter {'.'.join(map(str, path))} has no role: the parametrization has no rule for it")
        return param.replace(jnp.float32(value(rule)))

    return nnx.map_state(of, params)


def roles_of(config: ConfigDict, params: nnx.State) -> RoleState:
    """What the config's lr, weight decay and epsilon come to for each parameter, by its rule."""
    o = config.optimizer
    return RoleState(
        lr=with_rules(params, lambda rule: o.lr * rule.lr),
        weight_decay=with_rules(params, lambda rule: o.weight_decay * rule.weight_decay),
        eps=with_rules(params, lambda rule: o.eps * rule.eps),
    )


def adamw(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, Adam moments, then lr and decoupled weight decay by the table.

    `update` takes one more argument, `lr_fraction`: the schedule's value at this step. Parameters are an nnx.State whose
    variables carry their rule. Gradients are divided by the rule's epsilon factor before Adam, which is epsilon times that
    factor afterwards: m̂/(√v̂ + c·ε) = (m̂/c)/(√v̂/c + ε).
    """
    o = config.optimizer
    moments = optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)
    clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()

    def init(params: nnx.State):
        return clip.init(params), moments.init(params), roles_of(config, params)

    def update(grads, state, params=None, *, lr_fraction):
        clip_state, moments_state, roles = state
        # Optax mixes weak and strong dtypes.
        with jax.numpy_dtype_promotion("standard"):
            grads, clip_state = clip.update(grads, clip_state)
            grads = jax.tree.map(lambda g, eps: g / (eps / o.eps), grads, roles.eps)
            directions, moments_state = moments.update(grads, moments_state, params)
        updates = jax.tree.map(
            lambda u, p, lr, decay: -(lr_fraction * lr) * (u + decay * p), directions, params, roles.lr, roles.weight_decay
        )
        return updates, (clip_state, moments_state, roles)

    return optax.GradientTransformationExtraArgs(init, update)


def preconditioner(config: ConfigDict, state: Any, lr: Array | float | None = None) -> nnx.State:
    """AdamW's own metric P, a tree like the parameters: the role's lr multiplier over √v̂ + eps, from the moments in its state.

    `lr` is the peak lr that the state's are of, by default the config's.

    An entry that never had a gradient has no v̂ and gets P = 0; so have all of them before the first step. As in `adamw`, a gradient
    is divided by its role's epsilon factor before it enters v̂, so P is divided by that factor too. Rounded to compute_dtype: any P that
    does not know the batch gives unbiased estimates, and both of them use the same.
    """
    o, (_, moments, roles) = config.optimizer, state
    peak_lr = o.lr if lr is None else lr
    correction = 1 - jnp.float32(o.b2) ** moments.count.astype(jnp.float32)

    def of(nu, lr, eps):
        scale = (lr / peak_lr) / (eps / o.eps)
        p = jnp.where(nu > 0, scale / (jnp.sqrt(nu / jnp.where(moments.count > 0, correction, 1.0)) + o.eps), 0.0)
        return p.astype(config.model.compute_dtype)

    return jax.tree.map(of, moments.nu, roles.lr, roles.eps)
