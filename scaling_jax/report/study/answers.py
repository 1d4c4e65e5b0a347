"""What stands first in a study's report: what was run, and what came out, each number with its interval or the word that it has none."""

import math
import re
from typing import Any

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Finding, Number, counted
from scaling_jax.report.study.fits import interval
from scaling_jax.report.study.lr import best_rates
from scaling_jax.report.study.page import Html, bullets, mark, paragraphs, rich, table
from scaling_jax.report.study.plot import Source, amount, runs_in, same_sizes, sentence, short

_FIELDS = (
    "params width depth head_dim context vocab_size batch_tokens horizon_tokens tokens lr weight_decay seed parametrization schedule "
    "warmup_tokens data_tokens data"
).split()
_AMOUNTS = ("params", "total_params", "batch_tokens", "horizon_tokens", "tokens", "warmup_tokens", "data_tokens")
_NAMES = {"params": "N, parameters", "batch_tokens": "B, batch (tokens)", "horizon_tokens": "T, horizon (tokens)", "lr": "η, learning rate"}
_MOST = 12  # values of a field that are named


def lead(source: Source) -> list[str]:
    """The lines below the title."""
    table_, rows = source.table, source.rows
    parts = [counted(runs_in(table_), "run"), f"{len(table_):,} measurements"]
    if "params" in rows:
        parts.append(f"N = {_span(rows['params'])}")
    if "tokens" in rows:
        parts.append(f"T = {_span(rows['tokens'])} tokens")
    done = [name for name, found in source.findings.items() if isinstance(found, Finding)]
    why = "; the last part says why the others are not" if len(done) < len(source.findings) else ""
    return [" · ".join(parts), f"{len(done)} of {len(source.findings)} analyses are supported by these data{why}."]


def _span(values: pandas.Series) -> str:
    low, high = amount(float(values.min())), amount(float(values.max()))
    return low if low == high else f"{low} to {high}"


def what_was_run(source: Source) -> str:
    """Fields that vary and those that do not, the rows by status, and what all of it cost."""
    rows = source.table
    varied, same = [], []
    if {"horizon_tokens", "tokens"} <= {*rows} and not (
        rows["horizon_tokens"].astype(float) - rows["tokens"].astype(float)
    ).abs().max() > 0:
        rows = rows.drop(columns="tokens")
    for name in [*(name for name in _FIELDS if name in rows), *(name for name in rows if "." in str(name))]:
        values = (same_sizes(rows[name]) if name == "params" else rows[name]).dropna().unique()
        if len(values) > 1:
            varied.append((_NAMES.get(name, name), _values(name, values), f"{len(values):,}"))
        elif len(values) == 1:
            same.append(f"{_NAMES.get(name, name)} {_one(name, values[0])}")
    parts = [table(("varied", "values", "how many"), varied, (2,))]
    if same:
        parts.append(paragraphs(f"The same in all: {'; '.join(same)}."))
    counts = (
        source.table["status"].fillna("finished").value_counts()
        if "status" in source.table
        else {"without a status, all taken as finished": len(rows)}
    )
    parts.append(paragraphs(f"Rows: {', '.join(f'{count:,} {name}' for name, count in dict(counts).items())}."))
    cost = []
    if "flops" in rows and "point" in rows:
        cost.append(f"{short(rows.groupby('point')['flops'].max().sum())} FLOPs to the longest horizons")
    if "seconds" in rows and "point" in rows:
        cost.append(f"{rows.groupby('point')['seconds'].max().sum() / 3600:.3g} hours of training, one run after the other")
    derived = [f"{name} derived as {how}" for name, how in dict(rows.attrs.get("derived", {})).items()]
    return "".join(parts) + paragraphs(f"{'; '.join([*cost, *derived])}." if cost or derived else "")


def _one(name: str, value: Any) -> str:
    if name == "data":
        return str(value)[:12]
    return (
        amount(float(value)) if name in _AMOUNTS and value else short(value) if isinstance(value, (int, float, np.number)) else str(value)
    )


def _values(name: str, values: Any) -> str:
    try:
        values = sorted(values)
    except TypeError:
        values = list(values)
    if len(values) <= _MOST:
        return ", ".join(_one(name, value) for value in values)
    return f"{_one(name, values[0])} to {_one(name, values[-1])}"


def key_answers(source: Source) -> str:
    """The numbers that a study is run for; each says whether the data fix it."""
    rows = [*_best_rates(source), *_numbers(source)]
    if not rows:
        return paragraphs("These data fix none of the numbers that would stand here; the last part says why.")
    text = "An interval holds the number with 95% confidence; one that is open, or a number that is not identified, is not to be used."
    said = [sentence(found.comparison.statement) for name in _RIVALRIES if (found := _found(source, name)) is not None and found.comparison]
    head = ("question", "answer", "95% interval", "published", "known?")
    few = [sentence(text) for text in found.statements if _OF_FEW in text] if (found := _found(source, "chinchilla_3")) else []
    more = (("What few rows decide", few), ("Which of rival forms", said))
    return table(head, rows, (1, 2, 3)) + paragraphs(text) + "".join(f"<h3>{title}</h3>\n{bullets(each)}" for title, each in more if each)


def _found(source: Source, name: str) -> Finding | None:
    found = source.findings.get(name)
    return found if isinstance(found, Finding) else None


def _best_rates(source: Source) -> list[tuple[Any, ...]]:
    """Of each size, the best learning rate and batch size at the longest horizon that has three rates."""
    try:
        points = best_rates(source)
    except UserError:
        return []
    every = source.finding("lr_optimum").points
    points, every = (of.assign(params=of["params"].fillna(0.0)) for of in (points, every))
    rows = []
    sizes = sorted(points["params"].unique())
    for params in sizes if len(sizes) <= 4 else [sizes[0], sizes[-1]]:
        of = points[points["params"] == params]
        of = of[of["tokens"] == of["tokens"].max()]
        best = of.loc[of["loss"].idxmin()]
        left = int(((every["params"] == params) & (every["tokens"] == best["tokens"])).sum()) - len(of)
        note = f"{counted(left, 'other cell')} there with fewer than three rates that did not diverge" if left else ""
        at = f"T = {amount(best['tokens'])}" + (f", N = {amount(params)}" if params else "")
        where = f"Best learning rate at {at}; its batch size B = {amount(best['batch_tokens'])}"
        if best["bound"]:
            side = {"low": "at most", "high": "at least"}[best["bound"]]
            rows.append((_noted(where, note), f"{side} {short(best['lr'])}", "", "", mark("bad", "a bound: edge of the grid")))
            continue
        error = 1.96 * best["lr_log_se"]
        ends = (None, None) if math.isnan(error) else (best["lr"] * math.exp(-error), best["lr"] * math.exp(error))
        rows.append((_noted(where, note), short(best["lr"]), interval(*ends), "", mark("good", "measured")))
    return rows


def _noted(question: str, note: str) -> Html:
    return Html(f'{rich(question)}<br><span class="note">{rich(note)}</span>' if note else rich(question))


def _numbers(source: Source) -> list[tuple[Any, ...]]:
    rows, told = [], set()
    for name, chosen in KEYS:
        found = _found(source, name)
        law = found.fits.get(found.best or "") if found else None
        if found is None or (chosen == "fit" and law is not None and law.form.formula in told):
            continue
        told |= {law.form.formula} if law is not None else set()
        numbers = _of_fit(found) if chosen == "fit" else [number for number in found.numbers if re.search(chosen, number.name)]
        for number in numbers[:6]:
            value = "–" if number.value is None else short(number.value)
            given = "" if number.published is None else short(number.published)
            ends = "" if number.low is None and number.high is None else interval(number.low, number.high)
            unit = f" ({number.unit})" if number.unit else ""
            question = _noted(f"{sentence(found.title).rstrip('.')}: {number.name}{unit}", number.note)
            rows.append((question, value, ends, given, _known(number)))
    return rows


def _known(number: Number) -> str:
    """How well the data fix it, in a word."""
    if number.value is None:
        return mark("bad", "not identified")
    if number.low is None and number.high is None:
        return mark("plain", "no interval")
    if number.low is None or number.high is None:
        return mark("bad", "interval open")
    if number.low > 0 and number.high / number.low > 10:
        return mark("plain", f"to a factor of {math.sqrt(number.high / number.low):.2g} either way")
    return mark("good", "identified")


def _of_fit(found: Finding) -> list[Number]:
    """The exponents of the best fit, or of the first."""
    if not found.fits:
        return []
    fitted = found.fits[found.best] if found.best in found.fits else next(iter(found.fits.values()))
    numbers = []
    for parameter in fitted.form.parameters:
        if parameter.unit == "" and parameter.name.startswith(("alpha", "beta", "gamma", "exponent")) or "exponent" in parameter.name:
            unknown = parameter.name in fitted.unidentified
            value = None if unknown else fitted.values[parameter.name]
            numbers.append(
                Number(f"{parameter.name}, {parameter.meaning}", value, *fitted.intervals[parameter.name], published=parameter.published)
            )
    return numbers


_OF_FEW = " highest of "  # in a statement on what the highest losses do to a fit
_RIVALRIES = ("lr_surface", "critical_growth", "kaplan_n", "kaplan_nd", "chinchilla_3")
KEYS: tuple[tuple[str, str], ...] = (  # "fit": the exponents of the fit; else a pattern of the numbers' names
    ("lr_surface", "_crit ∝"),
    ("batch_optimum", "∝"),
    ("critical_growth", "fit"),
    ("critical_growth", "∝"),
    ("sensitivity", "∝"),
    ("width_equality", ""),
    ("kaplan_n", "fit"),
    ("kaplan_d", "fit"),
    ("kaplan_c", "fit"),
    ("kaplan_nd", "fit"),
    ("kaplan_allocation", "measured"),
    ("chinchilla_1", "^a$"),
    ("chinchilla_2", "^a$"),
    ("chinchilla_3", "fit"),
    ("chinchilla_3", "^a$|^D/N"),
)
