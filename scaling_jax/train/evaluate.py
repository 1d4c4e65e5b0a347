"""Held-out loss, of every domain, on the same sequences each time: per token, per position and per byte, with errors over documents."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from scaling_jax.data.corpus import RunData
from scaling_jax.data.shards import TokenStream
from scaling_jax.data.source import document_ids, documents_between, read_blocks, spread_blocks
from scaling_jax.train.batches import own_rows, place_rows
from scaling_jax.train.document_error import RatioByDocument
from scaling_jax.train.step import Trainer


class Estimate(NamedTuple):
    """A mean, and its standard error over documents; None where unknown."""

    value: float | None
    se: float | None


class Positions(NamedTuple):
    """Nats per token at the positions `first` to `last`, both counted, from 1: the token at position p is predicted from p tokens."""

    first: int
    last: int
    loss: Estimate


class Evaluation(NamedTuple):
    """What a model's losses on a domain come to. Standard errors are over documents: see `scaling_jax.train.document_error`."""

    tokens: int  # predicted, each once
    documents: int  # that they are of, whole or in part
    loss: Estimate  # nats per token
    bits_per_byte: Estimate  # unknown where the tokenizer loses text
    positions: list[Positions]  # one by one, if asked for
    bins: list[Positions]  # the same in logarithmic bins


class HeldOut:
    """The blocks of a domain that are evaluated, evenly spread over it, and the document that each of their tokens is of.

    Args:
      stream: the domain.
      context: tokens in a sequence.
      tokens: how much to evaluate; 0, or more than there is, means all.
      bytes_V: bytes of text that each token stands for, as the stream's tokenizer has them; None, and there are no bits per byte.

    Raises:
      UserError: `tokens` or the stream is less than one context.
    """

    def __init__(self, stream: TokenStream, context: int, tokens: int, bytes_V: np.ndarray | None = None):
        self.stream, self.context, self.bytes_V = stream, context, bytes_V
        self.blocks = spread_blocks(stream, context, tokens)
        self.between_N = documents_between(stream, context, self.blocks)

    @property
    def tokens(self) -> int:
        return len(self.blocks) * self.context

    def read(self, numbers_N: np.ndarray | None = None) -> np.ndarray:
        """Its sequences of these numbers, by default all, int32 [N, context + 1]."""
        return read_blocks(self.stream, self.context, self.blocks if numbers_N is None else self.blocks[numbers_N])

    def documents(self, tokens_BxL: np.ndarray, start: int, first: int) -> tuple[np.ndarray, int]:
        """The documents of the targets of its sequences from number `start` on, [B, context], and `first` for those that follow."""
        return document_ids(tokens_BxL, self.between_N[start : start + len(tokens_BxL)], self.stream.index.tokenizer.end_token, first)


class Evaluator:
    """Calls as `evaluator(params) -> {'eval/<domain>/loss': …}`: for each domain `loss`, nats per token, and `bits_per_byte`, and of
    both `_se`, the standard error over documents; None where unknown."""

    def __init__(self, config: ConfigDict, data: RunData, trainer: Trainer):
        self.trainer = trainer
        self.batch = batch_sequences(config)
        of_all = config.model.context, config.eval.tokens, data.bytes_V
        self.domains = {name: HeldOut(stream, *of_all) for name, stream in data.domains.items()}

    def __call__(self, params: nnx.State) -> dict[str, Any]:
        record = {}
        for name, held_out in self.domains.items():
            found = evaluate(self.trainer, params, held_out, self.batch)
            for key, estimate in (("loss", found.loss), ("bits_per_byte", found.bits_per_byte)):
                record |= {f"eval/{name}/{key}": estimate.value, f"eval/{name}/{key}_se": estimate.se}
        return record

    @property
    def sequences(self) -> dict[str, np.ndarray]:
        """The sequences of each domain, int32 [N, context + 1]."""
        return {name: held_out.read() for name, held_out in self.domains.items()}

    def losses(self, params: nnx.State, tokens_NxL: np.ndarray) -> np.ndarray:
        """Loss of every sequence, float64 [N]."""
        found = _with_losses(self.trainer, params, tokens_NxL.__getitem__, len(tokens_NxL), self.batch)
        return np.concatenate([losses_BxT.mean(1) for losses_BxT, _ in found])


def batch_sequences(config: ConfigDict) -> int:
    """Sequences evaluated at a time: config.eval.batch_sequences, up to whole rows of the mesh."""
    shards = config.mesh.replica * config.mesh.fsdp
    return -(-config.eval.batch_sequences // shards) * shards


def evaluate(
    trainer: Trainer,
    params: nnx.State,
    held_out: HeldOut,
    batch: int,
    by_position: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluates one domain, in memory that does not grow with it. Of several processes each reads a part, and all find the same.

    Args:
      trainer: of the model.
      params: its parameters.
      held_out: what to evaluate.
      batch: sequences at a time, from `batch_sequences`.
      by_position: also the loss at each place within a sequence.
      on_progress: called with the tokens evaluated so far.
    """
    found = _Sums(held_out, by_position)
    for losses_BxT, tokens_BxL, documents_BxT in _by_document(trainer, params, held_out, batch):
        found.add(losses_BxT, tokens_BxL, documents_BxT)
        if on_progress is not None:
            on_progress(found.tokens)
    return found.read()


def evaluate_members(trainer: Trainer, params: nnx.State, held_out: HeldOut, batch: int, members: int) -> list[Evaluation]:
    """Evaluates one domain with each of several sets of parameters, stacked; the `eval` of `trainer` gives losses [members, B, context]."""
    found = [_Sums(held_out) for _ in range(members)]
    for losses_MxBxT, tokens_BxL, documents_BxT in _by_document(trainer, params, held_out, batch):
        for sums, losses_BxT in zip(found, losses_MxBxT, strict=True):
            sums.add(losses_BxT, tokens_BxL, documents_BxT)
    return [sums.read() for sums in found]


class _Sums:
    """What an evaluation adds up, of one set of parameters."""

    def __init__(self, held_out: HeldOut, by_position: bool = False):
        self.bytes_V, self.by_position, self.tokens = held_out.bytes_V, by_position, 0
        self.edges = position_edges(held_out.context) if by_position else []
        self.total, self.bits, self.each = RatioByDocument(), RatioByDocument(), RatioByDocument(held_out.context)
        self.bins = [RatioByDocument() for _ in self.edges[1:]]

    def add(self, losses_BxT: np.ndarray, tokens_BxL: np.ndarray, documents_BxT: np.ndarray) -> None:
        ones_BxT = np.ones_like(losses_BxT)
        self.total.add(*map(_column, (losses_BxT, ones_BxT, documents_BxT)))
        if self.bytes_V is not None:
            self.bits.add(*map(_column, (losses_BxT / math.log(2), self.bytes_V[tokens_BxL[:, 1:]], documents_BxT)))
        if self.by_position:
            self.each.add(losses_BxT, ones_BxT, documents_BxT)
            for ratio, start, stop in zip(self.bins, self.edges, self.edges[1:], strict=False):
                ratio.add(*(_column(x_BxT[:, start:stop]) for x_BxT in (losses_BxT, ones_BxT, documents_BxT)))
        self.tokens += losses_BxT.size

    def read(self) -> Evaluation:
        loss_C, loss_se_C, documents_C = self.total.read()
        each = [Positions(i + 1, i + 1, loss) for i, loss in enumerate(_estimates(self.each))] if self.by_position else []
        pairs = zip(self.bins, self.edges, self.edges[1:], strict=False)
        binned = [Positions(start + 1, stop, *_estimates(ratio)) for ratio, start, stop in pairs]
        loss = Estimate(float(loss_C[0]), _known(loss_se_C[0]))  # a loss that is not finite is told as such
        return Evaluation(self.tokens, int(documents_C[0]), loss, *_estimates(self.bits), each, binned)


def _by_document(trainer: Trainer, params: nnx.State, held_out: HeldOut, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(losses, tokens, and the document of each target) of `batch` sequences at a time."""
    sequences = first = 0
    for losses, tokens_BxL in _with_losses(trainer, params, held_out.read, len(held_out.blocks), batch):
        documents_BxT, first = held_out.documents(tokens_BxL, sequences, first)
        sequences += len(tokens_BxL)
        yield losses, tokens_BxL, documents_BxT


def position_edges(context: int) -> list[int]:
    """Where logarithmic bins of the positions 0, …, context - 1 begin, and `context`: two to a doubling, none a short end."""
    starts = {round(2 ** (k / 2)) - 1 for k in range(2 * context.bit_length())}
    return [*sorted(start for start in starts if start <= 0.75 * context), context]


def _with_losses(
    trainer: Trainer, params: nnx.State, read: Callable[[np.ndarray], np.ndarray], count: int, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(loss of every token, float64 [n, context], and the tokens, int32 [n, context + 1]) of `batch` sequences at a time.

    `read` gives the sequences of these numbers, from 0 to count - 1.
    """
    sharding = trainer.eval_sharding
    pending = None  # on the device, while the host reads the next ones
    for start in range(0, count, batch):
        n = min(batch, count - start)
        if sharding is None or sharding.is_fully_addressable:
            tokens_NxL = read(np.arange(start, start + n))
            tokens_BxL = np.pad(tokens_NxL, ((0, batch - n), (0, 0)), mode="edge")  # one shape, one program
            if sharding is not None:
                tokens_BxL = jax.device_put(tokens_BxL, sharding)
            computed = trainer.eval(params, tokens_BxL), tokens_NxL
        else:
            shape = batch, trainer.config.model.context + 1
            own_NxL = read(start + np.minimum(own_rows(sharding, shape), n - 1))
            tokens_BxL = place_rows(own_NxL, sharding, shape)
            computed = _replicate(sharding.mesh)(trainer.eval(params, tokens_BxL), tokens_BxL)
        before, pending = pending, (*computed, n)
        if before is not None:
            yield _on_host(*before)
    if pending is not None:
        yield _on_host(*pending)


@functools.cache
def _replicate(mesh: Mesh) -> Callable[..., tuple[jax.Array, ...]]:
    """Gives every process the whole of arrays of which it has a part."""
    return jax.jit(lambda *arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _on_host(losses_BxT: jax.Array, tokens_BxL: jax.Array | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(losses_BxT, np.float64)[..., :n, :], np.asarray(tokens_BxL)[:n]


def _column(x_BxT: np.ndarray) -> np.ndarray:
    return x_BxT.reshape(-1, 1)


def _estimates(ratio: RatioByDocument) -> list[Estimate]:
    value_C, error_C, _ = ratio.read()
    return [Estimate(_known(value), _known(error)) for value, error in zip(value_C, error_C, strict=True)]


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
