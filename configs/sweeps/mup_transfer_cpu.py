"""Whether the best learning rate stays where it is as the model grows wider: μP against the standard parametrization, on two CPU cores.

    scaling-jax sweep --config=configs/sweeps/mup_transfer_cpu.py --workdir=runs/mup_transfer_cpu

Widths 32, 64, 128 and 256, at the first of which both parametrizations are one, each with learning rates 2^-12 … 2^-3 in steps of 2, cosine
to a tenth over 2^19 tokens in batches of 2^11, on the State of the Union messages, byte by byte. Heads of 16 at every width.

    scaling-jax sweep --config=configs/sweeps/mup_transfer_cpu.py:prose --workdir=runs/first/mup_transfer

takes the first study's text (configs/sweeps/prose.py), 2^18 tokens and three batches, 2^9, 2^10 and 2^11, so that the slope in width has an
interval; learning rates 2^-7 … 2^-3 under μP at all widths, and under standard, from width 64 on, 2^-8 … 2^-3 halved as the width doubles.

    scaling-jax sweep --config=configs/sweeps/mup_transfer_cpu.py:small --workdir=runs/small

has two widths, three learning rates and 2^12 tokens.

Cost: 80 points, 4.2e7 tokens, 1.4e14 FLOPs; about 45 minutes on two CPU cores, estimated from the time of a step.

Expect, from Tensor Programs V (arXiv 2203.03466) and Lingle 2024 (arXiv 2404.05728), not from this study: under μP the same best lr at all
widths, to a step of the grid, and at that lr a loss that falls with width; under standard a best lr that falls with width, by up to the
ratio of the widths, 8, and at the lr that is best for width 32 a loss that gains less from width, or rises.
"""

import runpy
from pathlib import Path

from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study

WIDTHS = (32, 64, 128, 256)
BATCHES = (1 << 9, 1 << 10, 1 << 11)  # on prose


def get_study(argument: str = "") -> Study:
    if argument not in ("", "small", "prose"):
        raise UserError(f"the argument is {argument!r}: must be small or prose, or left out")
    small = argument == "small"
    if argument == "prose":
        return prose()
    points = grid.product(
        grid.over("parametrization.name", ("standard", "mup")),
        grid.over("model.width", WIDTHS[:2] if small else WIDTHS),
        grid.over("optimizer.lr", grid.geometric(2**-8, 2**-6, 2) if small else grid.geometric(2**-12, 2**-3, 2)),
    )
    return Study(base(small), points)


def prose() -> Study:
    config = runpy.run_path(str(Path(__file__).parent / "prose.py"))["on_prose"](base(small=False))
    config.schedule.warmup_tokens = 1 << 15
    config.train.tokens = 1 << 18
    config.noise_scale.every = 0
    config.eval.tokens = 1 << 16
    tried = [("mup", width, 2**-7, 2**-3) for width in WIDTHS] + [("standard", WIDTHS[0], 2**-7, 2**-3)]
    tried += [("standard", width, 2**-8 * 64 / width, 2**-3 * 64 / width) for width in WIDTHS[1:]]
    shapes = [
        grid.product(
            grid.over("parametrization.name", (name,)),
            grid.over("model.width", (width,)),
            grid.over("optimizer.lr", grid.geometric(low, high, 2)),
        )
        for name, width, low, high in tried
    ]
    return Study(config, grid.product(grid.over("train.batch_tokens", BATCHES), grid.chain(*shapes)))


def base(small: bool):
    config = default_config()
    config.model.depth = 1 if small else 2
    config.model.head_dim = 16
    config.model.context = 64
    config.model.vocab_size = 256
    config.parametrization.base_width = WIDTHS[0]
    config.parametrization.base_head_dim = 16
    config.schedule.name = "cosine"
    config.schedule.final_lr_fraction = 0.1
    config.schedule.warmup_tokens = 1 << (10 if small else 14)
    config.train.batch_tokens = 1 << (9 if small else 11)
    config.train.tokens = 1 << (12 if small else 19)
    config.eval.tokens = 1 << (12 if small else 17)
    return config
