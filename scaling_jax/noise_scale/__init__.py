"""Exact measurement of the gradient noise scale. Imports nothing else of the package, so any JAX project may use it.

- In a model of one's own, layer by layer, at almost no cost: `dense`, `scale`, `bias`, `embed`, `unembed`, …
- In any model, from outside, at the cost of a backward pass for each example: `per_example_sq_norms`.
- From what a run has anyway, less exactly: `microbatch_estimates`, `shard_estimates`.
- Then `estimates` of a step, `estimator` for running means with an interval, or `track` to keep these in an Optax state.
"""

from scaling_jax.noise_scale import estimator
from scaling_jax.noise_scale.any_model import PerExample, check_mean_over_examples, group_names, group_sq_norms, per_example_sq_norms
from scaling_jax.noise_scale.estimator import NoiseScale, NoiseScaleState, estimates, ratio_interval
from scaling_jax.noise_scale.per_example import bias, dense, dense_many, embed, embed_tied, scale, unembed, unembed_tied
from scaling_jax.noise_scale.readout import readout_losses, token_losses
from scaling_jax.noise_scale.shards import Shards
from scaling_jax.noise_scale.tracking import TrackedState, track, tracked
from scaling_jax.noise_scale.two_batches import microbatch_estimates, shard_estimates, two_batch_estimates
from scaling_jax.noise_scale.uses import Uses, open_uses, per_sequence, use

__all__ = [
    "NoiseScale",
    "NoiseScaleState",
    "PerExample",
    "Shards",
    "TrackedState",
    "Uses",
    "bias",
    "check_mean_over_examples",
    "dense",
    "dense_many",
    "embed",
    "embed_tied",
    "estimates",
    "estimator",
    "group_names",
    "group_sq_norms",
    "microbatch_estimates",
    "open_uses",
    "per_example_sq_norms",
    "per_sequence",
    "ratio_interval",
    "readout_losses",
    "scale",
    "shard_estimates",
    "token_losses",
    "track",
    "tracked",
    "two_batch_estimates",
    "unembed",
    "unembed_tied",
    "use",
]
