"""B* beside B_crit by every definition: correlation, what is left of it beyond the trends, and the ratio."""

import numpy as np
import pandas
import pytest
from scipy import stats
from worlds import World

from scaling_jax.errors import UserError
from scaling_jax.laws.batch_critical import _compared, _said, correlation, critical_points, find
from scaling_jax.laws.batch_optimum import measure_batches
from scaling_jax.laws.finding import Number

# The noise scale grows as B* does: the ratio is one number.
WORLD = World(seeds=1, noise_exponent=0.45, noise_scale=7000.0)


def test_planted_ratio_and_correlation():
    finding = find(WORLD.table())
    named = {number.name: number for number in finding.numbers}
    ratio = named["B*/B_crit (noise)"]
    assert ratio.low - 0.01 < 0.2 < ratio.high + 0.01 and ratio.high / ratio.low < 1.3
    correlation = named["correlation of ln B* and ln B_crit (noise)"]
    assert 0.9 < correlation.low < correlation.value <= 1
    beyond = named["the same beyond the trends in T (noise)"]
    assert beyond.low < 0 < beyond.high  # planted: both are powers of T and nothing else
    said = [text for text in finding.statements if text.startswith("B* and B_crit by noise")]
    assert said[0].startswith("B* and B_crit by noise go together; B* is 0.") and "both grow with T, and no more is shown" in said[0]
    assert {"noise", "kink_surge"} <= set(finding.points["definition"])


def test_the_points_of_each_definition():
    table = WORLD.table()
    table["preconditioned_noise_scale_tokens"] = 5 * table["noise_scale_tokens"]
    frame = critical_points(table, measure_batches(table))
    noise, preconditioned = (frame[frame["definition"] == name] for name in ("noise", "preconditioned"))
    assert len(noise) == len(preconditioned) == 12
    truth = WORLD.true_noise_scale(noise["tokens"], None)
    assert np.abs(np.log(noise["batch_crit_tokens"] / truth)).max() < 0.15
    assert preconditioned["batch_crit_tokens"].to_numpy() == pytest.approx(5 * noise["batch_crit_tokens"].to_numpy())
    surge = frame[frame["definition"] == "kink_surge"]
    assert len(surge) == 12 and (surge["low"] < surge["batch_crit_tokens"]).all()
    assert np.median(np.abs(np.log(surge["batch_crit_tokens"] / WORLD.critical_batch(surge["tokens"])))) < 0.25


def test_correlation_is_the_textbooks():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 500))
    y = y + x
    test = stats.pearsonr(x, y)
    interval = test.confidence_interval(0.95)
    assert correlation(x, y) == pytest.approx((test.statistic, interval.low, interval.high), abs=2e-3)  # Fisher's, of many points
    assert correlation(x, np.ones(500)) == (None, None, None)
    assert correlation(x[:4], y[:4], 2)[1:] == (None, None) and None not in correlation(x[:5], y[:5], 2)


@pytest.mark.parametrize(("sizes", "horizons"), [(1, 5), (1, 6), (2, 5), (3, 8)])
def test_two_quantities_that_share_a_trend_only(sizes, horizons):
    """Beyond it no correlation is found, in 19 of 20 studies; sizes that have levels of their own make none either."""
    rng = np.random.default_rng(0)
    log_t, size = np.tile(np.arange(horizons) * np.log(2.0), sizes), np.repeat(np.arange(sizes), horizons)
    outside, studies = 0, 300
    for _ in range(studies):
        log_b, log_c = (slope * log_t - level * size + 0.1 * rng.normal(size=len(size)) for slope, level in ((0.45, 0.5), (0.6, 0.8)))
        columns = {
            "best_batch_tokens": np.exp(log_b),
            "batch_crit_tokens": np.exp(log_c),
            "tokens": np.exp(log_t),
            "params": size,
            "width": size,
        }
        beyond = _compared("x", pandas.DataFrame(columns), np.zeros((1, len(size))))[1]
        outside += beyond.low > 0 or beyond.high < 0
    assert 0.02 < outside / studies < 0.085


def test_the_ratio_has_the_noise_that_horizons_share():
    points = pandas.DataFrame(
        {"best_batch_tokens": 200.0, "batch_crit_tokens": 1000.0, "tokens": 2.0 ** np.arange(6), "params": 1, "width": 1}
    )
    alone = _compared("x", points, np.zeros((400, 6)))[2]
    shared = _compared("x", points, 0.1 * np.random.default_rng(0).normal(size=(400, 1)) + np.zeros(6))[2]
    assert (alone.low, alone.value, alone.high) == pytest.approx((0.2, 0.2, 0.2))
    assert np.log(shared.high / shared.low) == pytest.approx(2 * 0.196, rel=0.1)


def test_what_is_said_of_each_sign_beyond_the_trend():
    whole, ratio = Number("", 0.9, 0.8, 0.95), Number("", 0.2, 0.1, 0.3)
    said = {name: _said("noise", whole, Number("", 0.0, *ends), ratio) for name, ends in (("none", (-0.5, 0.5)), ("against", (-0.9, -0.2)))}
    said |= {"beyond": _said("noise", whole, Number("", 0.5, 0.2, 0.9), ratio), "few": _said("noise", whole, Number("", 0.5), ratio)}
    assert "both grow with T, and no more is shown" in said["none"]
    assert said["against"].endswith("taken out they go against each other.") and "no more is shown" not in said["against"]
    assert said["beyond"].endswith("B* is 0.2 of it.") and "too few to tell" in said["few"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (World(batches=(512.0,), seeds=1).table(), "critical batch size needs at least 3 different batch_tokens; there is 1: 512"),
        (World(horizons=(2.0**19,), seeds=1).table(), "comparing the best with the critical batch size"),
        (World(batches=(512.0, 1024.0, 2048.0), seeds=1).table().drop(columns="noise_scale_tokens"), "no noise_scale_tokens, and too few"),
    ],
)
def test_what_the_table_cannot_support(table, message):
    with pytest.raises(UserError) as caught:
        find(table)
    assert message in str(caught.value)
