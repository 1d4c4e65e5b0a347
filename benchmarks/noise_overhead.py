"""Time of the train step with the gradient noise measured, over the step without.

    python benchmarks/noise_overhead.py                            # about a minute on two cores
    python benchmarks/noise_overhead.py --dtype=bfloat16 --every=8 --json=overhead.json

Both programs carry on one state in one process, in blocks of a few steps that alternate: a machine that grows slower or faster
does so for both. Each pair of neighbouring blocks gives one ratio, and every other pair runs in the opposite order. The table
shows the median ratio and its quartiles, which span the machine's unrest and not the method's: the last row compares the plain
step with itself, and should say 1. "preconditioned" measures in AdamW's metric as well. With --every=N, one step in N is measured. The row
"usual" compares with a plain step whose layers are einsum("bli,io->blo", x, w), one for each matrix, as they are usually written: XLA's
CPU backend is slow at the gradient of that form, so `plain` here does better.

Where other programs run too, CPU time (of this process, all its threads) is the steadier of the two clocks; on an accelerator
only wall time means anything.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from scaling_jax import model
from scaling_jax.config import default_config
from scaling_jax.train.step import Trainer


class Time(NamedTuple):
    """Seconds per step."""

    wall: float
    cpu: float  # of this process's threads together


class Ratio(NamedTuple):
    """Medians of milliseconds per step, and quartiles of the paired ratios."""

    below_ms: float
    above_ms: float
    low: float
    median: float
    high: float


def main() -> None:
    args = _arguments()
    config = _config(args)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['platform']} {machine['device']}, jax {machine['jax']}")
    trainer = Trainer(config)
    parameters = sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params))
    print(
        f"width {args.width}, depth {args.depth}, context {args.context}, {args.sequences} sequences, "
        f"vocabulary {args.vocab_size}, {args.dtype}, {parameters / 1e6:.2f}M parameters; {args.pairs} pairs of {args.steps} steps"
    )
    timer = Timer(trainer, args.sequences, args.every)
    timer.measured(args.every)  # compiles
    config.noise_scale.preconditioned = True
    both = Timer(Trainer(config), args.sequences, args.every)
    both.measured(args.every)
    config.noise_scale.preconditioned = False
    with mock.patch.object(model, "unembed", usual_dense), mock.patch.object(model, "dense_many", usual_dense_many):
        usual = Timer(Trainer(config), args.sequences)
    comparisons = {
        "measured / plain": compare(timer.plain, timer.measured, args.pairs, args.steps),
        "preconditioned / plain": compare(both.plain, both.measured, args.pairs, args.steps),
        "measured / usual": compare(usual.plain, timer.measured, args.pairs, args.steps),
        "plain / plain": compare(timer.plain, timer.plain, args.pairs, args.steps),
    }
    clocks = Time._fields if machine["platform"] == "cpu" else ("wall",)
    print(f"\n{'':<24}{'clock':<6}{'below ms':>10}{'above ms':>10}{'median':>9}{'quartiles':>17}")
    for name, ratios in comparisons.items():
        for clock in clocks:
            r = ratios[clock]
            print(f"{name:<24}{clock:<6}{r.below_ms:>10.1f}{r.above_ms:>10.1f}{r.median:>9.3f}{f'{r.low:.3f} to {r.high:.3f}':>17}")
    peaks = [peak_bytes(t, args.sequences, measure) for t, measure in ((trainer, False), (trainer, True), (both.trainer, True))]
    print("peak memory, MB: " + ", ".join(f"{name} {peak / 1e6:.1f}" for name, peak in zip(PROGRAMS, peaks, strict=True)))
    print("over plain: " + ", ".join(f"{name} {peak / peaks[0]:.3f}" for name, peak in zip(PROGRAMS[1:], peaks[1:], strict=True)))
    if args.json:
        numbers = {name: {clock: ratios[clock]._asdict() for clock in clocks} for name, ratios in comparisons.items()}
        memory = dict(zip(PROGRAMS, peaks, strict=True))
        result = {"machine": machine, "arguments": vars(args), "ratios": numbers, "peak_bytes": memory}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


PROGRAMS = ("plain", "measured", "preconditioned")


def peak_bytes(trainer: Trainer, sequences: int, measure: bool) -> int:
    """Of the compiled step: its arguments and the most that it holds beside them at one time."""
    memory = trainer.lower_step(sequences, measure).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def usual_dense(x_BxLxI: jax.Array, w_IxO: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """A layer as it is usually written, and as autodiff then differentiates it."""
    return jnp.einsum("bli,io->blo", x_BxLxI, w_IxO.astype(x_BxLxI.dtype))


def usual_dense_many(x_BxLxI: jax.Array, ws_IxO: Sequence[jax.Array], *_: Any, **__: Any) -> list[jax.Array]:
    return [usual_dense(x_BxLxI, w_IxO) for w_IxO in ws_IxO]


class Timer:
    """One train state that both steps of a trainer carry on."""

    def __init__(self, trainer: Trainer, sequences: int, every: int = 1):
        config = trainer.config
        shape = (config.train.accumulation, sequences // config.train.accumulation, config.model.context + 1)
        self.tokens_AxBxL = jnp.asarray(np.random.default_rng(0).integers(0, config.model.vocab_size, shape), jnp.int32)
        self.trainer, self.state, self.every = trainer, trainer.init(config.train.seed), every
        self.plain(2)  # compiles

    def plain(self, steps: int) -> Time:
        return self.timed(0, steps * self.every)

    def measured(self, steps: int) -> Time:
        return self.timed(self.every, steps * self.every)

    def timed(self, every: int, steps: int) -> Time:
        """Each step takes the state's memory and gives it back as the next state's."""
        wall, cpu = time.perf_counter(), time.process_time()
        for step in range(steps):
            self.state, _ = self.trainer.step(self.state, self.tokens_AxBxL, bool(every) and step % every == 0)
        jax.block_until_ready(self.state)
        return Time((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)


def compare(below: Callable[[int], Time], above: Callable[[int], Time], pairs: int, steps: int) -> dict[str, Ratio]:
    """The second program over the first, by each clock."""
    times = []
    for pair in range(pairs):
        if pair % 2:
            b, a = above(steps), below(steps)
        else:
            a, b = below(steps), above(steps)
        times.append((a, b))
    times_NxPxC = np.asarray(times)  # pair, program, clock
    return {clock: paired_ratio(times_NxPxC[:, 0, c], times_NxPxC[:, 1, c]) for c, clock in enumerate(Time._fields)}


def paired_ratio(below_N: np.ndarray, above_N: np.ndarray) -> Ratio:
    low, median, high = np.quantile(above_N / below_N, [0.25, 0.5, 0.75])
    return Ratio(*(float(x) for x in (1e3 * np.median(below_N), 1e3 * np.median(above_N), low, median, high)))


def describe_machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    device = jax.devices()[0]
    return {"cpu": cpu, "cores": os.cpu_count(), "platform": device.platform, "device": device.device_kind, "jax": jax.__version__}


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
    parser.add_argument("--every", type=int, default=1, help="steps of which one is measured")
    parser.add_argument("--pairs", type=int, default=10, help="paired blocks")
    parser.add_argument("--steps", type=int, default=2, help="steps in a block")
    parser.add_argument("--json", help="file to write the numbers to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
