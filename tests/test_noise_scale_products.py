"""Products against float64 numpy of the rounded operands; and that the compiled program is the one that was meant."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.noise_scale import Shards, dense
from scaling_jax.noise_scale.products import Dtypes, input_gradient, product, transposed, weight_gradient

# Sequences, their length, input and output width: rows that are multiples of 128, of none, and fewer than it; one of everything.
SHAPES = [(2, 128, 24, 40), (3, 50, 17, 33), (1, 7, 5, 3), (4, 96, 64, 8), (1, 1, 1, 1)]
BF16, F32 = jnp.bfloat16, jnp.float32


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rounded(x, dtype=BF16):
    return np.asarray(x.astype(dtype), np.float64)


def close(found, expected, tolerance):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def arrays(request):
    batch, length, rows, columns = request.param
    return draw(0, batch, length, rows), draw(1, rows, columns), draw(2, batch, length, columns)


@pytest.mark.parametrize("operands", [F32, BF16], ids=["float32", "bfloat16"])
def test_a_product_and_its_gradients(arrays, operands):
    """Activations in float32, operands in `operands`: sums are float32's, and only the gradient of W is rounded to the operands' dtype."""
    x_BxLxI, w_IxO, dy_BxLxO = arrays

    def both(x_BxLxI, w_IxO, dy_BxLxO):
        y_BxLxO, vjp = jax.vjp(lambda x, w: product(x, w, Shards(), Dtypes.of(x, operands, None)), x_BxLxI, w_IxO)
        return y_BxLxO, *vjp(dy_BxLxO)

    y_BxLxO, dx_BxLxI, dw_IxO = jax.jit(both)(x_BxLxI, w_IxO, dy_BxLxO)
    x, w, dy = (rounded(a, operands) for a in arrays)
    assert {a.dtype for a in (y_BxLxO, dx_BxLxI, dw_IxO)} == {jnp.dtype(F32)}
    close(y_BxLxO, x @ w, 1e-5)
    close(dx_BxLxI, dy @ w.T, 1e-5)
    close(dw_IxO, np.einsum("bli,blo->io", x, dy), 1e-5 if operands == F32 else 2.0**-8)
    if operands == BF16:
        np.testing.assert_array_equal(dw_IxO, dw_IxO.astype(BF16).astype(F32))


def test_dtypes_of_what_goes_in_and_out(arrays):
    x_BxLxI, w_IxO, _ = arrays
    assert Dtypes.of(x_BxLxI.astype(BF16), None, None) == (BF16, BF16, BF16)
    for of_x, of_y in ((BF16, None), (BF16, F32), (F32, BF16)):
        y_BxLxO = product(x_BxLxI.astype(of_x), w_IxO, Shards(), Dtypes.of(x_BxLxI.astype(of_x), BF16, of_y))
        assert y_BxLxO.dtype == (of_y or of_x)
        close(y_BxLxO, rounded(x_BxLxI) @ rounded(w_IxO), 1e-5 if y_BxLxO.dtype == F32 else 2.0**-8)


@pytest.mark.parametrize("out_dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["of float32", "of bfloat16"])
def test_the_gradients_by_themselves(arrays, dtype, out_dtype):
    x_BxLxI, w_IxO, dy_BxLxO = (a.astype(dtype) for a in arrays)
    x, w, dy = (rounded(a, dtype) for a in arrays)
    dx_BxLxI = jax.jit(lambda dy, w: input_gradient(dy, w, Shards(), out_dtype))(dy_BxLxO, w_IxO)
    assert dx_BxLxI.dtype == out_dtype
    close(dx_BxLxI, dy @ w.T, 1e-5 if out_dtype == F32 else 2.0**-8)
    dw_IxO = jax.jit(weight_gradient)(x_BxLxI.reshape(-1, x.shape[2]), dy_BxLxO.reshape(-1, dy.shape[2]))
    assert dw_IxO.dtype == F32
    close(dw_IxO, np.einsum("bli,blo->io", x, dy), 1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (128, 3), (256, 128), (130, 7), (5, 384)], ids=str)
def test_a_transpose(shape):
    x_MxN = draw(0, *shape)
    np.testing.assert_array_equal(jax.jit(transposed)(x_MxN), np.asarray(x_MxN).T)


def test_sharded_products_are_the_same(arrays):
    x_BxLxI, w_IxO, dy_BxLxO = (jnp.concatenate([a, a]) if a.ndim == 3 else a for a in arrays)
    shards, dtypes = Shards(2), Dtypes.of(x_BxLxI, BF16, None)
    close(product(x_BxLxI, w_IxO, shards, dtypes), rounded(x_BxLxI) @ rounded(w_IxO), 1e-5)
    close(input_gradient(dy_BxLxO.astype(BF16), w_IxO.astype(BF16), shards, F32), rounded(dy_BxLxO) @ rounded(w_IxO).T, 1e-5)


# --------------------------------------------------------------------------------------------------------------- the program on this CPU


def products_of(text: str) -> list[list[str]]:
    """The operands' dtypes of every product of a compiled program."""
    dtypes = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[", text, re.M))
    dtypes |= dict(re.findall(r"%?([\w.\-]+): (\w+)\[", text))
    found = re.findall(r"= \(?\w+\[[^=]*?\b(?:dot|custom-call)\(([^)]*)\)([^\n]*)", text)
    of_products = [operands for operands, rest in found if "custom_call_target" not in rest or re.search(r"matmul|dot", rest)]
    return [[dtypes[name.split("%")[-1].strip()] for name in operands.split(", ")[:2]] for operands in of_products]


@pytest.mark.parametrize("probed", [False, True], ids=["plain", "with norms"])
@pytest.mark.parametrize("length", [128, 50])
def test_the_three_products_of_a_layer_run_in_bfloat16(probed, length):
    """XLA gives up at run time on a bfloat16 product that it has folded a transpose into; where there is no unit it converts all."""
    w_IxO, x_BxLxI = draw(0, 256, 192), draw(1, 4, length, 256)

    def loss(w_IxO, x_BxLxI, probe_B):
        return jnp.sum(jnp.sin(dense(x_BxLxI, w_IxO, probe_B if probed else None, dtype=BF16)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(w_IxO, x_BxLxI, jnp.zeros(4)).compile()
    dw_IxO, dx_BxLxI = compiled(w_IxO, x_BxLxI, jnp.zeros(4))
    dy = np.asarray(jnp.cos(jnp.asarray(rounded(x_BxLxI) @ rounded(w_IxO), F32)).astype(BF16), np.float64)
    close(dw_IxO, np.einsum("bli,blo->io", rounded(x_BxLxI), dy), 2.0**-6)
    close(dx_BxLxI, dy @ rounded(w_IxO).T, 2.0**-6)
    found = products_of(compiled.as_text())
    assert len(found) >= 3
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text():
        assert found == [["bf16", "bf16"]] * len(found)
