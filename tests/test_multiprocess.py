"""Runs of several processes, with 8 devices in all: what they compute, read, save and restore; how they stop, fail and are refused.

Each process is started as a user starts it, by tests/multiprocess/process.py, which notes what it reads, saves and restores.
"""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "multiprocess"
CONFIG = Path(__file__).parent.parent / "configs" / "cpu_demo.py"
DEVICES, SEQUENCES, CONTEXT, STEPS = 8, 32, 16, 20
STEP = SEQUENCES * CONTEXT  # tokens
SOON = 30  # seconds in which processes that wait 8 s for a sign of life have ended
FIELDS = {
    "model.width": 32,
    "model.head_dim": 8,
    "model.depth": 1,
    "model.context": CONTEXT,
    "optimizer.lr": 2.0**-9,
    "schedule.name": "constant",
    "schedule.warmup_tokens": 0,
    "train.batch_tokens": STEP,
    "train.tokens": STEPS * STEP,
    "noise_scale.window_tokens": 10 * STEP,
    "eval.tokens": 65 * CONTEXT,  # two whole batches of evaluation and one sequence
    "eval.batch_sequences": 32,
    "eval.every_tokens": STEPS // 2 * STEP,
    "checkpoint.every_tokens": STEPS // 2 * STEP,
    "mesh.fsdp": -1,
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]


class Run:
    """The processes of one start of a run."""

    def __init__(self, root: Path, name: str, processes: int, workdirs: list[Path] | None = None, breaks: str = "", **fields: Any):
        self.notes, self.workdir = root / f"{name}-notes", root / name
        self.notes.mkdir(exist_ok=True)
        if breaks:
            (self.notes / "break").write_text(breaks)
        self.outputs = [self.notes / f"output-{process}" for process in range(processes)]
        of_each = fields.pop("of_each", [[]] * processes)
        program = fields.pop("program", [str(FOLDER / "process.py"), str(self.notes)])
        overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in (FIELDS | fields).items()]
        port = free_port()
        flags = f"--xla_force_host_platform_device_count={DEVICES // processes} --xla_cpu_collective_call_terminate_timeout_seconds=600"
        settings = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        self.processes = []
        for process in range(processes):
            workdir = workdirs[process] if workdirs else self.workdir
            command = [sys.executable, *program, "train", f"--config={CONFIG}", f"--workdir={workdir}"]
            place = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={process}"] if processes > 1 else []
            argv, env = [*command, *overrides, *place, *of_each[process]], os.environ | settings
            heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where these tests run in the background
            with self.outputs[process].open("wb") as out:
                self.processes.append(subprocess.Popen(argv, env=env, stdout=out, stderr=out, preexec_fn=heed))

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def until(self, happened: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                for process in self.processes:
                    process.kill()
                raise AssertionError("\n".join(map(self.said, range(len(self.processes)))))
            time.sleep(0.1)

    def until_steps(self, steps: int) -> None:
        self.until(lambda: len(self.training()) >= steps)

    def said(self, process: int) -> str:
        """What it wrote to stdout and stderr, without what Gloo does: lines whose pieces mix with another thread's, which may leave a
        number on a line of its own."""
        lines = self.outputs[process].read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if not re.search(r"\[Gloo\]|peer ranks|^\s*\d*\s*$", line))

    def records(self) -> list[dict[str, Any]]:
        path = self.workdir / "metrics.jsonl"
        whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")  # the last line may be half-written yet
        return [json.loads(line) for line in whole.splitlines()]

    def training(self) -> list[dict[str, Any]]:
        return [record for record in self.records() if "loss" in record]

    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.records() if "eval/heldout/loss" in record]

    def batches(self) -> list[dict[int, dict[str, Any]]]:
        """Of each process what it read, by the batch's first sequence."""
        files = [self.notes / f"batches-{process}.jsonl" for process in range(len(self.processes))]
        return [{note["first"]: note for note in map(json.loads, file.read_text().splitlines())} for file in files]

    def placed(self) -> list[np.ndarray]:
        """The batches as they lay on the devices, one after the other: [accumulation, B / accumulation, context + 1]."""
        files = [self.notes / f"placed-{process}.jsonl" for process in range(len(self.processes))]
        batches = []
        for notes in zip(*(file.read_text().splitlines() for file in files), strict=False):
            parts = [json.loads(note) for note in notes]
            batches.append(np.full(parts[0]["shape"], -1))
            for bounds, data in (shard for part in parts for shard in part["shards"]):
                batches[-1][tuple(slice(*bound) for bound in bounds)] = data
        return batches

    def state(self, name: str) -> dict[str, np.ndarray]:
        """A state that was saved or restored, put together from the shards of all processes."""
        arrays, filled = {}, {}
        for process in range(len(self.processes)):
            for key, data in np.load(self.notes / f"{name}-{process}.npz").items():
                path, shape, bounds = json.loads(key)
                where = tuple(slice(*bound) for bound in bounds)
                arrays.setdefault(path, np.zeros(shape, data.dtype))[where] = data
                filled.setdefault(path, np.zeros(shape, bool))[where] = True
        assert all(parts.all() for parts in filled.values())
        return arrays


class Runs(NamedTuple):
    one: Run
    two: Run  # 2 microbatches; SIGTERM to process 1 after 20 steps
    two_codes: list[int]
    four: Run
    moved: Run  # from four's first checkpoint, in 2 processes with tensor 2, which stop as process 1 is killed
    moved_codes: list[int]
    moved_seconds: float
    alone: Run  # from there too, in one process


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    one = Run(root, "one", 1)
    assert one.wait() == [0], one.said(0)
    four = Run(root, "four", 4)
    assert four.wait() == [0] * 4, four.said(0)
    for name in ("moved", "alone"):
        shutil.copytree(four.workdir, root / name)
        shutil.rmtree(root / name / "checkpoints" / str(STEPS * STEP))
    alone = Run(root, "alone", 1, mesh__fsdp=4, mesh__tensor=2)
    assert alone.wait() == [0], alone.said(0)

    two = Run(root, "two", 2, train__accumulation=2, train__tokens=1000 * STEP)
    two.until_steps(STEPS + 1)
    two.processes[1].send_signal(signal.SIGTERM)
    two_codes = two.wait()

    moved = Run(root, "moved", 2, mesh__fsdp=4, mesh__tensor=2, train__stop_at_tokens=0, checkpoint__every_tokens=0)
    moved.until(lambda: (moved.notes / "batches-1.jsonl").exists())  # what four wrote after its first checkpoint is cut off then
    moved.until_steps(STEPS // 2 + 1)
    moved.processes[1].kill()
    killed = time.monotonic()
    moved_codes = moved.wait()
    return Runs(one, two, two_codes, four, moved, moved_codes, time.monotonic() - killed, alone)


def assert_same_course(run: Run, wanted: Run, steps: range) -> None:
    """|G|² is a difference of larger terms, and is measured by the mean squared norm of single sequences."""
    ours, theirs = ({r["step"]: r for r in each.training()} for each in (run, wanted))
    for step in steps:
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)
        assert ours[step]["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], rel=1e-4)
        mean_sq_norm = theirs[step]["grad_sq_step"] + theirs[step]["grad_trace_step"]
        assert abs(ours[step]["grad_sq_step"] - theirs[step]["grad_sq_step"]) <= 1e-5 * mean_sq_norm
        assert abs(ours[step]["grad_trace_step"] - theirs[step]["grad_trace_step"]) <= 1e-5 * mean_sq_norm


def test_the_course_does_not_depend_on_the_number_of_processes(runs: Runs):
    assert runs.one.training()[-1]["loss"] < runs.one.training()[0]["loss"] - 0.5
    assert [r["step"] for r in runs.four.training()] == list(range(1, STEPS + 1))
    assert_same_course(runs.two, runs.one, range(1, STEPS + 1))
    assert_same_course(runs.four, runs.one, range(1, STEPS + 1))


def test_every_process_evaluates_its_part_and_knows_the_whole(runs: Runs):
    wanted = runs.one.evaluations()
    assert [r["tokens"] for r in wanted] == [STEPS // 2 * STEP, STEPS * STEP]
    for run in (runs.two, runs.four):
        for ours, theirs in zip(run.evaluations(), wanted, strict=False):
            for key in ("loss", "loss_se", "bits_per_byte", "bits_per_byte_se"):
                assert ours[f"eval/heldout/{key}"] == pytest.approx(theirs[f"eval/heldout/{key}"], rel=1e-5)


@pytest.mark.parametrize("name", ["two", "four", "moved"])
def test_every_process_reads_rows_of_its_own_and_together_they_read_the_batch(runs: Runs, name: str):
    (wanted,) = runs.one.batches()
    read = getattr(runs, name).batches()
    firsts = sorted(set(wanted) & set.intersection(*map(set, read)))
    assert len(firsts) >= 2 and firsts[0] == (STEPS // 2 * SEQUENCES if name == "moved" else 0)
    assert len(firsts) >= STEPS or name == "moved"
    for first in firsts:
        rows = [row for batches in read for row in batches[first]["rows"]]
        assert sorted(rows) == list(range(SEQUENCES)) and len(read[0][first]["rows"]) == SEQUENCES // len(read)
        for batches in read:
            note = batches[first]
            assert note["tokens"] == [wanted[first]["tokens"][row] for row in note["rows"]]
    placed = getattr(runs, name).placed()
    assert len(placed) >= 2 and placed[0].shape[0] == (2 if name == "two" else 1)
    for first, tokens_AxBxL in zip(range(firsts[0], STEPS * SEQUENCES, SEQUENCES), placed, strict=False):
        np.testing.assert_array_equal(tokens_AxBxL.reshape(SEQUENCES, -1), wanted[first]["tokens"])


def test_a_checkpoint_of_four_processes_restores_bit_for_bit_in_two_and_in_one(runs: Runs):
    tokens = STEPS // 2 * STEP
    saved = runs.four.state(f"saved-{tokens}")
    assert len(saved) > 20 and saved[".step"] == STEPS // 2
    for run in (runs.moved, runs.alone):
        restored = run.state(f"restored-{tokens}")
        assert set(restored) == set(saved)
        for path, array in saved.items():
            assert restored[path].dtype == array.dtype and restored[path].tobytes() == array.tobytes(), path
        assert f"continuing from the checkpoint at {tokens:,} tokens" in run.said(0)
    assert_same_course(runs.moved, runs.one, range(1, STEPS // 2 + 2))
    assert_same_course(runs.alone, runs.one, range(1, STEPS + 1))


def test_sigterm_at_one_process_saves_on_all(runs: Runs):
    assert runs.two_codes == [128 + signal.SIGTERM] * 2
    last = runs.two.training()[-1]
    for process in (0, 1):
        assert f"interrupted, saved at {last['tokens']:,} tokens; the same command on all hosts continues" in runs.two.said(process)
    assert (runs.two.workdir / "checkpoints" / str(last["tokens"])).is_dir()
    assert runs.two.state(f"saved-{last['tokens']}")[".step"] == last["step"] > STEPS
    summary = json.loads((runs.two.workdir / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["signal"] == signal.SIGTERM and summary["tokens"] == last["tokens"]


def test_the_others_do_not_wait_for_a_process_that_was_killed(runs: Runs):
    assert runs.moved_codes == [3, -signal.SIGKILL] and runs.moved_seconds < SOON
    said = runs.moved.said(0)
    assert f"process 1 of 2 ({socket.gethostname()}) ended without a word: killed" in said
    assert said.endswith("This is process 0 of 2 (" + socket.gethostname() + "), which ends too; the same command on all hosts continues "
                         "from the last checkpoint")  # fmt: skip
    assert "Traceback" not in said


def test_only_the_first_process_writes_and_shows_progress(runs: Runs):
    assert {p.name for p in runs.four.workdir.iterdir()} == {p.name for p in runs.one.workdir.iterdir()}
    assert len(list((runs.four.workdir / "tensorboard").iterdir())) == 1
    assert "heldout loss" in runs.four.said(0) and "tokens · loss" in runs.four.said(0)
    assert [runs.four.said(process) for process in (1, 2, 3)] == ["", "", ""]


def same_refusal(run: Run, words: list[str]) -> None:
    assert run.wait() == [2] * len(run.processes), run.said(0)
    first, *others = ({line for line in run.said(process).splitlines()} for process in range(len(run.processes)))
    assert all(other == first for other in others)
    text = run.said(0)
    assert text.count("scaling-jax train:") == 1 and "Traceback" not in text
    for word in words:
        assert word in text


def test_processes_with_other_configs_are_refused(tmp_path: Path):
    run = Run(
        tmp_path, "run", 2, program=["-m", "scaling_jax"], of_each=[[], ["--config.optimizer.lr=0.5", "--config.train.accumulation=4"]]
    )
    name = socket.gethostname()
    same_refusal(run, [f"config.optimizer.lr: {2.0**-9} on process 0 ({name}), 0.5 on process 1 ({name})", "config.train.accumulation: 1"])
    assert not run.workdir.exists()


def test_a_workdir_that_is_not_shared_is_refused(tmp_path: Path):
    run = Run(tmp_path, "run", 2, workdirs=[tmp_path / "mine", tmp_path / "yours"])
    same_refusal(run, [f"--workdir={tmp_path / 'yours'}: is not the directory that process 0 sees", "(process 1 of 2"])
    assert not (tmp_path / "mine").exists() and not (tmp_path / "yours").exists()


def test_what_fails_in_one_process_is_told_in_the_others(tmp_path: Path):
    run = Run(tmp_path, "run", 2, breaks="open 1")
    assert run.wait() == [3, 1]
    assert "process 1 of 2" in run.said(0) and "failed: RuntimeError: no such luck" in run.said(0) and "Traceback" not in run.said(0)
    assert "RuntimeError: no such luck" in run.said(1).splitlines()[-1] and "Traceback" in run.said(1)


@pytest.mark.slow  # the other ways to end; a minute
@pytest.mark.parametrize("how", ["first killed", "stopped", "interrupted", "interrupted twice"])
def test_other_ends(tmp_path: Path, how: str):
    run = Run(tmp_path, "run", 2, train__tokens=1000 * STEP)
    run.until_steps(2)
    since = time.monotonic()
    if how == "first killed":
        run.processes[0].kill()
        assert run.wait(SOON) == [-signal.SIGKILL, 3]
        assert run.said(1).count("process 0 of 2") == 1 and "ended without a word" in run.said(1).splitlines()[-1]
    elif how == "stopped":
        run.processes[1].send_signal(signal.SIGSTOP)
        assert run.processes[0].wait(SOON) == 3 and time.monotonic() - since > 6
        run.processes[1].send_signal(signal.SIGCONT)
        assert run.wait(SOON)[1] == 3
        assert "process 1 of 2" in run.said(0) and "gave no sign of life for 8 s" in run.said(0)
    elif how == "interrupted":
        run.processes[1].send_signal(signal.SIGINT)
        assert run.wait(SOON) == [128 + signal.SIGTERM, 128 + signal.SIGINT]
        assert all("interrupted, saved at" in run.said(process) for process in (0, 1))
    else:
        run.processes[1].send_signal(signal.SIGINT)
        run.processes[1].send_signal(signal.SIGINT)
        codes = run.wait(SOON)
        assert codes in ([3, 130], [143, 130])  # the second may come too late
    assert not (run.workdir / "summary.json").exists() or how.startswith("interrupted")


@pytest.mark.slow  # half a minute; tests/test_checkpoint.py has the same for one process
def test_a_damaged_checkpoint_is_set_aside_on_all(tmp_path: Path):
    first = Run(tmp_path, "run", 2)
    assert first.wait() == [0, 0], first.said(0)
    for path in (first.workdir / "checkpoints" / str(STEPS * STEP)).rglob("*"):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run = Run(tmp_path, "run", 2)
    assert run.wait() == [0, 0], run.said(0)
    assert f"using the one at {STEPS // 2 * STEP:,} tokens instead" in run.said(0) and run.said(1) == ""
    assert (run.workdir / "unreadable_checkpoints" / str(STEPS * STEP)).is_dir()
    assert [r["step"] for r in run.training()] == list(range(1, STEPS + 1))


@pytest.mark.slow  # as above
def test_a_full_disk_ends_all(tmp_path: Path):
    run = Run(tmp_path, "run", 2, breaks="write 0")
    assert run.wait() == [2, 2]
    assert run.said(0).endswith("continues from its last checkpoint") and "no space left on the disk" in run.said(0)
    assert "process 0 of 2" in run.said(1) and "no space left on the disk" in run.said(1)


@pytest.mark.slow  # as above
def test_a_checkpoint_that_one_process_cannot_write_ends_all(tmp_path: Path):
    """Orbax would wait for it for 20 minutes."""
    run = Run(tmp_path, "run", 2, breaks="save 1")
    assert run.wait() == [3, 1]
    (last,) = run.said(0).splitlines()[-1:]
    assert last.startswith("scaling-jax train: process 1 of 2") and "File too large" in run.said(1) and len(last) < 600


@pytest.mark.slow  # as above
@pytest.mark.parametrize("process", [0, 1])
def test_one_that_is_killed_once_all_is_done_ends_no_other(tmp_path: Path, process: int):
    run = Run(tmp_path, "run", 2, breaks=f"leave {process}", train__tokens=2 * STEP)
    codes = run.wait()
    assert codes.pop(process) == -signal.SIGKILL and codes == [0]
    assert "ended without a word" not in run.said(1 - process)
    assert json.loads((run.workdir / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow  # half a minute
def test_a_batch_that_follows_its_noise_is_the_same_in_two_processes(tmp_path: Path):
    follow = {"schedule": "follow", "multiple": 0.03, "look_tokens": 2 * STEP, "hold": 1, "max_tokens": 4 * STEP}
    runs = [Run(tmp_path, f"run-{n}", n, **{f"batch__{key}": value for key, value in follow.items()}) for n in (1, 2)]
    for run in runs:
        assert run.wait() == [0] * len(run.processes), run.said(0)
    decisions = [[(r["tokens"], r["batch/batch_tokens"]) for r in run.records() if "batch/batch_tokens" in r] for run in runs]
    assert decisions[0] == decisions[1] and {batch for _, batch in decisions[0]} >= {STEP, 2 * STEP}
