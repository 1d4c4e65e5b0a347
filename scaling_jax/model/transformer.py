"""The decoder-only transformer.

Pre-norm RMSNorm, by default without gain (gains break μP transfer: Lingle, arXiv 2404.05728), rotary or learned positions, blocks scanned
over depth. Parameters and norms are float32, activations `compute_dtype`, logits float32. Every parameter carries the rule that the
parametrization gave it (`scaling_jax.parameters`); nothing else in the package decides its init, lr or decay.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scaling_jax.errors import UserError
from scaling_jax.mesh import batch_shards, constrain, constrain_both_ways, on_one_device, shards_of
from scaling_jax.model.attention import SAVED
from scaling_jax.model.block import Block, Tap, no_tap
from scaling_jax.model.cache import Cache
from scaling_jax.model.layers import Dropout, rms_norm
from scaling_jax.model.lookup import look_up
from scaling_jax.model.shape import TransformerConfig
from scaling_jax.model.stack import MOST_WRITTEN_OUT, loop, written_out
from scaling_jax.model.weights import PROJECTION, OwnWeights, Probe, SharedWeights, open_block, place_input, place_output, value_of
from scaling_jax.noise_scale import embed, embed_tied, per_sequence, readout_losses, scale, token_losses, unembed, unembed_tied
from scaling_jax.parameters import Parameters
from scaling_jax.parametrization import Parametrization

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTION),
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nnx.Module):
    """Decoder-only transformer: tokens [B, L] in, logits [B, L, V] (float32) out.

    Args:
      config: shape of the model.
      parametrization: rules of init and multipliers; default `standard`.
      rngs: seeds of the initial parameters.

    The optional `probe`, made by `new_probe`, has each sequence's squared gradient norms per kind of layer and block as its cotangent:
    see `scaling_jax.noise_scale.per_example`. The optional `metric` is this module once more, with weights P ≥ 0 in the place of its
    parameters. The optional `tap(kind, activation)` is shown every kind of activation once, those of the blocks with a leading axis,
    the depth. Without `dropout_keys_B`, a random key for each sequence, nothing is dropped.
    """

    def __init__(self, config: TransformerConfig, parametrization: Parametrization | None = None, *, rngs: nnx.Rngs):
        parametrization = parametrization or Parametrization()
        if config.shared_depth and parametrization.name == "completep":
            raise UserError("shared_depth is True: completep is a rule for blocks of their own; must be standard or mup")
        width, vocab = config.width, config.vocab_size
        make = Parameters(parametrization, rngs, width=width, depth=config.depth)
        self.embedding = make.matrix("tied" if config.tied_embeddings else "embedding", (vocab, width), ("vocab", "embed"))
        if not config.tied_embeddings:
            self.unembedding = make.matrix("output", (width, vocab), ("embed", "vocab"))
        if config.positions == "learned":
            self.position_embedding = make.matrix("embedding", (config.context, width), (None, "embed"))
        if config.norm_gains:
            self.final_gain = make.vector(width, "norm", value=1.0, role="final_vector")

        @nnx.split_rngs(splits=config.blocks)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, parametrization, rngs)

        self.blocks = stack(rngs)  # every parameter gains a leading axis: the depth, or 1 of a shared block
        self.config = config
        read_out = self.embedding if config.tied_embeddings else self.unembedding
        self.logit_multiplier = read_out.get_metadata()["rule"].multiplier

    def new_probe(self, batch: int, metric: bool = False) -> Probe:
        """Zeros to differentiate with respect to; two columns, without and with the metric, if there is to be one."""
        columns, blocks = (2,) if metric else (), self.config.blocks
        shapes = {"embedding": (batch,), "attention": (blocks, batch), "mlp": (blocks, batch)}
        if not self.config.tied_embeddings:  # the embedding's entry has both uses
            shapes["unembedding"] = (batch,)
        return {kind: jnp.zeros((*shape, *columns), jnp.float32) for kind, shape in shapes.items()}

    def new_cache(self, batch: int) -> Cache:
        """An empty cache for `extend`, of `context` tokens."""
        config = self.config
        shape = (config.depth, batch, config.kv_width // config.head_dim, config.context, config.head_dim)
        return Cache(*(jnp.zeros(shape, config.activation_dtype) for _ in range(2)), jnp.int32(0))

    def __call__(
        self,
        tokens_BxL: Array,
        probe: Probe | None = None,
        tap: Tap = no_tap,
        metric: "Transformer | None" = None,
        dropout_keys_B: Array | None = None,
    ) -> Array:
        h_BxLxD, carrier_BxLxD, _ = self._hidden(tokens_BxL, probe, tap, metric, dropout_keys_B)
        of_products = {"shards": shards_of("embed", "vocab"), "dtype": self.config.compute_dtype}
        if not self.config.tied_embeddings:
            probe_B, metric_DxV = self._read_out_probe(probe), value_of(metric, "unembedding")
            logits_BxLxV = unembed(h_BxLxD, self.unembedding[...], probe_B, metric_DxV, **of_products)
        elif carrier_BxLxD is None:
            logits_BxLxV = unembed(h_BxLxD, self.embedding[...].T, **of_products)
        else:
            of_table = carrier_BxLxD, probe["embedding"], value_of(metric, "embedding")
            h_BxLxD = h_BxLxD.astype(self.config.compute_dtype)
            logits_BxLxV = unembed_tied(h_BxLxD, self.embedding[...], tokens_BxL, *of_table, shards=of_products["shards"])
        tap("logits", logits_BxLxV)
        return place_output(logits_BxLxV, "vocab")

    def losses(
        self,
        tokens_BxL: Array,
        targets_BxL: Array,
        probe: Probe | None = None,
        metric: "Transformer | None" = None,
        dropout_keys_B: Array | None = None,
    ) -> Array:
        """Cross-entropy of every target in nats [B, L]; with config.loss_chunk_tokens only the logits of so many tokens are held."""
        chunk = self.config.loss_chunk_tokens
        if not chunk or tokens_BxL.size // batch_shards() <= chunk:
            return token_losses(self(tokens_BxL, probe, metric=metric, dropout_keys_B=dropout_keys_B), targets_BxL)
        h_BxLxD, carrier_BxLxD, _ = self._hidden(tokens_BxL, probe, no_tap, metric, dropout_keys_B)
        h_BxLxD = h_BxLxD.astype(self.config.compute_dtype)
        name = "embedding" if self.config.tied_embeddings else "unembedding"
        w_DxV, metric_DxV = (
            None if w is None else w.T if self.config.tied_embeddings else w for w in (value_of(self, name), value_of(metric, name))
        )
        if not on_one_device():  # gathered once, and not for every piece
            w_DxV = constrain_both_ways(w_DxV.astype(h_BxLxD.dtype), (None, "vocab"), ("embed", "vocab"))
            metric_DxV = None if metric_DxV is None else constrain(metric_DxV, None, "vocab")
        tied = None if carrier_BxLxD is None else (tokens_BxL, carrier_BxLxD)
        of_sizes = {"chunk": chunk, "shards": shards_of("embed", "vocab")}
        return readout_losses(h_BxLxD, w_DxV, targets_BxL, self._read_out_probe(probe), metric_DxV, tied, **of_sizes)

    def extend(self, tokens_BxL: Array, cache: Cache) -> tuple[Array, Cache]:
        """Logits [B, L, V] of tokens that follow those in the cache, and the cache with them; together at most `context` tokens."""
        h_BxLxD, _, cache = self._hidden(tokens_BxL, cache=cache)
        w_DxV = self.embedding[...].T if self.config.tied_embeddings else self.unembedding[...]
        return unembed(h_BxLxD, w_DxV, dtype=self.config.compute_dtype), cache

    def _read_out_probe(self, probe: Probe | None) -> Array | None:
        return None if probe is None else probe.get("unembedding", probe["embedding"])

    def _hidden(
        self,
        tokens_BxL: Array,
        probe: Probe | None = None,
        tap: Tap = no_tap,
        metric: "Transformer | None" = None,
        dropout_keys_B: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Array | None, Cache | None]:
        """What is read out [B, L, D]; the carrier of a tied pair with a probe; the cache with these tokens."""
        drop = Dropout(self.config.dropout, dropout_keys_B)
        x_BxLxD, carrier_BxLxD = self._embed(tokens_BxL, probe, metric, 0 if cache is None else cache.length)
        tap("embedding", x_BxLxD)
        x_BxLxD = drop.fold(self.config.depth)(x_BxLxD, 0)
        x_BxLxD, cache = self._through_blocks(x_BxLxD, probe, tap, metric, drop, cache)
        h_BxLxD = rms_norm(x_BxLxD)
        if self.config.norm_gains:
            h_BxLxD = scale(h_BxLxD, self.final_gain[...], self._read_out_probe(probe), value_of(metric, "final_gain"))
        return place_input(h_BxLxD * self.logit_multiplier), carrier_BxLxD, cache

    def _embed(
        self, tokens_BxL: Array, probe: Probe | None, metric: "Transformer | None", start: Array | int
    ) -> tuple[Array, Array | None]:
        dtype = jnp.dtype(self.config.activation_dtype)
        probe_B, metric_VxD, carrier_BxLxD = None if probe is None else probe["embedding"], value_of(metric, "embedding"), None
        of_mesh = {"dtype": dtype, "look_up": look_up, "shards": batch_shards()}
        if self.config.tied_embeddings and probe is not None:
            x_BxLxD, carrier_BxLxD = embed_tied(self.embedding[...], tokens_BxL, probe_B, metric_VxD, **of_mesh)
        else:
            x_BxLxD = embed(self.embedding[...], tokens_BxL, probe_B, metric_VxD, **of_mesh)
        x_BxLxD = constrain(x_BxLxD, "batch", "sequence", "residual")
        if self.config.positions == "learned":
            if tokens_BxL.shape[1] > self.config.context:
                raise ValueError(f"{tokens_BxL.shape[1]} tokens: there are learned positions for {self.config.context}, the context")
            at_LxD, metric_LxD = (
                None if table is None else jax.lax.dynamic_slice_in_dim(table, start, tokens_BxL.shape[1])
                for table in (value_of(self, "position_embedding"), value_of(metric, "position_embedding"))
            )
            of_BxLxD = at_LxD[None] if probe is None else per_sequence(at_LxD, probe_B, metric_LxD, shards=shards_of(None, "embed"))
            if probe is None:
                of_BxLxD = constrain(of_BxLxD, None, "length", "residual")
            x_BxLxD += constrain(jnp.broadcast_to(of_BxLxD.astype(dtype), x_BxLxD.shape), "batch", "sequence", "residual")
        return x_BxLxD, carrier_BxLxD

    def _through_blocks(
        self, x_BxLxD: Array, probe: Probe | None, tap: Tap, metric: "Transformer | None", drop: Dropout, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        config = self.config
        graph, layers = nnx.split(self.blocks)
        metrics = None if metric is None else nnx.split(metric.blocks)[1]
        probes = None if probe is None else {kind: probe[kind] for kind in ("attention", "mlp")}
        copies: dict[str, Array] = {}
        if config.shared_depth:
            shared, shared_metric, shared_probe = (jax.tree.map(lambda x: x[0], tree) for tree in (layers, metrics, probes))
            layers = metrics = probes = None
            if probe is not None:
                of_metric = None if metric is None else nnx.merge(graph, shared_metric)
                of_uses = config.depth, x_BxLxD.shape[1], jnp.dtype(config.compute_dtype)
                probes, copies = open_block(nnx.merge(graph, shared), shared_probe, of_metric, *of_uses)

        def block(x_BxLxD: Array, layer: tuple[Any, ...]) -> tuple[Array, tuple[dict[str, Array], Any]]:
            params, probe, metric, kv, index = layer
            activations: dict[str, Array] = {}
            collect = no_tap if tap is no_tap else activations.__setitem__
            block = nnx.merge(graph, shared if config.shared_depth else params)
            if config.shared_depth and probe is not None:
                weights = SharedWeights(block, probe, copies)
            else:
                weights = OwnWeights(block, probe, None if metric is None else nnx.merge(graph, metric))
            read = None if kv is None else Cache(*kv, cache.length)
            x_BxLxD, read = block(x_BxLxD, weights, collect, drop.fold(index), read)
            return x_BxLxD, (activations, read and read[:2])

        through = written_out if config.for_cpu and config.depth <= MOST_WRITTEN_OUT else loop
        if config.remat != "none":
            # Written out, XLA would find that the backward pass computes what the forward pass did, and keep that.
            block, through = jax.checkpoint(block, policy=_REMAT_POLICIES[config.remat], prevent_cse=False), loop
        kv = None if cache is None else cache[:2]
        of_layers = layers, probes, metrics, kv, jnp.arange(config.depth)
        x_BxLxD, (stacked, kv) = through(block, x_BxLxD, of_layers)
        for kind, activation in stacked.items():
            tap(kind, activation)
        return x_BxLxD, None if cache is None else Cache(*kv, cache.length + x_BxLxD.shape[1])

    def forward_multiplier(self, path: tuple[str, ...]) -> float:
        """What the forward pass multiplies this parameter's output with."""
        if path[-1] in ("attention_out", "mlp_out"):
            return self.blocks.residual_multiplier
        read_out = path[-1] == "unembedding" or (path[-1] == "embedding" and self.config.tied_embeddings)
        return self.logit_multiplier if read_out else 1.0


def sequence_losses(logits_BxLxV: Array, targets_BxL: Array) -> Array:
    """Cross-entropy in nats per token, averaged over each sequence: [B]. Float32."""
    return jnp.mean(token_losses(logits_BxLxV, targets_BxL), axis=-1)
