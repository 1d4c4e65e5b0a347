"""A batch that follows the noise scale against a constant one: the same tokens, how many steps, and what loss.

    python benchmarks/follow.py --seeds=3
    python benchmarks/follow.py --seeds=2 --tokens=160000       # a look at a tenth of it

Trains configs/cpu_demo.py with its batch, and again with batch.schedule=follow from the same batch on, with each of some values of
batch.multiple and batch.lr_rule, for each seed. All runs of a seed begin with the same parameters and read the same data in the same
order; the held-out sequences are the same in all. The difference of the final held-out losses is taken in pairs, and its standard
error over the seeds.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from scaling_jax.config import load, validate
from scaling_jax.process import keep_freed_memory, use_compilation_cache
from scaling_jax.train.batch_size import KEY
from scaling_jax.train.loop import train
from scaling_jax.train.metrics import read_records

CONFIG = Path(__file__).parent.parent / "configs" / "cpu_demo.py"
FEWER = 0.25  # of the steps, at no more loss: what following is to save


def demo(seed: int, tokens: int, window_tokens: int, **batch: Any) -> ConfigDict:
    """The demo, `tokens` long; lengths that were chosen for its own are scaled alike."""
    config = load(str(CONFIG))
    scale = tokens / config.train.tokens
    config.schedule.warmup_tokens = round(config.schedule.warmup_tokens * scale)
    config.noise_scale.window_tokens = window_tokens or round(config.noise_scale.window_tokens * scale)
    config.train.tokens, config.train.seed = tokens, seed
    config.eval.every_tokens = config.checkpoint.every_tokens = 0
    config.eval.tokens = 0  # all that is held out
    config.logging.tensorboard = False
    config.batch.update(batch)
    validate(config)
    return config


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    summary = train(config, workdir)
    if summary["status"] != "finished":
        raise SystemExit(f"{workdir.name}: {summary['status']} at {summary['tokens']:,} tokens")
    grown, batch_tokens = [], config.train.batch_tokens
    for record in read_records(workdir):
        if record.get(KEY, batch_tokens) > batch_tokens:
            batch_tokens = record[KEY]
            grown.append((record["tokens"], batch_tokens))
    return {
        "loss": summary["eval/heldout/loss"],
        "loss_se": summary["eval/heldout/loss_se"],
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "seconds": summary["timing"]["seconds"],
        "grown": grown,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1_600_000)
    parser.add_argument("--multiples", default="1,2,4", help="values of config.batch.multiple, comma-separated")
    parser.add_argument("--lr_rules", default="sqrt,none", help="values of config.batch.lr_rule, comma-separated")
    parser.add_argument("--window_tokens", type=int, default=0, help="config.noise_scale.window_tokens; the demo's if not given")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    args = parser.parse_args()
    use_compilation_cache()
    keep_freed_memory()
    arms: dict[str, dict[str, Any]] = {"constant": {}}
    for rule in args.lr_rules.split(","):
        for multiple in map(float, args.multiples.split(",")):
            arms[f"multiple {multiple:g}, lr {rule}"] = {"schedule": "follow", "lr_rule": rule, "multiple": multiple}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for i, (name, batch) in enumerate(arms.items()):
                found[name].append(one := run(demo(seed, args.tokens, args.window_tokens, **batch), Path(folder) / f"{seed}-{i}"))
                grown = ", ".join(f"{batch_tokens} from {tokens:,}" for tokens, batch_tokens in one["grown"])
                took = f"{one['steps']} steps, {one['tokens']:,} tokens, {one['seconds']:.0f} s"
                print(f"seed {seed} {name:<22} loss {one['loss']:.4f} in {took}{f'; batch {grown}' if grown else ''}", flush=True)
    print(f"\n{'':<22}{'steps':>8}{'fewer':>8}{'loss':>9}{'over constant':>16}{'± s.e.':>9}  no higher loss, a quarter fewer steps")
    for name, runs in found.items():
        loss, steps = (np.array([one[key] for one in runs]) for key in ("loss", "steps"))
        base_loss, base_steps = (np.array([one[key] for one in found["constant"]]) for key in ("loss", "steps"))
        excess, fewer = loss - base_loss, 1 - steps.sum() / base_steps.sum()
        error = excess.std(ddof=1) / np.sqrt(len(excess)) if len(excess) > 1 else float("nan")
        reached = "" if name == "constant" else "yes" if excess.mean() <= 2 * error and fewer >= FEWER else "no"
        print(f"{name:<22}{steps.mean():>8.0f}{fewer:>8.1%}{loss.mean():>9.4f}{excess.mean():>+16.4f}{error:>9.4f}  {reached}")
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": str(args.json)}, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
