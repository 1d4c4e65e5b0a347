"""Figures of a study along its runs: the loss, and the noise scale, against tokens."""

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import counted
from scaling_jax.report.figures import BLUE, GREY
from scaling_jax.report.study.plot import Plot, Source, need, plot, power, runs_in, same_sizes, short
from scaling_jax.report.study.style import amounts, grid, legend, looks, name_of, panels, plain_log, size

_LINE, _BEST_LINE = 24, 80  # marks of a curve that is one of many, and of one that stands out
_MOST = 150  # curves behind those; of more, every so many


def loss_curves(source: Source) -> Plot:
    """Training loss of every run against tokens; where only a table is known, the held-out loss at its horizons."""
    group, kind = ("params", "N") if _several(source.rows, "params") else ("batch_tokens", "B")
    if source.curves is not None and len(source.curves) and "point" in source.rows:
        return _courses(source, group, kind)
    return _horizons(source, group, kind)


def _several(rows: pandas.DataFrame, name: str) -> bool:
    return name in rows and rows[name].nunique() > 1


def _best_runs(rows: pandas.DataFrame, group: str) -> pandas.DataFrame:
    """Of each size (or batch) the run with the lowest held-out loss at the longest horizon."""
    if group not in rows:
        rows = rows.assign(**{group: 0})
    longest = rows[rows["tokens"] == rows.groupby(group)["tokens"].transform("max")]
    return longest.loc[longest.groupby(group)["loss"].idxmin()]


def _courses(source: Source, group: str, kind: str) -> Plot:
    curves = source.curves.dropna(subset=["loss"])
    best = _best_runs(source.rows, group).set_index("point")[group]
    longest = curves.groupby(["point", "trajectory"])["tokens"].max().reset_index()  # the course to the longest horizon of each point
    longest = longest.loc[longest.groupby("point")["tokens"].idxmax()].set_index("point")["trajectory"]
    names = [name for name in longest.index if name not in best.index]
    every = -(-len(names) // _MOST)
    shown = {*names[:: max(1, every)], *(name for name in best.index if name in longest.index)}
    by_course = dict(list(curves[curves["point"].isin(shown)].groupby("trajectory", sort=False)))
    parts = []
    for point in longest.index[longest.index.isin(shown)]:
        course = _longest_leg(by_course[longest[point]]).sort_values("tokens")
        smooth = _binned(course["tokens"].to_numpy(float), course["loss"].to_numpy(float), _BEST_LINE if point in best.index else _LINE)
        parts.append(pandas.DataFrame({"point": point, group: best.get(point, np.nan), "tokens": smooth[0], "loss": smooth[1]}))
    data = pandas.concat(parts, ignore_index=True)
    look = looks(best)

    def draw(figure):
        axes = figure.subplots()
        for point, course in data.groupby("point", sort=False):
            if point not in best.index:
                axes.plot(course["tokens"], course["loss"], color=GREY, alpha=0.25, linewidth=0.6, zorder=1)
        for point, value in best.sort_values().items():
            course = data[data["point"] == point]
            axes.plot(course["tokens"], course["loss"], color=look[value]["color"], linewidth=2, label=name_of(kind, value), zorder=3)
        amounts(axes.xaxis, data["tokens"], "tokens trained on")
        plain_log(axes.yaxis, data["loss"])
        top = np.percentile(data["loss"], 99.5)
        axes.set_ylim(data["loss"].min() * 0.97, top * 1.03)
        axes.set_ylabel("training loss (nats per token)")
        grid(axes)
        legend(figure, [axes])

    thinned = f", of which one in {every} is drawn" if every > 1 else ""
    ends = source.rows["loss"].loc[_best_runs(source.rows, group).index]
    caption = (
        f"Training loss against tokens of {counted(len(longest), 'run')}{thinned}, averaged in steps of log tokens. In colour, for each "
        f"{kind} the run "
        f"with the lowest held-out loss at the longest horizon, which ends at {_range(ends)} nats per token; the others in grey. To be "
        "seen: "
        "whether the best runs are smooth and still falling at their end, and how far apart the settings are."
    )
    note = f"{_LINE} to {_BEST_LINE} averages of a run's steps"
    return plot("loss_curves", "Loss curves", caption, data, (6.4, 4.8), draw, note)


def _longest_leg(course: pandas.DataFrame) -> pandas.DataFrame:
    """Of warmup-stable-decay the trunk up to the last decay, and that; the whole of any other course."""
    decays = [leg for leg in course["leg"].unique() if leg.startswith("decay-")] if "leg" in course else []
    if not decays:
        return course
    last = course[course["leg"] == max(decays, key=lambda leg: int(leg.removeprefix("decay-")))]
    return pandas.concat([course[(course["leg"] == "trunk") & (course["tokens"] < last["tokens"].min())], last])


def _binned(x: np.ndarray, y: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over steps of equal size in log x; steps without any point are left out."""
    known = (x > 0) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= count:
        return x, y
    edges = np.geomspace(x[0], x[-1] * 1.0001, count + 1)
    at = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, count - 1)
    number = np.bincount(at, minlength=count)
    there = number > 0
    return np.bincount(at, x, count)[there] / number[there], np.bincount(at, y, count)[there] / number[there]


def _horizons(source: Source, group: str, kind: str) -> Plot:
    rows = source.rows
    need(rows, "tokens")
    if rows["tokens"].nunique() < 2:
        raise UserError("the table has one horizon, and there are no curves")
    if group not in rows:
        group, kind = "all", ""
        rows = rows.assign(all=1)
    if group == "params":
        rows = rows.assign(params=same_sizes(rows["params"]))
    columns = [group, "tokens"]
    best = rows.groupby(columns)["loss"].agg(["min", "median", "count"]).reset_index()
    data = best.rename(columns={"min": "lowest_loss", "median": "median_loss", "count": "rows"})
    values = sorted(data[group].unique())
    shown = values if len(values) <= 12 else [values[i] for i in np.linspace(0, len(values) - 1, 12).round().astype(int)]
    few = data.groupby(group)["tokens"].nunique().median() < 2
    look = looks(shown)

    def draw(figure):
        axes = figure.subplots()
        if few:
            axes.plot(data["tokens"], data["lowest_loss"], linestyle="", marker=".", color=BLUE, alpha=0.7)
        else:
            for value in shown:
                of = data[data[group] == value]
                axes.plot(of["tokens"], of["lowest_loss"], linewidth=1.6, label=name_of(kind, value) if kind else None, **look[value])
        amounts(axes.xaxis, data["tokens"], "tokens trained on")
        plain_log(axes.yaxis, data["lowest_loss"])
        axes.set_ylabel("lowest loss (nats per token)")
        grid(axes)
        legend(figure, [axes])

    cut = f" {len(shown)} of {len(values)} values of {kind} are drawn, evenly chosen." if len(shown) < len(values) and not few else ""
    caption = (
        f"Lowest loss over all settings at each {kind + ' and ' if kind else ''}number of tokens, from "
        f"{counted(runs_in(source.rows), 'run')} ({len(source.rows):,} rows); "
        f"it goes from {short(data['lowest_loss'].max())} to {short(data['lowest_loss'].min())} nats per token.{cut} To be seen: how "
        "the loss falls with "
        "tokens, and whether the lines stay apart."
    )
    return plot("loss_curves", "Loss against tokens", caption, data, (6.4, 4.8), draw)


def _range(values: pandas.Series) -> str:
    low, high = short(values.min()), short(values.max())
    return low if low == high else f"{low} to {high}"


def noise_scale(source: Source) -> Plot:
    """The gradient noise scale at every horizon, by size; the preconditioned beside it."""
    rows = source.rows
    scales = {
        title: name
        for title, name in (("tr Σ / |G|²", "noise_scale_tokens"), ("preconditioned", "preconditioned_noise_scale_tokens"))
        if name in rows and (rows[name] > 0).any()
    }
    need(rows, "tokens")
    if not scales:
        raise UserError("the table has no noise_scale_tokens")
    if rows["tokens"].nunique() < 2:
        raise UserError("the table has one horizon")
    rows = rows.assign(params=rows["params"] if "params" in rows else 0)
    parts = []
    for title, name in scales.items():
        known = rows[rows[name] > 0]
        part = known[["params", "tokens", *[c for c in ("batch_tokens", "lr", "loss") if c in known]]].assign(
            definition=title, value_tokens=known[name].astype(float)
        )
        for end in ("low", "high"):
            part[f"{end}_tokens"] = known.get(f"{name}_{end}", np.nan)
        parts.append(part)
    data = pandas.concat(parts, ignore_index=True)
    middle = data.groupby(["definition", "params", "tokens"])["value_tokens"].median().reset_index()
    look, law = looks(data["params"]), _growth(middle)

    def draw(figure):
        drawn = panels(figure, len(scales), sharey=True)
        for axes, title in zip(drawn, scales, strict=True):
            of = data[data["definition"] == title]
            for value in look:
                dots, line = of[of["params"] == value], middle[(middle["definition"] == title) & (middle["params"] == value)]
                axes.plot(
                    dots["tokens"], dots["value_tokens"], linestyle="", marker=".", markersize=3, alpha=0.35, color=look[value]["color"]
                )
                axes.plot(
                    line["tokens"], line["value_tokens"], linewidth=1.8, label=name_of("N", value) if value else "median", **look[value]
                )
            if "batch_tokens" in of:
                for batch in sorted(of["batch_tokens"].unique()):
                    axes.axhline(batch, color=GREY, linestyle=":", linewidth=0.8, label="batch sizes of the runs")
            amounts(axes.xaxis, data["tokens"], "tokens trained on")
            if len(scales) > 1:
                axes.set_title(title)
            grid(axes)
        low, high = np.percentile(data["value_tokens"], [0.5, 99.5])
        amounts(drawn[0].yaxis, [low, high], "noise scale (tokens)")
        drawn[0].set_ylim(low / 2, high * 2)
        legend(figure, drawn)

    grown = "; ".join(f"{title}: T^{power(slope)} ± {error:.2f}" for title, slope, error in law)
    caption = (
        f"Gradient noise scale over the later half of what each of {counted(runs_in(rows), 'run')} had seen, at "
        f"{rows['tokens'].nunique()} horizons "
        f"({len(data):,} values, dots; medians over all settings joined). Through the medians: {grown} (± one standard error of the "
        "scatter alone). To be seen: growth "
        "with tokens, whether sizes lie on one line, and which batch sizes (dotted) are above it."
    )
    return plot("noise_scale", "Noise scale against tokens", caption, data, size(len(scales)), draw)


def _growth(middle: pandas.DataFrame) -> list[tuple[str, float, float]]:
    """Slope of ln value in ln tokens with a level for each size, by definition."""
    found = []
    for title, of in middle.groupby("definition", sort=False):
        x, y = np.log(of["tokens"].to_numpy(float)), np.log(of["value_tokens"].to_numpy(float))
        levels = of["params"].to_numpy()
        for value in np.unique(levels):
            x[levels == value] -= x[levels == value].mean()
            y[levels == value] -= y[levels == value].mean()
        dof = len(x) - len(np.unique(levels)) - 1
        slope = x @ y / (x @ x)
        found.append((title, slope, np.sqrt(np.sum((y - slope * x) ** 2) / dof / (x @ x)) if dof > 0 else np.nan))
    return found


FIGURES = (("loss_curves", "Loss curves", loss_curves), ("noise_scale", "Noise scale against tokens", noise_scale))
