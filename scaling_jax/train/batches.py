"""Batches on their way from the data to the devices: every process reads the rows that its own devices hold, and no others."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from scaling_jax.data.source import BatchKey, TokenSource
from scaling_jax.train.batch_size import microbatches


class Batches:
    """Batches of a run, as [accumulation, B / accumulation, context + 1].

    Args:
      config: of the run.
      source: its training data.
      sharding: of a batch; None where there is one device.
    """

    def __init__(self, config: ConfigDict, source: TokenSource, sharding: NamedSharding | None):
        self._config, self._source, self._sharding = config, source, sharding
        self._everything_here = sharding is None or sharding.is_fully_addressable

    def shape(self, count: int) -> tuple[int, int, int]:
        accumulation = microbatches(self._config, count)
        return accumulation, count // accumulation, self._source.context + 1

    def read(self, key: BatchKey) -> np.ndarray:
        """This process's sequences of the batch (first sequence, count), in the run's order: int32 [rows, context + 1]."""
        first, count = key
        if self._everything_here:
            return self._source.batch(first, count)
        return self._source.batch(first, count, own_rows(self._sharding, self.shape(count)))

    def place(self, tokens_NxL: np.ndarray, count: int) -> jax.Array | np.ndarray:
        """A batch of `count` sequences, whose own rows are `tokens_NxL`, on the devices."""
        if self._sharding is None:
            return tokens_NxL.reshape(self.shape(count))
        if self._everything_here:
            return jax.device_put(tokens_NxL.reshape(self.shape(count)), self._sharding)
        return place_rows(tokens_NxL, self._sharding, self.shape(count))


def own_rows(sharding: NamedSharding, shape: Sequence[int]) -> np.ndarray:
    """Which rows of an array, its last axis apart, lie on this process's devices: ascending numbers, counted over the other axes."""
    numbers = np.arange(np.prod(shape[:-1])).reshape(shape[:-1])
    indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
    return np.unique(np.concatenate([numbers[index[:-1]].ravel() for index in indices]))


def place_rows(own_NxL: np.ndarray, sharding: NamedSharding, shape: Sequence[int]) -> jax.Array:
    """The array of this shape whose rows `own_rows` are `own_NxL`; the other processes give the others."""
    at = np.full(np.prod(shape[:-1]), -1)
    at[own_rows(sharding, shape)] = np.arange(len(own_NxL))
    at = at.reshape(shape[:-1])
    return jax.make_array_from_callback(tuple(shape), sharding, lambda index: own_NxL[at[index[:-1]]][..., index[-1]])
