"""Exact measurement of the gradient noise scale. Imports nothing else of the package, so any JAX project may use it."""

from scaling_jax.noise_scale import estimator
from scaling_jax.noise_scale.estimator import NoiseScale, NoiseScaleState, estimates, ratio_interval
from scaling_jax.noise_scale.per_example import bias, dense, dense_many, embed, embed_tied, scale, unembed_tied

__all__ = [
    "NoiseScale",
    "NoiseScaleState",
    "bias",
    "dense",
    "dense_many",
    "embed",
    "embed_tied",
    "estimates",
    "estimator",
    "ratio_interval",
    "scale",
    "unembed_tied",
]
