"""Figures of one training run, drawn from its records (the lines of DIR/metrics.jsonl).

Values that are None or missing (unbounded, not known yet) leave a gap, never a point. Every figure is a PNG, or goes to open files of
several formats at once; where there is nothing to draw it says so, and the function returns False.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scaling_jax.laws.noise_bins import bins_law, bounded_bins, column
from scaling_jax.laws.power_law import PowerLaw

Target = str | Path | Mapping[str, BinaryIO]  # a PNG to write, or open files by their format: png, pdf, svg

# Okabe & Ito's palette: told apart with any common form of colour blindness.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#595959"
_DOMAINS = [(VERMILLION, "o"), (GREEN, "s"), (PURPLE, "D"), (ORANGE, "^"), (SKY, "v")]
_KINDS = [(ORANGE, (0, (1, 1))), (BLUE, "-"), (GREEN, (0, (5, 2))), (PURPLE, (0, (5, 1.5, 1, 1.5))), (SKY, "-")]
MARKER = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
_STYLE = {
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 11,
    "savefig.dpi": 160,
    "svg.hashsalt": "scaling-jax",
}
_DATES = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def loss_figure(records: list[dict], path: Target, summary: dict[str, Any] | None = None) -> bool:
    """Training loss (every record light, smoothed on top) and held-out loss with standard errors, against tokens.

    Args:
      records: training records with `tokens` and `loss` (nats per token), evaluations with `tokens`, `eval/<domain>/loss` and optionally
        `eval/<domain>/loss_se` and `eval/<domain>/bits_per_byte`.
      path: the PNG to write, or files by format.
      summary: optional `name` (title) and `bits_per_token_to_byte` (bits per byte for one bit per token). Without the latter the axis in
        bits per byte comes from the evaluations, if all of them agree on the ratio.

    Returns:
      Whether there was anything to draw. If not, the figure says "no data".
    """
    summary = summary or {}
    train = known_points(records, "loss")
    domains = sorted({m[1] for record in records for key in record if (m := re.fullmatch(r"eval/(.+)/loss", key))})
    held_out = {
        domain: points for domain in domains if len(points := known_points(records, f"eval/{domain}/loss", f"eval/{domain}/loss_se"))
    }
    if len(train) == 0 and not held_out:
        return no_data(path)

    def draw(figure):
        axes = figure.subplots()
        if len(train):
            axes.plot(*train.T, color=BLUE, alpha=0.3, linewidth=0.7)
            smooth = _smooth(np.log(train[:, 0]), train[:, 1])
            axes.plot(train[:, 0], smooth, color=BLUE, linewidth=2, label="training", marker="." if len(train) == 1 else "")
        for (domain, points), (colour, marker) in zip(held_out.items(), itertools.cycle(_DOMAINS), strict=False):
            error = np.where(np.isfinite(points[:, 2]), points[:, 2], 0.0)
            label = "held out" if len(held_out) == 1 else f"held out: {domain}"
            axes.errorbar(*points.T[:2], error, fmt=marker, color=colour, elinewidth=1.3, zorder=3, label=label, **MARKER)
        tokens = np.concatenate([train[:, 0], *(points[:, 0] for points in held_out.values())])
        token_axis(axes, tokens, log=tokens.max() / tokens.min() >= 30)
        axes.set_ylabel("loss (nats per token)")
        factor = _bits_per_byte_of_nats(records, held_out, summary)
        if factor:
            right = axes.secondary_yaxis("right", functions=(lambda nats: nats * factor, lambda bits: bits / factor))
            right.set_ylabel("bits per byte")
        axes.set_title(summary.get("name", ""))
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.legend(loc="upper right")

    save_figure(path, (7.2, 4.6), draw)
    return True


def noise_figure(records: list[dict], path: Target, summary: dict[str, Any] | None = None) -> bool:
    """The gradient noise scale tr Σ/|G|² in tokens against tokens trained on, log-log; beside it the same by kind of layer, if recorded.

    Drawn are the running estimate with its 95% band (up to the top edge where it has no upper end), the batch size, independent bins
    of the run with 95% intervals (an arrow where they have no upper end), the power law fitted to those, and a guide of slope 1. The first
    2% of the tokens are in no bin: initialization and warmup rule the gradient there.

    Args:
      records: training records with `noise_scale_tokens`, `noise_scale_tokens_low`, `noise_scale_tokens_high`, what `noise_bins` needs, and
        `noise_scale_tokens/<kind>` for the second panel.
      path: the PNG to write, or files by format.
      summary: optional `name` (title).

    Returns:
      Whether there was anything to draw. If not, the figure says "no data".
    """
    running = known_points(records, "noise_scale_tokens", "noise_scale_tokens_low", "noise_scale_tokens_high", "batch_tokens")
    bins = [b for b in bounded_bins(records) if b["noise_scale_tokens"] is not None and b["low"] is not None]
    kinds = {m[1] for record in records for key in record if (m := re.fullmatch(r"noise_scale_tokens/(.+)", key))}
    kinds = sorted(kinds - {"layers"})  # those are lists, one number a block
    kinds = sorted(kinds, key=lambda kind: [*"embedding attention mlp unembedding".split(), kind].index(kind))
    by_kind = {kind: points for kind in kinds if len(points := known_points(records, f"noise_scale_tokens/{kind}"))}
    running = running[running[:, 1] > 0]
    by_kind = {kind: points[points[:, 1] > 0] for kind, points in by_kind.items() if (points[:, 1] > 0).any()}
    if len(running) == 0 and not bins and not by_kind:
        return no_data(path)
    binned = np.stack([column(bins, key) for key in ("tokens", "noise_scale_tokens", "low", "high")], axis=1)
    batch = known_points(records, "batch_tokens")
    known = running[np.isfinite(running[:, 2]), 0]
    if len(known):  # what comes before the first interval is wild, and would take half of a log axis
        running = running[running[:, 0] >= known[0]]
        by_kind = {kind: points[points[:, 0] >= known[0]] for kind, points in by_kind.items()}
        batch = batch[batch[:, 0] >= known[0]]

    def draw(figure):
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.35, 1)) if by_kind else (figure.subplots(), None)
        bottom, top = _noise_limits(running, binned, batch, list(by_kind.values()))
        left.set(yscale="log", ylim=(bottom, top))
        _draw_running(left, running, top)
        _draw_bins(left, binned, bins_law(bins), top)
        tokens = np.concatenate([running[:, 0], binned[:, 0], *(points[:, 0] for points in by_kind.values())])
        low, high = tokens.min() / 1.15, tokens.max() * 1.15
        for axes in filter(None, (left, right)):
            draw_batch(axes, batch, "batch size" if axes is left else None)
            token_axis(axes, tokens, log=True)
            axes.set_xlim(low, high)
            axes.grid(color="#e6e6e6", linewidth=0.8)
        label_tokens(left.yaxis, bottom, top)
        left.set_ylabel("noise scale tr Σ / |G|² (tokens)")
        left.set_title((summary or {}).get("name", "") if right is None else "whole model")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3 if by_kind else 2, labelspacing=0.35)
        if right is not None:
            figure.suptitle((summary or {}).get("name"), x=0.01, ha="left", fontsize=13)
            right.set_title("by kind of layer")
            for (kind, points), (colour, dashes) in zip(by_kind.items(), itertools.cycle(_KINDS), strict=False):
                right.plot(*points.T, color=colour, linestyle=dashes, linewidth=2, label=kind, marker="." if len(points) == 1 else "")
            right.legend(loc="upper left", labelspacing=0.35)

    save_figure(path, (11.5, 5.4) if by_kind else (7.2, 5.6), draw)
    return True


def draw_batch(axes, batch: np.ndarray, label: str | None) -> None:
    """The batch size, rows of [tokens at the end of a step, its batch tokens]."""
    if len(batch):
        axes.plot(*batch.T, color=GREY, linestyle=(0, (6, 3)), linewidth=1.5, drawstyle="steps-pre", label=label)


def _draw_running(axes, running: np.ndarray, top: float) -> None:
    if len(running) == 0:
        return
    tokens, value, low, high = running.T[:4]
    open_end = np.isfinite(low) & ~np.isfinite(high)
    axes.fill_between(tokens, low, high, where=np.isfinite(low) & np.isfinite(high), color=BLUE, alpha=0.22, linewidth=0)
    axes.fill_between(tokens, low, top, where=open_end, color=BLUE, alpha=0.09, linewidth=0)
    axes.plot(tokens, value, color=BLUE, linewidth=2, label="running estimate, 95% band", marker="." if len(tokens) == 1 else "")


def _draw_bins(axes, binned: np.ndarray, law: PowerLaw | None, top: float) -> None:
    """Independent bins, the law through them, and a guide of slope 1 through the middle of them."""
    if len(binned) == 0:
        return
    tokens, value, low, high = binned.T
    closed, open_end = np.isfinite(low) & np.isfinite(high), np.isfinite(low) & ~np.isfinite(high)
    below = np.where(np.isfinite(low), value - low, 0.0)
    above = np.where(closed, high - value, 0.0)
    label = "independent bins, 95% intervals"
    axes.errorbar(tokens, value, [below, above], fmt="o", color=VERMILLION, elinewidth=1.5, zorder=4, label=label, **MARKER)
    arrow = {"arrowstyle": "->", "color": VERMILLION, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    for x, y in zip(tokens[open_end], value[open_end], strict=True):
        axes.annotate("", (x, top), (x, y), arrowprops=arrow)
    ends = np.array([tokens.min() / 1.15, tokens.max() * 1.15])
    if law is not None:
        label = f"fit: tokens$^{{\\,{law.exponent:z.2f} \\pm {law.exponent_se:.2f}}}$ (± standard error)"
        axes.plot(ends, law(ends), color=VERMILLION, linewidth=1.5, zorder=3, label=label)
    if len(binned) > 1:
        middle = math.exp(np.mean(np.log(tokens))), math.exp(np.mean(np.log(value)))
        axes.plot(ends, middle[1] * ends / middle[0], color=GREY, linestyle=":", linewidth=1.3, label="slope 1, for reference")


def _noise_limits(running: np.ndarray, binned: np.ndarray, batch: np.ndarray, by_kind: list[np.ndarray]) -> tuple[float, float]:
    """Axis limits from what matters: a reading can be wild, and an interval very wide."""
    centres = [batch[:, 1], binned[:, 1]]
    for points in (running, *by_kind):
        centres.append(np.percentile(points[:, 1], [0.5, 99]) if len(points) else points[:, 1])
    centres = np.concatenate(centres)
    bottom, top = centres.min(), centres.max()
    ends = binned[:, 2:][np.isfinite(binned[:, 2:]) & (binned[:, 2:] > bottom / 3) & (binned[:, 2:] < top * 3)]
    return min([bottom, *ends]) / 1.6, max([top, *ends]) * (1 + 0.6 * (max([top, *ends]) / min([bottom, *ends])) ** 0.3)


def known_points(records: list[dict], *keys: str) -> np.ndarray:
    """Rows [tokens, keys...] in order of tokens, of the records where tokens (positive) and the first key are known."""
    rows = np.stack([column(records, key) for key in ("tokens", *keys)], axis=1)
    rows = rows[np.isfinite(rows[:, :2]).all(axis=1) & (rows[:, 0] > 0)]
    return rows[np.argsort(rows[:, 0], kind="stable")]


def _smooth(x: np.ndarray, y: np.ndarray, half_width: float = 0.06) -> np.ndarray:
    """The value at each x of the straight line through its neighbours within `half_width`. A mean would be off where a curve ends or falls.

    With x = log tokens the result looks equally smooth all along a log axis. x must not decrease.
    """
    start, end = np.searchsorted(x, x - half_width), np.searchsorted(x, x + half_width, side="right")

    def window_mean(values):
        total = np.concatenate([[0.0], np.cumsum(values)])
        return (total[end] - total[start]) / (end - start)

    x = x - x.mean()
    mean_x, mean_y = window_mean(x), window_mean(y)
    variance, covariance = window_mean(x * x) - mean_x**2, window_mean(x * y) - mean_x * mean_y
    slope = np.where(end - start > 2, covariance / np.maximum(variance, 1e-12), 0.0)
    return np.where(end - start > 2, mean_y + slope * (x - mean_x), y)


def _bits_per_byte_of_nats(records: list[dict], domains: Any, summary: dict) -> float | None:
    """Bits per byte for one nat per token; None where unknown or different from domain to domain."""
    if summary.get("bits_per_token_to_byte"):
        return summary["bits_per_token_to_byte"] / math.log(2)
    pairs = [known_points(records, f"eval/{domain}/loss", f"eval/{domain}/bits_per_byte") for domain in domains]
    ratios = np.concatenate([points[:, 2] / points[:, 1] for points in pairs]) if pairs else np.array([])
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) == 0 or np.ptp(ratios) > 0.01 * np.median(ratios):
        return None
    return float(np.median(ratios))


def human_tokens(tokens: float) -> str:
    """10k, 2.5M, 1B."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= unit * 0.9999:
            return f"{tokens / unit:.4g}{suffix}"
    return f"{tokens:.4g}"


def token_axis(axes, tokens: np.ndarray, log: bool) -> None:
    """Makes the x axis one of tokens, with ticks for this range of them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if log:
        axes.set_xscale("log")
        label_tokens(axes.xaxis, tokens.min(), tokens.max())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_tokens(value)))
    axes.set_xlabel("tokens trained on")


def label_tokens(axis, low: float, high: float) -> None:
    """Ticks at 1, 10, 100; on a short axis also between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.4 else (1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: human_tokens(value)))
    axis.set_minor_formatter(NullFormatter())


def no_data(path: Target) -> bool:
    """A figure that says so; False."""

    def draw(figure):
        figure.text(0.5, 0.5, "no data", ha="center", va="center", color=GREY)

    save_figure(path, (7.2, 4.6), draw)
    return False


def save_figure(path: Target, inches: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Draws on a figure of its own: no pyplot, so no global state and no display. Drawn once, however many formats; no file has a date."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        if not isinstance(path, Mapping):
            figure.savefig(path, format="png")
            return
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # laid out once for all of them
        for kind, file in path.items():
            figure.savefig(file, format=kind, transparent=kind == "svg", metadata=_DATES.get(kind))
