"""What a step needs of a device, from the config alone: bytes of memory and FLOPs, before anything is compiled.

FLOPs are the products' and nearly exact. Bytes are arithmetic over the arrays that are known to be there at the two moments when most
is held, the loss and a block's backward pass; the compiler, which overlaps, copies and pads, needs more or less.
"""

import math

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.mesh import spec
from scaling_jax.model import TransformerConfig
from scaling_jax.pods.compile import attention_flops
from scaling_jax.train.step import transformer_config

LANES = 128  # of a TPU's registers: to a multiple of it the last dimension of an array is padded


def state_bytes(config: ConfigDict, params: nnx.State) -> float:
    """Of parameters and AdamW's two moments, all float32, on one device."""
    return 12 * sum(_own_sizes(config, params).values())


def _own_sizes(config: ConfigDict, params: nnx.State) -> dict[tuple[str, ...], float]:
    """Elements of each parameter that one device has."""
    sizes = {}
    for path, param in nnx.to_flat_state(params):
        placed = spec(*param.get_metadata()["axes"])
        sizes[path] = math.prod(param.shape) / math.prod(config.mesh[axis] for axis in placed if axis)
    return sizes


def predicted_bytes(config: ConfigDict, params: nnx.State) -> float:
    """The peak of a device's memory.

    Fitted to what libtpu 0.0.42.1 planned for some 16 programs, from 32M to 70B parameters, on v5e, v5p, v6e and tpu7x: 0.91 to 1.13 of
    their peaks, 1.26 of the smallest. Not tried on others; there were no microbatches among them.

    Args:
      config: with mesh.fsdp resolved.
      params: of its model; abstract ones will do.
    """
    model, mesh = transformer_config(config, "tpu"), config.mesh
    size, t = jnp.dtype(model.compute_dtype).itemsize, mesh.tensor
    own = _own_sizes(config, params)
    blocks = sum(count for path, count in own.items() if path[0] == "blocks")
    measured = bool(config.noise_scale.every)
    sequences = config_lib.sequences_per_batch(config) / (mesh.replica * mesh.fsdp * config.train.accumulation)
    tokens = sequences * model.context
    accumulated = 4 * sum(own.values()) if config.train.accumulation > 1 else 0
    gathered = size * _block_params(model) / t  # the weights of one block; those of the next arrive meanwhile
    of_block = 1.5 * tokens * _activation_bytes(model, t, size, "none")  # cotangents too
    largest = model.width * max(model.mlp_width, model.width) / t
    block = 4 * sum(own.values()) + 2 * gathered + of_block + 8 * largest * measured
    head = 4 * (sum(own.values()) - blocks) + _head_bytes(config, model, tokens, size, measured)
    saved = model.depth * tokens * _activation_bytes(model, t, size, model.remat)
    return state_bytes(config, params) + accumulated + saved + max(head, block)


def _block_params(model: TransformerConfig) -> float:
    return model.params / model.blocks


def _activation_bytes(model: TransformerConfig, t: int, size: int, remat: str) -> float:
    """Of one token in one block, that are there until its backward pass."""
    padded = max(1, LANES / model.head_dim)  # arrays that end in head_dim
    stream, mlp = model.width / t, model.mlp_width / t
    heads, attended = (padded * n / t for n in (model.width + 2 * model.kv_width, model.width))
    logits = 0 if model.attention != "einsum" else model.context * model.heads / t  # weights, of one token
    gated = model.mlp == "swiglu"
    if remat == "full":
        return size * stream
    if remat == "attention":
        return size * (stream + attended) + 4 * model.heads / t
    projected = stream + heads + 2 * stream + (2 if gated else 1) * mlp
    if remat == "dots":
        return size * projected
    mlp_parts = 3 if gated else 1  # the activation, and what its derivative needs
    normed = 2 * model.width * size + 2 * stream * 4  # gathered for the projections; in float32, for the norm's own gradient
    return size * (projected + heads + attended + mlp_parts * mlp) + normed + logits * (size + 4)


def _head_bytes(config: ConfigDict, model: TransformerConfig, tokens: float, size: int, measured: bool) -> float:
    """Logits, their cotangent, the readout, and sums of its gradient."""
    readout = model.width * model.vocab_size / config.mesh.tensor
    at_once = min(tokens, model.loss_chunk_tokens or tokens)
    sums = 8 if measured else 4 if at_once < tokens else size
    return at_once * model.vocab_size / config.mesh.tensor * (4 + size) + readout * (size + sums)


def predicted_flops(config: ConfigDict) -> float:
    """Of one device in a step: products, those computed again and those of the attention kernels included.

    The compiler leaves out what nobody reads of a block that is computed again, its last product.
    """
    model, mesh = transformer_config(config, "tpu"), config.mesh
    tokens = config.train.batch_tokens / (mesh.replica * mesh.fsdp * mesh.tensor)
    again = model.remat in ("attention", "full")
    a_block = 6 * _block_params(model) + again * 2 * (_block_params(model) - model.width * model.mlp_width)
    chunked = bool(model.loss_chunk_tokens) and tokens * mesh.tensor / config.train.accumulation > model.loss_chunk_tokens
    a_token = model.depth * a_block + (8 if chunked else 6) * model.width * model.vocab_size
    if config.noise_scale.every:
        a_token += 2 * model.context * model.width * mesh.tensor  # which tokens of a sequence share a row of the embedding
    forward = 2 if model.remat in ("dots", "full") else 1
    if model.attention == "einsum":
        return tokens * (a_token + model.depth * 2 * (forward + 2) * 2 * model.context * model.width)
    calls = {"fwd": forward, "dkv": 1, "dq": 1}
    kernels = {name: model.depth * count * config.train.accumulation for name, count in calls.items()}
    return tokens * a_token + attention_flops(config, kernels)
