"""The decoder-only transformer, a Flax NNX module that stands alone."""

from scaling_jax.model.attention import BLOCK, causal_attention, splash_attention
from scaling_jax.model.block import Block
from scaling_jax.model.cache import Cache
from scaling_jax.model.layers import rms_norm, rotary
from scaling_jax.model.shape import TransformerConfig
from scaling_jax.model.transformer import Transformer, sequence_losses
from scaling_jax.model.weights import KINDS, Probe, parameter_kind
from scaling_jax.noise_scale import token_losses

__all__ = [
    "BLOCK",
    "KINDS",
    "Block",
    "Cache",
    "Probe",
    "Transformer",
    "TransformerConfig",
    "causal_attention",
    "parameter_kind",
    "rms_norm",
    "rotary",
    "sequence_losses",
    "splash_attention",
    "token_losses",
]
