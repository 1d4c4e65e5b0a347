"""Hoffmann's three approaches: planted constants come back; the public points give what Besiroglu et al. published of them."""

import os
from pathlib import Path

import numpy as np
import pytest
from kaplan_tables import PARAMETRIC, parametric

from scaling_jax import results
from scaling_jax.errors import UserError
from scaling_jax.laws import chinchilla, chinchilla_form, isoflop
from scaling_jax.laws.chinchilla_form import BESIROGLU, CHINCHILLA, GOPHER_FLOPS, ROUNDED, UNROUNDED, allocation
from scaling_jax.laws.fit import fit

SHARED = Path(os.environ.get("SCALING_JAX_SHARED", "../shared"))
POINTS = SHARED / "data/epoch_chinchilla/svg_extracted_data.csv"
TRUE_A = PARAMETRIC["beta"] / (PARAMETRIC["alpha"] + PARAMETRIC["beta"])

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def planted():
    return parametric(np.random.default_rng(0))


@pytest.fixture(scope="module")
def public():
    if not POINTS.is_file():
        pytest.skip(f"{POINTS} is not there; SCALING_JAX_SHARED says where its folder is")
    columns = {"params": "Model Size", "flops": "Training FLOP"}
    return results.load(POINTS, columns=columns, required=("params", "tokens", "loss"))


def number(finding, name):
    return next(number for number in finding.numbers if number.name.startswith(name))


def said(finding, words):
    assert any(words in sentence for sentence in finding.statements), finding.statements


def test_allocation_is_the_least_loss_at_its_compute():
    optimum = allocation(**PARAMETRIC)
    for flops in (1e15, 1e20):
        params = np.geomspace(0.01, 100, 200_001) * optimum.params(flops)
        loss = CHINCHILLA.predict(PARAMETRIC, {"params": params, "tokens": flops / (6 * params)})
        assert optimum.params(flops) == pytest.approx(params[loss.argmin()], rel=1e-4)
        assert 6 * optimum.params(flops) * optimum.tokens(flops) == pytest.approx(flops, rel=1e-9)
    assert optimum.a + optimum.b == pytest.approx(1)


def test_published_constants_at_gophers_budget():
    """Tokens per parameter of the three published sets: rounding them changes the answer by more than their standard errors."""
    per_size = [float(allocation(**k).tokens(GOPHER_FLOPS) / allocation(**k).params(GOPHER_FLOPS)) for k in (ROUNDED, UNROUNDED, BESIROGLU)]
    assert per_size == pytest.approx([92.6, 58.9, 18.4], rel=0.003)
    assert allocation(**UNROUNDED).params(GOPHER_FLOPS) == pytest.approx(40e9, rel=0.02)


def test_the_starts_are_the_papers():
    starts = CHINCHILLA.all_starts({}, np.zeros(0))
    assert starts.shape == (4500, 5)
    by_name = dict(zip(CHINCHILLA.names, starts.T, strict=True))
    assert sorted(set(np.round(np.log(by_name["A"]), 9))) == [0, 5, 10, 15, 20, 25]
    assert sorted(set(np.round(np.log(by_name["E"]), 9))) == [-1, -0.5, 0, 0.5, 1]
    assert sorted(set(by_name["beta"])) == [0, 0.5, 1, 1.5, 2] and CHINCHILLA.huber_delta == 1e-3


def test_the_loss_equals_its_formula():
    x = {"params": np.array([1e7, 1e9]), "tokens": np.array([1e9, 1e10])}
    k = PARAMETRIC
    expected = k["E"] + k["A"] / x["params"] ** k["alpha"] + k["B"] / x["tokens"] ** k["beta"]
    np.testing.assert_allclose(CHINCHILLA.predict(k, x), expected, rtol=1e-12)


def test_envelope_and_parabolas_find_the_planted_exponent(planted):
    for approach in (chinchilla.by_envelope, chinchilla.by_parabolas):
        finding = approach(planted, resamples=60)
        a, b = number(finding, "a"), number(finding, "b")
        assert abs(a.value - TRUE_A) < 0.03 and a.low < a.value < a.high < a.low + 0.3
        assert a.value + b.value == pytest.approx(1) and a.published in (0.49, 0.50)
        assert finding.points["censored"].any()  # the ends of the budgets
        said(finding, "budgets have only a bound")
    inside = finding.points[~finding.points["censored"]]
    np.testing.assert_allclose(inside["params"], allocation(**PARAMETRIC).params(inside["flops"]), rtol=0.3)


def test_the_exponent_of_the_envelope_is_not_drawn_to_its_steps():
    """Without noise it is the planted one; with it, right on average, and its interval is as wide as the estimates scatter."""
    exact = chinchilla.by_envelope(parametric(np.random.default_rng(0), noise=1e-9), resamples=60).numbers[0]
    assert exact.value == pytest.approx(TRUE_A, abs=0.002)
    studies = [chinchilla.by_envelope(parametric(np.random.default_rng(s)), resamples=200).numbers[0] for s in range(40)]
    values, widths = np.array([a.value for a in studies]), np.array([a.high - a.low for a in studies])
    assert values.mean() == pytest.approx(TRUE_A, abs=0.005)
    assert 2 < np.median(widths) / values.std() < 6  # 2·t(5) = 5.1 with 7 takeovers
    assert sum(a.low <= TRUE_A <= a.high for a in studies) >= 32


def test_allocation_of_a_loss_that_one_variable_does_not_change_is_not_told(few_starts):
    table = parametric(np.random.default_rng(3))
    table["loss"] = 1.4 + 300 / table["tokens"] ** 0.37
    table["loss"] *= np.exp(0.003 * np.random.default_rng(4).normal(size=len(table)))
    finding = chinchilla.by_loss(table, resamples=60)
    assert finding.fits["chinchilla_3"].unidentified
    assert all(number(finding, name).value is None for name in ("G", "N_opt", "D_opt", "D/N"))
    assert not any("D/N at" in sentence for sentence in finding.statements)


@pytest.fixture
def few_starts(monkeypatch):
    """The analyses with 27 starts: the 4,500 are for the one test that counts them."""
    monkeypatch.setattr(chinchilla, "CHINCHILLA", chinchilla_form.QUICK)


def test_parametric_loss_comes_back_with_its_allocation(planted, few_starts):
    finding = chinchilla.by_loss(planted, resamples=100)
    law = finding.fits["chinchilla_3"]
    for name, value in PARAMETRIC.items():
        low, high = law.intervals[name]
        assert low < value < high, name
    assert finding.best == "chinchilla_3"
    said(finding, "chinchilla_3 predicts best beyond flops")
    a = number(finding, "a")
    assert a.low < TRUE_A < a.high and a.published == pytest.approx(0.4565, abs=1e-4)
    assert not any("5.76e+23" in n.name for n in finding.numbers)  # 1e7 times beyond: nothing is said of it


def test_highest_losses_can_be_left_out(planted, few_starts):
    finding = chinchilla.by_loss(planted, drop_highest=3, resamples=30)
    said(finding, f"the 3 highest of {len(planted)} losses are left out")
    left_out = finding.points[finding.points["censored"]]
    assert sorted(left_out["loss"]) == sorted(planted["loss"])[-3:]
    assert finding.fits["chinchilla_3"].points == len(planted) - 3


def test_too_few_sizes_and_no_crossing_are_said(planted):
    for approach in (chinchilla.by_envelope, chinchilla.by_parabolas, chinchilla.by_loss):
        with pytest.raises(UserError, match="needs at least 3 different params"):
            approach(planted[planted["params"] < 3e5])
    largest = planted[planted["tokens"] > 100 * planted["params"]]  # a larger model would be better everywhere
    with pytest.raises(UserError, match="need horizons at which their courses cross"):
        chinchilla.by_envelope(largest)
    with pytest.raises(UserError, match="drop_highest is 99"):
        chinchilla.by_loss(planted, drop_highest=99)


def test_the_public_points(public, full_compilation):
    """All 4,500 starts on the 240 points: the objective that the source's notebook has to 7 digits, and its constants."""
    rows = chinchilla.rows_of(public, "")
    data = chinchilla.observed(chinchilla.without_highest(rows, 5), "")
    law = fit(CHINCHILLA, data, resamples=0)
    assert law.points == 240
    assert law.objective <= 0.0010183
    assert law.values["E"] == pytest.approx(1.817, abs=0.002)
    assert law.values["alpha"] == pytest.approx(0.347, abs=0.002) and law.values["beta"] == pytest.approx(0.367, abs=0.002)
    optimum = allocation(**law.values)
    assert optimum.tokens(GOPHER_FLOPS) / optimum.params(GOPHER_FLOPS) == pytest.approx(18.4, rel=0.05)
    quick = fit(chinchilla_form.QUICK, data, resamples=0)
    assert quick.objective == pytest.approx(law.objective, rel=1e-6)  # 27 starts near the measurements are enough here


def test_the_public_budgets(public):
    finding = chinchilla.by_parabolas(public, resamples=60)
    a = number(finding, "a")
    assert a.low < 0.513 < a.high and a.high - a.low < 0.2
    said(finding, "budgets are bins")
    assert isoflop.bins(chinchilla.rows_of(public, "")).nunique() >= 9


def test_outliers_are_told_of(public, few_starts):
    finding = chinchilla.by_loss(public, resamples=30)
    said(finding, "without the 5 highest of 245 losses")
    assert finding.fits["chinchilla_3"].values["beta"] == pytest.approx(0.453, abs=0.002)
    assert number(finding, f"D/N at {GOPHER_FLOPS:.3g}").value == pytest.approx(6.8, abs=0.1)
