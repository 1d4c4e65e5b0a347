"""Groups against runs of `train`, and against themselves when they are interrupted, extended, or broken."""

import fcntl
import json

import jax
import numpy as np
import pytest
from etils import epath
from sweeps import HORIZONS, planned, small_study

from scaling_jax import curves
from scaling_jax.data.corpus import open_run_data
from scaling_jax.sweep import grid, group
from scaling_jax.sweep.group import group_directory, run_group
from scaling_jax.sweep.population import Population
from scaling_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEYS = {"loss": "eval/heldout/loss", "loss_stderr": "eval/heldout/loss_se", "bits_per_byte": "eval/heldout/bits_per_byte",
        "noise_scale_tokens": "noise_scale_tokens"}  # fmt: skip


def record(directory, group_id):
    return json.loads((group_directory(directory, group_id) / "group.json").read_text())


def rows(directory, plan):
    """Of all groups, by trajectory and horizon, but for the time they took."""
    found = {}
    for group_id in plan.order:
        for tid, of_horizon in record(directory, group_id)["rows"].items():
            found[tid] = {int(h): {key: v for key, v in row.items() if key != "seconds"} for h, row in of_horizon.items()}
    return found


def curve(directory, group_id, leg="trunk"):
    pieces = list(curves.read(epath.Path(group_directory(directory, group_id) / leg / "curves")))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0] if name != "trajectories"}


class Ask:
    """Says stop when it was asked so many times."""

    def __init__(self, times):
        self.left = times

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module", params=["constant", "wsd", "cosine"])
def study(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    settings = {"decay_fraction": 0.2} if request.param == "wsd" else {}
    plan = planned(directory, small_study(settings=settings, schedule__name=request.param, schedule__warmup_tokens=256))
    for group_id in plan.order:
        assert run_group(directory, group_id) == ("done", None)
    return directory, plan


def test_every_horizon_is_what_a_run_of_that_budget_ends_with(study, tmp_path):
    directory, plan = study
    point_id = list(plan.points)[1]
    for horizon in HORIZONS[::2]:
        config = plan.config(point_id, horizon)
        summary = train(config, tmp_path / str(horizon))
        tid = point_id if config.schedule.name in ("constant", "wsd") else f"{point_id}-{horizon}"
        row = rows(directory, plan)[tid][horizon]
        for ours, theirs in KEYS.items():
            assert row[ours] == pytest.approx(summary[theirs], rel=1e-5), ours
        assert row["tokens"] == summary["tokens"] == horizon
        assert row["train_loss"] == pytest.approx(summary["train_loss"], rel=1e-5)


@pytest.mark.parametrize("times", [3, 11])
def test_a_group_that_is_stopped_goes_on_bit_for_bit(study, tmp_path, times):
    directory, plan = study
    base = small_study(settings={"decay_fraction": 0.2} if "wsd" in directory.name else {},
                       schedule__name=plan.base["schedule.name"], schedule__warmup_tokens=256)  # fmt: skip
    again = planned(tmp_path, base)
    assert again.groups == plan.groups
    for group_id in plan.order:
        states = []
        while not states or states[-1] == "stopped":
            states.append(run_group(tmp_path, group_id, Ask(times))[0])
        assert states[-1] == "done" and len(states) > 1 - (times == 11 and plan.groups[group_id]["horizons"][-1] < 2560)
        np.testing.assert_array_equal(curve(tmp_path, group_id)["loss_SxM"], curve(directory, group_id)["loss_SxM"])
    assert rows(tmp_path, again) == rows(directory, plan)


def test_a_group_that_is_done_is_not_trained_again(study, monkeypatch):
    directory, plan = study
    monkeypatch.setattr(group, "_population", lambda *_: pytest.fail("trained"))
    assert {run_group(directory, group_id)[0] for group_id in plan.order} == {"done"}


def steps_taken(monkeypatch):
    taken, step = [], Population.step
    monkeypatch.setattr(Population, "step", lambda self, state, *args: (taken.append(int(state.step[0])), step(self, state, *args))[1])
    return taken


def test_longer_horizons_go_on_from_the_last_and_shorter_ones_begin_anew(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    plan = planned(whole, small_study())
    run_group(whole, plan.order[0])
    planned(parts, small_study(horizons=HORIZONS[1:2]))
    taken = steps_taken(monkeypatch)
    for horizons, steps in ((HORIZONS[1:2], range(10)), (HORIZONS[1:], range(10, 20)), (HORIZONS, range(5))):
        taken.clear()
        extended = planned(parts, small_study(horizons=horizons))
        assert run_group(parts, extended.order[0])[0] == "done"
        assert taken[: len(steps)] == list(steps)
    assert rows(parts, extended) == rows(whole, plan)


def test_a_trajectory_that_diverges_is_rows_with_a_reason_and_the_others_go_on(tmp_path):
    lrs = [2.0**-6, 1e30]
    plan = planned(tmp_path, small_study(grid.over("optimizer.lr", lrs), optimizer__clip_norm=0.0, noise_scale__every=0))
    assert run_group(tmp_path, plan.order[0]) == ("done", None)
    sound, broken = rows(tmp_path, plan).values()
    assert [row["status"] for row in sound.values()] == ["finished"] * 3
    assert [row["status"] for row in broken.values()] == ["diverged"] * 3
    assert "loss or gradient not finite at" in broken[640]["reason"] and broken[2560]["tokens"] < 640
    seen = curve(tmp_path, plan.order[0])
    assert np.isfinite(seen["loss_SxM"][:, 0]).all() and len(seen["step_S"]) == 20
    assert np.isnan(seen["loss_SxM"][-1, 1])
    alone = tmp_path / "alone"
    only = planned(alone, small_study(grid.over("optimizer.lr", lrs[1:]), optimizer__clip_norm=0.0, noise_scale__every=0))
    assert run_group(alone, only.order[0]) == ("done", None)  # it does not train on once all have ended
    assert rows(alone, only)[list(only.points)[0]] == broken
    assert len(curve(alone, only.order[0])["step_S"]) < 5


def test_a_group_that_fails_says_why_and_is_tried_again(tmp_path, monkeypatch):
    plan = planned(tmp_path, small_study())

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    with monkeypatch.context() as patched:
        patched.setattr(Population, "step", full)
        state, reason = run_group(tmp_path, plan.order[0])
    assert state == "failed" and "out of memory; more config.train.accumulation" in reason
    assert record(tmp_path, plan.order[0])["reason"] == reason
    assert run_group(tmp_path, plan.order[0]) == ("done", None)
    assert record(tmp_path, plan.order[0])["reason"] is None


def test_one_process_at_a_time_has_a_group(tmp_path, monkeypatch):
    plan = planned(tmp_path, small_study())
    directory = group_directory(tmp_path, plan.order[0])
    directory.mkdir(parents=True)
    monkeypatch.setattr(group, "LOCK_SECONDS", 0.5)
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_group(tmp_path, plan.order[0]) == ("failed", f"{directory}: in use by another process")
        assert run_group(tmp_path, plan.order[0], lambda: True) == ("stopped", None)
    assert not (directory / "group.json").exists()


def test_a_directory_without_a_plan_is_named(tmp_path):
    state, reason = run_group(tmp_path, "abc")
    assert state == "failed" and f"{tmp_path}: has no plan here" in reason


def test_losses_that_rise_stop_a_point_early(tmp_path):
    """Two learning rates on so few data that the larger learns them by heart."""
    study = small_study(
        grid.over("optimizer.lr", [2.0**-11, 2.0**-5]),
        horizons=tuple(2560 * k for k in range(1, 9)),
        settings={"stop_after_rises": 2},
        data__train_tokens=128,
        data__repeat=True,
        noise_scale__every=0,
        checkpoint__every_tokens=0,
    )
    plan = planned(tmp_path, study)
    assert run_group(tmp_path, plan.order[0]) == ("done", None)
    patient, stopped = rows(tmp_path, plan).values()
    assert {row["status"] for row in patient.values()} == {"finished"}
    statuses = [row["status"] for row in stopped.values()]
    count = statuses.count("finished")
    losses = [row["loss"] for row in stopped.values() if row["status"] == "finished"]
    assert 3 <= count < 8 and statuses == ["finished"] * count + ["stopped_early"] * (8 - count)
    rises = np.diff(losses) > 0
    assert rises[-2:].all() and not (rises[:-1] & np.roll(rises, -1)[:-1])[:-1].any()


def test_a_horizon_that_ends_with_the_last_step_there_is_needs_no_other(tmp_path, monkeypatch):
    plan = planned(tmp_path, small_study(horizons=(600,), noise_scale__every=0))
    assert run_group(tmp_path, plan.order[0])[0] == "done"
    taken = steps_taken(monkeypatch)
    both = planned(tmp_path, small_study(horizons=(600, 630), noise_scale__every=0))
    assert run_group(tmp_path, both.order[0]) == ("done", None)
    assert not taken
    for row in rows(tmp_path, both).values():
        assert row[600] == row[630] and row[630]["tokens"] == 640


@pytest.mark.parametrize("name", ["constant", "wsd"])
def test_a_group_whose_record_is_deleted_is_trained_again(tmp_path, name):
    """Also where a trajectory had ended, which the record alone knows."""
    settings = {"decay_fraction": 0.2} if name == "wsd" else {}
    lrs, fields = [2.0**-6, 1e30], {"optimizer__clip_norm": 0.0, "noise_scale__every": 0, "schedule__name": name}
    plan = planned(tmp_path, small_study(grid.over("optimizer.lr", lrs), HORIZONS[:2], settings, **fields))
    assert run_group(tmp_path, plan.order[0])[0] == "done"
    before = rows(tmp_path, plan)
    (group_directory(tmp_path, plan.order[0]) / "group.json").unlink()
    assert run_group(tmp_path, plan.order[0])[0] == "done"
    assert rows(tmp_path, plan) == before


def test_rising_losses_stop_a_point_early_in_wsd_too_and_the_rest_of_its_horizons_with_it(tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 1.0, 1.1])  # what the decays end with, were they all trained
    evaluate = group.evaluate_members

    def planted(*args):
        loss = next(losses)
        return [found._replace(loss=found.loss._replace(value=loss)) for found in evaluate(*args)]

    monkeypatch.setattr(group, "evaluate_members", planted)
    settings = {"decay_fraction": 0.2, "stop_after_rises": 1}
    horizons = (640, 896, 1152, 1408, 1664)
    study = small_study(grid.over("optimizer.lr", [2.0**-8]), horizons, settings, schedule__name="wsd", noise_scale__every=0)
    plan = planned(tmp_path, study)
    assert run_group(tmp_path, plan.order[0]) == ("done", None)
    (found,) = rows(tmp_path, plan).values()
    assert [row["status"] for row in found.values()] == ["finished"] * 3 + ["stopped_early"] * 2
    assert next(losses) == 1.0  # not asked for


def test_a_course_that_is_begun_anew_and_killed_is_finished(tmp_path, monkeypatch):
    """An earlier horizon was added: its row comes first, and the rest of the course is owed still."""
    plan = planned(tmp_path, small_study(horizons=HORIZONS[1:], noise_scale__every=0))
    assert run_group(tmp_path, plan.order[0])[0] == "done"
    whole = curve(tmp_path, plan.order[0])
    more = planned(tmp_path, small_study(noise_scale__every=0))
    assert run_group(tmp_path, more.order[0], Ask(7))[0] == "stopped"
    assert run_group(tmp_path, more.order[0])[0] == "done"
    np.testing.assert_array_equal(curve(tmp_path, more.order[0])["loss_SxM"], whole["loss_SxM"])


def test_members_of_all_kinds_are_runs_of_their_own(tmp_path):
    """Two seeds, a further domain, noise in both metrics at every other step, horizons within a step."""
    other = open_run_data(small_study().base).domains["heldout"].directory
    study = small_study(
        grid.zip(grid.over("train.seed", [3, 4]), grid.over("optimizer.lr", [2.0**-7, 2.0**-6])),
        (600, 2500),
        noise_scale__every=2,
        noise_scale__preconditioned=True,
        data__eval_domains=(f"again={other}",),
    )
    plan = planned(tmp_path, study)
    (group_id,) = plan.order
    assert run_group(tmp_path, group_id) == ("done", None)
    *_, (point_id, found) = rows(tmp_path, plan).items()
    summary = train(plan.config(point_id, 2500), tmp_path / point_id)
    row = found[2500]
    assert row["tokens"] == summary["tokens"]
    prefixed = {f"{prefix}noise_scale_tokens{end}" for prefix in ("", "preconditioned_") for end in ("", "_low", "_high")}
    names = {name: name for name in prefixed} | {"loss": "eval/heldout/loss", "loss_again": "eval/again/loss",
                                                  "loss_again_stderr": "eval/again/loss_se"}  # fmt: skip
    for ours, theirs in names.items():
        expected = summary[theirs]
        if expected is not None:  # no interval yet
            expected = pytest.approx(expected, rel=2e-3 if "preconditioned" in ours else 1e-5)
        assert row[ours] == expected, ours
    assert row["loss_again"] == row["loss"]
    assert len(curve(tmp_path, group_id)["noise_tokens_K"]) == len(curve(tmp_path, group_id)["step_S"]) // 2  # all, while tokens are few


def test_stages_of_the_batch_are_those_of_a_run(tmp_path):
    study = small_study(horizons=(600, 2500), batch__schedule="stages", batch__stages=("1000=256",), noise_scale__every=0)
    plan = planned(tmp_path, study)
    assert run_group(tmp_path, plan.order[0]) == ("done", None)
    *_, (point_id, found) = rows(tmp_path, plan).items()
    summary = train(plan.config(point_id, 2500), tmp_path / point_id)
    assert found[2500]["tokens"] == summary["tokens"] == 1024 + 6 * 256
    assert found[2500]["loss"] == pytest.approx(summary["eval/heldout/loss"], rel=1e-5)
    assert len(curve(tmp_path, plan.order[0])["step_S"]) == summary["steps"] == 14
