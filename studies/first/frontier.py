"""A size between those of the Time Transfer part, and these for longer: which size is the best for its compute, at more budgets.

    scaling-jax sweep --config=studies/first/frontier.py:width=48 --workdir=runs/first/frontier/further_48

The argument names one width. Width 48, which the other part has not, has two batches; the others have the larger one, and only the horizons
that they lack, to 2^23 tokens. Every batch has four learning rates in steps of √2 about where the neighbours' best ones lie.

Cost: 24 points, 2.0e8 tokens; 35 minutes on two CPU cores.
"""

import runpy
from pathlib import Path

from scaling_jax.errors import UserError
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study

SWEEPS = Path(__file__).parents[2] / "configs/sweeps"
NEW = 48  # the width that the other part has not
OCTAVES = {16: (23, 23), 32: (23, 23), 48: (19, 23), 64: (23, 23), 128: (21, 23)}  # of horizons, by width


def get_study(argument: str = "") -> Study:
    widths = {f"width={width}": width for width in OCTAVES}
    if argument not in widths:
        raise UserError(f"the argument is {argument!r}: must be one of {', '.join(widths)}")
    width = widths[argument]
    study = runpy.run_path(str(SWEEPS / "time_transfer_cpu.py"))
    config = runpy.run_path(str(SWEEPS / "prose.py"))["on_prose"](study["base"]())
    config.model.width = width
    first, last = OCTAVES[width]
    of_batches = (rates(1 << 10, 2**-7.5), rates(1 << 11, 2**-7)) if width == NEW else (rates(1 << 11, 2**-7.5),)
    points = grid.chain(*of_batches)
    return Study(config, points, horizons=tuple(1 << k for k in range(first, last + 1)), least_steps=study["LEAST_STEPS"])


def rates(batch_tokens: int, first: float) -> grid.Grid:
    """A batch with its four learning rates."""
    return grid.product(
        grid.over("train.batch_tokens", (batch_tokens,)),
        grid.over("optimizer.lr", grid.geometric(first, first * 2**1.5, 2**0.5)),
    )
