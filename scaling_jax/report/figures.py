"""Figures of one training run, drawn from its records (the lines of DIR/metrics.jsonl).

Values that are None or missing (unbounded, not known yet) leave a gap, never a point. Every figure is a PNG; where there is nothing to draw
it says so, and the function returns False.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.laws.fit import PowerLaw, power_law

# Okabe & Ito's palette: told apart with any common form of colour blindness.
_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE, _SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_GREY = "#595959"
_DOMAINS = [(_VERMILLION, "o"), (_GREEN, "s"), (_PURPLE, "D"), (_ORANGE, "^"), (_SKY, "v")]
_KINDS = [(_ORANGE, (0, (1, 1))), (_BLUE, "-"), (_GREEN, (0, (5, 2))), (_PURPLE, (0, (5, 1.5, 1, 1.5))), (_SKY, "-")]
_MARKER = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
_STYLE = {
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 11,
    "savefig.dpi": 160,
}

TRANSIENT = 0.02  # share of the tokens so far in which initialization and warmup rule the gradient: left out of bins and fits


# ---------------------------------------------------------------------------------------------------------------------------- numbers


def noise_bins(records: list[dict], bins: int = 10, blocks: int = 16, from_tokens: float | None = None) -> list[dict[str, float | None]]:
    """The noise scale in separate bins of a run, equally long in log tokens: unlike the running estimate, with independent errors.

    Args:
      records: the run's records. Used are those with `grad_sq_step` and `grad_trace_step` (the step's own estimates, unbiased, so sometimes
        negative), `batch_tokens` and `batch_sequences`.
      bins: number of bins. One with fewer than `blocks` steps is joined to the next.
      blocks: consecutive blocks that a bin is cut into, whose scatter gives the interval.
      from_tokens: start of the first bin; by default 2% of the tokens so far, which leaves out the transient after initialization.

    Returns:
      For each bin `tokens` (its mean on a log axis), `noise_scale_tokens` (mean tr Σ over mean |G|², times the context), `low` and
      `high` (95% interval). None: |G|² cannot be told from zero, or, for both ends of the interval, there are too few steps.
    """
    keys = ("tokens", "grad_sq_step", "grad_trace_step", "batch_tokens", "batch_sequences")
    rows = np.stack([_column(records, key) for key in keys], axis=1)
    rows = rows[np.isfinite(rows).all(axis=1) & (rows[:, 0] > 0)]
    if len(rows) == 0:
        return []
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    last = rows[-1, 0]
    first = TRANSIENT * last if from_tokens is None else max(from_tokens, 1.0)
    rows = rows[rows[:, 0] >= first]
    if len(rows) == 0:
        return []
    stretches = _join(np.searchsorted(rows[:, 0], np.geomspace(first, last, bins + 1)[1:-1], side="right"), len(rows), blocks)
    per_block = np.zeros((3, len(stretches), blocks))  # tokens, |G|², tr Σ; blocks that stay empty have no weight
    for s, (start, end) in enumerate(stretches):
        for k, block in enumerate(np.array_split(rows[start:end], blocks)):
            if len(block):
                per_block[:, s, k] = block[:, 3].sum(), *(np.average(block[:, c], weights=block[:, 3]) for c in (1, 2))
    result = []
    for (start, end), interval in zip(stretches, _ratio_intervals(*per_block), strict=True):
        stretch = rows[start:end]
        context = stretch[:, 3].sum() / stretch[:, 4].sum()
        values = [float(v * context) if math.isfinite(v) else None for v in interval]
        tokens = math.exp(np.average(np.log(stretch[:, 0]), weights=stretch[:, 3]))
        result.append({"tokens": tokens} | dict(zip(("noise_scale_tokens", "low", "high"), values, strict=True)))
    return result


def noise_exponent(records: list[dict]) -> PowerLaw | None:
    """The power of tokens that the noise scale (in tokens) grows with. None with fewer than three bounded bins of the run.

    Fitted to the bins of `noise_bins`, as many of them (at most 10) as leave every interval bounded: a fit can use no point without an
    upper end, and to leave out just those where |G|² came out small would favour small noise scales.
    """
    return _fit(_bounded_bins(records))


def _bounded_bins(records: list[dict]) -> list[dict]:
    for bins in (10, 8, 6, 5, 4, 3):
        found = noise_bins(records, bins)
        if all(b["high"] is not None and b["noise_scale_tokens"] is not None for b in found):
            return found
    return noise_bins(records)


def _fit(bins: list[dict]) -> PowerLaw | None:
    return power_law(*(_column(bins, key) for key in ("tokens", "noise_scale_tokens", "low", "high")))


def _join(cuts: np.ndarray, total: int, least: int) -> list[tuple[int, int]]:
    """Stretches between the cuts, each of at least `least` rows; what is left over at the end goes to the last."""
    starts = [0]
    for cut in cuts:
        if cut - starts[-1] >= least:
            starts.append(int(cut))
    if len(starts) > 1 and total - starts[-1] < least:
        starts.pop()
    return list(zip(starts, [*starts[1:], total], strict=True))


def _ratio_intervals(weights: np.ndarray, grad_sq: np.ndarray, grad_trace: np.ndarray) -> np.ndarray:
    """`estimator.ratio_interval` of each row. [rows, 3]: ratio, low, high in sequences."""
    return np.stack(_compiled_ratio_interval()(*(values.astype(np.float32) for values in (weights, grad_sq, grad_trace))), axis=1)


@functools.cache
def _compiled_ratio_interval() -> Callable:
    import jax  # only here: a figure of a run without noise statistics needs no JAX

    from scaling_jax.noise_scale.estimator import ratio_interval

    return jax.jit(jax.vmap(ratio_interval))


def _column(records: list[dict], key: str) -> np.ndarray:
    """A key's values as floats; nan where missing, None or infinite."""
    values = np.array([math.nan if record.get(key) is None else record[key] for record in records], float)
    return np.where(np.isfinite(values), values, np.nan)


# ---------------------------------------------------------------------------------------------------------------------------- figures


def loss_figure(records: list[dict], path: str | Path, summary: dict[str, Any] | None = None) -> bool:
    """Training loss (every record light, smoothed on top) and held-out loss with standard errors, against tokens.

    Args:
      records: training records with `tokens` and `loss` (nats per token), evaluations with `tokens`, `eval/<domain>/loss` and optionally
        `eval/<domain>/loss_se` and `eval/<domain>/bits_per_byte`.
      path: the PNG to write.
      summary: optional `name` (title) and `bits_per_token_to_byte` (bits per byte for one bit per token). Without the latter the axis in
        bits per byte comes from the evaluations, if all of them agree on the ratio.

    Returns:
      Whether there was anything to draw. If not, the figure says "no data".
    """
    summary = summary or {}
    train = _points(records, "loss")
    domains = sorted({m[1] for record in records for key in record if (m := re.fullmatch(r"eval/(.+)/loss", key))})
    held_out = {domain: points for domain in domains if len(points := _points(records, f"eval/{domain}/loss", f"eval/{domain}/loss_se"))}
    if len(train) == 0 and not held_out:
        return _no_data(path)

    def draw(figure):
        axes = figure.subplots()
        if len(train):
            axes.plot(*train.T, color=_BLUE, alpha=0.3, linewidth=0.7)
            smooth = _smooth(np.log(train[:, 0]), train[:, 1])
            axes.plot(train[:, 0], smooth, color=_BLUE, linewidth=2, label="training", marker="." if len(train) == 1 else "")
        for (domain, points), (colour, marker) in zip(held_out.items(), itertools.cycle(_DOMAINS), strict=False):
            error = np.where(np.isfinite(points[:, 2]), points[:, 2], 0.0)
            label = "held out" if len(held_out) == 1 else f"held out: {domain}"
            axes.errorbar(*points.T[:2], error, fmt=marker, color=colour, elinewidth=1.3, zorder=3, label=label, **_MARKER)
        tokens = np.concatenate([train[:, 0], *(points[:, 0] for points in held_out.values())])
        _token_axis(axes, tokens, log=tokens.max() / tokens.min() >= 30)
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


def noise_figure(records: list[dict], path: str | Path, summary: dict[str, Any] | None = None) -> bool:
    """The gradient noise scale tr Σ/|G|² in tokens against tokens trained on, log-log; beside it the same by kind of layer, if recorded.

    Drawn are the running estimate with its 95% band (up to the top edge where it has no upper end), the batch size, independent bins
    of the run with 95% intervals (an arrow where they have no upper end), the power law fitted to those, and a guide of slope 1. The first
    2% of the tokens are in no bin: initialization and warmup rule the gradient there.

    Args:
      records: training records with `noise_scale_tokens`, `noise_scale_tokens_low`, `noise_scale_tokens_high`, what `noise_bins` needs, and
        `noise_scale_tokens/<kind>` for the second panel.
      path: the PNG to write.
      summary: optional `name` (title).

    Returns:
      Whether there was anything to draw. If not, the figure says "no data".
    """
    running = _points(records, "noise_scale_tokens", "noise_scale_tokens_low", "noise_scale_tokens_high", "batch_tokens")
    bins = [b for b in _bounded_bins(records) if b["noise_scale_tokens"] is not None and b["low"] is not None]
    kinds = sorted({m[1] for record in records for key in record if (m := re.fullmatch(r"noise_scale_tokens/(.+)", key))})
    kinds = sorted(kinds, key=lambda kind: [*"embedding attention mlp unembedding".split(), kind].index(kind))
    by_kind = {kind: points for kind in kinds if len(points := _points(records, f"noise_scale_tokens/{kind}"))}
    running = running[running[:, 1] > 0]
    by_kind = {kind: points[points[:, 1] > 0] for kind, points in by_kind.items() if (points[:, 1] > 0).any()}
    if len(running) == 0 and not bins and not by_kind:
        return _no_data(path)
    binned = np.stack([_column(bins, key) for key in ("tokens", "noise_scale_tokens", "low", "high")], axis=1)
    batch = _points(records, "batch_tokens")
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
        _draw_bins(left, binned, _fit(bins), top)
        tokens = np.concatenate([running[:, 0], binned[:, 0], *(points[:, 0] for points in by_kind.values())])
        low, high = tokens.min() / 1.15, tokens.max() * 1.15
        for axes in filter(None, (left, right)):
            if len(batch):
                axes.plot(*batch.T, color=_GREY, linestyle=(0, (6, 3)), linewidth=1.5, label="batch size" if axes is left else None)
            _token_axis(axes, tokens, log=True)
            axes.set_xlim(low, high)
            axes.grid(color="#e6e6e6", linewidth=0.8)
        _label_tokens(left.yaxis, bottom, top)
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


def _draw_running(axes, running: np.ndarray, top: float) -> None:
    if len(running) == 0:
        return
    tokens, value, low, high = running.T[:4]
    open_end = np.isfinite(low) & ~np.isfinite(high)
    axes.fill_between(tokens, low, high, where=np.isfinite(low) & np.isfinite(high), color=_BLUE, alpha=0.22, linewidth=0)
    axes.fill_between(tokens, low, top, where=open_end, color=_BLUE, alpha=0.09, linewidth=0)
    axes.plot(tokens, value, color=_BLUE, linewidth=2, label="running estimate, 95% band", marker="." if len(tokens) == 1 else "")


def _draw_bins(axes, binned: np.ndarray, law: PowerLaw | None, top: float) -> None:
    """Independent bins, the law through them, and a guide of slope 1 through the middle of them."""
    if len(binned) == 0:
        return
    tokens, value, low, high = binned.T
    closed, open_end = np.isfinite(low) & np.isfinite(high), np.isfinite(low) & ~np.isfinite(high)
    below = np.where(np.isfinite(low), value - low, 0.0)
    above = np.where(closed, high - value, 0.0)
    label = "independent bins, 95% intervals"
    axes.errorbar(tokens, value, [below, above], fmt="o", color=_VERMILLION, elinewidth=1.5, zorder=4, label=label, **_MARKER)
    arrow = {"arrowstyle": "->", "color": _VERMILLION, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    for x, y in zip(tokens[open_end], value[open_end], strict=True):
        axes.annotate("", (x, top), (x, y), arrowprops=arrow)
    ends = np.array([tokens.min() / 1.15, tokens.max() * 1.15])
    if law is not None:
        label = f"fit: tokens$^{{\\,{law.exponent:.2f} \\pm {law.exponent_se:.2f}}}$ (± standard error)"
        axes.plot(ends, law(ends), color=_VERMILLION, linewidth=1.5, zorder=3, label=label)
    if len(binned) > 1:
        middle = math.exp(np.mean(np.log(tokens))), math.exp(np.mean(np.log(value)))
        axes.plot(ends, middle[1] * ends / middle[0], color=_GREY, linestyle=":", linewidth=1.3, label="slope 1, for reference")


def _noise_limits(running: np.ndarray, binned: np.ndarray, batch: np.ndarray, by_kind: list[np.ndarray]) -> tuple[float, float]:
    """Axis limits from what matters: a reading can be wild, and an interval very wide."""
    centres = [batch[:, 1], binned[:, 1]]
    for points in (running, *by_kind):
        centres.append(np.percentile(points[:, 1], [0.5, 99]) if len(points) else points[:, 1])
    centres = np.concatenate(centres)
    bottom, top = centres.min(), centres.max()
    ends = binned[:, 2:][np.isfinite(binned[:, 2:]) & (binned[:, 2:] > bottom / 3) & (binned[:, 2:] < top * 3)]
    return min([bottom, *ends]) / 1.6, max([top, *ends]) * (1 + 0.6 * (max([top, *ends]) / min([bottom, *ends])) ** 0.3)


def _points(records: list[dict], *keys: str) -> np.ndarray:
    """Rows [tokens, keys...] in order of tokens, of the records where tokens (positive) and the first key are known."""
    rows = np.stack([_column(records, key) for key in ("tokens", *keys)], axis=1)
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
    pairs = [_points(records, f"eval/{domain}/loss", f"eval/{domain}/bits_per_byte") for domain in domains]
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


def _token_axis(axes, tokens: np.ndarray, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if log:
        axes.set_xscale("log")
        _label_tokens(axes.xaxis, tokens.min(), tokens.max())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_tokens(value)))
    axes.set_xlabel("tokens trained on")


def _label_tokens(axis, low: float, high: float) -> None:
    """Ticks at 1, 10, 100; on a short axis also between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.4 else (1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: human_tokens(value)))
    axis.set_minor_formatter(NullFormatter())


def _no_data(path: str | Path) -> bool:
    def draw(figure):
        figure.text(0.5, 0.5, "no data", ha="center", va="center", color=_GREY)

    save_figure(path, (7.2, 4.6), draw)
    return False


def save_figure(path: str | Path, inches: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Draws on a figure of its own: no pyplot, so no global state and no display."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        figure.savefig(path, format="png")
