"""The splash kernel, run step by step on the CPU, against plain attention and against a softmax written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling_jax import Transformer, TransformerConfig
from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.model.attention import causal_attention, splash_attention
from scaling_jax.train.step import transformer_config

pytestmark = pytest.mark.usefixtures("quick_compilation")


def inputs(heads: int, groups: int, length: int, head_dim: int, dtype=jnp.float32, batch: int = 2):
    keys = jax.random.split(jax.random.key(length + head_dim), 4)
    shapes = ((batch, heads, length, head_dim), *((batch, groups, length, head_dim),) * 2, (batch, heads, length, head_dim))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def by_hand(q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, scale):
    """In float64, row after row."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BxHxLxK, k_BxGxLxK, v_BxGxLxK))
    out = np.zeros(q.shape)
    for b, h, i in np.ndindex(q.shape[:3]):
        g = h * k.shape[1] // q.shape[1]
        w = np.exp(scale * (k[b, g, : i + 1] @ q[b, h, i]))
        out[b, h, i] = w @ v[b, g, : i + 1] / w.sum()
    return out


def outputs_and_gradients(attend, q, k, v, dy):
    @jax.jit
    def both(q, k, v, dy):
        y, pull = jax.vjp(attend, q, k, v)
        return y, *pull(dy)

    return both(q, k, v, dy)


@pytest.mark.parametrize(
    "heads, groups, length, head_dim",
    [(4, 2, 256, 64), (4, 1, 128, 128), (2, 1, 512, 128), (2, 2, 384, 64), (1, 1, 1024, 64)],
)
def test_splash_is_causal_attention(heads, groups, length, head_dim):
    """Lengths of one block, of several, and of blocks of 512, 256 and 128; keys and values for one head, two, and all."""
    q, k, v, dy = inputs(heads, groups, length, head_dim, batch=1)
    scale = head_dim**-0.5
    expected = outputs_and_gradients(lambda q, k, v: causal_attention(q, k, v, scale), q, k, v, dy)
    found = outputs_and_gradients(lambda q, k, v: splash_attention(q, k, v, scale, interpret=True), q, k, v, dy)
    for name, x, y in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("attend", [causal_attention, lambda *args: splash_attention(*args, interpret=True)])
def test_against_a_softmax_written_out(attend):
    q, k, v, _ = inputs(4, 2, 128, 64)
    np.testing.assert_allclose(jax.jit(attend, static_argnums=3)(q, k, v, 0.3), by_hand(q, k, v, 0.3), rtol=1e-4, atol=1e-5)


def test_logits_that_are_large_are_not_lost():
    """Each position sees itself alone, by logits in the hundreds."""
    q, _, v, _ = inputs(1, 1, 128, 128, batch=1)
    k = q / jnp.sum(q * q, -1, keepdims=True)
    np.testing.assert_allclose(splash_attention(q, k, v, 1000.0, interpret=True), v, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_near():
    q, k, v, dy = inputs(2, 1, 256, 64, jnp.bfloat16)
    found = outputs_and_gradients(lambda q, k, v: splash_attention(q, k, v, 0.125, interpret=True), q, k, v, dy)
    exact = [x.astype(jnp.float32) for x in (q, k, v, dy)]
    expected = outputs_and_gradients(lambda q, k, v: causal_attention(q, k, v, 0.125), *exact)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == jnp.bfloat16
        difference = np.asarray(x, np.float32) - np.asarray(y)
        assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(y)


def model_of(attention: str, **fields) -> Transformer:
    shape = {"vocab_size": 32, "width": 128, "depth": 2, "head_dim": 64, "context": 128, "mlp": "swiglu", "kv_heads": 1}
    return Transformer(TransformerConfig(**shape | fields, attention=attention), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "attention", pytest.param("full", marks=pytest.mark.slow)])
def test_the_model_and_every_sequences_squared_norm(remat):
    tokens = jax.random.randint(jax.random.key(1), (3, 129), 0, 32)

    @nnx.jit
    def step(model):
        graph, params = nnx.split(model)

        def loss(params, probe):
            return jnp.sum(nnx.merge(graph, params).losses(tokens[:, :-1], tokens[:, 1:], probe))

        return jax.value_and_grad(loss, argnums=(0, 1))(params, model.new_probe(3))

    (loss, (grads, sq_norms)), (expected_loss, (expected_grads, expected)) = (
        step(model_of(attention, remat=remat)) for attention in ("splash_interpreted", "einsum")
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for kind in expected:
        np.testing.assert_allclose(sq_norms[kind], expected[kind], rtol=1e-3, err_msg=kind)
        assert np.all(np.asarray(sq_norms[kind]) > 0)
    for (path, x), y in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.linalg.norm(x - y) < 1e-3 * np.linalg.norm(y), jax.tree_util.keystr(path)


def test_which_attention_auto_is():
    config = default_config()
    config.model.context = 256
    assert transformer_config(config).attention == "einsum"
    assert transformer_config(config, "tpu").attention == "splash"
    config.model.attention = "splash"
    assert transformer_config(config).attention == "splash_interpreted"
    config.model.attention, config.model.context = "auto", 192
    assert transformer_config(config, "tpu").attention == "einsum"
    config.model.context, config.model.dropout = 256, 0.1
    assert transformer_config(config, "tpu").attention == "einsum"


def test_what_the_kernel_cannot_do_is_refused():
    for wrong in ({"context": 192}, {"dropout": 0.1}):
        with pytest.raises(UserError, match="needs a context that is a multiple of 128"):
            model_of("splash", **wrong)
