"""Whether a change of the code left what is learnt as it was, and whether bfloat16 learns as float32 does.

    python benchmarks/losses_unchanged.py --against=DIR                    # another checkout, two minutes on two cores
    python benchmarks/losses_unchanged.py --seeds=5 --workdirs=runs/seeds  # ten runs of the demo, a quarter of an hour

With --against, steps in float32 of two shapes by both codes, from the same parameters on the same tokens of the built-in corpus, with the
noise measured and without: the largest relative difference of a step's loss, of an array of the parameters at the end (of its norm), and
of the norms of gradients. Exit code 1 if a loss differs by more than 1e-5.

With --seeds, the demo by `scaling-jax train` in float32 and bfloat16 for each seed, evaluated at its end. The difference of held-out
losses (bfloat16 less float32, nats a token), paired by seed: its mean and the standard error of that mean; beside them the standard error
of one run's held-out loss, of which documents were held out, which is the same for both. Exit code 1 if the mean is further from zero than
the standard error of one run. Runs in --workdirs that are finished are not run again.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import prepare_process
from reporting import Row, table, write_json

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"demo": {}, "width 64, depth 4": {"width": 64, "depth": 4, "context": 128, "mlp": "gelu", "mlp_ratio": 4.0}}
DTYPES = ("float32", "bfloat16")
TOLERANCE = 1e-5  # of a loss, relative
LOSS, LOSS_SE = "eval/heldout/loss", "eval/heldout/loss_se"


def train_steps(shape: str, measure: bool, steps: int) -> dict[str, np.ndarray]:
    """Losses and gradients' norms of the first steps, and the parameters after them, by the code that is installed."""
    import jax

    from scaling_jax import config as config_lib
    from scaling_jax.data.corpus import open_run_data
    from scaling_jax.train.batches import Batches
    from scaling_jax.train.step import Trainer

    config = config_lib.load(str(ROOT / "configs" / "cpu_demo.py"))
    config.model.update(SHAPES[shape])
    config.train.batch_tokens = 16 * config.model.context
    config.schedule.warmup_tokens = 4 * config.train.batch_tokens
    config.noise_scale.every = int(measure)
    trainer, source = Trainer(config), open_run_data(config).train
    batches, state, found = Batches(config, source, None), trainer.init(config.train.seed), []
    for step in range(steps):
        tokens_AxBxL = batches.place(batches.read((16 * step, 16)), 16)
        state, metrics = trainer.step(state, tokens_AxBxL, measure)
        found.append((float(metrics.loss), float(metrics.grad_norm)))
    losses_S, norms_S = np.array(found).T
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    return {"losses": losses_S, "gradient_norms": norms_S} | arrays


def by_code(checkout: Path, shape: str, measure: bool, steps: int) -> dict[str, np.ndarray]:
    """`train_steps` by the code of a checkout, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        task = json.dumps({"checkout": str(checkout), "shape": shape, "measure": measure, "steps": steps, "out": f"{folder}/found.npz"})
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        env["PYTHONPATH"] = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run([sys.executable, __file__, f"--task={task}"], env=env, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{checkout}: {(done.stderr.strip().splitlines() or [f'code {done.returncode}'])[-1]}")
        with np.load(f"{folder}/found.npz") as found:
            return dict(found)


def perform(task: dict[str, Any]) -> None:
    prepare_process()
    from scaling_jax import config

    home = Path(config.__file__).resolve().parents[1]
    if home != Path(task["checkout"]).resolve():
        raise SystemExit(f"is no checkout of this project; the code that would run is that of {home}")
    np.savez(task["out"], **train_steps(task["shape"], task["measure"], task["steps"]))


def code_rows(args: argparse.Namespace) -> Iterator[Row]:
    for shape in SHAPES:
        for measure in (False, True):
            ours, theirs = (by_code(checkout, shape, measure, args.steps) for checkout in (ROOT, args.against))
            yield {"shape": shape, "step": "measured" if measure else "plain", "steps": args.steps, **differences(ours, theirs)}


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> Row:
    """The largest relative ones."""
    series = {name: float(np.max(np.abs(ours[name] / theirs[name] - 1))) for name in ("losses", "gradient_norms")}
    arrays = [name for name in theirs if name not in series]
    if set(ours) != set(theirs):
        raise SystemExit(f"the two codes' parameters differ: {', '.join(sorted(set(ours) ^ set(theirs)))}")
    of_arrays = [float(np.linalg.norm(ours[name] - theirs[name]) / (np.linalg.norm(theirs[name]) or 1.0)) for name in arrays]
    return {**series, "parameters": max(of_arrays), "unchanged": series["losses"] <= TOLERANCE}


def run_demo(workdir: Path, seed: int, dtype: str) -> dict[str, Any]:
    """summary.json of the run, which is begun or continued if it is not finished."""
    summary = workdir / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "finished":
        flags = {"train.seed": seed, "model.compute_dtype": dtype, "checkpoint.every_tokens": 0}
        flags |= {"eval.every_tokens": 1_600_000, "eval.tokens": 1 << 16}
        config = [f"--config={ROOT}/configs/cpu_demo.py", *(f"--config.{name}={value}" for name, value in flags.items())]
        subprocess.run([sys.executable, "-m", "scaling_jax", "train", *config, f"--workdir={workdir}"], check=True, cwd=ROOT)
    return json.loads(summary.read_text())


def seed_rows(args: argparse.Namespace) -> Iterator[Row]:
    for seed in range(args.seeds):
        runs = {dtype: run_demo(args.workdirs / f"seed{seed}_{dtype}", seed, dtype) for dtype in DTYPES}
        losses = {dtype: run[LOSS] for dtype, run in runs.items()}
        difference = losses["bfloat16"] - losses["float32"]
        yield {"seed": seed, **losses, "difference": difference, "standard_error_of_a_run": runs["float32"][LOSS_SE]}


def mean_row(rows: list[Row]) -> Row:
    """Means over seeds, and the standard error of the mean difference."""
    names = (*DTYPES, "difference", "standard_error_of_a_run")
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    error = float(np.std([row["difference"] for row in rows], ddof=1)) / math.sqrt(len(rows))
    return {"seed": "mean", **means, "standard_error": error, "unchanged": abs(means["difference"]) <= means["standard_error_of_a_run"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout, whose first steps are compared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=0, help="compare bfloat16 with float32 over so many runs of the demo each, 2 at least")
    parser.add_argument("--workdirs", type=Path, help="directory for the runs, which are kept")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        return perform(json.loads(args.task))
    if (args.against is None) == (args.seeds == 0):
        parser.error("one of --against=DIR, a checkout, and --seeds=5 is wanted")
    if args.seeds and (args.seeds < 2 or args.workdirs is None):
        parser.error(f"--seeds={args.seeds}: must be 2 or more, with --workdirs=DIR for the runs")
    found = list(code_rows(args) if args.against else seed_rows(args))
    if args.seeds:
        found.append(mean_row(found))
    print(table(found))
    if args.json:
        write_json(args.json, args, found)
    raise SystemExit(0 if all(row.get("unchanged", True) for row in found) else 1)


if __name__ == "__main__":
    main()
