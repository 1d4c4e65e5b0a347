"""The least that a training step must send between devices, for the mesh that was chosen: what a compiled program is held against.

One device's bytes on the wire per step, for ring algorithms (`scaling_jax.pods.collectives` has the formulas). With f devices along fsdp,
t along tensor, r along replica, and a matrix of which a device computes with 1/t:

- weights: gathered along fsdp for the forward pass and again for the backward pass, in the dtype of computation, in every microbatch;
- gradients: scattered along fsdp and added up along replica, in the same dtype, in every microbatch; those of the embedding table, which
  is not gathered, and of vectors in float32;
- tensor: a block's input is gathered and its output scattered, twice a block (attention and MLP), forwards and backwards (Korthikanti et
  al. 2022, arXiv:2205.05198), and what the backward pass computes again a second time: both inputs, and the attention's output if it is not
  kept; the same once for the embedding and for the readout, and three numbers a token for the loss;
- embedding: activations change from the table's layout along fsdp to the batch's, once in each direction.

A metric (config.noise_scale.preconditioned) is gathered like weights, once. Not counted: scalars, squared norms, token ids.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from scaling_jax.config import sequences_per_batch
from scaling_jax.mesh import spec
from scaling_jax.pods.collectives import Collective


class Least(NamedTuple):
    """Bytes that one device must send in a step."""

    weights: float  # along fsdp
    gradients: float  # along fsdp
    replicas: float  # of gradients, along replica
    tensor: float
    embedding: float  # along fsdp

    @property
    def of_weights(self) -> float:
        """For weights and their gradients together."""
        return self.weights + self.gradients + self.replicas

    @property
    def total(self) -> float:
        return sum(self)

    def collectives(self, mesh_shape: dict[str, int], slices: int = 1) -> list[Collective]:
        """The same as if a program had one collective for each; replicas in several slices add up within each slice first."""
        between = self.replicas * (slices - 1) / max(1, mesh_shape["replica"] - 1)
        sent = (
            ("all-gather", "fsdp", self.weights, False),
            ("reduce-scatter", "fsdp", self.gradients, False),
            ("all-to-all", "fsdp", self.embedding, False),
            ("all-reduce", "replica", self.replicas - between, False),
            ("all-reduce", "replica", between, True),
            ("all-gather", "tensor", self.tensor, False),
        )
        return [
            Collective(kind, (axis,), mesh_shape[axis], 1, wire_bytes, "least", (), "", dcn, f"least of {kind}")
            for kind, axis, wire_bytes, dcn in sent
            if wire_bytes
        ]


def least_traffic(config: ConfigDict, params: nnx.State) -> Least:
    """Of a step at config.train.batch_tokens on the config's mesh.

    Args:
      config: with mesh.fsdp resolved.
      params: of its model; abstract ones will do (`Trainer(config).abstract_state.params`, the same for any mesh).
    """
    mesh = config.mesh
    r, f, t = mesh.replica, mesh.fsdp, mesh.tensor
    microbatches, size = config.train.accumulation, jnp.dtype(config.model.compute_dtype).itemsize
    weights = gradients = replicas = 0.0
    for path, param in nnx.to_flat_state(params):
        axes = param.get_metadata()["axes"]
        placed = spec(*axes)
        own = math.prod(param.shape) / (t if "tensor" in placed else 1)
        scattered = f if "fsdp" in placed else 1
        table, matrix = path[-1] in ("embedding", "position_embedding"), len(axes) == 2
        read_out = path[-1] == "embedding" and config.model.tied_embeddings
        if matrix and (not table or read_out):
            passes = 3 if config.noise_scale.every and config.noise_scale.preconditioned else 2
            weights += microbatches * passes * _gather(own * size, scattered)
            gradients += microbatches * _gather(own * size, scattered)
            replicas += microbatches * _add_up(own * size / scattered, r)
        if path[-1] == "position_embedding":  # rows that every sequence reads
            weights += microbatches * _gather(own * 4, scattered)
            gradients += microbatches * _gather(own * 4, scattered)
        if table or not matrix:
            gradients += 0 if matrix else microbatches * _add_up(own * 4, f)
            replicas += microbatches * _add_up(own * 4 / (scattered if matrix else f), r)
    stream = sequences_per_batch(config) / (r * f) * config.model.context * config.model.width * size
    again = {"none": 0, "dots": 2}.get(config.model.remat, 3)
    per_token = sequences_per_batch(config) / (r * f) * config.model.context * 4
    tensor = _gather(stream * ((8 + again) * config.model.depth + 4), t) + 3 * _add_up(per_token, t)
    return Least(weights, gradients, replicas, tensor, 2 * _gather(stream / t, f))


def _gather(whole: float, n: int) -> float:
    """Bytes that a device sends to gather, or scatter, an array of so many bytes among n."""
    return (n - 1) / n * whole


def _add_up(whole: float, n: int) -> float:
    return 2 * (n - 1) / n * whole
