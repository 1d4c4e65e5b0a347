"""StepLaw, DeepSeek and Bjorck: planted pairs come back, and StepLaw's public grids give its figures."""

import os
from pathlib import Path

import numpy as np
import pandas
import pytest
from worlds import World

from scaling_jax import results
from scaling_jax.errors import UserError
from scaling_jax.laws.other_laws import find_bjorck, find_deepseek, find_steplaw, joint_optima

SHARED = Path(__file__).parents[1] / os.environ.get("SCALING_JAX_SHARED", "../shared")
SIZES = (2e8, 4e8, 8e8)


def grids(lr_of, batch_of, noise=0.0, sizes=SIZES, per_size=(20, 60, 180, 540), reach=3.5, seed=0):
    """Grids in steps of √2 and 2 about each planted pair, with a loss that is quadratic in both, and tilted."""
    rng, rows = np.random.default_rng(seed), []
    for params in sizes:
        for tokens in params * np.array(per_size, float):
            lr, batch = lr_of(params, tokens), batch_of(params, tokens)
            for i in np.arange(-reach, reach + 1):
                for j in np.arange(-reach, reach + 1):
                    x, z = 0.5 * np.log(2) * (i + 0.2), np.log(2) * (j - 0.3)
                    loss = 2.5 * np.exp(0.02 * x**2 + 0.005 * z**2 - 0.006 * x * z + noise * rng.normal())
                    row = {"params": params, "tokens": tokens, "lr": lr * np.exp(x), "batch_tokens": batch * np.exp(z), "loss": loss}
                    rows.append(row | {"flops": 6 * params * tokens})
    return pandas.DataFrame(rows)


def lr_of(params, tokens):
    return 1.79 * params**-0.713 * tokens**0.307


def batch_of(params, tokens):
    return 0.58 * tokens**0.571


def test_the_best_pair_of_a_tilted_valley():
    found = joint_optima(grids(lr_of, batch_of)).points
    assert len(found) == 12 and not found["censored"].any()
    assert found["lr"].to_numpy() == pytest.approx(lr_of(found["params"], found["tokens"]).to_numpy(), rel=0.002)
    assert found["batch_tokens"].to_numpy() == pytest.approx(batch_of(found["params"], found["tokens"]).to_numpy(), rel=0.01)
    assert found["loss"].to_numpy() == pytest.approx(np.full(12, 2.5), abs=1e-4)


def test_an_optimum_beyond_the_grid_is_censored():
    table = grids(lr_of, batch_of, sizes=SIZES[:1])
    for name, best in (("lr", lr_of), ("batch_tokens", batch_of)):
        found = joint_optima(table[table[name] > 1.05 * best(table["params"], table["tokens"])]).points
        assert found["censored"].all() and set(found["why"]) == {"the minimum lies outside of the cells near the lowest loss"}
    table = table[table["lr"] > 1.05 * lr_of(table["params"], table["tokens"])]
    with pytest.raises(UserError, match="StepLaw needs at least 3 points; there are 0"):
        find_steplaw(table)


def test_planted_steplaw():
    finding = find_steplaw(grids(lr_of, batch_of, noise=5e-4))
    lr, batch = finding.fits["steplaw_lr"], finding.fits["steplaw_batch"]
    assert [lr.values["params_exponent"], lr.values["tokens_exponent"]] == pytest.approx([-0.713, 0.307], abs=0.03)
    assert batch.values["tokens_exponent"] == pytest.approx(0.571, abs=0.03)
    assert [p.published for fitted in (lr, batch) for p in fitted.form.parameters] == [1.79, -0.713, 0.307, 0.58, 0.571]
    assert finding.numbers == []  # they would be the fits' parameters once more
    assert "12 of 12 sizes and budgets have their best pair inside the grid" in finding.statements[0]


def test_planted_deepseek():
    def by_compute(c, exponent):
        return lambda params, tokens: c * (6 * params * tokens) ** exponent

    finding = find_deepseek(grids(by_compute(0.3118, -0.125), by_compute(0.292, 0.3271), noise=2e-4))
    for name, scale, truth in (("deepseek_lr", "lr", (0.3118, -0.125)), ("deepseek_batch", "batch", (0.292, 0.3271))):
        fitted = finding.fits[name]
        assert fitted.values["flops_exponent"] == pytest.approx(truth[1], abs=0.01)
        assert np.log(fitted.values[scale] / truth[0]) == pytest.approx(0, abs=0.5)  # at one FLOP, 18 decades away
        assert fitted.form.parameters[0].published == truth[0]


def test_planted_bjorck_at_one_batch_size():
    table = grids(lambda n, d: 90 * n**-0.23 * d**-0.32, lambda n, d: 2.0**20 * np.exp(0.3 * np.log(2)), reach=3)
    finding = find_bjorck(table)
    fitted = finding.fits["bjorck"]
    assert [fitted.values["params_exponent"], fitted.values["tokens_exponent"]] == pytest.approx([-0.23, -0.32], abs=0.02)
    assert fitted.points == 12 and (~finding.points["censored"]).sum() == 12
    with pytest.raises(UserError, match="Bjorck's law needs at least 4 points; there are 2"):
        find_bjorck(table[(table["params"] == 2e8) & (table["tokens"] < 2e10)])


def test_seeds_are_averaged_and_an_lr_that_diverged_in_one_is_left_out():
    table = grids(lr_of, batch_of, sizes=SIZES[:1], per_size=(20,))
    apart = np.where(np.random.default_rng(0).random(len(table)) < 0.5, 0.02, -0.02)
    seeds = pandas.concat([table.assign(seed=0, loss=table["loss"] + apart), table.assign(seed=1, loss=table["loss"] - apart)])
    whole, averaged = joint_optima(table).points, joint_optima(seeds).points
    for name in ("lr", "batch_tokens", "loss"):
        assert averaged[name].to_numpy() == pytest.approx(whole[name].to_numpy(), rel=1e-9)
    lost = table[table["lr"] == table["lr"].max()].assign(seed=2, status="diverged", loss=np.nan)
    both = joint_optima(pandas.concat([table.assign(seed=0, status="finished"), lost])).points
    without = joint_optima(table[table["lr"] < table["lr"].max()]).points
    assert both["loss"].to_numpy() == pytest.approx(without["loss"].to_numpy(), rel=1e-12)


@pytest.mark.parametrize("analysis", [find_steplaw, find_deepseek])
@pytest.mark.parametrize("setting", ["parametrization", "schedule", "width"])
def test_settings_that_differ_are_not_averaged(analysis, setting):
    values = {"parametrization": ("mup", "standard"), "schedule": ("wsd", "cosine"), "width": (32, 64)}[setting]
    table = grids(lr_of, batch_of)
    both = pandas.concat([table.assign(**{setting: values[0]}), table.assign(**{setting: values[1]}, lr=2 * table["lr"])])
    with pytest.raises(UserError, match=f"^{setting} differ at the same size, batch_tokens and tokens; one setting at a time"):
        analysis(both)


def test_draws_are_the_scatter_of_repeated_studies():
    """Of ln η* and ln B* of single pairs, whose noise is each horizon's own."""
    small = {"sizes": SIZES[:1], "per_size": (20, 60), "noise": 1e-3}
    found = [joint_optima(grids(lr_of, batch_of, seed=seed, **small), resamples=200) for seed in range(60)]
    for name, draws in (("lr", "log_lr"), ("batch_tokens", "log_batch")):
        scatter = np.log([one.points[name] for one in found]).std(axis=0)
        drawn = np.mean([getattr(one, draws).std(axis=0) for one in found], axis=0)
        np.testing.assert_allclose(drawn, scatter, rtol=0.3)


def test_intervals_hold_though_horizons_share_runs():
    """Taken for independent, the horizons of three sizes cover the exponents of N in half and in three of four studies."""
    shared = {"widths": (32, 64, 128), "seeds": 1, "run_sd": 3e-3, "batches": tuple(2.0**k for k in (8, 9.5, 11, 12.5, 14))}
    world = World(parametrization="standard", lr_params_exponent=-0.4, form="power", lr_tokens_exponent=-0.2, **shared)
    truth = {"params_exponent": -0.4, "tokens_exponent": -0.2 + 0.4 * 0.45}
    inside: dict[str, list[bool]] = {"steplaw": [], "bjorck": []}
    for seed in range(5):
        table = world.table(seed)
        steplaw, bjorck = find_steplaw(table).fits["steplaw_lr"].intervals, find_bjorck(table).fits["bjorck"].intervals
        inside["steplaw"] += [steplaw[name][0] < value < steplaw[name][1] for name, value in truth.items()]
        inside["bjorck"] += [bjorck[name][0] < at < bjorck[name][1] for name, at in (("params_exponent", -0.4), ("tokens_exponent", -0.2))]
    assert min(np.mean(found) for found in inside.values()) > 0.85


def test_where_the_noise_of_shared_runs_is_unknown_there_is_no_interval():
    """Grids of three lrs: no parabola leaves a residual."""
    world = World(seeds=1, widths=(32,), lrs_each=3, batches=(512.0,), run_sd=1e-5, row_sd=1e-5, form="power", lr_tokens_exponent=-0.01)
    table = world.table()
    fitted = find_bjorck(table.assign(schedule="constant")).fits["bjorck"]
    assert set(fitted.intervals.values()) == {(None, None)} and "of the same runs" in fitted.unidentified["tokens_exponent"]
    alone = find_bjorck(table.assign(schedule="cosine")).fits["bjorck"]
    assert None not in alone.intervals["tokens_exponent"] and alone.identified


def test_bjorck_takes_the_middle_of_the_batch_sizes_that_tie():
    finding = find_bjorck(World(seeds=1, batches=(256.0, 1024.0, 4096.0)).table())
    assert "At one batch size, 1024 tokens, the middle one of 3 that have 12 minima each, the most" in finding.statements[0]
    assert set(finding.points[~finding.points["censored"]]["batch_tokens"]) == {1024.0}


def test_published_sweep():
    """StepLaw's 17 grids: B* ∝ D^0.57 and η* ∝ N^−0.70 D^0.21, as an independent analysis found them by such quadratics."""
    path = SHARED / "data" / "steplaw" / "dense_lr_bs_loss.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    table = results.load(path, columns={"params": "N", "tokens": "D", "loss": "smooth loss"})
    finding = find_steplaw(table.assign(batch_tokens=table["bs"].astype(float) * 2048))
    assert len(finding.points) == 17 and not finding.points["censored"].any()
    lr, batch = finding.fits["steplaw_lr"], finding.fits["steplaw_batch"]
    assert batch.values["tokens_exponent"] == pytest.approx(0.57, abs=0.06)
    assert [lr.values["params_exponent"], lr.values["tokens_exponent"]] == pytest.approx([-0.70, 0.21], abs=0.06)
    for fitted, parameter, published in ((lr, "params_exponent", -0.713), (batch, "tokens_exponent", 0.571)):
        low, high = fitted.intervals[parameter]
        assert low < published < high
