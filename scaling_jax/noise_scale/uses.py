"""Parameters that a pass uses more than once: their uses are summed before they are squared.

Of several uses of one parameter, squared norms do not add up to the squared norm of the sum: the probe of `per_example` alone would
miss the cross terms. Here each use hands what it contributes back to one place, which sums and squares.

A vector, or a table of positions, is given to every sequence as a copy of its own by `per_sequence`; autodiff sums over the uses of
a copy. Of a matrix that would be B gradients. So `open_uses` makes two all-zero carriers a use, and `use` returns its x and dy as
their cotangents; the contribution of sequence b is then one product over all uses and positions at once. The arithmetic is that of the
plain gradient. The memory is not: x and dy of all uses are kept until the last (or, backwards, the first) is reached, also under remat.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from scaling_jax.noise_scale.per_example import _check_probe
from scaling_jax.noise_scale.products import Dtypes, input_gradient, product
from scaling_jax.noise_scale.sequence_sums import squares, sum_of_products
from scaling_jax.noise_scale.shards import Shards, as_shards, by_shard, check_shards, over_shards


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_sequence(shards, param, probe_B, metric):
    return jnp.broadcast_to(param[None], (probe_B.shape[0], *param.shape))


def _per_sequence_fwd(shards, param, probe_B, metric):
    return _per_sequence(shards, param, probe_B, metric), metric


def _per_sequence_bwd(shards, metric, dcopies):
    total = over_shards(by_shard(dcopies, shards).sum(0), shards, dcopies.dtype)
    return total.astype(dcopies.dtype), jax.vmap(squares, in_axes=(0, None))(dcopies, metric), None


_per_sequence.defvjp(_per_sequence_fwd, _per_sequence_bwd)


def per_sequence(param: Array, probe_B: Array, metric: Array | None = None, *, shards: int | Shards = 1) -> Array:
    """A copy of a parameter for every sequence, [B, …], to be used any number of times in any way.

    The cotangent of probe_B is the squared norm of what reaches each copy: of a gain or bias, of learned positions. It takes the memory of
    B gradients, so it is for small parameters.
    """
    _check_probe(probe_B, metric)
    shards = as_shards(shards)
    check_shards(probe_B.shape[0], shards)
    return _per_sequence(shards, param, probe_B, metric)


class Uses(NamedTuple):
    """Carriers of a matrix's uses, zeros with a leading axis [uses]; one use takes one element of each."""

    x_BxLxI: Array
    dy_BxLxO: Array


def open_uses(
    w_IxO: Array,
    probe_B: Array,
    metric_IxO: Array | None = None,
    *,
    uses: int,
    length: int,
    dtype: jnp.dtype = jnp.float32,
    shards: int | Shards = 1,
) -> Uses:
    """Carriers for so many uses of W, each on x of [B, length, I] in `dtype`.

    The gradient of W and the cotangent of probe_B, ‖Σ_uses x_bᵀ·dy_b‖², both come through them.
    """
    shards = as_shards(shards)
    check_shards(probe_B.shape[0], shards)
    _check_probe(probe_B, metric_IxO)
    return _open_uses(uses, length, jnp.dtype(dtype), shards, w_IxO, probe_B, metric_IxO)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _open_uses(uses, length, dtype, shards, w_IxO, probe_B, metric_IxO):
    shape = (uses, probe_B.shape[0], length)
    return Uses(jnp.zeros((*shape, w_IxO.shape[0]), dtype), jnp.zeros((*shape, w_IxO.shape[1]), dtype))


def _open_uses_fwd(uses, length, dtype, shards, w_IxO, probe_B, metric_IxO):
    return _open_uses(uses, length, dtype, shards, w_IxO, probe_B, metric_IxO), metric_IxO


def _open_uses_bwd(uses, length, dtype, shards, metric_IxO, cotangent):
    # Uses one after another along the length: then it is a layer that was used once.
    x_BxLxI, dy_BxLxO = (c.swapaxes(0, 1).reshape(c.shape[1], uses * length, -1) for c in cotangent)
    return *sum_of_products(x_BxLxI, dy_BxLxO, metric_IxO, shards=shards), None


_open_uses.defvjp(_open_uses_fwd, _open_uses_bwd)


def use(x_BxLxI: Array, w_IxO: Array, carriers: Uses, *, shards: int | Shards = 1) -> Array:
    """y = x·W, one of the uses that `carriers`, an element of what `open_uses` made, is for."""
    return _use(as_shards(shards), x_BxLxI, jax.lax.stop_gradient(w_IxO), carriers)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _use(shards, x_BxLxI, w_IxO, carriers):
    return product(x_BxLxI, w_IxO, shards, Dtypes.of(x_BxLxI, None, None))


def _use_fwd(shards, x_BxLxI, w_IxO, carriers):
    return _use(shards, x_BxLxI, w_IxO, carriers), (x_BxLxI, w_IxO)


def _use_bwd(shards, residuals, dy_BxLxO):
    x_BxLxI, w_IxO = residuals
    dy_BxLxO = dy_BxLxO.astype(x_BxLxI.dtype)
    return input_gradient(dy_BxLxO, w_IxO, shards, x_BxLxI.dtype), None, Uses(x_BxLxI, dy_BxLxO)


_use.defvjp(_use_fwd, _use_bwd)
