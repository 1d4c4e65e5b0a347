"""Random access to training sequences: a batch is a pure function of the seed and of the sequences already seen.

Block i of a stream is its tokens i·context, …, (i+1)·context: context + 1 of them, inputs and shifted targets. Neighbours
share one token, so every token but the first is predicted exactly once per epoch.
"""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from scaling_jax.data.shards import TokenStream
from scaling_jax.errors import UserError

_SUBSET_SEED = 20_230_921  # any fixed number: config.data.train_tokens means the same blocks in every run
_MAX_BLOCKS = 1 << 32  # Grain's index shuffle counts in 32 bits
_SCAN = 1 << 14  # tokens that are searched for an end token at once


def count_blocks(stream: TokenStream, context: int) -> int:
    """Blocks of context + 1 tokens in `stream`, at least 1.

    Raises:
      UserError: the stream is shorter than one block.
    """
    blocks = (len(stream) - 1) // context
    if blocks < 1:
        raise UserError(
            f"{stream.directory}: {len(stream)} tokens; a sequence needs {context + 1}, config.model.context {context} and one to predict"
        )
    return blocks


def read_blocks(stream: TokenStream, context: int, blocks: Sequence[int] | np.ndarray) -> np.ndarray:
    """The named blocks of `stream`, int32 [len(blocks), context + 1]."""
    tokens = np.empty((len(blocks), context + 1), np.int32)
    for row, block in zip(tokens, blocks, strict=True):
        row[:] = stream.read(int(block) * context, context + 1)
    return tokens


def spread_blocks(stream: TokenStream, context: int, tokens: int) -> np.ndarray:
    """Block ids for an evaluation, ascending and evenly spread over the stream, int64 [tokens // context].

    Args:
      stream: the evaluation domain.
      context: tokens in a sequence.
      tokens: how much to evaluate; 0, or more than there is, means all blocks.

    Raises:
      UserError: `tokens` or the stream is less than one context.
    """
    available = count_blocks(stream, context)
    wanted = tokens // context
    if tokens and not wanted:
        raise UserError(f"config.eval.tokens is {tokens}: must be 0 or at least one sequence, config.model.context {context}")
    if not wanted or wanted >= available:
        return np.arange(available, dtype=np.int64)
    # The middle block of each of `wanted` equal stretches.
    return (2 * np.arange(wanted, dtype=np.int64) + 1) * available // (2 * wanted)


def documents_between(stream: TokenStream, context: int, blocks: np.ndarray) -> np.ndarray:
    """Whether a document ends between a block and the one before it: bool [len(blocks)], for ascending `blocks`.

    The first is False, and so are neighbours, which share the only token there. A gap is read up to its first end token: about a
    document's length each, and in all never more than the stream.
    """
    found = np.zeros(len(blocks), bool)
    for i in np.flatnonzero(np.diff(blocks) > 1) + 1:
        gap = range((int(blocks[i - 1]) + 1) * context, int(blocks[i]) * context, _SCAN)  # from the last target before it
        pieces = (stream.read(start, min(_SCAN, gap.stop - start)) for start in gap)
        found[i] = any((piece == stream.index.tokenizer.end_token).any() for piece in pieces)
    return found


def document_ids(tokens_NxL: np.ndarray, between_N: np.ndarray, end_token: int, first: int = 0) -> tuple[np.ndarray, int]:
    """Which document each target is of, int64 [N, L - 1] and ascending, and `first` for the blocks that follow.

    A document's end token belongs to it. The numbers tell documents apart; those that lie between blocks are not counted.

    Args:
      tokens_NxL: ascending blocks of a stream.
      between_N: of these blocks, from `documents_between`.
      end_token: of the stream's tokenizer.
      first: for the first target, what the call for the blocks before these returned.
    """
    ends_NxT = tokens_NxL[:, :-1] == end_token  # a target's document begins after the last of those before it
    before_N = first + np.cumsum(between_N) + np.concatenate([[0], np.cumsum(ends_NxT.sum(1))])[:-1]
    return before_N[:, None] + np.cumsum(ends_NxT, axis=1), int(first + between_N.sum() + ends_NxT.sum())


class TokenSource:
    """Shuffled training sequences of a stream.

    Every epoch is another permutation of all blocks, drawn by Grain's index shuffle from (seed, epoch). No state is kept:
    sequence n is the same whoever asks, in whatever order, on however many hosts.
    """

    def __init__(self, stream: TokenStream, *, context: int, seed: int, train_tokens: int = 0, repeat: bool = False) -> None:
        """Plans the order of blocks; reads nothing.

        Args:
          stream: the training data.
          context: tokens in a sequence.
          seed: of the order; any integer from 0.
          train_tokens: use only train_tokens // context blocks, scattered over the stream; 0 uses all. The choice does
            not depend on `seed`, and a smaller one is part of a larger one.
          repeat: allow sequences of a second epoch and later.

        Raises:
          UserError: the stream or `train_tokens` is less than one context, or `train_tokens` more than there is.
        """
        import grain  # takes a second or two to import

        self.stream = stream
        self.context = context
        self.seed = seed
        self.repeat = repeat
        blocks = count_blocks(stream, context)
        if blocks > _MAX_BLOCKS:
            raise UserError(f"{stream.directory}: {blocks} sequences of {context} tokens; the shuffle can order at most {_MAX_BLOCKS}")
        if train_tokens and not context <= train_tokens < (blocks + 1) * context:
            raise UserError(
                f"config.data.train_tokens is {train_tokens}: must be 0 or from {context}, one context, "
                f"to {blocks * context}, what {stream.directory} holds in whole sequences"
            )
        self.sequences_per_epoch = train_tokens // context if train_tokens else blocks
        self._subset = grain.MapDataset.range(blocks).shuffle(seed=_SUBSET_SEED) if train_tokens else None
        # Grain shuffles epoch e with seed + e: from seeds 0 and 1 as they are, the second epoch of one run would be the
        # first of the other, and repeats over seeds would not be independent.
        spread_seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
        self._order = grain.MapDataset.range(self.sequences_per_epoch).shuffle(seed=spread_seed).repeat()

    def blocks(self, first_sequence: int, count: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Block ids of sequences first_sequence, …, first_sequence + count - 1 of the run, int64 [count]; with `rows` of those alone,
        counted from first_sequence.

        Raises:
          UserError: they reach into a second epoch, and `repeat` is off.
        """
        if first_sequence < 0 or count < 0:
            raise IndexError(f"sequences {first_sequence} to {first_sequence + count} asked for")
        self.check_length((first_sequence + count) * self.context)
        wanted = range(first_sequence, first_sequence + count) if rows is None else (first_sequence + rows).tolist()
        ids = [self._order[sequence] for sequence in wanted]
        if self._subset is not None:
            ids = [self._subset[i] for i in ids]
        return np.asarray(ids, np.int64)

    def batch(self, first_sequence: int, count: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Sequences first_sequence, …, first_sequence + count - 1 of the run, int32 [count, context + 1]; with `rows` those alone,
        counted from first_sequence: what one process reads of a batch.

        Raises:
          UserError: they reach into a second epoch, and `repeat` is off.
        """
        return read_blocks(self.stream, self.context, self.blocks(first_sequence, count, rows))

    def check_length(self, train_tokens_of_run: int) -> None:
        """Raises UserError if a run of so many tokens, whole batches, needs a second epoch that `repeat` does not allow."""
        epoch_tokens = self.sequences_per_epoch * self.context
        if train_tokens_of_run > epoch_tokens and not self.repeat:
            raise UserError(
                f"the run reads {train_tokens_of_run} tokens (config.train.tokens up to a whole batch, the largest that "
                f"config.batch allows); one pass over the training data has {epoch_tokens}. Shorten it, or set config.data.repeat=True"
            )


BatchKey = tuple[int, int]  # first sequence, count


def next_batch(key: BatchKey) -> BatchKey:
    """The batch of the same size that follows."""
    first_sequence, count = key
    return first_sequence + count, count


class Prefetcher:
    """Calls a pure function ahead of time, in one worker thread.

    What is asked for need not be what was expected: a key that was not read ahead is fetched at once, and whatever was
    read ahead in vain is dropped. So the size of a batch may change from one call to the next.
    """

    def __init__(self, fetch: Callable[[Any], Any], depth: int, following: Callable[[Any], Hashable | None] | None = None) -> None:
        """Starts nothing yet.

        Args:
          fetch: from a key to its value; a pure function.
          depth: keys read ahead.
          following: from a key to the next one, or None at the end; by default keys are (first_sequence, count), and the
            next batch has the same size.
        """
        self._fetch = fetch
        self._depth = depth
        self._following = following or next_batch
        self._pending: dict[Hashable, Future] = {}
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")

    def get(self, key: Hashable) -> Any:
        """fetch(key), and starts on the keys that follow it. An exception of fetch(key) is raised here."""
        ahead: list[Hashable] = []
        while len(ahead) < self._depth and (following := self._following(ahead[-1] if ahead else key)) is not None:
            ahead.append(following)
        for stale in [pending for pending in self._pending if pending != key and pending not in ahead]:
            self._pending.pop(stale).cancel()
        for wanted in [key, *ahead]:
            if wanted not in self._pending:
                self._pending[wanted] = self._executor.submit(self._fetch, wanted)
        return self._pending.pop(key).result()

    def close(self) -> None:
        """Ends the worker thread, after the fetch that it is at."""
        self._pending.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
