"""What a wrong learning rate costs: the mean of a planted parabola, diverged runs as L_init, and power laws in T and N."""

import numpy as np
import pandas
import pytest
from worlds import World

from scaling_jax.errors import UserError
from scaling_jax.laws.lr_optimum import measure
from scaling_jax.laws.sensitivity import _mean_excess, find, sensitivity_points

EXACT = {"run_sd": 1e-6, "row_sd": 1e-6, "seeds": 1}
WIDE = {"lrs_each": 13, "diverge": 1e3}  # a factor 64


def cell_of(losses, lowest=None, diverged=()):
    """The cell of one grid, steps of √2 from √2^lowest on, about 1 by default."""
    lr = np.sqrt(2.0) ** (np.arange(len(losses)) - (len(losses) // 2 if lowest is None else -lowest))
    rows = [{"batch_tokens": 1.0, "tokens": 1.0, "lr": at, "loss": loss, "status": "finished"} for at, loss in zip(lr, losses, strict=True)]
    rows += [{"batch_tokens": 1.0, "tokens": 1.0, "lr": at, "loss": np.nan, "status": "diverged"} for at in diverged]
    return measure(pandas.DataFrame(rows)).cells[0], lr


def test_mean_of_a_parabola_over_the_range():
    lr = np.sqrt(2.0) ** np.arange(-5, 6)
    cell, _ = cell_of(3 + 0.05 * np.log(lr) ** 2)
    for span in (16.0, 4.0):
        half = np.log(span) / 2
        exact = 0.05 * half**2 / 3
        steps = 0.05 * np.log(2) ** 2 / 4 / 6  # by which linear interpolation is above, on average
        assert _mean_excess(cell, span, None) == pytest.approx(exact + steps, rel=0.01)
    assert np.isnan(_mean_excess(cell, 64.0, None))  # the grid ends before
    capped = _mean_excess(cell, 16.0, 3.01)
    x = np.linspace(-np.log(4), np.log(4), 100_001)
    assert capped == pytest.approx(np.minimum(0.05 * x**2, 0.01).mean(), rel=0.05)


def test_a_diverged_run_counts_as_the_loss_before_training():
    losses = [3.5, 3.4, 3.3, 3.2, 3.1, 3.05, 3.0, 3.05, 3.1]
    diverged = [2.0 ** (k / 2) for k in (3, 4, 5)]
    cell, lr = cell_of(losses, lowest=-6, diverged=diverged)
    value, at = _mean_excess(cell, 16.0, 5.0), np.log(cell.valley.lr)
    x = at + np.log(16) * ((np.arange(128) + 0.5) / 128 - 0.5)
    expected = np.interp(x, np.log([*lr, *diverged]), [*losses, 5.0, 5.0, 5.0])
    assert (expected > 4.9).mean() > 0.1
    assert value == pytest.approx(np.mean(expected) - cell.valley.loss, rel=1e-9)
    assert np.isnan(_mean_excess(cell, 16.0, None))  # no vocab_size: unknown
    assert np.isnan(_mean_excess(cell, 256.0, 5.0))  # the grid ends before, below


def test_the_range_is_the_widest_that_half_of_the_grids_cover():
    assert sensitivity_points(World(**EXACT, **WIDE).table())[1] == 16
    points, span = sensitivity_points(World(**EXACT).table())
    assert span == 8 and points["censored"].mean() <= 0.5
    assert points["sensitivity"].isna().eq(points["censored"]).all()
    assert sensitivity_points(World(**EXACT, lrs_each=5).table())[1] < 8


def test_planted_power_laws():
    world = World(seeds=1, lrs_each=13, diverge=1e3)
    finding = find(world.table())
    points = finding.points
    truth = world.curvature(points["tokens"]) * world.least_loss(points["tokens"], points["params"])
    assert np.median(points["curvature"] / truth) == pytest.approx(1, abs=0.05)
    logs = [np.ones(len(truth)), np.log(points["tokens"]), np.log(points["params"])]
    plane = np.linalg.lstsq(np.stack(logs, axis=1), np.log(truth), rcond=None)[0]
    for name in ("curvature", "sensitivity"):
        fitted = finding.fits[name]
        for parameter, exponent in (("tokens_exponent", plane[1]), ("params_exponent", plane[2])):
            low, high = fitted.intervals[parameter]
            assert low - 0.03 < exponent < high + 0.03, (name, parameter)
        assert f"The {name} falls with the horizon." in finding.statements
    named = {number.name: number for number in finding.numbers}
    assert 0.5 * 0.06 * np.log(2) ** 2 == pytest.approx(named["loss of a factor 2 in η, relative"].value, rel=0.1)
    number = named["loss of a factor 2 in η, relative"]
    assert (number.low, number.high) == (None, None) and number.note.startswith("median over cells, which have 0.0")
    assert "from η*/4 to 4·η*, a factor 16" in finding.statements[-1] and "diverged" not in finding.statements[-1]


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (
            World(horizons=(2.0**19,), seeds=1),
            "sensitivity to the learning rate needs at least 2 different tokens; there is 1",
        ),
        (World(batches=(512.0,), seeds=1), "its 12 points come from 2 independent runs; at least 3"),
        (World(grid_off=10.0, diverge=1e3, seeds=1), "none of 72 cells has its lowest loss between two higher ones"),
    ],
)
def test_what_the_table_cannot_support(world, message):
    with pytest.raises(UserError) as caught:
        find(world.table())
    assert message in str(caught.value)
