"""A 7B and a 70B of today's kind: SwiGLU, rotary positions, context 4096; the 70B with 8 key/value heads. With μP against width 256.

    scaling-jax compile --config=configs/pods/dense.py:70b,v5p:16x16x16 --topology=v5p:16x16x16
    scaling-jax train --config=configs/pods/dense.py:7b,v5p:8x8x8 --workdir=DIR --config.data.path=DATA --config.data.tokenizer=FILE

The argument is 7b or 70b, and after a comma one of the topologies below, as in '70b,2xv5p:8x16x16' for two slices; without it the mesh is
fsdp over all devices. Shapes: the 7B is 32 blocks of width 4096 (MLP 11008), the 70B 80 of 8192 (MLP 28672), as Touvron et al. 2023
(arXiv 2302.13971, 2307.09288) have them; vocabularies 32,000 and 128,256, which your tokenizer must fit. Budgets are 20 tokens a parameter
(Hoffmann et al. 2022). Learning rate and batch are a start to be measured, not a finding: that is what the rest of this package is for.
Cost and memory on each topology: docs/pods.md.
"""

from scaling_jax.config import default_config
from scaling_jax.errors import UserError

SHAPES = {
    "7b": {"width": 4096, "depth": 32, "mlp_ratio": 11008 / 4096, "vocab_size": 32_000},
    "70b": {"width": 8192, "depth": 80, "mlp_ratio": 28672 / 8192, "vocab_size": 128_256, "kv_heads": 8},
}
TOKENS = {"7b": 1 << 37, "70b": 1_400_000_000_000}
BATCH_TOKENS = {"7b": 1 << 22, "70b": 1 << 24}
LAYOUTS = {
    "7b": {
        "v5p:8x8x8": {"replica": 64, "fsdp": 8},
        "v6e:16x16": {"replica": 16, "fsdp": 16},
    },
    "70b": {
        "v5p:16x16x16": {"replica": 64, "fsdp": 16, "tensor": 4},
        "2xv5p:8x16x16": {"replica": 64, "fsdp": 16, "tensor": 4},
        "tpu7x:8x8x8": {"replica": 32, "fsdp": 32},
    },
}


def get_config(argument: str = "7b"):
    size, _, topology = argument.partition(",")
    if size not in SHAPES:
        raise UserError(f"size is {size!r}: must be one of {', '.join(SHAPES)}")
    config = default_config()
    config.model.update(SHAPES[size])
    config.model.head_dim = 128
    config.model.context = 4096
    config.model.mlp = "swiglu"
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "attention" if size == "70b" and "v5p" in topology else "full"  # there is room
    config.parametrization.name = "mup"
    config.parametrization.base_width = 256
    config.parametrization.base_head_dim = 128
    config.optimizer.lr = 2.0**-8
    config.optimizer.weight_decay = 0.1
    config.schedule.name = "cosine"
    config.schedule.final_lr_fraction = 0.1
    config.train.tokens = TOKENS[size]
    config.train.batch_tokens = BATCH_TOKENS[size]
    config.schedule.warmup_tokens = 2000 * BATCH_TOKENS[size]
    config.data.path = "DIR"  # to be given; see above
    config.data.verify = False  # reads all of it
    config.eval.every_tokens = 1000 * BATCH_TOKENS[size]
    config.eval.tokens = 1 << 24
    config.eval.batch_sequences = BATCH_TOKENS[size] // config.model.context
    config.checkpoint.every_tokens = 500 * BATCH_TOKENS[size]
    config.mesh.fsdp = -1
    if topology:
        if topology not in LAYOUTS[size]:
            raise UserError(f"topology is {topology!r}: for {size} there is a layout for {', '.join(LAYOUTS[size])}; or leave it out")
        config.mesh.update(LAYOUTS[size][topology])
    return config
