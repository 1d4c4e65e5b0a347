"""Per-example squared gradient norms of any JAX model: vmap(grad), a few examples at a time.

It asks nothing of the model but a loss that is a mean over examples, and costs a backward pass per example in place of one for the
batch. Layers that take a probe (per_example.py) give the same norms at almost no cost.

    result = noise_scale.per_example_sq_norms(loss_fn, params, batch, chunk=4)
    grad_sq_G, grad_trace_G = noise_scale.estimates(result.sq_norms_BxG, result.grad_sq_G)

The norms are exact only where the examples' gradients have the batch's gradient as their mean. That is checked in numbers whenever
there are numbers, that is, outside of jit: under jit call `check_mean_over_examples` once before.

Only arrays of floating-point (or complex) numbers in `params` are differentiated; integers, keys, functions and whatever else a module
carries are left alone. So params may be a dict, a Linen variable dict, an Equinox-like module or an NNX state. Of an NNX model pass the
state of `nnx.split(model, nnx.Param, ...)` and merge inside the loss: the module itself, taken as a pytree, holds running statistics
among its arrays.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

LossFn = Callable[[Any, Any], Array]
Groups = Callable[[str], str]

# Largest difference that rounding may make, as a fraction: in float32 with products as coarse as TF32, and with 16-bit arithmetic.
_TOLERANCE_32, _TOLERANCE_16 = 1e-3, 5e-2


class PerExample(NamedTuple):
    """B examples, G groups of parameters.

    `loss` and `grads` are the batch's: the means over its examples. `grads` is like params, with None for what is not differentiated,
    as Equinox and Optax have it.
    """

    loss: Array
    grads: Any
    sq_norms_BxG: Array  # float32, ‖g_b‖²
    grad_sq_G: Array  # float32, ‖G‖²


def per_example_sq_norms(
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    *,
    chunk: int = 1,
    groups: Groups | None = None,
    metric: Any = None,
    check: bool = True,
) -> PerExample:
    """Squared norm of every example's own gradient, and the batch's loss and gradient, which are their mean.

    `loss_fn` is called on batches of one example (its leading axis kept), under vmap and grad, in a loop over B / chunk chunks. The
    gradients of a chunk are summed and forgotten. Call it under jit: outside, it is compiled anew by every call.

    Args:
      loss_fn: (params, batch) -> scalar, a mean over the examples of the batch.
      params: any pytree.
      batch: any pytree of arrays that share their leading axis B. Randomness belongs here, as one key for each example.
      chunk: examples whose gradients are held at once, a divisor of B. Memory is that of `chunk` gradients and activations and one sum,
        whatever B; so 1 is what fits wherever training does. More is faster where one example does not fill the device. Where
        devices shard the batch, take a multiple of their number: each works on its own examples.
      groups: from a parameter's path (`jax.tree_util.keystr`) to its group; the G columns are `group_names(params, groups)`. Ask
        for a part of the path (`"embed" in path`): in an NNX state paths end in ".value". Default: one group.
      metric: tree like params of weights P ≥ 0. Norms are then Σ P·g², and the noise scale tr(PΣ) / GᵀPG is that of steps P·g:
        with P = 1/(√v + ε), Adam's. P must not have seen this batch, or both estimates are biased: use the state from before it.
      check: compare with the loss and gradient of the whole batch, at the cost and memory of one more gradient. Under jit there are
        no numbers to compare and nothing is checked; see `check_mean_over_examples`.

    Raises:
      ValueError: a batch of one, leaves of different length, a chunk that does not divide the batch, a loss that is not a scalar, a
        metric that does not fit or is negative, an NNX Variable in two places, no parameters, or a loss that is no mean over examples.
    """
    arrays, fill = _split(params)
    names, columns = _columns(params, groups)
    weights = _weights(arrays, metric)
    sq_norms = partial(_sq_norms, columns=columns, groups=len(names), weights=weights)
    examples = _batch_length(batch)
    if summed := varying_axes(batch) - varying_axes(arrays):
        raise ValueError(
            f"inside shard_map the batch is sharded over {sorted(summed)} and the parameters are not, so their gradients would be summed "
            'over devices: pass jax.lax.pcast(params, axis, to="varying"), or leave shard_map and pass the sharded batch as it is'
        )
    if chunk < 1 or examples % chunk:
        fitting = [n for n in range(1, examples + 1) if examples % n == 0]
        raise ValueError(
            f"chunk {chunk} does not divide the batch of {examples} examples: {min(fitting, key=lambda n: abs(n - chunk))} does"
        )

    def one_loss(arrays: list[Array], example: Any) -> Array:
        return loss_fn(fill(arrays), jax.tree.map(lambda x: x[None], example))

    _check_scalar(jax.eval_shape(one_loss, arrays, jax.tree.map(lambda x: x[0], batch)))

    # Chunk c takes examples c, c + B/chunk, ...: with a batch in contiguous pieces on devices, each of them has a part in every chunk.
    batch_NxC = jax.tree.map(lambda x: x.reshape(chunk, examples // chunk, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(totals: list[Array], examples_C: Any) -> tuple[list[Array], tuple[Array, Array]]:
        losses_C, grads_C = jax.vmap(jax.value_and_grad(one_loss), in_axes=(None, 0))(arrays, examples_C)
        sq_norms_CxG = jax.vmap(sq_norms)(grads_C)
        totals = [total + jnp.sum(grad_C, axis=0, dtype=total.dtype) for total, grad_C in zip(totals, grads_C, strict=True)]
        return totals, (losses_C, sq_norms_CxG)

    zeros = [jnp.zeros_like(x, dtype=_at_least_float32(x.dtype)) for x in arrays]
    totals, (losses_NxC, sq_norms_NxCxG) = jax.lax.scan(add, zeros, batch_NxC)
    means = [total / examples for total in totals]
    result = PerExample(
        jnp.mean(losses_NxC, dtype=_at_least_float32(losses_NxC.dtype)),
        fill([mean.astype(x.dtype) for mean, x in zip(means, arrays, strict=True)], rest=None),
        sq_norms_NxCxG.swapaxes(0, 1).reshape(examples, len(names)),
        sq_norms(means),
    )
    if check and not isinstance(result.loss, jax.core.Tracer):
        # Rounding goes by the examples' gradients: their mean may all but vanish.
        unit = jnp.sqrt(jnp.maximum(result.grad_sq_G.sum(), result.sq_norms_BxG.sum() / examples**2))
        whole_loss, sq_norm = (lambda arrays, batch: loss_fn(fill(arrays), batch)), lambda grads: sq_norms(grads).sum()
        _compare(whole_loss, arrays, batch, np.asarray(losses_NxC, np.float64).ravel(), means, sq_norm, float(unit))
    return result


def check_mean_over_examples(loss_fn: LossFn, params: Any, batch: Any, *, chunk: int = 1) -> None:
    """Raises ValueError unless the loss and gradient of the batch are the means over its examples. To be called outside of jit.

    A loss can agree and its gradient not, as with batch statistics behind stop_gradient, so both are compared: to 1e-3 of the loss and
    of the gradient's size, or 5e-2 where there is 16-bit arithmetic. A few examples will do, if they are as different as examples come.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, batch))):
        raise ValueError("check_mean_over_examples compares numbers and cannot under jit: call it once, outside")
    per_example_sq_norms(loss_fn, params, batch, chunk=chunk)


def group_names(params: Any, groups: Groups | None = None) -> tuple[str, ...]:
    """Names of the G columns, sorted; ("all",) without groups."""
    return _columns(params, groups)[0]


def group_sq_norms(grads: Any, groups: Groups | None = None, metric: Any = None) -> Array:
    """‖g‖²_G, float32, of one gradient (or Σ P·g², see `per_example_sq_norms`), for any tree like the parameters."""
    arrays, _ = _split(grads)
    names, columns = _columns(grads, groups)
    return _sq_norms(arrays, columns, len(names), _weights(arrays, metric))


def varying_axes(tree: Any) -> frozenset[str]:
    """Mesh axes over which any array of a tree differs between devices, as known inside `jax.shard_map` with `check_vma`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def _is_differentiated(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def _split(params: Any) -> tuple[list[Array], Callable[..., Any]]:
    """The differentiated arrays, and what puts such a list in their places; `rest=None` puts None in all others."""
    _check_shared_variables(params)
    leaves, treedef = jax.tree.flatten(params)
    at = [i for i, leaf in enumerate(leaves) if _is_differentiated(leaf)]
    if not at:
        raise ValueError("params hold no array of floating-point numbers: there is nothing to differentiate")

    def fill(arrays: list[Array], rest: list[Any] | None = leaves) -> Any:
        filled = [None] * len(leaves) if rest is None else list(rest)
        for i, array in zip(at, arrays, strict=True):
            filled[i] = array
        return treedef.unflatten(filled)

    return [jnp.asarray(leaves[i]) for i in at], fill


def _columns(params: Any, groups: Groups | None) -> tuple[tuple[str, ...], list[int]]:
    """Names of the groups, and the column of each differentiated array."""
    paths = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if _is_differentiated(leaf)]
    group_of = ["all" if groups is None else groups(path) for path in paths]
    for path, group in zip(paths, group_of, strict=True):
        if not isinstance(group, str):
            raise ValueError(f"groups({path!r}) must be the name of a group, a str, and is {group!r}")
    names = tuple(sorted(set(group_of)))
    return names, [names.index(group) for group in group_of]


def _weights(arrays: list[Array], metric: Any) -> list[Array | None]:
    if metric is None:
        return [None] * len(arrays)
    weights = [weight for weight in jax.tree.leaves(metric) if _is_differentiated(weight)]
    if [w.shape for w in weights] != [x.shape for x in arrays]:
        raise ValueError(f"metric must be a tree like params: its arrays are {_shapes(weights)}, those of params {_shapes(arrays)}")
    if any(not isinstance(w, jax.core.Tracer) and (np.asarray(w) < 0).any() for w in weights):
        raise ValueError("metric has negative weights: Σ P·g² would be no squared norm")
    return weights


def _shapes(arrays: list[Array]) -> str:
    return ", ".join(str(x.shape) for x in arrays)


def _sq_norms(grads: list[Array], columns: list[int], groups: int, weights: list[Array | None]) -> Array:
    sums = [jnp.zeros((), jnp.float32)] * groups
    for grad, column, weight in zip(grads, columns, weights, strict=True):
        grad = grad.astype(_at_least_float32(grad.dtype))
        square = jnp.real(grad * jnp.conj(grad))
        if weight is not None:
            square = square * weight.astype(square.dtype)
        sums[column] = sums[column] + jnp.sum(square).astype(jnp.float32)
    return jnp.stack(sums)


def _batch_length(batch: Any) -> int:
    lengths = {jax.tree_util.keystr(path) or "batch": np.shape(x)[:1] for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        found = ", ".join(f"{path} {length[0] if length else 'no axis at all'}" for path, length in lengths.items())
        raise ValueError(f"all leaves of the batch must share the length of their leading axis: {found or 'there are none'}")
    (examples,) = next(iter(lengths.values()))
    if examples < 2:
        raise ValueError(f"the noise scale needs at least 2 examples in a batch, not {examples}")
    return examples


def _check_scalar(loss: Any) -> None:
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"loss_fn must return one floating-point scalar, the mean over the batch, and nothing beside it, not {loss}")


def _check_shared_variables(params: Any) -> None:
    """A Variable in two places of an NNX module is one parameter; the module's leaves have it twice."""
    nnx = sys.modules.get("flax.nnx")  # whoever passes one has imported it
    if nnx is None:
        return
    seen: dict[int, str] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        if isinstance(node, nnx.Variable):
            path = jax.tree_util.keystr(path)
            if id(node) in seen:
                raise ValueError(
                    f"params hold one nnx.Variable in two places, {seen[id(node)]} and {path}, which would count as two parameters: "
                    "pass the state of nnx.split(model, nnx.Param, ...) and merge inside loss_fn"
                )
            seen[id(node)] = path


def _compare(
    loss_fn: LossFn, arrays: list[Array], batch: Any, losses_B: np.ndarray, means: list[Array], sq_norm: Callable, unit: float
) -> None:
    """The batch's own loss and gradient against the examples' means. `unit` is the size that rounding of the gradient goes by."""
    whole = jax.value_and_grad(loss_fn)
    _check_scalar(jax.eval_shape(loss_fn, arrays, batch))
    sixteen_bit = "f16[" in str(jax.make_jaxpr(whole)(arrays, batch))  # bf16[ as well
    tolerance = _TOLERANCE_16 if sixteen_bit else _TOLERANCE_32
    loss, grads = jax.jit(whole)(arrays, batch)
    loss, mean = float(loss), float(losses_B.mean())
    causes = (
        "Usual causes: a sum in place of a mean; a mean over tokens where examples have different numbers of unmasked tokens (take each "
        "example's own mean first); statistics of the batch, as in batch norm or load balancing; dropout or other randomness whose keys "
        "are not in the batch, one for each example. `check=False` goes on nevertheless"
    )
    if abs(loss - mean) > tolerance * np.abs(losses_B).mean():
        raise ValueError(
            f"loss_fn is not a mean over the examples of its batch: on the batch of {len(losses_B)} it is {loss:.6g}, and the mean of its "
            f"values on each example alone is {mean:.6g}. {causes}"
        )
    off = float(sq_norm([grad.astype(mean.dtype) - mean for grad, mean in zip(grads, means, strict=True)])) ** 0.5
    if off > tolerance * unit:
        raise ValueError(
            f"the gradient of loss_fn is not a mean over the examples of its batch, though its value, {loss:.6g}, is: on the batch of "
            f"{len(losses_B)} it differs from the mean of the gradients on each example alone by a vector of norm {off:.3g}, where "
            f"rounding goes by {unit:.3g}. {causes}"
        )
