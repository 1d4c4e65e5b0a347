"""The transformer: shapes, causality, options, and its use in somebody else's loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from scaling_jax import Parametrization, Transformer, TransformerConfig, sequence_losses
from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.model import KINDS, causal_attention, parameter_kind, rms_norm, rotary


def small(**fields):
    return TransformerConfig(**({"vocab_size": 32, "width": 32, "depth": 2, "head_dim": 8, "context": 16} | fields))


def tokens_BxL(batch=4, length=16, vocab=32, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, vocab)


@pytest.mark.parametrize("fields", [{}, {"tied_embeddings": True}, {"mlp": "relu2"}, {"mlp": "swiglu", "compute_dtype": "bfloat16"}])
def test_logits_are_float32_of_the_right_shape(fields):
    logits = Transformer(small(**fields), rngs=nnx.Rngs(0))(tokens_BxL())
    assert logits.shape == (4, 16, 32) and logits.dtype == jnp.float32 and bool(jnp.isfinite(logits).all())


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_logits_keep_float32(tied):
    """Rounded to bfloat16, differences of losses below 1e-3 would be lost."""
    model = Transformer(small(compute_dtype="bfloat16", tied_embeddings=tied), rngs=nnx.Rngs(0))
    for logits in (model(tokens_BxL()), model(tokens_BxL(), model.new_probe(4))):
        assert not np.array_equal(logits, logits.astype(jnp.bfloat16).astype(jnp.float32))


def test_no_position_sees_a_later_one():
    model = Transformer(small(), rngs=nnx.Rngs(0))
    tokens = tokens_BxL()
    changed = tokens.at[:, 10].set((tokens[:, 10] + 1) % 32)
    before, after = model(tokens), model(changed)
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert not np.allclose(before[:, 10:], after[:, 10:])
    assert not np.allclose(before[:, 12], after[:, 12])  # and later ones do attend to it


def test_attention_against_numpy():
    q, k, v = (np.asarray(jax.random.normal(jax.random.key(i), (2, 3, 5, 4)), np.float64) for i in range(3))
    expected = np.zeros_like(v)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                w = np.exp(0.7 * q[b, h, i] @ k[b, h, : i + 1].T)
                expected[b, h, i] = w @ v[b, h, : i + 1] / w.sum()
    found = causal_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rotary_makes_products_depend_on_distance_alone():
    q, k = (jnp.broadcast_to(jax.random.normal(jax.random.key(i), (1, 1, 1, 8)), (1, 1, 12, 8)) for i in range(2))
    products = jnp.einsum("bhlk,bhmk->bhlm", rotary(q, 100.0), rotary(k, 100.0))[0, 0]
    for distance in range(1, 11):
        np.testing.assert_allclose(np.diagonal(products, -distance), products[distance, 0], rtol=1e-4, atol=1e-5)
    assert abs(products[1, 0] - products[2, 0]) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(rotary(q, 100.0), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5)


def test_rms_norm():
    x = jax.random.normal(jax.random.key(0), (2, 3, 50)) * 7
    np.testing.assert_allclose(jnp.mean(rms_norm(x) ** 2, axis=-1), 1, rtol=1e-5)


def test_losses_against_log_softmax_per_sequence():
    logits = 5 * jax.random.normal(jax.random.key(0), (3, 7, 11))
    targets = tokens_BxL(3, 7, 11)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(1)
    np.testing.assert_allclose(sequence_losses(logits, targets), expected, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"mlp": "swiglu", "mlp_ratio": 8 / 3}, {"tied_embeddings": True}])
def test_params_counts_what_is_there(fields):
    config = small(**fields)
    state = dict(nnx.to_flat_state(nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)))
    body = sum(p.size for path, p in state.items() if "embedding" not in path[-1])
    assert config.params == body
    if not fields:
        assert config.params == 12 * 2 * 32**2  # Kaplan's 12·depth·width²
        assert config.flops_per_token == 6 * config.params + 12 * 2 * 16 * 32


def test_remat_changes_nothing_but_memory():
    tokens = tokens_BxL(4, 17)

    def gradient(remat):
        graph, params = nnx.split(Transformer(small(remat=remat), rngs=nnx.Rngs(0)))

        def loss(params):
            return jnp.mean(sequence_losses(nnx.merge(graph, params)(tokens[:, :-1]), tokens[:, 1:]))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    plain = gradient("none")
    for remat in ("dots", "full"):
        for a, b in zip(gradient(remat), plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_every_parameter_has_a_kind_a_role_and_axes():
    for fields in ({}, {"tied_embeddings": True}, {"mlp": "swiglu", "biases": True}):
        for path, param in nnx.to_flat_state(nnx.state(Transformer(small(**fields), rngs=nnx.Rngs(0)), nnx.Param)):
            metadata = param.get_metadata()
            roles = {"query": "query", "embedding": "tied" if "tied_embeddings" in fields else "embedding", "unembedding": "output"}
            assert metadata["role"] == ("vector" if path[-1].endswith("_bias") else roles.get(path[-1], "hidden"))
            stacked = path[0] == "blocks"
            assert len(metadata["axes"]) == param.ndim - stacked
            expected = "mlp" if "mlp" in path[-1] else path[-1] if "embedding" in path[-1] else "attention"
            assert parameter_kind(path) == expected and expected in KINDS


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_every_projection_adds_its_own_bias(mlp):
    """Biases of 0 change nothing; a random one of any projection does, and the key's only through position."""
    tokens = tokens_BxL(2, 8)
    plain, biased = (Transformer(small(mlp=mlp, biases=on), rngs=nnx.Rngs(0)) for on in (False, True))
    np.testing.assert_array_equal(biased(tokens), plain(tokens))
    names = [path[-1] for path, _ in nnx.to_flat_state(nnx.state(biased, nnx.Param)) if path[-1].endswith("_bias")]
    matrices = [path[-1] for path, _ in nnx.to_flat_state(nnx.state(plain, nnx.Param)) if path[0] == "blocks"]
    assert sorted(names) == sorted(f"{name}_bias" for name in matrices)
    for name in names:
        bias = getattr(biased.blocks, name)
        bias[...] = 0.1 * jax.random.normal(jax.random.key(1), bias.shape)
        assert float(jnp.max(jnp.abs(biased(tokens) - plain(tokens)))) > 1e-4, name
        bias[...] = jnp.zeros_like(bias[...])


def test_zero_queries_attend_to_all_that_came_before_alike():
    model = Transformer(small(depth=1), Parametrization(query_init="zero"), rngs=nnx.Rngs(0))
    seen = {}
    model(tokens_BxL(2, 8), tap=seen.__setitem__)
    assert float(jnp.max(jnp.abs(seen["attention logits"]))) == 0
    assert float(jnp.max(jnp.abs(model.blocks.query[...]))) == 0 < float(jnp.max(jnp.abs(model.blocks.key[...])))


def test_a_tap_sees_every_kind_of_activation_and_changes_nothing():
    config = small(depth=3, mlp="swiglu")
    model, tokens, seen = Transformer(config, rngs=nnx.Rngs(0)), tokens_BxL(2, 8), {}
    logits = model(tokens, tap=seen.__setitem__)
    np.testing.assert_allclose(logits, model(tokens), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(seen["logits"], logits)
    heads = (3, 2, config.heads, 8, config.head_dim)
    stream = (3, 2, 8, config.width)
    shapes = {"q": heads, "k": heads, "v": heads, "attention logits": (3, 2, config.heads, 8, 8)}
    shapes |= {"attention output": stream, "MLP output": stream, "residual": stream, "MLP hidden": (3, 2, 8, config.mlp_width)}
    shapes |= {"embedding": stream[1:], "logits": (2, 8, config.vocab_size)}
    assert {kind: x.shape for kind, x in seen.items()} == shapes
    # The residual stream is the embedding and all that the branches added to it.
    added = jnp.sum(seen["attention output"] + seen["MLP output"], axis=0)
    np.testing.assert_allclose(seen["residual"][-1], seen["embedding"] + added, rtol=1e-4, atol=1e-5)


def test_initial_parameters_have_the_tables_std_and_differ_by_layer_and_seed():
    model = Transformer(small(width=128, depth=3), Parametrization("mup", base_width=128), rngs=nnx.Rngs(0))
    query = np.asarray(model.blocks.query[...])
    np.testing.assert_allclose(query.std(axis=(1, 2)), 128**-0.5, rtol=0.03)
    assert abs(np.corrcoef(query[0].ravel(), query[1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(query[0].ravel(), np.asarray(model.blocks.key[...])[0].ravel())[0, 1]) < 0.03
    other = Transformer(small(width=128, depth=3), rngs=nnx.Rngs(1))
    assert abs(np.corrcoef(query.ravel(), np.asarray(other.blocks.query[...]).ravel())[0, 1]) < 0.03


def test_the_model_in_somebody_elses_optax_loop():
    """As README shows it: nothing of the package but the model."""
    model = Transformer(small(), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    tokens = tokens_BxL(8, 17)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss_fn(model):
            return sequence_losses(model(tokens[:, :-1]), tokens[:, 1:]).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, tokens)) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]  # eight sequences are soon known by heart


def test_import_alone_is_quick_and_light():
    """`import scaling_jax` and the model need no trainer, no data reader, no plots."""
    import subprocess
    import sys

    code = "import sys; from scaling_jax import Transformer; print([m for m in ('orbax', 'grain', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("fields", "message"), [({"head_dim": 12}, "divide width, 32"), ({"mlp": "glu"}, "mlp is 'glu'"), ({"remat": "all"}, "remat is 'all'")]
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        small(**fields)


def test_config_fields_are_the_models():
    """But for the form that suits the device, which is no choice of a config's."""
    assert set(default_config().model.keys()) | {"for_cpu"} == set(TransformerConfig.__dataclass_fields__)


def test_causal_flops_count_the_keys_that_a_token_sees():
    """Two products forwards and four backwards, for each of its keys: position l has l + 1 of them."""
    shape = TransformerConfig(vocab_size=11, width=32, depth=3, head_dim=8, context=7)
    keys = sum(position + 1 for position in range(7))
    assert shape.causal_flops_per_token * 7 == 6 * shape.params * 7 + 3 * keys * 6 * 2 * 32
