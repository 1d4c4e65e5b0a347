"""The decoder-only transformer, a Flax NNX module that stands alone.

Pre-norm RMSNorm without gain (gains break μP transfer: Lingle, arXiv 2404.05728), rotary positions, blocks scanned over depth.
Parameters and norms are float32, activations `compute_dtype`, logits float32. Every parameter is an `nnx.Param` that carries
its role, fan-in and the rule that the parametrization gave it; nothing else in the package decides its init, lr or decay.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scaling_jax.config import mlp_width
from scaling_jax.errors import UserError
from scaling_jax.mesh import batch_shards, constrain, on_one_device
from scaling_jax.noise_scale import dense, dense_many, embed, embed_tied, unembed_tied
from scaling_jax.parametrization import Parametrization

KINDS = ("embedding", "attention", "mlp", "unembedding")  # groups of a probe [B, len(KINDS)]

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keeps the projections' outputs
    "full": jax.checkpoint_policies.nothing_saveable,
}
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of the model. Units and meanings as in `scaling_jax.config.FIELDS`, section model."""

    vocab_size: int
    width: int
    depth: int
    head_dim: int
    context: int
    mlp: str = "gelu"
    mlp_ratio: float = 4.0
    tied_embeddings: bool = False
    rope_theta: float = 10_000.0
    compute_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        if self.width % self.head_dim or self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}: must be even and divide width, {self.width}")
        if self.mlp not in _ACTIVATIONS:
            raise UserError(f"mlp is {self.mlp!r}: must be one of {', '.join(_ACTIVATIONS)}")
        if self.remat not in ("none", *_REMAT_POLICIES):
            raise UserError(f"remat is {self.remat!r}: must be one of none, {', '.join(_REMAT_POLICIES)}")

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def mlp_width(self) -> int:
        return mlp_width(self.width, self.mlp_ratio)

    @property
    def flops_per_token(self) -> int:
        """Forward and backward: 6·N plus 12·depth·context·width of attention, without the causal saving."""
        return 6 * self.params + 12 * self.depth * self.context * self.width

    @property
    def params(self) -> int:
        """N, non-embedding parameters (Kaplan et al. 2020)."""
        mlp_matrices = 3 if self.mlp == "swiglu" else 2
        return self.depth * (4 * self.width**2 + mlp_matrices * self.width * self.mlp_width)


def rms_norm(x_BxLxD: Array) -> Array:
    """x over its root mean square, computed in float32. Epsilon 1e-6."""
    x32_BxLxD = x_BxLxD.astype(jnp.float32)
    mean_sq_BxLx1 = jnp.mean(jnp.square(x32_BxLxD), axis=-1, keepdims=True)
    return (x32_BxLxD * jax.lax.rsqrt(mean_sq_BxLx1 + 1e-6)).astype(x_BxLxD.dtype)


def rotary(x_BxHxLxK: Array, theta: float) -> Array:
    """Rotates the two halves of each head by position-dependent angles (Su et al. 2021), in float32."""
    half = x_BxHxLxK.shape[-1] // 2
    wavelength_K = theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle_LxK = jnp.arange(x_BxHxLxK.shape[2], dtype=jnp.float32)[:, None] / wavelength_K[None, :]
    cos_LxK, sin_LxK = jnp.cos(angle_LxK)[None, None], jnp.sin(angle_LxK)[None, None]
    a, b = jnp.split(x_BxHxLxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos_LxK - b * sin_LxK, b * cos_LxK + a * sin_LxK], axis=-1).astype(x_BxHxLxK.dtype)


def causal_attention(q_BxHxLxK: Array, k_BxHxLxK: Array, v_BxHxLxK: Array, scale: float) -> Array:
    """softmax(scale·q·k, causal)·v; logits and softmax in float32."""
    length = q_BxHxLxK.shape[2]
    logits_BxHxLxM = jnp.einsum("bhlk,bhmk->bhlm", q_BxHxLxK, k_BxHxLxK, preferred_element_type=jnp.float32) * scale
    causal_LxM = jnp.tril(jnp.ones((length, length), bool))
    logits_BxHxLxM = jnp.where(causal_LxM[None, None], logits_BxHxLxM, -1e30)
    weights_BxHxLxM = jax.nn.softmax(logits_BxHxLxM, axis=-1).astype(v_BxHxLxK.dtype)
    return jnp.einsum("bhlm,bhmk->bhlk", weights_BxHxLxM, v_BxHxLxK)


class _Parameters:
    """Makes parameters by the parametrization's rules, and refuses any without one."""

    def __init__(self, config: TransformerConfig, parametrization: Parametrization, rngs: nnx.Rngs):
        self.config, self.parametrization, self.rngs = config, parametrization, rngs

    def matrix(self, role: str, shape: tuple[int, int], axes: tuple[str, str], fan_in: int, base_fan_in: int) -> nnx.Param:
        c = self.config
        rule = self.parametrization.rule(role, fan_in=fan_in, base_fan_in=base_fan_in, width=c.width, depth=c.depth)
        value = rule.init_std * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        return nnx.Param(value, role=role, axes=axes, fan_in=fan_in, base_fan_in=base_fan_in, rule=rule)

    def hidden(self, fan_in: int, fan_out: int, axes: tuple[str, str], base_fan_in: int) -> nnx.Param:
        return self.matrix("hidden", (fan_in, fan_out), axes, fan_in, base_fan_in)


class Block(nnx.Module):
    """One pre-norm block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, parametrization: Parametrization, rngs: nnx.Rngs):
        make = _Parameters(config, parametrization, rngs)
        width, base = config.width, parametrization.base_width
        self.query = make.hidden(width, width, ("embed", "heads"), base)
        self.key = make.hidden(width, width, ("embed", "heads"), base)
        self.value = make.hidden(width, width, ("embed", "heads"), base)
        self.attention_out = make.hidden(width, width, ("heads", "embed"), base)
        self.mlp_in = make.hidden(width, config.mlp_width, ("embed", "mlp"), base)
        if config.mlp == "swiglu":
            self.mlp_gate = make.hidden(width, config.mlp_width, ("embed", "mlp"), base)
        self.mlp_out = make.hidden(config.mlp_width, width, ("mlp", "embed"), mlp_width(base, config.mlp_ratio))
        self.config = config
        self.attention_scale = parametrization.attention_scale(config.head_dim)
        self.residual_multiplier = parametrization.residual_multiplier(config.depth)

    def __call__(self, x_BxLxD: Array, probe_BxG: Array | None = None) -> Array:
        attention, mlp = (None, None) if probe_BxG is None else (probe_BxG[:, 1], probe_BxG[:, 2])
        x_BxLxD = constrain(x_BxLxD + self.residual_multiplier * self.attend(rms_norm(x_BxLxD), attention), "batch", "length", "residual")
        return constrain(x_BxLxD + self.residual_multiplier * self.feed_forward(rms_norm(x_BxLxD), mlp), "batch", "length", "residual")

    def attend(self, x_BxLxD: Array, probe_B: Array | None) -> Array:
        batch, length, _ = x_BxLxD.shape

        def heads_first(x_BxLxHK: Array) -> Array:  # a layout whose products run twice as fast on CPU as [B, L, H, K]
            x_BxLxHK = constrain(x_BxLxHK, "batch", "length", "heads")
            return x_BxLxHK.reshape(batch, length, self.config.heads, self.config.head_dim).swapaxes(1, 2)

        projections = dense_many(
            x_BxLxD,
            (self.query[...], self.key[...], self.value[...]),
            probe_B,
            shards=batch_shards(),
            joined=on_one_device(),
        )
        q_BxHxLxK, k_BxHxLxK, v_BxHxLxK = map(heads_first, projections)
        q_BxHxLxK, k_BxHxLxK = (rotary(x_BxHxLxK, self.config.rope_theta) for x_BxHxLxK in (q_BxHxLxK, k_BxHxLxK))
        y_BxHxLxK = causal_attention(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, self.attention_scale)
        y_BxLxD = constrain(y_BxHxLxK.swapaxes(1, 2).reshape(batch, length, -1), "batch", "length", "heads")
        return dense(y_BxLxD, self.attention_out[...], probe_B, shards=batch_shards())

    def feed_forward(self, x_BxLxD: Array, probe_B: Array | None) -> Array:
        activation = _ACTIVATIONS[self.config.mlp]
        gated = self.config.mlp == "swiglu"
        ws_DxF = (self.mlp_in[...], self.mlp_gate[...]) if gated else (self.mlp_in[...],)
        hs_BxLxF = dense_many(x_BxLxD, ws_DxF, probe_B, shards=batch_shards(), joined=on_one_device())
        hs_BxLxF = [constrain(h_BxLxF, "batch", "length", "mlp") for h_BxLxF in hs_BxLxF]
        h_BxLxF = activation(hs_BxLxF[-1]) * hs_BxLxF[0] if gated else activation(hs_BxLxF[0])
        return dense(h_BxLxF, self.mlp_out[...], probe_B, shards=batch_shards())


class Transformer(nnx.Module):
    """Decoder-only transformer: tokens [B, L] in, logits [B, L, V] (float32) out.

    Args:
      config: shape of the model.
      parametrization: rules of init and multipliers; default `standard`.
      rngs: seeds of the initial parameters.

    The optional `probe_BxG` (float32 zeros [B, len(KINDS)]) makes its own cotangent each sequence's squared gradient norm per
    kind of layer: see `scaling_jax.noise_scale.per_example`.
    """

    def __init__(self, config: TransformerConfig, parametrization: Parametrization | None = None, *, rngs: nnx.Rngs):
        parametrization = parametrization or Parametrization()
        width, base, vocab = config.width, parametrization.base_width, config.vocab_size
        make = _Parameters(config, parametrization, rngs)
        self.embedding = make.matrix("embedding", (vocab, width), ("vocab", "embed"), vocab, vocab)
        if not config.tied_embeddings:
            self.unembedding = make.matrix("output", (width, vocab), ("embed", "vocab"), width, base)

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, parametrization, rngs)

        self.blocks = stack(rngs)  # every parameter gains a leading axis, the depth
        self.config = config
        rule = parametrization.rule("output", fan_in=width, base_fan_in=base, width=width, depth=config.depth)
        self.logit_multiplier = rule.multiplier

    def __call__(self, tokens_BxL: Array, probe_BxG: Array | None = None) -> Array:
        config, tied = self.config, self.config.tied_embeddings
        dtype = jnp.dtype(config.compute_dtype)
        carrier_BxLxD = None
        if probe_BxG is None:
            x_BxLxD = embed(self.embedding[...], tokens_BxL, dtype=dtype)
        elif tied:
            x_BxLxD, carrier_BxLxD = embed_tied(self.embedding[...], tokens_BxL, probe_BxG[:, 0], dtype=dtype)
        else:
            x_BxLxD = embed(self.embedding[...], tokens_BxL, probe_BxG[:, 0], dtype=dtype)
        # The table is sharded along its width. Said in two steps, the partitioner exchanges pieces and does not copy the whole.
        x_BxLxD = constrain(constrain(x_BxLxD, "replica", "length", "embed"), "batch", "length", "residual")

        graph, layers = nnx.split(self.blocks)

        def block(x_BxLxD: Array, layer: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graph, layer)(x_BxLxD, probe_BxG), None

        if config.remat != "none":
            block = jax.checkpoint(block, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)
        x_BxLxD, _ = jax.lax.scan(block, x_BxLxD, layers)

        h_BxLxD = rms_norm(x_BxLxD) * self.logit_multiplier
        if not tied:
            probe_B = None if probe_BxG is None else probe_BxG[:, 3]
            logits_BxLxV = dense(h_BxLxD, self.unembedding[...], probe_B, shards=batch_shards(), out_dtype=jnp.float32)
        elif carrier_BxLxD is None:
            logits_BxLxV = dense(h_BxLxD, self.embedding[...].T, shards=batch_shards(), out_dtype=jnp.float32)
        else:
            logits_BxLxV = unembed_tied(h_BxLxD, self.embedding[...], tokens_BxL, carrier_BxLxD, probe_BxG[:, 0], shards=batch_shards())
        return constrain(logits_BxLxV, "batch", "length", "vocab")

    def forward_multiplier(self, path: tuple[str, ...]) -> float:
        """What the forward pass multiplies this parameter's output with."""
        if path[-1] in ("attention_out", "mlp_out"):
            return self.blocks.residual_multiplier
        read_out = path[-1] == "unembedding" or (path[-1] == "embedding" and self.config.tied_embeddings)
        return self.logit_multiplier if read_out else 1.0


def parameter_kind(path: tuple[str, ...]) -> str:
    """The entry of KINDS that a parameter's path belongs to."""
    name = path[-1]
    if name.startswith("mlp"):
        return "mlp"
    return name if name in KINDS else "attention"


def sequence_losses(logits_BxLxV: Array, targets_BxL: Array) -> Array:
    """Cross-entropy in nats per token, averaged over each sequence: [B]. Float32."""
    log_norm_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    # A masked sum, not a gather: the vocabulary may lie across devices.
    is_target_BxLxV = targets_BxL[..., None] == jnp.arange(logits_BxLxV.shape[-1])[None, None]
    target_BxL = jnp.sum(jnp.where(is_target_BxLxV, logits_BxLxV, 0.0), axis=-1)
    return jnp.mean(log_norm_BxL - target_BxL, axis=-1)
