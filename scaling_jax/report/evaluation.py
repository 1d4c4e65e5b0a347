"""What an evaluation shows: the file of it, a table, and a figure of the loss by position."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.data.shards import TokenStream
from scaling_jax.report.figures import BLUE, GREEN, MARKER, ORANGE, PURPLE, SKY, VERMILLION, human_tokens, no_data, save_figure
from scaling_jax.train.evaluate import Evaluation
from scaling_jax.train.workdir import write_json

_DOMAINS = [(BLUE, "o"), (VERMILLION, "s"), (GREEN, "D"), (PURPLE, "^"), (ORANGE, "v"), (SKY, "P")]
_Z = 1.959963985  # of a 95% interval


def evaluation_record(stream: TokenStream, found: Evaluation) -> dict[str, Any]:
    """One domain as the file holds it. Its lists by position begin with the token that is predicted from one."""
    return {
        "directory": str(stream.directory),
        "fingerprint": stream.index.fingerprint,
        "tokens": found.tokens,
        "documents": found.documents,
        "loss": found.loss.value if math.isfinite(found.loss.value) else None,
        "loss_se": found.loss.se,
        "bits_per_byte": found.bits_per_byte.value,
        "bits_per_byte_se": found.bits_per_byte.se,
        "position_loss": [one.loss.value for one in found.positions],
        "position_loss_se": [one.loss.se for one in found.positions],
        "bins": [{"first": b.first, "last": b.last, "loss": b.loss.value, "loss_se": b.loss.se} for b in found.bins],
    }


def store_evaluation(path: str | Path, checkpoint: dict[str, Any], domains: dict[str, Any]) -> dict[str, Any]:
    """Adds domains to a file of evaluations, and returns all of it.

    Args:
      path: of the file. One that is of another checkpoint, or none that can be read, is replaced.
      checkpoint: what was evaluated: `run`, a word for its identity, and `tokens`.
      domains: by name, from `evaluation_record`; one of a name that is there takes its place.
    """
    path = Path(path)
    try:
        there = json.loads(path.read_text())
        before = dict(there["domains"]) if {key: there[key] for key in checkpoint} == checkpoint else {}
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    content = {**checkpoint, "domains": before | domains}
    write_json(path, content)
    return content


def evaluation_table(domains: dict[str, Any]) -> str:
    """The domains as text, one a row."""
    rows = [("domain", "tokens", "documents", "nats/token", "± s.e.", "bits/byte", "± s.e.")]
    for name, found in domains.items():
        loss, bits = (_cells(found[key], found[f"{key}_se"]) for key in ("loss", "bits_per_byte"))
        rows.append((name, f"{found['tokens']:,}", f"{found['documents']:,}", *loss, *bits))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    )


def _cells(value: float | None, se: float | None) -> tuple[str, str]:
    return "-" if value is None else f"{value:.4f}", "-" if se is None else f"{se:.4f}"


def position_figure(domains: dict[str, Any], path: str | Path, title: str = "") -> bool:
    """Loss against the position in the sequence, of each domain: logarithmic bins, with 95% intervals over documents as bands.

    Args:
      domains: by name, with `bins` and `documents` as `evaluation_record` makes them.
      path: the PNG to write, whole or not at all.
      title: above it.

    Returns:
      Whether there was anything to draw. If not, the figure says "no data".
    """
    curves = {name: points for name, found in domains.items() if len(points := _points(found["bins"]))}
    if not curves:
        return no_data(path)

    counts = {name: found["documents"] for name, found in domains.items()}
    labels = {name: f"{name} ({count:,} document{'' if count == 1 else 's'})" for name, count in counts.items()}

    def draw(figure):
        axes = figure.subplots()
        for (name, points), (colour, marker) in zip(curves.items(), itertools.cycle(_DOMAINS), strict=False):
            position, loss, se = points.T
            axes.fill_between(position, loss - _Z * se, loss + _Z * se, color=colour, alpha=0.2, linewidth=0)
            axes.plot(position, loss, color=colour, marker=marker, linewidth=2, label=labels[name], **MARKER)
        _position_axis(axes, max(points[-1, 0] for points in curves.values()))
        axes.set_ylabel("loss (nats per token)")
        axes.set_title(title)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        figure.legend(loc="outside lower center", ncols=min(3, len(curves)), title="bands: 95% intervals over documents", title_fontsize=11)

    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        save_figure(temporary, (7.2, 4.6), draw)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _points(bins: Sequence[dict[str, Any]]) -> np.ndarray:
    """Rows [middle of a bin's positions, loss, its standard error], of the bins with a loss."""
    rows = [
        (math.sqrt(b["first"] * b["last"]), b["loss"], math.nan if b["loss_se"] is None else b["loss_se"])
        for b in bins
        if b["loss"] is not None
    ]
    return np.array(rows, float).reshape(-1, 3)


def _position_axis(axes, last: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2 if last <= 512 else 4, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_tokens(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("position in the sequence (tokens seen before the one predicted)")
