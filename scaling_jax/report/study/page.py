"""A report as one HTML page: its parts are put together here, and nothing of it lies outside the file."""

import html
import io
import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote

import pandas
from etils import epath

from scaling_jax import storage
from scaling_jax.errors import UserError
from scaling_jax.report.study.css import CSS
from scaling_jax.report.study.plot import Plot
from scaling_jax.report.study.svg import inline

PAGE, FIGURES = "index.html", "figures"
GENERATOR = '<meta name="generator" content="scaling-jax report">'
_FORMATS = ("svg", "png", "pdf")


_EXPONENT = re.compile(r"\b(\d+(?:\.\d+)?)e([+-]?\d+)\b")
_POWER = re.compile(r"\^(?:\(([^()]+)\)|([−-]?(?:\d+(?:\.\d+)?|[A-Za-zα-ωΑ-Ω]\w*)))")
_LETTERS = {"alpha": "α", "beta": "β", "gamma": "γ"}
_GREEK = re.compile(r"(?<![\w_])(?:alpha|beta|gamma)(?![A-Za-z])")
_INDEX = re.compile(r"(?<![\w_])([A-Za-zα-ωΑ-Ω])_(\w+)")


class Drawn(NamedTuple):
    """A figure in every format."""

    plot: Plot
    files: dict[str, bytes]


class Section(NamedTuple):
    """A part of the page: a heading and what is below it, as HTML. `anchor` is its name in links."""

    anchor: str
    title: str
    body: str


def draw(plot: Plot) -> Drawn:
    """UserError where the plot finds nothing to draw."""
    buffers = {kind: io.BytesIO() for kind in _FORMATS}
    if plot.save(buffers) is False:
        raise UserError("there are no data for it")
    return Drawn(plot, {kind: buffer.getvalue() for kind, buffer in buffers.items()})


def escape(text: object) -> str:
    return html.escape(str(text))


def rich(text: object) -> "Html":
    """Text with its powers and indices raised and lowered: T^0.45, B_crit, 1.05e+06; alpha_n is α with its index."""
    text = _GREEK.sub(lambda m: _LETTERS[m[0]], str(text))
    shown = _EXPONENT.sub(lambda m: f"{m[1]}×10<sup>{int(m[2])}</sup>", escape(text))
    shown = _POWER.sub(lambda m: f"<sup>{m[1] or m[2]}</sup>".replace("-", "−"), shown)
    return Html(_INDEX.sub(r"\1<sub>\2</sub>", shown))


def paragraphs(*texts: str) -> str:
    return "".join(f"<p>{rich(text)}</p>\n" for text in texts if text)


def bullets(texts: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{rich(text)}</li>\n" for text in texts) + "</ul>\n" if texts else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), caption: str = "") -> str:
    """A table that scrolls on its own where the screen is narrow, without the columns that are empty in every row.

    `numbers` are columns of numbers. Cells are text, or Html.
    """
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    head, rows, numbers = [head[i] for i in kept], [[row[i] for i in kept] for row in rows], [kept.index(i) for i in numbers if i in kept]
    aligned = {i: ' class="n"' for i in numbers}
    lines = ['<div class="scroll" tabindex="0" role="region" aria-label="table"><table>']
    if caption:
        lines.append(f"<caption>{escape(caption)}</caption>")
    lines.append(
        "<thead><tr>" + "".join(f'<th scope="col"{aligned.get(i, "")}>{escape(c)}</th>' for i, c in enumerate(head)) + "</tr></thead>"
    )
    lines.append("<tbody>")
    for row in rows:
        cells = [cell if isinstance(cell, Html) else rich(cell) for cell in row]
        first = f'<th scope="row">{cells[0]}</th>' if cells else ""
        lines.append(f"<tr>{first}" + "".join(f"<td{aligned.get(i, '')}>{cell}</td>" for i, cell in enumerate(cells[1:], 1)) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>\n"])


class Html(str):
    """Text that is HTML already."""


def mark(kind: str, text: str) -> Html:
    """A verdict in a cell: kind is good, bad or plain. It is told by its words; the colour comes on top."""
    return Html(f'<span class="mark {kind}">{escape(text)}</span>')


def figure(drawn: Drawn) -> str:
    plot = drawn.plot
    picture = inline(drawn.files["svg"], plot.name, escape(plot.title), escape(plot.caption))
    text = plot.data.to_csv(index=False, float_format="%.7g")
    rows = f"{len(plot.data):,} rows{f', {plot.note}' if plot.note else ''}"
    data = f'<a download="{plot.name}.csv" href="{csv_url(text)}">Data as CSV</a> ({escape(rows)})'
    files = " · ".join(f'<a href="{FIGURES}/{plot.name}.{kind}">{kind.upper()}</a>' for kind in _FORMATS[1:])
    return (
        f'<figure id="{plot.name}">\n<h3>{escape(plot.title)}</h3>\n<div class="scroll" tabindex="0" role="region" aria-label="figure">'
        f"{picture}</div>\n<figcaption><p>{rich(plot.caption)}</p>\n"
        f'<p class="files">{data} · {files}</p></figcaption>\n</figure>\n'
    )


def csv_url(text: str) -> str:
    """A link that holds the file itself, so that the page needs no other."""
    return "data:text/csv;charset=utf-8," + quote(text, safe="/,:;=+-_.~()*!@[]")


def records_csv(table: pandas.DataFrame) -> str:
    return table.to_csv(index=False, float_format="%.7g")


def document(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page. `lead` are the lines below the title."""
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.title)}</a></li>\n' for part in sections)
    body = "".join(_section(part) for part in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{''.join(f'<p>{escape(line)}</p>' for line in lead)}\n</header>\n"
        f'<nav aria-label="contents">\n<ul>\n{links}</ul>\n</nav>\n<main>\n{body}</main>\n</body>\n</html>\n'
    )


def _section(part: Section) -> str:
    heading = f"{part.anchor}-h"
    return (
        f'<section id="{part.anchor}" aria-labelledby="{heading}">\n<h2 id="{heading}">{escape(part.title)}</h2>\n{part.body}</section>\n'
    )


def check_out(out: epath.Path) -> None:
    """UserError where `out` is a file, or holds something that is no report: nothing of it is to be lost."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out={out}: is a file; must be a directory, new, empty or of an earlier report")
    if _is_report(out / PAGE) or not any(True for _ in out.iterdir()):
        return
    raise UserError(f"--out={out}: holds other files and no report; must be a directory that is new, empty or of an earlier report")


def _is_report(path: epath.Path) -> bool:
    try:
        return GENERATOR.encode() in path.read_bytes()[:2000]
    except OSError:
        return False


def write(out: epath.Path, page: str, drawn: Sequence[Drawn]) -> epath.Path:
    """Writes the figures and then the page, each whole; takes away figures of an earlier page that this one has no more."""
    known = re.findall(rf'href="{FIGURES}/([a-z0-9_]+\.(?:png|pdf))"', (out / PAGE).read_text()) if (out / PAGE).exists() else []
    written = set()
    for each in drawn:
        for kind in _FORMATS[1:]:
            name = f"{each.plot.name}.{kind}"
            storage.write_bytes(out / FIGURES / name, each.files[kind])
            written.add(name)
    storage.write_bytes(out / PAGE, page.encode())
    for name in set(known) - written:
        (out / FIGURES / name).unlink(missing_ok=True)
    return out / PAGE
