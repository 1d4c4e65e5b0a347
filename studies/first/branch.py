"""The run that batches are branched off from: width 64 of the first study, at a small batch and the lr that was best for it at 2^20 tokens.

scaling-jax train --config=studies/first/branch.py --workdir=runs/first/branch
scaling-jax branch --run=runs/first/branch --at_tokens=524288,1048576,2097152 --factors=1,2,4,8,16,32 --span_tokens=262144
"""

import runpy
from pathlib import Path

SWEEPS = Path(__file__).parents[2] / "configs/sweeps"


def get_config():
    config = runpy.run_path(str(SWEEPS / "time_transfer_cpu.py"))["base"]()
    config = runpy.run_path(str(SWEEPS / "prose.py"))["on_prose"](config)
    config.model.width = 64
    config.optimizer.lr = 2**-7
    config.train.batch_tokens = 1 << 9
    config.train.tokens = 1 << 21
    config.checkpoint.keep_at_tokens = (1 << 19, 1 << 20, 1 << 21)
    config.eval.tokens = 1 << 18
    config.eval.every_tokens = 1 << 19
    return config
