"""The condition that was held back: width 96 and 2^23 tokens, at five learning rates and three batches about what `plan` had said of it.

    scaling-jax plan --laws=studies/first/time_transfer/laws.json --params=221184 --tokens=8388608 --json > studies/first/held_back/prediction.json
    scaling-jax sweep --config=studies/first/held_back.py --workdir=runs/first/held_back/width_96

Half, once and twice the predicted batch, with learning rates in steps of √2 about the predicted one times the root of the batch's factor.
Horizons of a half and a quarter of the tokens are there for the error of the minima, which is that of the scatter about parabolas.
"""  # noqa: E501 (a command)

import json
import runpy
from pathlib import Path

from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study

HERE = Path(__file__).parent
SWEEPS = HERE.parents[1] / "configs/sweeps"
WIDTH, TOKENS = 96, 1 << 23


def get_study(argument: str = "") -> Study:
    rows = {row["name"]: row["value"] for row in json.loads((HERE / "held_back/prediction.json").read_text())["rows"]}
    study = runpy.run_path(str(SWEEPS / "time_transfer_cpu.py"))
    config = runpy.run_path(str(SWEEPS / "prose.py"))["on_prose"](study["base"]())
    config.model.width = WIDTH
    points = grid.chain(*(about(config.model.context, factor, rows["batch"], rows["learning rate"]) for factor in (0.5, 1.0, 2.0)))
    return Study(config, points, horizons=(TOKENS // 4, TOKENS // 2, TOKENS), least_steps=study["LEAST_STEPS"])


def about(context: int, factor: float, batch_tokens: float, lr: float) -> grid.Grid:
    """A batch near the predicted one times a factor, in whole sequences, and its learning rates."""
    batch = grid.over("train.batch_tokens", (max(1, round(factor * batch_tokens / context)) * context,))
    middle = lr * factor**0.5
    return grid.product(batch, grid.over("optimizer.lr", grid.geometric(middle / 2, middle * 2, 2**0.5)))
