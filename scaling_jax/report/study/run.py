"""The report of one training run: its figures, its table, its config and its records."""

import json
import re
from typing import Any

import pandas
from etils import epath

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import counted
from scaling_jax.report.critical_batch import critical_batch_figure, critical_batches, write_laws
from scaling_jax.report.figures import Target, loss_figure, noise_figure
from scaling_jax.report.run import summary_rows
from scaling_jax.report.study import page
from scaling_jax.report.study.plot import Plot, amount, power, sentence, short
from scaling_jax.train.metrics import FILE, read_records
from scaling_jax.train.workdir import CONFIG_FILE, SUMMARY_FILE

_MOST = 2000  # records in a CSV


def report_run_page(workdir: epath.Path, title: str, out: epath.Path) -> epath.Path:
    """Draws a run's figures and writes its page.

    Args:
      workdir: of the run, on a file system; nothing in it is changed.
      title: of the page.
      out: an empty or new directory, or that of an earlier report.

    Returns:
      The page's file.

    Raises:
      UserError: the run has no records, its summary or config is damaged, or `out` holds something else.
    """
    page.check_out(out)
    records = read_records(workdir)
    if not records:
        raise UserError(f"{workdir / FILE}: has no records; the run has not trained a step, or the file is damaged")
    summary, config = _json(workdir / SUMMARY_FILE), _json(workdir / CONFIG_FILE)
    drawn, left_out = [], []
    for what, make in (("Loss", _loss), ("Noise scale", _noise), ("Critical batch size", _critical)):
        try:
            drawn.append(page.draw(make(workdir, records, summary)))
        except UserError as error:
            left_out.append((what, sentence(str(error))))
    try:
        sections = [page.Section("summary", "Summary", _summary(records, summary))]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{workdir / SUMMARY_FILE}: damaged: {error} is missing or no value of it; delete it for a report without it"
        ) from error
    sections.append(page.Section("figures", "Figures", "".join(page.figure(each) for each in drawn)))
    sections.append(page.Section("records", "Records", _records(records)))
    if config:
        sections.append(page.Section("config", "Config", _config(config)))
    if left_out:
        sections.append(page.Section("left-out", "What is left out, and why", page.table(("figure", "why it is not here"), left_out)))
    last = records[-1]
    state = summary["status"] if summary else "no summary: it is running, or was ended from outside"
    lead = [f"{amount(last['tokens'])} tokens in {counted(last['step'], 'step')} · {state}"]
    return page.write(out, page.document(title, lead, sections), drawn)


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged: not the JSON that scaling_jax wrote; restore it, or delete it for a report without it")
    return value


def _columns(records: list[dict[str, Any]], *patterns: str) -> pandas.DataFrame:
    """The records that have any of the columns, of numbers, with their step and tokens."""
    names = list(dict.fromkeys(key for record in records for key in record if any(re.fullmatch(pattern, key) for pattern in patterns)))
    kept = [record for record in records if any(name in record for name in names)]
    return pandas.DataFrame([{name: record.get(name) for name in ("step", "tokens", *names)} for record in kept])


def _thinned(table: pandas.DataFrame) -> tuple[pandas.DataFrame, str]:
    every = -(-len(table) // _MOST)
    return (table, "") if every <= 1 else (table.iloc[::every], f"one in {every} of {len(table):,}")


def _loss(workdir: epath.Path, records: list[dict[str, Any]], summary: dict[str, Any]) -> Plot:
    domains = r"eval/[^/]+/(?:loss|loss_se|bits_per_byte)"
    held_out = _columns(records, domains)
    data, note = _thinned(_columns([r for r in records if "loss" in r], "loss", "lr", "batch_tokens"))
    data = pandas.concat([data, held_out]) if len(held_out) else data
    known = [record["loss"] for record in records if record.get("loss") is not None]
    if not known and not len(held_out):
        raise UserError("no record has a loss")
    ends = [
        f"{name.split('/')[1]} {short(held_out[name].dropna().iloc[-1])}"
        for name in held_out
        if name.endswith("/loss") and held_out[name].notna().any()
    ]
    last = f" Held out, at the last evaluation: {', '.join(ends)} nats per token." if ends else ""
    caption = (
        f"Training loss of one run against tokens, {counted(len(known), 'record')}: every one light, smoothed on top"
        f"{f', from {short(known[0])} to {short(known[-1])} nats per token' if known else ''}.{last} Points are held-out losses with "
        "their standard errors over documents. "
        "To be seen: whether the loss still falls at the end, and whether training and held-out loss part."
    )

    def save(files: Target) -> bool:
        return loss_figure(records, files, summary)

    return Plot("loss", "Loss", caption, data, save, note)


def _noise(workdir: epath.Path, records: list[dict[str, Any]], summary: dict[str, Any]) -> Plot:
    data, note = _thinned(_columns(records, r"noise_scale_tokens(?:_low|_high|/(?!layers)\w+)?", "grad_sq", "grad_trace", "batch_tokens"))
    if "noise_scale_tokens" not in data:
        raise UserError("no record has a noise scale; it is measured where config.noise_scale is on")
    known = data["noise_scale_tokens"].dropna()
    grown = (
        f" By independent bins it grows as T^{power(summary['noise_scale_exponent'])} ± {summary['noise_scale_exponent_se']:.2f}."
        if "noise_scale_exponent" in summary
        else ""
    )
    value = (
        f"The last value is {amount(float(known.iloc[-1]))} tokens."
        if len(known)
        else "It was never known: |G|² could not be told from zero."
    )
    caption = (
        f"Gradient noise scale tr Σ / |G|² of one run against tokens, {counted(len(known), 'value')} with a 95% band, and the batch "
        f"size. {value}{grown} "
        "To be seen: whether it grows with tokens, and where it crosses the batch size."
    )

    def save(files: Target) -> bool:
        return noise_figure(records, files, summary)

    return Plot("noise_scale", "Noise scale", caption, data, save, note)


def _critical(workdir: epath.Path, records: list[dict[str, Any]], summary: dict[str, Any]) -> Plot:
    found = critical_batches(workdir, records)
    if not found:
        raise UserError("the run has no critical batch size: no bins of its noise scale with an interval, and no branches")
    laws = write_laws(workdir, found, definitions=())  # fits them, and writes none
    data = pandas.DataFrame([point._asdict() for points in found.values() for point in points])
    grown = {name: f"T^{power(law.exponent)} ± {law.exponent_se:.2f}" for name, law in laws.items()}
    said = [f"{name} {len(points)} points, {grown.get(name, 'too few closed ones for a law')}" for name, points in found.items()]
    caption = (
        f"Critical batch size of one run against tokens by {counted(len(found), 'definition')}, each another quantity: "
        f"{'; '.join(said)}. Intervals are 95%, arrows where an end is open. "
        "To be seen: whether each grows with tokens, and how far apart they are."
    )

    def save(files: Target) -> bool:
        return critical_batch_figure(found, laws, records, files, summary)

    return Plot("critical_batch", "Critical batch size", caption, data, save)


def _summary(records: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    if summary:
        return page.table(("", "value"), summary_rows(summary))
    last = next((record for record in reversed(records) if "loss" in record), records[-1])
    rows = [("tokens", f"{last['tokens']:,} in {last['step']:,} steps"), ("training loss", short(last.get("loss")))]
    return page.table(("", "value"), rows)


def _records(records: list[dict[str, Any]]) -> str:
    plain = [{key: value for key, value in record.items() if not isinstance(value, list | dict)} for record in records]
    data, note = _thinned(pandas.DataFrame(plain))
    text = page.csv_url(page.records_csv(data))
    rows = f"{len(data):,} rows{f', {note}' if note else ''}; without the lists of blocks"
    link = f'<p><a download="records.csv" href="{text}">Records as CSV</a> ({rows}).</p>\n'
    return link + page.paragraphs(f"{FILE} has {len(records):,} records in all.")


def _config(config: dict[str, Any]) -> str:
    values = config.get("config", config)
    rows = [(name, text) for name, text in _flat(values)]
    return page.table(("field", "value"), rows)


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _flat(inner, f"{name}.{key}" if name else str(key))]
    return [(name, value if isinstance(value, str) else json.dumps(value))]
