"""Runs from the command line: work directories, full disks, and how a run ends, is stopped and goes on."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from shells import Shell, Terminal, snapshot, write_texts

from scaling_jax.cli import main
from scaling_jax.train.metrics import MetricsWriter

pytestmark = pytest.mark.usefixtures("handlers_stay")


# The work directory


def test_another_run_is_refused_and_its_own_continues(shell: Shell):
    assert shell.train()[0] == 0
    err = shell.refuses_train(
        ["--config.optimizer.lr=0.02", "--config.train.seed=1"],
        f"--workdir={shell.workdir}",
        "config.optimizer.lr: 0.01 there, 0.02 here",
        "config.train.seed: 0 there, 1 here",
        "--overwrite",
    )
    assert "batch_tokens" not in err
    assert shell.train("--config.eval.every_tokens=64", "--config.logging.every_tokens=128")[0] == 0  # only how, not what
    assert shell.records()[-1]["tokens"] == 640
    code, out, _ = shell.train("--config.train.seed=1", "--config.logging.every_tokens=320", "--overwrite")
    assert code == 0 and "finished" in out
    assert [record["tokens"] for record in shell.records() if "loss" in record] == [320, 640]
    assert json.loads((shell.workdir / "config.json").read_text())["identity"]["train.seed"] == 1


def test_execution_may_change_in_the_middle(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    stop_after(monkeypatch, 5)
    assert shell.train()[0] == 143
    monkeypatch.undo()
    code, _, err = shell.train("--config.eval.every_tokens=64", "--config.logging.every_tokens=320", "--config.train.accumulation=2")
    assert code == 0 and "continuing from the checkpoint at 320 tokens" in err
    losses = [record["tokens"] for record in shell.records() if "loss" in record]
    evaluations = [record["tokens"] for record in shell.records() if "eval/heldout/loss" in record]
    assert losses == [64, 128, 192, 256, 320, 640] and evaluations == [384, 448, 512, 576, 640]


def stop_after(monkeypatch: pytest.MonkeyPatch, records: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal at the n-th record, as a scheduler does."""
    write, written = MetricsWriter.write, []

    def stopping(self: MetricsWriter, record: dict) -> None:
        write(self, record)
        written.append(record)
        if len(written) == records - 1:  # the next step is on its way
            signal.raise_signal(number)

    monkeypatch.setattr(MetricsWriter, "write", stopping)
    monkeypatch.setattr("scaling_jax.train.loop.RECORDS_AT_ONCE", 1)


def test_a_workdir_in_use_is_refused(shell: Shell):
    shell.workdir.mkdir()
    with open(shell.workdir / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        shell.refuses_train([], f"--workdir={shell.workdir}: in use by another process")
        shell.refuses_train(["--overwrite"], "in use by another process")


def test_places_that_are_no_workdir_are_named(shell: Shell, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    shell.refuses_train([f"--workdir={file}"], f"--workdir={file}: is a file, must be a directory")
    shell.refuses_train([f"--workdir={file}/run"], f"--workdir={file}/run: cannot be written: Not a directory")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    shell.refuses_train([f"--workdir={tmp_path}/link"], "cannot be written")
    shell.workdir.mkdir()
    (shell.workdir / "figures").mkdir()
    (shell.workdir / "figures" / "mine.png").write_text("precious")
    shell.refuses_train(["--overwrite"], "holds figures of something else than a run")
    assert (shell.workdir / "figures" / "mine.png").exists()


def test_a_workdir_that_cannot_be_written_is_named(shell: Shell, tmp_path: Path, request: pytest.FixtureRequest):
    if os.geteuid() == 0:  # root heeds no permissions, but a read-only file system
        sealed = request.getfixturevalue("small_disk")("64k", "ro")
    else:
        sealed = tmp_path / "sealed"
        sealed.mkdir(mode=0o500)
    shell.refuses_train([f"--workdir={sealed / 'run'}"], f"--workdir={sealed / 'run'}: cannot be written: ")


# A full disk


def test_a_full_disk_stops_metrics_with_a_message(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    init = MetricsWriter.__init__

    def on_full_disk(self: MetricsWriter, *args: object) -> None:
        init(self, *args)
        self._file.close()
        self._file = open("/dev/full", "ab")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "__init__", on_full_disk)
        code, out, err = shell.train()
    assert code == 2 and out == "" and "Traceback" not in err
    assert f"--workdir={shell.workdir}: no space left" in err
    assert shell.train()[0] == 0


def test_a_full_disk_stops_checkpoints_with_a_message(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
        code, out, err = shell.train()
    assert code == 2 and out == "" and "Traceback" not in err
    assert "no space left" in err and str(shell.workdir) in err
    assert not any(path.name.isdigit() for path in (shell.workdir / "checkpoints").iterdir())
    assert shell.train()[0] == 0


def test_a_full_disk_stops_the_claim_with_a_message(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, *args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        code, _, err = shell.train()
    assert code == 2 and f"--workdir={shell.workdir}: no space left" in err
    assert snapshot(shell.workdir) == {}
    assert shell.train()[0] == 0  # the lock is free again


def test_a_truly_full_disk(shell: Shell, small_disk: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    disk = small_disk("12k")
    shell.workdir = disk / "run"
    for tensorboard in ("true", "false"):
        code, out, err = shell.train(f"--config.logging.tensorboard={tensorboard}")
        assert code == 2 and out == "" and "Traceback" not in err
        assert f"--workdir={shell.workdir}: no space left" in err
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert shell.train()[0] == 0
    assert [record["step"] for record in shell.records()] == [*range(1, 11), 10]

    other = small_disk("8k")
    for every in (0, 4):
        code = main(
            ["tokenize", f"--input={write_texts(tmp_path / f'texts{every}', 12)}", f"--out={other / 'out'}", f"--holdout_every={every}"]
        )
        assert code == 2 and f"{other / 'out'}: no space left on the disk; nothing was written" in capsys.readouterr().err
        assert not any(other.iterdir())


# The course of a run


def test_divergence_is_recorded_and_the_last_checkpoint_kept(shell: Shell):
    run = ["--config.optimizer.lr=1e20", "--config.optimizer.clip_norm=0", "--config.checkpoint.every_tokens=64"]
    for _ in range(2):  # the same command diverges again
        code, out, err = shell.train(*run)
        assert code == 1 and "diverged" in out
        *before, last = (shell.workdir / "metrics.jsonl").read_text().splitlines()
        assert "NaN" not in last and "Infinity" not in last
        last = json.loads(last)
        assert None in last.values() and last["event"] == "not finite" and last["tokens"] == 64 * (len(before) + 1)
        summary = shell.summary()
        assert summary["status"] == "diverged" and summary["tokens"] == last["tokens"]
        assert summary["checkpoints"] and summary["checkpoints"][-1] < last["tokens"]
        assert f"not finite at {last['tokens']:,} tokens; the checkpoint at {summary['checkpoints'][-1]:,} tokens is kept" in err


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_continues_as_if_it_never_stopped(shell: Shell, tmp_path: Path, number: int, code: int):
    args = ["--config.train.tokens=12800", "--config.eval.every_tokens=3200", "--config.checkpoint.every_tokens=6400"]
    command = [sys.executable, "-m", "scaling_jax", *shell.command(*args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics, deadline = shell.workdir / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 20):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    summary = shell.summary()
    assert summary["status"] == "interrupted" and summary["signal"] == number and 20 * 64 <= summary["tokens"] < 12800
    assert f"saved at {summary['tokens']:,} tokens; the same command continues" in err
    assert summary["checkpoints"][-1] == summary["tokens"]

    rc, _, err = shell.train(*args)
    assert rc == 0 and f"continuing from the checkpoint at {summary['tokens']:,} tokens" in err
    whole = Shell(shell.config_file, tmp_path / "whole", shell.capsys)
    assert whole.train(*args)[0] == 0
    assert shell.records() == whole.records()
    assert [record["step"] for record in shell.records() if "loss" in record] == list(range(1, 201))


def test_a_finished_run_stays_as_it_is(shell: Shell):
    assert shell.train()[0] == 0
    before = snapshot(shell.workdir)
    started = time.monotonic()
    code, out, err = shell.train()
    assert code == 0 and "finished" in out and "continuing" not in err
    assert time.monotonic() - started < 10
    after = snapshot(shell.workdir)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"summary.json"}


def test_a_finished_run_says_so_and_keeps_its_summary(shell: Shell):
    shell.train()
    before = snapshot(shell.workdir)
    _, _, err = shell.train()
    assert snapshot(shell.workdir) == before
    assert "already finished" in err


@pytest.mark.parametrize("args", [["--config.train.accumulation=2"], ["--config.noise_scale.every=0"]])
def test_the_smallest_batches_train(shell: Shell, args: list[str]):
    """Two sequences suffice for noise, whatever a microbatch holds; one does without."""
    sequences = 2 if "accumulation" in args[0] else 1
    assert shell.train(f"--config.train.batch_tokens={16 * sequences}", "--config.train.tokens=64", *args)[0] == 0
    traces = [record.get("grad_trace") for record in shell.records() if "loss" in record]
    assert all(trace is not None and trace >= 0 for trace in traces) if sequences == 2 else traces == [None] * 4


def test_progress_of_a_run(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    _, _, err = shell.train()
    assert "\r" not in err and re.fullmatch(r"64/640 tokens · loss \d\.\d+ · noise scale .* tokens\n", err)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(shell.command("--overwrite")) == 0
    assert "\r" in terminal.getvalue() and len(terminal.lines) == 2 and "/640 tokens · loss" in terminal.lines[0]
