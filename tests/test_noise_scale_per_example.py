"""Squared norms from the probe against brute force: the gradient of each sequence, taken alone by plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax import noise_scale as ns

B, L, D, F, V = 6, 9, 5, 7, 4


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def check_layer(layer, plain, param, x, weights):
    """`layer(x, param, probe, metric)` against `plain(x, param)`: output, input gradient, parameter gradient, squared norms."""

    def loss(param, probe_B, x, metric=None):
        return jnp.sum(weights * jnp.tanh(layer(x, param, probe_B, metric)))

    def plain_loss(param, x, weights):
        return jnp.sum(weights * jnp.tanh(plain(x, param)))

    close(layer(x, param, jnp.zeros(B)), plain(x, param))
    dparam, sq_norms_B = jax.jit(jax.grad(loss, argnums=(0, 1)))(param, jnp.zeros(B), x)
    each = jax.vmap(lambda x, w: jax.grad(plain_loss)(param, x[None], w[None]))(x, weights)
    close(dparam, each.sum(0))
    square = np.asarray(each, np.float64) ** 2
    close(sq_norms_B, square.reshape(B, -1).sum(1))
    metric = jax.random.exponential(jax.random.key(9), param.shape)
    dparam, sq_norms_Bx2 = jax.jit(jax.grad(loss, argnums=(0, 1)))(param, jnp.zeros((B, 2)), x, metric)
    close(dparam, each.sum(0))
    close(sq_norms_Bx2[:, 0], square.reshape(B, -1).sum(1))
    close(sq_norms_Bx2[:, 1], (np.asarray(metric)[None] * square).reshape(B, -1).sum(1))
    with pytest.raises(ValueError, match="two columns with a metric"):
        layer(x, param, jnp.zeros(B), metric)
    if jnp.issubdtype(x.dtype, jnp.floating):
        close(jax.grad(loss, argnums=2)(param, jnp.zeros(B), x), jax.grad(plain_loss, argnums=1)(param, x, weights))


@pytest.mark.parametrize("shards", [1, 2, 3, 6])
def test_dense(shards):
    check_layer(
        lambda x, w, probe, metric=None: ns.dense(x, w, probe, metric, shards=shards),
        lambda x, w: jnp.einsum("bli,io->blo", x, w),
        random(0, D, F),
        random(1, B, L, D),
        random(2, B, L, F),
    )


@pytest.mark.parametrize("joined", [True, False])
def test_several_products_of_one_input(joined):
    """Three matrices as one, and by themselves: the same outputs, gradient and norms, each with its own part of the metric."""

    def layer(x, w, probe, metric=None):
        metrics = None if metric is None else jnp.split(metric, [1, 3], axis=1)
        return jnp.concatenate(ns.dense_many(x, jnp.split(w, [1, 3], axis=1), probe, metrics, joined=joined), axis=2)

    check_layer(layer, lambda x, w: jnp.einsum("bli,io->blo", x, w), random(0, D, F), random(1, B, L, D), random(2, B, L, F))


def test_unembed_gives_float32_logits():
    h_BxLxD, w_DxV = random(1, B, L, D), random(0, D, V)
    check_layer(ns.unembed, lambda x, w: jnp.einsum("bli,io->blo", x, w), w_DxV, h_BxLxD, random(2, B, L, V))
    assert ns.unembed(h_BxLxD.astype(jnp.bfloat16), w_DxV, jnp.zeros(B)).dtype == jnp.float32


@pytest.mark.parametrize("shards", [1, 2])
def test_a_large_matrix_is_taken_some_rows_at_a_time(shards, monkeypatch):
    """4 rows of 7 columns at a time where 14 entries are the most: two rows each."""
    monkeypatch.setattr("scaling_jax.noise_scale.sequence_sums._LARGEST_PRODUCT", 14)
    layer = functools.partial(ns.dense, shards=shards)
    plain = functools.partial(jnp.einsum, "bli,io->blo")
    w_IxO = random(0, 4, F)
    check_layer(layer, plain, w_IxO, random(1, B, L, 4), random(2, B, L, F))
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda w: layer(random(1, B, L, 4), w, jnp.zeros(B)).sum()))(w_IxO))
    product = "f32[2,7] = dot_general" if shards == 1 else "f32[2,2,7] = dot_general"
    assert product in jaxpr and product.replace("2,7]", "4,7]") not in jaxpr


def test_scale_sums_over_positions_before_squaring():
    check_layer(ns.scale, lambda x, g: x * jnp.broadcast_to(g, x.shape), random(0, D), random(1, B, L, D), random(2, B, L, D))


def test_bias():
    check_layer(ns.bias, lambda x, b: x + jnp.broadcast_to(b, x.shape), random(0, D), random(1, B, L, D), random(2, B, L, D))


def test_embed_with_repeated_tokens():
    tokens_BxL = jax.random.randint(jax.random.key(3), (B, L), 0, V)  # 9 positions, 4 tokens: every sequence repeats some
    check_layer(
        lambda t, w, probe, metric=None: ns.embed(w, t, probe, metric), lambda t, w: w[t], random(0, V, D), tokens_BxL, random(2, B, L, D)
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_tied_pair_has_its_cross_term(shards):
    tokens_BxL = jax.random.randint(jax.random.key(3), (B, L), 0, V)

    def layer(tokens, table, probe, metric=None):
        x, carrier = ns.embed_tied(table, tokens, probe, metric)
        return ns.unembed_tied(jnp.sin(x), table, tokens, carrier, probe, metric, shards=shards)

    def plain(tokens, table):
        return jnp.einsum("bld,vd->blv", jnp.sin(table[tokens]), table)

    check_layer(layer, plain, random(0, V, D), tokens_BxL, random(2, B, L, V))


def test_several_layers_share_a_probe_through_scan_and_remat():
    w_NxDxD = 0.5 * random(0, 4, D, D)
    x_BxLxD = random(1, B, L, D)

    def forward(w_NxDxD, x_BxLxD, product):
        step = jax.checkpoint(lambda x, w: (x + jnp.tanh(product(x, w)), None))
        return jnp.sum(jax.lax.scan(step, x_BxLxD, w_NxDxD)[0] ** 2)

    def probed(w_NxDxD, probe_B):
        return forward(w_NxDxD, x_BxLxD, lambda x, w: ns.dense(x, w, probe_B))

    grads, sq_norms_B = jax.grad(probed, argnums=(0, 1))(w_NxDxD, jnp.zeros(B))
    each = jax.vmap(lambda x: jax.grad(forward)(w_NxDxD, x[None], lambda x, w: x @ w))(x_BxLxD)
    close(grads, each.sum(0))
    close(sq_norms_B, np.sum(np.asarray(each, np.float64).reshape(B, -1) ** 2, axis=1))


def test_bfloat16_gradient_is_summed_in_float32():
    """bfloat16 inputs are exact in float32, so only the order of the sum may differ from a float32 product of them."""
    x, dy, w = (random(i, *shape).astype(jnp.bfloat16) for i, shape in enumerate([(B, L, D), (B, L, F), (D, F)]))
    w32 = w.astype(jnp.float32)

    def loss(w, probe_B):
        return jnp.sum(ns.dense(x, w, probe_B).astype(jnp.float32) * dy.astype(jnp.float32))

    dw, sq_norms_B = jax.grad(loss, argnums=(0, 1))(w32, jnp.zeros(B))
    each = np.einsum("bli,blo->bio", np.asarray(x, np.float64), np.asarray(dy, np.float64))
    assert dw.dtype == jnp.float32
    close(dw, each.sum(0))
    close(sq_norms_B, np.sum(each**2, axis=(1, 2)))


def test_batch_that_shards_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="6 sequences cannot be divided among 4 shards"):
        ns.dense(random(0, B, L, D), random(1, D, F), jnp.zeros(B), shards=4)


def test_module_imports_nothing_else_of_the_package():
    import ast
    from pathlib import Path

    for path in Path(ns.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any(n.startswith("scaling_jax") and not n.startswith("scaling_jax.noise_scale") for n in names), path
                assert all(n in ("scaling_jax.noise_scale",) or not n.startswith("scaling_jax.n") or n.count(".") == 2 for n in names)
