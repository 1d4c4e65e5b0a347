"""Kaplan et al. 2020 (arXiv 2001.08361) from a results table: what the shape of a model of one size costs, and loss on other text."""

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws import kaplan_forms as forms
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import LawFit, fit
from scaling_jax.laws.frontier import near_groups, on_all_data, prepared, tuned, tuning_said
from scaling_jax.laws.kaplan_theory import SOURCE
from scaling_jax.laws.observations import Observations
from scaling_jax.laws.rivals import fitted_rivals

SAME_N = 0.03  # relative difference of sizes that count as equal when shapes are compared
SLIGHT = 0.03  # excess of the loss within which a shape is as good as the best: the paper's (6, 4288) against (48, 1600)
_SHAPE = ("width", "depth", "head_dim", "model.mlp_ratio")


def of_shape(table: pandas.DataFrame) -> Finding:
    """Loss of each shape over that of the best one at equal N (within 3%) and horizon, tuned and averaged over seeds."""
    what = "shape dependence"
    rows = on_all_data(prepared(table, ("width", "depth")))
    rows["size"] = np.exp(np.log(rows["params"]).groupby(near_groups(rows["params"], SAME_N)).transform("mean"))
    shape = [name for name in _SHAPE if name in rows]
    best = tuned(rows, ("size", "horizon", *shape))
    cells = best.groupby(["size", "horizon"])
    points = best[(cells["loss"].transform("size") > 1).to_numpy()].copy()
    if len(points) < 3:
        raise UserError(f"{what} needs 3 shapes or more ({', '.join(shape)}) of one size, within {SAME_N:.0%}, at one horizon")
    points["loss_ratio"] = points["loss"] / points.groupby(["size", "horizon"])["loss"].transform("min")
    points["excess_percent"] = 100 * (points["loss_ratio"] - 1)
    points["aspect"] = points["width"] / points["depth"]
    spread = _seed_spread(rows, ["size", "horizon", *shape])
    slight = points[points["loss_ratio"] <= 1 + SLIGHT]
    numbers = [
        Number("largest excess over the best shape", float(points["excess_percent"].max()), unit="%"),
        Number("narrowest aspect within 3% of the best", float(slight["aspect"].min()), unit="width per block"),
        Number("widest aspect within 3% of the best", float(slight["aspect"].max()), unit="width per block"),
    ]
    narrow, wide = points["aspect"].min(), points["aspect"].max()
    worst = points.loc[points["excess_percent"].idxmax()]
    said = [
        f"over aspects {narrow:.3g} to {wide:.3g}, a factor {wide / narrow:.3g}, the loss is at most {worst['excess_percent']:.2g}% above "
        f"the best shape of its size; {SOURCE} have a few percent over a factor 40",
        f"the worst is {', '.join(f'{name} {worst[name]:g}' for name in shape)}; "
        f"{int((points['depth'] < 2).sum())} of {len(points)} points have fewer than 2 blocks",
    ]
    if spread is None:
        said.append("each shape has one seed: how much of an excess is chance cannot be told")
    else:
        numbers.append(Number("spread between seeds", 100 * spread, unit="%"))
        said.append(f"seeds of one shape differ by {spread:.2%} (standard deviation); an excess below about twice that is chance")
    fits, more = _aspects(points, tuning_said(best))
    columns = ["size", "tokens", *shape, "aspect", "loss", "excess_percent"]
    tidy = points[columns].rename(columns={"size": "params"}).reset_index(drop=True)
    name = next(iter(fits), None)
    return Finding("kaplan_shape", what, fits, name, numbers, said + more, tidy, int(rows["run"].nunique()))


def _seed_spread(rows: pandas.DataFrame, keys: list[str]) -> float | None:
    """Standard deviation of ln loss between seeds that are alike in all else; None where there are none."""
    if "seed" not in rows:
        return None
    grouped = np.log(rows["loss"]).groupby(
        [rows[name] for name in [*keys, *(n for n in ("batch_tokens", "lr") if n in rows)]], dropna=False
    )
    count, variance = grouped.size(), grouped.var()
    several = count > 1
    return float(np.sqrt((variance * (count - 1))[several].sum() / (count - 1)[several].sum())) if several.any() else None


def _aspects(points: pandas.DataFrame, origin: str) -> tuple[dict[str, LawFit], list[str]]:
    """A parabola in log aspect through the best row of each, of the MLP ratio that most rows have."""
    kept = points
    if "model.mlp_ratio" in points:
        kept = points[points["model.mlp_ratio"] == points["model.mlp_ratio"].mode().iloc[0]]
    kept = kept.loc[kept.groupby(["size", "horizon", "aspect"])["loss"].idxmin()]
    if kept["aspect"].nunique() < 4:
        return {}, [f"{kept['aspect'].nunique()} aspects of one MLP ratio are too few for a parabola; 4 are needed"]
    shape = [name for name in _SHAPE if name in kept]
    run = kept.groupby(["size", *shape], dropna=False).ngroup().to_numpy()  # its horizons share the noise of its runs
    data = Observations({"aspect": kept["aspect"].to_numpy(float)}, kept["loss_ratio"].to_numpy(), run, origin, kept)
    law = fit(forms.SHAPE, data)
    low, high = law.intervals["best_aspect"]
    ends = f"{'…' if low is None else f'{low:.3g}'} to {'…' if high is None else f'{high:.3g}'}"
    if law.values["curvature"] <= 0:
        return {law.form.name: law}, ["the loss has no minimum in the aspect: the parabola opens downwards"]
    return {law.form.name: law}, [f"the best aspect is {law.values['best_aspect']:.3g} ({ends}), by a parabola in its logarithm"]


# --------------------------------------------------------------------------------------------------------------------------------- transfer


def domains(table: pandas.DataFrame) -> list[str]:
    """The further domains that a table has losses on."""
    names = [str(name).removeprefix("loss_") for name in table.columns if str(name).startswith("loss_")]
    return [name for name in names if name != "stderr" and not name.endswith("_stderr")]


def of_transfer(table: pandas.DataFrame) -> Finding:
    """Loss on each further domain (columns loss_<domain>) against that on the training's, over all sizes and horizons."""
    what = "transfer"
    if not (there := domains(table)):
        raise UserError(f"{what} needs losses on another domain: a column loss_<domain>, from data.eval_domains; the table has none")
    rows = on_all_data(prepared(table, ()))
    fits, numbers, said, parts, first = {}, [], [], [], None
    for domain in there:
        other = rows[f"loss_{domain}"].astype(float)
        usable = rows[np.isfinite(other) & (other > 0)]
        if len(usable) < 3:
            raise UserError(f"{what} needs at least 3 rows with loss_{domain}; there are {len(usable)}")
        x = {name: usable[name].to_numpy(float) for name in ("loss", "tokens", "flops", "params")}
        y = usable[f"loss_{domain}"].to_numpy(float)
        data = Observations(x, y, usable["run"].to_numpy(), f"every row with loss_{domain}", usable)
        own, best, comparison, statements = fitted_rivals(forms.transfer(domain), data, "flops")
        fits |= own
        first = first or (best, comparison)
        line = own.get(f"kaplan_transfer_line_{domain}")
        numbers += _transfer_numbers(domain, own)
        said += [
            f"{domain}: {sentence}"
            for sentence in _transfer_said(own[f"kaplan_transfer_offset_{domain}"], line, y - x["loss"]) + statements
        ]
        part = {
            "domain": domain,
            "params": x["params"],
            "tokens": x["tokens"],
            "loss": x["loss"],
            "loss_domain": y,
            "offset": y - x["loss"],
        }
        parts.append(pandas.DataFrame(part))
    points = pandas.concat(parts, ignore_index=True)
    return Finding("kaplan_transfer", what, fits, first[0], numbers, said, points, int(rows["run"].nunique()), first[1])


def _transfer_numbers(domain: str, fits: dict[str, LawFit]) -> list[Number]:
    numbers = []
    for law in (fits[f"kaplan_transfer_{kind}_{domain}"] for kind in ("offset", "line") if f"kaplan_transfer_{kind}_{domain}" in fits):
        for parameter in law.form.parameters:
            more = {"published": 1.0, "source": SOURCE} if parameter.name == "slope" else {"unit": parameter.unit}
            ends = law.intervals[parameter.name]
            numbers.append(Number(f"{parameter.name} of {domain}, {law.form.formula}", law.values[parameter.name], *ends, **more))
    return numbers


def _transfer_said(offset: LawFit, line: LawFit | None, gap: np.ndarray) -> list[str]:
    said = [
        f"the offset is {offset.values['offset']:.3g} nats on average, and {gap.min():.3g} to {gap.max():.3g} over all rows; "
        f"{SOURCE} have it constant"
    ]
    if line is not None:
        low, high = line.intervals["slope"]
        if None not in (low, high):
            verdict = "a constant offset is compatible with it" if low <= 1 <= high else "the offset is not constant"
            said.append(f"a nat of loss is {line.values['slope']:.3g} ({low:.3g} to {high:.3g}) nats there: {verdict}")
    return said


ANALYSES = (
    Analysis("kaplan_shape", "shape dependence", ("params", "tokens", "loss", "width", "depth"), of_shape, f"{SOURCE}, sec. 3.1"),
    Analysis("kaplan_transfer", "transfer", ("params", "tokens", "loss"), of_transfer, f"{SOURCE}, sec. 3.2.2"),
)
