"""Held-out loss, of every domain, on the same sequences each time."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from scaling_jax.data.corpus import RunData
from scaling_jax.data.source import read_blocks, spread_blocks
from scaling_jax.train.step import Trainer


class Evaluator:
    """Calls as `evaluator(params) -> {'eval/<domain>/loss': …}`.

    Losses are nats per token, averaged per sequence and then over sequences that lie evenly spread over the domain; `loss_se` is
    the standard error over sequences, `bits_per_byte` counts the bytes of the text.
    """

    def __init__(self, config: ConfigDict, data: RunData, trainer: Trainer):
        self.trainer, self.data = trainer, data
        context = config.model.context
        shards = config.mesh.replica * config.mesh.fsdp
        self.batch = -(-config.eval.batch_sequences // shards) * shards
        self.sequences = {
            name: read_blocks(stream, context, spread_blocks(stream, context, config.eval.tokens)) for name, stream in data.domains.items()
        }

    def __call__(self, params: nnx.State) -> dict[str, Any]:
        record = {}
        for name, tokens_NxL in self.sequences.items():
            losses_N = self.losses(params, tokens_NxL)
            loss = float(losses_N.mean())
            record[f"eval/{name}/loss"] = loss
            record[f"eval/{name}/loss_se"] = float(losses_N.std(ddof=1) / math.sqrt(len(losses_N))) if len(losses_N) > 1 else None
            record[f"eval/{name}/bits_per_byte"] = loss / math.log(2) * self.data.tokens_per_byte(name)
        return record

    def losses(self, params: nnx.State, tokens_NxL: np.ndarray) -> np.ndarray:
        """Loss of every sequence, float64 [N]."""
        losses = []
        for start in range(0, len(tokens_NxL), self.batch):
            tokens_BxL = tokens_NxL[start : start + self.batch]
            count = len(tokens_BxL)
            tokens_BxL = np.pad(tokens_BxL, ((0, self.batch - count), (0, 0)), mode="edge")  # one shape, one program
            if self.trainer.eval_sharding is not None:
                tokens_BxL = jax.device_put(tokens_BxL, self.trainer.eval_sharding)
            losses.append(np.asarray(self.trainer.eval(params, tokens_BxL), np.float64)[:count].mean(1))
        return np.concatenate(losses)
