"""Any model's squared gradient norms against brute force: a Python loop of jax.grad over examples, in float64 numpy after that."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling_jax import noise_scale
from scaling_jax.noise_scale.any_model import check_mean_over_examples, group_names, group_sq_norms, per_example_sq_norms

B, L, D = 6, 5, 3
pytestmark = pytest.mark.usefixtures("quick_compilation")


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def a_batch():
    return {"x": random(1, B, L, D), "y": random(2, B, L, 2)}


def squares(y_BxLx2, batch):
    return jnp.mean((y_BxLx2 - batch["y"]) ** 2)


def dict_params():
    return {"w": random(3, D, 4), "b": random(4, 4), "out": {"w": random(5, 4, 2)}}


def dict_loss(params, batch):
    hidden = batch["x"] @ params["w"]
    return squares(jnp.tanh(hidden + jnp.broadcast_to(params["b"], hidden.shape)) @ params["out"]["w"], batch)


@partial(jax.tree_util.register_dataclass, data_fields=["w", "activation", "uses", "name", "scale"], meta_fields=[])
@dataclass
class Module:
    """As Equinox has it: everything is a leaf, functions, integers and strings too."""

    w: Any
    activation: Any
    uses: Any
    name: str
    scale: float

    def __call__(self, x):
        return self.activation(self.scale * x @ self.w)


class LinenNet(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.LayerNorm(epsilon=1e-5)(flax.linen.Dense(4)(x))
        return flax.linen.Dense(2)(flax.linen.tanh(x))


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.into, self.norm, self.out = nnx.Linear(D, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.steps = nnx.Variable(jnp.int32(0))

    def __call__(self, x):
        return self.out(jnp.tanh(self.norm(self.into(x))))


def plain():
    return dict_loss, dict_params()


def callable_leaves():
    net = [Module(random(3, D, 4), jnp.tanh, jnp.arange(2), "in", 1.5), Module(random(4, 4, 2), jnp.sin, np.int32(1), "out", 0.5)]
    return lambda net, batch: squares(net[1](net[0](batch["x"])), batch), net


def linen():
    net = LinenNet()
    params = jax.tree.map(lambda p: p + 0.1 * random(9, *p.shape), net.init(jax.random.key(0), jnp.zeros((1, L, D))))
    return lambda params, batch: squares(net.apply(params, batch["x"]), batch), params


def nnx_state():
    graph, params, rest = nnx.split(NnxNet(), nnx.Param, ...)
    return lambda params, batch: squares(nnx.merge(graph, params, rest)(batch["x"]), batch), params


def nnx_module():
    return lambda net, batch: squares(net(batch["x"]), batch), NnxNet()


KINDS = [plain, callable_leaves, linen, nnx_state, nnx_module]


def one_by_one(loss_fn, params, batch):
    """Losses_B and, for each leaf that is differentiated, gradients [B, ...]."""
    leaves, treedef = jax.tree.flatten(params)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32]

    def loss(arrays, example):
        now = list(leaves)
        for i, array in zip(at, arrays, strict=True):
            now[i] = array
        return loss_fn(treedef.unflatten(now), example)

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    each = [value_and_grad([leaves[i] for i in at], jax.tree.map(lambda x, b=b: x[b : b + 1], batch)) for b in range(B)]
    losses = np.array([float(loss) for loss, _ in each])
    return losses, [np.array([np.asarray(grads[i], np.float64) for _, grads in each]) for i in range(len(at))]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force(kind):
    loss_fn, params = kind()
    result = per_example_sq_norms(loss_fn, params, a_batch(), chunk=2)
    losses_B, grads = one_by_one(loss_fn, params, a_batch())
    assert len(grads) == {plain: 3, callable_leaves: 2}.get(kind, 6)
    np.testing.assert_allclose(result.loss, losses_B.mean(), rtol=1e-5)
    np.testing.assert_allclose(result.sq_norms_BxG[:, 0], sum((g.reshape(B, -1) ** 2).sum(1) for g in grads), rtol=1e-5)
    np.testing.assert_allclose(result.grad_sq_G, [sum((g.mean(0) ** 2).sum() for g in grads)], rtol=1e-5)
    for found, expected in zip(jax.tree.leaves(result.grads), grads, strict=True):
        np.testing.assert_allclose(found, expected.mean(0), rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    grad_sq_G, grad_trace_G = noise_scale.estimates(result.sq_norms_BxG, result.grad_sq_G)
    trace = sum(np.sum((g - g.mean(0)) ** 2) / (B - 1) for g in grads)  # the definition: the sample covariance's trace
    np.testing.assert_allclose(grad_trace_G[0], trace, rtol=1e-5)
    np.testing.assert_allclose(grad_sq_G[0], sum((g.mean(0) ** 2).sum() for g in grads) - trace / B, rtol=1e-5)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(D, 2, 4, 2, key=jax.random.key(0))

    def loss_fn(net, batch):
        return squares(jax.vmap(jax.vmap(net))(batch["x"]), batch)

    result = per_example_sq_norms(loss_fn, net, a_batch())
    losses_B, grads = one_by_one(loss_fn, net, a_batch())
    np.testing.assert_allclose(result.sq_norms_BxG[:, 0], sum((g.reshape(B, -1) ** 2).sum(1) for g in grads), rtol=1e-5)
    assert jax.tree.structure(result.grads) == jax.tree.structure(eqx.filter_grad(loss_fn)(net, a_batch()))


def test_what_is_not_differentiated_is_none_in_the_gradient():
    loss_fn, net = callable_leaves()
    grads = per_example_sq_norms(loss_fn, net, a_batch()).grads
    assert grads[0].w.shape == (D, 4) and grads[0].w.dtype == jnp.float32
    assert [grads[0].activation, grads[0].uses, grads[0].name, grads[0].scale] == [None] * 4


@pytest.mark.parametrize("chunk", [3, B])
def test_the_chunk_changes_nothing(chunk):
    """One key for each example, as dropout wants it: keys are divided as arrays are."""
    batch = a_batch() | {"key": jax.random.split(jax.random.key(7), B)}

    def loss_fn(params, batch):
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (L, D)))(batch["key"])
        return dict_loss(params, batch | {"x": batch["x"] * keep.astype(jnp.float32)})

    result = per_example_sq_norms(loss_fn, dict_params(), batch, chunk=chunk)
    losses_B, grads = one_by_one(loss_fn, dict_params(), batch)
    np.testing.assert_allclose(result.sq_norms_BxG[:, 0], sum((g.reshape(B, -1) ** 2).sum(1) for g in grads), rtol=1e-5)
    np.testing.assert_allclose(result.grad_sq_G, [sum((g.mean(0) ** 2).sum() for g in grads)], rtol=1e-5)


def test_groups_are_columns_by_name():
    def groups(path):
        return "late" if "out" in path else "bias" if "'b'" in path else "early"

    result = per_example_sq_norms(*plain(), a_batch(), groups=groups)
    _, (b, out, w) = one_by_one(*plain(), a_batch())
    assert group_names(dict_params(), groups) == ("bias", "early", "late")
    assert group_names(dict_params()) == ("all",)
    np.testing.assert_allclose(result.sq_norms_BxG, np.stack([(g.reshape(B, -1) ** 2).sum(1) for g in (b, w, out)], axis=1), rtol=1e-5)
    np.testing.assert_allclose(result.grad_sq_G, [(g.mean(0) ** 2).sum() for g in (b, w, out)], rtol=1e-5)
    np.testing.assert_allclose(group_sq_norms(result.grads, groups), result.grad_sq_G, rtol=1e-6)
    with pytest.raises(ValueError, match=r"groups\(\"\['b'\]\"\) must be the name of a group, a str, and is None"):
        group_names(dict_params(), lambda path: None)


def test_in_a_metric_the_norms_are_those_of_the_scaled_gradient():
    """Σ P·g² is the plain squared norm for parameters u = w / √P, whose gradient is √P·g."""
    metric = jax.tree.map(lambda p: jnp.exp(p), dict_params())
    result = per_example_sq_norms(*plain(), a_batch(), metric=metric)

    def loss_fn(u, batch):
        return dict_loss(jax.tree.map(lambda u, p: jnp.sqrt(p) * u, u, metric), batch)

    scaled = per_example_sq_norms(loss_fn, jax.tree.map(lambda w, p: w / jnp.sqrt(p), dict_params(), metric), a_batch())
    np.testing.assert_allclose(result.sq_norms_BxG, scaled.sq_norms_BxG, rtol=1e-5)
    np.testing.assert_allclose(result.grad_sq_G, scaled.grad_sq_G, rtol=1e-5)
    np.testing.assert_allclose(group_sq_norms(result.grads, metric=metric), result.grad_sq_G, rtol=1e-6)
    plain_result = per_example_sq_norms(*plain(), a_batch())
    np.testing.assert_array_equal(jax.tree.leaves(result.grads)[0], jax.tree.leaves(plain_result.grads)[0])
    with pytest.raises(ValueError, match=r"its arrays are \(4,\), those of params \(4,\), \(4, 2\), \(3, 4\)"):
        per_example_sq_norms(*plain(), a_batch(), metric={"b": metric["b"]})
    with pytest.raises(ValueError, match="negative weights"):
        per_example_sq_norms(*plain(), a_batch(), metric=jax.tree.map(lambda p: p - 1.0, metric))


def test_bfloat16_parameters_are_summed_in_float32():
    """Two gradients of 1 and one of 2⁻⁹ each: in bfloat16 the small ones vanish beside the large."""
    batch = jnp.asarray([1.0, 2.0**-9, 2.0**-9, 2.0**-9, 2.0**-9, 2.0**-9], jnp.bfloat16)
    params = jnp.zeros(4, jnp.bfloat16)
    result = per_example_sq_norms(lambda w, x: jnp.mean(jnp.sum(jnp.outer(x, w), axis=1)), params, batch)
    np.testing.assert_allclose(result.grad_sq_G, [4 * ((1 + 5 * 2.0**-9) / 6) ** 2], rtol=1e-6)
    np.testing.assert_allclose(result.sq_norms_BxG[:, 0], 4 * np.float32(batch.astype(jnp.float32)) ** 2, rtol=1e-6)
    assert result.grads.dtype == jnp.bfloat16 and result.sq_norms_BxG.dtype == jnp.float32 and result.loss.dtype == jnp.float32


def test_memory_grows_with_the_chunk_and_not_with_the_batch():
    width = 256
    gradient = 4 * width * width

    def temporaries(batch, chunk):
        def loss_fn(w, x):
            return jnp.mean(jnp.tanh(x @ w) ** 2)

        measure = jax.jit(lambda w, x: per_example_sq_norms(loss_fn, w, x, chunk=chunk))
        w, x = jnp.zeros((width, width)), jnp.zeros((batch, 2, width))
        return measure.lower(w, x).compile().memory_analysis().temp_size_in_bytes

    one, four, sixteen = (temporaries(16, chunk) for chunk in (1, 4, 16))
    assert one < 3 * gradient
    assert 2 * gradient < four - one < 5 * gradient and 9 * gradient < sixteen - four < 16 * gradient
    assert temporaries(64, 4) - four < gradient


def masked(params, batch):
    """A mean over all unmasked tokens: an example with more of them weighs more."""
    errors_BxL = jnp.mean((batch["x"] @ params["w"]) ** 2, axis=2)
    return jnp.sum(errors_BxL * batch["mask"]) / jnp.sum(batch["mask"])


def summed(params, batch):
    return B * dict_loss(params, batch) if len(batch["x"]) == B else dict_loss(params, batch)


def batch_statistics(params, batch):
    """The value is a mean, the gradient is not: it is divided by the batch's own spread, and multiplied by it again."""
    y_BxL = jnp.sum(batch["x"] @ params["w"], axis=2)
    scale = 1 + jnp.abs(jnp.mean(y_BxL))
    return jnp.mean(y_BxL) + jax.lax.stop_gradient(1 / scale) * scale * 0 + dict_loss(params, batch) * scale / jax.lax.stop_gradient(scale)


def test_a_loss_that_is_no_mean_over_examples_is_refused():
    batch = a_batch() | {"mask": (jnp.arange(L)[None] < jnp.arange(1, B + 1)[:, None]).astype(jnp.float32)}
    with pytest.raises(ValueError, match=r"not a mean over the examples of its batch: on the batch of 6 it is [\d.]+, and the mean of its"):
        per_example_sq_norms(summed, dict_params(), batch)
    with pytest.raises(ValueError, match="different numbers of unmasked tokens"):
        check_mean_over_examples(masked, dict_params(), batch)
    with pytest.raises(ValueError, match="the gradient of loss_fn is not a mean over the examples of its batch, though its value"):
        check_mean_over_examples(batch_statistics, dict_params(), batch, chunk=3)
    check_mean_over_examples(masked, dict_params(), batch | {"mask": jnp.ones((B, L))})
    assert per_example_sq_norms(summed, dict_params(), batch, check=False).loss > 0


def test_the_check_is_not_upset_by_rounding():
    """Neither at a minimum, where the batch's gradient is rounding alone, nor in bfloat16."""
    y_B = random(6, 64)
    check_mean_over_examples(lambda w, y: jnp.mean((y - jnp.broadcast_to(w, y.shape)) ** 2), jnp.mean(y_B), y_B)
    batch = {"x": random(1, 8, 16, 32).astype(jnp.bfloat16), "y": random(2, 8, 16, 2).astype(jnp.bfloat16)}
    params = {"w": random(3, 32, 64) / 6, "b": random(4, 64), "out": {"w": random(5, 64, 2) / 8}}
    check_mean_over_examples(lambda p, b: dict_loss(jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), b), params, batch, chunk=8)


def test_under_jit_nothing_is_checked_and_all_else_is_equal():
    batch = a_batch()
    jitted = jax.jit(lambda params, batch: per_example_sq_norms(dict_loss, params, batch, chunk=2))(dict_params(), batch)
    for x, y in zip(jax.tree.leaves(jitted), jax.tree.leaves(per_example_sq_norms(*plain(), batch, chunk=2)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert jnp.isfinite(jax.jit(lambda params: per_example_sq_norms(summed, params, batch).loss)(dict_params()))
    with pytest.raises(ValueError, match="cannot under jit"):
        jax.jit(lambda params: check_mean_over_examples(dict_loss, params, batch))(dict_params())


def test_a_variable_in_two_places_of_a_module_is_refused():
    class Tied(nnx.Module):
        def __init__(self):
            self.into = nnx.Param(random(3, D, D))
            self.out = self.into

        def __call__(self, x):
            return (jnp.tanh(x @ self.into[...]) @ self.out[...])[:, :, :2]

    with pytest.raises(ValueError, match=r"one nnx.Variable in two places, .into and .out"):
        per_example_sq_norms(lambda net, batch: squares(net(batch["x"]), batch), Tied(), a_batch())
    graph, params = nnx.split(Tied())
    loss_fn = lambda params, batch: squares(nnx.merge(graph, params)(batch["x"]), batch)  # noqa: E731
    _, (grads,) = one_by_one(loss_fn, params, a_batch())
    result = per_example_sq_norms(loss_fn, params, a_batch())
    np.testing.assert_allclose(result.sq_norms_BxG[:, 0], (grads.reshape(B, -1) ** 2).sum(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": {"x": jnp.ones((1, L, D)), "y": jnp.ones((1, L, 2))}}, "at least 2 examples in a batch, not 1"),
        ({"batch": {"x": jnp.ones((4, L, D)), "y": jnp.ones((3, L, 2))}}, r"leading axis: \['x'\] 4, \['y'\] 3"),
        ({"batch": {"x": jnp.ones((4, L, D)), "y": jnp.float32(1)}}, r"\['y'\] no axis at all"),
        ({"batch": {}}, "there are none"),
        ({"chunk": 4}, "chunk 4 does not divide the batch of 6 examples: 3 does"),
        ({"chunk": 0}, "chunk 0 does not divide the batch of 6 examples: 1 does"),
        (
            {"loss_fn": lambda params, batch: jnp.mean(batch["x"], axis=1)},
            r"one floating-point scalar.*not ShapeDtypeStruct\(shape=\(1, 3\)",
        ),
        ({"loss_fn": lambda params, batch: (dict_loss(params, batch), 1.0)}, "and nothing beside it, not"),
        ({"loss_fn": lambda params, batch: jnp.sum(params["w"] > 0)}, "one floating-point scalar"),
        ({"params": {"w": jnp.arange(3), "f": jnp.tanh}}, "nothing to differentiate"),
    ],
)
def test_errors(change, message):
    arguments = {"loss_fn": dict_loss, "params": dict_params(), "batch": a_batch()} | change
    with pytest.raises(ValueError, match=message):
        per_example_sq_norms(**arguments)
