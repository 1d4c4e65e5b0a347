"""The driver of a study: what it has measured and trained, resumed, given up, refused; with an engine that only pretends to train."""

import fcntl
import importlib.util
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from helpers import small_config
from shells import snapshot

from scaling_jax import results
from scaling_jax.errors import UserError
from scaling_jax.sweep import grid
from scaling_jax.sweep.engine import STOPPED, TaskError, WorkerLost
from scaling_jax.sweep.plan import Plan, read_plan
from scaling_jax.sweep.record import GroupRecord
from scaling_jax.sweep.run import MAX_LOSSES, Stopped, sweep
from scaling_jax.sweep.study import Study

LRS = (0.001, 0.002, 0.004, 0.008)
HORIZONS = (1024, 2048)


def a_study(lrs: tuple[float, ...] = LRS, batches: tuple[int, ...] = (64, 128), **settings: Any) -> Study:
    points = grid.product(grid.over("train.batch_tokens", batches), grid.over("optimizer.lr", lrs))
    return Study(small_config(schedule__name="constant"), points, **{"horizons": HORIZONS, "max_members": 2} | settings)


class FakeEngine:
    """Answers every task at once, and trains by writing down what a group's training would end with."""

    def __init__(self, directory: Path, group: Callable[[str], Any] | None = None, **answers: Any):
        self.directory, self.group, self.answers = directory, group, answers
        self.tasks: list[dict[str, Any]] = []
        self.stops = self.closed = 0

    def __call__(self, tasks: int) -> "FakeEngine":
        return self

    def submit(self, task: dict[str, Any]) -> Future:
        self.tasks.append(task)
        future: Future = Future()
        try:
            future.set_result(STOPPED if self.stops else self.answer(task))
        except Exception as error:
            future.set_exception(error)
        return future

    def answer(self, task: dict[str, Any]) -> dict[str, Any]:
        if task["do"] == "group":
            reply = self.group(task["group"]) if self.group else None
            return reply or self.train(task["group"])
        answer = self.answers.get(task["do"], {"members": 2, "seconds_per_step": {}, "total_params": 1, "why": "so"})
        if isinstance(answer, Exception):
            raise answer
        return answer

    def plan(self) -> Plan:
        return read_plan(self.directory)

    def record(self, group: str) -> GroupRecord:
        tids = [tid for tid, _ in self.plan().groups[group]["trajectories"]]
        return GroupRecord(epath.Path(self.directory) / "groups" / group, tids)

    def train(self, group: str) -> dict[str, Any]:
        record = self.record(group)
        for tid in record.trajectories:
            for horizon in self.plan().groups[group]["horizons"]:
                row = {"tokens": horizon, "status": "finished", "reason": None, "loss": 1e3 / horizon, "loss_stderr": 0.1, "seconds": 1.0}
                record.rows.setdefault(tid, {})[str(horizon)] = row
        record.write("done")
        return {"state": "done", "reason": None}

    def progress(self, group: str, tokens: int) -> None:
        record = self.record(group)
        record.at("trunk", tokens)
        record.write()

    def stop(self) -> None:
        self.stops += 1

    def close(self) -> None:
        self.closed += 1

    def trained(self) -> list[str]:
        return [task["group"] for task in self.tasks if task["do"] == "group"]


def statuses(directory: Path) -> list[str]:
    return results.load(directory)["status"].tolist()


def test_a_study_is_measured_trained_and_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    engine = FakeEngine(tmp_path / "s")
    outcome = sweep(a_study(), tmp_path / "s", engine)
    classes = [task for task in engine.tasks if task["do"] == "class"]
    assert [(task["values"]["train.batch_tokens"], task["count"], task["max_members"]) for task in classes] == [(64, 2, 2), (128, 2, 2)]
    plan = engine.plan()
    assert engine.trained() == plan.order and len(plan.order) == 4 and engine.closed == 1
    assert outcome.failed == {} and outcome.table["status"].tolist() == ["finished"] * 16
    assert (tmp_path / "s" / "results.parquet").exists()
    assert all(entry["why"] == "so" and entry["members"] == 2 for entry in plan.classes.values())
    again = FakeEngine(tmp_path / "s")
    assert sweep(a_study(), tmp_path / "s", again).table["status"].tolist() == ["finished"] * 16
    assert again.tasks == []
    assert "has 4 of 4 groups" in capsys.readouterr().err


def test_points_and_horizons_that_are_added_alone_are_trained(tmp_path: Path):
    sweep(a_study(LRS[:2]), tmp_path / "s", before := FakeEngine(tmp_path / "s"))
    sweep(a_study(LRS), tmp_path / "s", more := FakeEngine(tmp_path / "s"))
    assert len(before.trained()) == len(more.trained()) == 2 and not {*before.trained()} & {*more.trained()}
    assert [task for task in more.tasks if task["do"] == "class"] == []
    sweep(a_study(LRS[:2], horizons=(*HORIZONS, 4096)), tmp_path / "s", longer := FakeEngine(tmp_path / "s"))
    assert {*longer.trained()} == {*before.trained()}  # those that the config no longer has are left alone
    table = results.load(tmp_path / "s")
    assert table[table["horizon_tokens"] == 4096]["lr"].nunique() == 2
    assert table["status"].tolist() == ["finished"] * (2 * 2 * 3 + 2 * 2 * 2)


def test_what_the_config_no_longer_has_is_not_tried_again(tmp_path: Path):
    failing = FakeEngine(tmp_path / "s", lambda group: {"state": "failed", "reason": "no"})
    assert len(sweep(a_study(LRS), tmp_path / "s", failing).failed) == 4
    sweep(a_study(LRS[:2]), tmp_path / "s", fewer := FakeEngine(tmp_path / "s"))
    assert len(fewer.trained()) == 2 and {*fewer.trained()} < {*failing.trained()}
    assert len(results.load(tmp_path / "s").query("status == 'finished'")) == 2 * 2 * 2


def test_a_worker_that_dies_again_and_again_costs_its_group_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad: list[str] = []

    def group(gid: str) -> None:
        bad[:] = bad or [gid]
        if gid in bad:
            raise WorkerLost("killed by SIGKILL: the last line")

    engine = FakeEngine(tmp_path / "s", group)
    outcome = sweep(a_study(), tmp_path / "s", engine)
    reason = "its worker died 3 times without getting further: killed by SIGKILL: the last line"
    assert outcome.failed == {bad[0]: reason}
    assert engine.trained().count(bad[0]) == MAX_LOSSES == 3 and len(engine.trained()) == 3 + 3
    stored = json.loads((tmp_path / "s" / "groups" / bad[0] / "group.json").read_text())
    assert (stored["state"], stored["reason"]) == ("failed", reason)
    assert sorted(statuses(tmp_path / "s")) == ["failed"] * 4 + ["finished"] * 12
    assert set(results.load(tmp_path / "s").query("status == 'failed'")["reason"]) == {reason}
    err = capsys.readouterr().err
    assert err.count("it continues from its last checkpoint") == 2 and f"group {bad[0]} failed: its worker died 3 times" in err
    again = FakeEngine(tmp_path / "s")
    assert sweep(a_study(), tmp_path / "s", again).failed == {}
    assert again.trained() == bad


def test_losses_are_counted_anew_where_the_group_got_further(tmp_path: Path):
    tries: list[int] = []
    engine = FakeEngine(tmp_path / "s")

    def group(gid: str) -> dict[str, Any] | None:
        tries.append(len(tries))
        if len(tries) <= 6:
            engine.progress(gid, 64 * (len(tries) // 2))
            if len(tries) % 2:
                raise WorkerLost("gone")
            return {"state": "stopped", "reason": None}  # as where the node is about to go
        return None

    engine.group = group
    assert sweep(a_study(LRS[:1], (64,)), tmp_path / "s", engine).failed == {}
    assert len(tries) == 7


def test_what_a_group_fails_with_is_its_rows_reason(tmp_path: Path):
    engine = FakeEngine(tmp_path / "s")

    def group(gid: str) -> dict[str, Any]:
        engine.record(gid).write("failed", "out of memory")
        return {"state": "failed", "reason": "out of memory"}

    engine.group = group
    outcome = sweep(a_study(LRS[:1], (64,)), tmp_path / "s", engine)
    assert list(outcome.failed.values()) == ["out of memory"]
    assert statuses(tmp_path / "s") == ["failed"] * 2

    def broken(gid: str) -> None:
        raise TaskError("KeyError: 'x'")

    assert list(sweep(a_study(LRS[:1], (64,)), tmp_path / "s", FakeEngine(tmp_path / "s", broken)).failed.values()) == ["KeyError: 'x'"]
    assert set(results.load(tmp_path / "s")["reason"]) == {"KeyError: 'x'"}


@pytest.mark.parametrize("error", [WorkerLost("killed by SIGKILL"), TaskError("JaxRuntimeError: RESOURCE_EXHAUSTED")])
def test_a_class_that_cannot_be_measured_is_trained_one_by_one(tmp_path: Path, error: Exception):
    engine = FakeEngine(tmp_path / "s", **{"class": error})
    sweep(a_study(), tmp_path / "s", engine)
    for entry in engine.plan().classes.values():
        assert entry["members"] == 1 and str(error) in entry["why"] and entry["flops_per_token"] > 0
    assert len(engine.trained()) == 8


def test_a_fault_that_only_a_worker_finds_is_the_users(tmp_path: Path):
    engine = FakeEngine(tmp_path / "s", **{"class": UserError("config.mesh is 3")})
    with pytest.raises(UserError, match="config.mesh is 3"):
        sweep(a_study(), tmp_path / "deep" / "s", engine)
    assert not (tmp_path / "deep").exists() and engine.closed == 1


def test_the_fastest_dtype_is_found_once(tmp_path: Path):
    study = a_study(compute_dtype="fastest")
    engine = FakeEngine(tmp_path / "s", dtype={"compute_dtype": "bfloat16", "seconds": {}, "why": "1 ms a step"})
    sweep(study, tmp_path / "s", engine)
    plan = engine.plan()
    assert plan.compute_dtype == "bfloat16"
    assert {plan.config(point).model.compute_dtype for point in plan.points} == {"bfloat16"}
    assert engine.trained() == plan.order
    again = FakeEngine(tmp_path / "s")
    sweep(study, tmp_path / "s", again)
    assert again.tasks == []
    sweep(study, tmp_path / "t", lost := FakeEngine(tmp_path / "t", dtype=WorkerLost("gone")))
    assert lost.plan().compute_dtype == "float32"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_command_continues(tmp_path: Path, number: int):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # also where these tests run in the background
    engine = FakeEngine(tmp_path / "s")

    def group(gid: str) -> dict[str, Any] | None:
        if len(engine.trained()) == 2:
            signal.raise_signal(number)
            return {"state": "stopped", "reason": None}
        return None

    engine.group = group
    try:
        with pytest.raises(Stopped) as stopped:
            sweep(a_study(), tmp_path / "s", engine)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.args == (number,) and engine.stops == engine.closed == 1
    done = [gid for gid in engine.plan().order if (tmp_path / "s" / "groups" / gid / "group.json").exists()]
    assert (tmp_path / "s" / "results.parquet").exists() and statuses(tmp_path / "s").count("finished") == 4 * len(done)
    again = FakeEngine(tmp_path / "s")
    sweep(a_study(), tmp_path / "s", again)
    assert {*again.trained()} == {*again.plan().order} - {*done}


def test_a_signal_amid_measuring_leaves_nothing(tmp_path: Path):
    class Hanging(FakeEngine):
        def submit(self, task: dict[str, Any]) -> Future:
            self.waiting = getattr(self, "waiting", []) + [Future()]
            signal.raise_signal(signal.SIGTERM)
            return self.waiting[-1]

        def stop(self) -> None:
            super().stop()
            for future in self.waiting:
                future.set_result(STOPPED)

    with pytest.raises(Stopped):
        sweep(a_study(batches=(64,)), tmp_path / "s", Hanging(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


# What is refused, before anything is written


def refuses(study: Study, directory: Path, *words: str) -> None:
    before, engine = snapshot(directory), FakeEngine(directory)
    with pytest.raises(UserError) as error:
        sweep(study, directory, engine)
    for word in words:
        assert word in str(error.value)
    assert snapshot(directory) == before and engine.tasks == []


def test_directories_of_something_else_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    refuses(a_study(), tmp_path / "file", f"--workdir={tmp_path / 'file'}: is a file")
    for name, content, words in [
        ("config.json", "{}", "holds a run, config.json"),
        ("plan.json", "[1]", "not a plan that scaling_jax wrote"),
        ("results.parquet", "", "holds results.parquet but no plan.json"),
    ]:
        directory = tmp_path / name
        directory.mkdir()
        (directory / name).write_text(content)
        refuses(a_study(), directory, words)
    (tmp_path / "other" / "groups").mkdir(parents=True)
    refuses(a_study(), tmp_path / "other", "holds groups but no plan.json")


def test_another_study_and_another_driver_are_refused(tmp_path: Path):
    sweep(a_study(), tmp_path / "s", FakeEngine(tmp_path / "s"))
    other = a_study()
    other.base.model.depth = 1
    refuses(other, tmp_path / "s", "holds another study", "config.model.depth")
    with (tmp_path / "s" / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses(a_study(), tmp_path / "s", "in use by another process")


def test_faults_of_a_study_leave_no_directory(tmp_path: Path):
    refuses(a_study(()), tmp_path / "s", "grid has no points")
    refuses(a_study(horizons=(1 << 24,)), tmp_path / "s", "horizon 16777216", "config.data.repeat")
    study = a_study()
    study.base.data.path = str(tmp_path / "nowhere")
    refuses(study, tmp_path / "s", "config.data.path")
    refuses(a_study(batches=(64, 65)), tmp_path / "s", "train.batch_tokens")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    if os.getuid() == 0:
        (tmp_path / "file").write_text("")
        refuses(a_study(), tmp_path / "file" / "s", "cannot be written")
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        refuses(a_study(), tmp_path / "closed" / "s", "cannot be written")


# Killed for real

_SCRIPT = Path(__file__).parent.parent / "benchmarks" / "sweep_kills.py"
_spec = importlib.util.spec_from_file_location("sweep_kills", _SCRIPT)
kills = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kills)


def test_two_kills_change_nothing(tmp_path: Path):
    assert len(kills.trial(tmp_path, 2, 48_000, seed=1, seeds=1, lrs=1, members=1)) == 2
    table = results.load(tmp_path / "whole")
    assert len(table) == 2 * 3 and set(table["status"]) == {"finished"}
    other = next((tmp_path / "killed" / "groups").glob("*/group.json"))  # the comparison can fail
    values = json.loads(other.read_text())
    row = next(iter(next(iter(values["rows"].values())).values()))
    row["loss"] *= 1 + 2**-52
    other.write_text(json.dumps(values))
    with pytest.raises(AssertionError):
        kills.compare(tmp_path / "whole", tmp_path / "killed")
