"""Rivals are told apart where the data can, and tied where they cannot."""

import numpy as np
import pytest
from test_laws_fit import BEND, LINE, planted

from scaling_jax.errors import UserError
from scaling_jax.laws.compare import compare

T = np.geomspace(0.1, 100, 24)


def test_the_form_that_made_the_data_wins_where_they_reach():
    data = planted(BEND, {"c": 5.0, "k": 2.0}, T, 0.02, np.random.default_rng(0))
    found = compare([LINE, BEND], data, "t")
    assert found.best == "bend" and found.tied == ["bend"] and found.statement.startswith("bend predicts best beyond t ")
    assert found.points == 6 and found.beyond == T[-7]
    line = next(rival for rival in found.rivals if rival.form == "line")
    slope, height = np.polyfit(np.log(T[:-6]), np.log(data.y[:-6]), 1)  # the same by hand
    wanted = np.sqrt(np.mean((np.log(data.y[-6:]) - height - slope * np.log(T[-6:])) ** 2))
    assert line.held_out == pytest.approx(wanted, rel=1e-4) and 0 < line.low < line.high


def test_below_the_bend_they_are_tied():
    found = [compare([LINE, BEND], planted(BEND, {"c": 5.0, "k": 2e4}, T, 0.02, np.random.default_rng(seed)), "t") for seed in range(6)]
    tied = [one for one in found if len(one.tied) == 2]
    assert len(tied) >= 5 and all("cannot be told apart" in one.statement for one in tied)


def test_three_runs_held_out_tell_nothing():
    data = planted(BEND, {"c": 5.0, "k": 2.0}, T[::2], 0.001, np.random.default_rng(3))
    assert compare([LINE, BEND], data, "t", share=0.3).tied == ["bend"]
    few = compare([LINE, BEND], data, "t", share=0.2)
    assert few.tied == ["bend", "line"] and "from 3 independent runs, which are too few" in few.statement


def test_whole_values_are_held_out_never_the_smaller_half():
    t = np.repeat([1.0, 2.0, 4.0, 8.0], 5)
    found = compare([LINE], planted(LINE, {"c": 1.0, "p": 0.5}, t, 0.1, np.random.default_rng(2)), "t", share=0.3)
    assert found.beyond == 2.0 and found.points == 10
    with pytest.raises(UserError, match="extrapolation in t, which needs 3 different values or more; there are 2"):
        compare([LINE], planted(LINE, {"c": 1.0, "p": 0.5}, t[:10], 0.1, np.random.default_rng(2)), "t")
