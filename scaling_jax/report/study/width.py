"""Figures across tokens and widths: what a wrong learning rate costs, whether the best one transfers, and what B_crit is a function of."""

from typing import Any

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import counted
from scaling_jax.report.figures import GREY
from scaling_jax.report.study.lr import best_rates, horizon, spread
from scaling_jax.report.study.plot import Plot, Source, amount, listed, need, one_setting, plot, power, runs_in, short
from scaling_jax.report.study.style import amounts, grid, legend, looks, name_of, panels, plain_log, size

_MEASURES = {"sensitivity": "sensitivity (nats)", "curvature": "curvature d²L/d(ln η)² (nats)"}
_SIZES = 10
_PANELS = 4


def sensitivity(source: Source) -> Plot:
    """Mean excess loss over a stated range of η, and the local curvature, against T by size."""
    found = source.finding("sensitivity")
    points = found.points.assign(params=found.points["params"].fillna(0.0))
    if points["tokens"].nunique() < 2:
        raise UserError("there is one horizon")
    measures = [name for name in _MEASURES if name in points and (points[name] > 0).sum() >= 2]
    if not measures:
        raise UserError("no cell has a sensitivity or a curvature")
    sizes = spread(points["params"], _SIZES)
    points = points[points["params"].isin(sizes)]
    look = looks(sizes)
    middle = points.groupby(["params", "tokens"])[measures].median().reset_index()

    def draw(figure):
        drawn = panels(figure, len(measures))
        for axes, name in zip(drawn, measures, strict=True):
            for params in sizes:
                own, line = points[points["params"] == params], middle[middle["params"] == params]
                color = look[params]["color"]
                axes.plot(own["tokens"], own[name], linestyle="", marker=".", markersize=4, alpha=0.5, color=color)
                axes.plot(
                    line["tokens"],
                    line[name],
                    linewidth=1.8,
                    markersize=5.5,
                    label=name_of("N", params) if params else None,
                    **look[params],
                )
            fitted = found.fits.get(name)
            if fitted is not None and fitted.identified:
                x = np.geomspace(points["tokens"].min(), points["tokens"].max(), 30)
                over = {"tokens": x, "params": np.full(30, sizes[len(sizes) // 2])}
                axes.plot(x, fitted.predict(over), color=GREY, linewidth=1.5, linestyle="--", label="power law")
            known = points[name][points[name] > 0]
            amounts(axes.xaxis, points["tokens"], "T (tokens)")
            plain_log(axes.yaxis, known)
            axes.set_ylabel(_MEASURES[name])
            grid(axes)
        legend(figure, drawn)

    span = points["range_of_lr"].iloc[0] if "range_of_lr" in points else None
    laws = [
        f"{name} T^{power(fitted.values['tokens_exponent'])}"
        for name, fitted in found.fits.items()
        if fitted.identified and name in measures
    ]
    what = f" Sensitivity is the mean over ln η, within a factor {short(span)} about η*, of min(L, L_init) − L*." if span else ""
    caption = (
        f"What a wrong learning rate costs, against tokens: {counted(len(points), 'cell')} (dots; a size, batch size and horizon each), "
        "medians over batch sizes joined, "
        f"from {counted(found.runs, 'run')}.{what}{f' Power laws: {listed(laws)}.' if laws else ''} To be seen: whether the loss grows "
        "less sensitive with T, and whether sizes agree."
    )
    return plot(
        "sensitivity", "Sensitivity to the learning rate against tokens", caption, points, size(len(measures), each=(4.4, 3.8)), draw
    )


def transfer(source: Source) -> Plot:
    """Loss against η for every width at one B and T, minima joined; a panel for each parametrization, or for several T."""
    need(source.rows, "width", "lr", "batch_tokens")
    rows, setting = one_setting(source.rows, but=("parametrization", "depth", "head_dim"))
    if rows["width"].nunique() < 2:
        raise UserError("the table has one width")
    at = horizon(rows)
    ways = list(rows["parametrization"].dropna().unique()) if "parametrization" in rows else []
    cells = _cells(rows, at, ways)
    if not cells:
        raise UserError("no batch size and horizon has several widths at several learning rates")
    parts, least = [], []
    for label, own in cells:
        mean = own.groupby(["width", "lr"])["loss"].agg(["mean", "count"]).reset_index().rename(columns={"mean": "loss", "count": "runs"})
        parts.append(mean.assign(panel=label))
        least.append(_least(source, own, at).assign(panel=label))
    data, minima = pandas.concat(parts), pandas.concat(least)
    look = looks(data["width"])

    def draw(figure):
        drawn = panels(figure, len(cells), sharex=True, sharey=True)
        for axes, (label, _) in zip(drawn, cells, strict=True):
            for width in look:
                own = data[(data["panel"] == label) & (data["width"] == width)]
                axes.plot(own["lr"], own["loss"], linewidth=1.5, markersize=4, label=f"width {width:g}", **look[width])
            joined = minima[(minima["panel"] == label) & (minima["bound"] == "")].sort_values("width")
            bounds = minima[(minima["panel"] == label) & (minima["bound"] != "")]
            axes.plot(joined["lr"], joined["loss"], color=GREY, linewidth=1.5, linestyle="--", zorder=4)
            axes.plot(
                joined["lr"],
                joined["loss"],
                "o",
                markersize=9,
                markerfacecolor="none",
                markeredgecolor="#000000",
                label="minimum",
                zorder=5,
            )
            for _, bound in bounds.iterrows():
                axes.plot(
                    bound["lr"],
                    bound["loss"],
                    {"low": "<", "high": ">", "lowest": "d"}[bound["bound"]],
                    markerfacecolor="none",
                    markeredgecolor="#000000",
                    markersize=8,
                )
            axes.set_title(label, fontsize=12)
            grid(axes)
        for axes in drawn[-2:]:
            axes.set_xlabel("learning rate η")
        for axes in drawn[:: min(2, len(cells))]:
            axes.set_ylabel("held-out loss")
        plain_log(drawn[0].xaxis, data["lr"])
        plain_log(drawn[0].yaxis, data["loss"])
        drawn[0].set_ylim(data["loss"].min() * 0.98, np.percentile(data["loss"], 99.5) * 1.02)
        legend(figure, drawn)

    told = [label for label, _ in cells] if len({label.split(",")[0] for label, _ in cells}) > 1 else [cells[-1][0]]
    shifts = [_shift(label, minima[minima["panel"] == label]) for label in told]
    caption = (
        f"Held-out loss (nats per token) against the learning rate for {counted(data['width'].nunique(), 'width')}, mean over seeds: "
        f"{counted(runs_in(pandas.concat([own for _, own in cells])), 'run')}. "
        "Rings are minima, joined from width to width; open triangles are bounds at the edge of a grid."
        f"{' Diamonds are lowest losses, of which no more is known.' if (minima['bound'] == 'lowest').any() else ''}{setting} "
        f"{' '.join(filter(None, shifts))} "
        "To be seen: whether the minima stand above one another (the best rate transfers) or move with width."
    )
    what = minima["bound"].map({"": "minimum", "lowest": "lowest"}).fillna("bound")
    table = pandas.concat([data.assign(what="mean loss"), minima.assign(what=what)])
    return plot("width_transfer", "Transfer of the learning rate across widths", caption, table, size(len(cells), one=(6.4, 5.0)), draw)


def _cells(rows: pandas.DataFrame, at: str, ways: list[str]) -> list[tuple[str, pandas.DataFrame]]:
    """Panels: of each parametrization the batch in the middle at the longest horizon; of a single one several horizons."""
    found = []
    for way in ways or [""]:
        of = rows[rows["parametrization"] == way] if way else rows
        tried = of.groupby(["batch_tokens", at]).filter(
            lambda cell: cell["width"].nunique() > 1 and cell.groupby("width")["lr"].nunique().max() > 1
        )
        if not len(tried):
            continue
        batches = sorted(tried["batch_tokens"].unique())
        of = tried[tried["batch_tokens"] == batches[len(batches) // 2]]
        horizons = spread(of[at], 1 if len(ways) > 1 else _PANELS) if len(ways) <= 1 else [of[at].max()]
        for tokens in horizons:
            where = f"B = {amount(batches[len(batches) // 2])}, T = {amount(tokens)}"
            found.append((f"{way}, {where}" if len(ways) > 1 else where, of[of[at] == tokens]))
    return found


def _least(source: Source, own: pandas.DataFrame, at: str) -> pandas.DataFrame:
    """Minima of the cell's widths by the analysis; without one, the lowest losses, as bounds."""
    columns = ["width", "lr", "loss", "bound"]
    lowest = own.loc[own.groupby("width")["loss"].idxmin()].assign(bound="lowest")[columns]
    try:
        points = best_rates(source)
    except UserError:
        return lowest
    points = points[(points["tokens"] == own[at].iloc[0]) & (points["batch_tokens"] == own["batch_tokens"].iloc[0])]
    for name in points.columns:
        if (
            name in own
            and name not in ("params", "width", "lr", "loss", "tokens", "batch_tokens", "depth", "head_dim")
            and own[name].nunique() == 1
        ):
            points = points[points[name] == own[name].iloc[0]]
    return pandas.concat([points[columns], lowest[~lowest["width"].isin(points["width"])]])


def _shift(label: str, minima: pandas.DataFrame) -> str:
    inside = minima[minima["bound"] == ""].sort_values("width")
    if len(inside) < 2:
        return ""
    first, last = inside.iloc[0], inside.iloc[-1]
    ends = [f"{short(at['lr'])} at width {at['width']:g}" for at in (first, last)]
    return f"At {label} the minimum goes from η = {ends[0]} to {ends[1]}."


def growth(source: Source) -> Plot:
    """The noise scale near the best rates against tokens, and against the loss: which of them puts the sizes on one line."""
    found = source.finding("critical_growth")
    points = found.points[~found.points["censored"].astype(bool)]
    if "definition" in points:
        points = points[points["definition"] == points["definition"].iloc[0]]
    sizes = spread(points["params"], _SIZES)
    points = points[points["params"].isin(sizes)]
    look = looks(sizes)
    ways = (("tokens", "T (tokens)", "growth_tokens"), ("loss", "loss (nats per token)", "growth_loss"))

    def draw(figure):
        drawn = panels(figure, 2, sharey=True)
        for axes, (name, label, law) in zip(drawn, ways, strict=True):
            for params in sizes:
                own = points[points["params"] == params]
                axes.plot(
                    own[name], own["batch_crit_tokens"], linestyle="", markersize=5, alpha=0.8, label=name_of("N", params), **look[params]
                )
            _line(axes, found.fits.get(law), name, points)
            grid(axes)
            if name == "tokens":
                amounts(axes.xaxis, points[name], label)
            else:
                plain_log(axes.xaxis, points[name])
                axes.set_xlabel(label)
                axes.invert_xaxis()
        amounts(drawn[0].yaxis, points["batch_crit_tokens"], "noise scale (tokens)")
        legend(figure, drawn)

    scatter = [f"{short(fitted.rms)} by {name}" for name, _, law in ways if (fitted := found.fits.get(law)) is not None]
    said = " ".join(found.statements[-2:]) if found.statements else ""
    caption = (
        "Gradient noise scale of runs near their best learning rate, against tokens and against the loss (falling to the right): "
        f"{len(points)} means from {counted(found.runs, 'run')}. "
        f"Dashed: one law for all sizes; scatter of ln B_crit about it {listed(scatter)}. {said} To be seen: in which panel the sizes "
        "lie on one line."
    )
    return plot("critical_growth", "Critical batch size: by tokens or by loss", caption, points, size(2, each=(4.4, 4.0)), draw)


def _line(axes: Any, fitted: Any, name: str, points: pandas.DataFrame) -> None:
    if fitted is not None and fitted.identified:
        x = np.geomspace(points[name].min(), points[name].max(), 30)
        axes.plot(x, fitted.predict({name: x}), color=GREY, linewidth=1.6, linestyle="--", label="one law for all sizes", zorder=1)


FIGURES = (
    ("sensitivity", "Sensitivity against tokens", sensitivity),
    ("width_transfer", "Transfer of the learning rate across widths", transfer),
    ("critical_growth", "Critical batch size by tokens or by loss", growth),
)
