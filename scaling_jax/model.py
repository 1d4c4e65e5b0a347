"""The decoder-only transformer, a Flax NNX module that stands alone.

Pre-norm RMSNorm without gain (gains break μP transfer: Lingle, arXiv 2404.05728), rotary positions, blocks scanned over depth.
Parameters and norms are float32, activations `compute_dtype`, logits float32. Every parameter carries the rule that the
parametrization gave it (`scaling_jax.parameters`); nothing else in the package decides its init, lr or decay.
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
from scaling_jax.noise_scale import bias, dense_many, embed, embed_tied, unembed, unembed_tied
from scaling_jax.parameters import Parameters
from scaling_jax.parametrization import Parametrization

KINDS = ("embedding", "attention", "mlp", "unembedding")  # of parameters; entries of a probe

Probe = dict[str, Array]  # by kind: [B], or [depth, B] of what every block has; with a metric one more axis, of length 2

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
    """Shape of the model. Units and meanings as in `scaling_jax.fields.FIELDS`, section model."""

    vocab_size: int
    width: int
    depth: int
    head_dim: int
    context: int
    mlp: str = "gelu"
    mlp_ratio: float = 4.0
    tied_embeddings: bool = False
    biases: bool = False
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    kv_heads: int = 0
    norm_gains: bool = False
    qk_norm: bool = False
    shared_depth: bool = False
    dropout: float = 0.0
    compute_dtype: str = "float32"
    remat: str = "none"
    loss_chunk_tokens: int = 0

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
        """N, non-embedding parameters (Kaplan et al. 2020), biases not counted."""
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


Tap = Callable[[str, Array], object]


def _no_tap(kind: str, activation: Array) -> None:
    pass


def _weight(module: nnx.Module | None, name: str) -> Array | None:
    return None if module is None else getattr(module, name)[...]


class Block(nnx.Module):
    """One pre-norm block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, parametrization: Parametrization, rngs: nnx.Rngs):
        make = Parameters(parametrization, rngs, width=config.width, depth=config.depth)
        width, mlp = config.width, config.mlp_width
        self.query = make.matrix("query", (width, width), ("embed", "heads"))
        self.key = make.matrix("hidden", (width, width), ("embed", "heads"))
        self.value = make.matrix("hidden", (width, width), ("embed", "heads"))
        self.attention_out = make.matrix("hidden", (width, width), ("heads", "embed"))
        self.mlp_in = make.matrix("hidden", (width, mlp), ("embed", "mlp"))
        if config.mlp == "swiglu":
            self.mlp_gate = make.matrix("hidden", (width, mlp), ("embed", "mlp"))
        base_mlp = mlp_width(parametrization.base_width, config.mlp_ratio)
        self.mlp_out = make.matrix("hidden", (mlp, width), ("mlp", "embed"), base_fan_in=base_mlp)
        if config.biases:
            self.query_bias, self.key_bias, self.value_bias = (make.vector(width, "heads") for _ in range(3))
            self.attention_out_bias, self.mlp_out_bias = (make.vector(width, "embed") for _ in range(2))
            self.mlp_in_bias = make.vector(mlp, "mlp")
            if config.mlp == "swiglu":
                self.mlp_gate_bias = make.vector(mlp, "mlp")
        self.config = config
        self.attention_scale = parametrization.attention_scale(config.head_dim)
        self.residual_multiplier = parametrization.residual_multiplier(config.depth)

    def __call__(self, x_BxLxD: Array, probe: Probe | None = None, tap: Tap = _no_tap, metric: "Block | None" = None) -> Array:
        attention, mlp = (None, None) if probe is None else (probe["attention"], probe["mlp"])
        middle_BxLxD = self._add(x_BxLxD, self.attend(rms_norm(x_BxLxD), attention, tap, metric))
        end_BxLxD = self._add(middle_BxLxD, self.feed_forward(rms_norm(middle_BxLxD), mlp, tap, metric))
        tap("residual", end_BxLxD)
        return end_BxLxD

    def _add(self, x_BxLxD: Array, branch_BxLxD: Array) -> Array:
        return constrain(x_BxLxD + self.residual_multiplier * branch_BxLxD, "batch", "length", "residual")

    def _biased(self, name: str, x_BxLxO: Array, probe_B: Array | None, metric: "Block | None") -> Array:
        name = f"{name}_bias"
        return bias(x_BxLxO, _weight(self, name), probe_B, _weight(metric, name)) if self.config.biases else x_BxLxO

    def _project(self, names: tuple[str, ...], axis: str, x_BxLxI: Array, probe_B: Array | None, metric: "Block | None") -> list[Array]:
        """The projections `names` of one input, which lie along the logical `axis`."""
        ws_IxO = [_weight(self, name) for name in names]
        metrics_IxO = None if metric is None else [_weight(metric, name) for name in names]
        ys_BxLxO = dense_many(x_BxLxI, ws_IxO, probe_B, metrics_IxO, shards=batch_shards(), joined=on_one_device())
        biased = (self._biased(name, y_BxLxO, probe_B, metric) for name, y_BxLxO in zip(names, ys_BxLxO, strict=True))
        return [constrain(y_BxLxO, "batch", "length", axis) for y_BxLxO in biased]

    def attend(self, x_BxLxD: Array, probe_B: Array | None, tap: Tap = _no_tap, metric: "Block | None" = None) -> Array:
        batch, length, _ = x_BxLxD.shape

        def heads_first(x_BxLxHK: Array) -> Array:  # a layout whose products run twice as fast on CPU as [B, L, H, K]
            return x_BxLxHK.reshape(batch, length, self.config.heads, self.config.head_dim).swapaxes(1, 2)

        qkv_BxLxHK = self._project(("query", "key", "value"), "heads", x_BxLxD, probe_B, metric)
        q_BxHxLxK, k_BxHxLxK, v_BxHxLxK = map(heads_first, qkv_BxLxHK)
        q_BxHxLxK, k_BxHxLxK = (rotary(x_BxHxLxK, self.config.rope_theta) for x_BxHxLxK in (q_BxHxLxK, k_BxHxLxK))
        y_BxHxLxK = causal_attention(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, self.attention_scale)
        tap("q", q_BxHxLxK), tap("k", k_BxHxLxK), tap("v", v_BxHxLxK)
        if tap is not _no_tap:
            # Those of the future are set to 0: nothing is learned about them.
            tap("attention logits", jnp.tril(self.attention_scale * jnp.einsum("bhlk,bhmk->bhlm", q_BxHxLxK, k_BxHxLxK)))
        y_BxLxD = constrain(y_BxHxLxK.swapaxes(1, 2).reshape(batch, length, -1), "batch", "length", "heads")
        (y_BxLxD,) = self._project(("attention_out",), "residual", y_BxLxD, probe_B, metric)
        tap("attention output", y_BxLxD)
        return y_BxLxD

    def feed_forward(self, x_BxLxD: Array, probe_B: Array | None, tap: Tap = _no_tap, metric: "Block | None" = None) -> Array:
        activation = _ACTIVATIONS[self.config.mlp]
        gated = self.config.mlp == "swiglu"
        hs_BxLxF = self._project(("mlp_in", "mlp_gate") if gated else ("mlp_in",), "mlp", x_BxLxD, probe_B, metric)
        h_BxLxF = activation(hs_BxLxF[-1]) * hs_BxLxF[0] if gated else activation(hs_BxLxF[0])
        (y_BxLxD,) = self._project(("mlp_out",), "residual", h_BxLxF, probe_B, metric)
        tap("MLP hidden", h_BxLxF), tap("MLP output", y_BxLxD)
        return y_BxLxD


class Transformer(nnx.Module):
    """Decoder-only transformer: tokens [B, L] in, logits [B, L, V] (float32) out.

    Args:
      config: shape of the model.
      parametrization: rules of init and multipliers; default `standard`.
      rngs: seeds of the initial parameters.

    The optional `probe`, made by `new_probe`, has each sequence's squared gradient norms per kind of layer and block as its cotangent:
    see `scaling_jax.noise_scale.per_example`. The optional `metric` is this module once more, with weights P ≥ 0 in the place of its
    parameters. The optional `tap(kind, activation)` is shown every kind of activation once, those of the blocks with a leading axis,
    the depth.
    """

    def __init__(self, config: TransformerConfig, parametrization: Parametrization | None = None, *, rngs: nnx.Rngs):
        parametrization = parametrization or Parametrization()
        width, vocab = config.width, config.vocab_size
        make = Parameters(parametrization, rngs, width=width, depth=config.depth)
        self.embedding = make.matrix("tied" if config.tied_embeddings else "embedding", (vocab, width), ("vocab", "embed"))
        if not config.tied_embeddings:
            self.unembedding = make.matrix("output", (width, vocab), ("embed", "vocab"))

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, parametrization, rngs)

        self.blocks = stack(rngs)  # every parameter gains a leading axis, the depth
        self.config = config
        read_out = self.embedding if config.tied_embeddings else self.unembedding
        self.logit_multiplier = read_out.get_metadata()["rule"].multiplier

    def new_probe(self, batch: int, metric: bool = False) -> Probe:
        """Zeros to differentiate with respect to; two columns, without and with the metric, if there is to be one."""
        columns, depth = (2,) if metric else (), self.config.depth
        shapes = {"embedding": (batch,), "attention": (depth, batch), "mlp": (depth, batch)}
        if not self.config.tied_embeddings:  # the embedding's entry has both uses
            shapes["unembedding"] = (batch,)
        return {kind: jnp.zeros((*shape, *columns), jnp.float32) for kind, shape in shapes.items()}

    def __call__(self, tokens_BxL: Array, probe: Probe | None = None, tap: Tap = _no_tap, metric: "Transformer | None" = None) -> Array:
        config, tied = self.config, self.config.tied_embeddings
        dtype = jnp.dtype(config.compute_dtype)
        probe_B, metric_VxD = None if probe is None else probe["embedding"], _weight(metric, "embedding")
        carrier_BxLxD = None
        if tied and probe is not None:
            x_BxLxD, carrier_BxLxD = embed_tied(self.embedding[...], tokens_BxL, probe_B, metric_VxD, dtype=dtype)
        else:
            x_BxLxD = embed(self.embedding[...], tokens_BxL, probe_B, metric_VxD, dtype=dtype)
        # The table is sharded along its width. Said in two steps, the partitioner exchanges pieces and does not copy the whole.
        x_BxLxD = constrain(constrain(x_BxLxD, "replica", "length", "embed"), "batch", "length", "residual")

        tap("embedding", x_BxLxD)
        graph, layers = nnx.split(self.blocks)
        probes = None if probe is None else {kind: probe[kind] for kind in ("attention", "mlp")}
        metrics = None if metric is None else nnx.split(metric.blocks)[1]

        def block(x_BxLxD: Array, layer: tuple[nnx.State, Probe | None, nnx.State | None]) -> tuple[Array, dict[str, Array]]:
            params, probe, metric = layer
            activations: dict[str, Array] = {}
            collect = _no_tap if tap is _no_tap else activations.__setitem__
            metric = None if metric is None else nnx.merge(graph, metric)
            return nnx.merge(graph, params)(x_BxLxD, probe, collect, metric), activations

        if config.remat != "none":
            block = jax.checkpoint(block, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)
        x_BxLxD, stacked = jax.lax.scan(block, x_BxLxD, (layers, probes, metrics))
        for kind, activation in stacked.items():
            tap(kind, activation)

        h_BxLxD = rms_norm(x_BxLxD) * self.logit_multiplier
        shards = batch_shards()
        if not tied:
            probe_B = None if probe is None else probe["unembedding"]
            logits_BxLxV = unembed(h_BxLxD, self.unembedding[...], probe_B, _weight(metric, "unembedding"), shards=shards)
        elif carrier_BxLxD is None:
            logits_BxLxV = unembed(h_BxLxD, self.embedding[...].T, shards=shards)
        else:
            logits_BxLxV = unembed_tied(h_BxLxD, self.embedding[...], tokens_BxL, carrier_BxLxD, probe_B, metric_VxD, shards=shards)
        tap("logits", logits_BxLxV)
        return constrain(logits_BxLxV, "batch", "length", "vocab")

    def forward_multiplier(self, path: tuple[str, ...]) -> float:
        """What the forward pass multiplies this parameter's output with."""
        if path[-1] in ("attention_out", "mlp_out"):
            return self.blocks.residual_multiplier
        read_out = path[-1] == "unembedding" or (path[-1] == "embedding" and self.config.tied_embeddings)
        return self.logit_multiplier if read_out else 1.0


def parameter_kind(path: tuple[str, ...]) -> str:
    """The entry of KINDS that a parameter's path belongs to."""
    name = str(path[-1])
    if name.startswith("mlp"):
        return "mlp"
    return name if name in KINDS else "attention"


def token_losses(logits_BxLxV: Array, targets_BxL: Array) -> Array:
    """Cross-entropy of every token in nats: [B, L], float32."""
    log_norm_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    # A masked sum, not a gather: the vocabulary may lie across devices.
    is_target_BxLxV = targets_BxL[..., None] == jnp.arange(logits_BxLxV.shape[-1])[None, None]
    return log_norm_BxL - jnp.sum(jnp.where(is_target_BxLxV, logits_BxLxV, 0.0), axis=-1)


def sequence_losses(logits_BxLxV: Array, targets_BxL: Array) -> Array:
    """Cross-entropy in nats per token, averaged over each sequence: [B]. Float32."""
    return jnp.mean(token_losses(logits_BxLxV, targets_BxL), axis=-1)
