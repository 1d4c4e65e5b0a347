"""B*(T) and the loss of a fixed batch: planted worlds come back, with intervals that know of the runs' common noise."""

import numpy as np
import pytest
from worlds import World

from scaling_jax.errors import UserError
from scaling_jax.laws.batch_optimum import find, find_regret, measure_batches

WORLD = World(seeds=1)


def test_planted_minima_come_back_within_their_errors():
    off = []
    for seed in range(6):
        points = measure_batches(WORLD.table(seed)).points
        assert len(points) == 12 and set(points["censored"]) == {""} and set(points["batches"]) == {6}
        off.append(np.log(points["batch_tokens"] / WORLD.best_batch(points["tokens"])) / points["batch_log_se"])
    assert 0.7 < np.concatenate(off).std() < 1.4  # 72, of 12 independent sets
    truth = WORLD.least_loss(points["tokens"], points["params"])
    assert np.abs(points["loss"] - truth).max() < 0.01


def test_the_law_holds_the_truth_though_horizons_share_runs():
    inside, values, errors = [], [], []
    for seed in range(30):
        fitted = find(WORLD.table(seed)).fits["batch_optimum"]
        truth = {"tokens_exponent": 0.45, "batch": WORLD.best_batch(dict(fitted.form.constants)["tokens0"])}
        inside += [fitted.intervals[name][0] < value < fitted.intervals[name][1] for name, value in truth.items()]
        values.append(fitted.values["tokens_exponent"])
        errors.append(fitted.se["tokens_exponent"])
    assert np.mean(inside) >= 0.85  # 60, in pairs
    assert 0.72 < np.mean(errors) / np.std(values) < 1.5  # points taken one by one: 0.6


def test_what_a_factor_of_two_costs():
    named = {number.name: number for number in find(World(run_sd=1e-5, row_sd=1e-5).table()).numbers}
    assert named["loss of a factor 2 in B, relative"].value == pytest.approx(0.004 * np.log(2) ** 2, rel=0.03)
    of_all = [named[f"loss of a factor 2 in B, relative{end}"] for end in (", least", "", ", most")]
    assert [(number.low, number.high) for number in of_all] == [(None, None)] * 3  # a range over cells is no interval
    assert of_all[0].value < of_all[1].value < of_all[2].value
    assert named["B* ∝ T^m"].value == pytest.approx(0.45, abs=0.01)


def test_a_best_batch_at_the_edge_is_a_bound():
    points = measure_batches(World(seeds=1, batch_best=50.0).table()).points
    assert set(points["censored"]) == {"low"} and set(points["batch_tokens"]) == {256.0}
    points = measure_batches(World(seeds=1, batch_best=50_000.0).table()).points
    assert set(points["censored"]) == {"high"} and set(points["batch_tokens"]) == {8192.0}
    with pytest.raises(UserError, match="size inside the grid: 12 at the highest batch size of their grid .*; try more batch sizes"):
        find(World(seeds=1, batch_best=50_000.0).table())


def test_bounds_are_of_batch_sizes():
    table = World(seeds=1, batch_best=300.0).table()
    for analysis in (find, find_regret):
        said = analysis(table).statements[0]
        assert "at the lowest batch size of their grid (bounds from above)" in said and "lr" not in said


def test_the_regret_of_a_fixed_batch():
    finding = find_regret(WORLD.table())
    points = finding.points
    assert len(points) == 72
    best = WORLD.best_lr(points["batch_tokens"], points["tokens"])
    at_best = [WORLD.loss(*row) for row in zip(points["batch_tokens"], points["tokens"], best, points["width"], strict=True)]
    truth = np.array(at_best) - WORLD.least_loss(points["tokens"], points["params"])
    assert np.mean((points["low"] < truth) & (truth < points["high"])) > 0.85
    assert np.abs(points["regret"] - truth).max() < 0.01 < 0.05 < truth.max()
    text = " ".join(finding.statements)
    first, last = (points[(points["batch_tokens"] == 256) & (points["tokens"] == at)]["regret"].mean() for at in (2**17, 2**22))
    assert f"B = 256 loses {first:.3g} at T = 1.31e+05 and {last:.3g} at T = 4.19e+06" in text


@pytest.mark.parametrize("analysis", [find, find_regret])
@pytest.mark.parametrize(
    ("world", "message"),
    [
        (World(batches=(512.0,), seeds=1), "best batch size needs at least 3 different batch_tokens; there is 1: 512"),
        (World(horizons=(2.0**19,), seeds=1), "best batch size needs at least 2 different tokens; there is 1: 524288"),
    ],
)
def test_one_batch_or_one_horizon(analysis, world, message):
    if analysis is find_regret:
        message = message.replace("best batch size", "regret of a fixed batch size")
    with pytest.raises(UserError) as caught:
        analysis(world.table())
    assert message in str(caught.value)
