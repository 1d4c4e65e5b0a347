"""Kaplan et al. 2020 (arXiv 2001.08361) from a results table: the laws of loss in size, data and compute.

What each takes of a table is in its docstring; `frontier` has the reductions. Laws in training steps and batch size are in `kaplan_steps`,
overfitting in `kaplan_overfitting`, shape and transfer in `kaplan_shape`.
"""

from collections.abc import Callable

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws import kaplan_forms as forms
from scaling_jax.laws import kaplan_theory as theory
from scaling_jax.laws.chinchilla_form import QUICK
from scaling_jax.laws.finding import Analysis, Finding
from scaling_jax.laws.fit import LawFit
from scaling_jax.laws.frontier import different_sizes, early_stopped, frontier_rows, last_fall, on_all_data, prepared, tuned, tuning_said
from scaling_jax.laws.observations import Observations, different, enough
from scaling_jax.laws.rivals import beside_published, derived, draws_of, fitted_rivals

CONVERGED = 0.02  # a loss that falls by less over the last doubling of tokens counts as converged: about what seeds differ by


def of_size(table: pandas.DataFrame) -> Finding:
    """L(N): the tuned loss of each size at its longest horizon, on all data."""
    what = "L(N)"
    rows = tuned(on_all_data(prepared(table, ())), ("size", "horizon"))
    different_sizes(rows["size"], 3, what)
    last = rows.loc[rows.groupby("size")["horizon"].idxmax()].copy()
    last["falling"] = [last_fall(run["tokens"].to_numpy(), run["loss"].to_numpy()) for _, run in rows.groupby("size")]
    points = last[["size", "tokens", "loss", "falling"]].rename(columns={"size": "params"}).reset_index(drop=True)
    origin = f"each size at its longest horizon; {tuning_said(rows)}"
    data = Observations({"params": points["params"].to_numpy()}, points["loss"].to_numpy(), np.arange(len(points)), origin, points)
    fits, best, comparison, statements = fitted_rivals((forms.N, forms.N_FLOOR), data, "params")
    said = beside_published(fits[forms.N.name], theory.SOURCE) + [_converged(points["falling"].to_numpy())]
    if points["tokens"].max() > 1.5 * points["tokens"].min():
        said.append(f"the longest horizons differ between sizes, {points['tokens'].min():.3g} to {points['tokens'].max():.3g} tokens")
    return Finding("kaplan_n", what, fits, best, [], said + statements, points, len(points), comparison)


def of_data(table: pandas.DataFrame) -> Finding:
    """L(D): the early-stopped loss of one size, the largest of those with most subsets of the data, at each subset."""
    data = data_observations(table)
    points = data.frame
    fits, best, comparison, statements = fitted_rivals((forms.D, forms.D_FLOOR), data, "data_tokens")
    said = beside_published(fits[forms.D.name], theory.SOURCE)
    said.append(f"all of it is of one size, {points['size'].iloc[0]:.4g} parameters: where that size limits the loss, this law is too flat")
    return Finding("kaplan_d", "L(D)", fits, best, [], said + censored_said(points) + statements, tidy(points), len(data.y), comparison)


def data_observations(table: pandas.DataFrame) -> Observations:
    """What L(D) is fitted to."""
    what = "L(D)"
    stopped = _subsets(prepared(table, ("data_tokens",)), what)
    count = stopped.groupby("size")["data_tokens"].nunique()
    size = count[count == count.max()].index.max()
    points = stopped[stopped["size"] == size].copy()
    different(points["data_tokens"], "data_tokens", 3, what)
    _not_all_censored(points, 3, what)
    origin = f"one size, {size:.4g} parameters, early-stopped on each subset of the data; {tuning_said(stopped)}"
    fitted = points[~points["censored"]]
    x = {"data_tokens": fitted["data_tokens"].to_numpy(float)}
    return Observations(x, fitted["loss"].to_numpy(), np.arange(len(fitted)), origin, points)


def of_compute(table: pandas.DataFrame) -> Finding:
    """L(C): the tuned rows on the lower envelope over C = 6·N·tokens, between a smaller and a larger size that were measured there too."""
    what = "L(C)"
    rows = tuned(on_all_data(prepared(table, ())), ("size", "horizon"))
    different_sizes(rows["size"], 3, what)
    return compute_law("kaplan_c", what, rows, "flops", "size", (forms.C, forms.C_FLOOR), tuning_said(rows))


def compute_law(name, what, rows, budget, course, pair, origin, more=(), widened: Callable[[LawFit], LawFit] = lambda law: law) -> Finding:
    """A law along the lower envelope of rows over a budget; `widened` brings what its fits do not know of into their intervals."""
    data = envelope_observations(what, rows, budget, course, origin)
    points = data.frame
    fits, best, comparison, statements = fitted_rivals(pair, data, budget)
    fits = {form: widened(law) for form, law in fits.items()}
    said = beside_published(fits[pair[0].name], theory.SOURCE)
    said.append(
        "the envelope is the least of several noisy losses at each budget, and so a little too low, more where more sizes were tried"
    )
    if left := int(points["censored"].sum()):
        said.append(f"{left} of {len(points)} points of the envelope are left out: the best size there is the smallest or largest tried")
    columns = ["size", "tokens", budget, "loss", "censored"] + (["batch_tokens"] if "batch_tokens" in points else [])
    points = points[columns].rename(columns={"size": "params"})
    return Finding(name, what, fits, best, [], [*said, *more, *statements], points, len(np.unique(data.cluster)), comparison)


def envelope_observations(what: str, rows: pandas.DataFrame, budget: str, course: str, origin: str) -> Observations:
    """What a law of compute is fitted to: `frontier.frontier_rows` that are not censored."""
    points = frontier_rows(rows, budget, course)
    fitted = points[~points["censored"]]
    if len(fitted) < 3:
        raise UserError(
            f"{what} needs at least 3 points of the lower envelope that lie between a smaller and a larger size; there are {len(fitted)} "
            f"of {len(points)}: more sizes, or horizons at which their courses cross"
        )
    x = {budget: fitted[budget].to_numpy()}
    return Observations(x, fitted["loss"].to_numpy(), fitted["run"].to_numpy(), f"lower envelope; {origin}", points)


def of_size_and_data(table: pandas.DataFrame) -> Finding:
    """L(N, D): early-stopped losses on subsets of the data; of a table without subsets every tuned row of one pass, D the tokens seen."""
    what = "L(N, D)"
    points, data = size_and_data(table, what)
    rivals = (forms.ND, QUICK) if one_pass(table) else (forms.ND,)
    fits, best, comparison, statements = fitted_rivals(rivals, data, "data_tokens")
    law = fits[forms.ND.name]
    said = beside_published(law, theory.SOURCE) + censored_said(points)
    if one_pass(table):
        said.append("the table has no subsets of the data (data_tokens): D is what was seen in one pass, and nothing was stopped early")
    ratio = draws_of(law, "alpha_n") / draws_of(law, "alpha_d")
    numbers = [
        derived(
            "alpha_n / alpha_d",
            law.values["alpha_n"] / law.values["alpha_d"],
            ratio,
            [law],
            ("n_c", "alpha_n", "alpha_d"),  # with N_c at its bound α_N is what the bound makes it
            published=theory.DATA_RULE[1],
            source=theory.SOURCE,
        )
    ]
    return Finding("kaplan_nd", what, fits, best, numbers, said + statements, tidy(points), len(data.y), comparison)


# ---------------------------------------------------------------------------------------------------------------------------------- shared


def one_pass(table: pandas.DataFrame) -> bool:
    return "data_tokens" not in table or not (table["data_tokens"] > 0).any()


def _subsets(rows: pandas.DataFrame, what: str) -> pandas.DataFrame:
    """Early-stopped and tuned, a row for each size and subset; `censored` where the loss still fell at the last horizon."""
    of_subsets = rows[rows["data_tokens"] > 0]
    if len(of_subsets) == 0:
        raise UserError(f"{what} needs runs on subsets of the data: rows with different data_tokens above 0; all are 0, the whole of it")
    best = tuned(early_stopped(of_subsets), ("size", "data_tokens"))
    best["censored"] = best["falling"].to_numpy() > CONVERGED
    return best


def size_and_data(table: pandas.DataFrame, what: str) -> tuple[pandas.DataFrame, Observations]:
    rows = prepared(table, ())
    if one_pass(table):
        points = tuned(rows, ("size", "horizon")).assign(censored=False, data_tokens=lambda t: t["tokens"])
        origin = f"every tuned row of one pass, D the tokens seen; {tuning_said(points)}"
        cluster = points["run"].to_numpy()
    else:
        points = _subsets(rows, what)
        origin = f"early-stopped losses on subsets of the data; {tuning_said(points)}"
        cluster = None
    points["params"] = points["size"]
    different_sizes(points["params"], 2, what)
    different(points["data_tokens"], "data_tokens", 2, what)
    _not_all_censored(points, 5, what)
    fitted = points[~points["censored"]]
    x = {name: fitted[name].to_numpy(float) for name in ("params", "data_tokens")} | {"tokens": fitted["data_tokens"].to_numpy(float)}
    cluster = np.arange(len(fitted)) if cluster is None else cluster
    return points, Observations(x, fitted["loss"].to_numpy(), cluster, origin, points)


def _not_all_censored(points: pandas.DataFrame, least: int, what: str) -> None:
    usable, left = int((~points["censored"]).sum()), int(points["censored"].sum())
    if usable < least and left:
        raise UserError(
            f"{what} needs at least {least} points; of {len(points)}, {left} still fell by more than {CONVERGED:.0%} over their last "
            "doubling of tokens: train them to longer horizons"
        )
    enough(points[~points["censored"]], least, what)


def _converged(falling: np.ndarray) -> str:
    if np.isnan(falling).any():
        return "some sizes have a single horizon, or none at half of it: whether they are converged cannot be told"
    if falling.max() <= CONVERGED:
        return f"all sizes are converged: over the last doubling of tokens the loss fell by {falling.max():.1%} at most"
    return (
        f"the sizes are not converged: over the last doubling of tokens the loss still fell by {falling.min():.1%} to {falling.max():.1%}. "
        "This is the law at these horizons, and its exponent also has in it how far each size had come"
    )


def censored_said(points: pandas.DataFrame) -> list[str]:
    """Which points of `size_and_data` or `data_observations` are left out, and of which it is not known whether they should be."""
    left, said = int(points["censored"].sum()), []
    if left:
        said.append(f"{left} of {len(points)} points are left out: their loss still fell by more than {CONVERGED:.0%} at the last horizon")
    if "falling" in points and (unknown := int(points["falling"].isna().sum())):
        said.append(
            f"of {unknown} of {len(points)} points it cannot be told whether the loss was at its lowest: the run has one horizon, or none "
            "at half of its last. They are taken as they are; those whose loss still fell are only bounds"
        )
    return said


def tidy(points: pandas.DataFrame) -> pandas.DataFrame:
    points = points.assign(params=points["size"])
    columns = ("params", "data_tokens", "tokens", "batch_tokens", "loss", "falling", "excess", "excess_by_law", "censored")
    return points[[name for name in columns if name in points]].reset_index(drop=True)


ANALYSES = (
    Analysis("kaplan_n", "L(N)", ("params", "tokens", "loss"), of_size, f"{theory.SOURCE}, eq. 1.1"),
    Analysis("kaplan_d", "L(D)", ("params", "tokens", "loss", "data_tokens"), of_data, f"{theory.SOURCE}, eq. 1.2"),
    Analysis("kaplan_c", "L(C)", ("params", "tokens", "loss"), of_compute, f"{theory.SOURCE}, Table 5"),
    Analysis("kaplan_nd", "L(N, D)", ("params", "tokens", "loss"), of_size_and_data, f"{theory.SOURCE}, eq. 1.5"),
)
