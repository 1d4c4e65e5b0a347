import threading

import numpy as np
import pytest

from scaling_jax.data.shard_writer import ShardWriter
from scaling_jax.data.shards import TokenStream
from scaling_jax.data.source import Prefetcher, TokenSource, document_ids, documents_between, read_blocks, spread_blocks
from scaling_jax.data.tokenizers import ByteTokenizer
from scaling_jax.errors import UserError

CONTEXT = 8
TOKENS = 1000  # 124 blocks of 8, and 8 tokens over


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "tokens"
    with ShardWriter(directory, ByteTokenizer(), shard_tokens=37) as writer:
        writer.add(np.random.default_rng(0).integers(0, 255, TOKENS - 1), TOKENS - 1)
    return TokenStream(directory)


@pytest.fixture(scope="module")
def tokens(stream):
    return np.concatenate([np.fromfile(file, "<u2") for file in sorted(stream.directory.glob("*.bin"))])


def source(stream, **changes):
    return TokenSource(stream, **{"context": CONTEXT, "seed": 0, "repeat": True, **changes})


def test_a_batch_is_rows_of_the_token_sequence(stream, tokens):
    src = source(stream)
    blocks = src.blocks(5, 20)
    batch = src.batch(5, 20)
    assert batch.shape == (20, CONTEXT + 1) and batch.dtype == np.int32
    np.testing.assert_array_equal(batch, np.stack([tokens[b * CONTEXT : b * CONTEXT + CONTEXT + 1] for b in blocks]))


@pytest.mark.parametrize("length, blocks", [(17, 2), (16, 1), (9, 1), (24, 2), (25, 3)])
def test_number_of_blocks_leaves_room_for_the_last_target(tmp_path, length, blocks):
    with ShardWriter(tmp_path / "tokens", ByteTokenizer()) as writer:
        writer.add(np.arange(length - 1), length - 1)
    src = source(TokenStream(tmp_path / "tokens"))
    assert src.sequences_per_epoch == blocks
    assert sorted(src.batch(0, blocks)[:, 0]) == list(range(0, blocks * CONTEXT, CONTEXT))


def test_each_epoch_is_another_permutation_of_all_blocks(stream):
    src = source(stream)
    assert src.sequences_per_epoch == 124
    epochs = [src.blocks(124 * epoch, 124) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(124))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], np.arange(124))


def test_runs_with_neighbouring_seeds_share_no_epoch(stream):
    # Grain alone shuffles epoch e with seed + e, so seed 1 would begin with seed 0's second epoch.
    orders = {tuple(source(stream, seed=seed).blocks(124 * epoch, 124)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    source(stream, seed=2**40).blocks(0, 1)  # Grain alone takes 32 bits


def test_a_batch_depends_on_its_place_only(stream):
    one = source(stream, seed=7)
    rows = [source(stream, seed=7).batch(n, 1) for n in (130, 120)]  # out of order, each from a fresh source
    span = one.batch(120, 11)  # across the end of an epoch
    np.testing.assert_array_equal(span[10:], rows[0])
    np.testing.assert_array_equal(span[:1], rows[1])
    np.testing.assert_array_equal(np.concatenate([one.batch(120, 3), one.batch(123, 8)]), span)
    assert one.batch(3, 0).shape == (0, CONTEXT + 1)
    with pytest.raises(IndexError):
        one.batch(-1, 4)


def test_the_order_of_a_seed_is_pinned(stream):
    # A changed order would silently change every resumed run; it may change only with Grain's or numpy's own generator.
    assert source(stream, seed=3).blocks(0, 6).tolist() == [19, 52, 83, 35, 92, 73]


def test_subsets_are_nested_scattered_and_the_same_for_every_seed(stream):
    def subset(train_tokens, seed=0):
        src = source(stream, train_tokens=train_tokens, seed=seed)
        assert src.sequences_per_epoch == train_tokens // CONTEXT
        blocks = [src.blocks(epoch * src.sequences_per_epoch, src.sequences_per_epoch) for epoch in range(3)]
        assert all(sorted(other) == sorted(blocks[0]) for other in blocks)  # the same ones in every epoch
        assert len(set(blocks[0])) == len(blocks[0])
        return set(blocks[0].tolist())

    small, middle, full = subset(10 * CONTEXT), subset(40 * CONTEXT + 3), subset(124 * CONTEXT)
    assert small < middle < full == set(range(124))
    assert subset(10 * CONTEXT, seed=9) == small
    assert min(middle) < 20 and max(middle) > 100  # not a stretch of the stream


@pytest.mark.parametrize("train_tokens", [CONTEXT - 1, 125 * CONTEXT, 10**9])
def test_impossible_subsets_are_refused(stream, train_tokens):
    with pytest.raises(UserError, match=rf"config\.data\.train_tokens is {train_tokens}: .*from 8.*to 992"):
        source(stream, train_tokens=train_tokens)


def test_a_stream_shorter_than_one_sequence_is_refused(tmp_path):
    with ShardWriter(tmp_path / "tokens", ByteTokenizer()) as writer:
        writer.add(np.arange(7), 7)
    short = TokenStream(tmp_path / "tokens")
    for use in (source, lambda stream: spread_blocks(stream, CONTEXT, 0)):
        with pytest.raises(UserError, match="tokens: 8 tokens; a sequence needs 9"):
            use(short)


def test_a_second_epoch_needs_repeat(stream):
    once = source(stream, repeat=False)
    once.check_length(992)
    assert len(once.batch(0, 124)) == 124
    with pytest.raises(UserError, match=r"993 tokens.* 992.*config\.data\.repeat=True"):
        once.check_length(993)
    with pytest.raises(UserError, match="repeat"):
        once.batch(124, 1)
    with pytest.raises(UserError, match=r" 80\b"):
        source(stream, repeat=False, train_tokens=80).check_length(81)
    source(stream).check_length(10**12)


def test_evaluation_blocks_are_even_and_at_most_all(stream):
    for wanted in (1, 2, 3, 10, 61, 123):
        blocks = spread_blocks(stream, CONTEXT, wanted * CONTEXT + 7)
        assert blocks.dtype == np.int64 and len(blocks) == wanted
        edges = np.concatenate([[-1], blocks, [124]])
        gaps = np.diff(edges)
        assert gaps.min() >= 1 and blocks.max() < 124
        assert np.ptp(gaps[1:-1]) <= 1 if wanted > 1 else True
        assert abs(int(gaps[0]) - int(gaps[-1])) <= 2  # no end is left out
    for tokens in (0, 992, 10**9):
        assert spread_blocks(stream, CONTEXT, tokens).tolist() == list(range(124))
    with pytest.raises(UserError, match=r"config\.eval\.tokens is 7.* 8"):
        spread_blocks(stream, CONTEXT, 7)


def test_blocks_are_read_in_the_order_asked(stream, tokens):
    rows = read_blocks(stream, CONTEXT, [123, 0, 123])
    assert rows.tolist() == [tokens[984:993].tolist(), tokens[:9].tolist(), tokens[984:993].tolist()]


def test_prefetching_gives_what_was_asked_for(stream):
    src = source(stream)
    first = 0
    with Prefetcher(lambda key: src.batch(*key), depth=3) as ahead:
        for count in (4, 4, 4, 7, 7, 2, 4):  # the batch size changes in mid-flight
            np.testing.assert_array_equal(ahead.get((first, count)), src.batch(first, count))
            first += count


def test_prefetching_reads_ahead_and_each_key_once():
    calls, third = [], threading.Event()

    def fetch(key):
        calls.append(key)
        if key == 3:
            third.set()
        return key * key

    ahead = Prefetcher(fetch, depth=2, following=lambda key: key + 1 if key < 5 else None)
    assert ahead.get(1) == 1
    assert third.wait(10)  # before it was asked for
    assert [ahead.get(key) for key in (2, 3, 4, 5)] == [4, 9, 16, 25]
    ahead.close()
    assert calls == [1, 2, 3, 4, 5]


def test_batches_of_one_size_are_fetched_once_each():
    calls = []
    with Prefetcher(lambda key: calls.append(key) or key, depth=2) as ahead:
        assert [ahead.get((first, 4)) for first in (0, 4, 8)] == [(0, 4), (4, 4), (8, 4)]
    assert calls == [(first, 4) for first in range(0, 4 * len(calls), 4)]


def test_a_failure_surfaces_where_the_value_is_asked_for():
    calls = []

    def fetch(key):
        calls.append(key)
        if key == 2:
            raise UserError("no 2")
        return key

    with Prefetcher(fetch, depth=2, following=lambda key: key + 1) as ahead:
        assert ahead.get(1) == 1
        for _ in range(2):  # asked again, it is fetched again
            with pytest.raises(UserError, match="no 2"):
                ahead.get(2)
        assert calls.count(2) == 2
        assert ahead.get(3) == 3


def test_closing_ends_the_thread():
    ahead = Prefetcher(lambda key: threading.current_thread(), depth=1)
    worker = ahead.get((0, 1))
    assert worker is not threading.current_thread()
    ahead.close()
    assert not worker.is_alive()


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Short ones, empty ones, and one that is longer than many blocks."""
    directory = tmp_path_factory.mktemp("documents") / "tokens"
    rng = np.random.default_rng(4)
    with ShardWriter(directory, ByteTokenizer(), shard_tokens=101) as writer:
        for length in [3, 0, 0, 9, 200, *rng.integers(0, 30, 40), 90, 8, 7, 1]:
            writer.add(rng.integers(0, 255, length), int(length))
    return TokenStream(directory)


@pytest.mark.parametrize("scan", [3, 1 << 14])
@pytest.mark.parametrize("wanted", [0, 1, 7, 30, 60, 80])
def test_every_target_is_told_its_document(documents, monkeypatch, scan, wanted):
    """That of the first token after the last end token before it, whatever lies between two blocks; in pieces of 4 blocks as well."""
    monkeypatch.setattr("scaling_jax.data.source._SCAN", scan)
    everything, blocks = documents.read(0, len(documents)), spread_blocks(documents, CONTEXT, wanted * CONTEXT)
    number = np.concatenate([[0], np.cumsum(everything == 255)])[:-1]  # of each token: end tokens strictly before it
    expected = np.unique(number[blocks[:, None] * CONTEXT + 1 + np.arange(CONTEXT)], return_inverse=True)[1]
    between = documents_between(documents, CONTEXT, blocks)
    found, first = [], 0
    for start in range(0, len(blocks), 4):
        part = slice(start, start + 4)
        ids, first = document_ids(read_blocks(documents, CONTEXT, blocks[part]), between[part], 255, first)
        found.append(ids)
    found = np.concatenate(found)
    assert (np.diff(found.reshape(-1)) >= 0).all()
    np.testing.assert_array_equal(np.unique(found, return_inverse=True)[1].reshape(-1), expected.reshape(-1))
    if not wanted:
        assert len(set(found.reshape(-1))) == len(set(number[1 : len(blocks) * CONTEXT + 1]))


def test_a_gap_is_read_no_further_than_its_first_end_token(documents, monkeypatch):
    read = []
    monkeypatch.setattr(documents, "read", lambda start, count: read.append(count) or np.full(count, 255))
    assert documents_between(documents, 2, np.array([0, 1, 60_000])).tolist() == [False, False, True]
    assert read == [1 << 14]


def test_rows_of_a_batch_are_those_of_the_whole(stream):
    for src in (source(stream), source(stream, train_tokens=300)):
        rows = np.asarray([1, 4, 5, 7])
        np.testing.assert_array_equal(src.batch(3, 8, rows), src.batch(3, 8)[rows])
