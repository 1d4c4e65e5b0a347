"""What every analysis does with its forms: fit the rivals, choose between them, set them beside what was published, say it in sentences."""

from collections.abc import Callable, Sequence

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.compare import Comparison, compare
from scaling_jax.laws.finding import Number
from scaling_jax.laws.fit import LEVEL, LawFit, fit, widened
from scaling_jax.laws.form import Form
from scaling_jax.laws.observations import Observations


def fitted_rivals(
    forms: Sequence[Form], data: Observations, by: str, resamples: int = 400, known: LawFit | None = None
) -> tuple[dict[str, LawFit], str, Comparison | None, list[str]]:
    """Fits of all forms, the name of the one to use, how they were told apart, and what is to be said.

    Of the first form the fit `known` is taken, if given. The one to use is that which extrapolates best in `by`; the first
    of `forms` where that cannot be told from it, or is not identified.

    Raises:
      UserError: the first form cannot be fitted; a rival that cannot is left out, and said to be.
    """
    fits, statements = {forms[0].name: known or fit(forms[0], data, resamples=resamples)}, []
    for form in forms[1:]:
        try:
            fits[form.name] = fit(form, data, resamples=resamples)
        except UserError as error:
            statements.append(f"a rival is left out: {error}")
    best, comparison = forms[0].name, None
    if len(fits) > 1:
        try:
            comparison = compare([form for form in forms if form.name in fits], data, by)
            statements.append(comparison.statement)
            if best not in comparison.tied and (fits[comparison.best].identified or not fits[best].identified):
                best = comparison.best
        except UserError as error:
            statements.append(str(error))
    return fits, best, comparison, statements


def beside_published(law: LawFit, exponents_of: str) -> list[str]:
    """A sentence for each parameter without a unit that was published, and for each that is not identified."""
    said = []
    for parameter in law.form.parameters:
        if parameter.name in law.unidentified:
            said.append(law.unidentified[parameter.name])
        elif parameter.published is not None and not parameter.unit:
            low, high = law.intervals[parameter.name]
            said.append(against(parameter.name, law.values[parameter.name], low, high, parameter.published, exponents_of))
    return said


def against(name: str, value: float | None, low: float | None, high: float | None, published: float, source: str) -> str:
    """Whether the published value lies in the interval, in a sentence."""
    if value is None:
        return f"{name} is not identified; {source} have {published:.3g}"
    if low is None and high is None:
        return f"{name} is {value:.3g}, without an interval; {source} have {published:.3g}"
    inside = (low is None or low <= published) and (high is None or published <= high)
    ends = f"{'…' if low is None else f'{low:.3g}'} to {'…' if high is None else f'{high:.3g}'}"
    return f"{name} is {value:.3g} ({ends}); {source} have {published:.3g}, {'inside' if inside else 'outside'} the interval"


def from_draws(name: str, value: float, draws: np.ndarray, **more) -> Number:
    """A number with the 95% interval of its draws; without one where there are none or a tenth of them are not finite."""
    draws = np.asarray(draws, float)
    finite = draws[np.isfinite(draws)]
    if len(draws) == 0 or len(finite) < 0.9 * len(draws):
        return Number(name, float(value), None, None, **more)
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Number(name, float(value), float(low), float(high), **more)


def derived(name: str, value: float, draws: np.ndarray, laws: Sequence[LawFit], uses: Sequence[str], note: str = "", **more) -> Number:
    """`from_draws` of a number that follows from the parameters `uses` of fitted laws, by their draws, which are widened here.

    It has no value, and its note says why, where a law does not identify one of these, or where the number is not finite: by the fit, or by
    more than a tenth of its draws.
    """
    missing = [parameter for law in laws for parameter in uses if parameter in law.unidentified]
    draws = np.asarray(draws, float)
    lost = float(np.mean(~np.isfinite(draws))) if len(draws) else 0.0
    if missing:
        why = f"it follows from {', '.join(missing)}, not identified"
    elif not np.isfinite(value):
        why = "by the fitted parameters it is not finite"
    elif lost > 0.1:
        why = f"by {lost:.0%} of the resamples it is not finite"
    else:
        widen = max((law.widen for law in laws), default=1.0)
        positive = value > 0 and bool(np.all(draws[np.isfinite(draws)] > 0))
        return from_draws(name, value, widened(value, draws, widen, log=positive), note=note, **more)
    return Number(name, None, None, None, note="; ".join(part for part in (why, note) if part), **more)


def with_error_of_input(law: LawFit, others: Sequence[Observations], errors: Callable[[int], np.ndarray]) -> LawFit:
    """A fit, its intervals with the error of something that was estimated before, and that its observations rest on.

    Args:
      law: the fit.
      others: the observations as they would be, were that off by one standard error in each of some independent directions.
      errors: gives so many draws of these errors, [R, directions], in standard errors.

    Returns:
      The same values; every draw is moved by a draw of the errors, to first order by fits of `others`. An end that moves beyond a
      parameter's bound is open, and the parameter then not identified; a law without draws is returned as it was.
    """
    if not others or not len(law.draws_RxP):
        return law
    form = law.form
    best_P = form.transformed([[law.values[name] for name in form.names]])[0]
    refitted = [fit(form, data, resamples=0, starts=[list(law.values.values())]).values for data in others]
    moves_ExP = form.transformed([[values[name] for name in form.names] for values in refitted]) - best_P
    draws_RxP = form.transformed(law.draws_RxP) + errors(len(law.draws_RxP)) @ moves_ExP / law.widen
    bounds_2xP = form.transformed([[p.low for p in form.parameters], [p.high for p in form.parameters]])
    wide_RxP = np.clip(best_P + law.widen * (draws_RxP - best_P), *bounds_2xP)
    tail = (1 - LEVEL) / 2
    ends_2xP = form.natural(np.quantile(wide_RxP, [tail, 1 - tail], axis=0, method="weibull"))
    open_2xP = np.mean(wide_RxP == bounds_2xP[:, None], axis=1) > tail
    intervals, unidentified = {}, dict(law.unidentified)
    for i, name in enumerate(form.names):
        was = law.intervals[name]
        ends = [None if end is None or open_2xP[side, i] else float(ends_2xP[side, i]) for side, end in enumerate(was)]
        intervals[name] = (ends[0], ends[1])
        if None in ends and None not in was:
            unidentified[name] = f"{name} is not identified: with the error of what the points rest on, its interval is open"
    return law._replace(
        draws_RxP=form.natural(np.clip(draws_RxP, *bounds_2xP)),
        intervals=intervals,
        se=dict(zip(form.names, wide_RxP.std(axis=0, ddof=1).tolist(), strict=True)),
        correlations_PxP=np.atleast_2d(np.corrcoef(draws_RxP.T)),
        unidentified=unidentified,
    )


def draws_of(law: LawFit, name: str) -> np.ndarray:
    """A parameter's draws, [R], natural units."""
    return law.draws_RxP[:, law.form.names.index(name)]
