"""B_crit by tokens or by loss: the planted one collapses the sizes, and where nothing can be told that is said."""

import numpy as np
import pandas
import pytest
from worlds import World

from scaling_jax.errors import UserError
from scaling_jax.laws.critical_growth import COLUMNS, find, noise_points, observations

NOISE = [f"{COLUMNS[0]}{end}" for end in ("", "_low", "_high")]
BY_LOSS = {"noise_law": "loss", "noise_exponent": 1 / 0.21}


@pytest.mark.parametrize(
    ("world", "best", "other"),
    [
        (World(seeds=1), "growth_tokens", "growth_loss"),
        (World(seeds=1, **BY_LOSS), "growth_loss", "growth_tokens"),
        (World(seeds=1, widths=(32, 48, 64), batches=(256.0, 724.0, 2048.0, 8192.0), **BY_LOSS), "growth_loss", "growth_tokens"),
    ],
)
def test_the_planted_law_collapses_the_sizes(world, best, other):
    finding = find(world.table(seed=2))
    assert finding.best == best and finding.comparison.best == best and finding.comparison.tied == [best]
    assert finding.comparison.by == ("params" if len(world.widths) > 2 else "tokens")
    named = {number.name: number for number in finding.numbers}
    by, other_by = best.removeprefix("growth_"), other.removeprefix("growth_")
    kept, left = (named[f"B_crit ∝ N^r at equal {of}"] for of in (by, other_by))
    assert kept.low - 0.02 < 0 < kept.high + 0.02 and abs(kept.value) < 0.05
    assert left.low * left.high > 0 and abs(left.value) > 0.15
    assert named[f"scatter of ln B_crit about the law of {by}"].value < named[f"scatter of ln B_crit about the law of {other_by}"].value / 3
    exponent = "tokens_exponent" if by == "tokens" else "loss_exponent"
    low, high = finding.fits[best].intervals[exponent]
    assert low - 0.05 < (0.5 if by == "tokens" else -1 / 0.21) < high + 0.05
    assert f"B_crit as a function of {by} collapses the sizes" in " ".join(finding.statements)
    assert finding.fits["growth_loss"].form.parameters[1].published == pytest.approx(-4.762, abs=1e-3)


def test_where_only_long_runs_have_large_batches_growth_is_told_at_equal_batch_size():
    """Planted: B_crit ∝ T^0.5 in every run, and B^-0.3 besides, in a grid that is ragged as of 100 steps a run."""
    rng = np.random.default_rng(0)
    rows = [
        {"params": params, "width": width, "batch_tokens": batch, "tokens": tokens, "loss": 5.0 * tokens**-0.05 * params**-0.05}
        for params, width in ((6144.0, 16), (24576.0, 32), (98304.0, 64))
        for batch in 2.0 ** np.arange(8, 16)
        for tokens in 2.0 ** np.arange(17, 23)
        if tokens >= 100 * batch
    ]
    table = pandas.DataFrame(rows)
    table[NOISE[0]] = table["tokens"] ** 0.5 * table["batch_tokens"] ** -0.3 * np.exp(0.05 * rng.normal(size=len(table)))
    table[NOISE[1]], table[NOISE[2]] = table[NOISE[0]] * 0.9, table[NOISE[0]] * 1.1
    finding = find(table)
    named = {number.name: number for number in finding.numbers}
    at_equal = named["B_crit ∝ T^p at equal batch size"]
    assert at_equal.low < 0.5 < at_equal.high and at_equal.high - at_equal.low < 0.1 and at_equal.published == 1
    assert finding.fits["growth_tokens"].intervals["tokens_exponent"][1] < 0.48  # what the ragged grid makes of it
    two = find(table[table["batch_tokens"] <= 512])
    assert not any("equal batch size" in number.name for number in two.numbers)


@pytest.mark.parametrize("below", [-7.0, -2.0])
def test_a_power_of_the_loss_that_steepens_is_said_to_be_none(below):
    rng, rows = np.random.default_rng(1), []
    for params, width in ((6144.0, 16), (24576.0, 32), (98304.0, 64)):
        for batch in (512.0, 1024.0, 2048.0):
            rows += [{"params": params, "width": width, "batch_tokens": batch, "tokens": tokens} for tokens in 2.0 ** np.arange(18, 24)]
    table = pandas.DataFrame(rows)
    table["loss"] = 12.0 * table["tokens"] ** -0.05 * table["params"] ** -0.03
    over = table["loss"] / np.median(table["loss"])
    table[NOISE[0]] = 5000.0 * over ** np.where(over > 1, -2.0, below) * np.exp(0.03 * rng.normal(size=len(table)))
    table[NOISE[1]], table[NOISE[2]] = table[NOISE[0]] * 0.9, table[NOISE[0]] * 1.1
    finding = find(table)
    named = {number.name: number for number in finding.numbers}
    for side, planted in (("above", -2.0), ("below", below)):
        half = named[f"B_crit ∝ L^x {side} the median loss"]
        assert half.low - 0.1 < planted < half.high + 0.1 and half.high - half.low < 2
    assert any(sentence.startswith("No one power of the loss: L^x has x -") for sentence in finding.statements) == (below == -7.0)


def test_sizes_too_alike_tell_nothing():
    finding = find(World(widths=(32, 33), noise_sd=0.3, seeds=1).table())
    text = " ".join(finding.statements)
    assert "Both laws collapse the sizes within their errors" in text and "too collinear here (R² 0.9" in text


def test_only_runs_near_the_best_lr_count():
    table = World(seeds=1).table()
    far = noise_points(table.assign(noise_scale_tokens=table["noise_scale_tokens"] * np.where(table["lr"] > 0, 1, 1)))
    spoilt = table.copy()
    best = far.groupby("batch_tokens")["runs"].sum()
    assert len(far) == 72 and (far["runs"].between(1, 4)).all() and best.min() >= 12
    world = World(seeds=1)
    off = np.abs(np.log(spoilt["lr"] / world.best_lr(spoilt["batch_tokens"], spoilt["horizon_tokens"]))) > 0.6
    assert off.mean() > 0.3
    spoilt.loc[off, COLUMNS[0]] *= 100
    np.testing.assert_array_equal(noise_points(spoilt)["batch_crit_tokens"], far["batch_crit_tokens"])


def test_settings_that_differ_are_not_averaged():
    mup = World(seeds=1, widths=(32, 64)).table()
    standard = World(seeds=1, parametrization="standard", lr_params_exponent=-0.4, noise_scale=12000.0).table(1)
    both = pandas.concat([mup, standard.assign(point="s" + standard["point"])], ignore_index=True)
    for table in (
        both,
        both.groupby(["params", "batch_tokens", "horizon_tokens", "parametrization"], as_index=False).nth(4).assign(lr=0.1),
    ):
        for analysis in (noise_points, find):
            with pytest.raises(UserError, match="parametrization differ at the same size, batch_tokens and tokens"):
                analysis(table)


def test_rows_on_a_subset_of_the_data_do_not_count():
    table = World(seeds=1).table()
    subset = table.assign(data_tokens=2**16, point="d" + table["point"], **{name: 100 * table[name] for name in NOISE})
    found = noise_points(pandas.concat([table, subset], ignore_index=True))
    np.testing.assert_allclose(found["batch_crit_tokens"], noise_points(table)["batch_crit_tokens"])
    assert find(pandas.concat([table, subset], ignore_index=True)).best == "growth_tokens"


def test_open_intervals_are_left_out():
    table = World(seeds=1).table()
    early = table["horizon_tokens"] == 2**17
    table.loc[early, f"{COLUMNS[0]}_high"] = np.inf
    points = noise_points(table)
    assert points["censored"].sum() == 12 and set(points[points["censored"]]["tokens"]) == {2.0**17}
    data = observations(table)
    assert len(data.y) == 60 and data.x["tokens"].min() == 2**18 and len(np.unique(data.cluster)) == 12


def test_the_preconditioned_noise_scale_is_a_law_of_its_own():
    table = World(seeds=1).table()
    for end in ("", "_low", "_high"):
        table[f"{COLUMNS[1]}{end}"] = 10 * table[f"{COLUMNS[0]}{end}"]
    finding = find(table)
    assert set(finding.points["definition"]) == set(COLUMNS)
    named = {number.name: number.value for number in finding.numbers}
    assert named["preconditioned: B_crit ∝ N^r at equal tokens"] == pytest.approx(named["B_crit ∝ N^r at equal tokens"], abs=1e-6)
    assert "Preconditioned noise scale: B_crit as a function of tokens" in finding.statements[-1]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (World(widths=(32,), seeds=1).table(), "needs at least 2 different params; there is 1: 24576"),
        (World(horizons=(2.0**19,), seeds=1).table(), "critical batch size needs at least 3 different tokens; there is 1"),
        (World(seeds=1).table().drop(columns=COLUMNS[0]), "the table has no noise_scale_tokens"),
    ],
)
def test_what_the_table_cannot_support(table, message):
    with pytest.raises(UserError) as caught:
        find(table)
    assert message in str(caught.value)
