"""Fits as text: a table of parameters with their intervals and published values, and what the data say in words."""

import textwrap
from collections.abc import Mapping

from scaling_jax.laws.finding import Finding
from scaling_jax.laws.fit import LawFit

_WIDTH = 118


def number(value: float | None) -> str:
    """Four digits, in the way that suits its size; '∞' where it is open."""
    if value is None:
        return "∞"
    return f"{value:.3e}" if value != 0 and not 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def interval(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    return f"{'-∞' if low is None else number(low)} to {number(high)}"


def fit_rows(name: str, fitted: LawFit) -> list[tuple[str, ...]]:
    """A row for each parameter: form, parameter, value, 95% interval, published value, remark."""
    rows = []
    for parameter in fitted.form.parameters:
        low, high = fitted.intervals[parameter.name]
        remark = "not identified" if parameter.name in fitted.unidentified else ""
        published = "" if parameter.published is None else number(parameter.published)
        unit = f" {parameter.unit}" if parameter.unit else ""
        value = "" if remark else number(fitted.values[parameter.name]) + unit
        rows.append((name, parameter.name, value, interval(low, high), published, remark))
    return rows


def laws_text(found: Mapping[str, Finding | str]) -> str:
    """All findings, and at the end what could not be fitted."""
    parts = [_finding_text(finding) for finding in found.values() if not isinstance(finding, str)]
    missing = [(name, why) for name, why in found.items() if isinstance(why, str)]
    if missing:
        lines = [_wrapped(f"{name}: {why}", "  ") for name, why in missing]
        parts.append("\n".join(["not fitted", *lines]))
    return "\n\n".join(parts)


def _finding_text(finding: Finding) -> str:
    head = ("form", "parameter", "value", "95% interval", "published", "")
    rows = [row for name, fitted in finding.fits.items() for row in fit_rows(name, fitted)]
    rows += [
        (
            "",
            one.name,
            (number(one.value) if one.value is not None else "unknown") + (f" {one.unit}" if one.unit else ""),
            interval(one.low, one.high) if one.value is not None else "",
            "" if one.published is None else number(one.published),
            one.note,
        )
        for one in finding.numbers
    ]
    lines = [f"{finding.name}  {finding.title}  ({finding.runs} runs)"]
    if rows:
        widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head) - 1)]
        for line in (head, *rows):
            lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True)).rstrip())
    unknown = {sentence for fitted in finding.fits.values() for sentence in fitted.unidentified.values()}
    said = [sentence for sentence in finding.statements if sentence not in unknown]
    said += [sentence for name, fitted in finding.fits.items() for sentence in unidentified(name, fitted)]
    return "\n".join([*lines, *(_wrapped(sentence, "  ") for sentence in said)])


def unidentified(name: str, fitted: LawFit) -> list[str]:
    """What is not identified, one sentence for all parameters that share their reason."""
    by_reason: dict[str, list[str]] = {}
    for parameter, sentence in fitted.unidentified.items():
        by_reason.setdefault(sentence.removeprefix(f"{parameter} "), []).append(parameter)
    return [f"{name}: {', '.join(parameters)} {reason}" for reason, parameters in by_reason.items()]


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=f"{indent}- ", subsequent_indent=f"{indent}  ")
