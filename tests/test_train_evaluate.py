"""Held-out loss against plain loops over documents, positions and bytes, and against the model called by hand."""

import math

import numpy as np
import pytest
from flax import nnx
from helpers import small_config

from scaling_jax.data import bpe
from scaling_jax.data.corpus import RunData, open_run_data
from scaling_jax.data.shard_writer import ShardWriter
from scaling_jax.data.shards import TokenStream
from scaling_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from scaling_jax.model import sequence_losses
from scaling_jax.train.evaluate import Estimate, Evaluator, HeldOut, evaluate, position_edges
from scaling_jax.train.step import Trainer

CONTEXT = 12
BYTES_V = ByteTokenizer.bytes_V


class FakeTrainer:
    """Losses that depend on the token, on its position and on what came before."""

    eval_sharding = None

    def eval(self, params, tokens_BxL):
        before, target = tokens_BxL[:, :-1].astype(np.float32), tokens_BxL[:, 1:]
        position = np.arange(CONTEXT, dtype=np.float32)
        return (3 + np.sin(target * 0.7) + 0.01 * before - 0.1 * position).astype(np.float32)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """40 documents of 0 to 119 bytes."""
    directory = tmp_path_factory.mktemp("data") / "tokens"
    rng = np.random.default_rng(0)
    with ShardWriter(directory, ByteTokenizer()) as writer:
        for length in rng.integers(0, 120, 40):
            writer.add(rng.integers(60, 250, length), int(length))
    return TokenStream(directory)


def targets(held_out):
    """Of every target, by hand: loss, document, bytes, position, each [N * context]."""
    stream = held_out.stream
    everything = stream.read(0, len(stream))
    number = np.concatenate([[0], np.cumsum(everything == 255)])[:-1]
    place = held_out.blocks[:, None] * CONTEXT + 1 + np.arange(CONTEXT)
    losses = FakeTrainer().eval(None, held_out.read()).astype(np.float64)
    position = np.broadcast_to(np.arange(1, CONTEXT + 1), place.shape)
    return tuple(x.reshape(-1) for x in (losses, number[place], everything[place] != 255, position))


def ratio(values, weights, documents) -> Estimate:
    ids = np.unique(documents)
    s, w = (np.array([x[documents == i].sum() for i in ids]) for x in (values, weights))
    value, count = s.sum() / w.sum(), len(ids)
    return Estimate(value, math.sqrt(count / (count - 1) * ((s - value * w) ** 2).sum()) / w.sum())


@pytest.mark.parametrize("tokens", [0, 30 * CONTEXT])
def test_losses_and_bits_and_positions_are_those_of_a_loop(stream, tokens):
    """In batches that do not divide the sequences, so that padding would show."""
    held_out, progress = HeldOut(stream, CONTEXT, tokens, BYTES_V), []
    found = evaluate(FakeTrainer(), None, held_out, 16, by_position=True, on_progress=progress.append)
    loss, document, has_byte, position = targets(held_out)
    ones = np.ones_like(loss)
    assert found.tokens == len(loss) == held_out.tokens == progress[-1] and progress[0] == 16 * CONTEXT
    assert found.documents == len(np.unique(document)) and (tokens or found.documents == 40)
    np.testing.assert_allclose(found.loss, ratio(loss, ones, document), rtol=1e-6)
    np.testing.assert_allclose(found.bits_per_byte, ratio(loss / math.log(2), has_byte.astype(float), document), rtol=1e-6)
    assert [(one.first, one.last) for one in found.positions] == [(p, p) for p in range(1, CONTEXT + 1)]
    assert [(one.first, one.last) for one in found.bins] == [(1, 1), (2, 2), (3, 3), (4, 5), (6, 7), (8, 12)]
    for one in [*found.positions, *found.bins]:
        among = (position >= one.first) & (position <= one.last)
        np.testing.assert_allclose(one.loss, ratio(loss[among], ones[among], document[among]), rtol=1e-6)


def test_the_record_of_a_run_has_losses_and_bits_only(stream):
    config = small_config(model__context=CONTEXT, eval__tokens=0, eval__batch_sequences=7)
    data = RunData(None, {"a": stream, "b": stream}, 256, "", BYTES_V)
    record = Evaluator(config, data, FakeTrainer())(None)
    assert list(record) == [f"eval/{name}/{key}" for name in "ab" for key in ("loss", "loss_se", "bits_per_byte", "bits_per_byte_se")]
    found = evaluate(FakeTrainer(), None, HeldOut(stream, CONTEXT, 0, BYTES_V), 64)
    np.testing.assert_allclose(list(record.values())[:4], [*found.loss, *found.bits_per_byte], rtol=1e-12)
    assert not found.positions and not found.bins


def test_one_document_has_no_error(tmp_path):
    with ShardWriter(tmp_path / "one", ByteTokenizer()) as writer:
        writer.add(np.arange(60, 160), 100)
    found = evaluate(FakeTrainer(), None, HeldOut(TokenStream(tmp_path / "one"), CONTEXT, 0, BYTES_V), 4, by_position=True)
    assert found.documents == 1 and found.loss.value > 0 and found.bits_per_byte.value > 0
    assert {one.loss.se for one in [*found.positions, *found.bins]} | {found.loss.se, found.bits_per_byte.se} == {None}


def test_a_loss_that_is_not_finite_is_told(stream):
    class Broken(FakeTrainer):
        def eval(self, params, tokens_BxL):
            return super().eval(params, tokens_BxL) * np.where(np.arange(len(tokens_BxL)) == 2, np.nan, 1)[:, None]

    found = evaluate(Broken(), None, HeldOut(stream, CONTEXT, 0, BYTES_V), 16)
    assert math.isnan(found.loss.value) and found.loss.se is None and found.bits_per_byte == Estimate(None, None)


@pytest.mark.parametrize("tokens", [0, 10 * CONTEXT])
def test_bits_of_a_bpe_count_the_bytes_of_every_token(tmp_path, tokens):
    """In documents whose tokens are long ones, or single letters: by the places in the text that the package itself says."""
    prose = "the states of the union and the people of the states "
    (tmp_path / "tokenizer.json").write_text(bpe.train_bpe([prose * 20], 280))
    tokenizer, rng, bytes_N = FileTokenizer(tmp_path / "tokenizer.json"), np.random.default_rng(0), []
    with ShardWriter(tmp_path / "tokens", tokenizer) as writer:
        for i, words in enumerate(rng.integers(1, 9, 30)):
            text = prose * words if i % 2 else "".join(rng.choice(list("qzxjvkw"), 5 * words))
            writer.add(tokenizer.encode(text), len(text))
            bytes_N += [end - start for start, end in tokenizer._tokenizer.encode(text).offsets] + [0]
    stream = TokenStream(tmp_path / "tokens")
    everything, bytes_N = stream.read(0, len(stream)), np.array(bytes_N, float)
    assert tokenizer.bytes_V[everything].sum() == bytes_N.sum() == stream.index.text_bytes
    held_out = HeldOut(stream, CONTEXT, tokens, tokenizer.bytes_V)
    found = evaluate(FakeTrainer(), None, held_out, 16)
    place = (held_out.blocks[:, None] * CONTEXT + 1 + np.arange(CONTEXT)).reshape(-1)
    document = (np.cumsum(everything == tokenizer.end_token) - (everything == tokenizer.end_token))[place]
    loss = FakeTrainer().eval(None, held_out.read()).astype(np.float64).reshape(-1)
    np.testing.assert_allclose(found.bits_per_byte, ratio(loss / math.log(2), bytes_N[place], document), rtol=1e-6)
    assert evaluate(FakeTrainer(), None, HeldOut(stream, CONTEXT, tokens), 16).bits_per_byte == Estimate(None, None)


@pytest.mark.parametrize("context", [1, 2, 3, 64, 1000, 1024])
def test_bins_of_positions_cover_all_and_grow(context):
    edges = position_edges(context)
    widths = np.diff(edges)
    assert edges[0] == 0 and edges[-1] == context and (widths > 0).all()
    assert all(b >= a for a, b in zip(widths, widths[1:-1], strict=False)) and 4 * widths[-1] >= context


def test_sequences_are_spread_and_their_losses_those_of_the_model(quick_compilation):
    config = small_config(eval__tokens=50 * 16, eval__batch_sequences=16)
    data, trainer = open_run_data(config), Trainer(config)
    params = trainer.init(0).params
    evaluator = Evaluator(config, data, trainer)
    stream, blocks = data.domains["heldout"], evaluator.sequences["heldout"]
    everything = stream.read(0, len(stream))
    assert blocks.shape == (50, 17)
    for i, block in enumerate(blocks):  # the i-th comes from the i-th fiftieth of the stream
        low, high = (round(len(everything) * edge / 50 / 16) * 16 for edge in (i, i + 1))
        assert any((everything[s : s + 17] == block).all() for s in range(max(low - 16, 0), high + 16, 16))
    losses = np.asarray(sequence_losses(nnx.merge(trainer.graph, params)(blocks[:, :-1]), blocks[:, 1:]), np.float64)
    np.testing.assert_allclose(evaluator.losses(params, blocks), losses, rtol=1e-5)
    np.testing.assert_allclose(evaluator(params)["eval/heldout/loss"], losses.mean(), rtol=1e-6)
