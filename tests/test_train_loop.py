"""A run end to end: what it writes, when it evaluates and saves, how it continues."""

import json

import numpy as np
import pytest
from helpers import Trainers, small_config

from scaling_jax.errors import UserError
from scaling_jax.train import loop
from scaling_jax.train.loop import train
from scaling_jax.train.metrics import read_records

STEP = 128  # tokens


@pytest.fixture(scope="module", autouse=True)
def _shared_programs(quick_compilation):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", Trainers())
        yield


def training(workdir):
    return [r for r in read_records(workdir) if "loss" in r]


def evaluations(workdir):
    return [r for r in read_records(workdir) if "eval/heldout/loss" in r]


def without_timings(records):
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def test_a_run_learns_and_writes_everything_down(tmp_path):
    config = small_config(train__tokens=200 * STEP, optimizer__lr=0.02, eval__every_tokens=50 * STEP, logging__tensorboard=True)
    summary = train(config, tmp_path / "run")
    records = training(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, 201)) and [r["tokens"] for r in records] == [STEP * i for i in range(1, 201)]
    assert [r["tokens"] for r in evaluations(tmp_path / "run")] == [STEP * i for i in (50, 100, 150, 200)]
    assert np.mean([r["loss"] for r in records[-20:]]) < records[0]["loss"] - 1.5
    bounded = [r for r in records if r["grad_sq"] > 0]
    assert len(bounded) > 100 and all((r["noise_scale_tokens"] is None) == (r["grad_sq"] <= 0) for r in records)
    for r in bounded:
        np.testing.assert_allclose(r["noise_scale_tokens"], r["grad_trace"] / r["grad_sq"] * 16, rtol=1e-5)
        assert r["noise_scale_tokens_low"] is None or r["noise_scale_tokens_low"] < r["noise_scale_tokens"]
    assert summary["status"] == "finished" and summary["steps"] == 200 and summary["checkpoints"] == [200 * STEP]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"config.json", "metrics.jsonl", "summary.json", "checkpoints", "tensorboard"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_two_runs_are_identical_and_another_seed_is_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small_config(train__seed=seed), tmp_path / name)
    a, b, c = (without_timings(read_records(tmp_path / name)) for name in "abc")
    assert a == b and a != c


def test_a_run_cut_into_pieces_is_the_same_run(tmp_path):
    """Stopped by losing everything after a checkpoint, three times, with execution fields changed in between."""
    train(small_config(eval__every_tokens=5 * STEP), tmp_path / "whole")
    config = small_config(eval__every_tokens=5 * STEP, checkpoint__every_tokens=4 * STEP, checkpoint__keep_latest=9)
    train(config, tmp_path / "cut")
    import shutil

    for keep, fields in ((12, {}), (8, {"train__accumulation": 1, "data__prefetch": 1}), (4, {"checkpoint__every_tokens": 7 * STEP})):
        for path in (tmp_path / "cut" / "checkpoints").iterdir():
            if int(path.name) > keep * STEP:
                shutil.rmtree(path)
        for name, value in fields.items():
            section, key = name.split("__")
            config[section][key] = value
        train(config, tmp_path / "cut")
        assert without_timings(read_records(tmp_path / "cut")) == without_timings(read_records(tmp_path / "whole"))


def at_each_dispatch(monkeypatch, act):
    """Calls `act` with the number of each step just before it is dispatched."""
    step = loop.profile.StepTraces.step
    monkeypatch.setattr(loop.profile.StepTraces, "step", lambda self, f, number, *args: act(number) or step(self, f, number, *args))


def test_steps_are_recorded_by_the_dozen_and_before_an_evaluation_of_theirs(tmp_path, monkeypatch):
    found = []
    at_each_dispatch(monkeypatch, lambda number: found.append(len(training(tmp_path / "run"))))
    monkeypatch.setattr(loop, "RECORDS_AT_ONCE", 4)
    monkeypatch.setattr(loop, "RECORD_SECONDS", float("inf"))
    train(small_config(train__tokens=14 * STEP, eval__every_tokens=11 * STEP), tmp_path / "run")
    # The step before is still running, so that n - 2 are done as step n is dispatched; the 11th step is evaluated, and all are written.
    assert found == [0, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 11, 11, 11]
    order = [(r["tokens"], "loss" not in r) for r in read_records(tmp_path / "run")]
    assert order == sorted(order) and len(order) == 16


def test_an_error_leaves_the_records_of_the_steps_before_it(tmp_path, monkeypatch):
    def fail(number):
        if number == 9:
            raise RuntimeError("at step 9")

    at_each_dispatch(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="at step 9"):
        train(small_config(), tmp_path / "run")
    assert [r["step"] for r in training(tmp_path / "run")] == list(range(1, 8))  # the 8th was on its way


def test_measuring_at_every_third_step_leaves_the_others_without_noise_keys(tmp_path):
    train(small_config(noise_scale__every=3), tmp_path / "run")
    measured = [r["step"] for r in training(tmp_path / "run") if "grad_sq_step" in r]
    assert measured == list(range(3, 21, 3))
    train(small_config(noise_scale__every=0), tmp_path / "off")
    assert not any("grad_sq_step" in r for r in training(tmp_path / "off"))
    summary = train(small_config(noise_scale__every=3, logging__every_tokens=7 * STEP), tmp_path / "thin")
    thin = training(tmp_path / "thin")
    assert [r["step"] for r in thin] == [7, 14, 20] and summary["steps"] == 20
    by_step = {r["step"]: r for r in training(tmp_path / "run")}
    assert [r["grad_sq_step"] for r in thin] == [by_step[s]["grad_sq_step"] for s in (6, 12, 18)]
    assert summary["noise_scale_tokens"] == thin[-1]["noise_scale_tokens"]


def test_logging_thins_the_records_and_nothing_else(tmp_path):
    every = train(small_config(), tmp_path / "every")
    some = train(small_config(logging__every_tokens=5 * STEP), tmp_path / "some")
    assert [r["step"] for r in training(tmp_path / "some")] == [5, 10, 15, 20]
    assert without_timings(training(tmp_path / "some")) == [r for r in without_timings(training(tmp_path / "every")) if r["step"] % 5 == 0]
    assert some["eval/heldout/loss"] == every["eval/heldout/loss"]


def test_chosen_checkpoints_are_saved_at_the_step_that_reaches_them_and_kept(tmp_path):
    config = small_config(checkpoint__keep_at_tokens=(3 * STEP, 5 * STEP + 1), checkpoint__keep_latest=1)
    assert train(config, tmp_path / "run")["checkpoints"] == [3 * STEP, 6 * STEP, 20 * STEP]


def test_budget_that_is_no_whole_number_of_steps_ends_just_after_it(tmp_path):
    assert train(small_config(train__tokens=10 * STEP + 1), tmp_path / "run")["tokens"] == 11 * STEP


def test_run_longer_than_the_data_is_refused_unless_repeated(tmp_path):
    config = small_config(data__train_tokens=10 * STEP)
    with pytest.raises(UserError, match="config.data.repeat=True"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.data.repeat = True
    assert train(config, tmp_path / "run")["status"] == "finished"


def test_schedule_and_decay_reach_the_records(tmp_path):
    config = small_config(schedule__name="wsd", schedule__warmup_tokens=4 * STEP, schedule__decay_tokens=8 * STEP, optimizer__lr=0.1)
    train(config, tmp_path / "run")
    middle = (np.arange(20) + 0.5) * STEP
    expected = 0.1 * np.minimum(middle / (4 * STEP), 1) * np.minimum((20 * STEP - middle) / (8 * STEP), 1)
    np.testing.assert_allclose([r["lr"] for r in training(tmp_path / "run")], expected, rtol=1e-5)
