"""Squared norms from the probe against brute force: the gradient of each sequence, taken alone by plain JAX."""

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
    """`layer(x, param, probe)` against `plain(x, param)`: output, input gradient, parameter gradient, squared norms."""

    def loss(param, probe_B, x):
        return jnp.sum(weights * jnp.tanh(layer(x, param, probe_B)))

    def plain_loss(param, x, weights):
        return jnp.sum(weights * jnp.tanh(plain(x, param)))

    close(layer(x, param, jnp.zeros(B)), plain(x, param))
    dparam, sq_norms_B = jax.jit(jax.grad(loss, argnums=(0, 1)))(param, jnp.zeros(B), x)
    each = jax.vmap(lambda x, w: jax.grad(plain_loss)(param, x[None], w[None]))(x, weights)
    close(dparam, each.sum(0))
    close(sq_norms_B, np.sum(np.asarray(each, np.float64).reshape(B, -1) ** 2, axis=1))
    if jnp.issubdtype(x.dtype, jnp.floating):
        close(jax.grad(loss, argnums=2)(param, jnp.zeros(B), x), jax.grad(plain_loss, argnums=1)(param, x, weights))


@pytest.mark.parametrize("shards", [1, 2, 3, 6])
def test_dense(shards):
    check_layer(
        lambda x, w, probe: ns.dense(x, w, probe, shards=shards),
        lambda x, w: jnp.einsum("bli,io->blo", x, w),
        random(0, D, F),
        random(1, B, L, D),
        random(2, B, L, F),
    )


def test_scale_sums_over_positions_before_squaring():
    check_layer(ns.scale, lambda x, g: x * jnp.broadcast_to(g, x.shape), random(0, D), random(1, B, L, D), random(2, B, L, D))


def test_bias():
    check_layer(ns.bias, lambda x, b: x + jnp.broadcast_to(b, x.shape), random(0, D), random(1, B, L, D), random(2, B, L, D))


def test_embed_with_repeated_tokens():
    tokens_BxL = jax.random.randint(jax.random.key(3), (B, L), 0, V)  # 9 positions, 4 tokens: every sequence repeats some
    check_layer(lambda t, w, probe: ns.embed(w, t, probe), lambda t, w: w[t], random(0, V, D), tokens_BxL, random(2, B, L, D))


@pytest.mark.parametrize("shards", [1, 2])
def test_tied_pair_has_its_cross_term(shards):
    tokens_BxL = jax.random.randint(jax.random.key(3), (B, L), 0, V)

    def layer(tokens, table, probe):
        x, carrier = ns.embed_tied(table, tokens, probe)
        return ns.unembed_tied(jnp.sin(x), table, tokens, carrier, probe, shards=shards)

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
