"""The best learning rate from a grid: planted parabolas come back, their errors are the right size, and an edge is refused."""

import csv
import os
from pathlib import Path

import numpy as np
import pandas
import pytest
from worlds import World

from scaling_jax.errors import UserError
from scaling_jax.laws.critical_batch import kink_fit
from scaling_jax.laws.lr_optimum import find, lr_optima, lr_points, measure, minima

SHARED = Path(__file__).parents[1] / os.environ.get("SCALING_JAX_SHARED", "../shared")
GRID = 2.0 ** np.arange(-12, -5)


_NO_ENDS = (None, None, "", None, "", "")  # of a Number that is a count


def runs(best, batches=(1e5, 2e5, 4e5), error=0.0, rng=None, grid=GRID):
    """Loss 3 + 0.02·(ln lr − ln best)², `best` a function of the batch."""
    rng = rng or np.random.default_rng(0)
    return [
        {"batch_tokens": b, "lr": lr, "loss": 3 + 0.02 * np.log(lr / best(b)) ** 2 + error * rng.normal()} for b in batches for lr in grid
    ]


def planted(batch):
    return 1e-3 * (batch / 1e5) ** 0.5


@pytest.mark.parametrize("each_side", [1, 2])
def test_exact_parabolas(each_side):
    table = runs(planted)
    np.random.default_rng(1).shuffle(table)
    found = lr_optima(table, each_side)
    assert [row["batch_tokens"] for row in found] == [1e5, 2e5, 4e5]
    assert [row["lr"] for row in found] == pytest.approx([planted(b) for b in (1e5, 2e5, 4e5)], rel=1e-6)
    assert [row["loss"] for row in found] == pytest.approx([3.0] * 3)
    assert all("lr_se" not in row or row["lr_se"] < 1e-9 for row in found)


def test_standard_error_is_that_of_repeated_grids():
    rng = np.random.default_rng(2)
    tables = [lr_optima(runs(planted, error=2e-4, rng=rng)) for _ in range(300)]
    log_lr = np.log([[row["lr"] for row in found] for found in tables])
    se = np.array([[row["lr_se"] / row["lr"] for row in found] for found in tables])
    np.testing.assert_allclose(np.sqrt(np.mean(se**2, axis=0)), log_lr.std(axis=0), rtol=0.15)


def test_seeds_are_averaged_and_diverged_runs_left_out():
    table = runs(planted, batches=[1e5])
    seeds = [row | {"loss": row["loss"] + apart} for i, row in enumerate(table) for apart in (0.01 * i, -0.01 * i)]
    assert lr_optima(seeds)[0]["lr"] == pytest.approx(planted(1e5), rel=1e-6)
    diverged = [*table, {"batch_tokens": 1e5, "lr": 2.0**-5, "loss": None}, {"batch_tokens": 1e5, "lr": 2.0**-4, "loss": float("inf")}]
    assert lr_optima(diverged) == lr_optima(table)


def test_a_lopsided_valley_falls_back_to_three_points():
    """Beyond the minimum the loss leaps: through five points the parabola's minimum would leave the neighbours."""
    losses = [3.00, 2.99, 2.98, 6.0, 9.0]
    (found,) = lr_optima([{"batch_tokens": 1e5, "lr": 2.0**i, "loss": loss} for i, loss in enumerate(losses)])
    through_five = np.polynomial.Polynomial.fit(range(5), losses, 2).deriv().roots()[0]
    through_three = np.polynomial.Polynomial.fit(range(1, 4), losses[1:4], 2).deriv().roots()[0]
    assert through_five < 1 < through_three
    assert found["lr"] == pytest.approx(2**through_three)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (runs(lambda b: GRID[0]), "at batch_tokens 100000 its lowest loss is at lr 0.000244141, which two higher losses must enclose"),
        (runs(lambda b: 1.0), "its lowest loss is at lr 0.015625"),
        (runs(planted, grid=GRID[:2]), "two higher losses must enclose; lrs with a loss: 0.000244141, 0.000488281"),
        ([{"batch_tokens": 1e5, "lr": lr, "loss": 3.0} for lr in GRID], "two higher losses must enclose"),
        ([{"batch_tokens": 1e5, "lr": lr, "loss": None} for lr in GRID], "every run diverged"),
        ([row | {"loss": row["loss"] if row["lr"] <= 1e-3 else None} for row in runs(planted)], "its lowest loss is at lr 0.000976562"),
        ([{"batch_tokens": 1e5, "lr": 0.0, "loss": 3.0}], "row 1 of the table: lr is 0.0; it must be a positive number"),
        ([{"batch_tokens": 1e5, "lr": 0.1, "loss": "x"}], "row 1 of the table: loss is 'x'; it must be a number, or None"),
        ([{"batch_tokens": 1e5, "lr": 10**400, "loss": 3.0}], "; it must be a positive number"),
        ([{"batch_tokens": 1e5, "lr": 0.1, "loss": 3.0}, 3], "row 2 of the table is 3; it must be a dict of columns"),
        (None, "the table is None; it must be a list of dict rows"),
        ([{"lr": 0.1, "loss": 3.0}], "row 1 of the table has no batch_tokens; it has lr, loss"),
    ],
)
def test_no_minimum_inside(table, message):
    with pytest.raises(UserError) as caught:
        lr_optima(table)
    assert message in str(caught.value)


@pytest.mark.parametrize("each_side", [0, 1.5, "2", None])
def test_each_side_is_a_whole_number(each_side):
    with pytest.raises(UserError, match="each_side is .*; it must be an integer, 1 or more"):
        lr_optima(runs(planted), each_side)


def test_published_sweep_cannot_tell_the_forms_apart():
    """StepLaw's 16 sets of (N, D) with six batch sizes or more: a bend beats a pure power, and surge and plateau fit alike."""
    path = SHARED / "data" / "steplaw" / "dense_lr_bs_loss.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    cells = {}
    for row in csv.DictReader(path.open()):
        table = cells.setdefault((row["N"], row["D"]), {}).setdefault(float(row["bs"]) * 2048, [])
        table.append({"batch_tokens": float(row["bs"]) * 2048, "lr": float(row["lr"]), "loss": float(row["smooth loss"])})
    rms = {form: [] for form in ("surge", "plateau", "power")}
    for cell in cells.values():
        optima = []
        for runs_of_batch in cell.values():
            try:
                optima += lr_optima(runs_of_batch)
            except UserError:  # the minimum is at the grid's edge
                continue
        if len(optima) >= 6:
            optima = [{key: row[key] for key in ("batch_tokens", "lr")} for row in optima]
            for form, values in rms.items():
                values.append(kink_fit(optima, form).rms)
    assert len(rms["surge"]) == 16
    total = {form: float(np.sqrt(np.mean(np.square(values)))) for form, values in rms.items()}
    assert total["surge"] == pytest.approx(total["plateau"], rel=0.15)
    assert max(total["surge"], total["plateau"]) < total["power"]


# ------------------------------------------------------------------------------------------------------------------- of a study's table


def test_planted_minima_come_back_within_their_errors():
    worlds = [(World(form=form), seed) for form in ("surge", "plateau", "power") for seed in range(2)]
    off = []
    for world, seed in worlds:
        points = lr_points(world.table(seed))
        assert len(points) == 2 * 6 * 6 and set(points["censored"]) == {""} and set(points["runs"]) == {18}
        truth = world.best_lr(points["batch_tokens"], points["tokens"])
        off.append(np.log(points["lr"] / truth) / points["lr_log_se"])
        curvature = world.curvature(points["tokens"]) * world.loss(points["batch_tokens"], points["tokens"], truth, 32)
        narrow = points["width"] == 32
        assert np.median((points["curvature"] / curvature)[narrow]) == pytest.approx(1, rel=0.05)
    assert 0.8 < np.concatenate(off).std() < 1.25  # 432 of them, of 72 independent sets


@pytest.mark.parametrize(
    ("world", "side", "beside"),
    [
        (World(grid_off=8.0, diverge=1e3), "low", False),
        (World(grid_off=1 / 8), "high", False),
        (World(diverge=0.75, lrs_each=13), "high", True),  # the best lr is not stable
        (World(lrs_each=2), "too few", False),
    ],
)
def test_a_minimum_at_the_edge_is_a_bound_and_counted(world, side, beside):
    table = world.table()
    points = lr_points(table)
    assert set(points["censored"]) == {side} and points[["lr_log_se", "curvature"]].isna().all(axis=None)
    truth = world.best_lr(points["batch_tokens"], points["tokens"])
    if side == "low":
        assert (points["lr"] > truth / 2**0.25).all()  # within half a step of the grid
    if side == "high":
        assert (points["lr"] < truth * 2**0.25).all()
        assert points["beside_divergence"].all() == beside
    for analysis in (minima, find):
        if analysis is find and side != "too few":  # bounds are shown
            assert find(table).numbers[:2] == [("minima inside their grid", 0.0, *_NO_ENDS), ("censored minima", 72.0, *_NO_ENDS)]
            continue
        with pytest.raises(UserError, match=f"between two higher ones: 72 {'with fewer' if side == 'too few' else 'at the'}"):
            analysis(table)


def test_draws_move_the_horizons_of_a_run_together():
    """Of the slope of ln η* in ln T at one size and batch size: 95% intervals, in 4 studies of 12 each."""
    world, inside = World(), []
    for seed in range(4):
        optima = measure(world.table(seed))
        assert 0.6 < optima.shared < 1  # planted: 1e-3² of 1e-3² + 3e-4²
        drawn = optima.draws(seed=seed)["log_lr"]
        for (_, batch), cell in optima.points.groupby(["width", "batch_tokens"]):
            x = np.log(cell["tokens"].to_numpy()) - np.log(cell["tokens"]).mean()
            weights = x / (x @ x)
            truth = weights @ np.log(world.best_lr(batch, cell["tokens"].to_numpy()))
            low, high = np.percentile(drawn[:, cell.index] @ weights, [2.5, 97.5])
            inside.append(low < truth < high)
    assert 0.83 < np.mean(inside) <= 1


def test_draws_of_the_horizons_of_a_run_go_together():
    """And those of independent ones, as of a linear decay where each horizon is a run, do not."""
    for world, together in ((World(row_sd=1e-5), True), (World(run_sd=0.0, row_sd=1e-3), False)):
        optima = measure(world.table())
        assert optima.shared > 0.75 if together else optima.shared < 0.15
        drawn = optima.draws()["log_lr"]
        cells = optima.points
        horizons = cells.index[(cells["width"] == 64) & (cells["batch_tokens"] == 4096)]
        near, far = np.corrcoef(drawn[:, horizons].T)[0, 1], np.corrcoef(drawn[:, [horizons[0], cells.index[0]]].T)[0, 1]
        assert near > 0.5 if together else abs(near) < 0.25
        assert abs(far) < 0.2  # another size and batch: other runs


def test_an_lr_where_one_seed_diverged_counts_as_diverged():
    table = World(seeds=2, widths=(32,), batches=(1024.0,), horizons=(2.0**19,), diverge=1e3).table()
    whole = lr_points(table).iloc[0]
    above = table["lr"] == table["lr"][table["lr"] > whole["lr"]].min()
    table.loc[above & (table["seed"] == 1), ["status", "loss"]] = ["diverged", np.nan]
    cell = measure(table).cells[0]
    assert table["lr"][above].iloc[0] in cell.diverged and table["lr"][above].iloc[0] not in cell.lr
    assert (len(cell.lr), len(cell.diverged)) == (8, 1)


def test_settings_that_differ_make_cells_of_their_own():
    first, second = World(widths=(32,)).table(), World(widths=(32,), lr_crit=0.024).table(1)
    both = pandas.concat([first, second.assign(weight_decay=0.1, point="decayed-" + second["point"])], ignore_index=True)
    points = lr_points(both)
    assert len(points) == 2 * 36
    medians = points.groupby("weight_decay")["lr"].median()
    assert medians[0.1] / medians[0.0] == pytest.approx(2, rel=0.05)
    with pytest.raises(UserError, match="weight_decay differ at the same size, batch_tokens and tokens"):
        minima(both)


def test_bounds_beside_minima_are_counted():
    half = [World(seeds=1, widths=(32,), grid_off=off, diverge=1e3).table() for off in (1.0, 8.0)]
    half[1]["width"], half[1]["params"], half[1]["point"] = 64, 98304, "64-" + half[1]["point"]
    finding = find(pandas.concat(half, ignore_index=True))
    numbers = {number.name: number.value for number in finding.numbers}
    assert (numbers["minima inside their grid"], numbers["censored minima"]) == (36, 36)
    assert "36 at the lowest lr of their grid" in finding.statements[0]


@pytest.mark.parametrize("early", [False, True])
def test_settings_that_go_with_the_horizon_or_the_size_are_said(early):
    table = World(seeds=1).table()
    apart = table["horizon_tokens"] < 2**19 if early else table["width"] == 32
    finding = find(table.assign(schedule=np.where(apart, "cosine", "wsd")))
    said = [text for text in finding.statements if text.startswith("schedule is not the same throughout (cosine, wsd)")]
    assert len(said) == 1 and f"goes with {'tokens' if early else 'params and width'}: its effect" in said[0]
    twice = pandas.concat([table.assign(schedule="wsd"), table.assign(schedule="cosine", point="c" + table["point"])], ignore_index=True)
    for other in (table, twice):  # of `twice` each has cells of its own
        assert not any("not the same throughout" in text for text in find(other).statements)


def test_how_a_run_was_carried_out_is_no_setting():
    """Accumulation does not change what a step is: cells are not taken apart by it, and nothing is said of it."""
    table = World(seeds=2, widths=(32,), batches=(512.0, 2048.0)).table()
    plain, apart = find(table), find(table.assign(**{"train.accumulation": table["seed"] + 1}))
    assert len(apart.points) == len(plain.points) == 12
    along = find(table.assign(**{"train.accumulation": np.where(table["batch_tokens"] > 1000, 2, 1)}))
    assert along.statements == plain.statements
    other = find(table.assign(**{"model.mlp_ratio": table["seed"] + 1.0}))
    assert len(other.points) == 24


def test_nullable_columns_and_rows_without_a_horizon():
    table = World(seeds=1, widths=(32,), batches=(512.0, 2048.0)).table()
    table["status"] = table["status"].astype("string")
    nullable = table.convert_dtypes()
    nullable.loc[3, "horizon_tokens"] = pandas.NA
    nullable.loc[4, "lr"] = pandas.NA
    found, whole = measure(nullable), measure(table.drop(index=[3, 4]))
    assert found.incomplete == 2 and whole.incomplete == 0
    assert "2 rows have no batch_tokens, lr or horizon, and are left out." in find(nullable).statements
    for name in ("lr", "loss", "tokens", "batch_tokens"):
        np.testing.assert_array_equal(found.points[name].to_numpy(float), whole.points[name].to_numpy(float))


def test_published_sweep_has_157_minima_inside_its_grids():
    path = SHARED / "data" / "steplaw" / "dense_lr_bs_loss.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    points = lr_points(steplaw(path))
    assert (points["censored"] == "").sum() == 157
    assert points["width"].isna().all()


def steplaw(path):
    from scaling_jax import results

    table = results.load(path, columns={"params": "N", "tokens": "D", "loss": "smooth loss"})
    return table.assign(batch_tokens=table["bs"].astype(float) * 2048)
