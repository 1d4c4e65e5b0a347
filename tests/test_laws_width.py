"""Equality across widths as a hypothesis: it holds where it was planted, falls where it was not, and its p-value is one."""

import numpy as np
import pandas
import pytest
from scipy import stats
from worlds import World

from scaling_jax.errors import UserError
from scaling_jax.laws.width import _OF_RUNS, Slope, _said, _student, find, width_slope


def numbers_of(world, seed=0):
    finding = find(world.table(seed))
    return {number.name: number for number in finding.numbers}, finding


def test_planted_equality_is_not_rejected_and_a_shift_is_excluded():
    named, finding = numbers_of(World())
    for what in ("η*", "curvature/L", "sensitivity/L", "B*", "B_crit (noise)"):
        number = named[f"slope of ln {what} in ln width under mup"]
        assert number.low - 0.01 < 0 < number.high + 0.01 and number.high - number.low < 0.25, what
    assert "η* under mup: no difference between widths is shown" in finding.statements[0] and "is excluded at 95%" in finding.statements[0]


def test_planted_slope_under_the_standard_parametrization():
    named, finding = numbers_of(World(parametrization="standard", lr_params_exponent=-0.3, widths=(32, 64, 128)))
    slope = named["slope of ln η* in ln width under standard"]
    assert slope.value == pytest.approx(-0.6, abs=0.02) and slope.high - slope.low < 0.05  # N ∝ width²
    assert "η* under standard is not the same at all widths: a doubling moves it by a factor 0.6" in finding.statements[0]
    assert "p " in slope.note


def test_slopes_of_batch_sizes_are_students():
    slopes = np.array([0.1, -0.05, 0.2, 0.03])
    found = _student(slopes)
    test = stats.ttest_1samp(slopes, 0.0)
    interval = test.confidence_interval(0.95)
    assert found == pytest.approx((slopes.mean(), interval.low, interval.high, test.pvalue, 4))
    assert np.isnan(_student(slopes[:2]).p)


def test_no_interval_is_said_of_what_there_is_too_little_of():
    unknown = Slope(0.1, np.nan, np.nan, np.nan, 2)
    assert _said("η*", unknown, "by 2 batch sizes").endswith("no interval, since 2 batch sizes are too few.")
    assert _said("η*", unknown._replace(clusters=1), "by 1 batch size").endswith("no interval, since 1 batch size is too few.")
    assert _said("B*", unknown._replace(clusters=12), _OF_RUNS).endswith("no interval, since the noise of the runs is not known.")


def test_the_slope_compares_equal_batch_and_horizon_only():
    """Widths were tried at other horizons each: what they share is two."""
    rows = [
        {"width": w, "batch_tokens": b, "tokens": t, "lr": w**-0.5 * b**0.5 * t**-0.3}
        for b in (1.0, 2.0, 4.0)
        for w, horizons in ((32.0, (1.0, 2.0, 4.0)), (64.0, (2.0, 4.0, 8.0, 16.0)))
        for t in horizons
    ]
    found = width_slope(pandas.DataFrame(rows), "lr")
    assert found.slope == pytest.approx(-0.5) and found.clusters == 3
    assert width_slope(pandas.DataFrame([row for row in rows if row["width"] == 32]), "lr") is None


def test_p_values_are_right_though_horizons_share_runs():
    """The same differences taken for independent, cell by cell, reject far too often."""
    rng = np.random.default_rng(5)
    p, naive = [], []
    grid = pandas.DataFrame([{"width": w, "batch_tokens": b, "tokens": t} for w in (32.0, 64.0) for b in range(6) for t in range(1, 4)])
    for _ in range(120):
        errors = 0.05 * np.repeat(rng.normal(size=12), 3) + 0.02 * rng.normal(size=36)
        p.append(width_slope(grid.assign(lr=np.exp(errors)), "lr").p)
        naive.append(stats.ttest_1samp(errors[18:] - errors[:18], 0.0).pvalue)
    assert 0.01 < np.mean(np.array(p) < 0.1) < 0.2 < np.mean(np.array(naive) < 0.1)
    assert 0.35 < np.mean(np.array(p) < 0.5) < 0.65


def test_one_width_and_each_parametrization_by_itself():
    with pytest.raises(UserError, match="equality across widths needs at least 2 different widths; there is 1: 32"):
        find(World(widths=(32,), seeds=1).table())
    with pytest.raises(UserError, match="the table has no width"):
        find(World(seeds=1).table().drop(columns="width"))
    standard = World(parametrization="standard", lr_params_exponent=-0.3, seeds=1).table(1)
    both = pandas.concat([World(seeds=1).table(), standard.assign(point="s" + standard["point"])], ignore_index=True)
    finding = find(both)
    named = {number.name: number.value for number in finding.numbers}
    assert abs(named["slope of ln η* in ln width under mup"]) < 0.05 and named["slope of ln η* in ln width under standard"] < -0.5
    assert set(finding.points["parametrization"]) == {"mup", "standard"}
