"""Wall time of the train step with the gradient noise measured, over the step without.

    python benchmarks/noise_overhead.py                            # under a minute on two cores
    python benchmarks/noise_overhead.py --dtype=bfloat16 --json=overhead.json

Both programs run on one state in one process, in blocks of a few steps that alternate: a machine that grows slower or faster
does so for both. Each pair of neighbouring blocks gives one ratio, and every other pair runs in the opposite order. The table
shows the median ratio and its quartiles: what the quartiles span is the machine's unrest and not the method's. The same goes for
the row that compares the plain step with itself, whose ratio should be 1.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from scaling_jax.config import default_config
from scaling_jax.train.step import Trainer


class Ratio(NamedTuple):
    """Milliseconds per step of both programs (medians), and quartiles of the paired ratios."""

    plain_ms: float
    other_ms: float
    low: float
    median: float
    high: float


def main() -> None:
    args = _arguments()
    config = _config(args)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['device']}, jax {machine['jax']}")
    trainer = Trainer(config)
    parameters = sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params))
    print(
        f"width {args.width}, depth {args.depth}, context {args.context}, {args.sequences} sequences, "
        f"vocabulary {args.vocab_size}, {args.dtype}, {parameters / 1e6:.2f}M parameters; {args.pairs} pairs of {args.steps} steps"
    )
    timer = Timer(trainer, args.sequences)
    ratios = {
        "measured / plain": timer.compare(True, args.pairs, args.steps),
        "plain / plain": timer.compare(False, args.pairs, args.steps),
    }
    print(f"\n{'':<18}{'plain ms':>10}{'other ms':>10}{'median':>9}{'quartiles':>17}")
    for name, r in ratios.items():
        print(f"{name:<18}{r.plain_ms:>10.1f}{r.other_ms:>10.1f}{r.median:>9.3f}{f'{r.low:.3f} to {r.high:.3f}':>17}")
    if args.json:
        result = {"machine": machine, "arguments": vars(args), "ratios": {name: r._asdict() for name, r in ratios.items()}}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


class Timer:
    """One train state that both steps carry on, so that neither has memory of its own."""

    def __init__(self, trainer: Trainer, sequences: int):
        config = trainer.config
        shape = (config.train.accumulation, sequences // config.train.accumulation, config.model.context + 1)
        self.tokens_AxBxL = jnp.asarray(np.random.default_rng(0).integers(0, config.model.vocab_size, shape), jnp.int32)
        self.trainer, self.state = trainer, trainer.init(config.train.seed)
        for measure in (False, True):
            self.seconds(measure, steps=2)  # compiles

    def seconds(self, measure: bool, steps: int) -> float:
        """Wall time per step. The state is donated to each step and comes back from it."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.trainer.step(self.state, self.tokens_AxBxL, measure)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps

    def compare(self, measure: bool, pairs: int, steps: int) -> Ratio:
        """The step with `measure` over the plain one."""

        def plain() -> float:
            return self.seconds(False, steps)

        def other() -> float:
            return self.seconds(measure, steps)

        return paired_ratio(plain, other, pairs)


def paired_ratio(plain: Callable[[], float], other: Callable[[], float], pairs: int) -> Ratio:
    times = []
    for pair in range(pairs):
        if pair % 2:
            b, a = other(), plain()
        else:
            a, b = plain(), other()
        times.append((a, b))
    a_N, b_N = np.asarray(times).T
    low, median, high = np.quantile(b_N / a_N, [0.25, 0.5, 0.75])
    return Ratio(float(1e3 * np.median(a_N)), float(1e3 * np.median(b_N)), float(low), float(median), float(high))


def describe_machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    device = jax.devices()[0]
    return {"cpu": cpu, "cores": os.cpu_count(), "device": f"{device.platform} ({device.device_kind})", "jax": jax.__version__}


def _config(args: argparse.Namespace) -> ConfigDict:
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim = args.width, args.depth, args.head_dim
    config.model.context, config.model.vocab_size = args.context, args.vocab_size
    config.model.mlp, config.model.remat, config.model.tied_embeddings = args.mlp, args.remat, args.tied_embeddings
    config.model.compute_dtype = args.dtype
    config.train.batch_tokens = args.sequences * args.context
    config.train.accumulation = args.accumulation
    return config


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of measuring the gradient noise scale at every step.")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=16, help="per step")
    parser.add_argument("--accumulation", type=int, default=1, help="microbatches that the sequences are divided into")
    parser.add_argument("--vocab_size", type=int, default=512)
    parser.add_argument("--mlp", choices=("gelu", "relu2", "swiglu"), default="gelu")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--tied_embeddings", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations and products")
    parser.add_argument("--pairs", type=int, default=20, help="paired blocks")
    parser.add_argument("--steps", type=int, default=2, help="steps in a block")
    parser.add_argument("--json", help="file to write the numbers to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
