"""The noise scale as part of an Optax optimizer: its running estimate lives in the optimizer's state, and is saved with it.

    tx = noise_scale.track(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), window_tokens=1e8)
    opt_state = tx.init(params)
    ...
    result = noise_scale.per_example_sq_norms(loss_fn, params, batch)
    updates, opt_state = tx.update(result.grads, opt_state, params, sq_norms_BxG=result.sq_norms_BxG, tokens=batch_tokens)
    ...
    noise_scale.estimator.read(noise_scale.tracked(opt_state), window_tokens=1e8)

It stands outermost, or first in a chain, since ‖G‖² is that of the gradient as it came: an estimate from a clipped one is wrong. It does
not belong inside `optax.masked` or `optax.partition`, where it would see a part of the gradient beside the norms of all.

With accumulation by `optax.MultiSteps`, wrap that, not the optimizer inside:

    track(optax.MultiSteps(tx, every_k_schedule=k).gradient_transformation(), window_tokens)

sees every microbatch's gradient along with its norms, and each counts as a step with the microbatch's tokens. Inside, it would see the
accumulated gradient and the norms of the last microbatch alone.
"""

from typing import Any, NamedTuple

import jax
import optax
from jax import Array

from scaling_jax.noise_scale import estimator
from scaling_jax.noise_scale.any_model import Groups, group_names, group_sq_norms


class TrackedState(NamedTuple):
    """Arrays only, so it is saved and restored as any optimizer's state is."""

    inner: Any
    noise_scale: estimator.NoiseScaleState


def track(
    optimizer: optax.GradientTransformation, window_tokens: float, *, groups: Groups | None = None, blocks: int = 64
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, which also keeps the running estimate of the noise scale. Its updates are unchanged.

    `update` takes, by keyword:
      sq_norms_BxG: squared norms of the examples' own gradients, with columns as `groups` makes them.
      tokens: the step's weight, a number.
      grad_sq_G: ‖G‖² of the batch's gradient. Default: that of the gradient that `update` is given. Wanted where the norms are in a
        metric, `PerExample.grad_sq_G`.
    All else is passed on to `optimizer`.

    Args:
      optimizer: any Optax transformation.
      window_tokens: as in `estimator.update`.
      groups: as in `per_example_sq_norms`. Under `nnx.Optimizer` paths come without the ".value" of its state.
      blocks: as in `estimator.init`.

    Raises:
      ValueError: by `update`, without sq_norms_BxG or tokens, or with another number of columns than there are groups.
    """
    if not window_tokens > 0:
        raise ValueError(f"track: window_tokens is {window_tokens}: must be positive")
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> TrackedState:
        return TrackedState(optimizer.init(params), estimator.init(len(group_names(params, groups)), blocks))

    def update(
        updates: Any,
        state: TrackedState,
        params: Any = None,
        *,
        sq_norms_BxG: Array | None = None,
        tokens: Array | float | None = None,
        grad_sq_G: Array | None = None,
        **extra: Any,
    ) -> tuple[Any, TrackedState]:
        if sq_norms_BxG is None or tokens is None:
            missing = " and ".join(name for name, x in (("sq_norms_BxG", sq_norms_BxG), ("tokens", tokens)) if x is None)
            raise ValueError(f"track: update needs {missing} by keyword: update(grads, state, params, sq_norms_BxG=..., tokens=...)")
        columns = state.noise_scale.grad_sq_KxG.shape[1]
        if sq_norms_BxG.ndim != 2 or sq_norms_BxG.shape[1] != columns:
            raise ValueError(f"track: sq_norms_BxG must be of shape [B, {columns}], a column for each group, not {sq_norms_BxG.shape}")
        if grad_sq_G is None:
            grad_sq_G = group_sq_norms(updates, groups)
        estimates = estimator.estimates(sq_norms_BxG, grad_sq_G)
        noise_scale = estimator.update(state.noise_scale, tokens, *estimates, window_tokens)
        updates, inner = optimizer.update(updates, state.inner, params, **extra)
        return updates, TrackedState(inner, noise_scale)

    return optax.GradientTransformationExtraArgs(init, update)


def tracked(opt_state: Any) -> estimator.NoiseScaleState:
    """The running estimate out of an optimizer's state, however deep in chains and wrappers, `nnx.Optimizer.opt_state` too.

    Raises:
      ValueError: there is none, or more than one.
    """

    def is_found(node: Any) -> bool:
        return isinstance(node, estimator.NoiseScaleState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_found) if is_found(node)]
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one tracked noise scale, and holds {len(found)}: wrap one optimizer by `track`")
    return estimator.NoiseScaleState(*jax.tree.leaves(found[0]))  # plain arrays: nnx.Optimizer boxes each of them
