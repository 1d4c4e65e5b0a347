"""FLOPs of matrix products: closed forms, the compiled text and the traced program, which must agree."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from scaling_jax.pods.flops import dot_flops, jaxpr_dot_flops, loop_weighted_flops


def both(f, *arguments):
    """FLOPs by the compiled text and by the jaxpr."""
    return dot_flops(text(f, *arguments)), jaxpr_dot_flops(jax.jit(f).trace(*arguments).jaxpr)


def text(f, *arguments):
    return jax.jit(f).lower(*arguments).compile().as_text()


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("m, k, n", [(3, 5, 7), (256, 512, 128), (64, 64, 1)])
def test_product(m, k, n, dtype):
    assert both(jnp.matmul, ones(m, k, dtype=dtype), ones(k, n, dtype=dtype)) == (2 * m * n * k,) * 2


def test_batched_and_several_contracted_dimensions():
    assert both(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), ones(4, 64, 32), ones(4, 32, 16)) == (2 * 4 * 64 * 32 * 16,) * 2
    assert both(lambda a, b: jnp.einsum("ijk,jkl->il", a, b), ones(8, 4, 16), ones(4, 16, 32)) == (2 * 8 * 4 * 16 * 32,) * 2


def test_vmap():
    assert both(jax.vmap(jnp.matmul), ones(5, 8, 16), ones(5, 16, 4)) == (2 * 5 * 8 * 16 * 4,) * 2


def test_scan_of_scan():
    def inner(h, w):
        return jnp.tanh(h @ w), None

    def outer(h, w):
        h, _ = jax.lax.scan(inner, h, w)
        return h @ w[0].T, None

    def f(h, w):
        return jax.lax.scan(outer, h, w)[0]

    assert both(f, ones(8, 32), ones(5, 3, 32, 32)) == (5 * (3 + 1) * 2 * 8 * 32 * 32,) * 2


def mlp_loss(params, x, wrap=lambda layer: layer):
    """A first layer, scanned layers of two products each, and an output."""

    def layer(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    h, _ = jax.lax.scan(wrap(layer), x @ params["first"], params["layers"])
    return jnp.mean((h @ params["last"]) ** 2)


B, D_IN, D, F, L, D_OUT = 16, 12, 24, 48, 6, 20
FIRST, UP, DOWN, LAST = 2 * B * D_IN * D, 2 * B * D * F, 2 * B * D * F, 2 * B * D * D_OUT


def mlp_arguments():
    layers = {"up": ones(L, D, F), "down": ones(L, F, D)}
    return {"first": ones(D_IN, D), "layers": layers, "last": ones(D, D_OUT)}, ones(B, D_IN)


def test_gradient_of_a_scanned_mlp():
    # Backward costs twice the forward, but nobody asks for the gradient of the input.
    expected = 3 * (FIRST + L * (UP + DOWN) + LAST) - FIRST
    assert both(jax.grad(mlp_loss), *mlp_arguments()) == (expected, expected)


def test_remat_runs_the_up_projection_again():
    # `down` need not be recomputed: its output enters the gradient only through the residual sum.
    expected = 3 * (FIRST + L * (UP + DOWN) + LAST) - FIRST + L * UP
    assert both(jax.grad(lambda p, x: mlp_loss(p, x, jax.checkpoint)), *mlp_arguments()) == (expected, expected)


def test_custom_vjp():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, dy: (dy @ saved[1].T, saved[0].T @ dy))
    assert both(product, ones(8, 16), ones(16, 4)) == (2 * 8 * 16 * 4,) * 2
    grad = jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2), argnums=(0, 1))
    assert both(grad, ones(8, 16), ones(16, 4)) == (3 * 2 * 8 * 16 * 4,) * 2


def test_conditional_counts_its_dearest_branch():
    def f(p, x):
        return jax.lax.cond(p > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert both(f, jnp.float32(1), ones(32, 32)) == (2 * 2 * 32**3,) * 2

    def one_large_or_two_small(p, x):
        return jax.lax.cond(p > 0, lambda x: (x @ x)[:4], lambda x: x[:4] @ x @ x, x)

    assert both(one_large_or_two_small, jnp.float32(1), ones(32, 32)) == (2 * 32**3,) * 2


def test_loop_of_unknown_length_is_refused_only_where_it_matters():
    def halve(x):  # ends when the data say so
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x @ x / 2, x)

    with pytest.raises(ValueError, match="trip count"):
        dot_flops(text(halve, ones(8, 8)))
    with pytest.raises(ValueError, match="while loop"):
        jaxpr_dot_flops(jax.jit(halve).trace(ones(8, 8)).jaxpr)

    def no_product_inside(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x / 2, x) @ x

    assert both(no_product_inside, ones(8, 8)) == (2 * 8**3,) * 2


def entry(*lines):
    return "HloModule m\n\nENTRY %main (p: f32[1]) -> f32[1] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"


@pytest.mark.parametrize(
    "lhs, rhs, convolution, flops",
    [
        # how the TPU compiler writes a batch of 2·4 products [512,128]·[128,512]: every window meets exactly one element
        ("2,4,512,128", "2,4,512,128", "f32[2,4,512,512] convolution(%a, %b), window={size=2x4 stride=1x3 lhs_dilate=2x4}, "
         "dim_labels=01bf_01oi->01bf", 2 * 8 * 512 * 512 * 128),
        # and a windowed product, padded by one on either side: of the 2·2 pairs all but two fall on padding
        ("1024,64,1", "2,128,64", "f32[1024,2,128] convolution(%a, %b), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
         2 * 1024 * 128 * 64 * 2),
        # an ordinary 3x3 convolution, stride 1, 8x8 with the border padded: 22 of 24 pairs on each axis
        ("2,8,8,5", "3,3,5,7", "f32[2,8,8,7] convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
         2 * 2 * 7 * 5 * 22 * 22),
    ],
)  # fmt: skip
def test_convolution(lhs, rhs, convolution, flops):
    program = entry(f"%a = f32[{lhs}] parameter(0)", f"%b = f32[{rhs}] parameter(1)", f"ROOT %c = {convolution}")
    assert dot_flops(program) == flops


def test_library_products():
    def program(call):
        return entry("%a = f32[8,16]{1,0} parameter(0)", "%b = f32[16,4]{1,0} parameter(1)", f"ROOT %c = {call}")

    onednn = 'f32[8,4]{1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul", backend_config={"onednn_matmul_config":{}}'
    cublas = (
        '(f32[8,4]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
        '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
    )
    assert dot_flops(program(onednn)) == dot_flops(program(cublas)) == 2 * 8 * 16 * 4
    assert dot_flops(program('f32[8,4]{1,0} custom-call(%a, %b), custom_call_target="AllocateBuffer"')) == 0
    with pytest.raises(ValueError, match="new.matmul"):
        dot_flops(program('f32[8,4]{1,0} custom-call(%a, %b), custom_call_target="new$matmul"'))


def test_elementwise_work_is_counted_apart():
    def f(x, w):
        def body(h, w):
            return jnp.tanh(h @ w) + h, None

        return jnp.sum(jax.lax.scan(body, x, w)[0])

    program = text(f, ones(8, 32), ones(6, 32, 32))
    assert dot_flops(program) == 6 * 2 * 8 * 32 * 32
    elementwise = loop_weighted_flops(program) - dot_flops(program)
    assert 6 * 2 * 8 * 32 + 8 * 32 <= elementwise <= 6 * (2 * 8 * 32 + 8) + 8 * 32  # tanh, +, the sum; at most a few counters beside them


FOUR_DEVICES = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from scaling_jax.pods.flops import dot_flops, jaxpr_dot_flops

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, P("data")))
w = jax.device_put(jnp.ones((5, 32, 32)), NamedSharding(mesh, P()))

def loss(w, x):
    return jnp.mean(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0])

def manual(w, x):
    return jax.lax.pmean(loss(w, x), "data")

sharded = jax.shard_map(manual, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
for f in (loss, sharded):
    step = jax.jit(jax.grad(f))
    per_device, total = dot_flops(step.lower(w, x).compile().as_text()), jaxpr_dot_flops(step.trace(w, x).jaxpr)
    assert 4 * per_device == total == (3 * 5) * 2 * 64 * 32 * 32, (per_device, total)
print("agreed")
"""


def test_devices_share_the_work():
    root = Path(__file__).parents[1]
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    flags["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), flags.get("PYTHONPATH")]))
    ran = subprocess.run([sys.executable, "-c", FOUR_DEVICES], env=flags, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and "agreed" in ran.stdout, ran.stderr[-2000:]
