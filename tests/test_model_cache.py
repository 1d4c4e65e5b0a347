"""The key/value cache: logits of `extend`, whatever the pieces, are those of the whole sequence at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling_jax import Parametrization, Transformer, TransformerConfig

CONTEXT = 16
PIECES = (6, 1, 1, 6, 1, 1)  # several at the start, one by one, several amid, and up to the last position

MUP = {"name": "mup", "base_width": 16, "base_head_dim": 4}
CASES = {
    "rotary, two key heads, SwiGLU": ({"rope_theta": 100.0, "kv_heads": 2, "mlp": "swiglu"}, {}),
    "learned positions, biases": ({"positions": "learned", "biases": True}, {}),
    "one key head, QK norm, gains, completep": (
        {"kv_heads": 1, "qk_norm": True, "norm_gains": True, "depth": 3},
        MUP | {"name": "completep", "base_depth": 1},
    ),
    "tied, mup": ({"tied_embeddings": True}, MUP),
    "shared depth, QK norm without gains": ({"shared_depth": True, "depth": 3, "qk_norm": True, "mlp": "relu2"}, {}),
}


def model_of(fields, parametrization, seed=0):
    """All parameters away from where training starts: gains of 1 and biases of 0 would hide what is left out."""
    config = TransformerConfig(**({"vocab_size": 32, "width": 32, "depth": 2, "head_dim": 8, "context": CONTEXT} | fields))
    model = nnx.eval_shape(lambda: Transformer(config, Parametrization(**parametrization), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def value(path, param):
        spread = 0.2 * rng.standard_normal(param.shape)
        return param.replace(jnp.asarray(spread + path[-1].endswith("_gain"), jnp.float32))

    graph, params = nnx.split(model)
    return nnx.merge(graph, nnx.map_state(value, params))


def logits_of_pieces(model, tokens_BxL, pieces, cache):
    graph, params = nnx.split(model)
    extend = jax.jit(lambda params, tokens, cache: nnx.merge(graph, params).extend(tokens, cache))
    found, start = [], 0
    for piece in pieces:
        logits, cache = extend(params, tokens_BxL[:, start : start + piece], cache)
        found.append(logits)
        start += piece
        assert int(cache.length) == start
    return np.concatenate(found, axis=1)


def of_garbage(cache, seed=9):
    """What was in the memory before, large and finite."""
    rng = np.random.default_rng(seed)
    k, v = (jnp.asarray(1e4 * rng.standard_normal(x.shape), x.dtype) for x in cache[:2])
    return cache._replace(k_BxGxMxK=k, v_BxGxMxK=v)


@pytest.fixture(autouse=True)
def _quick(quick_compilation):
    pass


@pytest.mark.parametrize("case", CASES)
def test_the_cache_gives_the_logits_of_the_whole_sequence(case):
    model = model_of(*CASES[case])
    tokens = jax.random.randint(jax.random.key(1), (2, CONTEXT), 0, 32)
    forward = jax.jit(nnx.merge(*nnx.split(model)))
    whole, other = forward(tokens), forward(tokens.at[:, 0].set((tokens[:, 0] + 1) % 32))
    assert np.max(np.abs(whole[:, -1] - other[:, -1])) > 1e-2  # what was read before matters: else equal logits would say nothing
    found = logits_of_pieces(model, tokens, PIECES, of_garbage(model.new_cache(2)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)


def test_bfloat16_to_its_own_rounding():
    """Pieces sum products in another order, and every activation is then rounded to 8 bits, 1 in 256 of itself, over two blocks."""
    model = model_of({"compute_dtype": "bfloat16", "kv_heads": 2, "norm_gains": True}, {})
    tokens = jax.random.randint(jax.random.key(1), (2, CONTEXT), 0, 32)
    assert model.new_cache(2).k_BxGxMxK.dtype == jnp.bfloat16
    whole = jax.jit(nnx.merge(*nnx.split(model)))(tokens)
    found = logits_of_pieces(model, tokens, PIECES, of_garbage(model.new_cache(2)))
    assert np.max(np.abs(found - whole)) < np.std(whole) / 32


def test_the_cache_is_as_large_as_the_heads_it_keeps():
    cache = model_of({"kv_heads": 1, "shared_depth": True, "depth": 3}, {}).new_cache(5)
    assert cache.k_BxGxMxK.shape == cache.v_BxGxMxK.shape == (3, 5, 1, CONTEXT, 8) and int(cache.length) == 0
