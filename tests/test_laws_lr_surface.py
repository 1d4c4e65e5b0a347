"""The rivals of η*(B, T): planted worlds come back, each is told from the others, and what cannot be told is said."""

import os
from pathlib import Path

import numpy as np
import pytest
from worlds import TOKENS, World

from scaling_jax import results
from scaling_jax.errors import UserError
from scaling_jax.laws.fit import fit
from scaling_jax.laws.lr_surface import bend_form, clusters, find, find_regimes, forms, observations, power_form, surface

SHARED = Path(__file__).parents[1] / os.environ.get("SCALING_JAX_SHARED", "../shared")


def values_of(form, **values):
    return form.predict(values, {name: np.array(column) for name, column in POINTS.items() if name in form.inputs})


POINTS = {"batch_tokens": [500.0, 2000.0, 8000.0], "tokens": [1e6, 1e6, 4e6], "params": [1e5, 4e5, 4e5]}


def test_the_forms_are_the_published_expressions():
    batch, tokens, params = (np.array(column) for column in POINTS.values())
    critical, top = 2000.0 * (tokens / 1e6) ** 0.5, 0.01 * (tokens / 1e6) ** -0.2
    chosen = {"lr_crit": 0.01, "lr_crit_tokens_exponent": -0.2, "batch_crit": 2000.0, "batch_crit_tokens_exponent": 0.5}
    expected = {
        "surge": top / (0.5 * (np.sqrt(batch / critical) + np.sqrt(critical / batch))),
        "plateau": top / np.sqrt(1 + critical / batch),
    }
    for name, lr in expected.items():
        assert values_of(bend_form(name, 1e6, (500, 8000), 0.01), **chosen) == pytest.approx(lr, rel=1e-12)
    with_size = bend_form("surge", 1e6, (500, 8000), 0.01, 1e5)
    critical, top = critical * (params / 1e5) ** -0.7, top * (params / 1e5) ** -0.5
    lr = top / (0.5 * (np.sqrt(batch / critical) + np.sqrt(critical / batch)))
    assert values_of(with_size, **chosen, lr_crit_params_exponent=-0.5, batch_crit_params_exponent=-0.7) == pytest.approx(lr, rel=1e-12)
    assert "(N/100000)^r" in with_size.formula and "(T/1e+06)^q" in with_size.formula
    power = values_of(power_form(1e6, 2000.0), lr=0.01, batch_exponent=0.4, tokens_exponent=-0.3)
    assert power == pytest.approx(0.01 * (batch / 2000) ** 0.4 * (tokens / 1e6) ** -0.3, rel=1e-12)


@pytest.mark.parametrize("form", ["surge", "plateau", "power"])
def test_a_planted_world_is_told_from_its_rivals(form):
    world = World(form=form)
    table = world.table(seed=1)
    finding = find(table)
    assert finding.best == finding.comparison.best == form and finding.comparison.by == "tokens"
    fitted = finding.fits[form]
    assert set(finding.fits) == {"surge", "plateau", "power"} and fitted.identified
    at = dict(fitted.form.constants)["tokens0"]
    truth = {"tokens_exponent": -0.15, "batch_exponent": 0.4}
    if form != "power":
        truth = {"lr_crit": 0.012 * (at / TOKENS) ** -0.15, "lr_crit_tokens_exponent": -0.15}
        truth |= {"batch_crit": world.critical_batch(at), "batch_crit_tokens_exponent": 0.6}
    for name, value in truth.items():
        low, high = fitted.intervals[name]
        middle, half = (low + high) / 2, (high - low) / 2
        assert abs(value - middle) < 2 * half, name  # the interval is of 95%: twice as wide it may not miss
    assert fitted.rms < 0.03 < 3 * min(finding.fits[other].rms for other in finding.fits if other != form)
    finished = table[table["status"] == "finished"]
    assert finding.runs == finished["point"].nunique() and len(finding.points) == 72 and not finding.points["censored"].any()
    bends = [number for number in finding.numbers if "_crit ∝" in number.name]
    if form == "power":  # a bend that the data do not show has no growth
        assert "The power, which has no bend, predicts best: these data show no B_crit." in finding.statements
        assert not any("B_crit belongs to the form" in said for said in finding.statements)
        assert bends and all(number[1:4] == (None, None, None) and "no bend, predicts best" in number.note for number in bends)
    if form == "surge":
        named = {number.name: number for number in finding.numbers}
        assert named["B_crit ∝ T^p by surge"].value == pytest.approx(0.6, abs=0.05)
        assert named["B_crit ∝ T^p by surge"].published == 1.0
        assert named["slope of ln η* in ln B, upper half"].high < 0
        assert any("B_crit belongs to the form" in said for said in finding.statements)


def test_a_narrow_range_of_batches_identifies_no_bend():
    """All far below the bend, where either form is √B."""
    finding = find(World(widths=(32, 48, 64, 96), batches=(256.0, 362.0, 512.0), batch_crit=1e5, run_sd=3e-3).table())
    assert "batch_crit" in finding.fits["surge"].unidentified and "batch_crit" in finding.fits["plateau"].unidentified
    assert finding.best == "power"
    named = {number.name: number for number in finding.numbers}
    assert named["B_crit ∝ T^p by surge"].value is None and "not identified" in named["B_crit ∝ T^p by surge"].note
    said = [text for text in finding.statements if "not identified with batches of 256 to 512 tokens" in text]
    assert len(said) == 2
    low, high = finding.fits["power"].intervals["batch_exponent"]
    assert low < 0.5 < high


def test_sizes_enter_unless_the_parametrization_takes_them_out():
    mup = observations(World(seeds=1).table())
    assert "params" not in mup.x and len(np.unique(mup.cluster)) == 12
    world = World(parametrization="standard", lr_params_exponent=-0.3, widths=(32, 64, 128), seeds=1)
    data = observations(world.table())
    assert "params" in data.x
    (power,) = [form for form in forms(data) if form.name == "power"]
    low, high = fit(power, data, resamples=200).intervals["params_exponent"]
    assert low - 0.02 < -0.3 < high + 0.02 and high < -0.2


def test_a_schedule_that_goes_with_the_horizon_is_said():
    table = World(seeds=1).table()
    table["schedule"] = np.where(table["horizon_tokens"] < 2**19, "cosine", "wsd")
    for analysis in (find, find_regimes):
        assert any("schedule is not the same throughout" in said and "goes with tokens" in said for said in analysis(table).statements)


def test_censored_minima_are_left_out_and_kept_in_the_table():
    data = observations(World(lrs=tuple(2.0**k for k in np.arange(-7.5, -4.4, 0.5)), seeds=1).table())
    assert 20 < len(data.y) < 72 == len(data.frame)
    assert data.frame["censored"].sum() == 72 - len(data.y)
    assert set(data.frame["bound"]) >= {"", "low"}
    assert f"of {len(data.y)} of 72 cells" in data.origin.replace("minima in ln η of", "of")


def test_clusters_are_runs():
    world = World(seeds=1)
    table = world.table()
    points = observations(table).frame
    assert len(np.unique(clusters(table, points))) == 12
    assert len(np.unique(clusters(table.assign(schedule="cosine"), points))) == 72
    assert len(np.unique(clusters(table, points, ("params", "tokens")))) == 12


def test_regimes_of_the_three_sides_of_the_bend():
    world = World(lr_tokens_exponent=0.0, batch_tokens_exponent=1.0, batch_crit=1500.0, batches=(32, 64, 1024, 1448, 2048, 65536))
    finding = find_regimes(world.table())
    exponents = {row.batch_tokens: row for row in finding.points.itertuples()}
    for batch, row in exponents.items():
        x = np.log(world.horizons) - np.mean(np.log(world.horizons))
        truth = x @ np.log(world.best_lr(batch, world.horizons)) / (x @ x)
        width = row.high - row.low
        assert abs(row.exponent - truth) < width < 0.1
    assert exponents[32.0].exponent == pytest.approx(-0.5, abs=0.06) and exponents[65536.0].exponent == pytest.approx(0.5, abs=0.06)
    named = {number.name: number.note for number in finding.numbers}
    assert named["η* ∝ T^x at B = 32"].startswith("B ≪ B_crit") and named["η* ∝ T^x at B = 6.554e+04"].startswith("B ≫ B_crit")
    assert "the best lr rises at B = 2048, B = 6.554e+04" in " ".join(finding.statements)


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (World(batches=(512.0,), seeds=1), "a surface of the best learning rate needs at least 3 different batch_tokens; there is 1: 512"),
        (World(horizons=(2.0**19,), seeds=1), "a surface of the best learning rate needs at least 2 different tokens; there is 1: 524288"),
        (World(grid_off=10.0, diverge=1e3, seeds=1), "none of 72 cells has its lowest loss between two higher ones"),
    ],
)
def test_what_the_table_cannot_support(world, message):
    with pytest.raises(UserError) as caught:
        find(world.table())
    assert message in str(caught.value)


def test_published_sweep_leaves_surge_and_plateau_open():
    """StepLaw's runs: the exponents of B_crit by either form as an independent analysis of the same minima found them."""
    path = SHARED / "data" / "steplaw" / "dense_lr_bs_loss.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    table = results.load(path, columns={"params": "N", "tokens": "D", "loss": "smooth loss"})
    data = observations(table.assign(batch_tokens=table["bs"].astype(float) * 2048), cluster_by=("params", "tokens"))
    assert len(data.y) == 157 and len(np.unique(data.cluster)) == 17
    fits, comparisons, _ = surface(data, resamples=200)
    for form, of_tokens, of_params in (("surge", (0.42, 0.92), (-1.30, -0.38)), ("plateau", (0.97, 1.41), (-1.93, -0.89))):
        assert of_tokens[0] < fits[form].values["batch_crit_tokens_exponent"] < of_tokens[1]
        assert of_params[0] < fits[form].values["batch_crit_params_exponent"] < of_params[1]
        assert fits[form].rms < 0.7 * fits["power"].rms
    assert fits["surge"].rms == pytest.approx(fits["plateau"].rms, rel=0.05)
    assert comparisons[0].by == "tokens" and {"surge", "plateau"} <= set(comparisons[0].tied)
