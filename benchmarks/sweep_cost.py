"""What a study costs against training every cell of its table as a run of its own: 6 learning rates x 4 batches x 4 horizons.

    python benchmarks/sweep_cost.py

Core-seconds (user and system time) of `scaling-jax sweep` with all that it starts, against `scaling-jax train` once for each of the 96
cells, or for a sample of them, of each horizon as many, evenly spread over batches and learning rates, and scaled up by the number of cells
of that horizon. Both compute on one thread a process, evaluate the same held-out tokens, record every step, and write no TensorBoard
events. Twice: with an empty cache of compiled programs, which the cells then fill one after the other, and with what the first time left
there. The held-out losses of both sides are compared. Then where the difference comes from: horizons (each cell's tokens over those that a
study trains on), members (seconds of a member's step alone over those together), and starting up (a run that ends with its warmup).
"""

import argparse
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
    config.noise_scale.window_tokens = HORIZONS[-1]
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


def sampled(cells: list[tuple[int, float]], of_horizon: int, turn: int) -> list[tuple[int, float]]:
    """So many of (batch, lr), evenly spread, other ones for each horizon."""
    return [cells[(i * len(cells) // of_horizon + turn) % len(cells)] for i in range(of_horizon)]


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


def training_seconds(study: Path) -> float:
    """That its groups, each on one thread, trained and evaluated for."""
    return sum(json.loads(path.read_text())["seconds"] for path in study.glob("groups/*/group.json"))


def measure(folder: Path, args: argparse.Namespace) -> dict:
    horizons = [args.tokens >> k for k in reversed(range(HORIZONS))]
    batches, lrs = [args.batch << k for k in range(BATCHES)], [2.0 ** (k / 2 - 9) for k in range(LRS)]
    file = folder / "study.py"
    warmup = horizons[0] // 8
    file.write_text(FILE.format(horizons=tuple(horizons), width=args.width, warmup=warmup, batches=batches, lrs=lrs))
    cells = [(batch, lr) for batch in batches for lr in lrs]
    caches, rows, worst = {"sweep": folder / "cache_sweep", "train": folder / "cache_train"}, {}, 0.0
    for state in ("empty", "filled"):
        study = folder / f"study_{state}"
        swept = core_seconds(caches["sweep"], "sweep", f"--config={file}", f"--workdir={study}")
        table = results.load(study).set_index(["batch_tokens", "lr", "horizon_tokens"]).loss
        apart = 0.0
        for turn, tokens in enumerate(horizons):
            chosen = sampled(cells, args.sample // HORIZONS, turn)
            for batch, lr in chosen:
                print(f"{state}: {tokens:,} tokens, batch {batch}, lr {lr:.3g}", file=sys.stderr, flush=True)
                seconds, loss = train_seconds(folder / f"runs_{state}", file, caches["train"], batch, lr, tokens)
                apart += seconds * len(cells) / len(chosen)
                worst = max(worst, abs(table[batch, lr, tokens] / loss - 1))
        shortest = [(batch, lrs[0], max(batch, warmup)) for batch in batches]
        start = sum(train_seconds(folder / f"start_{state}", file, caches["train"], *cell)[0] for cell in shortest) / BATCHES
        alone, together = member_seconds(study)
        rows[state] = {
            "sweep_core_s": swept,
            "train_core_s": apart,
            "ratio": swept / apart,
            "start_core_s": start,
            "starts_share": start * len(cells) * HORIZONS / apart,
            "sweep_not_training_s": swept - training_seconds(study),
            "alone_step_s": alone,
            "together_step_s": together,
        }
    tokens_ratio = sum(horizons) / horizons[-1]
    return {"cells": len(cells) * HORIZONS, "sampled": args.sample, "tokens_ratio": tokens_ratio, "worst_loss_difference": worst, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1 << 20, help="the last horizon; the others are halves of it")
    parser.add_argument("--batch", type=int, default=256, help="tokens of the smallest batch; the others are doubles of it")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--sample", type=int, default=24, help="cells that are trained by themselves, of 96; a multiple of 4")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    if args.sample % HORIZONS or not HORIZONS <= args.sample <= LRS * BATCHES * HORIZONS:
        parser.error(f"--sample={args.sample}: must be a multiple of {HORIZONS}, at most {LRS * BATCHES * HORIZONS}")
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
        ("one `train` that only starts", "start_core_s", ".1f"),
        ("starts, share of every cell's sum", "starts_share", ".2f"),
        ("the study, all but its groups' training", "sweep_not_training_s", ".0f"),
    ):
        print(f"{name:<44}{found['empty'][key]:>12{form}}{found['filled'][key]:>12{form}}")
    alone, together = (found["filled"][key] * 1e3 for key in ("alone_step_s", "together_step_s"))
    print(f"horizons   {found['tokens_ratio']:.3f} times the tokens if each cell is trained from the start")
    print(f"members    {alone / together:.2f} times the time if alone; steps of all batches: {alone:.1f} ms, together {together:.1f} ms")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
