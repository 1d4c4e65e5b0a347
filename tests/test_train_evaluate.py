"""Held-out loss against the model called by hand."""

import math

import numpy as np
from flax import nnx
from helpers import small_config

from scaling_jax.data.corpus import open_run_data
from scaling_jax.model import sequence_losses
from scaling_jax.train.evaluate import Evaluator
from scaling_jax.train.step import Trainer


def test_loss_error_and_bits_of_the_same_spread_sequences():
    """A batch that does not divide their number, so that padding would show."""
    config = small_config(eval__tokens=50 * 16, eval__batch_sequences=16)
    data, trainer = open_run_data(config), Trainer(config)
    params = trainer.init(0).params
    found = Evaluator(config, data, trainer)(params)
    stream = data.domains["heldout"]
    everything = stream.read(0, len(stream))
    blocks = Evaluator(config, data, trainer).sequences["heldout"]
    assert blocks.shape == (50, 17)
    for i, block in enumerate(blocks):  # the i-th comes from the i-th fiftieth of the stream
        low, high = (round(len(everything) * edge / 50 / 16) * 16 for edge in (i, i + 1))
        assert any((everything[s : s + 17] == block).all() for s in range(max(low - 16, 0), high + 16, 16))
    losses = np.asarray(sequence_losses(nnx.merge(trainer.graph, params)(blocks[:, :-1]), blocks[:, 1:]), np.float64)
    np.testing.assert_allclose(found["eval/heldout/loss"], losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["eval/heldout/loss_se"], losses.std(ddof=1) / math.sqrt(50), rtol=1e-5)
    tokens_per_byte = len(everything) / np.sum(everything != 255)  # byte tokens; 255 ends a document
    np.testing.assert_allclose(found["eval/heldout/bits_per_byte"], losses.mean() / math.log(2) * tokens_per_byte, rtol=1e-6)
