"""A run at W&B, offline: what its files hold is what the run recorded, through stops, errors and kills."""

import functools
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers import small_config
from test_train_tensorboard import draw

from scaling_jax.errors import UserError
from scaling_jax.train import loop
from scaling_jax.train.metrics import MetricsWriter, read_records
from scaling_jax.train.wandb import WandbRun
from scaling_jax.train.workdir import claim, release

STEP = 128  # tokens
pytestmark = pytest.mark.usefixtures("quick_compilation")


def train(*args, **kwargs):
    """With W&B's service ended after it, as at the end of a process."""
    try:
        return loop.train(*args, **kwargs)
    finally:
        if sys.modules.get("wandb"):
            sys.modules["wandb"].teardown()


def config(**fields):
    fields = {"logging__wandb": "test", "checkpoint__every_tokens": 4 * STEP, "eval__every_tokens": 10 * STEP} | fields
    return small_config(model__depth=1, noise_scale__every=0, **fields)


def services() -> list[int]:
    """Process ids of this process's children that are W&B's."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "wandb" in line and "defunct" not in line]


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The package, started anew in offline mode with a home of its own, and ended after the test."""
    package = pytest.importorskip("wandb", reason="the package wandb is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    package.teardown()
    yield package
    assert not services()


def written(path):
    """The records of a .wandb file: behind a header of 7 bytes, the format of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) < 7 and left:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield Record.FromString(parts)
            parts = b""


def segments(workdir):
    """For every start of the run, in order, its W&B records."""
    folders = sorted((workdir / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)
    return [list(written(next(folder.glob("*.wandb")))) for folder in folders]


def rows(records):
    items = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item} for r in records if r.HasField("history")]
    return [{key: value for key, value in row.items() if key not in ("_timestamp", "_runtime", "_wandb")} for row in items]


def expected(workdir):
    """By step: its records as one row, without what is unknown."""
    row_of = {}
    for record in read_records(workdir):
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        row_of.setdefault(record["step"], {"_step": record["step"]}).update(numbers)
    return row_of


def without_timings(row):
    return {key: value for key, value in row.items() if key != "tokens_per_second" and not key.startswith("figures/")}


def at_step(monkeypatch, number, act):
    """Calls `act` when the record of a step was written."""
    write = MetricsWriter.write

    def acting(self, record):
        write(self, record)
        if record["step"] == number:
            act()

    monkeypatch.setattr(MetricsWriter, "write", acting)
    monkeypatch.setattr("scaling_jax.train.loop.RECORDS_AT_ONCE", 1)


def test_a_run_through_an_error_and_a_kill_is_one_run_without_gaps(tmp_path, wandb, monkeypatch):
    def fail():
        raise RuntimeError("on purpose")

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        at_step(patch, 6, fail)  # after the checkpoint of step 4
        train(config(), workdir)
    killed = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_train_wandb as here
        from pytest import MonkeyPatch
        here.at_step(MonkeyPatch(), 11, lambda: os.kill(os.getpid(), signal.SIGKILL))
        here.train(here.config(), {str(workdir)!r})
    """
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(killed)], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    summary = train(config(), workdir, report=lambda _: [draw(tmp_path, "loss", 0.5)])

    pieces = segments(workdir)
    steps = [[row["_step"] for row in rows(piece)] for piece in pieces]
    assert len(pieces) == 3 and steps[0] == [1, 2, 3, 4, 5, 6]
    assert steps[2] == [*range(7, 21)]  # 7 and 8, before the checkpoint, since W&B keeps nothing of the last seconds before a kill
    whole = {row["_step"]: row for piece in pieces for row in rows(piece)}
    assert {step: without_timings(row) for step, row in whole.items()} == {
        step: without_timings(row) for step, row in expected(workdir).items()
    }
    assert [step for step, row in whole.items() if "eval/heldout/loss" in row] == [10, 20]
    everything = [r for piece in pieces for r in piece]
    assert len({r.run.run_id for r in everything if r.HasField("run")}) == 1
    assert [r.exit.exit_code for r in everything if r.HasField("exit")] == [1, 0]

    metrics = [r.metric for r in pieces[2] if r.HasField("metric")]
    assert [m.step_metric for m in metrics if m.glob_name == "*"] == ["tokens"]
    settings = {u.key: json.loads(u.value_json) for r in pieces[2] if r.HasField("run") for u in r.run.config.update}
    assert settings["train"]["tokens"] == 20 * STEP and settings["logging"]["wandb"] == "test"
    last = {u.key: json.loads(u.value_json) for r in pieces[2] if r.HasField("summary") for u in r.summary.update if u.key}
    assert last["status"] == "finished" and last["train_loss"] == summary["train_loss"] and last["steps"] == 20
    (folder,) = (path.parent for path in (workdir / "wandb").glob("offline-run-*/files") if (path / "media").exists())
    assert (folder / "files" / whole[20]["figures/loss/path"]).read_bytes() == (tmp_path / "loss.png").read_bytes()


def start(workdir, project, tokens, said=None):
    service = functools.partial(WandbRun, config(logging__wandb=project), workdir, [].append if said is None else said.append)
    return MetricsWriter(workdir, tokens, False, service if project else None)


def record(step):
    return {"step": step, "tokens": STEP * step, "loss": 1 / step}


def test_wandb_turned_on_later_gets_what_was_before_and_so_does_another_project(tmp_path, wandb):
    for project, steps in (("", range(1, 9)), ("test", [9]), ("other", [10])):
        writer = start(tmp_path, project, (steps[0] - 1) * STEP)
        for step in steps:
            writer.write(record(step))
        writer.close()
    wandb.teardown()
    first, second = segments(tmp_path)
    assert [row["_step"] for row in rows(first)] == [*range(1, 10)] and [row["_step"] for row in rows(second)] == [*range(1, 11)]
    (a,), (b,) = ({(r.run.run_id, r.run.project) for r in piece if r.HasField("run")} for piece in (first, second))
    assert a[0] != b[0] and (a[1], b[1]) == ("test", "other")


def test_overwriting_a_run_begins_another_at_wandb(tmp_path, wandb):
    for overwrite in (False, True):
        release(claim(tmp_path, config(), "data", overwrite))
        writer = start(tmp_path, "test", 0)
        writer.write(record(1))
        writer.close()
        wandb.teardown()
        (piece,) = segments(tmp_path)
        assert [row["_step"] for row in rows(piece)] == [1]


def test_what_was_disabled_is_given_later(tmp_path, wandb, monkeypatch):
    said = []
    for mode, steps in (("disabled", [1, 2, 3]), ("offline", [4])):
        monkeypatch.setenv("WANDB_MODE", mode)
        wandb.teardown()
        writer = start(tmp_path, "test", (steps[0] - 1) * STEP, said)
        for step in steps:
            writer.write(record(step))
        writer.end({"status": "finished", "steps": step, "tokens": step * STEP}, [])
        writer.close()
    wandb.teardown()
    (piece,) = segments(tmp_path)
    assert [row["_step"] for row in rows(piece)] == [1, 2, 3, 4]
    assert said[0] == "W&B: disabled by WANDB_MODE" and said[1].startswith("W&B: offline;")


def test_what_was_interrupted_or_diverged_is_failed_there(tmp_path, wandb):
    codes = {"interrupted": 1, "diverged": 1, "stopped": 0, "finished": 0}
    for status in codes:
        (tmp_path / status).mkdir()
        writer = start(tmp_path / status, "test", 0)
        writer.write(record(1))
        writer.end({"status": status, "steps": 1, "tokens": STEP}, [])
        writer.close()
    wandb.teardown()
    for status, code in codes.items():
        (piece,) = segments(tmp_path / status)
        assert [r.exit.exit_code for r in piece if r.HasField("exit")] == [code], status


def test_a_run_survives_the_end_of_wandb(tmp_path, wandb):
    said = []
    writer = start(tmp_path, "test", 0, said)
    for step in range(1, 100):
        writer.write(record(step))
        if step == 5:
            (service,) = services()
            os.kill(service, signal.SIGKILL)
            time.sleep(0.2)
    writer.end({"status": "finished", "steps": 99, "tokens": 99 * STEP}, [draw(tmp_path, "loss", 0.5)])
    writer.close()
    assert [r["step"] for r in read_records(tmp_path)] == [*range(1, 100)]
    assert ["on without it" in line for line in said] == [False, True] and str(tmp_path / "wandb" / "offline-run-") in said[1]
    with pytest.raises(ConnectionError):  # and so that the next test has a service again
        wandb.teardown()


def test_wandb_that_is_not_installed_is_named_and_not_needed_when_off(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # any import of it fails
    with pytest.raises(UserError, match=r"wandb is 'test': the package wandb is not installed; pip install 'scaling_jax\[wandb\]'"):
        train(config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(config(logging__wandb="", train__tokens=STEP), tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize(
    "env, project, words",
    [
        ({"WANDB_MODE": "online"}, "test", "config.logging.wandb is 'test': not logged in to W&B; `wandb login`, WANDB_MODE=offline"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, "test", "config.logging.wandb is 'test': W&B does not start"),
        ({}, "a/b", r"config.logging.wandb is 'a/b': W&B does not start \(Invalid project name: cannot contain"),
        ({}, 200 * "x", r"config.logging.wandb is 'x{200}': W&B does not start \(Invalid project name: exceeded 128 characters\)"),
        ({"WANDB_MODE": "bogus"}, "test", "WANDB_MODE=bogus: must be one of online, offline, disabled"),
    ],
)
def test_wandb_that_cannot_start_is_one_message_and_nothing_written(tmp_path, wandb, monkeypatch, env, project, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as error:
        train(config(logging__wandb=project), tmp_path / "run")
    assert "\n" not in str(error.value) and str(error.value).count(project) <= 1
    assert not (tmp_path / "run").exists()
