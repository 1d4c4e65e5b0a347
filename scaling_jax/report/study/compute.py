"""Figures of how compute is best divided, and of what a loss on one text says of another."""

from typing import Any

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws.chinchilla_form import allocation as closed_form
from scaling_jax.laws.finding import Finding, counted
from scaling_jax.laws.fit import widened
from scaling_jax.report.figures import GREY
from scaling_jax.report.study.plot import Plot, Source, interval_text, listed, plot, power, runs_in, sentence
from scaling_jax.report.study.style import MARKERS, amounts, flops, grid, legend, panels, plain_log, shades, size

_WAYS = {
    "kaplan_allocation": ("Kaplan, measured", "#16907c", "D"),
    "chinchilla_1": ("Chinchilla 1, envelope", "#2f78c8", "o"),
    "chinchilla_2": ("Chinchilla 2, equal compute", "#cf5a3c", "s"),
}
_FORM = ("Chinchilla 3, from L(N, D)", "#b8509f")
_DOMAINS = 6


def allocation(source: Source) -> Plot:
    """N_opt and D_opt against compute, by every way that the study supports."""
    parts, reasons = [], []
    for name in _WAYS:
        found = source.findings.get(name)
        if isinstance(found, Finding):
            parts.append(found.points.assign(way=name)[["way", "flops", "params", "tokens", "censored"]])
        else:
            reasons.append(f"{name}: {found or 'was not analysed'}")
    lines = _closed(source, parts)
    if not parts and not len(lines):
        raise UserError("; ".join(reasons))
    points = (
        pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame(columns=["way", "flops", "params", "tokens", "censored"])
    )
    points = points[points["params"].notna()]

    def draw(figure):
        drawn = panels(figure, 2, sharex=True)
        for axes, name, label in zip(drawn, ("params", "tokens"), ("N_opt (parameters)", "D_opt (tokens)"), strict=True):
            for way, (title, color, marker) in _WAYS.items():
                own = points[points["way"] == way]
                hollow, large = own["censored"].astype(bool), 9 if way == "kaplan_allocation" else 4.5
                if len(own):
                    axes.plot(
                        own["flops"][~hollow], own[name][~hollow], linestyle="", marker=marker, color=color, markersize=large, label=title
                    )
                    axes.plot(
                        own["flops"][hollow],
                        own[name][hollow],
                        linestyle="",
                        marker=marker,
                        markerfacecolor="none",
                        markeredgecolor=color,
                        markersize=large,
                        alpha=0.6,
                    )
            if len(lines):
                axes.plot(lines["flops"], lines[name], color=_FORM[1], linewidth=1.7, label=_FORM[0])
                axes.fill_between(lines["flops"], lines[f"{name}_low"], lines[f"{name}_high"], color=_FORM[1], alpha=0.15, linewidth=0)
            flops(axes.xaxis, "compute (FLOPs)")
            amounts(
                axes.yaxis, pandas.concat([points[name], lines.get(name, pandas.Series(dtype=float))]), label.replace("_opt", r"$_{opt}$")
            )
            grid(axes)
        legend(figure, drawn)

    counts = [
        f"{_WAYS[way][0]}: {int((~own['censored'].astype(bool)).sum())} budgets, {int(own['censored'].sum())} bounds"
        for way, own in points.groupby("way", sort=False)
    ]
    exponents = [
        f"{_WAYS.get(name, _FORM)[0]}: N_opt ∝ C^{power(number.value)}{interval_text(number)}" for name, number in _exponents(source)
    ]
    caption = (
        f"Size and data of the least loss for their compute, from {counted(runs_in(source.rows), 'run')}. "
        f"{listed(counts) + '; bounds, where the best size is the smallest or largest tried, are hollow. ' if counts else ''}"
        f"{'. '.join(exponents)}. To be seen: whether the ways agree, and how compute is to be divided: an exponent of one half gives "
        "size and data the same growth."
    )
    return plot(
        "allocation",
        "Allocation of compute",
        caption,
        pandas.concat([points, lines.assign(way="chinchilla_3")]),
        size(2, each=(4.4, 4.0)),
        draw,
    )


def _exponents(source: Source) -> list[tuple[str, Any]]:
    found = []
    for name in (*_WAYS, "chinchilla_3"):
        finding = source.findings.get(name)
        if isinstance(finding, Finding):
            measured = [n for n in finding.numbers if n.name == "a" or ("N ∝" in n.name and n.name.endswith("measured"))][:1]
            found += [(name, n) for n in measured if n.value is not None]
    return found


def _closed(source: Source, parts: list[pandas.DataFrame]) -> pandas.DataFrame:
    """N_opt(C) and D_opt(C) by the constants of L(N, D), with their 95% intervals."""
    found = source.findings.get("chinchilla_3")
    fitted = found.fits.get("chinchilla_3") if isinstance(found, Finding) else None
    if fitted is None or not fitted.identified:
        return pandas.DataFrame()
    ends = (found.points["flops"].min(), found.points["flops"].max())
    budgets = np.geomspace(*ends, 40)
    best = closed_form(**fitted.values)
    drawn = closed_form(*(fitted.draws_RxP[:, fitted.form.names.index(n), None] for n in ("A", "B", "E", "alpha", "beta")))
    data = {"flops": budgets}
    for name in ("params", "tokens"):
        draws = widened(getattr(best, name)(budgets), getattr(drawn, name)(budgets), fitted.widen)
        low, high = np.nanquantile(draws, [0.025, 0.975], axis=0) if len(draws) else np.full((2, 40), np.nan)
        data |= {name: getattr(best, name)(budgets), f"{name}_low": low, f"{name}_high": high}
    return pandas.DataFrame(data)


def transfer_offset(source: Source) -> Plot:
    """Loss on other texts against the loss on the training's."""
    rows = source.rows
    domains = [name.removeprefix("loss_") for name in rows if str(name).startswith("loss_") and not str(name).endswith("stderr")]
    domains = [name for name in domains if rows[f"loss_{name}"].notna().sum() >= 2][:_DOMAINS]
    if not domains:
        raise UserError("the table has no losses on further domains (loss_<domain>, from data.eval_domains)")
    found = source.findings.get("kaplan_transfer")
    fits = found.fits if isinstance(found, Finding) else {}
    parts = [
        pandas.DataFrame({"domain": name, "loss": rows["loss"], "domain_loss": rows[f"loss_{name}"].astype(float)}).dropna()
        for name in domains
    ]
    data = pandas.concat([part.iloc[:: max(1, len(part) // 600)] for part in parts], ignore_index=True)
    colors = dict(zip(domains, shades(len(domains)), strict=True))

    def draw(figure):
        axes = figure.subplots()
        ends = np.array([data["loss"].min(), data["loss"].max()])
        for domain, marker in zip(domains, MARKERS, strict=False):
            own = data[data["domain"] == domain]
            axes.plot(
                own["loss"], own["domain_loss"], linestyle="", marker=marker, markersize=3.5, alpha=0.6, color=colors[domain], label=domain
            )
            for fitted in fits.values():
                if fitted.form.target == f"loss_{domain}" and "offset" in fitted.form.name and fitted.identified:
                    axes.plot(
                        ends, fitted.predict({"loss": ends}), color=colors[domain], linewidth=1.4, linestyle="--", label=f"{domain}: L + c"
                    )
        axes.plot(ends, ends, color=GREY, linewidth=1.2, linestyle=":", label="the same loss")
        plain_log(axes.xaxis, data["loss"])
        plain_log(axes.yaxis, data["domain_loss"])
        axes.set_xlabel("loss on the training's text (nats per token)")
        axes.set_ylabel("loss on the domain (nats)")
        grid(axes)
        legend(figure, [axes])

    gaps = [f"{name} {power((data['domain_loss'] - data['loss'])[data['domain'] == name].median())}" for name in domains]
    said = (
        " ".join(sentence(text) for text in found.statements[:2])
        if isinstance(found, Finding)
        else f"No law is fitted: {found or 'it was not analysed'}."
    )
    caption = (
        f"Held-out loss on other texts against that on the training's own, {len(data):,} measurements of "
        f"{counted(runs_in(rows), 'run')}. Median offset in nats per token: {listed(gaps)}. {said} "
        "To be seen: whether a lower loss carries over with a constant offset, a line parallel to the dotted one."
    )
    return plot(
        "transfer_offset",
        "Transfer to other texts",
        caption,
        data,
        (6.4, 5.0),
        draw,
        "" if len(data) == sum(map(len, parts)) else f"of {sum(map(len, parts)):,}",
    )


FIGURES = (
    ("allocation", "Allocation of compute", allocation),
    ("transfer_offset", "Transfer to other texts", transfer_offset),
)
