"""Every option of the model: what it does, and that each sequence's squared gradient norm stays exact with it."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import small_config
from plain_transformer import plain_loss

from scaling_jax import Transformer, TransformerConfig, sequence_losses
from scaling_jax.errors import UserError
from scaling_jax.model import rms_norm
from scaling_jax.model.attention import causal_attention
from scaling_jax.model.layers import Dropout
from scaling_jax.train.step import Trainer, _loss_and_gradient

SEQUENCES, CONTEXT = 6, 12
DROPOUT = int.from_bytes(b"drop")  # folded into the seed's key
OPTIONS = {
    "none": {},
    "learned positions": {"positions": "learned"},
    "learned positions, tied": {"positions": "learned", "tied_embeddings": True},
    "gains": {"norm_gains": True},
    "gains, tied": {"norm_gains": True, "tied_embeddings": True},
    "QK norm": {"qk_norm": True},
    "QK norm with gains, grouped": {"qk_norm": True, "norm_gains": True, "kv_heads": 2},
    "dropout": {"dropout": 0.3},
    "one key/value head": {"kv_heads": 1, "biases": True},
    "shared depth": {"shared_depth": True},
    "shared depth, all": {
        "shared_depth": True, "biases": True, "norm_gains": True, "qk_norm": True, "kv_heads": 2, "mlp": "swiglu", "remat": "dots",
        "positions": "learned", "dropout": 0.1, "tied_embeddings": True, "loss_chunk_tokens": 4,
    },
    "chunked loss": {"loss_chunk_tokens": 5},  # pieces of 4
    "chunked loss, tied": {"loss_chunk_tokens": 6, "tied_embeddings": True, "norm_gains": True},
}  # fmt: skip


def trainer_of(fields, accumulation=1):
    config = small_config(model__depth=3, model__width=32, model__context=CONTEXT, model__vocab_size=9)
    config.parametrization.base_width, config.noise_scale.preconditioned = 16, True  # every multiplier differs from 1
    config.train.accumulation, config.train.seed = accumulation, 5
    for name, value in fields.items():
        config.model[name] = value
    return Trainer(config)


@cache
def tokens_BxL():
    """Some sequences repeat tokens, which makes their norms differ."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 9, (SEQUENCES, CONTEXT + 1))
    return np.asarray([np.repeat(row, 1 + b % 3)[: CONTEXT + 1] for b, row in enumerate(tokens)], np.int32)


def perturbed(trainer):
    """Parameters away from their initial values, where gains are 1 and biases 0."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: np.float32(p + 0.3 * (np.std(p) or 1) * rng.standard_normal(p.shape)), trainer.init(0).params)


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_norms_of_every_option_equal_brute_force(fields, quick_compilation):
    """vmap(grad) of the plain transformer, by kind and block, plainly and in a metric; and of the loss, measured and not."""
    trainer = trainer_of(fields)
    params = perturbed(trainer)
    metric = jax.tree.map(lambda p: np.float32(np.random.default_rng(2).exponential(size=p.shape)), params)
    first_sequence = 100
    key = jax.random.fold_in(jax.random.key(5), DROPOUT)
    keys_B = [jax.random.fold_in(key, first_sequence + b) for b in range(SEQUENCES)]
    model = nnx.merge(trainer.graph, params)
    multipliers = model.blocks.attention_scale, model.blocks.residual_multiplier, model.logit_multiplier

    def loss(params, tokens_L, key):
        arrays = {path[-1]: param[...] for path, param in nnx.to_flat_state(params)}
        return plain_loss(arrays, multipliers, trainer.config.model, tokens_L, key if "dropout" in fields else None)

    losses_B, grads_B = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0)))(params, tokens_BxL(), jnp.stack(keys_B))
    function = jax.jit(lambda *args: _loss_and_gradient(trainer, *args, True, first_sequence))
    found_loss, grads, sq_norms_BxGxM = function(params, metric, tokens_BxL()[None])
    assert float(found_loss) == pytest.approx(float(losses_B.mean()), rel=1e-6)
    unmeasured = jax.jit(lambda *args: _loss_and_gradient(trainer, *args, False, first_sequence))(params, None, tokens_BxL()[None])[1]
    tied, shared = trainer.config.model.tied_embeddings, trainer.config.model.shared_depth
    expected = {group: np.zeros((SEQUENCES, 2)) for group in trainer.meter.groups}
    for path, grad in nnx.to_flat_state(grads_B):
        name = path[-1]
        whole = {"embedding": "embedding", "position_embedding": "embedding", "unembedding": "unembedding"}
        whole["final_gain"] = "embedding" if tied else "unembedding"
        kind = whole.get(name, "mlp" if name.startswith("mlp") else "attention")
        square_B = np.square(np.asarray(grad[...], np.float64))
        weight = np.asarray(dict(nnx.to_flat_state(metric))[path][...], np.float64)
        for block in range(1 if shared else 3) if path[0] == "blocks" else (None,):
            part_B, of = (square_B, weight) if block is None else (square_B[:, block], weight[block])
            expected[kind, block] += np.stack([(w[None] * part_B).reshape(SEQUENCES, -1).sum(1) for w in (np.ones_like(of), of)], 1)
        wanted = np.asarray(grad[...], np.float64).mean(0)
        # A bias of keys moves all logits of a query alike, to no effect, where nothing turns the keys: its gradient is rounding.
        size = np.linalg.norm(wanted) if path[-1] != "key_bias" else 1.0
        for found in (grads, unmeasured):
            got = np.asarray(dict(nnx.to_flat_state(found))[path][...], np.float64)
            assert np.linalg.norm(got - wanted) <= 1e-5 * size, path
    for g, group in enumerate(trainer.meter.groups):
        np.testing.assert_allclose(sq_norms_BxGxM[:, g], expected[group], rtol=1e-5, err_msg=str(group))


@pytest.mark.parametrize("fields", [{"dropout": 0.3}, {"shared_depth": True, "loss_chunk_tokens": 4, "dropout": 0.2}])
def test_accumulation_changes_nothing(fields, quick_compilation):
    """Dropout's masks belong to sequences, not to microbatches."""
    found = []
    for accumulation in (1, 3):
        trainer = trainer_of(fields, accumulation)
        tokens_AxBxL = tokens_BxL().reshape(accumulation, -1, CONTEXT + 1)
        loss, _, sq_norms_BxGxM = jax.jit(lambda *args, t=trainer: _loss_and_gradient(t, *args, True, 7))(
            perturbed(trainer), None, tokens_AxBxL
        )
        found.append((loss, sq_norms_BxGxM[..., 0]))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def model_of(**fields):
    return Transformer(
        TransformerConfig(**({"vocab_size": 9, "width": 32, "depth": 3, "head_dim": 8, "context": 12} | fields)), rngs=nnx.Rngs(0)
    )


def test_shared_depth_is_one_block_several_times():
    """As many blocks with the same parameters, and their gradients' sum."""
    shared, own = model_of(shared_depth=True), model_of()
    graph, params = nnx.split(own)
    one = {path[1:]: value for path, value in nnx.to_flat_state(nnx.state(shared, nnx.Param)) if path[0] == "blocks"}
    for path, param in nnx.to_flat_state(nnx.state(own, nnx.Param)):
        source = one[path[1:]] if path[0] == "blocks" else dict(nnx.to_flat_state(nnx.state(shared, nnx.Param)))[path]
        param[...] = jnp.broadcast_to(source[...], param.shape)
    tokens = jnp.asarray(tokens_BxL())

    def loss(model):
        return sequence_losses(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    np.testing.assert_allclose(loss(shared), loss(own), rtol=1e-6)
    theirs = dict(nnx.to_flat_state(nnx.grad(loss)(own)))
    for path, grad in nnx.to_flat_state(nnx.grad(loss)(shared)):
        wanted = theirs[path][...].sum(0, keepdims=True) if path[0] == "blocks" else theirs[path][...]
        np.testing.assert_allclose(grad[...], wanted, rtol=1e-4, atol=1e-6)
    assert shared.config.params == own.config.params // 3
    assert shared.config.flops_per_token == own.config.flops_per_token  # it costs what it computes


def test_grouped_heads_share_keys_and_values():
    """Attention with each key/value head copied to the query heads that it serves."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, heads, 5, 4)) for i, heads in enumerate((6, 2, 2)))
    copied = causal_attention(q, k[:, [0, 0, 0, 1, 1, 1]], v[:, [0, 0, 0, 1, 1, 1]], 0.5)
    np.testing.assert_array_equal(causal_attention(q, k, v, 0.5), copied)
    model = model_of(kv_heads=2)
    assert model.blocks.key.shape == model.blocks.value.shape == (3, 32, 16) and model.blocks.query.shape == (3, 32, 32)
    assert model.config.params == sum(p.size for path, p in nnx.to_flat_state(nnx.state(model.blocks, nnx.Param)))


def test_gains_multiply_what_is_normed():
    """A gain that doubles is as a matrix behind it that doubles, the final one as logits that double."""
    tokens = jnp.asarray(tokens_BxL())[:, :-1]
    for gain, matrices in {"attention_gain": ("query", "key", "value"), "mlp_gain": ("mlp_in",)}.items():
        doubled, plain = model_of(norm_gains=True), model_of()
        np.testing.assert_allclose(doubled(tokens), plain(tokens), rtol=1e-6)  # they start at 1
        getattr(doubled.blocks, gain)[...] *= 2.0
        for name in matrices:
            getattr(plain.blocks, name)[...] *= 2.0
        np.testing.assert_allclose(doubled(tokens), plain(tokens), rtol=1e-5, atol=1e-5)
    model = model_of(norm_gains=True)
    before = model(tokens)
    model.final_gain[...] *= 2.0
    np.testing.assert_allclose(model(tokens), 2 * before, rtol=1e-6)
    assert model.final_gain.get_metadata()["role"] == "final_vector"


def test_normed_queries_do_not_know_their_matrixs_size():
    tokens = jnp.asarray(tokens_BxL())[:, :-1]
    for qk_norm in (True, False):
        model = model_of(qk_norm=qk_norm)
        before = model(tokens)
        model.blocks.query[...] *= 3.0
        assert np.allclose(model(tokens), before, atol=1e-4) == qk_norm
    seen = {}
    model_of(qk_norm=True, positions="learned")(tokens, tap=seen.__setitem__)
    np.testing.assert_allclose(jnp.mean(seen["k"] ** 2, axis=-1), 1, rtol=1e-3)


def test_learned_positions_are_added_and_nothing_else_tells_places():
    tokens = jnp.asarray(tokens_BxL())[:, :-1]
    model, seen = model_of(positions="learned"), {}
    model(tokens[:, :7], tap=seen.__setitem__)
    np.testing.assert_allclose(seen["embedding"], model.embedding[...][tokens[:, :7]] + model.position_embedding[...][None, :7], rtol=1e-6)
    model.position_embedding[...] = jnp.zeros_like(model.position_embedding[...])
    same = jnp.zeros((1, 12), jnp.int32)
    logits = model(same)
    np.testing.assert_allclose(logits, jnp.broadcast_to(logits[:, :1], logits.shape), atol=1e-5)
    assert model.position_embedding.get_metadata()["role"] == "embedding"


def test_dropout_keeps_the_mean_and_the_share():
    x = 1 + jax.random.uniform(jax.random.key(0), (40, 50, 60))
    drop = Dropout(0.3, jax.random.split(jax.random.key(1), 40))
    dropped = np.asarray(drop(x, 0))
    share = (dropped == 0).mean(axis=(1, 2))
    np.testing.assert_allclose(share, 0.3, atol=5 * np.sqrt(0.21 / 3000))
    np.testing.assert_allclose(dropped[dropped > 0], np.asarray(x / 0.7)[dropped > 0], rtol=1e-6)
    others = [drop(x, 1), drop.fold(3)(x, 0), Dropout(0.3, jax.random.split(jax.random.key(2), 40))(x, 0)]
    for other in others:  # sites, blocks and sequences are independent: both dropped at 0.09 of the places
        assert abs(((dropped == 0) & (np.asarray(other) == 0)).mean() - 0.09) < 0.003
    assert abs(((dropped[0] == 0) & (dropped[1] == 0)).mean() - 0.09) < 0.03
    np.testing.assert_array_equal(Dropout(0.3, None)(x, 0), x)


def test_dropout_of_the_embedding_the_attention_weights_and_both_branches(monkeypatch):
    places = []

    def record(self, x_B, site):
        places.append((site, x_B.shape, self.keys_B is not None))
        return x_B

    monkeypatch.setattr(Dropout, "__call__", record)
    tokens = jnp.asarray(tokens_BxL())[:, :-1]
    keys_B = jax.random.split(jax.random.key(0), SEQUENCES)
    model_of(dropout=0.5)(tokens, dropout_keys_B=keys_B)
    stream = (SEQUENCES, 12, 32)
    assert places == [(0, stream, True), (0, (SEQUENCES, 4, 12, 12), True), (1, stream, True), (2, stream, True)]


def test_masks_are_the_sequences_own():
    model, tokens = model_of(dropout=0.5), jnp.asarray(tokens_BxL())[:, :-1]
    keys_B = jax.random.split(jax.random.key(0), SEQUENCES)
    np.testing.assert_array_equal(model(tokens), model_of()(tokens))  # without keys nothing is dropped
    dropped = model(tokens, dropout_keys_B=keys_B)
    np.testing.assert_allclose(model(tokens[2:4], dropout_keys_B=keys_B[2:4]), dropped[2:4], rtol=1e-5, atol=1e-5)
    assert not np.allclose(model(tokens[2:4], dropout_keys_B=keys_B[:2]), dropped[2:4], atol=0.1)


def test_bfloat16_keeps_float32_norms_of_shared_blocks():
    """Against the same numbers in float32: what is rounded is each x and dy, not their sums."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        trainer = trainer_of({"shared_depth": True, "biases": True, "compute_dtype": dtype})
        _, _, norms = jax.jit(lambda *args, t=trainer: _loss_and_gradient(t, *args, True))(perturbed(trainer), None, tokens_BxL()[None])
        assert norms.dtype == jnp.float32
        found[dtype] = np.asarray(norms[..., 0])
    np.testing.assert_allclose(found["bfloat16"], found["float32"], rtol=0.15)


def test_norm_over_heads_is_of_each_head():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    np.testing.assert_allclose(rms_norm(x)[1, 2, 4], x[1, 2, 4] / np.sqrt(np.mean(np.square(x[1, 2, 4])) + 1e-6), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_heads": 3}, "kv_heads is 3: must divide the 4 heads"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"positions": "alibi"}, "one of rotary"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        model_of(**fields)


def test_evaluation_drops_nothing(quick_compilation):
    dropping, plain = trainer_of({"dropout": 0.5}), trainer_of({})
    params = perturbed(plain)
    np.testing.assert_array_equal(dropping.eval(params, tokens_BxL()), plain.eval(params, tokens_BxL()))
