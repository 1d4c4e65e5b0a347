"""Kills a training run again and again at random moments, and checks that nothing of it is lost.

    python benchmarks/kills.py --kills=50

A small run is trained once without interruption. Then the same command is started, killed with SIGKILL (a third of the time as
soon as a checkpoint is seen being written, sometimes while starting up, else at a random step) and started again, until it has
been killed so often and is let through to the end. metrics.jsonl (timings aside) and the final state must be identical, bit for bit.
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
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from scaling_jax.train.metrics import read_records

CONFIG = Path(__file__).parent.parent / "configs" / "cpu_demo.py"
TIMINGS = ("tokens_per_second",)
FIELDS = {
    "model.width": 16,
    "model.depth": 1,
    "model.head_dim": 8,
    "model.context": 16,
    "train.batch_tokens": 64,
    "schedule.warmup_tokens": 1000,
    "noise_scale.window_tokens": 20_000,
    "eval.tokens": 4096,
    "logging.tensorboard": False,
}


def command(workdir: Path, tokens: int) -> list[str]:
    fields = FIELDS | {"train.tokens": tokens, "checkpoint.every_tokens": tokens // 60, "eval.every_tokens": tokens // 7}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "-m", "scaling_jax", "train", f"--config={CONFIG}", f"--workdir={workdir}", *overrides]


def run_to_the_end(workdir: Path, tokens: int) -> str:
    """Runs the command; returns what it said on stderr."""
    done = subprocess.run(command(workdir, tokens), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}:\n{done.stderr}")
    return done.stderr


def kill_once(workdir: Path, tokens: int, rng: random.Random) -> str | None:
    """Starts the run and kills it; returns at which kind of moment, or None if it had finished before."""
    process = subprocess.Popen(command(workdir, tokens), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = workdir / "metrics.jsonl"
    kind = rng.choice(("checkpoint", "checkpoint", "step", "step", "step", "start"))
    started, size = time.monotonic(), metrics.stat().st_size if metrics.exists() else 0
    wait_seconds, wait_bytes = rng.uniform(0, 4), rng.uniform(0, 60_000)
    while process.poll() is None:
        grown = metrics.exists() and metrics.stat().st_size - size
        if (
            (kind == "start" and time.monotonic() - started > wait_seconds)
            or (kind == "step" and grown and grown > wait_bytes)
            or (kind == "checkpoint" and grown and grown > wait_bytes / 3 and any((workdir / "checkpoints").glob("*tmp*")))
        ):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return kind
        time.sleep(0.0005)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}:\n{process.stderr.read()}")
    return None


def comparable(workdir: Path) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in read_records(workdir)]


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """The arrays of the last checkpoint, by path."""
    last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    tree = ocp.StandardCheckpointer().restore((last / "default").absolute())
    flat = ocp.tree.to_flat_dict(tree, sep=".") if hasattr(ocp.tree, "to_flat_dict") else tree
    return {str(key): np.asarray(value) for key, value in flat.items()}


def compare(expected: Path, found: Path) -> None:
    """AssertionError unless both runs wrote the same records and the same final state, bit for bit."""
    a, b = comparable(expected), comparable(found)
    different = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    assert different is None, f"record {different} differs:\n{a[different]}\n{b[different]}"
    assert len(a) == len(b), f"{len(a)} records, {len(b)} after kills"
    x, y = final_state(expected), final_state(found)
    assert x.keys() == y.keys() and len(x) > 10
    for name in x:
        assert x[name].tobytes() == y[name].tobytes(), f"{name} differs"


def trial(folder: Path, kills: int, tokens: int, seed: int) -> list[str]:
    """One uninterrupted run, one that is killed `kills` times; compares them. Returns the kinds of moment."""
    rng = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    if not whole.exists():
        run_to_the_end(whole, tokens)
    moments: list[str] = []
    while len(moments) < kills:
        moment = kill_once(killed, tokens, rng)
        if moment is None:
            break
        moments.append(moment)
    run_to_the_end(killed, tokens)
    compare(whole, killed)
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=256_000, help="length of the run; 64 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for trial_number in range(args.kills):
            if len(moments) >= args.kills:
                break
            killed = Path(folder) / "killed"
            if killed.exists():
                killed.rename(Path(folder) / f"killed_{trial_number}")
            moments += trial(Path(folder), args.kills - len(moments), args.tokens, args.seed + trial_number)
            print(f"{len(moments)} kills, all runs identical", flush=True)
    print(json.dumps({kind: moments.count(kind) for kind in sorted(set(moments))}))


if __name__ == "__main__":
    main()
