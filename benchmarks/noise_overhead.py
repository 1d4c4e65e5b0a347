"""Time of the train step with the gradient noise measured, over the step without.

    python benchmarks/noise_overhead.py                            # about a minute on two cores
    python benchmarks/noise_overhead.py --dtype=bfloat16 --every=8 --json=overhead.json
    python benchmarks/noise_overhead.py --standard                 # float32, bfloat16, bfloat16 at the default noise_scale.every

Both programs carry on one state in one process, in blocks of a few steps that alternate: a machine that grows slower or faster
does so for both. Each pair of neighbouring blocks gives one ratio, and every other pair runs in the opposite order. The table
shows the median ratio and its quartiles, which span the machine's unrest and not the method's: "plain / plain" compares the plain
step with itself, and should say 1. "preconditioned" measures in AdamW's metric as well. With --every=N, one step in N is measured. The row
"usual" compares with a plain step whose layers are einsum("bli,io->blo", x, w), one for each matrix, as they are usually written: XLA's
CPU backend is slow at the gradient of that form, so `plain` here does better. "peak memory" is a ratio too: of a step's arguments and
the most that it holds beside them.

Where other programs run too, CPU time (of this process, all its threads) is the steadier of the two clocks; on an accelerator
only wall time means anything.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numpy as np
from alternate import Quartiles, quartiles
from machine import describe_machine, machine_line, prepare_process
from ml_collections import ConfigDict
from reporting import Row, table, write_json

from scaling_jax.config import default_config

if TYPE_CHECKING:  # JAX is imported once the process is prepared
    from jax import Array


class Time(NamedTuple):
    """Seconds per step."""

    wall: float
    cpu: float  # of this process's threads together


class Ratio(NamedTuple):
    """Medians of milliseconds per step, and the paired ratios."""

    below_ms: float
    above_ms: float
    ratio: Quartiles


def main() -> None:
    args = _arguments()
    prepare_process()
    print(machine_line(describe_machine()))
    shape = f"width {args.width}, depth {args.depth}, context {args.context}, {args.sequences} sequences, vocabulary {args.vocab_size}"
    print(f"{shape}; {args.pairs} pairs of {args.steps} measured steps\n")
    rows = []
    for dtype, every in _settings(args):
        print(f"{dtype}, every {every}", file=sys.stderr)
        rows += setting_rows(args, dtype, every)
    print(table(rows))
    if args.json:
        write_json(args.json, args, rows)


def _settings(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(dtype, steps of which one is measured)."""
    if not args.standard:
        return [(args.dtype, args.every)]
    return list(dict.fromkeys([("float32", 1), ("bfloat16", 1), ("bfloat16", default_config().noise_scale.every)]))


def setting_rows(args: argparse.Namespace, dtype: str, every: int) -> Iterator[Row]:
    import jax

    from scaling_jax.model import transformer, weights

    def timer(preconditioned: bool = False) -> Timer:
        return Timer(_config(args, dtype, preconditioned), args.sequences, every)

    own, both = timer(), timer(preconditioned=True)
    with mock.patch.object(transformer, "unembed", usual_dense), mock.patch.object(weights, "dense_many", usual_dense_many):
        usual = timer()
        usual.plain(1)  # compiles
    peak, measured_peak, both_peak = own.peak_bytes(False), own.peak_bytes(True), both.peak_bytes(True)
    clocks = Time._fields if jax.default_backend() == "cpu" else ("wall",)
    for name, below, above, memory in (
        ("measured / plain", own.plain, own.measured, measured_peak / peak),
        ("preconditioned / plain", own.plain, both.measured, both_peak / peak),
        ("measured / usual", usual.plain, own.measured, None),
        ("plain / plain", own.plain, own.plain, 1.0),
    ):
        ratios = compare(below, above, args.pairs, args.steps)
        for clock in clocks:
            r = ratios[clock]
            times = {"below_ms": r.below_ms, "above_ms": r.above_ms, "ratio": r.ratio.median, "low": r.ratio.low, "high": r.ratio.high}
            yield {"step": name, "dtype": dtype, "every": every, "clock": clock, **times, "peak_memory": memory}


def usual_dense(x_BxLxI: "Array", w_IxO: "Array", *_: Any, **__: Any) -> "Array":
    """A layer as it is usually written, and as autodiff then differentiates it."""
    import jax.numpy as jnp

    return jnp.einsum("bli,io->blo", x_BxLxI, w_IxO.astype(x_BxLxI.dtype))


def usual_dense_many(x_BxLxI: "Array", ws_IxO: Sequence["Array"], *_: Any, **__: Any) -> list["Array"]:
    return [usual_dense(x_BxLxI, w_IxO) for w_IxO in ws_IxO]


class Timer:
    """One train state that both steps of a trainer carry on."""

    def __init__(self, config: ConfigDict, sequences: int, every: int = 1):
        import jax.numpy as jnp

        from scaling_jax.train.step import Trainer

        shape = (config.train.accumulation, sequences // config.train.accumulation, config.model.context + 1)
        self.tokens_AxBxL = jnp.asarray(np.random.default_rng(0).integers(0, config.model.vocab_size, shape), jnp.int32)
        self.trainer = Trainer(config)
        self.state, self.every, self.sequences = self.trainer.init(config.train.seed), every, sequences

    def plain(self, steps: int) -> Time:
        return self.timed(0, steps * self.every)

    def measured(self, steps: int) -> Time:
        return self.timed(self.every, steps * self.every)

    def timed(self, every: int, steps: int) -> Time:
        """Each step takes the state's memory and gives it back as the next state's."""
        import jax

        wall, cpu = time.perf_counter(), time.process_time()
        for step in range(steps):
            self.state, _ = self.trainer.step(self.state, self.tokens_AxBxL, bool(every) and step % every == 0)
        jax.block_until_ready(self.state)
        return Time((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)

    def peak_bytes(self, measure: bool) -> int:
        """Of the compiled step: its arguments and the most that it holds beside them at one time."""
        memory = self.trainer.lower_step(self.sequences, measure).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def compare(below: Callable[[int], Time], above: Callable[[int], Time], pairs: int, steps: int) -> dict[str, Ratio]:
    """The second program over the first, by each clock."""
    below(1), above(1)  # compile
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
    return Ratio(1e3 * float(np.median(below_N)), 1e3 * float(np.median(above_N)), quartiles(above_N / below_N))


def _config(args: argparse.Namespace, dtype: str, preconditioned: bool) -> ConfigDict:
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim = args.width, args.depth, args.head_dim
    config.model.context, config.model.vocab_size = args.context, args.vocab_size
    config.model.mlp, config.model.remat, config.model.tied_embeddings = args.mlp, args.remat, args.tied_embeddings
    config.model.compute_dtype = dtype
    config.train.batch_tokens = args.sequences * args.context
    config.train.accumulation = args.accumulation
    config.noise_scale.preconditioned = preconditioned
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
    parser.add_argument(
        "--standard", action="store_true", help="the settings that docs/performance.md shows, instead of --dtype and --every"
    )
    parser.add_argument("--pairs", type=int, default=10, help="paired blocks")
    parser.add_argument("--steps", type=int, default=2, help="measured steps in a block")
    parser.add_argument("--json", help="file to write the numbers to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
