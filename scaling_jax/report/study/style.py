"""How a report's figures look: colours that stand out on white and on black paper, and axes of tokens, rates and losses."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from scaling_jax.report.figures import GREY, label_tokens
from scaling_jax.report.study.plot import amount

GRID, PAPER, INK = "#e6e6e6", "#ffffff", "#000000"  # with GREY these follow the page's own light and dark
MARKERS = "osD^vP*X"
# Of one luminance, between a sixth and a quarter of white's: each has a contrast of 3 or more with either paper.
_RAMP = ("#16907c", "#2f78c8", "#7d63c9", "#b8509f", "#cf5a3c", "#c07a10")


def shades(count: int) -> list[str]:
    """Colours in an order."""
    anchors_Kx3 = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _RAMP], float)
    at = np.linspace(0, len(_RAMP) - 1, count) if count > 1 else np.array([1.0])
    rgb_Cx3 = np.stack([np.interp(at, range(len(_RAMP)), anchors_Kx3[:, i]) for i in range(3)], axis=1)
    return ["#" + "".join(f"{round(v):02x}" for v in rgb) for rgb in rgb_Cx3]


def looks(values: Iterable[Any]) -> dict[Any, dict[str, Any]]:
    """Colour and marker of each value, in order."""
    ordered = sorted(set(values))
    return {v: {"color": c, "marker": m} for v, c, m in zip(ordered, shades(len(ordered)), itertools.cycle(MARKERS), strict=False)}


def panels(figure: Any, count: int, columns: int = 2, **options: Any) -> list[Any]:
    """Axes for so many panels, row by row."""
    columns = min(columns, count)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, **options)
    for axes in grid.ravel()[count:]:
        axes.set_axis_off()
    if options.get("sharex"):
        for axes in grid.ravel()[max(0, count - columns) : count]:
            axes.xaxis.set_tick_params(labelbottom=True)
    return list(grid.ravel()[:count])


def below(drawn: Sequence[Any], name: Callable[[Any], None]) -> None:
    """Names the x axes of panels that share one: all get its ticks, those with none below them its label."""
    for i, axes in enumerate(drawn):
        name(axes.xaxis)
        if i < len(drawn) - min(2, len(drawn)):
            axes.set_xlabel("")


def size(
    count: int, columns: int = 2, one: tuple[float, float] = (6.4, 4.8), each: tuple[float, float] = (4.2, 3.1)
) -> tuple[float, float]:
    """Inches for so many panels and a legend below."""
    if count == 1:
        return one
    columns = min(columns, count)
    return each[0] * columns, each[1] * -(-count // columns) + 0.6


def plain_log(axis: Any, values: Iterable[float], form: str = "%g") -> None:
    """A log axis with plain numbers; ticks stand close where the axis is short."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    known = np.asarray([v for v in values if v is not None and np.isfinite(v) and v > 0], float)
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    decades = math.log10(known.max() / known.min()) if len(known) else 1.0
    if decades < 0.9:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.8 else (1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FormatStrFormatter(form))
    axis.set_minor_formatter(NullFormatter())


def amounts(axis: Any, values: Iterable[float], label: str) -> None:
    """A log axis of tokens or parameters: 10k, 3M."""
    known = np.asarray([v for v in values if np.isfinite(v) and v > 0], float)
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    label_tokens(axis, known.min() / 1.2, known.max() * 1.2)
    axis.set_label_text(label)


def flops(axis: Any, label: str) -> None:
    """A log axis of powers of ten, as of FLOPs."""
    from matplotlib.ticker import LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(label)


def grid(*axes: Any) -> None:
    for each in axes:
        each.grid(color=GRID, linewidth=0.8)
        each.set_axisbelow(True)


def legend(figure: Any, axes: Sequence[Any], title: str | None = None, wide: float = 9.5) -> None:
    """Each label once, below the figure, in as many columns as fit."""
    found: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        longest = max(map(len, found)) + 5
        columns = max(1, min(len(found), int(figure.get_figwidth() * wide / longest)))
        figure.legend(
            found.values(), found, loc="outside lower center", ncols=columns, title=title, labelspacing=0.35, columnspacing=1.2,
            handlelength=1.6, title_fontsize=11,
        )  # fmt: skip


def name_of(kind: str, value: float) -> str:
    """B = 4,096."""
    return f"{kind} = {amount(value)}"


def arrows(axes: Any, x: Sequence[float], y: Sequence[float], up: Sequence[bool], color: str) -> None:
    """Bounds: hollow triangles that point to where the value may be."""
    x, y, up = np.asarray(x, float), np.asarray(y, float), np.asarray(up, bool)
    for where, marker in ((up, "^"), (~up, "v")):
        if where.any():
            axes.plot(x[where], y[where], linestyle="", marker=marker, markerfacecolor="none", markeredgecolor=color, markersize=7)


def guide(axes: Any, x: np.ndarray, y: float, slope: float, label: str) -> None:
    """A dotted line of this slope on log axes, through y in the middle of x."""
    ends = np.array([np.min(x), np.max(x)], float)
    axes.plot(ends, y * (ends / math.sqrt(ends[0] * ends[1])) ** slope, color=GREY, linestyle=":", linewidth=1.3, label=label)
