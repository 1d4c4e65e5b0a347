"""The least that a training step must send between devices, for the mesh that was chosen: what a compiled program is held against.

One device's bytes on the wire per step, for ring algorithms (`scaling_jax.pods.collectives` has the formulas). With f devices along fsdp,
t along tensor, r along replica, and a matrix of which a device computes with 1/t:

- weights: gathered along fsdp for the forward pass and again for the backward pass, in the dtype of computation, in every microbatch;
- gradients: scattered along fsdp and added up along replica, in the same dtype, in every microbatch; those of the embedding table, which
  is not gathered, and of vectors in float32;
- tensor: a block's input is gathered and its output scattered, twice a block (attention and MLP), forwards and backwards (Korthikanti et
  al. 2022, arXiv:2205.05198), and what the backward pass computes again a second time, but for the MLP's output; the same once for the
  embedding and for the readout, and three numbers a token for the loss;
- embedding: activations change from the table's layout along fsdp to the batch's, once in each direction.

A metric (config.noise_scale.preconditioned) is gathered like weights, once. Not counted: scalars, squared norms, token ids.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from scaling_jax.config import sequences_per_batch
from scaling_jax.mesh import spec
from scaling_jax.train.step import Trainer


class Least(NamedTuple):
    """Bytes that one device must send in a step."""

    weights: float
    gradients: float
    tensor: float
    embedding: float

    @property
    def of_weights(self) -> float:
        """For weights and their gradients together."""
        return self.weights + self.gradients

    @property
    def total(self) -> float:
        return sum(self)


def least_traffic(trainer: Trainer) -> Least:
    """Of a step at config.train.batch_tokens on the trainer's mesh."""
    config, mesh = trainer.config, trainer.config.mesh
    r, f, t = mesh.replica, mesh.fsdp, mesh.tensor
    microbatches, size = config.train.accumulation, jnp.dtype(config.model.compute_dtype).itemsize
    weights = gradients = 0.0
    for path, param in nnx.to_flat_state(trainer.abstract_state.params):
        axes = param.get_metadata()["axes"]
        placed = spec(*axes)
        own = math.prod(param.shape) / (t if "tensor" in placed else 1)
        scattered = f if "fsdp" in placed else 1
        table, matrix = path[-1] in ("embedding", "position_embedding"), len(axes) == 2
        read_out = path[-1] == "embedding" and config.model.tied_embeddings
        if matrix and (not table or read_out):
            passes = 3 if config.noise_scale.every and config.noise_scale.preconditioned else 2
            weights += microbatches * passes * _gather(own * size, scattered)
            gradients += microbatches * (_gather(own * size, scattered) + _add_up(own * size / scattered, r))
        if table or not matrix:
            gradients += microbatches * _add_up(own * 4 / scattered, r if matrix else r * f)
    stream = sequences_per_batch(config) / (r * f) * config.model.context * config.model.width * size
    again = 0 if config.model.remat == "none" else 3
    per_token = sequences_per_batch(config) / (r * f) * config.model.context * 4
    tensor = _gather(stream * ((8 + again) * config.model.depth + 4), t) + 3 * _add_up(per_token, t)
    return Least(weights, gradients, tensor, 2 * _gather(stream / t, f))


def _gather(whole: float, n: int) -> float:
    """Bytes that a device sends to gather, or scatter, an array of so many bytes among n."""
    return (n - 1) / n * whole


def _add_up(whole: float, n: int) -> float:
    return 2 * (n - 1) / n * whole
