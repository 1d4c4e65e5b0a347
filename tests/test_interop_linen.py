"""The Transformer as a Linen module: the same logits, gradients and parameters, in a loop that knows nothing of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from scaling_jax import Parametrization, Transformer, TransformerConfig, sequence_losses
from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.interop.linen import linen_transformer, linen_variables, nnx_params
from scaling_jax.optimizer import adamw

CONFIG = TransformerConfig(
    vocab_size=32, width=32, depth=2, head_dim=8, context=16, mlp="swiglu", kv_heads=2, norm_gains=True, biases=True, dropout=0.1
)
PARAMETRIZATION = Parametrization("mup", base_width=16, base_head_dim=4)


@pytest.fixture(autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture(scope="module")
def model():
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIG, PARAMETRIZATION, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), params))


@pytest.fixture(scope="module")
def module():
    return linen_transformer(CONFIG, PARAMETRIZATION)


@pytest.fixture(scope="module")
def apply(module):
    return jax.jit(module.apply)


@pytest.fixture(scope="module")
def init(module):
    return jax.jit(module.init)


def tokens_BxL(seed=0, length=16):
    return jax.random.randint(jax.random.key(seed), (4, length), 0, 32)


def test_logits_are_those_of_the_nnx_module(model, module, apply):
    assert isinstance(module, linen.Module)
    graph, params = nnx.split(model)
    wanted = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, tokens_BxL())
    found = apply(linen_variables(model), tokens_BxL())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_variables_of_init_are_plain_arrays_under_the_same_names(model, init):
    variables = init(jax.random.key(1), tokens_BxL())
    assert set(variables) == {"params"}
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), variables)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), linen_variables(model))
    other = init(jax.random.key(2), tokens_BxL())
    assert not np.array_equal(other["params"]["embedding"], variables["params"]["embedding"])
    assert abs(np.std(variables["params"]["unembedding"]) - 16**-0.5) < 0.02  # by the table: the base width's


def test_parameters_go_over_and_back(model, module):
    back = nnx_params(model, jax.tree.map(lambda x: 2 * x, linen_variables(model)))
    for (path, old), (same, new) in zip(nnx.to_flat_state(nnx.state(model, nnx.Param)), nnx.to_flat_state(back), strict=True):
        assert path == same and new.get_metadata() == old.get_metadata()
        np.testing.assert_array_equal(new[...], 2 * old[...])


def test_wrong_variables_are_named(model):
    variables = linen_variables(model)
    blocks = dict(variables["params"]["blocks"])
    query = blocks.pop("query")
    with pytest.raises(UserError, match=r"blocks\.query is absent: must be \[2, 32, 32\]"):
        nnx_params(model, {"params": variables["params"] | {"blocks": blocks}})
    with pytest.raises(UserError, match=r"blocks\.query is \[1, 32, 32\]: must be \[2, 32, 32\]"):
        nnx_params(model, {"params": variables["params"] | {"blocks": blocks | {"query": query[:1]}}})
    with pytest.raises(UserError, match=r"'params'\], more is \[2, 32, 32\]: must be absent"):
        nnx_params(model, {"params": variables["params"] | {"more": query}})


def test_other_arguments_and_methods(model, module, apply):
    """Dropout's keys, and the cache."""
    variables, tokens = linen_variables(model), tokens_BxL()
    keys = jax.random.split(jax.random.key(3), 4)
    dropped = jax.jit(lambda v, t, keys: module.apply(v, t, dropout_keys_B=keys))(variables, tokens, keys)
    whole = apply(variables, tokens)
    assert np.max(np.abs(dropped - whole)) > 1e-2
    extend = jax.jit(lambda v, t, cache: module.apply(v, t, cache, nnx_method="extend"))
    logits, cache = extend(variables, tokens, model.new_cache(4))
    np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-5)
    assert int(cache.length) == 16


def test_it_trains_with_linen_and_optax_alone(module, init):
    tokens = tokens_BxL(length=17)
    variables = init(jax.random.key(1), tokens[:, :-1])
    optimizer = optax.adam(1e-2)
    state = optimizer.init(variables["params"])

    def loss_of(params):
        return jnp.mean(sequence_losses(module.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:]))

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, loss

    params, losses = variables["params"], []
    for _ in range(30):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]  # it knows its one batch by heart


def test_gradients_are_the_nnx_modules_and_can_be_given_their_rules(model, module):
    """So that a Linen loop can apply the parametrization's learning rates: adamw steps as it does for the NNX module."""
    tokens, optimizer = tokens_BxL(length=17), adamw(default_config())
    graph, params = nnx.split(model)

    def nnx_loss(params):
        return jnp.mean(sequence_losses(nnx.merge(graph, params)(tokens[:, :-1]), tokens[:, 1:]))

    def linen_loss(variables):
        return jnp.mean(sequence_losses(module.apply(variables, tokens[:, :-1]), tokens[:, 1:]))

    wanted = jax.jit(jax.grad(nnx_loss))(params)
    found = nnx_params(model, jax.jit(jax.grad(linen_loss))(linen_variables(model)))
    state = optimizer.init(nnx_params(model, linen_variables(model)))
    update = jax.jit(lambda grads: optimizer.update(grads, state, params, lr_fraction=1.0)[0])
    of_linen, of_nnx = (nnx.to_flat_state(update(grads)) for grads in (found, wanted))
    for (path, a), (_, b), (_, c), (_, d) in zip(nnx.to_flat_state(found), nnx.to_flat_state(wanted), of_linen, of_nnx, strict=True):
        np.testing.assert_allclose(a[...], b[...], rtol=1e-4, atol=1e-7, err_msg=str(path))
        np.testing.assert_allclose(c[...], d[...], rtol=1e-2, atol=1e-7, err_msg=str(path))
