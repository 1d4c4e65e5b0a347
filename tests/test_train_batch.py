"""Runs whose batch changes, that stop at a token count, or that start from another run's checkpoint."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import Trainers, small_config

from scaling_jax.data.source import TokenSource
from scaling_jax.errors import UserError
from scaling_jax.laws.law_file import write_law
from scaling_jax.laws.power_law import PowerLaw
from scaling_jax.train import loop
from scaling_jax.train.batch_size import KEY, replay
from scaling_jax.train.checkpoint import Checkpoints, Start
from scaling_jax.train.loop import train
from scaling_jax.train.metrics import Progress, read_records

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEP = 128  # tokens of a step at the start


class Crash(Exception):
    pass


class WatchedTrainers(Trainers):
    """`before_step(number)` is called before every step of a run."""

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        self.before_step, self.shapes = lambda number: None, []

    def make(self, config, mesh):
        trainer = super().make(config, mesh)
        trainer.step = lambda *args, step=trainer.step: self.watched(step, *args)
        return trainer

    def watched(self, step, state, tokens_AxBxL, measure):
        self.before_step(int(state.step) + 1)
        self.shapes.append(tokens_AxBxL.shape)
        return step(state, tokens_AxBxL, measure)


@pytest.fixture(scope="module")
def shared(quick_compilation):
    with pytest.MonkeyPatch.context() as patch:
        trainers = WatchedTrainers()
        patch.setattr(loop, "Trainer", trainers)
        yield trainers


@pytest.fixture
def trainers(shared):
    shared.reset()
    return shared


def comparable(workdir, evaluations=True):
    return [
        {key: value for key, value in record.items() if key != "tokens_per_second"}
        for record in read_records(workdir)
        if evaluations or not any(key.startswith("eval/") for key in record)
    ]


def final_state(workdir, config):
    with Checkpoints(workdir) as checkpoints:
        state = checkpoints.restore(checkpoints.tokens()[-1], loop.Trainer(config).abstract_sharded_state)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def batches(workdir):
    return [r["batch_tokens"] for r in read_records(workdir) if "loss" in r]


def config_of(**fields):
    """60 steps at the first batch. All that differ in execution and in batch.* alone are one program."""
    return small_config(
        **{"train__tokens": 60 * STEP, "noise_scale__window_tokens": 4000, "optimizer__lr": 0.02, "batch__lr_rule": "sqrt"} | fields
    )


def test_stages_change_the_batch_the_lr_and_nothing_of_the_data(tmp_path, trainers, monkeypatch):
    read, batch = [], TokenSource.batch
    monkeypatch.setattr(TokenSource, "batch", lambda self, *key: read.append(key) or batch(self, *key))
    stages = (f"{4 * STEP}={2 * STEP}", f"{9 * STEP}={STEP}", f"{20 * STEP}={4 * STEP}")
    summary = train(config_of(batch__schedule="stages", batch__stages=stages), tmp_path / "run")
    expected = np.array([1] * 4 + [2] * 3 + [1] * 10 + [4] * 10)  # a stage begins where the step ends that crosses it
    assert batches(tmp_path / "run") == (STEP * expected).tolist()
    assert trainers.shapes == [(n, 8, 17) for n in expected]  # microbatches stay as large as they were
    assert summary["steps"] == 27 and summary["tokens"] == 60 * STEP
    middle = (np.cumsum(expected) - expected / 2) / 60
    lr = [r["lr"] for r in read_records(tmp_path / "run") if "loss" in r]
    np.testing.assert_allclose(lr, 0.02 * np.sqrt(expected) * 0.5 * (1 + np.cos(np.pi * middle)), rtol=1e-4)
    changes = [(r["step"], r["tokens"], r[KEY]) for r in read_records(tmp_path / "run") if KEY in r]
    assert changes == [(4, 4 * STEP, 2 * STEP), (7, 10 * STEP, STEP), (17, 20 * STEP, 4 * STEP)]
    needed = {(8 * sum(expected[:i]), 8 * n) for i, n in enumerate(expected)}
    assert needed <= set(read)  # one after the other, each sequence once; what was read ahead in vain does not matter


FOLLOW = {"batch__schedule": "follow", "batch__multiple": 0.45, "batch__look_tokens": 300, "batch__max_tokens": 4 * STEP}


@pytest.fixture(scope="module")
def followed(tmp_path_factory, shared):
    workdir = tmp_path_factory.mktemp("follow") / "whole"
    config = config_of(**FOLLOW)
    train(config, workdir)
    return config, workdir, comparable(workdir, evaluations=False), final_state(workdir, config)


def test_a_batch_that_follows_grows_and_its_log_says_why(followed):
    config, workdir, records, _ = followed
    looks = [r for r in records if KEY in r]
    _, decisions = replay(config, records, tokens=records[-1]["tokens"])
    assert [d.record(r["step"]) for d, r in zip(decisions, looks, strict=True)] == looks
    assert sorted(set(batches(workdir))) == [STEP, 2 * STEP, 4 * STEP]
    assert {r["batch/passes"] for r in looks} >= {0, 1, 2} and any(r["batch/low"] is None for r in looks)
    steps = {r["step"]: r for r in records if "loss" in r}
    for look in looks:  # the reading is of that very step
        assert look["batch/low"] == steps[look["step"]]["noise_scale_tokens_low"]
        assert look["batch/followed"] == steps[look["step"]]["noise_scale_tokens"]
        assert steps[look["step"] + 1]["batch_tokens"] == look[KEY]


def test_interrupted_anywhere_it_is_the_same_run(followed, tmp_path, trainers):
    """SIGTERM, or a crash that loses all since the last checkpoint, before, at and after looks and doublings."""
    config, workdir, records, state = followed
    looks = [r for r in records if KEY in r]
    doubled = [b["step"] for a, b in zip(looks, looks[1:], strict=False) if b[KEY] > a[KEY]]
    last = records[-1]["step"]
    moments = sorted({step + d for step in (looks[0]["step"], *doubled) for d in (-1, 0, 1, 2)} & set(range(2, last + 1)))
    stopped = []
    for i, moment in enumerate(moments):
        crash = i % 2 == 1

        def interrupt(number, moment=moment, crash=crash):
            if number == moment:
                if crash:
                    raise Crash
                os.kill(os.getpid(), signal.SIGTERM)

        trainers.before_step = interrupt
        now = config_of(**FOLLOW, checkpoint__every_tokens=(STEP, 300, 5 * STEP)[i % 3], eval__every_tokens=(0, 900, 400)[i % 3])
        if crash:
            with pytest.raises(Crash):
                train(now, tmp_path / "cut")
        else:
            assert train(now, tmp_path / "cut")["status"] == "interrupted"
        stopped.append(moment)
    trainers.before_step = lambda number: None
    assert train(config, tmp_path / "cut")["status"] == "finished" and len(stopped) >= 6
    assert comparable(tmp_path / "cut", evaluations=False) == records
    assert final_state(tmp_path / "cut", config) == state


def test_without_its_log_it_is_not_continued(followed, tmp_path, trainers):
    config = followed[0]
    config.train.stop_at_tokens = 30 * STEP
    try:
        assert train(config, tmp_path / "run")["status"] == "stopped"
    finally:
        config.train.stop_at_tokens = 0
    log = tmp_path / "run" / "metrics.jsonl"
    text = log.read_text()
    lines = text.splitlines(keepends=True)
    grown = max(i for i, line in enumerate(lines) if KEY in line)
    for wrong in (None, "".join(lines[:grown]), text.replace('"batch/passes": 2', '"batch/passes": 1')):
        log.unlink() if wrong is None else log.write_text(wrong)
        with pytest.raises(UserError, match="the log of decisions about the batch"):
            train(config, tmp_path / "run")
        assert wrong is None or log.read_text() == wrong
    log.write_text(text)
    assert train(config, tmp_path / "run")["status"] == "finished"
    assert comparable(tmp_path / "run", evaluations=False) == followed[2]


def test_a_run_stops_where_it_is_told_and_goes_on(tmp_path, trainers):
    train(config_of(), tmp_path / "whole")
    for stop, tokens, status in ((5 * STEP + 1, 6, "stopped"), (4 * STEP, 6, "stopped"), (12 * STEP, 12, "stopped"), (0, 60, "finished")):
        summary = train(config_of(train__stop_at_tokens=stop), tmp_path / "run")
        assert (summary["status"], summary["tokens"], summary["steps"]) == (status, tokens * STEP, tokens)
        assert tokens * STEP in summary["checkpoints"]
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")
    assert train(config_of(train__stop_at_tokens=100 * STEP), tmp_path / "far")["status"] == "finished"


@pytest.fixture(scope="module")
def source(tmp_path_factory, shared):
    """A run with a checkpoint on its way."""
    workdir = tmp_path_factory.mktemp("source") / "run"
    config = config_of(checkpoint__keep_at_tokens=(40 * STEP,))
    train(config, workdir)
    return config, workdir


def files(folder: Path):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_run_that_starts_from_another_with_the_same_config_ends_as_that_one(source, tmp_path, trainers):
    config, workdir = source
    before = files(workdir)
    summary = train(config, tmp_path / "run", start=Start(workdir, 40 * STEP))
    assert summary["steps"] == 60 and summary["tokens"] == 60 * STEP
    assert final_state(tmp_path / "run", config) == final_state(workdir, config)
    assert comparable(tmp_path / "run") == [r for r in comparable(workdir) if r["tokens"] > 40 * STEP]
    assert files(workdir) == before


def test_batch_and_lr_at_a_start_are_the_configs_and_it_continues_as_any_run(source, tmp_path, trainers):
    workdir, start = source[1], Start(source[1], 40 * STEP)
    fields = {"batch__schedule": "stages", "batch__stages": (f"{40 * STEP}={2 * STEP}",), "optimizer__lr": 0.03}
    train(config_of(**fields), tmp_path / "whole", start=start)
    records = [r for r in read_records(tmp_path / "whole") if "loss" in r]
    assert [r["batch_tokens"] for r in records] == [2 * STEP] * 10 and [r["step"] for r in records] == list(range(41, 51))
    np.testing.assert_allclose(records[0]["lr"], np.sqrt(2) * 0.03 * 0.5 * (1 + np.cos(np.pi * 41 / 60)), rtol=1e-5)
    theirs, ours = (json.loads((run / "parametrization.json").read_text()) for run in (workdir, tmp_path / "whole"))
    assert theirs["fingerprint"] != ours["fingerprint"]  # the lr is applied
    for stop in (40 * STEP, 45 * STEP, 0):  # the first saves before any step
        train(config_of(**fields, train__stop_at_tokens=stop), tmp_path / "cut", start=start)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    with pytest.raises(UserError, match="start: {.*'tokens': 5120} there, 'absent' here"):
        train(config_of(**fields), tmp_path / "cut")


def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(source, tmp_path, trainers):
    config, workdir = source
    for start, fields, words in (
        (Start(workdir, 11 * STEP), {}, "no checkpoint at 1408 tokens to start from; there are 5120, 7680"),
        (Start(tmp_path / "nowhere", STEP), {}, "holds no run"),
        (Start(workdir, 40 * STEP), {"model__depth": 1}, "config.model.depth is 1, 2 there"),
        (Start(workdir, 40 * STEP), {"noise_scale__every": 0}, "config.noise_scale.every is 0, 1 there"),
        (Start(workdir, 60 * STEP), {}, "config.train.tokens is 7680: .*must be more"),
    ):
        with pytest.raises(UserError, match=words):
            train(config_of(**fields), tmp_path / "run", start=start)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="the run starts from there"):
        train(config, workdir, overwrite=True, start=Start(workdir, 40 * STEP))


def test_a_law_is_followed_and_is_part_of_the_run(tmp_path, trainers):
    law = PowerLaw(exponent=1.0, exponent_se=0.0, log_scale=float(np.log(0.1001)), points=4, centre=7.0, centre_se=0.0)
    write_law(tmp_path / "law.json", "branch", law)
    law_file = str(tmp_path / "law.json")
    config = config_of(**FOLLOW | {"batch__follow": law_file, "batch__multiple": 1.0, "batch__look_tokens": STEP, "batch__hold": 1})
    train(config, tmp_path / "run")
    # A tenth of the tokens is 128 after 10 steps and 256 after 20, which makes the batch the largest.
    assert batches(tmp_path / "run") == [STEP] * 10 + [2 * STEP] * 5 + [4 * STEP] * 10
    write_law(tmp_path / "law.json", "branch", law._replace(log_scale=0.0))
    with pytest.raises(UserError, match="config.batch.follow: 'law "):
        train(config, tmp_path / "run")


def test_the_progress_line_shows_a_batch_that_changes():
    record = {"tokens": 1000, "loss": 2.0, "batch_tokens": 2048}
    assert "batch 2.05k tokens" in Progress(2000, 1.0, show_batch=True).line(record, None)
    assert "batch" not in Progress(2000, 1.0).line(record, None)
