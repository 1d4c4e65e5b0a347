"""Grids against what the words mean: products, zips and chains written out by hand."""

import math

import pytest

from scaling_jax.errors import UserError
from scaling_jax.sweep import grid


def test_a_product_turns_its_rightmost_field_fastest():
    found = grid.product(grid.over("a", [1, 2]), grid.over("b", "xy".split() + ["z"]))
    assert list(found) == [{"a": 1, "b": "xy"}, {"a": 1, "b": "z"}, {"a": 2, "b": "xy"}, {"a": 2, "b": "z"}]
    assert len(found) == 4 and found.names == ("a", "b")
    assert list(grid.product()) == [{}]  # the base alone


def test_zip_chain_and_where():
    sizes = grid.zip(grid.over("width", [32, 64]), grid.over("depth", [2, 4]))
    assert list(sizes) == [{"width": 32, "depth": 2}, {"width": 64, "depth": 4}]
    both = grid.chain(sizes, grid.over("width", (8,)))
    assert list(both) == [*sizes, {"width": 8}] and both.names == ("width", "depth")
    assert list(grid.where(both, lambda point: point["width"] < 64)) == [{"width": 32, "depth": 2}, {"width": 8}]
    assert len(grid.where(both, lambda point: False)) == 0


def test_a_grid_is_not_changed_through_what_it_gives():
    found = grid.over("a", [1, 2])
    next(iter(found))["a"] = 5
    assert list(grid.where(found, lambda point: point.update(a=7) is None)) == list(found) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("start, stop, ratio, count", [(2**-12, 2**-7, 2**0.5, 11), (8, 1, 0.5, 4), (1e-4, 1e-1, 10, 4), (3, 3, 2, 1)])
def test_geometric_has_both_ends_and_even_steps(start, stop, ratio, count):
    found = grid.geometric(start, stop, ratio)
    assert len(found) == count and found[0] == start and found[-1] == stop and all(type(x) is float for x in found)
    assert [b / a for a, b in zip(found, found[1:], strict=False)] == pytest.approx([ratio] * (count - 1), rel=1e-14)


def test_geometric_is_exact_where_floats_are():
    """Every other one of √2 steps is a power of two, to the last bit: points are named by the values."""
    found = grid.geometric(2**-20, 2**-7, 2**0.5)
    assert found[::2] == tuple(2.0**-k for k in range(20, 6, -1))
    assert all(abs(x / y - math.sqrt(2)) < 2e-16 * 3 for x, y in zip(found[1::2], found[::2], strict=False))


@pytest.mark.parametrize(
    "made, said",
    [
        (lambda: grid.product(grid.over("a", [1]), grid.over("a", [2])), "product(): a is set by two"),
        (lambda: grid.zip(grid.over("a", [1]), grid.over("a", [2])), "zip(): a is set by two"),
        (lambda: grid.zip(grid.over("a", [1]), grid.over("b", [2, 3])), "grids of 1, 2 points; must be of one length"),
        (lambda: grid.where(grid.over("a", [1]), lambda point: point["b"] > 1), "asks for 'b', which this point does not set; it sets a"),
        (lambda: grid.over("a", "abc"), "over('a', 'abc'): the values must be a list"),
        (lambda: grid.over("a", 3), "over('a', 3): the values must be a list"),
        (lambda: grid.chain(grid.over("a", [1]), [{"a": 2}]), "must be grids"),
        (lambda: grid.geometric(1, 5, 2), "geometric(1, 5, 2)"),
        (lambda: grid.geometric(1, 8, 0.5), "geometric(1, 8, 0.5)"),
        (lambda: grid.geometric(-1, 8, 2), "geometric(-1, 8, 2)"),
        (lambda: grid.geometric(1, 8, 1), "geometric(1, 8, 1)"),
    ],
)
def test_what_makes_no_grid_is_said(made, said):
    with pytest.raises(UserError) as error:
        made()
    assert said in str(error.value) and "\n" not in str(error.value)
