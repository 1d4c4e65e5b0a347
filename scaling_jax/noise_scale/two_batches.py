"""The noise scale where only two batch sizes are known: microbatches, or the devices of a data-parallel mesh.

For the gradients of a batch of b and of B > b sequences, E‖G_b‖² = |G|² + tr Σ / b, and two such equations are solved for both
unknowns (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, App. A.1):

    |G|²  ≈ (B·‖G_B‖² − b·‖G_b‖²) / (B − b)        tr Σ ≈ (‖G_b‖² − ‖G_B‖²) / (1/b − 1/B)

Both are unbiased, whether the small batch is part of the large one or not, and neither is clamped. They go where `estimates` goes: into
`estimator.update`, to be averaged first and divided last.

Take b = 1 where it can be had (`estimates`): its variance is the smallest, and the large batch hardly matters for it (Gray et al.
2024, https://arxiv.org/abs/2411.00999). With M small batches of b that make up the large one, tr Σ varies as 1/(M − 1) about, whatever
b is: 8 microbatches tell as much as 8 sequences, however many they hold. And average over all M: the last one alone, as it is left
over by a loop of accumulation, gives more than M times the variance.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from scaling_jax.noise_scale.any_model import Groups, group_sq_norms, varying_axes


def two_batch_estimates(small_sq_G: Array, small_batch: float, big_sq_G: Array, big_batch: float) -> tuple[Array, Array]:
    """Unbiased |G|² and tr Σ of one step from mean gradients over two numbers of sequences.

    Args:
      small_sq_G: ‖G_b‖² per group of parameters, averaged over as many such batches as there are.
      small_batch: b, sequences in each.
      big_sq_G: ‖G_B‖² per group, before clipping.
      big_batch: B > b.

    Returns:
      |G|²_G and (tr Σ)_G, in squared gradient units; the latter per sequence. As from `estimates`, which is the case b = 1.
    """
    if not 0 < small_batch < big_batch:
        raise ValueError(
            f"two batch sizes are needed, 0 < small_batch < big_batch, not small_batch {small_batch} and big_batch {big_batch}"
        )
    grad_sq_G = (big_batch * big_sq_G - small_batch * small_sq_G) / (big_batch - small_batch)
    return grad_sq_G, (small_sq_G - big_sq_G) / (1 / small_batch - 1 / big_batch)


def microbatch_estimates(sq_norms_MxG: Array, microbatch_sequences: float, grad_sq_G: Array) -> tuple[Array, Array]:
    """Unbiased |G|² and tr Σ of one step of gradient accumulation.

    Args:
      sq_norms_MxG: squared norm of the mean gradient of each of the step's M microbatches: of all of them, and each by itself. Not
        of the running sum, and not divided by M for the accumulation.
      microbatch_sequences: sequences in each.
      grad_sq_G: squared norm of the mean of these M gradients, before clipping.

    Returns:
      |G|²_G and (tr Σ)_G, the latter per sequence.
    """
    microbatches = sq_norms_MxG.shape[0]
    if microbatches < 2:
        raise ValueError(f"the noise scale needs at least 2 microbatches, not {microbatches}")
    return two_batch_estimates(jnp.mean(sq_norms_MxG, axis=0), microbatch_sequences, grad_sq_G, microbatches * microbatch_sequences)


def shard_estimates(
    local_grads: Any,
    axis_name: str | tuple[str, ...],
    shard_sequences: float,
    *,
    mean_grads: Any = None,
    groups: Groups | None = None,
) -> tuple[Array, Array]:
    """Unbiased |G|² and tr Σ of one step, from inside `jax.shard_map` or `jax.pmap`: every device's batch is a small one.

    Where parameters are the same on all devices, `jax.shard_map` sums their gradients over devices by itself (with `check_vma`, its
    default). Local gradients are those by `jax.lax.pcast(params, axis_name, to="varying")`.

    Args:
      local_grads: gradient of the mean over this device's sequences, any tree of arrays.
      axis_name: mesh axis, or axes, that shard the batch.
      shard_sequences: sequences on each device.
      mean_grads: `jax.lax.pmean(local_grads, axis_name)`, for those who have it already: it is the large reduction.
      groups: as in `per_example_sq_norms`.

    Returns:
      |G|²_G and (tr Σ)_G, the latter per sequence; the same on all devices.
    """
    shards = jax.lax.axis_size(axis_name)
    if shards < 2:
        raise ValueError(f"the noise scale needs at least 2 shards of the batch, and axis {axis_name!r} has {shards}")
    # Types tell local from reduced arrays only where shard_map checks them; there, an axis index is always local.
    local = varying_axes(jax.lax.axis_index(axis_name))
    if not local <= varying_axes(local_grads):
        raise ValueError(
            f"local_grads are already summed over axis {axis_name!r}, as shard_map does for parameters that all devices share: "
            f'take them by jax.lax.pcast(params, {axis_name!r}, to="varying")'
        )
    if mean_grads is None:
        mean_grads = jax.lax.pmean(local_grads, axis_name)
    local_sq_G = jax.lax.pmean(group_sq_norms(local_grads, groups), axis_name)
    return two_batch_estimates(local_sq_G, shard_sequences, group_sq_norms(mean_grads, groups), shards * shard_sequences)
