"""Compute-efficient allocation after Kaplan et al. 2020 (arXiv 2001.08361): measured, by the closed form, and where the two contradict."""

import functools

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws import kaplan_forms as forms
from scaling_jax.laws import kaplan_theory as theory
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import LawFit, fit
from scaling_jax.laws.frontier import different_sizes, interpolated, on_all_data, prepared, tuned
from scaling_jax.laws.isoflop import bootstrapped, line, minima, takeovers
from scaling_jax.laws.kaplan import data_observations, envelope_observations
from scaling_jax.laws.kaplan_steps import least_compute_rows, of_critical_batch, of_steps, with_least_compute
from scaling_jax.laws.rivals import against, derived, draws_of, from_draws

_TABLE = f"{theory.SOURCE}, Table 6"
_CLOSED = f"{theory.SOURCE}, App. B"


def allocation(table: pandas.DataFrame) -> Finding:
    """How compute is best divided between size and data: the minima at equal C_min, and Appendix B from L(N, S_min) and B_crit(L), apart.

    Without B_crit compute is what was spent, 6·N·tokens.
    """
    what = "compute-efficient allocation"
    try:
        rows, critical = least_compute_rows(table, what)
        budget, unit, said = "min_flops", "C_min", [critical.said]
        courses = rows
        rows = rows.sort_values("loss").drop_duplicates(["size", "horizon"])  # of each size the best batch size at that horizon
    except UserError:
        rows = tuned(on_all_data(prepared(table, ())), ("size", "horizon"))
        courses, critical, budget, unit, said = None, None, "flops", "C", ["B_crit is not known: compute is 6·N·tokens as spent, not C_min"]
    different_sizes(rows["size"], 3, what)
    points = minima(rows, budget)
    enclosed = points[~points["censored"]]
    if len(enclosed) < 3:
        raise UserError(
            f"{what} needs 3 budgets or more at which a smaller and a larger size than the best were measured; of {len(points)}, "
            f"{len(enclosed)} are so: more sizes, or horizons at which their courses cross"
        )
    drawn = bootstrapped(rows, budget)
    if critical is not None and (off := [line(minima(with_least_compute(rows, other), budget)) for other in critical.off()]):
        drawn = drawn + critical.draws(len(drawn)) @ (np.array(off) - line(points))
    numbers = _measured(points, drawn, unit)
    said.append(against("the measured exponent of N", *numbers[0][1:4], theory.TABLE_6["params"][1], theory.SOURCE))
    if left := len(points) - len(enclosed):
        said.append(f"{left} of {len(points)} budgets are left out: the best size lies at the edge of what was measured there")
    fits: dict[str, LawFit] = {}
    try:
        steps = of_steps(table).fits[forms.NS.name]
        stops, sentence = _above_converged(steps, rows, budget)
        try:
            fits, closed = _closed_form(steps, table)
            numbers += closed
            said.append(_contradiction(numbers[0], closed[0], unit))
        except UserError as error:
            said.append(f"the closed form of Appendix B cannot be had: {error}")
        numbers += stops
        said.append(sentence)
    except UserError as error:
        said.append(f"the closed form of Appendix B, and how far above converged the frontier is, cannot be had: {error}")
    met, sentences = _meeting(table, courses, enclosed, numbers[2].value)
    return Finding("kaplan_allocation", what, fits, None, numbers + met, said + sentences, points, int(rows["run"].nunique()))


def _measured(points: pandas.DataFrame, drawn_Rx2: np.ndarray, unit: str) -> list[Number]:
    exponent, log_scale = line(points)
    drawn_R, log_day = drawn_Rx2[:, 0], np.log(theory.PF_DAY)
    at_day, drawn_at_day = np.exp(log_scale + exponent * log_day), np.exp(drawn_Rx2[:, 1] + drawn_R * log_day)
    n, d = theory.TABLE_6["params"], theory.TABLE_6["tokens"]
    return [
        from_draws(f"p of N ∝ {unit}^p, measured", exponent, drawn_R, published=n[1], source=_TABLE),
        from_draws("N at one PF-day, measured", at_day, drawn_at_day, unit="parameters", published=n[0], source=_TABLE),
        from_draws(f"p of D ∝ {unit}^p, measured", 1 - exponent, 1 - drawn_R, published=d[1], source=_TABLE),
    ]


def frontier_losses(rows: pandas.DataFrame, budget: str) -> pandas.DataFrame:
    """The loss of the best size at each budget at which one size takes over from the next.

    The best size is there the geometric mean of the two. Its loss is below that of both, on a ladder of factors of 4 by more than 1%: it is
    interpolated, a polynomial of ln L in ln N through the next two sizes on either side. Takeovers with fewer than three are left out.

    Returns:
      Columns flops, params, loss.
    """
    points = takeovers(rows, budget)
    loss_SxK, sizes = interpolated(rows, points["flops"].to_numpy(), budget)
    found = []
    for k, (flops, params) in enumerate(zip(points["flops"], points["params"], strict=True)):
        there_S = np.isfinite(loss_SxK[:, k])
        off, log_loss = np.log(sizes[there_S].astype(float) / params), np.log(loss_SxK[there_S, k])
        near = np.concatenate([np.flatnonzero(off < 0)[-2:], np.flatnonzero(off > 0)[:2]])
        if len(near) > 2:
            found.append((flops, params, float(np.exp(np.polyfit(off[near], log_loss[near], len(near) - 1)[-1]))))
    return pandas.DataFrame(found, columns=["flops", "params", "loss"])


def _above_converged(steps: LawFit, rows: pandas.DataFrame, budget: str) -> tuple[list[Number], str]:
    """By what share the measured frontier lies above L(N, ∞) = (N_c/N)^α_N of the fitted L(N, S_min); beside it α_N/α_S of the same fit
    (eq. B.5)."""
    number = functools.partial(derived, laws=[steps], published=0.1, source=_CLOSED)
    alpha_n, alpha_s, n_c = (steps.values[name] for name in ("alpha_n", "alpha_s", "n_c"))
    drawn_n, drawn_s, drawn_c = (draws_of(steps, name)[:, None] for name in ("alpha_n", "alpha_s", "n_c"))
    closed = number("frontier above converged by, α_N/α_S", alpha_n / alpha_s, (drawn_n / drawn_s)[:, 0], uses=("alpha_n", "alpha_s"))
    points = frontier_losses(rows, budget)
    theirs = f"{theory.SOURCE} have α_N/α_S, about 0.1"
    if len(points) < 2:
        few = f"one size takes over from the next, between others, at {len(points)} budgets, and 2 are needed"
        return [closed], f"how far the frontier is above L(N, ∞) cannot be measured: {few}; {theirs}"
    log_n_K, log_loss_K = np.log(points["params"].to_numpy()), np.log(points["loss"].to_numpy())
    over = np.expm1(np.mean(log_loss_K - alpha_n * (np.log(n_c) - log_n_K)))
    drawn_RxK = log_loss_K - drawn_n * (np.log(drawn_c) - log_n_K)
    # The budgets' own scatter about their mean, which is Student's: two of them say little of it.
    error = np.std(log_loss_K - alpha_n * (np.log(n_c) - log_n_K), ddof=1) / np.sqrt(len(points))
    drawn = np.expm1(drawn_RxK.mean(axis=1) + error * np.random.default_rng(0).standard_t(len(points) - 1, size=len(drawn_RxK)))
    note = f"mean of {len(points)} budgets"
    where = "frontier above converged by, where sizes take over"
    measured = number(where, float(over), drawn, uses=("n_c", "alpha_n"), note=note)
    if measured.value is None:
        return [measured, closed], f"how far the frontier is above L(N, ∞) cannot be told: {measured.note}; {theirs}"
    return [measured, closed], against(
        f"the measured frontier over L(N, ∞), less 1, a mean of {len(points)} budgets,", *measured[1:4], 0.1, theory.SOURCE
    )


def _closed_form(steps: LawFit, table: pandas.DataFrame) -> tuple[dict[str, LawFit], list[Number]]:
    batch = of_critical_batch(table).fits[forms.BCRIT.name]
    fits = {forms.NS.name: steps, forms.BCRIT.name: batch}
    k = theory.Training(**steps.values, **batch.values)
    count = min(len(steps.draws_RxP), len(batch.draws_RxP))
    drawn = theory.Training(**{name: draws_of(law, name)[:count] for law in (steps, batch) for name in law.form.names})
    published = theory.PUBLISHED
    number = functools.partial(derived, laws=[steps, batch], source=_CLOSED)
    powers, numbers = ("alpha_n", "alpha_b", "alpha_s"), []
    for letter, name in zip(("N", "B", "S_min"), powers, strict=True):
        of_all = [theory.compute_exponent(of) / getattr(of, name) for of in (k, drawn, published)]
        numbers.append(number(f"p of {letter} ∝ C_min^p, closed form", *of_all[:2], uses=powers, published=of_all[2]))
    exponents = [theory.compute_exponent(of) for of in (k, drawn, published)]
    numbers.append(number("α_C^min, closed form", *exponents[:2], uses=powers, published=exponents[2]))
    at_day = [theory.efficient(1.0, of).params for of in (k, drawn, published)]
    more = {"uses": theory.Training._fields, "unit": "parameters", "published": float(at_day[2])}
    return fits, [*numbers, number("N at one PF-day, closed form", *at_day[:2], **more)]


def _contradiction(measured: Number, closed: Number, unit: str) -> str:
    if closed.value is None:
        return f"N ∝ {unit}^{measured.value:.2f} measured cannot be set beside the closed form: {closed.note}"
    sentence = f"N ∝ {unit}^{measured.value:.2f} measured against C_min^{closed.value:.2f} by the closed form"
    if None in (measured.low, measured.high, closed.low, closed.high):
        verdict = "without intervals for both"
    elif measured.low <= closed.high and closed.low <= measured.high:
        verdict = "their intervals overlap"
    else:
        verdict = "their intervals exclude each other: the two contradict each other here"
    return f"{sentence}, {verdict}; {theory.SOURCE} have 0.73 (Table 6) against 0.68 by their own constants (Appendix B)"


def _meeting(
    table: pandas.DataFrame, courses: pandas.DataFrame | None, enclosed: pandas.DataFrame, exponent: float
) -> tuple[list[Number], list[str]]:
    """Where L(C_min), of the courses over C_min, meets L(D) of the data that the measured allocation uses (section 6.3)."""
    t = theory.TABLE_5
    constants = (t["alpha_c_min"], t["c_c_min"], t["alpha_d"], t["d_c"])
    published = [theory.intersection(*constants, *of_data)[0] for of_data in (theory.TABLE_6["tokens"], theory.DATA_OF_COMPUTE)]
    theirs = f"{theory.SOURCE}'s own constants have {published[0]:.2g} PF-days (Tables 5 and 6) or {published[1]:.2g} (eq. 6.7)"
    try:
        if courses is None:
            raise UserError("B_crit is not known")
        envelope = envelope_observations("L(C_min)", courses, "min_flops", "course", "")
        laws = [fit(forms.D, data_observations(table), resamples=0), fit(forms.C_MIN, envelope, resamples=0)]
        if unknown := [sentence for law in laws for sentence in law.unidentified.values()]:
            raise UserError("; ".join(unknown))
        data, compute = (law.values for law in laws)
    except UserError as error:
        return [], [f"where L(C_min) and L(D) contradict each other (section 6.3) cannot be told: {error}; {theirs}"]
    log_one = np.mean(np.log(enclosed["tokens"]) - exponent * np.log(enclosed["flops"] / theory.PF_DAY))
    fitted = (compute["alpha_c_min"], compute["c_c_min"], data["alpha_d"], data["d_c"])
    at, tokens, loss = theory.intersection(*fitted, float(np.exp(log_one)), exponent)
    if not np.isfinite(at):
        return [], [f"L(C_min) falls no faster than L(D) of the data that it uses: they do not meet (section 6.3); {theirs}"]
    said = (
        f"beyond C_min = {at:.2g} PF-days, {tokens:.2g} tokens, {loss:.3g} nats, L(C_min) is below what L(D) allows the data that it uses: "
        f"one of the two laws ends before (section 6.3); {theirs}"
    )
    return [Number("C_min where L(C_min) and L(D) meet", at, None, None, "PF-days", 1e4, f"{theory.SOURCE}, sec. 6.3")], [said]


ANALYSES = (
    Analysis(
        "kaplan_allocation", "compute-efficient allocation", ("params", "tokens", "loss"), allocation, f"{theory.SOURCE}, sec. 6 and App. B"
    ),
)
