"""Causal attention: as two products with a softmax between them, or as a kernel that holds no logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from scaling_jax.mesh import is_ours, on_one_device, spec

SAVED = "attention"  # name of what the remat policy of that name keeps
BLOCK = 128  # a length must be a multiple of it for the kernel


def causal_attention(
    q_BxHxLxK: Array,
    k_BxGxMxK: Array,
    v_BxGxMxK: Array,
    scale: float,
    start: Array | int = 0,
    drop: Callable[[Array], Array] = lambda weights_BxHxLxM: weights_BxHxLxM,
) -> Array:
    """softmax(scale·q·k, causal)·v; logits and softmax in float32.

    Args:
      q_BxHxLxK: queries of the positions start, start + 1, …
      k_BxGxMxK, v_BxGxMxK: keys and values of the positions 0, 1, …; each of the G heads serves H / G neighbouring heads of q.
      scale: of the logits.
      start: position of the first query.
      drop: dropout of the weights.
    """
    queries, (groups, keys) = q_BxHxLxK.shape[2], k_BxGxMxK.shape[1:3]
    k_BxHxMxK, v_BxHxMxK = (
        x if groups == q_BxHxLxK.shape[1] else jnp.repeat(x, q_BxHxLxK.shape[1] // groups, 1) for x in (k_BxGxMxK, v_BxGxMxK)
    )
    logits_BxHxLxM = jnp.einsum("bhlk,bhmk->bhlm", q_BxHxLxK, k_BxHxMxK, preferred_element_type=jnp.float32) * scale
    seen_LxM = jnp.arange(keys)[None, :] <= (jnp.arange(queries) + start)[:, None]
    logits_BxHxLxM = jnp.where(seen_LxM[None, None], logits_BxHxLxM, -1e30)
    weights_BxHxLxM = drop(jax.nn.softmax(logits_BxHxLxM, axis=-1).astype(v_BxGxMxK.dtype))
    return checkpoint_name(jnp.einsum("bhlm,bhmk->bhlk", weights_BxHxLxM, v_BxHxMxK), SAVED)


def splash_attention(q_BxHxLxK: Array, k_BxGxLxK: Array, v_BxGxLxK: Array, scale: float, interpret: bool = False) -> Array:
    """`causal_attention` by JAX's splash kernel for TPUs (Pallas), each device its own sequences and heads.

    Blocks above the diagonal are left out; logits are float32 and never leave the chip. Queries are scaled beforehand, in their dtype.

    Args:
      q_BxHxLxK: queries; L is a multiple of 128.
      k_BxGxLxK, v_BxGxLxK: keys and values; each of the G heads serves H / G neighbouring heads of q.
      scale: of the logits.
      interpret: run the kernel step by step in JAX, on any device, slowly.
    """
    if not on_one_device() and not is_ours():  # a kernel cannot be divided on a mesh that is not known
        return causal_attention(q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, scale)
    # Pallas takes half a second to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, CausalMask, MultiHeadMask, make_splash_mha

    length = q_BxHxLxK.shape[2]
    size = next(size for size in (512, 256, BLOCK) if length % size == 0)
    sizes = {f"block_{name}": size for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")}

    def attend(q_BxHxLxK: Array, k_BxGxLxK: Array, v_BxGxLxK: Array) -> Array:
        # The kernel's own code mixes ranks and dtypes.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            mask = MultiHeadMask([CausalMask((length, length))] * q_BxHxLxK.shape[1])
            one_device = {"head_shards": 1, "q_seq_shards": 1}
            kernel = make_splash_mha(
                mask, block_sizes=BlockSizes(**sizes), residual_checkpoint_name=SAVED, interpret=interpret, **one_device
            )
            return jax.vmap(kernel)(q_BxHxLxK * scale, k_BxGxLxK, v_BxGxLxK)

    if on_one_device():
        return attend(q_BxHxLxK, k_BxGxLxK, v_BxGxLxK)
    of_heads = spec("batch", "heads", "length", None)
    mesh = jax.sharding.get_abstract_mesh()  # the partitioner cannot look into a kernel
    return jax.shard_map(attend, mesh=mesh, in_specs=(of_heads,) * 3, out_specs=of_heads, check_vma=False)(q_BxHxLxK, k_BxGxLxK, v_BxGxLxK)
