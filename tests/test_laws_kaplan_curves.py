"""Late losses predicted from early ones, on planted training curves: what can be predicted is, and nothing of the late part leaks in."""

import itertools

import numpy as np
import pandas
import pytest
from kaplan_tables import TRAINING, frame, steps

from scaling_jax.errors import UserError
from scaling_jax.laws import kaplan_curves
from scaling_jax.laws.frontier import prepared
from scaling_jax.laws.kaplan_theory import critical_batch

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZES, HORIZONS = (1e4, 1e5, 1e6, 1e7, 1e8), 2.0 ** np.arange(16, 26.1, 0.5)


def number(finding, name):
    return next(number for number in finding.numbers if number.name.startswith(name))


def said(finding, words):
    assert any(words in sentence for sentence in finding.statements), finding.statements


def planted(loss, sizes=SIZES, horizons=HORIZONS, lrs=(1.0, 2.0), batches=(1024,), noise=0.0, seed=0):
    """Losses `loss(params, tokens)`, 2% higher at the lr 2."""
    points = [
        {"point": f"{n:g}-{lr}-{b}", "params": n, "batch_tokens": b, "lr": lr, "seed": 0, "warmup_tokens": 2**14, "tokens": t}
        for n, lr, b, t in itertools.product(sizes, lrs, batches, horizons)
    ]
    p = pandas.DataFrame(points)
    return frame(points, (loss(p["params"], p["tokens"]) * (1 + 0.02 * (p["lr"] - 1))).to_numpy(), np.random.default_rng(seed), noise)


def joint(params, tokens):
    return (1e9 / params) ** 0.1 + (3e5 / tokens) ** 0.5


@pytest.fixture(scope="module")
def stepwise():
    return steps(np.random.default_rng(0))


def test_a_law_of_all_sizes_predicts_itself():
    finding = kaplan_curves.extrapolation(planted(joint))
    assert number(finding, "rms error of ln L, one law").value < 1e-4
    assert number(finding, "rms error of ln L, a power law").value < 1e-4
    one_size = [entry for entry in finding.numbers if entry.name.startswith("exponent of the curve")]
    assert len(one_size) == 5
    for entry in one_size:
        assert entry.value == pytest.approx(0.5, rel=1e-3)
    assert number(finding, "largest exponent over").value == pytest.approx(1, abs=1e-3)
    for name, value in (("alpha_s", 0.5), ("alpha_n", 0.1)):
        assert number(finding, f"{name} of one law").value == pytest.approx(value, rel=1e-3)
    said(finding, "it is closer than that at 5 of 5 sizes")
    said(finding, "S is plain steps, at batches of 1024 tokens")
    said(finding, "lowest loss over lr")


def test_errors_are_those_of_the_last_third():
    """The naive answer has a closed form; the largest and the mean square are over horizons beyond two thirds."""
    finding = kaplan_curves.extrapolation(planted(joint))
    third, late = HORIZONS[HORIZONS <= HORIZONS.max() / 3].max(), HORIZONS[HORIZONS > HORIZONS.max() * 2 / 3]
    assert len(late) == 2
    error = np.array([np.log(joint(n, third) / joint(n, late)) for n in SIZES])
    same = number(finding, "rms error of ln L, the loss stays")
    assert same.value == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-9)
    assert same.note == f"largest {error.max():.2g}"
    last = number(finding, "rms error of ln L, the loss stays, N = 1e+07")
    assert last.value == pytest.approx(np.sqrt(np.mean(error[3] ** 2)), rel=1e-9)
    assert set(finding.points["tokens"][finding.points["part"] == "predicted"]) == set(late)
    assert finding.points["tokens"][finding.points["part"] == "fitted"].max() == third


def test_noise_leaves_exponents_alike_and_planted_differences_show():
    alike = kaplan_curves.extrapolation(planted(joint, noise=0.002, seed=1))
    said(alike, "no more than their errors allow")
    for entry in alike.numbers:
        if entry.name.startswith("exponent of the curve"):
            assert entry.low - 0.02 < 0.5 < entry.high + 0.02
    differ = kaplan_curves.extrapolation(planted(lambda n, t: 1 + (3e5 / t) ** (0.2 + 0.1 * np.log10(n / 1e4)), noise=0.001))
    said(differ, "by more than their errors")
    said(differ, "a power law of each size predicts better than one law of all sizes")
    assert number(differ, "largest exponent over").value == pytest.approx(3.0, rel=0.1)
    ratio = number(differ, "rms error, one law of all sizes over a power law of each size")
    assert 1 < ratio.low < ratio.value < ratio.high


def test_a_curve_that_turns_is_not_predicted():
    """Beyond a half of the training everything falls by a tenth: the error is that, whatever the early part says."""
    finding = kaplan_curves.extrapolation(planted(lambda n, t: joint(n, t) * np.where(t > HORIZONS.max() / 2, 0.9, 1.0)))
    for way in ("a power law of each size", "one law of all sizes"):
        assert number(finding, f"rms error of ln L, {way}").value == pytest.approx(-np.log(0.9), rel=1e-3)
    said(finding, "0.11 too high on average")


@pytest.mark.parametrize("known", ["steps to a loss", "noise scale", None])
def test_nothing_late_is_in_a_prediction(stepwise, known):
    table = stepwise if known == "steps to a loss" else stepwise[stepwise["batch_tokens"] == 2048].reset_index(drop=True)
    if known == "noise scale":
        table = table.assign(noise_scale_tokens=critical_batch(table["loss"], TRAINING.b_star, TRAINING.alpha_b))
    changed = table.assign(loss=table["loss"].where(table["tokens"] <= table["tokens"].max() / 3, 0.5 * table["loss"]))
    one, other = (kaplan_curves.extrapolation(rows).points for rows in (table, changed))
    for column in ("loss_by_own", "loss_by_joint", "loss_at_a_third"):
        np.testing.assert_allclose(one[column], other[column], rtol=1e-9)
    assert np.abs(np.log(one["loss"] / other["loss"])).max() > 0.6


def test_steps_are_s_min_where_the_first_thirds_tell_b_crit(stepwise):
    finding = kaplan_curves.extrapolation(stepwise)
    said(finding, "B_crit(L) is by the first thirds alone, L^-4")
    assert number(finding, "rms error of ln L, one law").value < 0.004  # of noise 0.002
    assert number(finding, "alpha_s of one law").value == pytest.approx(TRAINING.alpha_s, rel=0.03)
    one = stepwise[stepwise["batch_tokens"] == 2048].reset_index(drop=True)
    plain = kaplan_curves.extrapolation(one)
    assert number(plain, "rms error of ln L, one law").value > 0.03  # plain steps: B_crit grows along the curve
    known = one.assign(noise_scale_tokens=critical_batch(one["loss"], TRAINING.b_star, TRAINING.alpha_b))
    assert number(kaplan_curves.extrapolation(known), "rms error of ln L, one law").value < 0.004


def test_curves_keep_the_settings_that_are_best_at_the_end():
    """At short horizons the lr 2 is the better one; a curve does not jump between the two."""
    table = planted(joint)
    table.loc[(table["lr"] == 2) & (table["tokens"] < 2**20), "loss"] *= 0.9
    found, one_batch = kaplan_curves.curves(prepared(table, ("batch_tokens",)))
    assert one_batch and set(found["lr"]) == {1.0} and len(found) == len(SIZES) * len(HORIZONS)


def test_curves_are_of_one_batch_size_where_all_sizes_have_one():
    table = planted(joint, batches=(512, 1024, 2048))
    table["loss"] *= 1 + 0.01 * np.log2(table["batch_tokens"] / 1024) ** 2  # 1024 is best
    best, one_batch = kaplan_curves.curves(prepared(table, ("batch_tokens",)))
    assert one_batch and set(best["batch_tokens"]) == {1024}
    without = table[~((table["batch_tokens"] == 1024) & (table["params"] == 1e4))]
    assert set(kaplan_curves.curves(prepared(without, ("batch_tokens",)))[0]["batch_tokens"]) <= {512, 2048}
    apart = table[(table["batch_tokens"] == 512) == (table["params"] < 1e6)].query("batch_tokens < 2048")
    found, one_batch = kaplan_curves.curves(prepared(apart, ("batch_tokens",)))
    assert not one_batch and (found["batch_tokens"] == np.where(found["size"] < 5e5, 512, 1024)).all()
    finding = kaplan_curves.extrapolation(apart)
    said(finding, "is not fitted: no batch size was tried at every size")
    assert not any("one law" in entry.name for entry in finding.numbers)


def test_warmup_is_left_out():
    late = kaplan_curves.extrapolation(planted(joint).assign(warmup_tokens=2**19))
    assert late.points["tokens"].min() > 2**19


def test_few_sizes_have_no_interval_over_sizes():
    finding = kaplan_curves.extrapolation(planted(joint, sizes=(1e4, 1e6), noise=0.001))
    ratio = number(finding, "rms error, a power law of each size over")
    assert ratio.low is None and ratio.note == "2 sizes are too few for an interval"
    said(finding, "needs at least 3 different params")


def test_short_curves_are_counted_or_refused():
    with pytest.raises(UserError, match="4 horizons or more in the first third of its longest one.* the most that a size has is 2"):
        kaplan_curves.extrapolation(planted(joint, horizons=2.0 ** np.arange(22, 26)))
    mixed = pandas.concat([planted(joint), planted(joint, sizes=(1e9,), horizons=2.0 ** np.arange(22, 26))], ignore_index=True)
    finding = kaplan_curves.extrapolation(mixed)
    assert finding.points["params"].nunique() == 5 and finding.points["params"].max() < 2e8
    said(finding, "fewer than 4 horizons in the first third: 1")


def test_an_exponent_that_is_not_identified_has_no_value():
    finding = kaplan_curves.extrapolation(planted(lambda n, t: (1e9 / n) ** 0.1 * np.ones(len(t)), noise=0.003))
    entries = [entry for entry in finding.numbers if entry.name.startswith("exponent of the curve")]
    assert any(entry.value is None and "not identified" in entry.note for entry in entries)
