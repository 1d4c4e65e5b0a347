"""Figures of the laws of loss in size, data, steps and compute."""

from typing import Any

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Finding, counted
from scaling_jax.report.study.lr import RIVALS, spread
from scaling_jax.report.study.plot import Plot, Source, need, plot, runs_in, same_sizes, sentence, short
from scaling_jax.report.study.style import amounts, flops, grid, legend, looks, name_of, plain_log, shades

_SIZES = 12  # sizes that have a colour of their own
_INCHES = (6.4, 4.8)


def of_size(source: Source) -> Plot:
    return _one_variable(source, "kaplan_n", "loss_n", "Loss against size, L(N)", "params", "N (parameters, without embeddings)", amounts)


def of_data(source: Source) -> Plot:
    return _one_variable(source, "kaplan_d", "loss_d", "Loss against data, L(D)", "data_tokens", "D (tokens of data)", amounts)


def _one_variable(source: Source, law: str, name: str, title: str, x: str, label: str, axis: Any) -> Plot:
    """The points of a law of one variable, its rivals' curves and the band of the one in use."""
    found = source.finding(law)
    points = found.points.assign(censored=found.points.get("censored", False))
    lines = _curves(found, {x: points[x]})

    def draw(figure):
        axes = figure.subplots()
        _draw_curves(axes, found, lines, x)
        _draw_points(axes, points[x], points["loss"], points["censored"])
        axis(axes.xaxis, points[x], label)
        plain_log(axes.yaxis, points["loss"])
        axes.set_ylim(*_limits(points["loss"]))
        axes.set_ylabel("loss (nats per token)")
        grid(axes)
        legend(figure, [axes])

    caption = (
        f"{_measured(points)}, from {counted(found.runs, 'run')}. {_law_said(found)} The band is 95% of it. To be seen: whether the "
        "points lie on a line, which a power law is here, "
        "or bend towards a floor."
    )
    return plot(name, title, caption, pandas.concat([points.assign(what="measured"), lines.assign(what="fit")]), _INCHES, draw)


def _measured(points: pandas.DataFrame) -> str:
    left = int(points["censored"].sum())
    hollow = f", {left} of them (hollow) not fitted" if left else ""
    return f"{counted(len(points), 'tuned loss').replace('losss', 'losses')}{hollow}"


def _law_said(found: Finding, form: str | None = None) -> str:
    """The law in use, or the one named, with its exponents; and what the comparison says."""
    fitted = found.fits.get(form or found.best or "")
    said = []
    if fitted is not None:
        parts = []
        for parameter in fitted.form.parameters:
            if parameter.name.startswith(("alpha", "beta")) or "exponent" in parameter.name:
                low, high = fitted.intervals[parameter.name]
                unknown = parameter.name in fitted.unidentified
                ends = "" if low is None or high is None else f" (95%: {short(low)} to {short(high)})"
                parts.append(
                    f"{parameter.name} not identified" if unknown else f"{parameter.name} = {short(fitted.values[parameter.name])}{ends}"
                )
        said.append(f"{'The law is' if form else 'The law in use is'} {fitted.form.formula}{', ' + ', '.join(parts) if parts else ''}.")
    if found.comparison is not None:
        said.append(sentence(found.comparison.statement))
    return " ".join(said)


def _curves(found: Finding, over: dict[str, Any], fixed: dict[str, float] | None = None) -> pandas.DataFrame:
    """Each fit along its one variable, a little beyond the points, with its 95% interval."""
    ((name, values),) = over.items()
    values = np.asarray(values, float)
    x = {name: np.geomspace(values.min() / 1.15, values.max() * 1.15, 40)} | {k: np.full(40, v) for k, v in (fixed or {}).items()}
    parts = []
    for form, fitted in found.fits.items():
        if set(fitted.form.inputs) <= set(x):
            low, high = fitted.interval(x)
            parts.append(pandas.DataFrame({"form": form, **x, "loss": fitted.predict(x), "low": low, "high": high}))
    return pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame(columns=["form", *x, "loss", "low", "high"])


def _draw_curves(axes: Any, found: Finding, lines: pandas.DataFrame, x: str) -> None:
    for form, look in zip(lines["form"].unique(), RIVALS, strict=False):
        curve = lines[lines["form"] == form]
        unknown = "" if found.fits[form].identified else " (not identified)"
        axes.plot(curve[x], curve["loss"], linewidth=1.8, label=f"{form}{unknown}", zorder=3, **look)
        if found.best == form and curve["low"].notna().all():
            axes.fill_between(curve[x], curve["low"], curve["high"], color=look["color"], alpha=0.15, linewidth=0)


def _draw_points(axes: Any, x: pandas.Series, y: pandas.Series, censored: pandas.Series, color: str = "#595959") -> None:
    hollow = censored.astype(bool)
    axes.plot(x[~hollow], y[~hollow], "o", color=color, markersize=5.5, zorder=4, label="measured")
    if hollow.any():
        axes.plot(x[hollow], y[hollow], "o", markerfacecolor="none", markeredgecolor=color, markersize=5.5, zorder=4, label="not fitted")


def _limits(values: pandas.Series) -> tuple[float, float]:
    """Of a log axis, by what was measured: a band can be very wide."""
    low, high = float(values.min()), float(values.max())
    room = max(1.05, (high / low) ** 0.35)
    return low / room, high * room


def of_compute(source: Source) -> Plot:
    """Tuned losses of every size against C = 6·N·T, the lower envelope, and its law."""
    need(source.rows, "params", "tokens", "loss")
    flops_of = 6 * source.rows["params"].astype(float) * source.rows["tokens"].astype(float)
    rows = source.rows.assign(params=same_sizes(source.rows["params"]), flops=flops_of)
    if rows["flops"].nunique() < 3:
        raise UserError("the table has fewer than three amounts of compute")
    lowest = rows.groupby(["params", "flops"])["loss"].min().reset_index()
    found = source.findings.get("kaplan_c")
    points = found.points if isinstance(found, Finding) else pandas.DataFrame(columns=["flops", "loss", "censored"])
    lines = _curves(found, {"flops": points["flops"]}) if isinstance(found, Finding) else pandas.DataFrame()
    sizes = spread(lowest["params"], _SIZES)
    look = looks(sizes)

    def draw(figure):
        axes = figure.subplots()
        scattered = lowest["params"].nunique() > _SIZES
        if scattered:
            axes.plot(lowest["flops"], lowest["loss"], ".", color="#595959", markersize=3, alpha=0.5, label="lowest loss of a size")
        else:
            for params in sizes:
                own = lowest[lowest["params"] == params]
                axes.plot(own["flops"], own["loss"], linewidth=1, markersize=4, alpha=0.9, label=name_of("N", params), **look[params])
        if len(lines):
            _draw_curves(axes, found, lines, "flops")
            inside = ~points["censored"].astype(bool)
            axes.plot(
                points["flops"][inside], points["loss"][inside], "o", markersize=9, markerfacecolor="none", markeredgecolor="#000000",
                label="frontier, fitted", zorder=5,
            )  # fmt: skip
        flops(axes.xaxis, "C = 6·N·T (FLOPs)")
        plain_log(axes.yaxis, lowest["loss"])
        axes.set_ylim(*_limits(lowest["loss"]))
        axes.set_ylabel("lowest loss (nats per token)")
        grid(axes)
        legend(figure, [axes])

    if isinstance(found, Finding):
        edge = int(points["censored"].sum())
        law = f"The frontier has {len(points)} points, {edge} of them with their best size at the edge of what was tried and not fitted. "
        law += f"{_law_said(found)} "
    else:
        law = f"No law of the frontier is fitted: {found or 'it was not analysed'}. "
    caption = (
        f"Lowest loss at each size and compute, {counted(lowest['params'].nunique(), 'size')}, from {counted(runs_in(rows), 'run')}. {law}"
        "To be seen: whether the sizes' courses cross, and whether the least loss at each compute is a line."
    )
    data = pandas.concat([lowest.assign(what="lowest"), points.assign(what="frontier"), lines.assign(what="fit")])
    return plot("loss_c", "Loss against compute, L(C), with its frontier", caption, data, (6.4, 5.2), draw)


def collapse(source: Source) -> Plot:
    """Kaplan et al., fig. 9: loss over that of unlimited data, against N^(α_N/α_D)/D; every size on one curve where L(N, D) holds."""
    found = source.finding("kaplan_nd")
    fitted = found.fits["kaplan_nd"]
    if not fitted.identified:
        raise UserError(f"L(N, D) is not identified: {'; '.join(fitted.unidentified.values())}")
    v = fitted.values
    points = found.points.assign(censored=found.points.get("censored", False))
    unlimited = (v["n_c"] / points["params"]) ** v["alpha_n"]
    power = v["alpha_n"] / v["alpha_d"]
    points = points.assign(
        ratio=points["loss"] / unlimited, shortage=v["d_c"] / points["data_tokens"] * np.exp(power * np.log(points["params"] / v["n_c"]))
    )
    points = points.assign(params=same_sizes(points["params"]))
    sizes = spread(points["params"], _SIZES)
    colors = dict(zip(sorted(points["params"].unique()), shades(points["params"].nunique()), strict=True))
    x = np.geomspace(points["shortage"].min() / 1.3, points["shortage"].max() * 1.3, 50)

    def draw(figure):
        axes = figure.subplots()
        for (params, own), marker in zip(points.groupby("params"), "osD^vP*X" * 100, strict=False):
            inside = ~own["censored"].astype(bool)
            label = name_of("N", params) if params in sizes else None
            axes.plot(
                own["shortage"][inside], own["ratio"][inside], linestyle="", marker=marker, color=colors[params], markersize=5, label=label
            )
            axes.plot(
                own["shortage"][~inside],
                own["ratio"][~inside],
                linestyle="",
                marker=marker,
                markerfacecolor="none",
                markeredgecolor=colors[params],
                markersize=5,
            )
        axes.plot(x, (1 + x) ** v["alpha_d"], color="#000000", linewidth=1.5, label="L(N, D)", zorder=1)
        flops(axes.xaxis, r"$(D_c/D)\,(N/N_c)^{\alpha_N/\alpha_D}$")
        plain_log(axes.yaxis, points["ratio"])
        axes.set_ylabel("loss over that of unlimited data")
        grid(axes)
        legend(figure, [axes])

    caption = (
        f"{_measured(points)} of {counted(points['params'].nunique(), 'size')}, each over the loss that L(N, D) gives the size with "
        "unlimited data, against how short the data are. "
        f"From {counted(found.runs, 'run')}; residuals of ln L {short(fitted.rms)} (root mean square). {_law_said(found, 'kaplan_nd')} "
        "To be seen: whether all sizes lie on the one curve, which L(N, D) is here."
    )
    return plot("loss_nd", "Collapse of L(N, D)", caption, points, (6.4, 5.0), draw)


def of_steps(source: Source) -> Plot:
    """L(N, S_min): loss against steps for each size, with the law."""
    found = source.finding("kaplan_ns")
    fitted = found.fits["kaplan_ns"]
    points = found.points
    sizes = spread(points["params"], 8)
    look = looks(sizes)
    steps = np.geomspace(points["min_steps"].min(), points["min_steps"].max(), 50)
    lines = []
    for params in sizes:
        own = points["min_steps"][points["params"] == params]
        at = steps[(steps >= own.min() / 1.1) & (steps <= own.max() * 1.1)]
        lines.append(
            pandas.DataFrame(
                {"params": params, "min_steps": at, "loss": fitted.predict({"params": np.full(len(at), params), "min_steps": at})}
            )
        )
    lines = pandas.concat(lines)

    def draw(figure):
        axes = figure.subplots()
        for params in sizes:
            own, line = points[points["params"] == params], lines[lines["params"] == params]
            style = look[params]
            axes.plot(
                own["min_steps"],
                own["loss"],
                linestyle="",
                marker=style["marker"],
                color=style["color"],
                markersize=4,
                alpha=0.7,
                label=name_of("N", params),
            )
            axes.plot(line["min_steps"], line["loss"], color=style["color"], linewidth=1.6)
        flops(axes.xaxis, "S_min (steps)".replace("S_min", r"$S_{min}$"))
        plain_log(axes.yaxis, points["loss"])
        axes.set_ylabel("loss (nats per token)")
        grid(axes)
        legend(figure, [axes])

    cut = f" {len(sizes)} of {points['params'].nunique()} sizes are drawn." if points["params"].nunique() > len(sizes) else ""
    caption = (
        f"{len(points):,} tuned losses of {counted(points['params'].nunique(), 'size')} against the least steps that they take, from "
        f"{counted(found.runs, 'run')}.{cut} "
        f"{sentence(found.statements[0]) if found.statements else ''} Lines: {_law_said(found)} To be seen: whether one law follows "
        "every size from its first horizon to its last."
    )
    return plot(
        "loss_ns",
        "Learning curves L(N, S)",
        caption,
        pandas.concat([points.assign(what="measured"), lines.assign(what="fit")]),
        _INCHES,
        draw,
    )


FIGURES = (
    ("loss_n", "Loss against size, L(N)", of_size),
    ("loss_d", "Loss against data, L(D)", of_data),
    ("loss_c", "Loss against compute, L(C)", of_compute),
    ("loss_nd", "Collapse of L(N, D)", collapse),
    ("loss_ns", "Learning curves L(N, S)", of_steps),
)
