"""Kaplan et al. 2020's largest model, 48 blocks of width 1600, on TPUs: configs/kaplan.py:1600x48 with a mesh for each topology.

    scaling-jax compile --config=configs/pods/kaplan.py:v5e:8x8 --topology=v5e:8x8
    scaling-jax train --config=configs/pods/kaplan.py:v5e:8x8 --workdir=DIR --config.data.path=DATA --config.data.tokenizer=FILE

The argument is one of the topologies below; without it the mesh is fsdp over all devices, which must then divide 1600. Batch 2^19 tokens,
warmup 3000 steps of it, cosine to zero: the recipe says where all that is from. Compute in bfloat16. Its 25 heads allow no tensor axis.
Cost and memory on each topology: docs/pods.md.
"""

import runpy
from pathlib import Path

from scaling_jax.errors import UserError

RECIPE = runpy.run_path(str(Path(__file__).parents[1] / "kaplan.py"))
LAYOUTS = {"v5e:8x8": {"replica": 8, "fsdp": 8}, "v5p:4x4x4": {"replica": 16, "fsdp": 4}}


def get_config(topology: str = ""):
    config = RECIPE["get_config"]("1600x48")
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    if topology:
        if topology not in LAYOUTS:
            raise UserError(f"topology is {topology!r}: there is a layout for {', '.join(LAYOUTS)}; or leave it out")
        config.mesh.update(LAYOUTS[topology])
    return config
