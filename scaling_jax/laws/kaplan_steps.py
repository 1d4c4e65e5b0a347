"""Kaplan et al. 2020 (arXiv 2001.08361) from a results table: critical batch size by loss, training steps, least compute."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws import kaplan_forms as forms
from scaling_jax.laws import kaplan_theory as theory
from scaling_jax.laws.critical_batch import tradeoff_fit
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import LawFit, fit
from scaling_jax.laws.frontier import different_sizes, iso_loss, on_all_data, prepared, tuned, tuning_said
from scaling_jax.laws.kaplan import compute_law, envelope_observations
from scaling_jax.laws.observations import Observations, different
from scaling_jax.laws.power_law import PowerLaw, power_law
from scaling_jax.laws.rivals import beside_published, derived, fitted_rivals, with_error_of_input

NOISE = "noise_scale_tokens"
NOISE_WITHIN = 2.0  # factor within which, at 95%, the noise scale is taken to be B_crit, of which it is the simplest measure
CONVERGENCE = 0.02  # above converged: what efficient training is compared with


# ----------------------------------------------------------------------------------------------------------------- B_crit by loss, measured


def critical_points(rows: pandas.DataFrame) -> pandas.DataFrame:
    """E_min/S_min at each (size, loss) that several batch sizes reach, with its 95% interval.

    Columns: params, loss, critical_batch_tokens, low, high (nan where open), batches, min_steps, min_tokens, censored (the steps show no
    bend, or only an interval that is open).
    """
    table, found = iso_loss(rows), []
    for (size, loss), cell in table.groupby(["size", "loss"], sort=False):
        if len(cell) < 4:  # two parameters, and something left to judge them by
            continue
        bend = tradeoff_fit(cell[["batch_tokens", "steps"]].to_dict("records"))
        ends = [np.nan if end is None else end for end in (bend.low, bend.high)]
        value = np.nan if bend.batch_tokens is None else bend.batch_tokens
        unknown = (np.nan if v is None else v for v in (bend.min_steps, bend.min_tokens))
        found.append((size, loss, value, *ends, len(cell), *unknown, bool(np.isnan([value, *ends]).any())))
    columns = ["params", "loss", "critical_batch_tokens", "low", "high", "batches", "min_steps", "min_tokens", "censored"]
    return pandas.DataFrame(found, columns=columns).astype({"censored": bool})


def of_critical_batch(table: pandas.DataFrame) -> Finding:
    """B_crit(L) from the steps and tokens that several batch sizes take to the same losses, each at its best learning rate."""
    what = "B_crit(L)"
    rows = on_all_data(prepared(table, ("batch_tokens",)))
    different(rows["batch_tokens"], "batch_tokens", 4, what)
    points = critical_points(rows)
    fitted = points[~points["censored"]]
    if len(fitted) < 3:
        raise UserError(
            f"{what} needs 3 losses or more at which the steps of 4 batch sizes show their bend; of {len(points)} losses that 4 reach, "
            f"{len(fitted)} do: batch sizes over a wider range, or more horizons"
        )
    sizes = fitted["params"].nunique()
    cluster = fitted["params"].to_numpy() if sizes > 3 else np.arange(len(fitted))
    origin = "E_min/S_min from tokens to a loss by batch size, each at its best settings, interpolated in log tokens between horizons"
    data = Observations({"loss": fitted["loss"].to_numpy()}, fitted["critical_batch_tokens"].to_numpy(), cluster, origin, points)
    law = fit(forms.BCRIT, data)
    said = beside_published(law, theory.SOURCE)
    if sizes <= 3:
        said.append(
            f"{sizes} sizes are too few to resample: the interval takes each loss as a measurement of its own, and may be too narrow"
        )
    if "lr" not in rows or rows.groupby(["size", "batch_tokens"])["lr"].nunique().max() < 2:
        said.append("each batch size has one learning rate: E_min/S_min is then that learning rate's as much as the noise's")
    if (left := int(points["censored"].sum())) > 0:
        said.append(f"{left} of {len(points)} losses are left out: their steps show no bend within the batch sizes, or only one end of it")
    if sizes > 1:
        said += _by_size(fitted, law)
    return Finding("kaplan_bcrit", what, {law.form.name: law}, law.form.name, [], said, points, int(rows["run"].nunique()))


def _by_size(fitted: pandas.DataFrame, law) -> list[str]:
    off = pandas.Series(law.residuals, index=fitted.index).groupby(fitted["params"]).mean()
    listed = ", ".join(f"{size:.3g} parameters {np.expm1(value):+.0%}" for size, value in off.items())
    return [f"that B_crit depends on the loss alone and not on N: mean deviation from the law by size: {listed}"]


class Critical(NamedTuple):
    """B_crit of rows, and how it is known."""

    of: Callable[[pandas.DataFrame], np.ndarray]
    said: str
    law: PowerLaw | None = None  # of the loss, where it was fitted
    within: float = 1.0  # factor, 95%, by which all may be off together

    def counted(self, rows: pandas.DataFrame) -> "Critical":
        """The same, saying as well how many of the rows it does not know B_crit of."""
        unknown = int((~np.isfinite(self.of(rows))).sum())
        left_out = f"; {unknown} of {len(rows)} settings and horizons, whose B_crit is not known, are left out"
        return self._replace(said=self.said + left_out) if unknown else self

    def off(self) -> list["Critical"]:
        """As it would be, were it off by a standard error in each of its independent directions: a law's height and slope; else the one
        factor."""
        if (law := self.law) is None:
            more = self.within ** (1 / 1.96)
            return [Critical(lambda rows: more * self.of(rows), self.said)] if more > 1 else []
        higher = law._replace(log_scale=law.log_scale + law.centre_se)
        steeper = law._replace(exponent=law.exponent + law.exponent_se, log_scale=law.log_scale - law.exponent_se * law.centre)
        return [Critical(functools.partial(_by_law, other), self.said) for other in (higher, steeper)]

    def draws(self, count: int) -> np.ndarray:
        """Draws of the errors of `off`, [count, directions], in standard errors."""
        rng = np.random.default_rng(0)
        if self.law is None:
            return rng.normal(size=(count, len(self.off())))
        return rng.standard_t(self.law.points - 2, size=(count, 2))


def _by_law(law: PowerLaw, rows: pandas.DataFrame) -> np.ndarray:
    return law(rows["loss"].to_numpy())


def _noise_scale(rows: pandas.DataFrame) -> np.ndarray:
    value = rows[NOISE].astype(float)
    return value.where((value > 0) & np.isfinite(value)).to_numpy()


def known_critical(rows: pandas.DataFrame) -> Critical | None:
    """B_crit(L) by steps to a loss where it falls with the loss beyond doubt; else the noise scale, if every size has rows with one; else
    B_crit(L) by steps for what it is worth, else the noise scale of the rows that have one; else None.

    Beyond doubt: Student's 95% interval of its exponent lies below 0, for which three losses hardly ever suffice.
    """
    from scipy.special import stdtrit  # only here: slow to import

    by_steps, doubt = None, ""
    if "batch_tokens" in rows and rows["batch_tokens"].nunique() > 3:
        points = critical_points(rows)
        fitted = points[~points["censored"]]
        if (law := power_law(fitted["loss"], fitted["critical_batch_tokens"])) is not None:
            of_points = f"{law.points} points, L^{law.exponent:.3g}"
            by_steps = Critical(functools.partial(_by_law, law), f"B_crit(L) by steps to a loss, {of_points}", law)
            if -law.exponent > stdtrit(law.points - 2, 0.975) * law.exponent_se:
                return by_steps
            doubt = f"do not tell it ({of_points} ± {law.exponent_se:.2g})"
            by_steps = by_steps._replace(said=f"B_crit(L) by steps to a loss, though these {doubt}")
    if NOISE in rows and np.isfinite(_noise_scale(rows)).any():
        said = f"B_crit is each row's noise scale ({NOISE}), to a factor of {NOISE_WITHIN:g} at 95%" + (
            f"; steps to a loss {doubt}" if doubt else ""
        )
        everywhere = rows.assign(known=np.isfinite(_noise_scale(rows))).groupby("size")["known"].any().all()
        if everywhere or by_steps is None:
            return Critical(_noise_scale, said, within=NOISE_WITHIN)
    return by_steps


# ------------------------------------------------------------------------------------------------------------------------------ L(N, S_min)


def of_steps(table: pandas.DataFrame) -> Finding:
    """L(N, S_min) after warmup, S_min = S/(1 + B_crit/B) where B_crit is known; else plain steps at the largest batch size."""
    what = "L(N, S_min)"
    rows = on_all_data(prepared(table, ("batch_tokens",)))
    if "warmup_tokens" in rows:
        rows = rows[rows["tokens"] > rows["warmup_tokens"].fillna(0)]
    critical = known_critical(rows)
    best = tuned(rows, ("size", "batch_tokens", "horizon"))
    steps = best["tokens"] / best["batch_tokens"]
    if critical is None:
        largest = best["batch_tokens"].max()
        kept = (best["batch_tokens"] == largest).to_numpy()
        best, steps = best[kept], steps[kept]
        said = [
            f"B_crit is not known (it needs 4 batch sizes, or noise_scale_tokens): S is plain steps, at batches of {largest:.4g} tokens"
        ]
    else:
        critical = critical.counted(best)
        steps = theory.min_steps(steps, best["batch_tokens"], critical.of(best))
        said = [critical.said]
    points = best.assign(params=best["size"], min_steps=np.asarray(steps, float), steps=best["tokens"] / best["batch_tokens"])
    points = points[np.isfinite(points["min_steps"]) & (points["min_steps"] > 0)].reset_index(drop=True)
    different_sizes(points["params"], 2, what)
    different(points["tokens"], "horizons", 3, what)
    x = {name: points[name].to_numpy(float) for name in ("params", "min_steps", "tokens")}
    data = Observations(x, points["loss"].to_numpy(), points["run"].to_numpy(), f"rows after warmup; {tuning_said(best)}", points)
    fits, best_name, comparison, statements = fitted_rivals((forms.NS,), data, "tokens")
    if critical is not None and critical.off():
        others = [theory.min_steps(points["steps"], points["batch_tokens"], other.of(points)) for other in critical.off()]
        seen = [data._replace(x=x | {"min_steps": np.asarray(least, float)}) for least in others]
        fits[forms.NS.name] = with_error_of_input(fits[forms.NS.name], seen, critical.draws)
    law = fits[forms.NS.name]
    said += beside_published(law, theory.SOURCE)
    numbers = _of_efficient_training(law)
    tidy = points[["params", "batch_tokens", "tokens", "min_steps", "loss"]]
    return Finding("kaplan_ns", what, fits, best_name, numbers, said + statements, tidy, int(points["run"].nunique()), comparison)


def _of_efficient_training(law: LawFit) -> list[Number]:
    """What follows from the fit for training that spends the least compute (App. B)."""
    of_batch = {"alpha_b": 1.0, "b_star": 1.0}  # play no part in it
    k = theory.Training(**law.values, **of_batch)
    drawn = theory.Training(**dict(zip(law.form.names, law.draws_RxP.T, strict=True)), **of_batch)
    number = functools.partial(derived, laws=[law], uses=("alpha_n", "alpha_s"), source=f"{theory.SOURCE}, App. B")
    stops = theory.other_stop(theory.stop_above_converged(k), CONVERGENCE, k)
    drawn_stops = theory.other_stop(theory.stop_above_converged(drawn), CONVERGENCE, drawn)
    numbers = [number("efficient training stops above converged by", k.alpha_n / k.alpha_s, drawn.alpha_n / drawn.alpha_s, published=0.1)]
    for what, value, draws, published in zip(("parameters", "steps", "compute"), stops, drawn_stops, (2.7, 1 / 7.7, 0.35), strict=True):
        numbers.append(number(f"{what} over those of training to 2% of convergence", value, draws, published=published))
    for size, published in ((0.6, 1.2), (2.2, 1.2)):
        value, draws = theory.other_size(size, k)[1], theory.other_size(size, drawn)[1]
        numbers.append(number(f"compute for {size} times the efficient size", value, draws, published=published))
    return numbers


# --------------------------------------------------------------------------------------------------------------------------------- L(C_min)


def of_least_compute(table: pandas.DataFrame) -> Finding:
    """L(C_min), C_min = 6·N·tokens/(1 + B/B_crit): the lower envelope over courses of every size and batch size."""
    what = "L(C_min)"
    rows, critical = least_compute_rows(table, what)
    different_sizes(rows["size"], 3, what)
    origin, pair = tuning_said(rows), (forms.C_MIN, forms.C_MIN_FLOOR)
    law_of = functools.partial(compute_law, "kaplan_cmin", what, rows, "min_flops", "course", pair, origin)
    try:
        others = [envelope_observations(what, with_least_compute(rows, other), "min_flops", "course", origin) for other in critical.off()]
    except UserError as error:
        return law_of([critical.said, f"the error of B_crit is not in the intervals: {error}"])
    return law_of([critical.said], lambda law: with_error_of_input(law, others, critical.draws))


def least_compute_rows(table: pandas.DataFrame, what: str) -> tuple[pandas.DataFrame, Critical]:
    rows = on_all_data(prepared(table, ("batch_tokens",)))
    critical = known_critical(rows)
    if critical is None:
        raise UserError(
            f"{what} needs B_crit: rows at 4 batch sizes or more that reach the same losses, or the column {NOISE}; the table has neither"
        )
    best = tuned(rows, ("size", "batch_tokens", "horizon"))
    critical = critical.counted(best)
    best = with_least_compute(best, critical)
    best = best[np.isfinite(best["min_flops"])].reset_index(drop=True)
    best["course"] = best.groupby(["size", "batch_tokens"]).ngroup()
    return best, critical


def with_least_compute(rows: pandas.DataFrame, critical: Critical) -> pandas.DataFrame:
    return rows.assign(min_flops=theory.min_compute(rows["flops"], rows["batch_tokens"], critical.of(rows)))


ANALYSES = (
    Analysis("kaplan_bcrit", "B_crit(L)", ("params", "tokens", "loss", "batch_tokens"), of_critical_batch, f"{theory.SOURCE}, eq. 5.3"),
    Analysis("kaplan_ns", "L(N, S_min)", ("params", "tokens", "loss", "batch_tokens"), of_steps, f"{theory.SOURCE}, eq. 1.6"),
    Analysis("kaplan_cmin", "L(C_min)", ("params", "tokens", "loss", "batch_tokens"), of_least_compute, f"{theory.SOURCE}, eq. 1.3"),
)
