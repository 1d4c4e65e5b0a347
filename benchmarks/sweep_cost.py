"""What a study costs against training every cell of its table as a run of its own: 6 learning rates x 4 batches x 4 horizons.

    python benchmarks/sweep_cost.py

Core-seconds (user and system time) of `scaling-jax sweep` with all that it starts, against `scaling-jax train` once for each of the 96
cells, or for some learning rates of each batch and horizon, which cost alike, scaled up. Both compute on one thread a process, evaluate the
same held-out tokens, record every step, and write no TensorBoard events. Twice: with an empty cache of compiled programs, which the cells
then fill one after the other, and with what the first time left there. The held-out losses of both sides are compared. Then where the
difference comes from: horizons (each cell's tokens over those that a study trains on), members (seconds of a member's step alone over those
together), and starting up (a study and a run that end with their warmup, the cache filled).
"""

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from scaling_jax import results

LRS, BATCHES, HORIZONS = 6, 4, 4
CELLS = LRS * BATCHES * HORIZONS
FILE = """
from scaling_jax.config import default_config
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study

HORIZONS = {horizons}


def get_config():
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim, config.model.context = {width}, 2, 16, 64
    config.parametrization.base_width, config.parametrization.base_head_dim = 32, 16
    config.schedule.name, config.schedule.warmup_tokens = "constant", {warmup}
    config.noise_scale.window_tokens = {window}
    config.train.tokens, config.eval.tokens = HORIZONS[-1], 1 << 15
    config.logging.tensorboard = False
    return config


def get_study():
    points = grid.product(grid.over("train.batch_tokens", {batches}), grid.over("optimizer.lr", {lrs}))
    return Study(get_config(), points, horizons=HORIZONS)
"""


def core_seconds(cache: Path, *arguments: object) -> float:
    """User and system time of `scaling-jax` and its children."""
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "PJRT_NPROC": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "scaling_jax", *map(str, arguments)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train_seconds(folder: Path, file: Path, cache: Path, batch: int, lr: float, tokens: int) -> tuple[float, float]:
    """(core-seconds, held-out loss) of one cell as a run of its own."""
    run = folder / f"{batch}-{lr}-{tokens}"
    fields = {"train.batch_tokens": batch, "optimizer.lr": lr, "train.tokens": tokens}
    seconds = core_seconds(cache, "train", f"--config={file}", f"--workdir={run}", *(f"--config.{k}={v}" for k, v in fields.items()))
    return seconds, json.loads((run / "summary.json").read_text())["eval/heldout/loss"]


def member_seconds(study: Path) -> tuple[float, float]:
    """Of a member's step, over all classes: alone, and in a group of the size that was chosen."""
    classes = json.loads((study / "plan.json").read_text())["classes"].values()
    alone = together = 0.0
    for one in classes:
        timed = {int(size): seconds / int(size) for size, seconds in one["seconds_per_step"].items()}
        alone, together = alone + timed[1], together + timed[one["members"]]
    return alone, together


def measure(folder: Path, args: argparse.Namespace) -> dict:
    horizons = [args.tokens >> k for k in reversed(range(HORIZONS))]
    batches, lrs = [args.batch << k for k in range(BATCHES)], [2.0 ** (k / 2 - 9) for k in range(LRS)]
    warmup = horizons[0] // 8
    least = max(warmup, batches[-1])  # tokens that hold the warmup and a step

    def written(name: str, horizons: tuple[int, ...]) -> Path:
        fields = {"width": args.width, "window": args.tokens, "warmup": warmup, "batches": batches, "lrs": lrs}
        (folder / name).write_text(FILE.format(horizons=horizons, **fields))
        return folder / name

    file, shortest = written("study.py", tuple(horizons)), written("shortest.py", (least,))
    strata = list(itertools.product(batches, horizons))
    chosen = [(batch, lrs[(i + k) % LRS], tokens) for i, (batch, tokens) in enumerate(strata) for k in range(args.each)]
    rows, worst = {}, 0.0
    for state in ("empty", "filled"):

        def swept(file: Path, state: str = state) -> float:
            return core_seconds(folder / "cache_sweep", "sweep", f"--config={file}", f"--workdir={folder / state / file.stem}")

        def trained(batch: int, lr: float, tokens: int, state: str = state) -> tuple[float, float]:
            print(f"cache {state}: {tokens:,} tokens, batch {batch}, lr {lr:.3g}", file=sys.stderr, flush=True)
            return train_seconds(folder / state, file, folder / "cache_train", batch, lr, tokens)

        study = folder / state / file.stem
        together = swept(file)
        loss = results.load(study).set_index(["batch_tokens", "lr", "horizon_tokens"]).loss
        found = {cell: trained(*cell) for cell in chosen}
        worst = max(worst, *(abs(loss[cell] / own - 1) for cell, (_, own) in found.items()))
        apart = sum(seconds for seconds, _ in found.values()) * LRS / args.each
        starts = swept(shortest), sum(trained(batch, lrs[0], least)[0] for batch in batches) / BATCHES  # the first time fills the caches
        alone_step_s, together_step_s = member_seconds(study)
        rows[state] = {
            "sweep_core_s": together,
            "train_core_s": apart,
            "ratio": together / apart,
            "alone_step_s": alone_step_s,
            "together_step_s": together_step_s,
        }
    rows["filled"] |= {"sweep_start_core_s": starts[0], "train_start_core_s": starts[1], "train_starts_share": starts[1] * CELLS / apart}
    return {"cells": CELLS, "sampled": len(chosen), "tokens_ratio": sum(horizons) / horizons[-1], "worst_loss_difference": worst, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1 << 20, help="the last horizon; the others are halves of it")
    parser.add_argument("--batch", type=int, default=256, help="tokens of the smallest batch; the others are doubles of it")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--each", type=int, default=1, help="learning rates of each batch and horizon that are trained by themselves, of 6")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    if not 1 <= args.each <= LRS:
        parser.error(f"--each={args.each}: must be from 1 to {LRS}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; width {args.width}, {args.tokens:,} tokens at most")
    print(f"{found['cells']} cells, {found['sampled']} of them trained by themselves")
    print(f"held-out losses of the two differ by {found['worst_loss_difference']:.1e} of themselves at most")
    print(f"{'core-seconds':<44}{'cache empty':>12}{'filled':>12}")
    for name, key, form in (
        ("the study, by `scaling-jax sweep`", "sweep_core_s", ".0f"),
        ("every cell by `scaling-jax train`", "train_core_s", ".0f"),
        ("ratio", "ratio", ".3f"),
        ("the study at one horizon next to nothing", "sweep_start_core_s", ".0f"),
        ("a `train` of next to nothing", "train_start_core_s", ".1f"),
        (f"{CELLS} of these, share of every cell's sum", "train_starts_share", ".2f"),
    ):
        empty = f"{found['empty'][key]:{form}}" if key in found["empty"] else ""
        print(f"{name:<44}{empty:>12}{found['filled'][key]:>12{form}}")
    alone, together = (found["filled"][key] * 1e3 for key in ("alone_step_s", "together_step_s"))
    print(f"horizons   {found['tokens_ratio']:.3f} times the tokens if each cell is trained from the start")
    print(f"members    {alone / together:.2f} times the time if alone; steps of all batches: {alone:.1f} ms, together {together:.1f} ms")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
