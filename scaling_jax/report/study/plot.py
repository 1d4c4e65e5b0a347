"""A figure of a report before it is drawn: what it shows, in words and numbers, and how to draw it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Finding
from scaling_jax.laws.frontier import SAME_SIZE, near_groups
from scaling_jax.laws.settings import grid_columns
from scaling_jax.report.figures import save_figure

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TEXTS = "depth head_dim context vocab_size weight_decay parametrization schedule warmup_tokens data_tokens".split()


class Plot(NamedTuple):
    """One figure.

    `name` is that of its files, `caption` says what was measured, how many runs, and what is to be seen, in plain text. `data` is what is
    drawn, a row for each mark; `note` says what of it was thinned. `save` writes it to open files by their format (png, pdf, svg).
    """

    name: str
    title: str
    caption: str
    data: pandas.DataFrame
    save: Callable[[Mapping[str, BinaryIO]], Any]
    note: str = ""


class Source(NamedTuple):
    """What a study's figures are drawn from.

    `table` has all rows, `rows` those with a loss. `findings` are by the analysis' name; a text says why there is none. `curves` are the
    courses of the runs as `results.curves` gives them, None where only the table is known.
    """

    table: pandas.DataFrame
    rows: pandas.DataFrame
    findings: Mapping[str, Finding | str]
    curves: pandas.DataFrame | None = None

    def finding(self, name: str) -> Finding:
        """UserError, with the analysis' own reason, where there is none."""
        found = self.findings.get(name, "was not analysed")
        if isinstance(found, str):
            raise UserError(found)
        return found


def plot(
    name: str, title: str, caption: str, data: pandas.DataFrame, inches: tuple[float, float], draw: Callable[[Any], None], note: str = ""
) -> Plot:
    """A plot whose `draw` takes a matplotlib Figure."""

    def plainly(figure: Any) -> None:
        draw(figure)
        for axes in figure.axes if len(figure.axes) > 2 else ():
            axes.minorticks_off()  # a crowd in small panels, and slow

    return Plot(name, title, caption, data, lambda files: save_figure(files, inches, plainly), note)


def need(table: pandas.DataFrame, *columns: str) -> None:
    """UserError where the table lacks one of the columns, or knows nothing in it."""
    for name in columns:
        if name not in table or not table[name].notna().any():
            raise UserError(f"the table has no {name}")


def one_setting(rows: pandas.DataFrame, but: tuple[str, ...] = ()) -> tuple[pandas.DataFrame, str]:
    """The rows of the commonest value of each setting that the table varies besides N, B, T, lr and seed; and a sentence that says so.

    `but` are columns that may vary. What differs with N alone, as depth and width do, is no setting.
    """
    said = []
    for name in [name for name in rows.columns if (name in _TEXTS or name in grid_columns(rows)) and name not in but]:
        if rows[name].nunique() > 1 and ("params" not in rows or (rows.groupby("params")[name].nunique() > 1).any()):
            common = rows[name].mode().iloc[0]
            rows = rows[rows[name] == common]
            said.append(f"{name} {short(common)}")
    return rows, f" Of what else varies, these runs have {' and '.join(said)}." if said else ""


def same_sizes(params: pandas.Series) -> pandas.Series:
    """N of each row, one value for those so near that the laws of loss take them as one size."""
    known = params.dropna().astype(float)
    return known.groupby(near_groups(known, SAME_SIZE)).transform("median").reindex(params.index)


def runs_in(rows: pandas.DataFrame) -> int:
    """How many runs: points where the table names them, otherwise rows."""
    return int(rows["point"].nunique()) if "point" in rows and rows["point"].notna().all() else len(rows)


def short(value: Any) -> str:
    """A number or a name for people: 4 digits, powers of ten where it is very large or small."""
    if isinstance(value, str) or value is None:
        return value or ""
    value = float(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return text.replace("-", "−")
    digits, power = f"{value:.2e}".split("e")
    return f"{digits.replace('-', '−')}×10{str(int(power)).translate(_SUPERSCRIPTS)}"


def amount(value: float) -> str:
    """Tokens or parameters: exact below 10,000, three digits above."""
    if value < 1e4:
        return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit * 0.9995:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def listed(parts: list[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def power(exponent: float | None) -> str:
    """An exponent, as it is read: two decimals."""
    return "?" if exponent is None or math.isnan(exponent) else f"{exponent:.2f}".replace("-", "−")


def interval_text(number: Any) -> str:
    """', 95% interval 0.4 to 0.6' of a Number, or nothing."""
    if number.low is None or number.high is None:
        return ""
    return f" (95%: {power(number.low)} to {power(number.high)})"


def sentence(text: str) -> str:
    """With a capital at its beginning, unless that is a name of ours, and a full stop at its end."""
    text = text.strip()
    if not text:
        return ""
    word = text.split()[0]
    first = text if "_" in word or len(word) == 1 or not text[0].isascii() else f"{text[0].upper()}{text[1:]}"  # η is no word
    return first if first[-1] in ".!?:" else f"{first}."
