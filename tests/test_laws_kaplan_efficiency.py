"""Tokens to the same loss by size: planted powers come back, and the interval knows that a run's losses share its noise."""

import itertools

import numpy as np
import pandas
import pytest

from scaling_jax.errors import UserError
from scaling_jax.laws.frontier import prepared
from scaling_jax.laws.kaplan_curves import student
from scaling_jax.laws.kaplan_efficiency import common_slope, efficiency, equal_losses

SIZES, HORIZONS = 1e4 * 4.0 ** np.arange(5), 2.0 ** np.arange(14, 26)


def planted(power, sizes=SIZES, batches=(1024,), noise=0.0, seed=0, horizons=HORIZONS, lrs=(1.0, 2.0)):
    """L falls as (tokens·(N/1e4)^-power)^-0.1, so tokens to any loss go as N^power; `noise` is of a run's ln tokens."""
    rng, rows = np.random.default_rng(seed), []
    for n, batch, lr in itertools.product(sizes, batches, lrs):
        late = np.exp(noise * rng.normal()) * (n / 1e4) ** power
        for tokens in horizons:
            loss = 10 * (tokens / 2**14 / late) ** -0.1 * (1 + 0.05 * (lr - 1)) * (1 + batch / 1e5)
            rows.append({"params": n, "tokens": tokens, "batch_tokens": batch, "lr": lr, "loss": loss, "point": f"{n}-{batch}-{lr}"})
    return pandas.DataFrame(rows)


@pytest.mark.parametrize("power", [-0.4, 0.3])
def test_a_planted_power_comes_back(power):
    finding = efficiency(planted(power, batches=(512, 1024)))
    slope, ratio = finding.numbers
    assert (slope.value, slope.low, slope.high) == pytest.approx((power,) * 3, abs=1e-3)  # between horizons ln L is taken for a line
    assert ratio.value == pytest.approx(256.0**-power, rel=1e-2)
    assert ratio.name == "tokens of N = 1e+04 over those of N = 2.56e+06"
    assert any(f"larger models need {'fewer' if power < 0 else 'more'} tokens" in sentence for sentence in finding.statements)
    np.testing.assert_allclose(finding.points["steps"], finding.points["tokens"] / finding.points["batch_tokens"])


def test_levels_are_losses_that_three_sizes_pass():
    points = equal_losses(prepared(planted(-0.4), ("batch_tokens",)))
    for _, level in points.groupby("level"):
        assert len(level) >= 3 and level["loss"].nunique() == level["batch_tokens"].nunique() == 1
        truth = 2**14 * (level["params"] / 1e4) ** -0.4 * (level["loss"] / (10 * (1 + 1024 / 1e5))) ** -10
        np.testing.assert_allclose(level["tokens"], truth, rtol=1e-2)  # the loss between horizons is not quite a line
    assert points["level"].nunique() == 6


def test_no_dependence_is_not_taken_for_one():
    finding = efficiency(planted(0.0, noise=0.1, seed=3))
    slope, ratio = finding.numbers
    assert slope.low < 0 < slope.high and ratio.low < 1 < ratio.high
    assert any("cannot be told from 5 sizes" in sentence for sentence in finding.statements)


@pytest.mark.parametrize("sizes", [3, 5, 8])
def test_the_interval_holds_the_slope_when_a_run_shares_its_noise(sizes):
    """Of 400 simulated studies of 6 levels, most of whose noise all levels share. Were each level taken for a measurement, half would."""
    rng, held, log_n = np.random.default_rng(sizes), [], np.repeat(np.arange(sizes) * np.log(4.0), 6)
    for _ in range(400):
        noise = 0.1 * np.repeat(rng.normal(size=sizes), 6) + 0.03 * rng.normal(size=6 * sizes)
        points = pandas.DataFrame({"params": np.exp(log_n), "tokens": np.exp(-0.3 * log_n + noise), "level": np.tile(np.arange(6), sizes)})
        value, error, _ = common_slope(points)
        held.append(abs(value + 0.3) <= student(sizes - 2) * error)
    assert 0.92 <= np.mean(held) <= 0.999


def test_the_ratio_is_between_the_sizes_that_reach_the_loss():
    """The largest stops before the others get so low, and the smallest is never that low."""
    table = planted(-0.4)
    table = table[(table["params"] < 2e6) | (table["tokens"] < 2**17)].reset_index(drop=True)
    finding = efficiency(table)
    assert any("levels some sizes are missing" in sentence for sentence in finding.statements)
    _, ratio = finding.numbers
    level = finding.points.groupby("level")["params"].agg(lambda n: n.max() / n.min())
    assert ratio.value == pytest.approx(level.max() ** 0.4, rel=1e-2)


def test_too_little_is_said_in_one_sentence():
    with pytest.raises(UserError, match="sample efficiency needs at least 3 different params"):
        efficiency(planted(-0.4, sizes=SIZES[:2]))
    with pytest.raises(UserError, match="sample efficiency needs a loss that 3 sizes or more pass"):
        efficiency(planted(-0.4, horizons=HORIZONS[:1]))
    apart = planted(-0.4).assign(batch_tokens=lambda rows: rows["params"])
    with pytest.raises(UserError, match="at one batch size; there is none"):
        efficiency(apart)
