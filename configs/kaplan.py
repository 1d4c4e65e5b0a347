"""The recipe of Kaplan et al. 2020, Scaling Laws for Neural Language Models (arXiv 2001.08361), at the sizes of its Table 6 and below.

    scaling-jax train --config=configs/kaplan.py:768x12 --workdir=runs/kaplan --config.data.path=DIR --config.data.tokenizer=FILE

The argument is WIDTHxDEPTH; with ',dropout', as in 768x12,dropout, it is that of their L(N, D) runs, whose data are subsets of the whole,
--config.data.train_tokens. DIR is what `scaling-jax tokenize` made of the text with GPT-2's tokenizer, whose vocabulary files FILE names;
docs/data.md shows how. The argument 'cpu' (or 'cpu,dropout') is the same recipe at 64x2 on the built-in corpus, in some seconds:

    scaling-jax train --config=configs/kaplan.py:cpu --workdir=runs/kaplan_cpu

Theirs: context 1024, batch 512 sequences (2^19 tokens), 250,000 steps of Adam, 3000 steps of linear warmup, cosine to zero, learning
rate 0.003239 − 0.0001395·ln N, standard parametrization, learned positions, biases and gains, GELU MLP of 4 widths, GPT-2's 50,257
tokens, several passes over the data; 10% dropout in the L(N, D) runs, here at GPT's three places, for the paper does not say where.
Not theirs: RMSNorm for LayerNorm; a readout of its own; Adam also above 1B parameters, where they used Adafactor. Adam's betas, epsilon
and clipping are common choices, for the paper does not say. Early stopping is the reader's: the held-out loss is in the records.

Memory: a batch of 512 sequences wants many devices, or config.train.accumulation and config.model.remat=full. The loss holds the logits of
1,024 tokens of each device at a time; all would be 105 GB.

Cost: 6·N·1.3e11 FLOPs, 6.7e19 (0.8 PF-days) at 768x12. Expect about 3.2 nats per token there on WebText2, from L(N) = (8.8e13/N)^0.076.
"""

import math

from scaling_jax.config import cpu_sized, default_config
from scaling_jax.errors import UserError

BATCH_TOKENS = 512 * 1024
STEPS = 250_000
WARMUP_STEPS = 3000


def learning_rate(params: int) -> float:
    """The paper's rule of thumb, D.6; it breaks down above 1e10 parameters."""
    return 0.003239 - 0.0001395 * math.log(params)


def get_config(argument: str = "768x12"):
    size, *others = argument.split(",")
    if size == "cpu":
        config = cpu_sized(recipe(64, 2))
        config.model.head_dim = 16
    else:
        try:
            width, depth = (int(part) for part in size.split("x"))
            if width < 1 or depth < 1:
                raise ValueError
        except ValueError:
            raise UserError(f"size is {size!r}: must be WIDTHxDEPTH, for example 768x12 or 1600x48, or cpu") from None
        config = recipe(width, depth)
    if others not in ([], ["dropout"]):
        raise UserError(f"the argument is {argument!r}: after the size there may be ',dropout' and nothing else")
    if others:
        config.model.dropout = 0.1
    return config


def recipe(width: int, depth: int):
    lr = learning_rate(12 * depth * width**2)
    if lr <= 0:
        raise UserError(f"size is {width}x{depth}: the paper's rule gives no learning rate beyond about 1e10 parameters")
    config = default_config()
    config.model.width = width
    config.model.depth = depth
    config.model.head_dim = 64
    config.model.context = 1024
    config.model.vocab_size = 50_304  # 50,257 and padding, so that devices can share it
    config.model.positions = "learned"
    config.model.biases = True
    config.model.norm_gains = True
    config.model.loss_chunk_tokens = 1024
    config.parametrization.name = "standard"
    config.parametrization.embedding_std = 0.02
    config.optimizer.lr = lr
    config.optimizer.b2 = 0.999
    config.schedule.name = "cosine"
    config.schedule.warmup_tokens = WARMUP_STEPS * BATCH_TOKENS
    config.train.tokens = STEPS * BATCH_TOKENS
    config.train.batch_tokens = BATCH_TOKENS
    config.data.repeat = True
    config.data.path = "DIR"  # to be given; see above
    config.mesh.fsdp = -1
    config.eval.every_tokens = 1000 * BATCH_TOKENS
    config.eval.tokens = 1 << 22
    config.checkpoint.every_tokens = 1000 * BATCH_TOKENS
    config.logging.every_tokens = 10 * BATCH_TOKENS
    return config
