"""The table of all fits, in words where a number is not identified, and the list of what a report had to leave out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_jax.laws.finding import Finding, Number, counted
from scaling_jax.report.study.page import Html, bullets, escape, mark, paragraphs, rich, table
from scaling_jax.report.study.plot import listed, sentence, short

_HEAD = ("parameter", "value", "95% interval", "published", "unit", "meaning")
_NUMBERS = (1, 2, 3)
_PLANNED = {"critical_growth": "growth_tokens"}  # the form that plans use, where it is not the best one
_OF_PLANS = (*_PLANNED, "lr_surface", "batch_optimum", "sensitivity", "chinchilla_3", "kaplan_nd")


def all_fits(findings: Mapping[str, Finding | str]) -> str:
    """A part for every finding: what it says, its rivals' parameters, and the numbers that follow from them."""
    parts = [_finding(found) for found in findings.values() if isinstance(found, Finding)]
    return "".join(parts) or paragraphs("No law could be fitted; the reasons are below.")


def _finding(found: Finding) -> str:
    name = escape(found.name)
    parts = [f'<section class="law" id="law-{name}">\n<h3>{rich(found.title)} <span class="note">({name})</span></h3>\n']
    parts.append(bullets([sentence(text) for text in found.statements]))
    comparison = found.comparison
    if comparison is not None and len(comparison.tied) > 1:
        parts.append(
            paragraphs(f"Tied on what is held out ({comparison.by} beyond {short(comparison.beyond)}): {listed(list(comparison.tied))}.")
        )
    for name, fitted in found.fits.items():
        parts.append(_fit(name, fitted, found))
    if found.numbers:
        parts.append(
            table(("number", "value", "95% interval", "published", "unit", "note"), [number_row(n) for n in found.numbers], _NUMBERS)
        )
    parts.append(f'<p class="note">Rests on {counted(found.runs, "run")}.</p>\n</section>\n')
    return "".join(parts)


def _fit(name: str, fitted: Any, found: Finding) -> str:
    form = fitted.form
    said = _standing(name, found)
    rows = []
    for parameter in form.parameters:
        unknown = fitted.unidentified.get(parameter.name)
        value = mark("bad", "not identified") if unknown else short(fitted.values[parameter.name])
        low, high = fitted.intervals[parameter.name]
        shown = "" if unknown else interval(low, high)
        rows.append((parameter.name, value, shown, published(parameter.published), parameter.unit, parameter.meaning))
    unknown = [f"{parameter}: {why}" for parameter, why in fitted.unidentified.items()]
    error = "of the logarithm" if form.space == "log" else form.target
    text = (
        f'<p><strong>{escape(name)}</strong>{f" – {said}" if said else ""}: <span class="formula">{rich(form.formula)}</span> '
        f'<span class="source">{rich(form.source)}</span></p>\n'
    )
    rests = f"{counted(fitted.points, 'point')} of {counted(fitted.clusters, 'independent run')}"
    note = f"{rests}; residuals {short(fitted.rms)} ({error}, root mean square). {sentence(fitted.origin)}"
    return f'{text}{table(_HEAD, rows, _NUMBERS)}<p class="note">{rich(note)}</p>\n{bullets([sentence(text) for text in unknown])}'


def _standing(name: str, found: Finding) -> str:
    """What sets the form apart from its rivals: that it predicts best, that plans use it. Of tied forms none is best."""
    if len(found.fits) < 2:
        return ""
    parts = ["predicts best"] if found.comparison is not None and found.comparison.tied == [name] else []
    if found.name in _OF_PLANS and _PLANNED.get(found.name, found.best) == name:
        parts.append("used by plans" + (" where chinchilla_3 gives no loss" if found.name == "kaplan_nd" else ""))
    return ", ".join(parts)


def number_row(number: Number) -> Sequence[str]:
    value = mark("bad", "not identified") if number.value is None else short(number.value)
    given = f"{published(number.published)}{f' ({number.source})' if number.source and number.published is not None else ''}"
    ends = "" if number.low is None and number.high is None else interval(number.low, number.high)
    return number.name, value, ends, given, number.unit, number.note


def interval(low: float | None, high: float | None) -> str:
    """In words; an end that is None is open."""
    low, high = (None if end is None or math.isnan(end) else end for end in (low, high))
    if low is None and high is None:
        return "open"
    if low is None:
        return f"at most {short(high)}"
    return f"at least {short(low)}" if high is None else f"{short(low)} to {short(high)}"


def published(value: float | None) -> str:
    return "" if value is None else short(value)


def left_out(figures: Sequence[tuple[str, str]], findings: Mapping[str, Finding | str]) -> str:
    """Figures and laws that the data do not support, each with its reason."""
    laws = [(name, found) for name, found in findings.items() if isinstance(found, str)]
    if not figures and not laws:
        return paragraphs("Nothing: every figure and every law has its data.")
    parts = []
    if figures:
        parts += [
            "<h3>Figures</h3>\n",
            table(("figure", "why it is not here"), [(name, sentence(why)) for name, why in dict.fromkeys(figures)]),
        ]
    if laws:
        parts += ["<h3>Laws</h3>\n", table(("law", "why it is not here"), [(name, sentence(why)) for name, why in laws])]
    return Html("".join(parts))
