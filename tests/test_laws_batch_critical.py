"""B* beside B_crit by every definition: correlation, what is left of it beyond the trends, and the ratio."""

import numpy as np
import pytest
from worlds import World

from scaling_jax.errors import UserError
from scaling_jax.laws.batch_critical import _correlation, _detrended, critical_points, find
from scaling_jax.laws.batch_optimum import measure_batches

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


def test_weighted_correlation_is_the_textbooks():
    rng = np.random.default_rng(0)
    x, y, t = rng.normal(size=(3, 50))
    y = y + x
    assert _correlation(x, y, np.ones((1, 50)))[0] == pytest.approx(np.corrcoef(x, y)[0, 1])
    weights = rng.integers(1, 4, 50)
    assert _correlation(x, y, weights[None].astype(float))[0] == pytest.approx(
        np.corrcoef(np.repeat(x, weights), np.repeat(y, weights))[0, 1]
    )
    assert np.isnan(_correlation(x, np.ones(50), np.ones((1, 50)))[0])
    left = _detrended(3 + 2 * t + x, t)
    assert left @ t == pytest.approx(0, abs=1e-9) and left.sum() == pytest.approx(0, abs=1e-9)


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
