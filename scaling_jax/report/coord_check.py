"""What a coordinate check shows: the table of slopes, the verdict and a figure for each axis."""

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.coord_check.measure import ACTIVATION, CHANGE, DECAY, EPSILON, UPDATE, Coordinate
from scaling_jax.coord_check.run import SLOPES_FILE, VERDICT_FILE, figure_file
from scaling_jax.coord_check.verdict import Expected, Slope, by_change, passed, slopes, worst
from scaling_jax.report.figures import save_figure

_BAD, _FINE = "#D55E00", "#000000"
_COLUMNS = 5
_FORWARD = (
    "embedding",
    "q",
    "k",
    "v",
    "attention scale",
    "attention logits",
    "attention output",
    "MLP hidden",
    "MLP output",
    "residual",
    "logits",
    "target logit",
)


def report_check(coordinates: Sequence[Coordinate], expected: Expected, out: str | Path) -> tuple[str, bool]:
    """Writes slopes.csv, verdict.json and coord_check_{width,depth}.png to `out`; returns the table as text, and whether all passed."""
    out = Path(out)
    rows = slopes(coordinates, expected)
    with (out / SLOPES_FILE).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Slope._fields)
        writer.writerows(["" if value is None else value for value in row] for row in rows)
    axes = list(dict.fromkeys(row.axis for row in rows))
    furthest = sorted(worst(rows), key=lambda row: (row.axis != "width", _place(row.quantity, row.kind)))
    verdicts = {axis: passed(row for row in rows if row.axis == axis) for axis in axes}
    verdict = {"passed": all(verdicts.values()), "axes": verdicts, "worst": [row._asdict() for row in furthest]}
    (out / VERDICT_FILE).write_text(json.dumps(verdict, indent=1) + "\n")
    figures = []
    for axis in axes:
        figures.append(out / figure_file(axis))
        coord_figure([c for c in coordinates if c.axis == axis], [row for row in rows if row.axis == axis], figures[-1])
    lines = [_table(furthest), ""]
    for axis, ok in verdicts.items():
        failed = [row.kind for row in furthest if row.axis == axis and not row.ok]
        named = ", ".join(dict.fromkeys(failed))
        lines.append(f"{axis:<8}{'pass' if ok else f'FAIL: {named}'}")
    if "width" in axes and not expected.growing_heads:
        lines.append("note    head_dim was the same at every width: its part in attention was not examined; --heads=N does that")
    lines += [f"{'figure':<8}{path}" for path in figures]
    return "\n".join(lines), verdict["passed"]


def _place(quantity: str, kind: str) -> tuple[int, int]:
    """Where a row or panel stands: activations in the order of the forward pass, then updates, then decay."""
    known = [i for i, name in enumerate(_FORWARD) if kind.startswith(name)]
    return {ACTIVATION: 0, CHANGE: 0, UPDATE: 1, DECAY: 2, EPSILON: 3}[quantity], (known[-1] if known else len(_FORWARD))


def _table(furthest: Sequence[Slope]) -> str:
    """Each quantity at its worst step."""
    head = ("axis", "quantity", "kind", "step", "slope", "± se", "wanted", "tolerance", "")
    body = [
        (
            row.axis,
            row.quantity,
            row.kind,
            str(row.step or ""),
            ("zero" if row.ok else "none") if row.slope is None else f"{row.slope:+.3f}",
            "" if row.se is None else f"{row.se:.3f}",
            _wanted(row),
            f"± {row.tolerance:.2g}",
            "" if row.ok else "FAIL",
        )
        for row in furthest
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    numbers = range(3, 8)
    return "\n".join(
        "  ".join(cell.rjust(w) if i in numbers else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in (head, *body)
    )


def coord_figure(coordinates: Sequence[Coordinate], rows: Sequence[Slope], path: str | Path) -> None:
    """One panel for each kind of activation and of update, in it one curve for each step, mean over seeds against size.

    Titles give the slope at the worst step and what it should be, in red where it is too far off. The residual stream and
    the logits are shown by their change since the first step.
    """
    means: dict[tuple[str, str], dict[int, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for c in coordinates:
        if c.quantity == UPDATE or c.quantity == (CHANGE if by_change(c.kind) else ACTIVATION):
            means[c.quantity, c.kind][c.step][c.size].append(c.value)
    judged = {(row.quantity, row.kind): row for row in worst(rows)}
    panels = sorted(means, key=lambda panel: _place(*panel))
    axis = coordinates[0].axis

    def draw(figure: Any) -> None:
        import matplotlib

        grid = figure.subplots(-(-len(panels) // _COLUMNS), _COLUMNS, squeeze=False).ravel()
        last = max(c.step for c in coordinates)
        colours = matplotlib.colormaps["viridis_r"]
        for axes, panel in zip(grid, panels, strict=False):
            for step, by_size in sorted(means[panel].items()):
                sizes = sorted(by_size)
                values = np.array([np.mean(by_size[size]) for size in sizes])
                values[~(values > 0)] = np.nan
                axes.plot(sizes, values, color=colours(0.1 + 0.9 * (step - 1) / max(1, last - 1)), marker=".", linewidth=1.2)
            _label(axes, panel, judged.get(panel))
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            low, high = axes.get_ylim()
            if not low > 0:  # no curve at all
                low = high = 1.0
            centre = np.sqrt(low * high)
            axes.set_ylim(min(low, centre / 4), max(high, centre * 4))  # flat curves look flat
            axes.set_xlabel(axis, fontsize=9)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(1, last), colours)
        figure.colorbar(scale, ax=grid.tolist(), label="step", shrink=0.5, ticks=range(1, last + 1))

    save_figure(path, (3.4 * _COLUMNS, 2.7 * -(-len(panels) // _COLUMNS)), draw)


def _wanted(row: Slope) -> str:
    return f"{row.expected:+.2g}" if row.expected else "0"


def _label(axes: Any, panel: tuple[str, str], row: Slope | None) -> None:
    quantity, kind = panel
    name = {UPDATE: f"Δ {kind.removeprefix('blocks.')} / lr", CHANGE: f"{kind}, change"}.get(quantity, kind)
    colour, slope = _FINE, ""
    if row is not None:
        found = "none" if row.slope is None else f"{row.slope:+.2f}"
        slope, colour = f"\nslope {found}, wanted {_wanted(row)}", _FINE if row.ok else _BAD
    axes.set_title(name + slope, color=colour, fontsize=10)
    axes.tick_params(labelsize=8)
