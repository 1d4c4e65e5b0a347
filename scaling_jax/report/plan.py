"""Advice as text and as plain values: each number with its interval, where it lies beyond what was measured, and what is not known."""

import textwrap
from typing import Any

from scaling_jax.laws.advice import Advice, Row
from scaling_jax.laws.reach import Reach
from scaling_jax.laws.store import Laws
from scaling_jax.report.laws import interval, number

_WIDTH = 118


def plan_text(advice: Advice, laws: Laws) -> str:
    """A table, a paragraph of remarks for each row that has some, and at the end what is unknown and why."""
    question = advice.question
    rests_on = f"{laws.path}: {laws.data['finished']} finished rows of {laws.data['path']}"
    head = f"N {number(question.params)}, T {number(question.tokens)} tokens, by {rests_on}"
    rows = [row for row in advice.rows if not row.why]
    table = [("", "value", "95% interval", "measured range", "from")]
    table += [(row.name, _value(row), _interval(row), _where(row), row.law) for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [head, ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    for row in rows:
        if row.notes or row.text:
            lines += ["", row.name, *([f"  {row.text}"] if row.text else []), *map(_wrapped, row.notes)]
    beyond: dict[str, list[str]] = {}
    for row in rows:
        for reach in row.reaches:
            if not reach.inside:
                beyond.setdefault(_beyond(reach), []).append(row.name)
    if beyond:
        lines += ["", "outside the measured range", *(_wrapped(f"{remark} ({', '.join(names)})") for remark, names in beyond.items())]
        lines.append(_wrapped("intervals there are the fits' own: that the forms hold so far is not in them, and is not known"))
    unknown = [row for row in advice.rows if row.why]
    if unknown:
        lines += ["", "unknown", *(_wrapped(f"{row.name}: {row.why}") for row in unknown)]
    return "\n".join(lines)


def plan_json(advice: Advice, laws: Laws) -> dict[str, Any]:
    """The same as plain values; an unknown value is null, and `why` says why."""
    return {
        "laws": {"path": laws.path, **laws.data},
        "question": advice.question._asdict(),
        "rows": [
            {
                **row._asdict(),
                "inside": row.inside,
                "reaches": [reach._asdict() | {"inside": reach.inside, "factor": reach.factor} for reach in row.reaches],
                "notes": list(row.notes),
            }
            for row in advice.rows
        ],
    }


def _value(row: Row) -> str:
    if row.text:
        return "see below"
    return f"{number(row.value)}{f' {row.unit}' if row.unit else ''}"


def _interval(row: Row) -> str:
    return "" if row.value is None or row.low == row.high else interval(row.low, row.high)


def _where(row: Row) -> str:
    if row.inside is None:
        return ""
    furthest = max(reach.factor for reach in row.reaches)
    return "inside" if row.inside else f"{furthest:.3g}x outside"


def _beyond(reach: Reach) -> str:
    asked = f"{reach.name} measured {number(reach.low)} to {number(reach.high)}, asked {number(reach.asked)}"
    return f"{asked}: {reach.factor:.3g} times {reach.side}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
