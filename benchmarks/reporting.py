"""The table that a benchmark prints, and the JSON file it writes: what was measured, on what machine, with which arguments, when."""

import argparse
import datetime
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, aligned to be read as text; columns in the order in which rows name them first."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[name.replace("_", " ") for name in columns], *([text_of(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    lines = [
        "| " + " | ".join(c.ljust(w) if word else c.rjust(w) for c, w, word in zip(line, widths, words, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if word else "-" * (w + 1) + ":" for w, word in zip(widths, words, strict=True)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def text_of(value: Any) -> str:
    """Four digits of a number, and no exponent before a million million."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and 1000 <= abs(value) < 1e12):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: str, arguments: argparse.Namespace, rows: Sequence[Row], **more: Any) -> None:
    """The file that `--json` names, which benchmarks/performance.py reads."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    found = {"machine": describe_machine(), "date": date, "command": command_line(sys.argv), "arguments": vars(arguments)}
    found |= {"rows": list(rows), **more}
    Path(path).write_text(json.dumps(found, indent=2, default=str) + "\n")


def command_line(argv: Sequence[str]) -> str:
    """How a script was called with --flag=value, to be called again elsewhere: less --json, and with DIR for another checkout."""
    flags = [re.sub(r"^--against=.*", "--against=DIR", flag) for flag in argv[1:] if not flag.startswith("--json=")]
    return shlex.join(["python", f"benchmarks/{Path(argv[0]).name}", *flags])
