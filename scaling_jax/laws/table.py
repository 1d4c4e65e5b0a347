"""Tidy tables: lists of dict rows, one measurement a row. What a definition needs of them, checked by name."""

import math
from typing import Any

import numpy as np

from scaling_jax.errors import UserError


def required(table: list[dict[str, Any]], name: str, positive: bool = True) -> np.ndarray:
    """A column as floats, [rows].

    Raises:
      UserError: a row lacks it, or holds something that is no finite (positive) number. Rows are counted from 1.
    """
    values = np.empty(len(table))
    for i, row in enumerate(table):
        value = row.get(name)
        if value is None:
            raise UserError(f"row {i + 1} of the table has no {name}; it has {', '.join(map(str, row)) or 'nothing'}")
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (positive and value <= 0):
            raise UserError(f"row {i + 1} of the table: {name} is {value!r}; it must be a {'positive' if positive else 'finite'} number")
        values[i] = value
    return values


def optional(table: list[dict[str, Any]], name: str, positive: bool = True) -> np.ndarray | None:
    """The same of a column that all rows or none may have; None in the latter case."""
    return required(table, name, positive) if any(row.get(name) is not None for row in table) else None


def at_least(table: list[dict[str, Any]], rows: int, what: str) -> None:
    """UserError where there are fewer rows than `what` needs."""
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
