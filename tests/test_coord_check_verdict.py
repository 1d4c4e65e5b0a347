"""From coordinates to a verdict: planted power laws are recovered, with an honest error, and held against the right exponents."""

import math

import numpy as np
import pytest

from scaling_jax.coord_check.measure import ACTIVATION, CHANGE, DECAY, EPSILON, UPDATE, Coordinate
from scaling_jax.coord_check.verdict import TOLERANCE, Expected, passed, slopes, widest_ratio, worst

SIZES, STEPS = (16, 32, 64, 128), 4


def planted(exponent=0.0, quantity=ACTIVATION, kind="k", role="", axis="width", sizes=SIZES, steps=range(1, STEPS + 1), seeds=1, noise=0.0):
    """3·size^exponent with log-normal noise, the same at every step but for the noise."""
    rng = np.random.default_rng(0)
    return [
        Coordinate(axis, size, seed, step, quantity, kind, role, 3 * size**exponent * math.exp(noise * rng.normal()))
        for size in sizes
        for seed in range(seeds)
        for step in steps
    ]


def decay(exponent, role, axis="width"):
    return planted(exponent, DECAY, "blocks.key", role, axis, steps=[0])


def changed(coordinates, value, *, step=None, sizes=SIZES):
    """The coordinates with this value at a step (all if None) and at some sizes."""
    return [c._replace(value=value) if c.size in sizes and step in (None, c.step) else c for c in coordinates]


def judge(coordinates, expected=None):
    return slopes(coordinates, expected or Expected())


# Slopes


@pytest.mark.parametrize("exponent", [-1.0, -0.37, 0.0, 0.5])
def test_an_exact_power_law_is_recovered(exponent):
    rows = judge(planted(exponent, seeds=2))
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row.slope == pytest.approx(exponent, abs=1e-6) and 0 <= row.se < 1e-3


def test_a_noisy_power_law_is_recovered_within_three_standard_errors():
    for row in judge(planted(-0.5, seeds=8, noise=0.2)):
        assert abs(row.slope + 0.5) < 3 * row.se and 0.01 < row.se < 0.1


@pytest.mark.parametrize("seeds", [3, 8])
def test_the_standard_error_covers_as_often_as_it_says(seeds):
    """Of 95% intervals from few seeds a little fewer, and never far more: the error is not inflated either."""
    noisy = [c for n in range(600) for c in planted(-1.0, kind=f"x{n}", steps=[2], seeds=seeds)]
    rng = np.random.default_rng(seeds)
    noisy = [c._replace(value=c.value * math.exp(0.15 * rng.normal())) for c in noisy]
    rows = judge(noisy)
    assert len(rows) == 600
    assert 0.90 < np.mean([abs(row.slope + 1) < 1.96 * row.se for row in rows]) < 0.99


def test_with_one_seed_the_error_is_that_of_the_scatter_about_the_line():
    coordinates = planted(0.3, noise=0.2, steps=[2])
    (row,) = judge(coordinates)
    x, y = np.log([c.size for c in coordinates]), np.log([c.value for c in coordinates])
    line, covariance = np.polyfit(x, y, 1, cov=True)
    assert row.slope == pytest.approx(line[0], rel=1e-6) and row.se == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-6)


def test_axes_quantities_kinds_and_steps_do_not_mix():
    coordinates = [
        *planted(0.1, kind="k"),
        *planted(0.2, kind="v"),
        *planted(0.3, UPDATE, "k", "hidden"),
        *planted(0.4, kind="k", axis="depth"),
        *planted(0.5, kind="k", steps=[STEPS + 1]),
    ]
    found = {(row.axis, row.quantity, row.kind, row.step): round(row.slope, 4) for row in judge(coordinates)}
    assert len(found) == 4 * STEPS + 1
    assert found["width", ACTIVATION, "k", 2] == 0.1 and found["width", ACTIVATION, "v", 2] == 0.2
    assert found["width", UPDATE, "k", 2] == 0.3 and found["depth", ACTIVATION, "k", 2] == 0.4
    assert found["width", ACTIVATION, "k", STEPS + 1] == 0.5


# What is expected

IN_BRANCH, OUTSIDE = ("hidden", "query", "vector"), ("embedding", "tied", "output", "final_vector")
UPDATES = {
    "width": {"hidden": -1, "query": -1, "embedding": 0, "tied": 0, "output": 0, "vector": 0, "final_vector": 0},
    "depth": {"hidden": -0.3, "query": -0.3, "vector": -0.3, "embedding": 0, "tied": 0, "output": 0, "final_vector": 0},
}
DECAYS = {
    "width": {"hidden": 0, "query": 0, "embedding": 0, "tied": 0, "output": 0, "vector": 0, "final_vector": 0},
    "depth": {"hidden": -0.3, "query": -0.3, "embedding": 0, "tied": 0, "output": 0, "vector": -0.3, "final_vector": 0},
}
# A step far below epsilon goes as lr over epsilon: 1/width for all, and depth^-α within a branch, at α = 0.7.
EPSILONS = {
    "width": {"hidden": 0, "query": 0, "embedding": 1, "tied": 1, "output": 1, "vector": 1, "final_vector": 1},
    "depth": {"hidden": 0.4, "query": 0.4, "vector": 0.4, "embedding": 0, "tied": 0, "output": 0, "final_vector": 0},
}
COUPLED_DECAYS = {"width": DECAYS["width"] | {"hidden": -1, "query": -1}, "depth": DECAYS["depth"]}


@pytest.mark.parametrize("axis", ["width", "depth"])
@pytest.mark.parametrize("role", IN_BRANCH + OUTSIDE)
def test_exponents_of_updates_and_decay(axis, role):
    """At α = 0.7: an update within a branch goes as depth^(α - 1)."""
    independent, coupled = Expected(depth_exponent=0.7), Expected(depth_exponent=0.7, coupled_decay=True)
    for quantity, expected, exponents in (
        (UPDATE, independent, UPDATES),
        (UPDATE, coupled, UPDATES),
        (DECAY, independent, DECAYS),
        (DECAY, coupled, COUPLED_DECAYS),
        (EPSILON, independent, EPSILONS),
        (EPSILON, coupled, EPSILONS),
    ):
        right = exponents[axis][role]
        assert expected.exponent(axis, quantity, "blocks.key", role) == pytest.approx(right)


@pytest.mark.parametrize("role", IN_BRANCH + OUTSIDE)
def test_at_alpha_1_depth_changes_no_update_and_no_decay(role):
    for quantity in (UPDATE, DECAY):
        assert Expected().exponent("depth", quantity, "blocks.key", role) in (0, None)


@pytest.mark.parametrize("axis", ["width", "depth"])
def test_the_residual_stream_and_logits_are_judged_by_their_change_and_others_by_themselves(axis):
    for kind in ("residual 1/4", "residual 4/4", "logits"):
        assert Expected().exponent(axis, CHANGE, kind, "") == 0 and Expected().exponent(axis, ACTIVATION, kind, "") is None
    for kind in ("embedding", "q", "v", "attention logits", "attention output", "MLP hidden", "MLP output"):
        assert Expected().exponent(axis, ACTIVATION, kind, "") == 0 and Expected().exponent(axis, CHANGE, kind, "") is None


@pytest.mark.parametrize(("axis", "quantity"), TOLERANCE)
def test_the_tolerance_is_where_it_says(axis, quantity):
    kind, role, steps = {
        ACTIVATION: ("k", "", [2]),
        CHANGE: ("logits", "", [2]),
        UPDATE: ("unembedding", "output", [2]),
        DECAY: ("unembedding", "output", [0]),
        EPSILON: ("blocks.key", "hidden" if axis == "width" else "output", [0]),
    }[quantity]
    for sign in (-1, 1):
        for factor, right in ((0.9, True), (1.1, False)):
            (row,) = judge(planted(sign * factor * TOLERANCE[axis, quantity], quantity, kind, role, axis, steps=steps))
            assert row.ok is right and row.off == pytest.approx(factor, rel=1e-3)


def test_random_logits_of_a_tied_embedding_are_left_to_the_targets():
    """Only in width, where they shrink as 1/sqrt(width) while they are random."""
    tied = Expected(tied_embeddings=True)
    for axis, kind, ok in (("width", "logits", None), ("depth", "logits", False), ("width", "target logit", False)):
        (row,) = judge(planted(-0.5, CHANGE, kind, axis=axis, steps=[2]), tied)
        assert row.ok is ok
        (row,) = judge(planted(-0.5, CHANGE, kind, axis=axis, steps=[2]))
        assert row.ok is False


def test_with_growing_heads_the_attention_scale_is_1_over_head_dim_to_a_hundredth():
    growing = Expected(growing_heads=True)
    for exponent in (-1.0, -0.75, -0.5, 0.0):
        (row,) = judge(planted(exponent, kind="attention scale", steps=[2]), growing)
        assert row.ok is (exponent == -1)
        (row,) = judge(planted(exponent, kind="attention scale", steps=[2]))
        assert row.ok is (exponent == 0)  # head_dim is the same at every width
        (row,) = judge(planted(exponent, kind="attention scale", axis="depth", steps=[2]), growing)
        assert row.ok is (exponent == 0)
    (row,) = judge(planted(-0.5, kind="attention logits", steps=[2]), growing)
    assert row.ok is None


def test_the_first_step_is_not_judged_and_decay_is():
    wrong = [*planted(2.0), *planted(2.0, CHANGE, "logits"), *planted(2.0, UPDATE, "unembedding", "output")]
    assert {row.step for row in judge(wrong) if row.ok is None} == {1}
    assert all(row.ok is False for row in judge(wrong) if row.step > 1)
    assert [row.ok for row in judge(decay(2.0, "output"))] == [False]


def test_gains_and_biases_must_not_decay_at_all():
    for role in ("vector", "final_vector"):
        (row,) = judge(changed(decay(0.0, role), 0.0))
        assert row.ok is True and row.off == 0
        (row,) = judge(decay(0.0, role))
        assert row.ok is False


# What is not a positive number


def test_what_has_not_begun_is_judged_from_the_last_step_on():
    """Keys behind zero queries have no gradient at first; a parameter that never moves is wrong."""
    keys = planted(-1.0, UPDATE, "blocks.key", "hidden")
    assert [row.ok for row in judge(changed(keys, 0.0, step=2))] == [None, None, True, True]
    assert [row.ok for row in judge(changed(keys, 0.0))] == [None, None, None, False]
    assert not passed(judge(changed(keys, 0.0)))


def test_what_is_zero_at_some_sizes_only_fails():
    keys = planted(-1.0, UPDATE, "blocks.key", "hidden")
    for sizes in ([16], [128], [32, 64]):
        rows = judge(changed(keys, 0.0, step=2, sizes=sizes))
        assert [row.ok for row in rows] == [None, False, True, True]
        assert rows[1].slope is None and rows[1].se is None and rows[1].off == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("sizes", [[128], SIZES])
def test_what_is_no_positive_number_fails(value, sizes):
    rows = judge(changed(planted(), value, step=3, sizes=sizes))
    assert [row.ok for row in rows] == [None, True, False, True] and rows[2].slope is None
    assert not passed(rows)


def test_one_bad_seed_is_not_hidden_by_the_others():
    coordinates = [c._replace(value=math.nan) if (c.seed, c.size, c.step) == (1, 64, 3) else c for c in planted(seeds=3)]
    assert [row.ok for row in judge(coordinates)] == [None, True, False, True]


def test_decay_that_is_nowhere_fails():
    """Decay has one step, which is not an early one."""
    assert not passed(judge([*changed(decay(0.0, "hidden"), 0.0), *planted()]))


# The verdict


def test_worst_is_the_judged_row_that_is_furthest_off():
    step = {2: 0.1, 3: -0.2, 4: 0.15, 1: 3.0}
    rows = judge([c for n, exponent in step.items() for c in planted(exponent, steps=[n])] + planted(0.05, kind="v"))
    assert [(row.kind, row.step) for row in worst(rows) if row.kind == "k"] == [("k", 3)]
    assert [row.kind for row in worst(rows)] == ["k", "v"]


def test_worst_is_what_has_no_slope_if_there_is_such_a_row():
    (row,) = worst(judge(changed(planted(0.2), math.nan, step=3)))
    assert row.step == 3 and row.slope is None and not row.ok


def test_worst_leaves_out_what_is_not_judged():
    assert worst(judge(planted(2.0, kind="residual 1/4") + planted(2.0, steps=[1]))) == []


def test_worst_is_in_tolerances_from_what_is_expected():
    """And not from zero: a hidden update at -1 is right."""
    rows = judge([*planted(-1.0, UPDATE, "blocks.key", "hidden", steps=[2]), *planted(-0.9, UPDATE, "blocks.key", "hidden", steps=[3])])
    (row,) = worst(rows)
    assert row.step == 3 and row.off == pytest.approx(0.1 / TOLERANCE["width", UPDATE], rel=1e-3)


def test_nothing_judged_is_not_passed():
    assert not passed([])
    assert not passed(judge(planted(steps=[1])))
    assert passed(judge(planted()))
    assert not passed(judge([*planted(), *planted(2.0, kind="v", steps=[STEPS])]))


# The ratio of microsoft/mup's test


def ratio_of(ratio, kind, quantity=ACTIVATION, steps=(1, 2, 3), seeds=1):
    """An activation `ratio` times as large at width 64 as at 16; 128 is not looked at."""
    values = {16: 0.5, 64: 0.5 * ratio, 128: 1e3}
    return [
        Coordinate("width", size, seed, step, quantity, kind, "", x)
        for size, x in values.items()
        for seed in range(seeds)
        for step in steps
    ]


def test_the_widest_ratio_is_furthest_from_1_either_way():
    assert widest_ratio(ratio_of(1.1, "k") + ratio_of(1.5, "v") + ratio_of(0.8, "q"), 16, 64) == (pytest.approx(1.5), "v")
    assert widest_ratio(ratio_of(1.1, "k") + ratio_of(1.5, "v") + ratio_of(0.6, "q"), 16, 64) == (pytest.approx(0.6), "q")


def test_only_activations_of_the_first_steps_count():
    rest = ratio_of(5.0, "v", steps=[4]) + ratio_of(7.0, "residual 1/4", CHANGE) + ratio_of(9.0, "blocks.key", UPDATE)
    assert widest_ratio(ratio_of(1.1, "k") + rest, 16, 64) == (pytest.approx(1.1), "k")
    assert widest_ratio(ratio_of(1.1, "k") + rest, 16, 64, steps=4) == (pytest.approx(5.0), "v")


def test_ratios_are_of_means_over_seeds():
    coordinates = [c._replace(value=c.value * (1 + c.seed)) if c.size == 64 else c for c in ratio_of(1.0, "k", seeds=3)]
    assert widest_ratio(coordinates, 16, 64) == (pytest.approx(2.0), "k")


def test_zero_at_both_sizes_is_left_out_and_at_one_is_infinitely_wide():
    zero = [c._replace(value=0.0) for c in ratio_of(1.0, "logits")]
    assert widest_ratio(ratio_of(0.9, "k") + zero, 16, 64) == (pytest.approx(0.9), "k")
    narrow = [c._replace(value=0.0) if c.size == 16 else c for c in ratio_of(1.0, "q")]
    assert widest_ratio(ratio_of(0.9, "k") + narrow, 16, 64) == (math.inf, "q")
    assert widest_ratio(ratio_of(0.9, "k") + ratio_of(0.0, "v"), 16, 64) == (0.0, "v")
