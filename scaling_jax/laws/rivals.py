"""What every analysis does with its forms: fit the rivals, choose between them, set them beside what was published, say it in sentences."""

from collections.abc import Sequence

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.compare import Comparison, compare
from scaling_jax.laws.finding import Number
from scaling_jax.laws.fit import LEVEL, LawFit, fit
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
            if best not in comparison.tied and fits[comparison.best].identified:
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


def against(name: str, value: float, low: float | None, high: float | None, published: float, source: str) -> str:
    """Whether the published value lies in the interval, in a sentence."""
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


def draws_of(law: LawFit, name: str) -> np.ndarray:
    """A parameter's draws, [R], natural units."""
    return law.draws_RxP[:, law.form.names.index(name)]
