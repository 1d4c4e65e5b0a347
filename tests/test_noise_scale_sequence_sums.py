"""Σ_b x_bᵀ·dy_b and every sequence's squared norm against numpy in float64, in each of the forms that they are computed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.noise_scale import Shards, sequence_sums
from scaling_jax.noise_scale.sequence_sums import squares, sum_of_products

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS, COLUMNS = 24, 40
SHORT, LONG = 9, 400  # positions: in bfloat16 the norms of the short ones come from Gram matrices, which cost L·(I + O) / (I·O) as much


def drawn(batch, length, dtype=jnp.float32, rows=ROWS, columns=COLUMNS):
    x_BxLxI, dy_BxLxO = (jax.random.normal(jax.random.key(i), (batch, length, n)).astype(dtype) for i, n in enumerate((rows, columns)))
    return x_BxLxI, dy_BxLxO, jax.random.exponential(jax.random.key(2), (rows, columns))


def check(found, x_BxLxI, dy_BxLxO, metric_IxO):
    total_IxO, squares_B = found
    x, dy = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x_BxLxI, dy_BxLxO))
    each = np.einsum("bli,blo->bio", x, dy)
    assert total_IxO.dtype == squares_B.dtype == jnp.float32
    np.testing.assert_allclose(total_IxO, each.sum(0), rtol=0, atol=3e-6 * np.abs(each.sum(0)).max())
    expected = np.sum(each**2, axis=(1, 2))
    if metric_IxO is not None:
        expected = np.stack([expected, np.sum(each**2 * np.asarray(metric_IxO, np.float64)[None], axis=(1, 2))], axis=1)
    np.testing.assert_allclose(squares_B, expected, rtol=1e-5)


def products_in(function, *args) -> str:
    """The program as it was traced."""
    return str(jax.make_jaxpr(function)(*args))


@pytest.fixture
def most_entries(monkeypatch: pytest.MonkeyPatch):
    """Sets how many entries of products are held at a time; what was traced before is forgotten."""

    def set_it(entries: int, cached: int | None = None) -> None:
        monkeypatch.setattr(sequence_sums, "_LARGEST_PRODUCT", entries)
        monkeypatch.setattr(sequence_sums, "_CACHED_PRODUCTS", entries if cached is None else cached)
        jax.clear_caches()

    yield set_it
    jax.clear_caches()


def summed(x_BxLxI, dy_BxLxO, metric_IxO):
    return sum_of_products(x_BxLxI, dy_BxLxO, metric_IxO, shards=Shards())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 16])
def test_sums_and_squares(batch, dtype):
    for length in (SHORT, LONG):
        x_BxLxI, dy_BxLxO, metric_IxO = drawn(batch, length, dtype)
        for metric in (None, metric_IxO):
            check(jax.jit(summed)(x_BxLxI, dy_BxLxO, metric), x_BxLxI, dy_BxLxO, metric)


def gram(x_BxLxI, dy_BxLxO, metric_IxO) -> bool:
    """Whether Gram matrices are taken of these."""
    length = x_BxLxI.shape[1]
    return f"[{x_BxLxI.shape[0]},{length},{length}] = dot_general" in products_in(sequence_sums._on_cpu, x_BxLxI, dy_BxLxO, metric_IxO)


def test_the_gram_form_is_for_short_sequences_in_16_bits_without_a_metric():
    bf16 = jnp.bfloat16
    for length, expected in ((1, True), (SHORT, True), (LONG, False)):
        x_BxLxI, dy_BxLxO, metric_IxO = drawn(5, length, bf16)
        assert gram(x_BxLxI, dy_BxLxO, None) == expected and not gram(x_BxLxI, dy_BxLxO, metric_IxO)
        assert not gram(*drawn(5, length)[:2], None)


def test_the_gram_form_is_the_direct_one():
    """Where a sequence's gradient nearly cancels too: norms are exact to float32's rounding of what is added up."""
    x_BxLxI, dy_BxLxO, _ = drawn(6, SHORT, jnp.bfloat16)
    dy_BxLxO = dy_BxLxO.at[0, 1].set(-dy_BxLxO[0, 0]).at[0, 2:].set(0)
    x_BxLxI = x_BxLxI.at[0, 1].set(x_BxLxI[0, 0] * jnp.bfloat16(1.0625))  # C = -x·dy / 16
    found, direct = (
        jax.jit(sequence_sums._on_cpu)(x_BxLxI, dy_BxLxO, None),
        sequence_sums._by_rows(x_BxLxI, dy_BxLxO, None, shards=Shards()),
    )
    assert gram(x_BxLxI, dy_BxLxO, None)
    np.testing.assert_allclose(found[0], direct[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1][1:], direct[1][1:], rtol=1e-5)
    terms = float(jnp.sum(jnp.square(x_BxLxI[0].astype(jnp.float32))) * jnp.sum(jnp.square(dy_BxLxO[0].astype(jnp.float32))))
    assert float(direct[1][0]) < terms / 100
    np.testing.assert_allclose(found[1][0], direct[1][0], rtol=0, atol=1e-6 * terms)


@pytest.mark.parametrize(("batch", "most", "together"), [(16, 8, 8), (16, 3, 2), (16, 100, 8), (6, 4, 3), (7, 7, 1), (3, 3, 1), (8, 0, 1)])
def test_as_many_sequences_at_a_time_as_fit(most_entries, batch: int, most: int, together: int):
    """Their number divides the batch, and there are two parts at least; `most` products of one sequence fit."""
    most_entries(max(most * ROWS * COLUMNS, ROWS * COLUMNS // 2))
    x_BxLxI, dy_BxLxO, metric_IxO = drawn(batch, LONG)
    text = products_in(sequence_sums._on_cpu, x_BxLxI, dy_BxLxO, metric_IxO)
    assert (f"f32[{together},{ROWS},{COLUMNS}] = dot_general" in text) == (together > 1) and f"length={batch // together}" in text
    for metric in (None, metric_IxO):
        check(jax.jit(summed)(x_BxLxI, dy_BxLxO, metric), x_BxLxI, dy_BxLxO, metric)


@pytest.mark.parametrize(("cached", "together"), [(0, 2), (4, 4), (7, 4), (8, 8)])
def test_no_more_than_the_caches_hold_but_two_all_the_same(most_entries, cached: int, together: int):
    most_entries(100 * ROWS * COLUMNS, cached * ROWS * COLUMNS)
    x_BxLxI, dy_BxLxO, _ = drawn(16, LONG)
    assert f"f32[{together},{ROWS},{COLUMNS}] = dot_general" in products_in(sequence_sums._on_cpu, x_BxLxI, dy_BxLxO, None)


def test_products_of_a_tall_matrix_are_made_as_wide_ones():
    dy_BxLxO, x_BxLxI, metric_OxI = drawn(16, LONG)
    metric_IxO = metric_OxI.T
    text = products_in(sequence_sums._on_cpu, x_BxLxI, dy_BxLxO, metric_IxO)
    assert f"f32[8,{ROWS},{COLUMNS}] = dot_general" in text and ROWS < COLUMNS
    for metric in (None, metric_IxO):
        check(jax.jit(summed)(x_BxLxI, dy_BxLxO, metric), x_BxLxI, dy_BxLxO, metric)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_product_too_large_is_taken_some_rows_at_a_time(most_entries, dtype: jnp.dtype):
    """A quarter of its rows where so much fits, as everywhere; of one that is wider than long, all, as such are small."""
    most_entries(ROWS * COLUMNS // 4)
    x_BxLxI, dy_BxLxO, metric_IxO = drawn(6, LONG, dtype)
    for metric in (None, metric_IxO):
        check(jax.jit(summed)(x_BxLxI, dy_BxLxO, metric), x_BxLxI, dy_BxLxO, metric)
    text = products_in(summed, x_BxLxI, dy_BxLxO, metric_IxO)
    assert f"f32[{ROWS // 4},{COLUMNS}] = dot_general" in text and f"{ROWS},{COLUMNS}] = dot_general" not in text
    check(jax.jit(summed)(dy_BxLxO, x_BxLxI, None), dy_BxLxO, x_BxLxI, None)


def test_shards_are_summed_by_themselves():
    x_BxLxI, dy_BxLxO, metric_IxO = drawn(6, SHORT)
    for count in (2, 3):
        check(sum_of_products(x_BxLxI, dy_BxLxO, metric_IxO, shards=Shards(count)), x_BxLxI, dy_BxLxO, metric_IxO)


def test_squares():
    product, metric = np.array([[1.0, -2.0], [3.0, 0.5]], np.float32), np.array([[2.0, 0.0], [1.0, 4.0]], np.float32)
    assert float(squares(jnp.asarray(product), None)) == 14.25
    np.testing.assert_array_equal(squares(jnp.asarray(product), jnp.asarray(metric)), [14.25, 12.0])
    assert squares(jnp.asarray(product), jnp.asarray(metric, jnp.bfloat16)).dtype == jnp.float32
