"""One pre-norm block: attention, then MLP, each added to the residual stream."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import Array

from scaling_jax.config import mlp_width
from scaling_jax.mesh import constrain
from scaling_jax.model.attention import causal_attention, splash_attention
from scaling_jax.model.cache import Cache
from scaling_jax.model.cpu import CPU_ACTIVATIONS, blocked_attention
from scaling_jax.model.layers import ACTIVATIONS, NO_DROPOUT, Dropout, rms_norm, rotary
from scaling_jax.model.shape import TransformerConfig
from scaling_jax.model.weights import OwnWeights, Weights, place_input
from scaling_jax.parameters import Parameters
from scaling_jax.parametrization import Parametrization

Tap = Callable[[str, Array], object]


def no_tap(kind: str, activation: Array) -> None:
    pass


class Block(nnx.Module):
    """Attention and MLP with their parameters. `weights` say how these act; `scaling_jax.model.weights` has the ways."""

    def __init__(self, config: TransformerConfig, parametrization: Parametrization, rngs: nnx.Rngs):
        make = Parameters(parametrization, rngs, width=config.width, depth=config.depth)
        width, kv_width, mlp = config.width, config.kv_width, config.mlp_width
        self.query = make.matrix("query", (width, width), ("embed", "heads"))
        self.key = make.matrix("hidden", (width, kv_width), ("embed", "heads"))
        self.value = make.matrix("hidden", (width, kv_width), ("embed", "heads"))
        self.attention_out = make.matrix("hidden", (width, width), ("heads", "embed"))
        self.mlp_in = make.matrix("hidden", (width, mlp), ("embed", "mlp"))
        if config.mlp == "swiglu":
            self.mlp_gate = make.matrix("hidden", (width, mlp), ("embed", "mlp"))
        base_mlp = mlp_width(parametrization.base_width, config.mlp_ratio)
        self.mlp_out = make.matrix("hidden", (mlp, width), ("mlp", "embed"), base_fan_in=base_mlp)
        if config.biases:
            self.query_bias = make.vector(width, "heads")
            self.key_bias, self.value_bias = (make.vector(kv_width, "heads") for _ in range(2))
            self.attention_out_bias, self.mlp_out_bias = (make.vector(width, "embed") for _ in range(2))
            self.mlp_in_bias = make.vector(mlp, "mlp")
            if config.mlp == "swiglu":
                self.mlp_gate_bias = make.vector(mlp, "mlp")
        if config.norm_gains:
            self.attention_gain, self.mlp_gain = (make.vector(width, "norm", value=1.0) for _ in range(2))
            if config.qk_norm:
                self.query_gain, self.key_gain = (make.vector(config.head_dim, "norm", value=1.0) for _ in range(2))
        self.config = config
        self.attention_scale = parametrization.attention_scale(config.head_dim)
        self.residual_multiplier = parametrization.residual_multiplier(config.depth)

    def __call__(
        self, x_BxLxD: Array, weights: Weights | None = None, tap: Tap = no_tap, drop: Dropout = NO_DROPOUT, cache: Cache | None = None
    ) -> tuple[Array, Cache | None]:
        """The residual stream after the block, and the cache with these tokens.

        Args:
          x_BxLxD: residual stream.
          weights: how the parameters act; plainly by default.
          tap: is shown every kind of activation.
          drop: dropout, with this block's keys.
          cache: of this block; what it holds comes before x.
        """
        weights = weights or OwnWeights(self)
        normed_BxLxD = place_input(weights.gain("attention_gain", rms_norm(x_BxLxD)))
        attended_BxLxD, cache = self.attend(normed_BxLxD, weights, tap, drop, cache)
        x_BxLxD = self._add(x_BxLxD, drop(attended_BxLxD, 1))
        fed_BxLxD = self.feed_forward(place_input(weights.gain("mlp_gain", rms_norm(x_BxLxD))), weights, tap)
        x_BxLxD = self._add(x_BxLxD, drop(fed_BxLxD, 2))
        tap("residual", x_BxLxD)
        return x_BxLxD, cache

    def _add(self, x_BxLxD: Array, branch_BxLxD: Array) -> Array:
        return constrain(x_BxLxD + self.residual_multiplier * branch_BxLxD, "batch", "sequence", "residual")

    def attend(
        self, x_BxLxD: Array, weights: Weights, tap: Tap = no_tap, drop: Dropout = NO_DROPOUT, cache: Cache | None = None
    ) -> tuple[Array, Cache | None]:
        batch, length, _ = x_BxLxD.shape

        def heads_first(x_BxLxHK: Array) -> Array:  # a layout whose products run twice as fast on CPU as [B, L, H, K]
            return x_BxLxHK.reshape(batch, length, -1, self.config.head_dim).swapaxes(1, 2)

        q_BxHxLxK, k_BxGxLxK, v_BxGxLxK = map(heads_first, weights.project(("query", "key", "value"), "heads", x_BxLxD))
        if self.config.qk_norm:
            q_BxHxLxK, k_BxGxLxK = weights.gain("query_gain", rms_norm(q_BxHxLxK)), weights.gain("key_gain", rms_norm(k_BxGxLxK))
        start = 0 if cache is None else cache.length
        if self.config.positions == "rotary":
            q_BxHxLxK, k_BxGxLxK = (rotary(x, self.config.rope_theta, start, self.config.for_cpu) for x in (q_BxHxLxK, k_BxGxLxK))
        tap("q", q_BxHxLxK), tap("k", k_BxGxLxK), tap("v", v_BxGxLxK)
        if tap is not no_tap:
            k_BxHxLxK = jnp.repeat(k_BxGxLxK, self.config.heads // k_BxGxLxK.shape[1], axis=1)
            # Those of the future are set to 0: nothing is learned about them.
            tap("attention logits", jnp.tril(self.attention_scale * jnp.einsum("bhlk,bhmk->bhlm", q_BxHxLxK, k_BxHxLxK)))
        if cache is not None:
            cache = cache.append(k_BxGxLxK, v_BxGxLxK)
            k_BxGxLxK, v_BxGxLxK = cache.k_BxGxMxK, cache.v_BxGxMxK
        if self.config.for_cpu and self.config.attention == "einsum" and cache is None and (drop.keys_B is None or not drop.rate):
            y_BxHxLxK = blocked_attention(q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, self.attention_scale, self.config.compute_dtype)
        elif self.config.attention == "einsum" or cache is not None:
            y_BxHxLxK = causal_attention(q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, self.attention_scale, start, lambda weights: drop(weights, 0))
        else:
            interpret = self.config.attention == "splash_interpreted"
            y_BxHxLxK = splash_attention(q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, self.attention_scale, interpret)
        y_BxLxD = constrain(y_BxHxLxK.swapaxes(1, 2).reshape(batch, length, -1), "batch", "length", "heads")
        (y_BxLxD,) = weights.project(("attention_out",), "residual", y_BxLxD)
        tap("attention output", y_BxLxD)
        return y_BxLxD, cache

    def feed_forward(self, x_BxLxD: Array, weights: Weights, tap: Tap = no_tap) -> Array:
        activation = (CPU_ACTIVATIONS if self.config.for_cpu else ACTIVATIONS)[self.config.mlp]
        gated = self.config.mlp == "swiglu"
        hs_BxLxF = weights.project(("mlp_in", "mlp_gate") if gated else ("mlp_in",), "mlp", x_BxLxD)
        h_BxLxF = activation(hs_BxLxF[-1]) * hs_BxLxF[0] if gated else activation(hs_BxLxF[0])
        (y_BxLxD,) = weights.project(("mlp_out",), "residual", h_BxLxF)
        tap("MLP hidden", h_BxLxF), tap("MLP output", y_BxLxD)
        return y_BxLxD
