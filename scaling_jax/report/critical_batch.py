"""The critical batch size of one run by every definition that the run has: its points, their power laws, and one figure of all.

A run can have `noise` and `preconditioned`, from its records, and `branch`, once it was branched off. They are different quantities
(laws/critical_batch.py), so each has its own name, curve and law.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.critical_batch import CriticalBatch, law, noise
from scaling_jax.laws.law_file import write_law
from scaling_jax.laws.noise_bins import TRANSIENT, column
from scaling_jax.laws.power_law import PowerLaw
from scaling_jax.laws.table import is_number
from scaling_jax.report.branch import CRITICAL_BATCH_FILE
from scaling_jax.report.figures import (
    BLUE,
    GREEN,
    GREY,
    MARKER,
    VERMILLION,
    Target,
    draw_batch,
    known_points,
    label_tokens,
    no_data,
    save_figure,
    token_axis,
)
from scaling_jax.train.workdir import BRANCHES, LAWS

_LOOKS = {
    "noise": ("noise, tr Σ / |G|²", VERMILLION, "o"),
    "preconditioned": ("preconditioned, tr PΣ / GᵀPG", BLUE, "s"),
    "branch": ("branch, largest batch that loses nothing", GREEN, "D"),
}
_LAYERS = {"noise scale": "noise_scale_tokens", "preconditioned noise scale": "preconditioned_noise_scale_tokens"}
_GUIDE, _BATCH = "slope 1, for reference", "batch size of the run"
_REACH = 4.0  # an interval's end is shown where it lies within this factor of all values


def critical_batches(workdir: str | Path, records: list[dict]) -> dict[str, list[CriticalBatch]]:
    """Points by definition, of those that the run has.

    Of the noise's bins those without an interval are left out: they had too few steps to know anything.

    Args:
      workdir: the run's; its branches are read from branches/critical_batch.json.
      records: the run's records.

    Raises:
      UserError: that file is damaged.
    """
    found = {metric: [point for point in noise(records, metric) if point.low is not None] for metric in ("noise", "preconditioned")}
    found["branch"] = _branch_points(Path(workdir) / BRANCHES / CRITICAL_BATCH_FILE)
    return {definition: points for definition, points in found.items() if points}


def _branch_points(path: Path) -> list[CriticalBatch]:
    if not path.exists():
        return []
    try:
        points = [CriticalBatch(**point) for point in json.loads(path.read_text())["points"]]
        sound = all(p.definition == "branch" and is_number(p.tokens) and all(v is None or is_number(v) for v in p[2:]) for p in points)
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{path}: damaged; delete it, and `scaling-jax branch` with the same flags writes it again")
    return points


def write_laws(
    workdir: str | Path, found: dict[str, list[CriticalBatch]], definitions: Sequence[str] = tuple(_LOOKS)
) -> dict[str, PowerLaw]:
    """Fits each definition's law and returns them by name; those of `definitions` it writes to DIR/laws/<definition>.json.

    A definition with fewer than three bounded points has no law, and keeps no file of an earlier one.
    """
    directory = Path(workdir) / LAWS
    laws = {definition: fitted for definition, points in found.items() if (fitted := law(points)) is not None}
    for definition in definitions:
        path = directory / f"{definition}.json"
        if definition in laws:
            directory.mkdir(exist_ok=True)
            write_law(path, definition, laws[definition])
        else:
            path.unlink(missing_ok=True)
    return laws


def critical_batch_figure(
    found: dict[str, list[CriticalBatch]],
    laws: dict[str, PowerLaw],
    records: list[dict],
    path: Target,
    summary: dict[str, Any] | None = None,
) -> bool:
    """The critical batch in tokens against tokens trained on, log-log, one curve a definition; beside it the noise scale of each block.

    Drawn are the points with their 95% intervals (an arrow where one has an open end; from the lower end where |G|² came out below zero
    and there is no value), the law of each definition over its own points, a guide of slope 1 through the middle of all, and the batch
    size of the run. The blocks' noise scale is the running estimate, from where its interval is known and 2% of the tokens on.

    Args:
      found, laws: as `critical_batches` and `write_laws` return them.
      records: training records with `tokens`, `batch_tokens` and, for the blocks, `noise_scale_tokens/layers` and
        `noise_scale_tokens_low/layers`, lists of one number a block; the same after `preconditioned_`.
      path: the PNG to write, or files by format.
      summary: optional `name` (title).

    Returns:
      Whether there was anything to draw. If not, the figure says "no data".
    """
    shown = {definition: points for definition, values in found.items() if len(points := _points(values))}
    if not shown:
        return no_data(path)
    batch = known_points(records, "batch_tokens")
    last = column(records, "tokens").max(initial=0.0, where=np.isfinite(column(records, "tokens")))
    tokens = np.concatenate([[TRANSIENT * last, last] if last else [], *(points[:, 0] for points in shown.values())])
    batch = batch[batch[:, 0] >= tokens.min()]
    layers = {title: both for title, key in _LAYERS.items() if (both := _layers(records, key, TRANSIENT * last)) is not None}

    def draw(figure):
        left, *right = figure.subplots(1, 1 + len(layers), sharey=True, squeeze=False, width_ratios=(1.35, *[1] * len(layers)))[0]
        bottom, top = _limits(list(shown.values()), batch, [values for _, values in layers.values()])
        left.set(yscale="log", ylim=(bottom, top))
        for definition, points in shown.items():
            _draw_points(left, points, definition, laws.get(definition), (bottom, top))
        _draw_guide(left, np.concatenate(list(shown.values())))
        for axes, (title, (at, values)) in zip(right, layers.items(), strict=True):
            _draw_layers(axes, at, values, title, with_bar=axes is right[-1])
        for axes in (left, *right):
            draw_batch(axes, batch, _BATCH if axes is left else None)
            token_axis(axes, tokens, log=True)
            axes.set_xlim(tokens.min() / 1.15, tokens.max() * 1.15)
            axes.grid(color="#e6e6e6", linewidth=0.8)
        label_tokens(left.yaxis, bottom, top)
        left.set_ylabel("critical batch size (tokens)")
        name = (summary or {}).get("name", "")
        if right:
            left.set_title("whole model")
            figure.suptitle(name or None, x=0.01, ha="left", fontsize=13)
        else:
            left.set_title(name)
        handles, labels = left.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: labels[i] in (_GUIDE, _BATCH))
        figure.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="outside lower center",
            ncols=2 if right else 1,
            labelspacing=0.35,
            title="Points with 95% intervals; exponents ± standard error.",
            title_fontsize=11,
        )

    save_figure(path, ((7.2, 6.2), (11.5, 5.8), (15.0, 5.8))[len(layers)], draw)
    return True


def _points(values: list[CriticalBatch]) -> np.ndarray:
    """[points, 4]: tokens, batch, low, high, nan where None; of those where tokens and either the batch or its lower end are known."""
    points = np.array([[math.nan if v is None else v for v in value[1:]] for value in values], float).reshape(-1, 4)
    return points[np.isfinite(points[:, 0]) & np.isfinite(points[:, 1:3]).any(axis=1)]


def _draw_points(axes, points: np.ndarray, definition: str, fitted: PowerLaw | None, edges: tuple[float, float]) -> None:
    name, colour, marker = _LOOKS[definition]
    tokens, value, low, high = points.T
    power = " (too few bounded points for a fit)"
    if fitted is not None:
        power = f" ∝ tokens$^{{\\,{fitted.exponent:z.2f} \\pm {fitted.exponent_se:.2f}}}$"
    below = np.where(np.isfinite(low), value - low, 0.0)
    above = np.where(np.isfinite(high), high - value, 0.0)
    axes.errorbar(tokens, value, [below, above], fmt=marker, color=colour, elinewidth=1.5, zorder=4, label=name + power, **MARKER)
    arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    for x, y, lower, upper in points:
        start = y if math.isfinite(y) else lower
        if math.isfinite(lower) and not math.isfinite(upper):
            axes.annotate("", (x, edges[1]), (x, start), arrowprops=arrow)
        elif math.isfinite(upper) and not math.isfinite(lower):
            axes.annotate("", (x, edges[0]), (x, start), arrowprops=arrow)
    if fitted is not None:
        bounded = np.isfinite(points).all(axis=1)  # what it was fitted to, unless there are no intervals at all
        at = tokens[bounded] if bounded.any() else tokens
        ends = np.array([at.min(), at.max()])
        axes.plot(ends, fitted(ends), color=colour, linewidth=1.5, zorder=3)


def _draw_guide(axes, points: np.ndarray) -> None:
    tokens, value = points[np.isfinite(points[:, 1])].T[:2]
    if len(tokens) < 2:
        return
    middle = math.exp(np.mean(np.log(tokens))), math.exp(np.mean(np.log(value)))
    ends = np.array([tokens.min() / 1.15, tokens.max() * 1.15])
    axes.plot(ends, middle[1] * ends / middle[0], color=GREY, linestyle=":", linewidth=1.3, label=_GUIDE)


def _layers(records: list[dict], key: str, from_tokens: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens [records] and noise scale [records, blocks], nan where it or its interval is unknown; None where nothing is known."""
    low = key + "_low/layers"
    rows = [r for r in records if r.get(f"{key}/layers") and r.get(low) and r.get("tokens") is not None and r["tokens"] >= from_tokens]
    if not rows:
        return None
    values, known = (np.array([r[name] for r in rows], float) for name in (f"{key}/layers", low))
    values = np.where(np.isfinite(known) & (values > 0), values, np.nan)
    return (column(rows, "tokens"), values) if np.isfinite(values).any() else None


def _draw_layers(axes, tokens: np.ndarray, values: np.ndarray, title: str, with_bar: bool) -> None:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    depth = values.shape[1]
    colours = matplotlib.colormaps["viridis"](np.linspace(0.25, 0.9, depth))  # its yellow end is lost on white, the other on black
    for block in range(depth):
        known = np.isfinite(values[:, block])
        marker = "." if known.sum() == 1 else ""
        axes.plot(tokens, values[:, block], color=colours[block], linewidth=1.8 if depth <= 8 else 1.2, marker=marker)
    axes.set_title(f"{title} by block" if depth > 1 else f"{title} of the one block")
    if depth > 1 and with_bar:
        bar = ScalarMappable(BoundaryNorm(np.arange(depth + 1) - 0.5, depth), ListedColormap(colours))
        axes.figure.colorbar(bar, ax=axes, label="block", ticks=MaxNLocator(8, integer=True))


def _limits(points: list[np.ndarray], batch: np.ndarray, layers: list[np.ndarray]) -> tuple[float, float]:
    """Axis limits from the values; an interval's end only where it is near, for one can be very far."""
    centres = [batch[:, 1], *([np.nanmin(values), np.nanpercentile(values, 99)] for values in layers)]
    for each in points:  # a point without value begins at its lower end
        centres.append(np.where(np.isfinite(each[:, 1]), each[:, 1], each[:, 2]))
    centres = np.concatenate(centres)
    ends = np.concatenate([each[:, 2:].ravel() for each in points])
    ends = ends[np.isfinite(ends) & (ends > centres.min() / _REACH) & (ends < centres.max() * _REACH)]
    bottom, top = min([centres.min(), *ends]), max([centres.max(), *ends])
    margin = 1.25 * (top / bottom) ** 0.04
    return bottom / margin, top * margin
