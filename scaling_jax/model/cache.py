"""Keys and values of what a model has read, so that the next token costs one position and not all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Cache(NamedTuple):
    """`length` tokens have been read; what lies beyond it is not looked at. Of one block [B, G, context, K], of all [depth, …]."""

    k_BxGxMxK: Array
    v_BxGxMxK: Array
    length: Array  # int32

    def append(self, k_BxGxLxK: Array, v_BxGxLxK: Array) -> "Cache":
        """With the keys and values of L more tokens."""
        start = (0, 0, self.length, 0)
        start = tuple(jnp.int32(x) for x in start)
        k, v = (jax.lax.dynamic_update_slice(old, new, start) for old, new in ((self.k_BxGxMxK, k_BxGxLxK), (self.v_BxGxMxK, v_BxGxLxK)))
        return Cache(k, v, self.length + k_BxGxLxK.shape[2])
