"""What has no parameters: norms, positions, dropout."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
}


def rms_norm(x_BxLxD: Array) -> Array:
    """x over its root mean square along the last axis, computed in float32. Epsilon 1e-6."""
    x32_BxLxD = x_BxLxD.astype(jnp.float32)
    mean_sq_BxLx1 = jnp.mean(jnp.square(x32_BxLxD), axis=-1, keepdims=True)
    return (x32_BxLxD * jax.lax.rsqrt(mean_sq_BxLx1 + 1e-6)).astype(x_BxLxD.dtype)


def rotary(x_BxHxLxK: Array, theta: float, start: Array | int = 0, for_cpu: bool = False) -> Array:
    """Rotates the two halves of each head by angles that grow with the position, from `start` on (Su et al. 2021), in float32.

    For XLA's CPU backend, which would compute them anew for every head of every sequence, cosines and sines are constants.
    """
    half, length = x_BxHxLxK.shape[-1] // 2, x_BxHxLxK.shape[2]
    at = np if for_cpu and isinstance(start, int) else jnp
    wavelength_K = at.float32(theta) ** (at.arange(half, dtype=at.float32) / at.float32(half))
    position_L = (at.arange(length) + start).astype(at.float32)
    angle_LxK = position_L[:, None] / wavelength_K[None, :]
    cos_LxK, sin_LxK = at.cos(angle_LxK)[None, None], at.sin(angle_LxK)[None, None]
    a, b = jnp.split(x_BxHxLxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos_LxK - b * sin_LxK, b * cos_LxK + a * sin_LxK], axis=-1).astype(x_BxHxLxK.dtype)


class Dropout(NamedTuple):
    """Sets a share `rate` of what passes to 0, and divides the rest by 1 - rate (Srivastava et al. 2014); passes all without keys.

    A mask is a function of its sequence's own key, the block and the site: it does not depend on the mesh, on microbatches, or on which
    other sequences are in the batch.
    """

    rate: float = 0.0
    keys_B: Array | None = None

    def fold(self, data: Array | int) -> "Dropout":
        """With keys of their own for one block."""
        return self if self.keys_B is None else Dropout(self.rate, jax.vmap(jax.random.fold_in, (0, None))(self.keys_B, data))

    def __call__(self, x_B: Array, site: int) -> Array:
        """x [B, …]; each site of a block has another mask."""
        if self.keys_B is None or not self.rate:
            return x_B
        keep_B = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x_B.shape[1:]))(self.fold(site).keys_B)
        return jnp.where(keep_B, x_B / (1 - self.rate), jnp.zeros_like(x_B))


NO_DROPOUT = Dropout()
