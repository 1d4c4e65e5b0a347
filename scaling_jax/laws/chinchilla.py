"""Hoffmann et al. 2022 (arXiv 2203.15556) from a results table: three ways to the size and the data that are best for a compute budget."""

import functools
from collections.abc import Callable

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws import isoflop
from scaling_jax.laws.chinchilla_form import CHINCHILLA, GOPHER_FLOPS, QUICK, SOURCE, UNROUNDED, Allocation, allocation
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import LawFit, fit
from scaling_jax.laws.frontier import different_sizes, on_all_data, prepared, tuned, tuning_said
from scaling_jax.laws.kaplan_forms import ND
from scaling_jax.laws.observations import Observations, different
from scaling_jax.laws.rivals import against, beside_published, derived, fitted_rivals, from_draws

_PUBLISHED_A = {"chinchilla_1": 0.50, "chinchilla_2": 0.49, "chinchilla_3": 0.46}
_NEAR_GOPHER = 1e4  # Gopher's budget is of interest to measurements that end at most this factor below it
_DROPPED = 5  # highest losses whose weight in the fit is told; Besiroglu et al. 2024 leave out so many


def by_envelope(table: pandas.DataFrame, resamples: int = 400) -> Finding:
    """Approach 1: the size with the lowest loss at each of 1,500 log-spaced budgets, over courses interpolated between horizons.

    The line goes through the budgets at which one size takes over from the next; all budgets would be steps, cut at both ends.
    """
    what = "the envelope of training courses"
    rows = rows_of(table, what)
    points = isoflop.enveloped(rows)
    _enough(points, rows, what)
    takeovers = isoflop.takeovers(rows)
    if len(takeovers) < 3:
        raise UserError(f"{what}: {len(takeovers)} times a larger size takes over from a smaller one, 3 are needed: more sizes or horizons")
    finding = _measured("chinchilla_1", "allocation by the envelope", rows, points, *isoflop.takeover_line(takeovers, resamples))
    every = points[:: max(1, len(points) // 150)].reset_index(drop=True)
    how = f"the line is through the {len(takeovers)} budgets at which one size takes over from the next, and its interval by their scatter"
    return finding._replace(points=every, statements=[how, *finding.statements])


def by_parabolas(table: pandas.DataFrame, resamples: int = 400) -> Finding:
    """Approach 2: the minimum of a parabola in log N at each of several budgets, those of the table or, without such, interpolated."""
    rows = rows_of(table, "parabolas at equal compute")
    points = isoflop.minima(rows)
    _enough(points, rows, "parabolas at equal compute")
    draws = isoflop.bootstrapped(rows, resamples=resamples)
    finding = _measured("chinchilla_2", "allocation at equal compute", rows, points, isoflop.line(points), draws)
    if isoflop.bins(rows) is None:
        how = (
            f"no {isoflop.LEAST_BINS} budgets are shared by {isoflop.LEAST_SIZES} sizes: courses are interpolated at {len(points)} budgets"
        )
    else:
        how = f"budgets are bins of 6·N·D: neighbours within {isoflop.BIN:.0%}, all of a bin within {isoflop.SPREAD:.0%}"
    said = [how, *finding.statements]
    if points["censored"].any():
        said.append(
            "minima that noise moves past the edge are left out, and near it those that stay are drawn inwards: with noisy losses a is "
            "somewhat too low, which its interval does not have"
        )
    return finding._replace(statements=said)


def by_loss(table: pandas.DataFrame, drop_highest: int = 0, resamples: int = 400) -> Finding:
    """Approach 3: L = E + A/N^α + B/D^β, log residuals, summed Huber loss with δ = 1e-3, 4,500 starts; Kaplan's L(N, D) as its rival.

    Args:
      table: a results table.
      drop_highest: so many rows with the highest losses are left out, and said to be: far from the rest, they rule B and β.
      resamples: of the bootstrap over runs.
    """
    what = "L = E + A/N^α + B/D^β"
    rows = rows_of(table, what)
    different(rows["tokens"], "tokens", 3, what)
    if not 0 <= drop_highest < len(rows):
        raise UserError(f"drop_highest is {drop_highest}; it must be 0 or more, and below the {len(rows)} rows")
    kept = without_highest(rows, drop_highest)
    data = observed(kept, f"{tuning_said(rows)}; {drop_highest} highest losses left out")
    law = fit(CHINCHILLA, data, resamples=resamples)
    fits, best, comparison, statements = fitted_rivals((QUICK, ND), data, "flops", resamples, known=law)
    said = [f"the {drop_highest} highest of {len(rows)} losses are left out"] if drop_highest else _outliers(rows, law)
    said += beside_published(law, SOURCE) + statements
    optimum = allocation(**law.values)
    drawn = allocation(*(law.draws_RxP[:, law.form.names.index(name)] for name in ("A", "B", "E", "alpha", "beta")))
    there = allocation(**UNROUNDED)
    of_exponents = functools.partial(derived, laws=[law], uses=("alpha", "beta"), source=SOURCE)
    of_scales = functools.partial(derived, laws=[law], uses=("A", "B", "alpha", "beta"))
    numbers = [of_exponents(name, getattr(optimum, name), getattr(drawn, name), published=float(getattr(there, name))) for name in "ab"]
    numbers.append(of_scales("G", optimum.scale, drawn.scale, published=float(there.scale), source=SOURCE))
    numbers += _numbers_at(optimum, drawn, rows["flops"].max(), there, of_scales)
    points = rows[["params", "tokens", "flops", "loss"]].assign(censored=~rows.index.isin(kept.index))
    return Finding("chinchilla_3", what, fits, best, numbers, said, points, int(rows["run"].nunique()), comparison)


def without_highest(rows: pandas.DataFrame, count: int) -> pandas.DataFrame:
    """The rows but for the `count` of highest loss."""
    return rows.loc[rows["loss"].rank(method="first") <= len(rows) - count]


def observed(rows: pandas.DataFrame, origin: str) -> Observations:
    """Rows of several sizes and tokens; `data_tokens` are the tokens, for a form that asks for them by that name."""
    x = {name: rows[name].to_numpy(float) for name in ("params", "tokens", "flops")}
    return Observations(x | {"data_tokens": x["tokens"]}, rows["loss"].to_numpy(float), rows["run"].to_numpy(), origin, rows)


# ----------------------------------------------------------------------------------------------------------------------------------- shared


def rows_of(table: pandas.DataFrame, what: str) -> pandas.DataFrame:
    """Tuned rows on all data of three sizes or more, for `what`."""
    rows = tuned(on_all_data(prepared(table, ())), ("size", "horizon"))
    different_sizes(rows["size"], 3, what)
    return rows


def _enough(points: pandas.DataFrame, rows: pandas.DataFrame, what: str) -> None:
    inside = int((~points["censored"]).sum())
    if inside < 3 or points.loc[~points["censored"], "params"].nunique() < 2:
        raise UserError(
            f"{what}: at {inside} of {len(points)} budgets the best size lies between a smaller and a larger one that were measured there; "
            f"3, with different best sizes, are needed: the {rows['size'].nunique()} sizes need horizons at which their courses cross"
        )


def _measured(name: str, title: str, rows: pandas.DataFrame, points: pandas.DataFrame, fitted: np.ndarray, draws: np.ndarray) -> Finding:
    optimum, drawn = _power(*fitted), _power(draws[:, 0], draws[:, 1])
    published = _PUBLISHED_A[name]
    a = from_draws("a", optimum.a, drawn.a, published=published, source=SOURCE)
    numbers = [a, from_draws("b", optimum.b, drawn.b, published=1 - published, source=SOURCE)]
    numbers += _numbers_at(optimum, drawn, rows["flops"].max(), None)
    left = int(points["censored"].sum())
    said = [against("a of N_opt ∝ C^a", *a[1:4], published, SOURCE)]
    if a.low is None:
        said.append("a has no interval: more budgets with an enclosed best size, and so more sizes or more runs, are needed")
    if left:
        said.append(f"{left} of {len(points)} budgets have only a bound: the best size there is the smallest or largest measured")
    said.append(f"data follow from C = 6·N·D, so that b = 1 − a by definition; {tuning_said(rows)}")
    return Finding(name, title, {}, None, numbers, said, points, int(rows["run"].nunique()))


def _power(exponent, log_scale) -> Allocation:
    """N = scale·C^exponent as an Allocation, which is of C/6."""
    return Allocation(np.asarray(exponent), 1 - np.asarray(exponent), np.exp(log_scale + np.asarray(exponent) * np.log(6.0)))


def _budgets(largest: float) -> list[float]:
    """The largest budget measured, ten times that and, where it is not too far, Gopher's."""
    return [largest, 10 * largest, *([GOPHER_FLOPS] if largest * _NEAR_GOPHER > GOPHER_FLOPS else [])]


def _numbers_at(
    optimum: Allocation, drawn: Allocation, largest: float, published: Allocation | None, number: Callable[..., Number] = from_draws
) -> list[Number]:
    """N_opt, D_opt and D/N at `_budgets`, each made by `number`."""
    numbers = []
    source = "" if published is None else f"{SOURCE}, unrounded constants"
    for flops in _budgets(largest):
        mine, theirs = (None if a is None else _at(a, flops) for a in (optimum, published))
        note = "" if flops <= largest else f"{flops / largest:.3g} times the largest budget measured"
        for (name, unit), draws in zip(_UNITS.items(), _at(drawn, flops).values(), strict=True):
            known = None if theirs is None else float(theirs[name])
            at = f"{name} at {flops:.3g} FLOP"
            numbers.append(number(at, mine[name], draws, unit=unit, published=known, source=source, note=note))
    return numbers


_UNITS = {"N_opt": "parameters", "D_opt": "tokens", "D/N": "tokens per parameter"}


def _at(optimum: Allocation, flops: float) -> dict[str, np.ndarray]:
    n, d = optimum.params(flops), optimum.tokens(flops)
    return {"N_opt": n, "D_opt": d, "D/N": d / n}


def _outliers(rows: pandas.DataFrame, law: LawFit) -> list[str]:
    """What the highest losses do to the fit, by one without them."""
    if len(rows) < 8 * _DROPPED:
        return []
    kept = without_highest(rows, _DROPPED)
    inside = rows.index.isin(kept.index)
    without = fit(QUICK, observed(kept, ""), resamples=0)
    budget = _budgets(float(rows["flops"].max()))[-1]
    moved = ", ".join(f"{name} from {law.values[name]:.4g} to {without.values[name]:.4g}" for name in ("E", "A", "B", "alpha", "beta"))
    per_size = [_at(allocation(**values), budget)["D/N"] for values in (law.values, without.values)]
    share = float(np.abs(law.residuals[~inside]).mean() / np.abs(law.residuals[inside]).mean())
    if law.identified and without.identified and np.isfinite(per_size).all():
        moved += f"; D/N at {budget:.3g} FLOP from {per_size[0]:.3g} to {per_size[1]:.3g}"
    return [
        f"without the {_DROPPED} highest of {len(rows)} losses, whose residuals are {share:.2g} times those of the others, the fit "
        f"moves: {moved}"
    ]


ANALYSES = (
    Analysis("chinchilla_1", "allocation by the envelope", ("params", "tokens", "loss"), by_envelope, f"{SOURCE}, approach 1"),
    Analysis("chinchilla_2", "allocation at equal compute", ("params", "tokens", "loss"), by_parabolas, f"{SOURCE}, approach 2"),
    Analysis("chinchilla_3", "L(N, D) = E + A/N^α + B/D^β", ("params", "tokens", "loss"), by_loss, f"{SOURCE}, approach 3"),
)
