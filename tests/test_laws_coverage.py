"""Planted laws: of every form, the 95% intervals of simulated studies hold the truth as often as they should.

    pytest -m slow tests/test_laws_coverage.py

Without -m slow, three forms in a few studies: enough to see an interval that is twice too narrow.
"""

import numpy as np
import planted_laws_A
import planted_laws_B
import pytest

from scaling_jax.laws.fit import fit

PLANTED = planted_laws_A.PLANTED | planted_laws_B.PLANTED
STUDIES, FEW = 200, 30


def coverage(name, studies):
    """Of each parameter, the share of studies whose interval holds the truth; an open end holds everything beyond."""
    form, truth, make = PLANTED[name]
    inside = {parameter: 0 for parameter in form.names}
    for study in range(studies):
        fitted = fit(form, make(np.random.default_rng(study)), resamples=200, seed=study)
        for parameter, (low, high) in fitted.intervals.items():
            inside[parameter] += (low is None or low <= truth[parameter]) and (high is None or truth[parameter] <= high)
    return {parameter: count / studies for parameter, count in inside.items()}


@pytest.mark.parametrize("name", ["kaplan_n", "surge", "growth_tokens"])
def test_intervals_are_not_far_too_narrow(name):
    found = coverage(name, FEW)
    assert all(share >= 0.80 for share in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_intervals_hold_the_truth(name):
    found = coverage(name, STUDIES)
    assert all(0.90 <= share <= 0.99 for share in found.values()), found
