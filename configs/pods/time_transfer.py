"""The sizes of Time Transfer (arXiv 2410.05838) on TPUs: configs/time_transfer.py with meshes for the topologies that were compiled for.

    scaling-jax compile --config=configs/pods/time_transfer.py:354m,v5e:4x4 --topology=v5e:4x4
    scaling-jax train --config=configs/pods/time_transfer.py:354m,v5e:4x4 --workdir=DIR --config.data.path=DATA --config.data.tokenizer=FILE

The argument is a size, 32m, 101m or 354m, and after a comma one of the topologies below; without it the mesh is fsdp over all devices.
Parameters are few, so every device has them all and only gradients travel. The batch is the paper's 2^18 tokens; its other one:
--config.train.batch_tokens=1048576. Compute in bfloat16. Cost and memory on each topology: docs/pods.md.
"""

import runpy
from pathlib import Path

from scaling_jax.errors import UserError

RECIPE = runpy.run_path(str(Path(__file__).parents[1] / "time_transfer.py"))
LAYOUTS = {
    "32m": {"v5e:2x4": {"replica": 8}, "v6e:2x4": {"replica": 8}},
    "101m": {"v5e:2x4": {"replica": 8}, "v6e:2x4": {"replica": 8}},
    "354m": {"v5e:4x4": {"replica": 16}, "v6e:2x4": {"replica": 8}},
}


def get_config(argument: str = "354m"):
    size, _, topology = argument.partition(",")
    if size not in LAYOUTS:
        raise UserError(f"size is {size!r}: must be one of {', '.join(LAYOUTS)}")
    config = RECIPE["get_config"](size)
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full" if size == "354m" else "dots"
    if topology:
        if topology not in LAYOUTS[size]:
            raise UserError(f"topology is {topology!r}: for {size} there is a layout for {', '.join(LAYOUTS[size])}; or leave it out")
        config.mesh.fsdp = 1
        config.mesh.update(LAYOUTS[size][topology])
    return config
