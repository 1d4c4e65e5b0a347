"""Overfitting after Kaplan et al. 2020 (arXiv 2001.08361, sec. 4 and 5.3): the data rule, and the bound of early stopping."""

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws import kaplan_forms as forms
from scaling_jax.laws import kaplan_theory as theory
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import fit
from scaling_jax.laws.kaplan import censored_said, one_pass, size_and_data, tidy
from scaling_jax.laws.kaplan_steps import of_steps
from scaling_jax.laws.observations import Observations
from scaling_jax.laws.rivals import against, beside_published, derived, draws_of

EXCESS = (0.02, 0.05, 0.1, 0.2)  # δL for which the data rule is measured: the first that most sizes pass
_ALL = 1e40  # tokens: so many that they limit no loss


def overfitting(table: pandas.DataFrame) -> Finding:
    """How far too little data raise the loss: the data rule, measured and by the constants of L(N, D), and the bound of early stopping."""
    what = "overfitting"
    if one_pass(table):
        raise UserError(f"{what} needs runs on subsets of the data, repeated: rows with different data_tokens above 0")
    points, data = size_and_data(table, what)
    law = fit(forms.ND, data)
    constants = {name: law.values[name] for name in law.form.names}
    drawn = {name: draws_of(law, name) for name in law.form.names}
    exponent = constants["alpha_n"] / constants["alpha_d"]
    three = ("n_c", "alpha_n", "alpha_d")  # with N_c at its bound α_N is what the bound makes it
    ratio, source = drawn["alpha_n"] / drawn["alpha_d"], theory.SOURCE
    by_constants = derived("γ by L(N, D)", exponent, ratio, [law], three, published=theory.DATA_RULE[1], source=source)
    numbers, said = [by_constants], []
    said.append(against("γ = α_N/α_D of D ∝ N^γ", *by_constants[1:4], theory.DATA_RULE[1], theory.SOURCE))
    largest = float(points["params"].max())
    needed, drawn_needed = theory.tokens_for(largest, EXCESS[0], **constants), theory.tokens_for(largest, EXCESS[0], **drawn)
    of_largest = f"data for {largest:.3g} parameters, {EXCESS[0]:.0%} overfitting"
    numbers.append(derived(of_largest, needed, drawn_needed, [law], law.form.names, unit="tokens"))
    endless = law.predict({"params": points["params"], "data_tokens": np.full(len(points), _ALL)})
    if unknown := [name for name in ("n_c", "alpha_n") if name in law.unidentified]:
        endless = np.full(len(points), np.nan)  # L(N, ∞) is not known, nor then what a loss exceeds it by
    points["excess"] = points["loss"] / endless - 1
    points["excess_by_law"] = np.nan if law.unidentified else theory.overfitting(points["params"], points["data_tokens"], **constants)
    fits, best = {law.form.name: law}, law.form.name
    excess, rule = _rule_points(points)
    if unknown:
        said.append(f"neither the data rule nor the bound of early stopping can be measured: L(N, ∞) needs {' and '.join(unknown)}")
        said += [law.unidentified[name] for name in unknown]
    elif len(rule) >= 3:
        x = {"params": rule["params"].to_numpy()}
        origin = f"data at which the measured loss is {excess:.0%} above L(N, ∞) of the fitted L(N, D), read off between subsets"
        measured = fit(forms.DATA, Observations(x, rule["data_tokens"].to_numpy(), np.arange(len(rule)), origin, rule))
        fits[forms.DATA.name] = measured
        low, high = measured.intervals["gamma"]
        numbers.append(
            Number(f"γ measured at {excess:.0%}", measured.values["gamma"], low, high, published=theory.DATA_RULE[1], source=theory.SOURCE)
        )
        said += beside_published(measured, theory.SOURCE)
    else:
        said.append(f"the data rule cannot be measured directly: {len(rule)} sizes pass {excess:.0%} between their subsets, 3 are needed")
    if not unknown:
        said += _stopping_bound(table, points, endless)
    return Finding("kaplan_overfitting", what, fits, best, numbers, said + censored_said(points), tidy(points), len(data.y))


def _rule_points(points: pandas.DataFrame) -> tuple[float, pandas.DataFrame]:
    """The overfitting that most sizes pass, and the data at which each does, between its subsets."""
    found = []
    for excess in EXCESS:
        rows = []
        for params, run in points.groupby("params"):
            run = run.sort_values("data_tokens")
            over, log_d = run["excess"].to_numpy(), np.log(run["data_tokens"].to_numpy(float))
            crossing = np.flatnonzero((over[:-1] > excess) & (over[1:] <= excess))
            if len(crossing):
                i = crossing[-1]
                share = np.log(over[i] / excess) / np.log(over[i] / max(over[i + 1], 1e-4))
                rows.append({"params": params, "data_tokens": np.exp(log_d[i] + share * (log_d[i + 1] - log_d[i]))})
        found.append((excess, pandas.DataFrame(rows, columns=["params", "data_tokens"])))
    return max(found, key=lambda entry: len(entry[1]))


def _stopping_bound(table: pandas.DataFrame, points: pandas.DataFrame, endless: np.ndarray) -> list[str]:
    """How many of the early-stopped points hold S_stop ≥ S_c/[L(N, D) − L(N, ∞)]^(1/α_S), where the table tells S_c and α_S."""
    if "batch_tokens" not in points:
        return ["the bound of early stopping needs batch_tokens"]
    try:
        law = of_steps(table).fits[forms.NS.name]
    except UserError as error:
        return [f"the bound of early stopping cannot be checked: {error}"]
    if unknown := [law.unidentified[name] for name in ("s_c", "alpha_s") if name in law.unidentified]:
        return [f"the bound of early stopping cannot be checked: of L(N, S_min), {'; '.join(unknown)}"]
    steps = law.values
    risen = ((points["falling"] == 0) & (points["excess"] > 0)).to_numpy()
    if not risen.any():
        return ["the bound of early stopping cannot be checked: the loss of no run rose"]
    bound = theory.least_stop(points["loss"].to_numpy()[risen], endless[risen], steps["alpha_s"], steps["s_c"])
    held = int(((points["tokens"] / points["batch_tokens"]).to_numpy()[risen] >= bound).sum())
    said = f"{held} of {len(bound)} runs whose loss rose were at their lowest no earlier than the bound of early stopping allows (eq. 5.7)"
    return [said]


ANALYSES = (
    Analysis(
        "kaplan_overfitting",
        "overfitting and the data rule",
        ("params", "tokens", "loss", "data_tokens"),
        overfitting,
        f"{theory.SOURCE}, sec. 4",
    ),
)
