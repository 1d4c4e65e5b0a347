"""Kills a study again and again at random moments, its driver, a worker or all of them, and checks that its table is the same.

    python benchmarks/sweep_kills.py --kills=20

A study of 24 points (6 learning rates, 2 batch sizes, 2 seeds) with 3 horizons is started, killed with SIGKILL (while it starts and
measures, a random moment after a group got further, or as soon as a checkpoint is seen being written) and started again, until it has
been killed so often and is let through to the end. What was decided by measuring, plan.json, is then given to a second directory, where
the same study runs without interruption. The tables (seconds aside) and all records of training must be identical, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd

from scaling_jax import results

STUDY = """
from scaling_jax.config import default_config
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study


def get_study():
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim, config.model.context = 16, 1, 8, 16
    config.parametrization.base_width, config.parametrization.base_head_dim = 16, 8
    config.schedule.name = "constant"
    config.eval.tokens = 1024
    config.checkpoint.every_tokens = {tokens} // 16
    points = grid.product(
        grid.over("train.batch_tokens", (64, 128)),
        grid.over("train.seed", tuple(range({seeds}))),
        grid.over("optimizer.lr", grid.geometric(2**-9, 2**-6.5, 2**0.5)[:{lrs}]),
    )
    return Study(config, points, horizons=({tokens} // 4, {tokens} // 2, {tokens}), max_members={members})
"""


def write_study(folder: Path, tokens: int, seeds: int = 2, lrs: int = 6, members: int = 4) -> Path:
    path = folder / "study.py"
    path.write_text(STUDY.format(tokens=tokens, seeds=seeds, lrs=lrs, members=members))
    return path


def start(study: Path, workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "scaling_jax", "sweep", f"--config={study}", f"--workdir={workdir}", "--workers=2"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> int:
    """Its exit code: 0, or 1 where a group's worker was killed too often; RuntimeError for any other."""
    _, err = process.communicate()
    if process.returncode not in (0, 1):
        raise RuntimeError(f"exit code {process.returncode}:\n{err}")
    return process.returncode


def workers_of(process: subprocess.Popen) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process.pid:
                found.append(int(stat.parent.name))
        except (OSError, ValueError):  # it ended
            continue
    return found


def kill_once(process: subprocess.Popen, workdir: Path, rng: random.Random) -> tuple[str, str] | None:
    """Kills at a random moment; returns at which kind of moment and whom, or None if the study was finished before."""
    kind, whom = rng.choice(("start", "step", "step", "checkpoint")), rng.choice(("driver", "worker", "all"))
    started, wait_seconds = time.monotonic(), rng.uniform(0, 8) if kind == "start" else rng.uniform(0, 1)
    seen, moved = _written(workdir), None
    while process.poll() is None:
        now = time.monotonic()
        if moved is None and _written(workdir) != seen:
            moved = now
        due = {
            "start": now - started > wait_seconds,
            "step": moved is not None and now - moved > wait_seconds,
            "checkpoint": moved is not None and now - moved > wait_seconds and any(workdir.glob("groups/*/*/checkpoints/*tmp*")),
        }
        if due[kind] or now - started > 60:
            workers = workers_of(process)
            victims = {"driver": [], "worker": rng.sample(workers, min(1, len(workers))), "all": workers}[whom]
            for pid in [process.pid] * (whom != "worker") + victims:
                os.kill(pid, signal.SIGKILL)
            if whom != "worker":
                process.communicate()
            return kind, whom
        time.sleep(0.002)
    return None


def _written(workdir: Path) -> float:
    return max((path.stat().st_mtime for path in workdir.glob("groups/*/group.json")), default=0.0)


def compare(expected: Path, found: Path) -> None:
    """AssertionError unless tables and records are the same, bit for bit."""
    for read in (results.load, results.curves):
        a, b = (read(directory) for directory in (expected, found))
        a, b = (table.drop(columns="seconds", errors="ignore") for table in (a, b))
        assert len(a) > 0
        pd.testing.assert_frame_equal(a, b, check_exact=True)


def trial(folder: Path, kills: int, tokens: int, seed: int, **size: int) -> list[tuple[str, str]]:
    """One study that is killed so often, one that is not; compares them. Returns the moments."""
    rng = random.Random(seed)
    study, whole, killed = write_study(folder, tokens, **size), folder / "whole", folder / "killed"
    moments: list[tuple[str, str]] = []
    process = start(study, killed)
    while len(moments) < kills:
        moment = kill_once(process, killed, rng)
        if moment is None:
            finish(process)
            break
        moments.append(moment)
        if process.poll() is not None:
            process = start(study, killed)
    while finish(process):
        process = start(study, killed)
    whole.mkdir()
    (whole / "plan.json").write_bytes((killed / "plan.json").read_bytes())
    if finish(start(study, whole)):
        raise RuntimeError("a group failed that was not killed")
    compare(whole, killed)
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=400_000, help="the last horizon")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        moments = trial(Path(folder), args.kills, args.tokens, args.seed)
        table = results.load(Path(folder) / "whole")
    print(f"{len(moments)} kills of {len(table)} cells of {table['point'].nunique()} points; both tables are identical, bit for bit")
    print(json.dumps({" of ".join(moment): count for moment, count in sorted(Counter(moments).items())}))


if __name__ == "__main__":
    main()
