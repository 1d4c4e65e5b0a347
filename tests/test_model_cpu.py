"""The model as XLA's CPU backend runs it fast, against numpy in float64 and against the model that other devices run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling_jax import Parametrization, Transformer, TransformerConfig
from scaling_jax.model import causal_attention
from scaling_jax.model.cpu import CPU_ACTIVATIONS, _ends, blocked_attention, from_input
from scaling_jax.model.layers import ACTIVATIONS, rotary
from scaling_jax.pods.flops import jaxpr_dot_flops

SCALE = 0.7


def close(found, expected, tolerance):
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-30))


# ------------------------------------------------------------------------------------------------------------------------------- attention


def drawn(heads: int, groups: int, length: int, dtype: jnp.dtype = jnp.float32):
    """Queries, keys, values, and the cotangent of what comes out: 2 sequences, heads of 8."""
    of_heads = (heads, groups, groups, heads)
    return [jax.random.normal(jax.random.key(i), (2, n, length, 8)).astype(dtype) for i, n in enumerate(of_heads)]


def in_numpy(q, k, v, dy):
    """Attention and its three gradients in float64, each query by itself."""
    q, k, v, dy = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, dy))
    y, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, h, i in np.ndindex(q.shape[:3]):
        g = h // (q.shape[1] // k.shape[1])
        weights = np.exp(SCALE * k[b, g, : i + 1] @ q[b, h, i])
        weights /= weights.sum()
        y[b, h, i] = weights @ v[b, g, : i + 1]
        dweights = v[b, g, : i + 1] @ dy[b, h, i]
        dlogits = SCALE * weights * (dweights - weights @ dweights)
        dq[b, h, i] = dlogits @ k[b, g, : i + 1]
        dk[b, g, : i + 1] += np.outer(dlogits, q[b, h, i])
        dv[b, g, : i + 1] += np.outer(weights, dy[b, h, i])
    return y, dq, dk, dv


def with_gradients(attention, q, k, v, dy):
    y, vjp = jax.vjp(attention, q, k, v)
    return y, *vjp(dy)


@pytest.mark.parametrize(
    ("length", "heads", "groups"), [(1, 2, 2), (7, 2, 1), (32, 1, 1), (64, 4, 2), (96, 2, 2), (128, 2, 2), (256, 2, 1)], ids=str
)
def test_attention_and_its_gradient_against_numpy(length: int, heads: int, groups: int):
    arrays = drawn(heads, groups, length)
    found = jax.jit(lambda *a: with_gradients(lambda q, k, v: blocked_attention(q, k, v, SCALE, "float32"), *a))(*arrays)
    for array, expected in zip(found, in_numpy(*arrays), strict=True):
        close(array, expected, 3e-6)


def test_the_gradient_is_that_of_the_plain_attention():
    def both(*arrays):
        plain = with_gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), *arrays)
        return plain, with_gradients(lambda q, k, v: blocked_attention(q, k, v, SCALE, "float32"), *arrays)

    for expected, found in zip(*jax.jit(both)(*drawn(4, 2, 256)), strict=True):
        close(found, expected, 3e-6)


@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_products_of_bfloat16_are_within_their_rounding(given: jnp.dtype):
    """Of operands that are exact in bfloat16; weights and what is handed back are rounded, each by 2⁻⁹ at most."""
    arrays = [x.astype(given) for x in drawn(2, 1, 256, jnp.bfloat16)]
    found = jax.jit(lambda *a: with_gradients(lambda q, k, v: blocked_attention(q, k, v, SCALE, "bfloat16"), *a))(*arrays)
    for array, expected in zip(found, in_numpy(*arrays), strict=True):
        assert array.dtype == given
        close(array, expected, 2.0**-7)
    if given == jnp.float32:  # and they are really rounded
        assert float(np.abs(np.asarray(found[0], np.float64) - in_numpy(*arrays)[0]).max()) > 1e-4


def test_large_logits_and_what_is_hidden_do_no_harm():
    """exp of what is hidden overflows where it is not left out of the maximum; of equal keys nothing is learned."""
    q, k, v, dy = drawn(1, 1, 256)
    q, k = 1e3 * jnp.abs(q), 1e3 * jnp.cumsum(jnp.abs(k), axis=2)  # later keys ever larger
    y, *grads = with_gradients(lambda q, k, v: blocked_attention(q, k, v, SCALE, "float32"), q, k, v, dy)
    np.testing.assert_allclose(y, v, rtol=1e-5)  # each position attends to itself
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("length", [1, 7, 32, 96, 128, 130, 256, 1024])
def test_what_causality_hides_is_left_out_by_blocks(length: int):
    """Six products; the i-th of n blocks of queries, which are of one size, sees i / n of the keys."""
    ends = _ends(length)
    blocks, size = len(ends), length // len(ends)
    assert ends == [(i * size, (i + 1) * size) for i in range(blocks)] and blocks * size == length
    assert blocks == 1 or size >= 32
    q, k, v, dy = (jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32) for _ in range(4))
    jaxpr = jax.make_jaxpr(lambda *a: with_gradients(lambda q, k, v: blocked_attention(q, k, v, SCALE, "float32"), *a))(q, k, v, dy)
    assert jaxpr_dot_flops(jaxpr) == 6 * 2 * 8 * length**2 * (blocks + 1) // (2 * blocks)
    assert length < 256 or blocks > 1


# ----------------------------------------------------------------------------------------------------------- activations and rotary tables


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_from_their_input(name: str):
    x, dy = jnp.linspace(-6, 6, 301), jax.random.normal(jax.random.key(0), (301,))
    (y, vjp), (found, found_vjp) = jax.vjp(ACTIVATIONS[name], x), jax.vjp(CPU_ACTIVATIONS[name], x)
    np.testing.assert_allclose(found, y, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found_vjp(dy)[0], vjp(dy)[0], rtol=1e-5, atol=1e-6)


def test_only_the_input_is_kept():
    def kept(function):
        return [leaf.shape for leaf in jax.tree.leaves(jax.vjp(function, jnp.ones((3, 5)))[1])]

    of_gelu = ACTIVATIONS["gelu"]
    assert kept(from_input(of_gelu)) == [(3, 5)] and len(kept(of_gelu)) > 1


def test_rotary_tables_as_constants():
    """The same angles; in the program there is neither a cosine nor a power."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 40, 8))
    np.testing.assert_allclose(rotary(x, 1e4, 5, for_cpu=True), rotary(x, 1e4, 5), atol=1e-5)
    text = str(jax.make_jaxpr(lambda x: rotary(x, 1e4, for_cpu=True))(x))
    assert "cos" not in text and "pow" not in text and "cos" in str(jax.make_jaxpr(lambda x: rotary(x, 1e4))(x))
    traced = jax.jit(lambda x, start: rotary(x, 1e4, start, for_cpu=True))(x, 5)  # where the position is not known beforehand
    np.testing.assert_allclose(traced, rotary(x, 1e4, 5), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------------- the whole model

BATCH, LENGTH = 3, 128
OPTIONS = [
    {},
    {"remat": "dots"},
    {"remat": "attention", "mlp": "swiglu", "kv_heads": 2},
    {"remat": "full", "qk_norm": True, "norm_gains": True},
    {"tied_embeddings": True, "positions": "learned", "mlp": "relu2"},
    {"shared_depth": True, "biases": True},
    {"dropout": 0.2},
    {"loss_chunk_tokens": 64},
]


def shape_of(**fields) -> TransformerConfig:
    return TransformerConfig(**({"vocab_size": 24, "width": 32, "depth": 3, "head_dim": 8, "context": LENGTH} | fields))


def losses_and_gradients(shape: TransformerConfig, measure: bool = True):
    """Each sequence's loss, the parameters' gradient and, by kind of layer, each sequence's squared norms. Nothing starts at zero."""
    mup = Parametrization(name="mup", base_width=16, base_depth=3, base_head_dim=8)
    graph, params = nnx.split(Transformer(shape, mup, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
    tokens_BxL = jax.random.randint(jax.random.key(2), (BATCH, LENGTH + 1), 0, 24)
    dropout = {"dropout_keys_B": jax.random.split(jax.random.key(3), BATCH)} if shape.dropout else {}

    def loss(params, probe):
        losses_BxL = nnx.merge(graph, params).losses(tokens_BxL[:, :-1], tokens_BxL[:, 1:], probe if measure else None, **dropout)
        losses_B = losses_BxL.mean(1)
        return losses_B.sum(), losses_B

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, nnx.merge(graph, params).new_probe(BATCH))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("fields", OPTIONS, ids=lambda fields: "-".join(fields) or "default")
def test_losses_gradients_and_norms_are_those_of_the_portable_model(fields: dict[str, object]):
    portable = shape_of(**fields)
    (expected, norms), losses_B = losses_and_gradients(portable)
    (found, found_norms), found_losses_B = losses_and_gradients(dataclasses.replace(portable, for_cpu=True))
    np.testing.assert_allclose(found_losses_B, losses_B, rtol=1e-5)
    for path, leaf in nnx.to_flat_state(expected):
        close(dict(nnx.to_flat_state(found))[path][...], leaf[...], 1e-5)
        assert float(jnp.abs(leaf[...]).max()) > 0
    for kind, squares in norms.items():
        np.testing.assert_allclose(found_norms[kind], squares, rtol=3e-5)


@pytest.mark.usefixtures("quick_compilation")
def test_in_bfloat16_only_operands_are_rounded():
    """Nearer to float32 than the portable model, which rounds what lies between products too; logits and loss are float32."""
    (_, _), exact_B = losses_and_gradients(shape_of(), measure=False)
    portable = shape_of(compute_dtype="bfloat16")
    assert (portable.activation_dtype, dataclasses.replace(portable, for_cpu=True).activation_dtype) == ("bfloat16", "float32")
    (grads, _), found_B = losses_and_gradients(dataclasses.replace(portable, for_cpu=True), measure=False)
    assert 1e-6 < float(jnp.abs(found_B - exact_B).max()) < 0.02
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    graph, params = nnx.split(Transformer(dataclasses.replace(portable, for_cpu=True), rngs=nnx.Rngs(0)))
    seen = {}

    def forward(params, tokens_BxL):
        return nnx.merge(graph, params)(tokens_BxL, tap=lambda kind, x: seen.setdefault(kind, x.dtype))

    assert jax.eval_shape(forward, params, jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)).dtype == jnp.float32
    assert seen["residual"] == seen["q"] == seen["MLP hidden"] == jnp.float32


def test_deep_models_are_a_loop_on_cpu_too(monkeypatch: pytest.MonkeyPatch):
    """Written out they would take long to compile."""

    def loops(depth: int, **fields: object) -> bool:
        shape = shape_of(depth=depth, for_cpu=True, **fields)
        graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(shape, rngs=nnx.Rngs(0))))
        tokens_BxL = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
        return "scan[" in str(jax.make_jaxpr(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, tokens_BxL))

    monkeypatch.setattr("scaling_jax.model.transformer.MOST_WRITTEN_OUT", 2)
    assert [loops(depth) for depth in (1, 2, 3)] == [False, False, True]
