"""What the Transformer's forward pass multiplies with beside its weights, and how weights take it in."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.model import Transformer, TransformerConfig


class Multipliers(NamedTuple):
    """attention_scale is of q·k; residual_multiplier of what attention and MLP add to the residual stream; logit_multiplier of logits."""

    attention_scale: float
    residual_multiplier: float
    logit_multiplier: float

    @classmethod
    def of(cls, model: Transformer) -> "Multipliers":
        return cls(model.blocks.attention_scale, model.blocks.residual_multiplier, model.logit_multiplier)

    @classmethod
    def standard(cls, config: TransformerConfig) -> "Multipliers":
        """What a model multiplies with that knows of no parametrization: 1/sqrt(head_dim) alone."""
        return cls(config.head_dim**-0.5, 1.0, 1.0)


def folded(
    config: TransformerConfig, multipliers: Multipliers, tensors: Mapping[str, np.ndarray]
) -> tuple[TransformerConfig, Multipliers, dict[str, np.ndarray]]:
    """Config, multipliers and tensors, named as in the file, of a model with the `standard` multipliers that gives the same logits.

    The attention scale goes into the queries (after a norm of them, into its gain), the others into the matrices whose output they
    multiply, with their biases. A tied pair cannot take a multiplier in: it comes apart.

    Raises:
      UserError: queries are normed without a gain, and their scale is not 1/sqrt(head_dim).
    """
    standard, tensors = Multipliers.standard(config), dict(tensors)
    of_query = multipliers.attention_scale / standard.attention_scale
    if config.qk_norm and of_query != 1 and not config.norm_gains:
        raise UserError(
            f"the attention scale, {multipliers.attention_scale:g}, cannot be folded: queries are normed (qk_norm) and have no gain; "
            "export without folding, and multiply q·k with it"
        )
    if config.tied_embeddings and multipliers.logit_multiplier != 1:
        config = dataclasses.replace(config, tied_embeddings=False)
        tensors["unembedding.weight"] = tensors["embedding.weight"]
    factors = {
        "query_norm" if config.qk_norm else "query": of_query,
        "attention_out": multipliers.residual_multiplier,
        "mlp_out": multipliers.residual_multiplier,
        "unembedding": multipliers.logit_multiplier,
    }
    for name in tensors:
        factor = factors.get(name.split(".")[-2], 1.0)
        if factor != 1:
            tensors[name] = tensors[name] * np.float32(factor)
    return config, standard, tensors
