"""The dtype of a run whose config.model.compute_dtype is 'fastest': found once, as the run begins, by timing its own step in each.

From then on it is the run's: the work directory keeps it (`scaling_jax.train.workdir.claim`), and no machine that continues the run
measures again.
"""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.console import LiveLine
from scaling_jax.train.batch_size import microbatches
from scaling_jax.train.hosts import ALONE, Hosts
from scaling_jax.train.step import Trainer

DTYPES = ("float32", "bfloat16")
TIMED_SECONDS, FEWEST, MOST = 1.0, 2, 50  # of all timed steps together; steps of each dtype
WORTH = 0.95  # of float32's seconds, below which bfloat16's roundings are worth it
CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_UNITS = {"amx_bf16", "avx512_bf16"}  # flags of a processor that multiplies bfloat16


class Choice(NamedTuple):
    """The dtype, seconds of a step in each (none where nothing had to be measured), and what tipped the balance, in words."""

    compute_dtype: str
    seconds: dict[str, float]
    why: str


def fastest(config: ConfigDict, mesh: Mesh | None = None, hosts: Hosts = ALONE, line: LiveLine | None = None) -> Choice:
    """The dtype in which the run that `config` describes is the fastest here; float32 where it hardly matters.

    A TPU gets bfloat16 and a processor that cannot multiply bfloat16 gets float32, unmeasured.

    Args:
      config: valid, whatever its model.compute_dtype; mesh.fsdp resolved.
      mesh: of the run, None where there is one device.
      hosts: of the run, which all call this; what process 0 finds holds for all.
      line: where it is said that steps are timed, and what was found.
    """
    choice = hosts.tell(_without_measuring)
    if choice is None:
        if line is not None:
            line.show(f"compute_dtype fastest: timing a step in {' and in '.join(DTYPES)}")
        seconds = time_dtypes(config, mesh, hosts)
        choice = hosts.tell(lambda: choose(seconds))
    choice = Choice(*choice)  # a list, where it was told
    if line is not None:
        line.say(f"compute_dtype fastest: {choice.compute_dtype}, {choice.why}")
    return choice


def choose(seconds: dict[str, float]) -> Choice:
    """What follows from the seconds of a step in each dtype."""
    dtype = "bfloat16" if seconds["bfloat16"] < WORTH * seconds["float32"] else "float32"
    other = next(name for name in DTYPES if name != dtype)
    return Choice(dtype, seconds, f"{_milliseconds(seconds[dtype])} a step ({other}: {_milliseconds(seconds[other])})")


def time_dtypes(config: ConfigDict, mesh: Mesh | None = None, hosts: Hosts = ALONE) -> dict[str, float]:
    """Seconds of a step of the run in each dtype, on its own initial parameters and made-up tokens: the least of some taken in turns.

    Timed is the step that most of the run's are, which is measured for noise where noise_scale.every is 1.
    """
    trainers = {}
    for dtype in DTYPES:
        own = config.copy_and_resolve_references()
        own.model.compute_dtype = dtype
        trainers[dtype] = Trainer(own, mesh)
    sequences = config_lib.sequences_per_batch(config)
    accumulation = microbatches(config, sequences)
    shape = accumulation, sequences // accumulation, config.model.context + 1
    tokens_AxBxL = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    sharding = trainers["float32"].batch_sharding
    if sharding is not None:
        of_all = tokens_AxBxL
        tokens_AxBxL = jax.make_array_from_callback(shape, sharding, lambda index: of_all[index])
    state = trainers["float32"].init(config.train.seed)  # the same arrays in every dtype
    taken: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    rounds, started = 0, 0.0

    def again() -> bool:
        """Process 0's clock, for a step that not all take would never end."""
        return rounds <= FEWEST or (rounds <= MOST and time.monotonic() - started < TIMED_SECONDS)

    while hosts.tell(again):
        for dtype, trainer in trainers.items():
            before = time.monotonic()
            state, metrics = trainer.step(state, tokens_AxBxL, config.noise_scale.every == 1)
            jax.block_until_ready((state, metrics))
            taken[dtype].append(time.monotonic() - before)
        rounds, started = rounds + 1, started or time.monotonic()
    return {dtype: min(each[1:]) for dtype, each in taken.items()}  # the first had to be compiled


def _without_measuring() -> Choice | None:
    platform = jax.default_backend()
    if platform == "tpu":
        return Choice("bfloat16", {}, "which a TPU's units multiply")
    if platform == "cpu" and (flags := _cpu_flags()) and not flags & BFLOAT16_UNITS:
        return Choice("float32", {}, f"as this processor has no units for bfloat16 ({', '.join(sorted(BFLOAT16_UNITS))})")
    return None


def _cpu_flags() -> set[str]:
    """What an x86 processor can do, in Linux's words; empty where that is not known."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{1 if seconds < 0.01 else 0}f} ms"
