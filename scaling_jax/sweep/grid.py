"""Grids: lists of assignments, field by its dotted name, and the few ways to put them together.

    from scaling_jax.sweep import grid

    grid.product(
        grid.over("optimizer.lr", grid.geometric(2**-12, 2**-7, 2**0.5)),
        grid.zip(grid.over("model.width", [128, 256]), grid.over("model.depth", [3, 6])),
    )

The rightmost of a product turns fastest. What a field is, and which values it takes, a study knows, not a grid.
"""

import builtins
import decimal
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from scaling_jax.errors import UserError


class Grid:
    """Assignments {field: value} in their order; iterable, with a length, never changed."""

    __slots__ = ("_assignments",)

    def __init__(self, assignments: Iterable[dict[str, Any]]) -> None:
        self._assignments = tuple(dict(assignment) for assignment in assignments)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(dict, self._assignments)  # copies

    def __len__(self) -> int:
        return len(self._assignments)

    def __repr__(self) -> str:
        return f"Grid of {len(self)} points over {', '.join(self.names) or 'nothing'}"

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that it sets, in the order in which they first appear; not every point need set all."""
        return tuple(dict.fromkeys(itertools.chain.from_iterable(self._assignments)))


def over(name: str, values: Iterable[Any]) -> Grid:
    """One field, each of its values a point."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"over({name!r}, {values!r}): the values must be a list")
    return Grid({name: value} for value in values)


def product(*grids: Grid) -> Grid:
    """Every combination of a point of each."""
    _check("product", grids)
    return Grid(_merged("product", parts) for parts in itertools.product(*grids))


def zip(*grids: Grid) -> Grid:
    """The first points together, the second ones, …; all of one length."""
    _check("zip", grids)
    if len({len(grid) for grid in grids}) > 1:
        raise UserError(f"zip(): grids of {', '.join(str(len(grid)) for grid in grids)} points; must be of one length")
    return Grid(_merged("zip", parts) for parts in builtins.zip(*grids, strict=True))


def chain(*grids: Grid) -> Grid:
    """The points of the first, then those of the second, …"""
    _check("chain", grids)
    return Grid(itertools.chain(*grids))


def where(grid: Grid, predicate: Callable[[dict[str, Any]], bool]) -> Grid:
    """The points of which `predicate`, given {field: value}, is true.

    UserError where it asks for a field that the point does not set: those of the base config are not there.
    """
    _check("where", [grid])
    return Grid(point for point in grid if _holds(predicate, point))


def geometric(start: float, stop: float, ratio: float) -> tuple[float, ...]:
    """start, start·ratio, …, stop: both ends included, each the float nearest to its true value on any machine.

    UserError unless all are positive and `stop` is a whole power of `ratio` away from `start`.
    """
    numbers = [isinstance(x, int | float) and 0 < x < math.inf for x in (start, stop, ratio)]
    steps = math.log(stop / start) / math.log(ratio) if all(numbers) and ratio != 1 else -1.0
    count = round(steps)
    if count < 0 or abs(steps - count) > 1e-6:
        raise UserError(f"geometric({start}, {stop}, {ratio}): the second must be the first times a whole power of the third, all positive")
    if not count:
        return (float(start),)
    with decimal.localcontext(decimal.Context(prec=40)):  # a power by the C library differs in its last bit between machines
        first, whole = decimal.Decimal(start), decimal.Decimal(stop) / decimal.Decimal(start)
        return tuple(float(first * whole ** (decimal.Decimal(i) / count)) for i in range(count + 1))


def _check(what: str, grids: Iterable[Any]) -> None:
    for grid in grids:
        if not isinstance(grid, Grid):
            raise UserError(f"{what}() of {grid!r}: must be grids, made by over(), product(), zip(), chain() or where()")


def _merged(what: str, parts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        if twice := merged.keys() & part.keys():
            raise UserError(f"{what}(): {min(twice)} is set by two of the grids; each must set fields of its own")
        merged |= part
    return merged


def _holds(predicate: Callable[[dict[str, Any]], bool], point: dict[str, Any]) -> bool:
    try:
        return bool(predicate(dict(point)))
    except KeyError as error:
        there = ", ".join(point) or "nothing"
        raise UserError(f"where(): the predicate asks for {error}, which this point does not set; it sets {there}") from error
