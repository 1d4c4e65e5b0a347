"""Does the critical batch size grow with the tokens seen, or as the loss falls? Across widths the two part, and one of them collapses.

Within one size loss and tokens go together, and any growth in one is a growth in the other. A larger model reaches a lower loss with the
same tokens: if B_crit is a matter of the loss (Kaplan et al. 2020, eq. 1.4: B*/L^(1/α_B)) it has a larger one there, and if it is a matter
of the tokens (Filatov et al. 2024) it has the same one. So B_crit is fitted jointly across sizes in one, in the other, and in each with a
factor of the size besides, which is 1 where the law collapses them.

The noise scale of a run also depends on the batch size that it trains at. Where only long runs have large batches, as in a grid in which
every run has its hundred steps, that hides or feigns growth, so a factor of the batch size is fitted as well, if there are three of them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.compare import Comparison, compare
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import LawFit, fit
from scaling_jax.laws.form import Form
from scaling_jax.laws.frontier import on_all_data
from scaling_jax.laws.lr_optimum import Optima, count_runs, measure, minima
from scaling_jax.laws.observations import Observations, checked, different, enough
from scaling_jax.laws.powers import Power, product_form, reference
from scaling_jax.laws.settings import CELL, cell_columns, confounded, one_setting

KAPLAN = "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.4"
FILATOV = "Filatov et al. 2024, arXiv 2410.05838"
COLUMNS = ("noise_scale_tokens", "preconditioned_noise_scale_tokens")
HUBER_DELTA = 0.1  # of ln B_crit: a noise scale's own error is 3% to 10%
WHAT = "the growth of the critical batch size"
_NEAR = 0.36  # of ln η: a step of √2 on either side of the best lr
_HALF = 8  # points in each half of the losses, and half as many runs, for an exponent of its own
_BATCHES = 3  # below which no factor of the batch size is fitted


def noise_points(table, column: str = COLUMNS[0], optima: Optima | None = None):
    """The noise scale near the best learning rate of each size, batch size and horizon, a DataFrame.

    The noise scale depends on the lr, so only runs within a step of √2 of η* count; of a table without a grid of lrs, all runs do. Columns:
    params, width, batch_tokens, tokens, batch_crit_tokens (geometric mean), loss (mean of those runs, nats per token), runs, and
    `censored`: no interval of its runs is closed (an open one is a bound, and is left out of the mean).
    """
    import pandas

    if column not in table:
        raise UserError(f"the table has no {column}; runs that measure the noise scale have it (noise_scale.measure)")
    rows = on_all_data(checked(table, ("loss", column, "tokens")))
    horizon, cell = "horizon_tokens" if "horizon_tokens" in rows else "tokens", list(CELL)
    rows = rows[rows[horizon].notna()]
    rows = rows.assign(tokens=rows[horizon].astype(float))
    for name in ("params", "width", "batch_tokens"):
        rows[name] = rows[name].astype(float) if name in rows else np.nan
    if "lr" in rows and rows["lr"].nunique() > 1:
        whole = on_all_data(table)
        best = minima(whole, optima or measure(whole))[[*cell, "lr"]].rename(columns={"lr": "best_lr"})
        rows = rows.merge(best, on=cell)
        rows = rows[np.abs(np.log(rows["lr"].astype(float) / rows["best_lr"])) <= _NEAR]
    else:
        one_setting(rows.drop_duplicates([name for name in (*cell_columns(rows), "tokens") if name in rows]), cell)
    value = rows[column].astype(float)
    closed = value.gt(0) & np.isfinite(value)
    for end in ("low", "high"):
        if f"{column}_{end}" in rows:
            closed &= np.isfinite(rows[f"{column}_{end}"].astype(float))
    rows = rows.assign(log_value=np.where(closed, np.log(value.where(closed, 1.0)), np.nan))
    found = rows.groupby(cell, dropna=False).agg(log_value=("log_value", "mean"), loss=("loss", "mean"), runs=("loss", "size"))
    found = found.reset_index().assign(censored=lambda f: f["log_value"].isna())
    found["batch_crit_tokens"] = np.exp(found.pop("log_value"))
    return pandas.DataFrame(found)


def forms(data: Observations) -> list[Form]:
    """B_crit by tokens and by loss, each without and with a factor of the size, and of the batch size if there are three."""
    tokens = Power("tokens", "tokens_exponent", "T", reference(data.x["tokens"]), 1.0)
    loss = Power("loss", "loss_exponent", "L", reference(data.x["loss"]), -1 / 0.21)
    size = Power("params", "params_exponent", "N", reference(data.x["params"]))
    made = {"growth_tokens": ([tokens], FILATOV), "growth_loss": ([loss], KAPLAN)}
    made |= {"growth_tokens_size": ([tokens, size], FILATOV), "growth_loss_size": ([loss, size], KAPLAN)}
    if len(np.unique(data.x.get("batch_tokens", []))) >= _BATCHES:
        batch = Power("batch_tokens", "batch_exponent", "B", reference(data.x["batch_tokens"]))
        made |= {"growth_tokens_batch": ([tokens, batch], FILATOV), "growth_loss_batch": ([loss, batch], KAPLAN)}
    return [
        product_form(name, "batch_crit_tokens", "B_crit", "tokens", powers, source, HUBER_DELTA, scale="batch_crit")
        for name, (powers, source) in made.items()
    ]


def observations(table, column: str = COLUMNS[0], optima: Optima | None = None) -> Observations:
    """B_crit of T, L and N; the horizons of one size and batch size are a cluster. Open intervals are left out."""
    frame = noise_points(table, column, optima)
    points = frame[~frame["censored"]]
    enough(points, 6, WHAT)
    different(points["tokens"], "tokens", 3, WHAT)
    different(points["params"].dropna(), "params", 2, "telling tokens from loss by the critical batch size")
    cluster = points.groupby(["params", "width", "batch_tokens"], dropna=False, sort=False).ngroup().to_numpy()
    origin = f"{column} near the best lr, of {len(points)} of {len(frame)} sizes, batch sizes and horizons"
    known = ("batch_tokens",) if points["batch_tokens"].notna().all() else ()
    x = {name: points[name].to_numpy(float) for name in ("tokens", "loss", "params", *known)}
    return Observations(x, points["batch_crit_tokens"].to_numpy(float), cluster, origin, frame.assign(definition=column))


def find(table) -> Finding:
    """B_crit by tokens against B_crit by loss, jointly across sizes."""
    table = on_all_data(table)
    optima = measure(table) if "lr" in table and table["lr"].nunique() > 1 and "batch_tokens" in table else None
    data = observations(table, optima=optima)
    rivals = forms(data)
    fits = {form.name: fit(form, data) for form in rivals}
    held_out, said = _held_out(rivals[:2], data)
    halves, bends = _halves(fits, data)
    numbers = _offsets(fits) + [_collinearity(data)] + _at_equal_batch(fits) + halves
    statements = said + _verdict(fits, held_out, data) + bends + (confounded(optima.points) if optima else [])
    frames = [data.frame]
    if COLUMNS[1] in table and table[COLUMNS[1]].notna().any():
        more, sentence, frame = _preconditioned(table, optima)
        numbers += more
        statements.append(sentence)
        frames += frame
    import pandas

    plain = {name: fits[name] for name in ("growth_tokens", "growth_loss")}
    sound = [name for name in plain if fits[name].identified]
    best = min(sound, key=lambda name: plain[name].rms) if sound else None
    if held_out is not None and held_out.best in sound:
        best = held_out.best
    return Finding(
        "critical_growth", "B_crit by tokens or by loss", fits, best, numbers, statements, pandas.concat(frames, ignore_index=True),
        count_runs(table), held_out,
    )  # fmt: skip


def _held_out(rivals: Sequence[Form], data: Observations) -> tuple[Comparison | None, list[str]]:
    """By the largest size where there are three, else by the longest horizon."""
    by = "params" if len(np.unique(data.x["params"])) >= 3 else "tokens"
    try:
        comparison = compare(rivals, data, by=by)
    except UserError as error:
        return None, [f"The two could not be compared on what is held out: {error}."]
    return comparison, [comparison.statement + "."]


def _offsets(fits: dict[str, LawFit]) -> list[Number]:
    """The size's exponent at equal tokens and at equal loss, and the scatter without it."""
    found = []
    for by, words in (("tokens", "equal tokens"), ("loss", "equal loss")):
        fitted = fits[f"growth_{by}_size"]
        low, high = fitted.intervals["params_exponent"]
        value = fitted.values["params_exponent"]
        found.append(Number(f"B_crit ∝ N^r at {words}", value, low, high, note="0 where this law collapses the sizes"))
        found.append(Number(f"scatter of ln B_crit about the law of {by}", fits[f"growth_{by}"].rms))
    return found


def _at_equal_batch(fits: dict[str, LawFit]) -> list[Number]:
    """The exponents of tokens and of loss beside a factor of the batch size."""
    found = []
    for by, formula in (("tokens", "B_crit ∝ T^p"), ("loss", "B_crit ∝ L^x")):
        if (fitted := fits.get(f"growth_{by}_batch")) is not None:
            exponent = f"{by}_exponent"
            value = None if exponent in fitted.unidentified else fitted.values[exponent]
            published = next(parameter.published for parameter in fitted.form.parameters if parameter.name == exponent)
            source = FILATOV if by == "tokens" else KAPLAN
            found.append(Number(f"{formula} at equal batch size", value, *fitted.intervals[exponent], published=published, source=source))
    return found


def _halves(fits: dict[str, LawFit], data: Observations) -> tuple[list[Number], list[str]]:
    """The exponent of the loss above and below the median loss, and a sentence where the two are not one number: no power law then."""
    form = fits.get("growth_loss_batch", fits["growth_loss"]).form
    middle = float(np.median(data.x["loss"]))
    found = []
    for side, half in (("above", data.x["loss"] > middle), ("below", data.x["loss"] <= middle)):
        x = {name: values[half] for name, values in data.x.items()}
        if half.sum() < _HALF or len(np.unique(data.cluster[half])) < _HALF // 2:
            return [], []
        fitted = fit(form, data._replace(x=x, y=data.y[half], cluster=data.cluster[half]))
        value = None if "loss_exponent" in fitted.unidentified else fitted.values["loss_exponent"]
        found.append(Number(f"B_crit ∝ L^x {side} the median loss", value, *fitted.intervals["loss_exponent"], note=f"L = {middle:.3g}"))
    (_, x1, low1, high1, *_), (_, x2, low2, high2, *_) = found
    if None in (x1, x2, low1, high1, low2, high2) or (low1 <= high2 and low2 <= high1):
        return found, []
    ends = [f"{x:.2f} ({low:.2f} to {high:.2f})" for x, low, high in ((x1, low1, high1), (x2, low2, high2))]
    return found, [f"No one power of the loss: L^x has x {ends[0]} above L = {middle:.3g}, and {ends[1]} below; that of all is a mean."]


def _collinearity(data: Observations) -> Number:
    """The part of the variance of ln L that ln T alone explains."""
    r = np.corrcoef(np.log(data.x["tokens"]), np.log(data.x["loss"]))[0, 1]
    return Number("share of ln L that ln T explains (R²)", float(r**2), note="near 1 tokens and loss cannot be told apart")


def _holds_zero(fitted: LawFit) -> bool | None:
    low, high = fitted.intervals["params_exponent"]
    return None if low is None or high is None else bool(low <= 0 <= high)


def _verdict(fits: dict[str, LawFit], held_out: Comparison | None, data: Observations) -> list[str]:
    by_tokens, by_loss = (_holds_zero(fits[f"growth_{by}_size"]) for by in ("tokens", "loss"))
    tied = held_out is None or len(held_out.tied) > 1
    r_squared = _collinearity(data).value or 0.0
    too_close = f"tokens and loss are too collinear here (R² {r_squared:.3f}) or the noise scale too noisy"
    if by_tokens is None or by_loss is None:
        return ["Too few independent runs for an interval of the size's exponent: the data do not say which law collapses the sizes."]
    if by_tokens and by_loss:
        return [f"Both laws collapse the sizes within their errors: {too_close} to tell them apart."]
    if by_tokens != by_loss:
        winner, other = ("tokens", "loss") if by_tokens else ("loss", "tokens")
        r = fits[f"growth_{other}_size"].values["params_exponent"]
        said = f"B_crit as a function of {winner} collapses the sizes; as a function of {other} a factor N^{r:.2f} is left."
        return [said, f"Held-out errors do not tell the two apart by themselves: {too_close}."] if tied else [said]
    values = [fits[f"growth_{by}_size"].values["params_exponent"] for by in ("tokens", "loss")]
    less = "tokens" if abs(values[0]) < abs(values[1]) else "loss"
    return [
        f"Neither collapses the sizes: at equal tokens N^{values[0]:.2f} is left, at equal loss N^{values[1]:.2f}; {less} comes nearer."
    ]


def _preconditioned(table, optima: Optima | None) -> tuple[list[Number], str, list[Any]]:
    try:
        data = observations(table, COLUMNS[1], optima)
        fits = {form.name: fit(form, data) for form in forms(data)}
    except UserError as error:
        return [], f"Of the preconditioned noise scale nothing is fitted: {error}.", []
    numbers = [number._replace(name=f"preconditioned: {number.name}") for number in _offsets(fits)]
    return numbers, "Preconditioned noise scale: " + " ".join(_verdict(fits, None, data)), [data.frame]


ANALYSES = (
    Analysis("critical_growth", "B_crit by tokens or by loss", ("tokens", "loss", "params", COLUMNS[0]), find, f"{FILATOV}; {KAPLAN}"),
)
