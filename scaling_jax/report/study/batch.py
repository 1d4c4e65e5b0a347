"""Figures of the batch size: the critical one by every definition that the study has, the best one, and what a fixed one loses."""

from typing import Any

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Finding, counted
from scaling_jax.report.figures import GREY
from scaling_jax.report.study.lr import horizon, spread
from scaling_jax.report.study.plot import Plot, Source, amount, interval_text, listed, plot, power, runs_in, short
from scaling_jax.report.study.style import MARKERS, amounts, arrows, below, grid, guide, legend, looks, name_of, panels, shades, size

_LOOKS = {
    "noise": ("noise, tr Σ / |G|²", "#cf5a3c", "o"),
    "preconditioned": ("preconditioned, tr PΣ / GᵀPG", "#2f78c8", "s"),
    "tradeoff": ("tradeoff, E_min / S_min", "#16907c", "D"),
    "kink_surge": ("kink of η*(B), surge", "#b8509f", ""),
    "kink_plateau": ("kink of η*(B), plateau", "#c07a10", ""),
}
_FAR = 1e9  # beyond every bend, in units of batch size


def critical_batch(source: Source) -> Plot:
    """B_crit against T by every definition that the study has."""
    parts = [*_noise(source), *_tradeoff(source)]
    kinks = _kinks(source)
    if not parts and not kinks:
        raise UserError("the table has no noise scale, and no form with a bend in η*(B) could be fitted")
    data = pandas.concat([*parts, *kinks], ignore_index=True)
    there = [name for name in _LOOKS if name in set(data["definition"])]
    sizes = sorted(data["params"].dropna().unique())
    tokens = data["tokens"].to_numpy(float)

    def draw(figure):
        axes = figure.subplots()
        for name in there:
            label, color, marker = _LOOKS[name]
            of = data[data["definition"] == name]
            if not marker:
                axes.plot(of["tokens"], of["batch_tokens"], color=color, linewidth=2, label=label)
                if of["low"].notna().all():
                    axes.fill_between(of["tokens"], of["low"], of["high"].clip(upper=1e30), color=color, alpha=0.15, linewidth=0)
                continue
            for i, params in enumerate(sizes or [np.nan]):
                own = of[of["params"] == params] if sizes else of
                x = own["tokens"] * (1 + 0.04 * (i - len(sizes) / 2)) if 1 < len(sizes) <= 5 else own["tokens"]  # beside one another
                ends = np.array(
                    [own["batch_tokens"] - own["low"], own["high"].where(np.isfinite(own["high"])) - own["batch_tokens"]], float
                )
                style = {"markerfacecolor": color if i == 0 else "none", "markersize": 4.5 + i if i < 4 else 4.5}
                axes.errorbar(
                    x, own["batch_tokens"], np.nan_to_num(np.maximum(ends, 0)), linestyle="", marker=marker, color=color, elinewidth=1,
                    label=label if i == 0 else None, **style,
                )  # fmt: skip
        centres = data["batch_tokens"].to_numpy(float)
        amounts(axes.xaxis, tokens, "T (tokens)")
        shown = centres[np.isfinite(centres) & (centres > 0)]
        if parts:  # a form that fits badly may bend far away
            points = np.concatenate([part["batch_tokens"].to_numpy(float) for part in parts])
            shown = shown[(shown > points.min() / 12) & (shown < points.max() * 12)]
        axes.set_ylim(shown.min() / 2.5, shown.max() * 2.5)
        amounts(axes.yaxis, shown, "critical batch size (tokens)")
        guide(axes, tokens, float(np.exp(np.log(shown).mean())), 1.0, "slope 1, for reference")
        grid(axes)
        legend(figure, [axes], wide=8)

    slopes = [
        f"{_LOOKS[name][0].split(',')[0] if _LOOKS[name][2] else _LOOKS[name][0]} T^{power(_slope(data[data['definition'] == name]))}"
        for name in there
    ]
    beside = " (sizes side by side, the smallest filled)" if len(sizes) > 1 else ""
    measured = f"Points are measured{beside}, with 95% intervals where they are closed. " if parts else ""
    bent = "Lines are where the fitted forms of η*(B) bend, with 95% bands; they depend on the form. " if kinks else ""
    caption = (
        f"Critical batch size against tokens by {counted(len(there), 'definition')}, from {counted(runs_in(source.rows), 'run')}; they are "
        f"different quantities. {measured}{bent}Their growth: {'; '.join(slopes)}. To be seen: whether each grows with T, how fast beside "
        "slope 1, and how far apart the definitions are."
    )
    return plot("critical_batch", "Critical batch size against tokens, by definition", caption, data, (6.6, 5.4), draw)


def _slope(of: pandas.DataFrame) -> float:
    of = of[(of["batch_tokens"] > 0) & np.isfinite(of["batch_tokens"].astype(float))]
    if of["tokens"].nunique() < 2:
        return np.nan
    return float(np.polyfit(np.log(of["tokens"].astype(float)), np.log(of["batch_tokens"].astype(float)), 1)[0])


def _noise(source: Source) -> list[pandas.DataFrame]:
    """Of the run with the lowest loss at each size and horizon."""
    rows, at = source.rows, horizon(source.rows)
    if at not in rows:
        return []
    keys = [name for name in ("params", at) if name in rows]
    parts = []
    for name, column in (("noise", "noise_scale_tokens"), ("preconditioned", "preconditioned_noise_scale_tokens")):
        if column not in rows or not (rows[column] > 0).any():
            continue
        known = rows[rows[column] > 0]
        best = known.loc[known.groupby(keys)["loss"].idxmin()]
        low, high = (best[f"{column}_{end}"].astype(float) if f"{column}_{end}" in best else np.nan for end in ("low", "high"))
        parts.append(_definition(name, best.get("params", np.nan), best[at], best[column], low, high))
    return parts


def _definition(name: str, params: Any, tokens: Any, batch_tokens: Any, low: Any = np.nan, high: Any = np.nan) -> pandas.DataFrame:
    frame = {"definition": name, "params": params, "tokens": tokens, "batch_tokens": batch_tokens, "low": low, "high": high}
    return pandas.DataFrame(frame).astype(dict.fromkeys(("params", "tokens", "batch_tokens", "low", "high"), float))


def _tradeoff(source: Source) -> list[pandas.DataFrame]:
    found = source.findings.get("kaplan_bcrit")
    if not isinstance(found, Finding) or not {"tokens", "critical_batch_tokens"} <= {*found.points.columns}:
        return []
    points = found.points
    if "censored" in points:
        points = points[~points["censored"].astype(bool)]
    points = points[points["critical_batch_tokens"] > 0]
    low, high = (points.get(f"critical_batch_tokens_{end}", np.nan) for end in ("low", "high"))
    return (
        [_definition("tradeoff", points.get("params", np.nan), points["tokens"], points["critical_batch_tokens"], low, high)]
        if len(points)
        else []
    )


def _kinks(source: Source) -> list[pandas.DataFrame]:
    """Where the fitted forms of η*(B) bend, along T, with the bend's 95% interval."""
    surface = source.findings.get("lr_surface")
    if not isinstance(surface, Finding):
        return []
    parts = []
    for name in ("surge", "plateau"):
        fitted = surface.fits.get(name)
        if fitted is None or not fitted.identified:
            continue
        low, high = fitted.ranges["tokens"]
        tokens = np.geomspace(low, high, 25)
        middle = float(np.sqrt(np.prod(fitted.ranges["params"]))) if "params" in fitted.ranges else np.nan
        batch = bend(fitted.predict, name, tokens, middle)
        draws = bend(fitted.draw_predictions, name, tokens, middle)
        ends = np.quantile(draws, [0.025, 0.975], axis=0) if len(draws) else np.full((2, len(tokens)), np.nan)
        parts.append(_definition(f"kink_{name}", np.nan, tokens, batch, *ends))
    return parts


def bend(predict: Any, name: str, tokens: np.ndarray, params: float) -> np.ndarray:
    """B_crit of a form at each T, from its own asymptotes: √B far below the bend, 1/√B (surge) or level (plateau) far above."""
    x = {"tokens": tokens, "params": np.full(len(tokens), params)}
    below, above = (
        predict(x | {"batch_tokens": np.full(len(tokens), 1 / _FAR)}),
        predict(x | {"batch_tokens": np.full(len(tokens), _FAR**2)}),
    )
    return np.sqrt(_FAR) * above / below if name == "surge" else (above / below) ** 2 / _FAR


def best_batch(source: Source) -> Plot:
    """B* against T with its power law."""
    found = source.finding("batch_optimum")
    points = found.points[found.points["batch_tokens"].notna() & found.points["bound"].isin(["", "low", "high"])]
    points = points.assign(params=points["params"].fillna(0.0))
    if not len(points):
        raise UserError("at no size and horizon do three batch sizes have a best learning rate")
    if points["tokens"].nunique() < 2:
        raise UserError("there is one horizon")
    sizes = spread(points["params"], 8)
    points = points[points["params"].isin(sizes)]
    look = looks(sizes)
    fitted = found.fits[found.best] if found.best else None
    tokens = np.geomspace(points["tokens"].min(), points["tokens"].max(), 40)
    of_size = fitted is not None and "params" in fitted.form.inputs
    curves = [_law_along(fitted, tokens, params) for params in (sizes if of_size else sizes[:1])]
    tried = sorted(source.rows["batch_tokens"].unique())

    def draw(figure):
        axes = figure.subplots()
        for i, params in enumerate(sizes):
            own = points[points["params"] == params]
            inside, bounds = own[own["bound"] == ""], own[own["bound"] != ""]
            error = 1.96 * inside["batch_log_se"].fillna(0).clip(upper=2)
            ends = [inside["batch_tokens"] * (1 - np.exp(-error)), inside["batch_tokens"] * (np.exp(error) - 1)]
            x = inside["tokens"] * (1 + 0.04 * (i - len(sizes) / 2))
            axes.errorbar(
                x,
                inside["batch_tokens"],
                ends,
                linestyle="",
                markersize=6,
                elinewidth=1.1,
                label=name_of("N", params) if params else "B*",
                **look[params],
            )
            arrows(axes, bounds["tokens"], bounds["batch_tokens"], bounds["bound"] == "high", look[params]["color"])
        for params, curve in zip(sizes, curves, strict=False):
            color, label = (look[params]["color"], "power law, 95% bands") if of_size else (GREY, "power law, 95% band")
            if len(curve):
                axes.plot(curve["tokens"], curve["batch_tokens"], color=color, linewidth=1.6, label=label)
                axes.fill_between(
                    curve["tokens"], curve["low"].astype(float), curve["high"].astype(float), color=color, alpha=0.12, linewidth=0
                )
        amounts(axes.xaxis, points["tokens"], "T (tokens)")
        values = points["batch_tokens"].to_numpy(float)
        amounts(axes.yaxis, [values.min() / 1.5, values.max() * 1.5], "best batch size B* (tokens)")
        axes.set_ylim(values.min() / 2, values.max() * 2)
        grid(axes)
        legend(figure, [axes])

    inside = int((points["bound"] == "").sum())
    law = (
        f"The power law through the minima is T^{power(found.numbers[0].value)}{interval_text(found.numbers[0])}. "
        if found.numbers and fitted
        else "No power law is identified. "
    )
    caption = (
        f"Batch size of lowest loss against tokens, each batch at its own best learning rate: {inside} minima of parabolas in ln B with "
        f"95% intervals and {len(points) - inside} bounds "
        f"(open triangles, best batch at the edge of {amount(tried[0])} to {amount(tried[-1])} tokens), from "
        f"{counted(found.runs, 'run')}. {law}"
        "To be seen: whether the best batch grows with T, and stays inside the batches that were tried."
    )
    lines = [curve.assign(what="fit", params=params) for params, curve in zip(sizes, curves, strict=False)]
    data = pandas.concat([points.assign(what="measured"), *lines])
    return plot("best_batch", "Best batch size against tokens", caption, data, (6.4, 4.8), draw)


def _law_along(fitted: Any, tokens: np.ndarray, params: float) -> pandas.DataFrame:
    if fitted is None:
        return pandas.DataFrame(columns=["tokens", "batch_tokens", "low", "high"])
    x = {"tokens": tokens, "params": np.full(len(tokens), params)}
    low, high = fitted.interval(x)
    return pandas.DataFrame({"tokens": tokens, "batch_tokens": fitted.predict(x), "low": low, "high": high})


def regret(source: Source) -> Plot:
    """What a fixed batch loses, against T, a panel for each size."""
    found = source.finding("batch_regret")
    points = found.points.assign(params=found.points["params"].fillna(0.0))
    inside = points[~points["censored"].astype(bool)]
    if inside["tokens"].nunique() < 2:
        raise UserError("fewer than two horizons have their best batch inside the grid")
    sizes = spread(inside["params"], 3)
    inside = inside[inside["params"].isin(sizes)]
    colors = dict(zip(sorted(inside["batch_tokens"].unique()), shades(inside["batch_tokens"].nunique()), strict=True))
    markers = dict(zip(colors, MARKERS * 5, strict=False))

    def draw(figure):
        drawn = panels(figure, len(sizes), sharex=True, sharey=True)
        for axes, params in zip(drawn, sizes, strict=True):
            for batch, color in colors.items():
                own = inside[(inside["params"] == params) & (inside["batch_tokens"] == batch)].sort_values("tokens")
                axes.plot(
                    own["tokens"], own["regret"], color=color, marker=markers[batch], markersize=5, linewidth=1.4, label=name_of("B", batch)
                )
                axes.fill_between(
                    own["tokens"].astype(float), own["low"].astype(float), own["high"].astype(float), color=color, alpha=0.12, linewidth=0
                )
            axes.axhline(0, color=GREY, linewidth=0.8)
            if len(sizes) > 1:
                axes.set_title(name_of("N", params), fontsize=12)
            grid(axes)
        below(drawn, lambda axis: amounts(axis, inside["tokens"], "T (tokens)"))
        drawn[0].set_ylabel("loss over that of B* (nats)")
        legend(figure, drawn)

    last = inside[inside["tokens"] == inside["tokens"].max()].groupby("batch_tokens")["regret"].mean()
    caption = (
        "Loss of a fixed batch size at its own best learning rate, over that of the best batch, against tokens (bands: 95%), from "
        f"{counted(found.runs, 'run')}. At the longest horizon shown "
        f"it is {listed([f'{short(last[b])} nats at B = {amount(b)}' for b in dict.fromkeys([last.index[0], last.index[-1]])])}. "
        "To be seen: if the best batch grows, small batches lose more as T grows, and large ones less."
    )
    return plot("batch_regret", "What a fixed batch size loses", caption, inside, size(len(sizes)), draw)


FIGURES = (
    ("critical_batch", "Critical batch size against tokens", critical_batch),
    ("best_batch", "Best batch size against tokens", best_batch),
    ("batch_regret", "What a fixed batch size loses", regret),
)
