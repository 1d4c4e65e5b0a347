"""Where η*(B) bends: exponents and corners against planted lines and worlds, and how often what is said is wrong."""

from collections import Counter

import numpy as np
import pandas
import pytest
from worlds import TOKENS, World

from scaling_jax.errors import UserError
from scaling_jax.laws.lr_bend import Halves, Range, corner, find, halves, verdict

WIDE = tuple(2.0**k for k in range(6, 16))


def log_batches(count):
    return np.log(2.0) * np.arange(8, 8 + count)


def broken(x, bend, below=0.5, above=-0.2):
    return below * x + (above - below) * np.maximum(x - np.log(bend), 0)


def rounded(x, bend, fall):
    """Surge at a fall of 1, plateau at ½; written as the published expressions are."""
    ratio = np.exp(x) / bend
    return np.log(2 / (np.sqrt(ratio) + 1 / np.sqrt(ratio))) if fall == 1 else -0.5 * np.log(1 + 1 / ratio)


@pytest.mark.parametrize(("count", "half"), [(4, 2), (5, 3), (8, 4), (9, 5)])
def test_exponents_are_weighted_lines_through_the_halves(count, half):
    rng = np.random.default_rng(count)
    x, y, se = log_batches(count), rng.normal(size=count), rng.uniform(0.01, 0.05, count)
    found = halves(x, y, se)
    lower, upper = (np.polyfit(x[part], y[part], 1, w=1 / se[part])[0] for part in (slice(half), slice(count - half, None)))
    assert found.lower.value == pytest.approx(lower) and found.upper.value == pytest.approx(upper)
    assert found.change.value == pytest.approx(upper - lower) and found.whole.value == pytest.approx(np.polyfit(x, y, 1, w=1 / se)[0])


@pytest.mark.parametrize("count", [4, 5, 8])
def test_minima_on_two_lines_have_the_intervals_of_their_own_errors(count):
    """The standard errors are those of simulated minima; where the number is odd the halves share one."""
    rng = np.random.default_rng(count)
    x, se = log_batches(count), rng.uniform(0.01, 0.05, count)
    y = 0.4 * x
    found = halves(x, y, se)
    drawn = [halves(x, y + se * rng.normal(size=count), se) for _ in range(2000)]
    for name in Halves._fields:
        interval = getattr(found, name)
        spread = np.std([getattr(each, name).value for each in drawn])
        assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * spread, rel=0.06), name


@pytest.mark.parametrize(("stated", "count"), [(0.03, 6), (0.003, 6), (0.003, 9), (np.nan, 9)])
def test_intervals_hold_the_truth_though_errors_are_understated_or_not_known(stated, count):
    rng = np.random.default_rng(1)
    x, se = log_batches(count), np.full(count, stated)
    drawn = [halves(x, 0.4 * x + 0.03 * rng.normal(size=count), se) for _ in range(1500)]
    for name, truth in zip(Halves._fields, (0.4, 0.4, 0.4, 0.0), strict=True):
        held = np.mean([getattr(each, name).low < truth < getattr(each, name).high for each in drawn])
        assert 0.935 < held < 0.99, (name, held)


def test_four_minima_without_errors_say_nothing():
    found = halves(log_batches(4), broken(log_batches(4), 800.0), np.full(4, np.nan))
    assert np.isnan(found.change.low) and verdict(found) == "undecided (errors not known)"


@pytest.mark.parametrize(
    ("lower", "upper", "change", "said"),
    [
        (0.5, (0.3, 0.6), (-0.2, 0.2), "rises on"),
        (0.5, (-0.1, 0.6), (-0.2, 0.2), "undecided (neither a bend nor a rise of the upper half is shown)"),
        (0.5, (-0.6, -0.1), (-1.0, -0.6), "bends and turns down"),
        (0.5, (-0.2, 0.2), (-0.7, -0.3), "bends and levels off"),
        (0.5, (0.02, 0.2), (-0.5, -0.3), "bends and levels off"),
        (0.5, (0.1, 0.3), (-0.5, -0.1), "bends and still rises"),
        (0.5, (-0.4, 0.2), (-0.9, -0.3), "bends (undecided above)"),
        (0.5, (-0.1, 0.3), (-0.7, -0.2), "bends (undecided above)"),
        (0.2, (0.4, 0.6), (0.1, 0.5), "steepens"),
    ],
)
def test_verdicts(lower, upper, change, said):
    middles = [Range(sum(ends) / 2, *ends) for ends in (upper, change)]
    assert verdict(Halves(Range(lower, lower - 0.1, lower + 0.1), middles[0], Range(0.0, -0.1, 0.1), middles[1])) == said


@pytest.mark.parametrize("bend", [1000.0, 3000.0, 10000.0])
def test_a_corner_without_noise_is_found_where_it_is(bend):
    x, se = log_batches(10), np.full(10, 1e-3)
    assert corner(x, broken(x, bend), se).batch.value == pytest.approx(bend, rel=0.02)
    for fall in (1, 0.5):
        assert corner(x, rounded(x, bend, fall), se, rounded=True).batch.value == pytest.approx(bend, rel=0.02)


def test_two_lines_place_the_bend_of_a_surge_too_near_to_the_middle():
    x, se = log_batches(10), np.full(10, 1e-6)
    middle = np.exp(x.mean())
    for bend in (middle / 4, middle * 4):
        found = corner(x, rounded(x, bend, 1), se)
        places = np.exp(np.linspace(x[1], x[-2], 801))
        misfit = [
            np.linalg.lstsq(np.stack([x**0, x, np.maximum(x - np.log(k), 0)], 1), rounded(x, bend, 1), rcond=None)[1][0] for k in places
        ]
        nearest = places[np.argmin(misfit)]
        assert abs(np.log(nearest / middle)) < 0.8 * np.log(4)
        assert found.why or found.batch.value == pytest.approx(nearest, rel=0.03)


@pytest.mark.parametrize("shape", ["lines", "surge"])
def test_the_profile_interval_holds_the_bend(shape):
    rng = np.random.default_rng(0)
    x, se = log_batches(10), np.full(10, 0.02)
    bend = 1.1 * np.exp(x.mean())
    y = broken(x, bend) if shape == "lines" else rounded(x, bend, 1)
    drawn = [corner(x, y + se * rng.normal(size=10), se, rounded=shape == "surge") for _ in range(200)]
    known = [each.batch for each in drawn if not each.why]
    assert len(known) > 190
    assert 0.93 < np.mean([each.low < bend < each.high for each in known])
    assert np.mean([np.log(each.high / each.low) for each in known]) < 1.2


@pytest.mark.parametrize("stated", [0.02, 0.005, np.nan])
@pytest.mark.parametrize("count", [6, 10])
def test_one_line_is_seldom_given_a_bend(stated, count):
    rng = np.random.default_rng(2)
    x, se = log_batches(count), np.full(count, stated)
    drawn = [corner(x, 0.4 * x + 0.02 * rng.normal(size=count), se) for _ in range(200)]
    assert np.mean([each.p < 0.05 for each in drawn]) < 0.1
    assert np.mean([not each.why for each in drawn]) < 0.05
    assert all("not better than one" in each.why for each in drawn if each.p > 0.05)


def test_why_a_bend_is_not_identified():
    x, se = log_batches(8), np.full(8, 0.01)
    assert "4 minima are too few" in corner(x[:4], broken(x, 800.0)[:4], se[:4]).why
    assert "two slopes are not better than one" in corner(x, 0.4 * x, se).why
    assert "the upper slope is the steeper one" in corner(x, -broken(x, 3000.0), se).why
    assert "reaches the upper end" in corner(x, broken(x, np.exp(x[-2])), se).why
    assert "reaches the lower end" in corner(x, broken(x, np.exp(x[1])), se).why


def frames(seeds=4, **world):
    return [find(World(widths=(32,), seeds=1, **world).table(seed)).points for seed in range(seeds)]


@pytest.mark.parametrize("batches", [WIDE, WIDE[2:8], WIDE[2:6]], ids=len)
def test_a_planted_power_rises_on(batches):
    verdicts = Counter(word for frame in frames(5, form="power", batches=batches) for word in frame["verdict"])
    bends = sum(count for word, count in verdicts.items() if word.startswith("bends"))
    assert bends <= 3 and verdicts["rises on"] >= 26, verdicts  # of 30
    assert sum((frame["bend_not_identified"] == "").sum() for frame in frames(5, form="power", batches=batches)) <= 3


def test_a_planted_surge_bends_and_turns_down():
    for frame in frames(form="surge", batch_crit=1000.0, batches=WIDE):
        assert (frame["verdict"] == "bends and turns down").all()
        assert (frame["bend_not_identified"] == "").all() and (frame["upper_low"] > -0.6).all()


def test_a_planted_plateau_levels_off():
    for frame in frames(form="plateau", batch_crit=700.0, batches=WIDE):
        assert frame["verdict"].eq("bends and levels off").sum() >= 5
        assert frame["verdict"].str.startswith("bends").all() and not frame["verdict"].str.contains("down").any()


def test_exponents_of_a_world_are_those_of_its_curve():
    world = World(form="surge", batches=WIDE)
    x, finding = np.log(WIDE), find(world.table())
    for row in finding.points.itertuples():
        truth = np.log(world.best_lr(np.array(WIDE), row.tokens))
        assert row.lower_low < np.polyfit(x[:5], truth[:5], 1)[0] < row.lower_high
        assert row.upper_low < np.polyfit(x[5:], truth[5:], 1)[0] < row.upper_high
    last = finding.points[finding.points["params"] == finding.points["params"].max()].iloc[-1]
    named = {number.name: number for number in finding.numbers}
    upper = named["η* ∝ B^x, upper half, at T = 4.194e+06, N = 9.83e+04"]
    assert (upper.value, upper.low, upper.high) == (last["upper"], last["upper_low"], last["upper_high"])
    assert "batches of 2048 tokens and more" in upper.note
    assert named["η* ∝ B^x, lower half, at T = 4.194e+06, N = 9.83e+04"].note == "batches of up to 1024 tokens"
    assert finding.fits == {} and finding.runs == world.table().query("status == 'finished'")["point"].nunique()


@pytest.mark.parametrize("form", ["surge", "plateau"])
def test_the_growth_of_the_bend(form):
    """By the rounded corner it is the planted one; two straight lines have it too near to 0, and say so."""
    held, values = [], {"two lines": [], "rounded corner": []}
    for seed in range(5):
        found = {number.name: number for number in find(World(form=form, widths=(32,), batches=WIDE).table(seed)).numbers}
        for kind, of_kind in values.items():
            of_kind.append(found[f"bend ∝ T^p by {kind}"].value)
        own = found["bend ∝ T^p by rounded corner"]
        held.append(own.low < 0.6 < own.high and own.high - own.low < 1.0)
        assert own.published == 1.0 and "too near to 0" in found["bend ∝ T^p by two lines"].note
    assert sum(held) >= 4
    assert np.mean(values["rounded corner"]) == pytest.approx(0.6, abs=0.1) and np.mean(values["two lines"]) < 0.45


def test_a_bend_outside_the_batches_has_no_number():
    finding = find(World(widths=(32,), batch_crit=1e6, batches=WIDE[:8]).table())
    bends = [number for number in finding.numbers if number.name.startswith("bend of")]
    assert len(bends) == 6 and sum(number.value is None for number in bends) >= 5
    assert all("not identified" in number.note for number in bends if number.value is None)
    assert not any(number.name.startswith("bend ∝") for number in finding.numbers)
    assert any("No bend is shown, which excludes none beyond the largest batches, 8192 tokens" in said for said in finding.statements)


def test_what_is_censored_is_counted_at_either_end():
    lrs = tuple(2.0**k for k in np.arange(-8.0, -5.4, 0.5))
    finding = find(World(widths=(32,), form="power", batches=WIDE[:9], lrs=lrs, diverge=1e3).table())
    points = finding.points
    assert (points["batches"] + points["left_out"] == 9).all()
    assert points["left_out_smallest"].sum() and points["left_out_largest"].sum() == points["left_out_largest_from_below"].sum() > 0
    (said,) = [text for text in finding.statements if "left out of" in text]
    smallest, largest = points["left_out_smallest"].sum(), points["left_out_largest"].sum()
    assert f"{smallest} at the smallest batch sizes tried, {largest} at the largest batch sizes tried" in said
    assert f"({largest} of them bounds from below: the best lr may rise on there)" in said


def test_horizons_with_too_few_minima_are_named():
    table = World(widths=(32,)).table()
    few = find(table[(table["horizon_tokens"] > 2**17) | (table["batch_tokens"] < 2000)])
    assert len(few.points) == 5
    assert "Fewer than 4 minima, and nothing said, at T = 1.311e+05 (3)." in few.statements
    with pytest.raises(UserError, match=r"4 batch sizes or more, .* the most is 3, at T = 1.311e\+05"):
        find(table[table["batch_tokens"] < 2000])


def test_grids_without_an_error_go_by_the_scatter():
    finding = find(World(widths=(32,), batches=WIDE, lrs_each=3, horizons=(TOKENS,), batch_crit=1000.0).table())
    assert any("errors of the minima are not known" in said for said in finding.statements)
    assert np.isfinite(finding.points["change_low"]).all()


def test_settings_that_differ_are_refused():
    table = World(widths=(32,), seeds=2).table()
    table["warmup_tokens"] = np.where(table["seed"] == 0, 2**12, 2**13)
    with pytest.raises(UserError, match="warmup_tokens differ at the same size"):
        find(table)


def test_widths_of_one_size_are_sizes_of_their_own():
    table = World(widths=(32,), batches=WIDE, seeds=1).table(seed=0)
    other = World(widths=(32,), batches=WIDE, seeds=1, batch_crit=512.0).table(seed=1).assign(width=48)
    other["point"] = "o" + other["point"]
    together = find(pandas.concat([table, other], ignore_index=True))
    for width, alone in ((32, find(table)), (48, find(other))):
        mine = {n.name.removesuffix(f", width {width}"): n for n in together.numbers if n.name.endswith(f", width {width}")}
        assert mine.keys() == {n.name for n in alone.numbers}
        assert all(mine[n.name].value == pytest.approx(n.value) for n in alone.numbers if n.value is not None)
    assert len({n.name for n in together.numbers}) == len(together.numbers)
