"""What an analysis hands on: the fits, the numbers that follow from them, and plain sentences on what the data can and cannot say."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Number(NamedTuple):
    """A number with its 95% interval; an end that is None is open, a value that is None not identified. `published` is that of `source`."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    published: float | None = None
    source: str = ""
    note: str = ""


class Finding(NamedTuple):
    """What one analysis found.

    `fits` are by the name of their form, rivals side by side; `best` is the one to use, None if there is none; `comparison` says how they
    were told apart. `points` is the table that was fitted or measured, with units in its columns' names and, where a point is a bound only,
    `censored`. `runs` is the number of runs that it rests on.
    """

    name: str
    title: str
    fits: dict[str, Any]  # of LawFit
    best: str | None
    numbers: list[Number]
    statements: list[str]
    points: Any  # a pandas DataFrame
    runs: int
    comparison: Any = None  # of Comparison


class Analysis(NamedTuple):
    """An analysis by its name on the command line. `needs` are columns of the results table; `run` takes that table and raises UserError,
    with one plain reason, where the data do not support it."""

    name: str
    title: str
    needs: tuple[str, ...]
    run: Callable[[Any], Finding]
    source: str


def counted(count: int, thing: str) -> str:
    """So many of a thing, in words whose number agrees."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
