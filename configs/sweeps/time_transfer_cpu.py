"""How the best learning rate moves with batch size and token budget, after Time Transfer (arXiv 2410.05838), on two CPU cores.

    scaling-jax sweep --config=configs/sweeps/time_transfer_cpu.py --workdir=runs/time_transfer_cpu

Widths 32 and 64 under μP, batches 2^8 … 2^13 tokens, horizons 2^17 … 2^22 tokens, learning rates in steps of √2, two seeds, on the
State of the Union messages, byte by byte. Of the learning rates 2^-10 … 2^-3.5 each batch has the nine around 2^-8·√(B/2^8), near where a
first look at one seed found the best one at 2^19 tokens; the others are far off it. A constant lr lets one run serve all horizons: at the
largest batch the first is 16 steps away, at the smallest the last is 16,384. Warmup is 2^14 tokens for every batch and horizon. One that
grows with the horizon would take a run for each, and one of so many steps would be most of a short horizon where batches are large; the
choice moves the best lr of large batches at short horizons, and that end is to be read with it in mind.

    scaling-jax sweep --config=configs/sweeps/time_transfer_cpu.py:small --workdir=runs/small

is the same with four learning rates, larger ones since it ends early, two batches, one seed and horizons of 2^12 … 2^14 tokens.

Cost: 216 points in 1,296 cells, 9.1e8 tokens, 4.0e14 FLOPs; about 2.5 hours on two CPU cores, estimated from the time of a step.

Expect, from theory and other people's measurements and not from this study: at small batches a best lr that rises as √B and falls with the
horizon, between T^-1/4 and T^-1/2; at large ones less of both, beyond a batch that grows with the horizon as T^0.4 … T; the same best lr
at both widths; a loss that is flatter in the lr the longer the horizon. Which form the surface has (surge, plateau, or no kink) is open.
"""

import math

from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study

BATCHES = tuple(1 << k for k in range(8, 14))
HORIZONS = tuple(1 << k for k in range(17, 23))


def get_study(argument: str = "") -> Study:
    if argument not in ("", "small"):
        raise UserError(f"the argument is {argument!r}: must be small, or left out")
    small = argument == "small"
    lrs = grid.over("optimizer.lr", grid.geometric(2**-7, 2**-4, 2) if small else grid.geometric(2**-10, 2**-3.5, 2**0.5))
    points = grid.product(
        grid.over("model.width", (16, 32) if small else (32, 64)),
        grid.over("train.batch_tokens", BATCHES[:2] if small else BATCHES),
        grid.over("train.seed", (0,) if small else (0, 1)),
        lrs,
    )
    if small:
        return Study(base(small), points, horizons=tuple(tokens >> 5 for tokens in HORIZONS[:3]))
    return Study(base(small), grid.where(points, near_the_best), horizons=HORIZONS)


def near_the_best(point: dict) -> bool:
    """Whether the lr is within a factor of 4 of 2^-8·√(B/2^8)."""
    best = 2**-8 * math.sqrt(point["train.batch_tokens"] / BATCHES[0])
    return abs(math.log2(point["optimizer.lr"] / best)) < 2.01


def base(small: bool):
    config = default_config()
    config.model.depth = 1 if small else 2
    config.model.head_dim = 16
    config.model.context = 64
    config.model.vocab_size = 256
    config.parametrization.base_width = 32
    config.parametrization.base_head_dim = 16
    config.schedule.name = "constant"
    config.schedule.warmup_tokens = 1 << (10 if small else 14)
    config.eval.tokens = 1 << (12 if small else 16)
    return config
