"""Kaplan's analyses on simulated studies: what was planted comes back within its interval, what the data cannot say is said."""

import numpy as np
import pandas
import pytest
from kaplan_tables import PARAMETRIC, SUBSETS, TRAINING, holds, number, only, parametric, said, steps, subsets
from planted_laws_A import PLANTED

from scaling_jax.errors import UserError
from scaling_jax.laws import (
    chinchilla,
    kaplan,
    kaplan_allocation,
    kaplan_forms,
    kaplan_overfitting,
    kaplan_shape,
    kaplan_steps,
    kaplan_theory,
)
from scaling_jax.laws.fit import fit
from scaling_jax.laws.form import Form
from scaling_jax.laws.rivals import derived, with_error_of_input

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def stepwise():
    return steps(np.random.default_rng(0))


@pytest.fixture(scope="module")
def subsetted():
    return subsets(np.random.default_rng(1))


# ------------------------------------------------------------------------------------------------------------------------- L(N), L(D), L(C)


def test_law_of_size_takes_the_tuned_longest_horizons(stepwise):
    finding = kaplan.of_size(stepwise)
    assert finding.runs == 5 and finding.points["tokens"].nunique() == 1
    best = stepwise[stepwise["tokens"] == 2**26].groupby("params")["loss"].min()
    np.testing.assert_allclose(finding.points["loss"], best, rtol=1e-12)  # one seed: tuned is the lowest
    said(finding, "not converged")
    said(finding, "Kaplan et al. 2020 have 0.076")


def test_law_of_size_of_converged_runs_is_the_plain_power():
    table = pandas.DataFrame([{"params": n, "tokens": t} for n in np.geomspace(1e4, 1e7, 8) for t in (1e6, 2e6)])
    noise = np.exp(0.002 * np.random.default_rng(3).normal(size=len(table)))
    table["loss"] = (1e13 / table["params"]) ** 0.08 * noise * np.where(table["tokens"] == 1e6, 1.004, 1.0)
    finding = kaplan.of_size(table)
    assert finding.best == "kaplan_n"
    holds(finding.fits["kaplan_n"], {"n_c": 1e13, "alpha_n": 0.08})
    said(finding, "all sizes are converged")


def test_law_of_data_is_of_the_largest_size(subsetted):
    finding = kaplan.of_data(subsetted)
    assert np.allclose(finding.points["params"], 1.25e6) and len(finding.points) == 9
    said(finding, "all of it is of one size")
    low, high = finding.fits["kaplan_d"].intervals["alpha_d"]
    assert 0.14 < low < high < SUBSETS["alpha_d"] + 0.002  # that size limits the loss: a little too flat


def test_points_that_still_fall_are_counted_and_left_out(subsetted):
    short = subsetted[subsetted["tokens"] <= 4 * subsetted["data_tokens"]]  # the lowest loss is at 16 epochs
    with pytest.raises(UserError, match="still fell by more than 2%.*longer horizons"):
        kaplan.of_data(short)
    mixed = subsetted[(subsetted["tokens"] <= 4 * subsetted["data_tokens"]) | (subsetted["data_tokens"] < 2**21)]
    finding = kaplan.of_data(mixed)
    assert finding.points["censored"].sum() == 2 and finding.runs == 7
    said(finding, "2 of 9 points are left out")


def test_law_of_compute_keeps_to_the_enclosed_part_of_the_envelope():
    finding = kaplan.of_compute(parametric(np.random.default_rng(4)))
    used = finding.points[~finding.points["censored"]]
    assert used["params"].min() > 1e5 and used["params"].max() < 1e8
    said(finding, "of the envelope are left out")
    holds(finding.fits["kaplan_c_floor"], {"floor": PARAMETRIC["E"]})  # the planted loss has a floor, which the plain power lacks
    assert finding.comparison.best == "kaplan_c_floor"


# --------------------------------------------------------------------------------------------------------------- two variables, overfitting


def test_law_of_size_and_data(subsetted):
    finding = kaplan.of_size_and_data(subsetted)
    holds(finding.fits["kaplan_nd"], SUBSETS)
    ratio = number(finding, "alpha_n / alpha_d")
    assert ratio.low < SUBSETS["alpha_n"] / SUBSETS["alpha_d"] < ratio.high and ratio.published == 0.74
    assert len(finding.points) == 36


def test_without_subsets_data_are_what_was_seen():
    finding = kaplan.of_size_and_data(parametric(np.random.default_rng(5)))
    said(finding, "D is what was seen in one pass")
    assert finding.best == "chinchilla_3"  # whose loss it is
    holds(finding.fits["chinchilla_3"], PARAMETRIC)


def test_overfitting_measures_the_data_rule_and_the_stopping_bound(subsetted):
    endless = steps(np.random.default_rng(6), sizes=(1e4, 5e4, 2.5e5, 5e5, 1e6, 2e6), batches=(1024,), lrs=(1.0,))
    finding = kaplan_overfitting.overfitting(pandas.concat([subsetted, endless], ignore_index=True))
    truth = SUBSETS["alpha_n"] / SUBSETS["alpha_d"]
    for name in ("γ by L(N, D)", "γ measured"):
        assert number(finding, name).low < truth < number(finding, name).high
    needed = number(finding, "data for 1.25e+06")
    assert needed.low < kaplan_theory.tokens_for(1.25e6, 0.02, **SUBSETS) < needed.high
    said(finding, "bound of early stopping allows")
    rise = finding.points["loss"] / (SUBSETS["n_c"] / finding.points["params"]) ** SUBSETS["alpha_n"] - 1
    np.testing.assert_allclose(finding.points["excess"], rise, rtol=0.03, atol=0.01)
    few = pandas.concat([subsetted, only(endless, params=(1e4, 5e4, 2.5e5))], ignore_index=True)
    said(kaplan_overfitting.overfitting(few), "bound of early stopping cannot be checked: of L(N, S_min), s_c has no interval")


def test_of_runs_with_one_horizon_it_is_said_that_nothing_tells_whether_they_were_at_their_lowest(subsetted):
    once = subsetted[subsetted["tokens"] == subsetted["data_tokens"]]
    for analysis, points in ((kaplan.of_data, 9), (kaplan_overfitting.overfitting, 36)):
        said(analysis(once), f"of {points} of {points} points it cannot be told whether the loss was at its lowest")
    assert not any("cannot be told whether" in sentence for sentence in kaplan.of_data(subsetted).statements)


def test_numbers_that_rest_on_unidentified_parameters_have_no_value(stepwise):
    """The loss here is of the size alone: of more training, or of more data, it says nothing."""
    flat = only(stepwise, batch_tokens=(2048,), lr=(1.0,)).assign(loss=lambda rows: (1e9 / rows["params"]) ** 0.1)
    flat["loss"] *= np.exp(0.003 * np.random.default_rng(20).normal(size=len(flat)))
    for analysis, law, parameter in ((kaplan_steps.of_steps, "kaplan_ns", "alpha_s"), (kaplan.of_size_and_data, "kaplan_nd", "alpha_d")):
        finding = analysis(flat)
        assert parameter in finding.fits[law].unidentified and finding.numbers
        for one in finding.numbers:
            assert one[1:4] == (None, None, None)
            assert parameter in one.note and "not identified" in one.note
    finding = kaplan_overfitting.overfitting(flat.assign(data_tokens=flat["tokens"]))
    assert number(finding, "γ by L(N, D)").value is None and number(finding, "data for").value is None
    said(finding, "γ = α_N/α_D of D ∝ N^γ is not identified")


def test_with_n_c_at_its_bound_the_ratio_of_exponents_is_what_the_bound_makes_it(subsetted):
    """Sizes hardly differ: N_c is not identified, though α_N, given its bound, has a narrow interval."""
    of_size = (1e45 / subsetted["params"]) ** (0.017 / 0.2)  # nearly a floor
    hardly = subsetted.assign(loss=(of_size + 3e8 / subsetted["data_tokens"]) ** 0.2)
    hardly["loss"] *= np.exp(0.003 * np.random.default_rng(21).normal(size=len(hardly)))
    finding = kaplan.of_size_and_data(hardly)
    assert {"n_c"} == {*finding.fits["kaplan_nd"].unidentified}
    assert number(finding, "alpha_n / alpha_d").value is None
    assert number(kaplan_overfitting.overfitting(hardly), "γ by L(N, D)").value is None


def test_a_number_that_is_not_finite_has_no_value():
    assert derived("x", np.nan, np.zeros(9), [], ()).value is None
    assert derived("x", 1.0, np.array([np.nan] * 2 + [1.0] * 8), [], ()).note == "by 20% of the resamples it is not finite"
    assert derived("x", 1.0, np.array([np.nan] + [1.0] * 19), [], (), unit="nats")[1:5] == (1.0, 1.0, 1.0, "nats")
    assert derived("x", 1.0, np.zeros(0), [], (), note="far")[1:] == (1.0, None, None, "", None, "", "far")


# ------------------------------------------------------------------------------------------------------------- an input's error, allocation


def test_an_error_of_an_input_moves_what_follows_from_it():
    """Sizes that are all off by 30% put N_c off by 30%, and leave the exponent."""
    data = PLANTED["kaplan_n"][2](np.random.default_rng(21))
    law = fit(kaplan_forms.N, data)
    off = data._replace(x={"params": 1.3 * data.x["params"]})
    moved = with_error_of_input(law, [off], lambda count: np.random.default_rng(22).normal(size=(count, 1)))
    assert moved.values == law.values
    assert moved.intervals["alpha_n"] == pytest.approx(law.intervals["alpha_n"], rel=0.01)
    assert moved.se["n_c"] == pytest.approx(np.hypot(law.se["n_c"], np.log(1.3)), rel=0.15)
    alone = law._replace(widen=1.0, draws_RxP=np.tile(list(law.values.values()), (2000, 1)))
    moved = with_error_of_input(alone, [off], lambda count: np.random.default_rng(23).normal(size=(count, 1)))
    np.testing.assert_allclose(np.log(np.array(moved.intervals["n_c"]) / law.values["n_c"]), 1.96 * np.log([1 / 1.3, 1.3]), rtol=0.1)
    far = with_error_of_input(alone, [off], lambda count: np.full((count, 1), 1e3))
    assert far.intervals["n_c"][1] is None and "its interval is open" in far.unidentified["n_c"]


def test_allocation_sets_the_measured_beside_the_closed_form(stepwise, subsetted):
    finding = kaplan_allocation.allocation(pandas.concat([stepwise, subsetted], ignore_index=True))
    truth = kaplan_theory.compute_exponent(TRAINING) / TRAINING.alpha_n
    measured, closed = number(finding, "p of N ∝ C_min^p, measured"), number(finding, "p of N ∝ C_min^p, closed")
    assert measured.low < truth < measured.high
    assert closed.value == pytest.approx(truth, rel=0.03) and closed.published == pytest.approx(0.68, abs=0.005)
    said(finding, "measured against")
    said(finding, "have 1.1e+04 PF-days (Tables 5 and 6) or 1.1e+05 (eq. 6.7)")
    used = finding.points[~finding.points["censored"]]
    best = kaplan_theory.efficient(used["flops"].to_numpy() / kaplan_theory.PF_DAY, TRAINING).params
    np.testing.assert_allclose(used["params"], best, rtol=0.25)  # the ladder's factor is 4


# -------------------------------------------------------------------------------------------------------------------------- shape, transfer


def shapes(rng, seeds=3):
    rows = []
    for width, depth in ((256, 1), (181, 2), (128, 4), (90, 8), (64, 16), (45, 32)):
        for seed in range(seeds):
            loss = 2.5 * np.exp(0.006 * np.log(width / depth / 20) ** 2 + 0.001 * rng.normal())
            sizes = {"params": 12 * depth * width**2, "width": width, "depth": depth, "head_dim": 16}
            rows.append(sizes | {"tokens": 2**21, "lr": 0.01, "batch_tokens": 1024, "seed": seed, "loss": loss})
    return pandas.DataFrame(rows)


def test_shape():
    finding = kaplan_shape.of_shape(shapes(np.random.default_rng(7)))
    law = finding.fits["kaplan_shape"]
    holds(law, {"best_aspect": 20.0})
    assert law.intervals["curvature"][0] < 0.006 < law.intervals["curvature"][1]
    truth = 0.006 * (np.log(256 / 20) ** 2 - np.log(32 / 20) ** 2)
    assert number(finding, "largest excess").value == pytest.approx(100 * np.expm1(truth), abs=0.4)
    assert number(finding, "spread between seeds").value == pytest.approx(0.1, rel=0.4)
    assert finding.points["excess_percent"].min() == 0 and len(finding.points) == 6


def test_horizons_of_a_shape_are_not_independent():
    """Where a run's noise is the same at all its horizons, more of them say no more."""
    once = shapes(np.random.default_rng(19), seeds=1)
    once["loss"] *= np.exp(0.01 * np.random.default_rng(3).normal(size=len(once)))
    often = pandas.concat([once.assign(tokens=2**k, loss=once["loss"] * 2.0 ** (0.1 * (21 - k))) for k in range(16, 23)], ignore_index=True)
    one, seven = (kaplan_shape.of_shape(table).fits["kaplan_shape"] for table in (once, often))
    assert (one.points, seven.points, seven.clusters) == (6, 42, 6)
    ratio = np.ptp(seven.intervals["curvature"]) / np.ptp(one.intervals["curvature"])
    assert 0.6 < ratio < 1.1  # single points get HC3's variance and runs HC2's; were all 42 independent it would be some 0.4 or less


def test_shape_of_one_shape_is_refused():
    with pytest.raises(UserError, match="needs 3 shapes or more"):
        kaplan_shape.of_shape(shapes(np.random.default_rng(8)).query("width == 128"))


def transferred(rng, slope, offset):
    table = parametric(rng)
    table["loss_code"] = slope * table["loss"] + offset + 0.005 * rng.normal(size=len(table))
    table["loss_code_stderr"] = 0.01
    return table


def test_a_constant_offset_is_told_from_a_slope():
    constant = kaplan_shape.of_transfer(transferred(np.random.default_rng(9), 1.0, 0.4))
    assert kaplan_shape.domains(transferred(np.random.default_rng(9), 1.0, 0.4)) == ["code"]
    assert constant.best == "kaplan_transfer_offset_code"
    assert constant.fits["kaplan_transfer_offset_code"].values["offset"] == pytest.approx(0.4, abs=0.004)
    said(constant, "a constant offset is compatible")
    steep = kaplan_shape.of_transfer(transferred(np.random.default_rng(10), 1.3, -0.2))
    said(steep, "the offset is not constant")
    line = steep.fits["kaplan_transfer_line_code"]
    assert line.values == pytest.approx({"slope": 1.3, "offset": -0.2}, abs=0.01)
    assert steep.best == "kaplan_transfer_line_code"


def test_transfer_needs_another_domain(stepwise):
    with pytest.raises(UserError, match="column loss_<domain>"):
        kaplan_shape.of_transfer(stepwise)


# -------------------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "analysis, values, message",
    [
        (kaplan.of_size, {"params": (1e4, 4e4)}, "needs at least 3 different params"),
        (kaplan.of_compute, {"params": (1e4,)}, "needs at least 3 different params"),
        (kaplan.of_data, {}, "needs runs on subsets of the data"),
        (kaplan_overfitting.overfitting, {}, "needs runs on subsets of the data"),
        (kaplan_steps.of_steps, {"params": (1e4,)}, "needs at least 2 different params"),
        (kaplan_steps.of_steps, {"tokens": (2**20,)}, "needs at least 3 different horizons"),
        (kaplan_allocation.allocation, {"params": (1e4, 4e4)}, "needs at least 3 different params"),
    ],
)
def test_too_little_is_said_in_one_sentence(stepwise, analysis, values, message):
    with pytest.raises(UserError, match=message):
        analysis(only(stepwise, **values) if values else stepwise)


@pytest.mark.parametrize(
    "analysis",
    [
        kaplan.of_size, kaplan.of_compute, kaplan.of_size_and_data, kaplan_steps.of_steps, kaplan_steps.of_least_compute,
        kaplan_allocation.allocation, chinchilla.by_envelope, chinchilla.by_parabolas, chinchilla.by_loss,
    ],
)  # fmt: skip
def test_sizes_that_are_all_one_are_refused(stepwise, analysis):
    alike = stepwise.assign(params=97_180 + 400 * np.log(stepwise["params"] / 1e4))  # of a study of shapes
    with pytest.raises(UserError, match=r"needs sizes that differ by a factor of 2 or more; params are 9.718e\+04 to 9.94"):
        analysis(alike)


def test_every_form_has_a_planted_study():
    every = [value for value in vars(kaplan_forms).values() if isinstance(value, Form)] + list(kaplan_forms.transfer("code"))
    assert {form.name for form in every} | {"chinchilla_3"} == set(PLANTED)
    for form, truth, make in PLANTED.values():
        data = make(np.random.default_rng(0))
        assert set(truth) == set(form.names) and len(data.y) == len(data.cluster) > len(truth)
        clean = form.predict(truth, data.x)
        assert 0 < np.abs(np.log(data.y / clean)).max() < 1.0


def test_every_analysis_has_a_name_and_needs_of_its_own():
    modules = (kaplan, kaplan_overfitting, kaplan_steps, kaplan_allocation, kaplan_shape)
    names = [analysis.name for module in modules for analysis in module.ANALYSES]
    assert names == [
        "kaplan_n", "kaplan_d", "kaplan_c", "kaplan_nd", "kaplan_overfitting", "kaplan_bcrit", "kaplan_ns", "kaplan_cmin",
        "kaplan_allocation", "kaplan_shape", "kaplan_transfer",
    ]  # fmt: skip
