"""How the best learning rate moves with batch size and token budget, after Time Transfer (arXiv 2410.05838), on two CPU cores.

    scaling-jax sweep --config=configs/sweeps/time_transfer_cpu.py --workdir=runs/time_transfer_cpu
    scaling-jax sweep --config=configs/sweeps/time_transfer_cpu.py:prose --workdir=runs/first/time_transfer
    scaling-jax sweep --config=configs/sweeps/time_transfer_cpu.py:prose,decay --workdir=runs/first/time_transfer_decay

Widths 16, 32 and 64 under μP, batches 2^8 … 2^15 tokens (every other one at width 64, the dearest), horizons 2^17 … 2^22 tokens, two
seeds at width 32. Each batch has eight learning rates in steps of √2 about where a first look found the best one at 2^20 tokens,
CENTRES·(B/2^8)^0.45. The lr is constant after 2^15 tokens of warmup, whatever batch and horizon, so that one run serves all horizons; at
the largest batch that is one step. A warmup that grows with the horizon would take a run for each. The grid is ragged: no cell has less
than 100 steps after its warmup, so that the first horizon has the smallest batches alone, and the largest batch only the last one. The text
is the State of the Union messages, byte by byte.

`prose` takes the first study's text instead (configs/sweeps/prose.py). `decay` is a part of the grid, width 32, one seed, three batches
and horizons from 2^19 tokens, with a linear decay to zero over the last fifth of every horizon: constant-lr horizons measure another η*(T).
`width=32` leaves the other widths out: the same command without it then trains what is missing. `wide` is width 128 alone, on the three
smallest batches with six of their learning rates, horizons 2^18 … 2^20: where it takes over from width 64 at equal compute.

    scaling-jax sweep --config=configs/sweeps/time_transfer_cpu.py:small --workdir=runs/small

is the same with four learning rates, larger ones since it ends early, two batches, one seed and horizons of 2^12 … 2^14 tokens.

Cost: 224 points in 888 cells, 9.4e8 tokens, 2.1e14 FLOPs; 56 minutes on two CPU cores, estimated from the time of a step. On prose,
whose vocabulary is larger, two hours. The decayed part: 24 points in 88 cells, 1.4e8 tokens; about 12 minutes. `wide`: 18 points in 54
cells, 1.9e7 tokens; about 10 minutes.

Expect, from theory and other people's measurements and not from this study: at small batches a best lr that rises as √B and falls with the
horizon, between T^-1/4 and T^-1/2; at large ones less of both, beyond a batch that grows with the horizon as T^0.4 … T; the same best lr
at all widths; a loss that is flatter in the lr the longer the horizon. Which form the surface has (surge, plateau, or no kink) is open.
"""

import math
import runpy
from pathlib import Path

from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study

SEEDS = {16: (0,), 32: (0, 1), 64: (0,)}  # by width
EVERY_OTHER_BATCH = 64  # the width that costs most
WORDS = ("prose", "decay", "wide", "small", *(f"width={width}" for width in SEEDS))
BATCHES = tuple(1 << k for k in range(8, 16))
HORIZONS = tuple(1 << k for k in range(17, 23))
CENTRES = {"prose": 2**-7.3, "sotu": 2**-8.0}  # of learning rates at the smallest batch
MICROBATCH_TOKENS = 1 << 12  # of larger ones the activations leave the caches
LEAST_STEPS = 100


def get_study(argument: str = "") -> Study:
    words = argument.split(",") if argument else []
    if not set(words) <= set(WORDS) or len(set(words)) < len(words) or ("small" in words and len(words) > 1):
        raise UserError(f"the argument is {argument!r}: must be small, or some of {', '.join(WORDS)}, each once, or left out")
    if "small" in words:
        return small()
    seeds = {width: of_width for width, of_width in SEEDS.items() if f"width={width}" in words} or SEEDS
    batches, horizons = BATCHES, HORIZONS
    first = -1.5  # of the learning rates, in octaves from the middle
    config = base()
    if "prose" in words:
        config = runpy.run_path(str(Path(__file__).parent / "prose.py"))["on_prose"](config)
    if "decay" in words:
        config.schedule.name = "wsd"
        seeds, batches, horizons = {32: (0,)}, BATCHES[1:6:2], HORIZONS[2:]
    elif "wide" in words:
        seeds, batches, horizons, first = {128: (0,)}, BATCHES[:3], HORIZONS[1:4], -0.5
    text = "prose" if "prose" in words else "sotu"
    points = grid.chain(
        *(
            grid.product(
                grid.over("model.width", (width,)),
                grid.over("train.seed", of_width),
                grid.chain(*(rates(batch, text, first) for batch in (batches[1::2] if width == EVERY_OTHER_BATCH else batches))),
            )
            for width, of_width in seeds.items()
        )
    )
    decay = {"decay_fraction": 0.2} if "decay" in words else {}
    return Study(config, points, horizons=horizons, least_steps=LEAST_STEPS, max_members=8, **decay)


def rates(batch_tokens: int, text: str, first: float) -> grid.Grid:
    """A batch size with the learning rates that are tried at it."""
    middle = round(2 * math.log2(CENTRES[text] * (batch_tokens / BATCHES[0]) ** 0.45)) / 2
    batch = grid.zip(
        grid.over("train.batch_tokens", (batch_tokens,)),
        grid.over("train.accumulation", (max(1, batch_tokens // MICROBATCH_TOKENS),)),
    )
    return grid.product(batch, grid.over("optimizer.lr", grid.geometric(2 ** (middle + first), 2 ** (middle + 2), 2**0.5)))


def small() -> Study:
    points = grid.product(
        grid.over("model.width", (16, 32)),
        grid.over("train.batch_tokens", BATCHES[:2]),
        grid.over("optimizer.lr", grid.geometric(2**-7, 2**-4, 2)),
    )
    config = base()
    config.model.depth = 1
    config.noise_scale.every = 1
    config.schedule.warmup_tokens = 1 << 10
    config.eval.tokens = 1 << 12
    return Study(config, points, horizons=tuple(tokens >> 5 for tokens in HORIZONS[:3]))


def base():
    config = default_config()
    config.model.depth = 2
    config.model.head_dim = 16
    config.model.context = 64
    config.model.vocab_size = 256
    config.parametrization.base_width = 32
    config.parametrization.base_head_dim = 16
    config.schedule.name = "constant"
    config.schedule.warmup_tokens = 1 << 15
    config.noise_scale.every = 4
    config.eval.tokens = 1 << 16
    return config
