"""Tidy tables: lists of dict rows, one measurement a row. What a definition needs of them, checked by name."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scaling_jax.errors import UserError


def is_number(value: Any) -> bool:
    """Whether it is a finite number that fits a float; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer beyond 1.8e308
        return False


def check(name: str, value: Any, sound: Callable[[Any], bool], what: str) -> None:
    """UserError unless `value`, an argument or an entry, is a number and `sound`; `what` says in words which ones are."""
    if not is_number(value) or not sound(value):
        raise UserError(f"{name} is {reprlib.repr(value)}; it must be {what}")


def check_rows(table: list[dict[str, Any]]) -> None:
    """UserError unless it is a list of dicts."""
    if not isinstance(table, list | tuple):
        raise UserError(f"the table is {reprlib.repr(table)}; it must be a list of dict rows")
    for i, row in enumerate(table):
        if not isinstance(row, Mapping):
            raise UserError(f"row {i + 1} of the table is {reprlib.repr(row)}; it must be a dict of columns")


def required(table: list[dict[str, Any]], name: str, positive: bool = True) -> np.ndarray:
    """A column as floats, [rows].

    Raises:
      UserError: a row lacks it, or holds something that is no finite (positive) number. Rows are counted from 1.
    """
    check_rows(table)
    values = np.empty(len(table))
    for i, row in enumerate(table):
        value = row.get(name)
        if value is None:
            raise UserError(f"row {i + 1} of the table has no {name}; it has {', '.join(map(str, row)) or 'nothing'}")
        what = f"a {'positive' if positive else 'finite'} number"
        check(f"row {i + 1} of the table: {name}", value, lambda number: number > 0 or not positive, what)
        values[i] = value
    return values


def known(table: list[dict[str, Any]], name: str) -> np.ndarray:
    """A column as floats, [rows], nan where it is missing, None or not finite; UserError where it holds something that is no number."""
    check_rows(table)
    values = np.full(len(table), math.nan)
    for i, row in enumerate(table):
        value = row.get(name)
        if value is None or (isinstance(value, float | np.floating) and not math.isfinite(value)):
            continue
        check(f"row {i + 1} of the table: {name}", value, lambda _: True, "a number, or None where it is unknown")
        values[i] = value
    return values


def optional(table: list[dict[str, Any]], name: str, positive: bool = True) -> np.ndarray | None:
    """The same as `required` of a column that all rows or none may have; None in the latter case."""
    check_rows(table)
    return required(table, name, positive) if any(row.get(name) is not None for row in table) else None


def at_least(table: list[dict[str, Any]], rows: int, what: str) -> None:
    """UserError where there are fewer rows than `what` needs."""
    check_rows(table)
    if len(table) < rows:
        raise UserError(f"the table has {len(table)} rows; {what} needs at least {rows}")


def only_value(table: list[dict[str, Any]], name: str) -> float | None:
    """The one value of a column; None where no row has it."""
    values = optional(table, name)
    if values is None:
        return None
    if np.ptp(values) > 0:
        other = int(np.argmax(values != values[0]))
        raise UserError(
            f"row {other + 1} of the table: {name} is {values[other]:g}, in row 1 it is {values[0]:g}; the rows of one fit share one {name}"
        )
    return float(values[0])
