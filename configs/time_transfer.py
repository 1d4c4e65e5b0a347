"""The recipe of Time Transfer (arXiv 2410.05838), as far as it is public, at its three sizes.

    scaling-jax train --config=configs/time_transfer.py:32m --workdir=runs/time_transfer --config.data.path=DIR --config.data.tokenizer=FILE

The argument is 32m, 101m or 354m. DIR is what `scaling-jax tokenize` made of the text (theirs: C4) with GPT-2's tokenizer, whose vocabulary
files FILE names; docs/data.md shows how. The argument 'cpu' is the same recipe at width 64, twice the base, and 2 blocks on the built-in
corpus, in some seconds:

    scaling-jax train --config=configs/time_transfer.py:cpu --workdir=runs/time_transfer_cpu

From the first author's public fork of llm-foundry: MPT of width 256, 512 or 1024 and 24 blocks, context 1024, GPT-2's 50,257 tokens,
tied embeddings, biases, norm gains, rotary positions, GELU MLP of 4 widths, AdamW (0.9, 0.95), epsilon 1e-8, no weight decay, clip 1.0, μP
against width 256, embedding std 1/sqrt(256). The learning rates are a grid from 2^-12 to 2^-7 in steps of sqrt(2); this config
stands at its middle.
Its batches 2^18 and 2^20 tokens are the optima that reviews report. Constant lr after 10M tokens of warmup, so that one run serves all
token budgets.
Not known, and chosen here: the budget, head_dim, the schedule in its final form. Not theirs: RMSNorm for LayerNorm, no 1/sqrt(2·depth)
in the init of residual branches. Gains are known to break the transfer of μP's lr (Lingle 2024): --config.model.norm_gains=False is the
better experiment, and not theirs.

Cost: 6·N·T FLOPs and a third more for attention; 1.0e18 at 32m. Its loss is not known: the paper publishes none per run.
"""

from scaling_jax.config import cpu_sized, default_config
from scaling_jax.errors import UserError

WIDTHS = {"32m": 256, "101m": 512, "354m": 1024}
BATCH_TOKENS = 1 << 18


def get_config(size: str = "32m"):
    if size == "cpu":
        config = cpu_sized(recipe(width=64))
        config.model.depth = config.parametrization.base_depth = 2
        config.model.head_dim = config.parametrization.base_head_dim = 16
        config.parametrization.base_width = 32
        config.optimizer.lr = 2.0**-8
        return config
    if size not in WIDTHS:
        raise UserError(f"size is {size!r}: must be one of {', '.join(WIDTHS)}, cpu")
    return recipe(WIDTHS[size])


def recipe(width: int):
    config = default_config()
    config.model.width = width
    config.model.depth = 24
    config.model.head_dim = 64
    config.model.context = 1024
    config.model.vocab_size = 50_304  # 50,257 and padding, so that devices can share it
    config.model.tied_embeddings = True
    config.model.biases = True
    config.model.norm_gains = True
    config.model.loss_chunk_tokens = 1024
    config.parametrization.name = "mup"
    config.parametrization.base_width = 256
    config.parametrization.base_depth = 24
    config.parametrization.base_head_dim = 64
    config.optimizer.lr = 2.0**-9.5
    config.schedule.name = "constant"
    config.schedule.warmup_tokens = 10_000_000
    config.train.tokens = 1 << 33
    config.train.batch_tokens = BATCH_TOKENS
    config.noise_scale.window_tokens = 1 << 28
    config.data.path = "DIR"  # to be given; see above
    config.mesh.fsdp = -1
    config.eval.every_tokens = 1 << 26
    config.eval.tokens = 1 << 22
    config.checkpoint.every_tokens = 1 << 28
    config.checkpoint.keep_at_tokens = tuple(1 << k for k in range(26, 34))
    config.logging.every_tokens = 1 << 20
    return config
