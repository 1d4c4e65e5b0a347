"""Kaplan's laws in steps and batch size on simulated studies: what was planted comes back, and where B_crit is from."""

import numpy as np
import pandas
import pytest
from kaplan_tables import TRAINING, number, only, said, steps

from scaling_jax.errors import UserError
from scaling_jax.laws import kaplan_steps, kaplan_theory

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def stepwise():
    return steps(np.random.default_rng(0))


def test_critical_batch_by_loss(stepwise):
    finding = kaplan_steps.of_critical_batch(stepwise)
    low, high = finding.fits["kaplan_bcrit"].intervals["alpha_b"]
    assert low - 0.01 < TRAINING.alpha_b < high + 0.01 and high - low < 0.05
    truth = kaplan_theory.critical_batch(finding.points["loss"], TRAINING.b_star, TRAINING.alpha_b)
    off = np.log(finding.points["critical_batch_tokens"] / truth)[~finding.points["censored"]]
    assert np.median(np.abs(off)) < 0.1 and (~finding.points["censored"]).sum() >= 15
    said(finding, "depends on the loss alone")


def test_a_narrow_range_of_batches_has_no_bend(stepwise):
    rng, rows = np.random.default_rng(12), []
    for batch in (512, 576, 640, 704):  # of B_crit 5e5
        for tokens in np.geomspace(1e5, 1e7, 9):
            loss = 2 + (1e6 / (tokens / (1 + batch / 5e5))) ** 0.3 * np.exp(0.01 * rng.normal())
            rows.append({"params": 1e5, "batch_tokens": batch, "tokens": tokens, "lr": 0.01, "loss": loss})
    with pytest.raises(UserError, match=r"B_crit\(L\) needs 3 losses or more at which the steps of 4 batch sizes show their bend"):
        kaplan_steps.of_critical_batch(pandas.DataFrame(rows))
    with pytest.raises(UserError, match="B_crit.L. needs at least 4 different batch_tokens"):
        kaplan_steps.of_critical_batch(only(stepwise, batch_tokens=(2048,)))


def test_law_of_steps(stepwise):
    finding = kaplan_steps.of_steps(stepwise)
    law = finding.fits["kaplan_ns"]
    assert law.values["alpha_n"] == pytest.approx(TRAINING.alpha_n, rel=0.03)
    assert law.values["alpha_s"] == pytest.approx(TRAINING.alpha_s, rel=0.03)
    assert law.values["s_c"] == pytest.approx(TRAINING.s_c, rel=0.05)
    said(finding, "B_crit(L) by steps to a loss")
    late = kaplan_steps.of_steps(stepwise.assign(warmup_tokens=2**20))
    assert late.points["tokens"].min() > 2**20 > finding.points["tokens"].min()  # after warmup
    assert number(finding, "efficient training stops").value == pytest.approx(TRAINING.alpha_n / TRAINING.alpha_s, rel=0.05)
    assert number(finding, "compute for 2.2").value == pytest.approx(kaplan_theory.other_size(2.2, TRAINING)[1], rel=0.03)


def test_the_error_of_the_critical_batch_is_in_the_intervals(stepwise, monkeypatch):
    ends = {}
    analyses = ((kaplan_steps.of_steps, "kaplan_ns", "s_c"), (kaplan_steps.of_least_compute, "kaplan_cmin", "c_c_min"))
    for analysis, law, name in analyses:
        ends[law] = np.diff(np.log(analysis(stepwise).fits[law].intervals[name]))
    with monkeypatch.context() as other:
        wider = {name: (0.01, 0.1) for name in ("c_c_min", "alpha_c_min", "floor")}
        other.setattr(kaplan_steps, "with_error_of_input", lambda law, *_: law._replace(intervals=wider))
        said(kaplan_steps.of_least_compute(stepwise), "(0.01 to 0.1)")
    known = kaplan_steps.known_critical
    monkeypatch.setattr(kaplan_steps, "known_critical", lambda rows: known(rows)._replace(law=None))
    for analysis, law, name in analyses:
        alone = np.diff(np.log(analysis(stepwise).fits[law].intervals[name]))
        assert ends[law] > (1.1 if law == "kaplan_ns" else 0.98) * alone  # a small part of what few runs of an envelope leave open


def test_law_of_steps_without_a_critical_batch_is_of_plain_steps(stepwise):
    plain = only(stepwise, batch_tokens=(2048, 32768))
    finding = kaplan_steps.of_steps(plain)
    said(finding, "S is plain steps, at batches of 3.277e+04 tokens")
    np.testing.assert_allclose(finding.points["min_steps"], finding.points["tokens"] / 32768)


def test_the_noise_scale_stands_in_where_batches_are_too_few_for_steps_to_a_loss(stepwise):
    few = only(stepwise, batch_tokens=(2048, 32768))
    known = few.assign(noise_scale_tokens=kaplan_theory.critical_batch(few["loss"], TRAINING.b_star, TRAINING.alpha_b))
    finding = kaplan_steps.of_steps(known)
    said(finding, "noise scale")
    assert finding.fits["kaplan_ns"].values["alpha_s"] == pytest.approx(TRAINING.alpha_s, rel=0.03)


def test_the_noise_scale_is_the_critical_batch_to_a_factor(stepwise, monkeypatch):
    """Within 2 at 95%: α_S moves by as much as it would with a noise scale that is off by that."""
    few = only(stepwise, batch_tokens=(2048, 32768))
    truth = kaplan_theory.critical_batch(few["loss"], TRAINING.b_star, TRAINING.alpha_b)

    def alpha_s(factor):
        law = kaplan_steps.of_steps(few.assign(noise_scale_tokens=factor * truth)).fits["kaplan_ns"]
        return law.values["alpha_s"], np.diff(law.intervals["alpha_s"])[0] / 2

    moved, (_, half) = abs(alpha_s(2.0)[0] - alpha_s(0.5)[0]) / 2, alpha_s(1.0)
    monkeypatch.setattr(kaplan_steps, "NOISE_WITHIN", 1.0)
    alone = alpha_s(1.0)[1]
    assert moved > 2 * alone and half == pytest.approx(np.hypot(moved, alone), rel=0.35)


def test_least_compute_and_its_refusal(stepwise):
    finding = kaplan_steps.of_least_compute(stepwise)
    low, high = finding.fits["kaplan_cmin"].intervals["alpha_c_min"]
    assert low - 0.003 < kaplan_theory.compute_exponent(TRAINING) < high + 0.003
    with pytest.raises(UserError, match="needs B_crit: rows at 4 batch sizes or more .* noise_scale_tokens"):
        kaplan_steps.of_least_compute(only(stepwise, batch_tokens=(2048,)))


def test_steps_that_do_not_tell_the_critical_batch_leave_it_to_the_noise_scale(stepwise, monkeypatch):
    """Three losses at which E_min/S_min scatters by more than it grows, as a few noisy courses have them."""
    rows = stepwise.assign(size=stepwise["params"])

    def known(critical_batch_tokens, rows):
        found = pandas.DataFrame({"loss": [4.6, 4.5, 4.4], "critical_batch_tokens": critical_batch_tokens, "censored": False})
        monkeypatch.setattr(kaplan_steps, "critical_points", lambda rows: found)
        return kaplan_steps.known_critical(rows)

    measured = rows.assign(noise_scale_tokens=4096.0)
    told = known(10 * np.array([4.6, 4.5, 4.4]) ** -4.0, measured)
    assert told.law.exponent == pytest.approx(-4) and told.said == "B_crit(L) by steps to a loss, 3 points, L^-4"
    noisy = known([1000.0, 3000.0, 1500.0], measured)
    assert noisy.law is None and (noisy.of(measured) == 4096.0).all()
    assert (
        "noise scale (noise_scale_tokens), to a factor of 2 at 95%; steps to a loss do not tell it (3 points, L^-8.97 ± 23)" in noisy.said
    )
    assert known(10 * np.array([4.6, 4.5, 4.4]) ** 4.0, measured).law is None  # B_crit does not fall as the loss does
    for few in (
        rows,
        measured.assign(noise_scale_tokens=np.nan),
        measured.assign(noise_scale_tokens=[4096.0] + [np.nan] * (len(rows) - 1)),
    ):
        alone = known([1000.0, 3000.0, 1500.0], few)  # the noise scale of one size only would leave out the others
        assert alone.law.points == 3 and alone.said.startswith("B_crit(L) by steps to a loss, though these do not tell it (3 points")
