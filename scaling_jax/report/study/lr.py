"""Figures of the best learning rate: where it was measured, and how it moves with batch size and tokens."""

from functools import partial
from typing import Any

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Finding, counted
from scaling_jax.report.figures import GREY
from scaling_jax.report.study.plot import Plot, Source, amount, listed, need, one_setting, plot, power, runs_in, sentence, short
from scaling_jax.report.study.style import MARKERS, amounts, arrows, below, grid, legend, looks, name_of, panels, plain_log, shades, size

_PANELS = 6  # batch sizes or horizons that have one each
_SIZES = 3  # sizes whose curves are drawn
RIVALS = {"color": "#cf5a3c", "linestyle": "-"}, {"color": "#2f78c8", "linestyle": "--"}, {"color": "#16907c", "linestyle": ":"}
_LR = "learning rate η"


def spread(values: Any, count: int) -> list[float]:
    """At most so many of the values, evenly chosen, both ends among them."""
    values = sorted({float(v) for v in values})
    return values if len(values) <= count else [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]


def horizon(rows: pandas.DataFrame) -> str:
    """The column of T that settings share: what was asked for, or what was seen."""
    return "horizon_tokens" if "horizon_tokens" in rows and rows["horizon_tokens"].notna().any() else "tokens"


def best_rates(source: Source) -> pandas.DataFrame:
    """The analysis' points that have a best learning rate or a bound on it.

    Raises:
      UserError: there are none, or no analysis.
    """
    points = source.finding("lr_optimum").points
    known = points[points["bound"].isin(["", "low", "high"]) & points["lr"].notna()]
    if not len(known):
        raise UserError("no batch size and horizon has three learning rates that did not diverge")
    return known


def sizes_of(source: Source) -> list[float]:
    return spread(source.rows["params"], _SIZES) if "params" in source.rows else [0.0]


def lr_curves(source: Source, place: int) -> Plot:
    """Held-out loss against η, a panel for each B and a curve for each T, of the size at this place."""
    need(source.rows, "lr", "batch_tokens", "loss")
    sizes = sizes_of(source)
    if place >= len(sizes):
        raise UserError("")  # there are not so many sizes: nothing is missing
    table = source.table if "params" in source.table else source.table.assign(params=0.0)
    rows, setting = one_setting(table[table["params"] == sizes[place]])
    at = horizon(rows)
    if rows.groupby(["batch_tokens", at])["lr"].nunique().max() < 2:
        raise UserError("no batch size and horizon has more than one learning rate")
    lost = rows[rows["status"] == "diverged"] if "status" in rows else rows.iloc[:0]
    kept = rows[rows["loss"].notna()]
    data = kept.groupby(["batch_tokens", at, "lr"])["loss"].agg(["mean", "count"]).reset_index()
    data = data.rename(columns={at: "tokens", "mean": "loss", "count": "runs"}).assign(what="mean loss")
    diverged = lost.groupby(["batch_tokens", at, "lr"]).size().reset_index(name="runs").rename(columns={at: "tokens"})
    minima = _minima(source, sizes[place], rows)
    batches = spread(data["batch_tokens"], _PANELS)
    look = looks(data["tokens"])
    top = _top(data)
    above = int((data["loss"] > top).sum())

    def draw(figure):
        drawn = panels(figure, len(batches), sharex=True, sharey=True)
        for axes, batch in zip(drawn, batches, strict=True):
            of = data[data["batch_tokens"] == batch]
            for tokens in look:
                curve = of[of["tokens"] == tokens]
                axes.plot(curve["lr"], curve["loss"], linewidth=1.3, markersize=3.5, label=name_of("T", tokens), **look[tokens])
                for _, least in minima[(minima["batch_tokens"] == batch) & (minima["tokens"] == tokens)].iterrows():
                    _mark(axes, least, look[tokens]["color"])
            crosses = np.unique(diverged["lr"][diverged["batch_tokens"] == batch])
            if len(crosses):
                axes.plot(crosses, np.full(len(crosses), top), "x", color=GREY, clip_on=False, label="diverged")
            axes.set_title(name_of("B", batch), fontsize=12)
            grid(axes)
        for axes in drawn[-2:]:
            axes.set_xlabel(_LR)
        plain_log(drawn[0].xaxis, data["lr"])
        plain_log(drawn[0].yaxis, data["loss"])
        drawn[0].set_ylim(data["loss"].min() * 0.98, top)
        for axes in drawn[::2]:
            axes.set_ylabel("held-out loss")
        legend(figure, drawn)

    all_batches = data["batch_tokens"].nunique()
    cut = f" {len(batches)} of {all_batches} batch sizes are drawn, evenly chosen." if len(batches) < all_batches else ""
    cut += f" {counted(above, 'mean')} above {short(top)} nats {'is' if above == 1 else 'are'} cut off." if above else ""
    inside, bound = int((minima["bound"] == "").sum()), int((minima["bound"] != "").sum())
    of = f" at N = {amount(sizes[place])}" if sizes[place] else ""
    caption = (
        f"Held-out loss (nats per token) against the learning rate{of}, a panel for each batch size B (tokens) and a curve for each T, "
        "mean over seeds: "
        f"{counted(runs_in(kept), 'run')}, {counted(len(data), 'mean')}. Large rings are minima of local parabolas ({inside}); open "
        "triangles are lowest losses "
        f"at the edge of their grid ({bound}), bounds that point to where the minimum may be; crosses at the top are rates at which a "
        f"run diverged ({len(diverged)}).{setting}{cut} "
        "To be seen: whether the minima lie inside the grids, and which way they move with T and B."
    )
    columns = ["what", "batch_tokens", "tokens", "lr", "loss", "runs"]
    marks = minima.assign(what=np.where(minima["bound"] == "", "minimum", "bound " + minima["bound"].astype(str)))
    table = pandas.concat([data, marks, diverged.assign(what="diverged")]).reindex(columns=columns)
    name = "lr_curves" if len(sizes) == 1 else f"lr_curves_n{int(sizes[place])}"
    return plot(name, f"Loss against learning rate{of}", caption, table, size(len(batches)), draw)


def _top(data: pandas.DataFrame) -> float:
    """Where the axis of losses ends: runs that all but diverged would flatten the others."""
    lowest = data.groupby(["batch_tokens", "tokens"])["loss"].min()
    room = max(0.6 * (lowest.max() - lowest.min()), 0.1 * lowest.max())
    return float(min(data["loss"].max() * 1.02, lowest.max() + room))


def _minima(source: Source, params: float, rows: pandas.DataFrame) -> pandas.DataFrame:
    """Of each cell: batch_tokens, tokens, lr, loss, and the side of the grid it is a bound on."""
    empty = pandas.DataFrame({"batch_tokens": [], "tokens": [], "lr": [], "loss": [], "bound": pandas.array([], dtype=object)})
    try:
        points = best_rates(source)
    except UserError:
        return empty
    if params:
        points = points[points["params"] == params]
    for name in points.columns:
        if name in rows and name not in ("params", "batch_tokens", "tokens", "lr", "loss") and rows[name].nunique() == 1:
            points = points[points[name] == rows[name].iloc[0]]
    return points.reindex(columns=empty.columns)


def _mark(axes: Any, least: pandas.Series, color: str) -> None:
    marker = {"": "o", "low": "<", "high": ">"}[least["bound"]]
    axes.plot(
        least["lr"], least["loss"], marker=marker, markersize=9 if marker == "o" else 7, markerfacecolor="none", markeredgecolor=color,
        markeredgewidth=1.6, zorder=5,
    )  # fmt: skip


def lr_against_tokens(source: Source) -> Plot:
    """η* against T, a line for each B, a panel for each size."""
    points, setting = one_setting(best_rates(source))
    if points["tokens"].nunique() < 2:
        raise UserError("there is one horizon")
    sizes = spread(points["params"].dropna(), _SIZES) or [0.0]
    points = points.assign(params=points["params"].fillna(0.0))
    points = points[points["params"].isin(sizes)]
    look = looks(points["batch_tokens"])
    if len(look) > 12:
        shown = spread(points["batch_tokens"], 12)
        points, look = points[points["batch_tokens"].isin(shown)], looks(shown)

    def draw(figure):
        drawn = panels(figure, len(sizes), sharex=True, sharey=True)
        for axes, params in zip(drawn, sizes, strict=True):
            for batch in look:
                of = points[(points["params"] == params) & (points["batch_tokens"] == batch)].sort_values("tokens")
                inside = of[of["bound"] == ""]
                error = 1.96 * inside["lr_log_se"].fillna(0).clip(upper=1.5)
                ends = [inside["lr"] * (1 - np.exp(-error)), inside["lr"] * (np.exp(error) - 1)]
                axes.errorbar(
                    inside["tokens"],
                    inside["lr"],
                    ends,
                    linewidth=1.4,
                    elinewidth=0.9,
                    markersize=5,
                    label=name_of("B", batch),
                    **look[batch],
                )
                bounds = of[of["bound"] != ""]
                arrows(axes, bounds["tokens"], bounds["lr"], bounds["bound"] == "high", look[batch]["color"])
            if len(sizes) > 1:
                axes.set_title(name_of("N", params), fontsize=12)
            grid(axes)
        below(drawn, lambda axis: amounts(axis, points["tokens"], "T (tokens)"))
        plain_log(drawn[0].yaxis, points["lr"])
        drawn[0].set_ylabel("best learning rate η*")
        legend(figure, drawn)

    slopes = _slopes(points[points["bound"] == ""], "tokens", "batch_tokens")
    said = [f"T^{power(slope)} at B = {amount(value)}" for value, slope in _ends(slopes)]
    caption = (
        f"Best learning rate against tokens for each batch size: {int((points['bound'] == '').sum())} minima of local parabolas "
        f"with 95% intervals, and {int((points['bound'] != '').sum())} bounds (open triangles), from "
        f"{counted(int(points['runs'].sum()), 'row')} of the table.{setting} "
        f"{'Straight lines through them: ' + listed(said) + '. ' if said else ''}To be seen: the direction that the best rate moves in "
        "with T, and whether it is the same at small and large B."
    )
    return plot("lr_against_tokens", "Best learning rate against tokens", caption, points, size(len(sizes)), draw)


def _slopes(points: pandas.DataFrame, x: str, by: str) -> dict[float, float]:
    """Exponents of lr in x, with a level for each size, by the values of a column."""
    found = {}
    for value, of in points.groupby(by):
        log_x, log_y = np.log(of[x].astype(float)), np.log(of["lr"].astype(float))
        log_x, log_y = log_x - log_x.groupby(of["params"]).transform("mean"), log_y - log_y.groupby(of["params"]).transform("mean")
        if (log_x**2).sum() > 0:
            found[float(value)] = float((log_x * log_y).sum() / (log_x**2).sum())
    return found


def _ends(slopes: dict[float, float]) -> list[tuple[float, float]]:
    values = sorted(slopes)
    return [(v, slopes[v]) for v in dict.fromkeys([*values[:1], *values[-1:]])]


def lr_against_batch(source: Source) -> Plot:
    """η* against B, a panel for each T (and N, where a form has a power of it), with every rival form's fit."""
    points, setting = one_setting(best_rates(source))
    points = points.assign(params=points["params"].fillna(0.0))
    if points["batch_tokens"].nunique() < 2:
        raise UserError("there is one batch size")
    surface = source.findings.get("lr_surface")
    fits = surface.fits if isinstance(surface, Finding) else {}
    of_size = any("params" in fitted.form.inputs for fitted in fits.values())
    cells = _panels_of(points, ["tokens", "params"] if of_size else ["tokens"])
    if not cells:
        raise UserError("no horizon has more than one batch size")
    points = pandas.concat([own.assign(panel=name) for name, own in cells.items()])
    sizes = sorted(points["params"].unique())
    lines = _rival_lines(fits, cells)
    colors = dict(zip(sizes, shades(len(sizes)), strict=True))

    def draw(figure):
        drawn = panels(figure, len(cells), sharex=True, sharey=True)
        for axes, (title, of) in zip(drawn, cells.items(), strict=True):
            for params, marker in zip(sizes, MARKERS * 3, strict=False):
                _measured(axes, of[of["params"] == params], params, sizes, marker, colors[params])
            for name, look in zip(fits, RIVALS, strict=False):
                curve = lines[(lines["form"] == name) & (lines["panel"] == title)]
                axes.plot(curve["batch_tokens"], curve["lr"], linewidth=1.7, label=name, zorder=3, **look)
                if surface.best == name and curve["low"].notna().all():
                    axes.fill_between(curve["batch_tokens"], curve["low"], curve["high"], color=look["color"], alpha=0.15, linewidth=0)
            axes.set_title(title, fontsize=12)
            grid(axes)
        below(drawn, lambda axis: amounts(axis, points["batch_tokens"], "batch size B (tokens)"))
        plain_log(drawn[0].yaxis, points["lr"])
        low, high = points["lr"].min(), points["lr"].max()
        drawn[0].set_ylim(low / 1.5, high * 1.5)
        for axes in drawn[::2]:
            axes.set_ylabel("best lr η*")
        legend(figure, drawn)

    inside, rows = int((points["bound"] == "").sum()), counted(int(points["runs"].sum()), "row")
    caption = (
        f"Best learning rate against batch size in {counted(len(cells), 'panel')} of one T{' and N' if of_size else ''}: {inside} minima "
        f"with 95% intervals and {len(points) - inside} bounds (open triangles, not fitted), from {rows} "
        f"of the table.{setting} {_said(surface)}To be seen: where the rise with B ends, and whether the data tell the forms apart there."
    )
    data = pandas.concat([points.assign(what="measured"), lines.assign(what="fit")])
    return plot("lr_against_batch", "Best learning rate against batch size, with rival forms", caption, data, size(len(cells)), draw)


def _panels_of(points: pandas.DataFrame, by: list[str]) -> dict[str, pandas.DataFrame]:
    """The points of some cells, evenly chosen of those with the most batch sizes, by their titles."""
    several = points.groupby(by)["batch_tokens"].nunique()
    several = several[several >= max(2, several.max() - 2)]
    chosen = [several.index[int(i)] for i in spread(range(len(several)), _PANELS)]
    found = {}
    for values in chosen:
        key = dict(zip(by, values if isinstance(values, tuple) else (values,), strict=True))
        own = points[np.all([points[name] == value for name, value in key.items()], axis=0)]
        size_of = f"{name_of('N', key['params'])}, " if key.get("params") else ""
        found[f"{size_of}{name_of('T', key['tokens'])}"] = own
    return found


def _measured(axes: Any, own: pandas.DataFrame, params: float, sizes: list[float], marker: str, color: str) -> None:
    """Minima with their intervals, sizes beside one another; and bounds."""
    inside, bounds = own[own["bound"] == ""], own[own["bound"] != ""]
    error = 1.96 * inside["lr_log_se"].fillna(0).clip(upper=1.5)
    ends = [inside["lr"] * (1 - np.exp(-error)), inside["lr"] * (np.exp(error) - 1)]
    label = name_of("N", params) if params and len(sizes) <= 8 and len(own) else None
    beside = 1 + 0.05 * (sizes.index(params) - (len(sizes) - 1) / 2) if len(sizes) <= 4 else 1
    axes.errorbar(
        inside["batch_tokens"] * beside, inside["lr"], ends, linestyle="", marker=marker, markersize=5.5, elinewidth=1, color=color,
        label=label, zorder=4,
    )  # fmt: skip
    arrows(axes, bounds["batch_tokens"], bounds["lr"], bounds["bound"] == "high", color)


def _said(surface: Any) -> str:
    if not isinstance(surface, Finding):
        return f"No form is fitted: {surface or 'there was no analysis'}. "
    names = listed(list(surface.fits))
    comparison = surface.comparison
    verdict = f" {sentence(comparison.statement)}" if comparison is not None else ""
    return f"Lines: the fits of {names} to all cells together{', the band is 95% of ' + surface.best if surface.best else ''}.{verdict} "


def _rival_lines(fits: dict[str, Any], cells: dict[str, pandas.DataFrame]) -> pandas.DataFrame:
    """The fits along B in each panel."""
    batches = np.concatenate([own["batch_tokens"].to_numpy(float) for own in cells.values()])
    batch = np.geomspace(batches.min() / 1.3, batches.max() * 1.3, 40)
    parts = []
    for name, fitted in list(fits.items())[: len(RIVALS)]:
        for title, own in cells.items():
            tokens = float(own["tokens"].iloc[0])
            x = {"batch_tokens": batch, "tokens": np.full(40, tokens), "params": np.full(40, own["params"].median())}
            low, high = fitted.interval(x)
            frame = {
                "form": name,
                "panel": title,
                "tokens": tokens,
                "batch_tokens": batch,
                "lr": fitted.predict(x),
                "low": low,
                "high": high,
            }
            parts.append(pandas.DataFrame(frame))
    columns = ["form", "panel", "tokens", "batch_tokens", "lr", "low", "high"]
    return pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame(columns=columns)


FIGURES = (
    *((f"lr_curves_{i}", "Loss against learning rate", partial(lr_curves, place=i)) for i in range(_SIZES)),
    ("lr_against_tokens", "Best learning rate against tokens", lr_against_tokens),
    ("lr_against_batch", "Best learning rate against batch size", lr_against_batch),
)
