"""Sampling: what is drawn, with what probability, from which logits, and how it becomes text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from scaling_jax import Parametrization, Transformer, TransformerConfig
from scaling_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from scaling_jax.interop.sample import Reader, Sampling, TextStream, draw, nucleus, sample_tokens

CONTEXT = 8


@pytest.fixture(autouse=True)
def _quick(quick_compilation):
    pass


def filled(config):
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, Parametrization("mup", base_width=16), rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), params))


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(vocab_size=260, width=32, depth=2, head_dim=8, context=CONTEXT)
    return filled(config)


@pytest.fixture(scope="module")
def reader(model):
    return Reader(model)


@pytest.fixture(scope="module")
def forward(model):
    """Logits of the next token, from the whole forward pass of a window of any length."""
    graph, params = nnx.split(model)
    whole = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))

    def next_logits(window):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(window)] = window
        return np.asarray(whole(params, padded))[0, len(window) - 1]

    return next_logits


def smallest_set(p, top_p):
    """By the definition: sets of the k likeliest, k growing."""
    order = np.lexsort((np.arange(len(p)), -p))
    for k in range(1, len(p) + 1):
        if p[order[:k]].sum() >= top_p:
            break
    return set(order[:k].tolist())


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    logits_NxV = np.random.default_rng(0).normal(0, 2, (200, 17)).astype(np.float32)
    found_NxV = jax.jit(jax.vmap(nucleus, (0, None)))(logits_NxV, jnp.float32(top_p))
    for logits, found in zip(logits_NxV, np.asarray(found_NxV), strict=True):
        p = np.exp(logits.astype(np.float64))
        assert set(np.flatnonzero(np.isfinite(found)).tolist()) == smallest_set(p / p.sum(), top_p)
        np.testing.assert_array_equal(found[np.isfinite(found)], logits[np.isfinite(found)])


def test_the_nucleus_at_its_edges():
    even = jnp.zeros(8)
    assert np.flatnonzero(np.isfinite(nucleus(even, 0.5))).tolist() == [0, 1, 2, 3]
    assert np.isfinite(nucleus(even, 1.0)).all()
    steep = jnp.asarray([0.0, 20.0, -20.0])  # what comes before the last is 1 in float32
    assert np.isfinite(nucleus(steep, 1.0)).all() and np.flatnonzero(np.isfinite(nucleus(steep, 0.5))).tolist() == [1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_tokens_are_drawn_as_often_as_they_should(temperature, top_p):
    count, vocab = 20_000, 6
    logits = np.asarray([1.0, 0.0, 2.0, -1.0, 0.5, 1.5, 9.0, 9.0], np.float32)  # the last two are beyond the tokenizer's vocabulary
    p = np.exp(logits[:vocab].astype(np.float64) / temperature)
    kept = smallest_set(p / p.sum(), top_p)
    p = np.where(np.isin(np.arange(vocab), list(kept)), p, 0)
    p /= p.sum()
    drawn = jax.vmap(lambda n: draw(jnp.asarray(logits), jax.random.key(1), n, Sampling(temperature, top_p), vocab))(jnp.arange(count))
    share = np.bincount(np.asarray(drawn), minlength=8) / count
    assert share[vocab:].sum() == 0 and (share[:vocab][p == 0] == 0).all()
    np.testing.assert_array_less(np.abs(share[:vocab] - p), 4.5 * np.sqrt(p * (1 - p) / count) + 1e-12)


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-38, 1e-6])
def test_no_temperature_takes_the_likeliest_token(temperature):
    logits = jnp.asarray([10.0, 30.0, 29.99, 50.0])  # over the smallest temperature these are infinite
    assert {int(draw(logits, jax.random.key(0), n, Sampling(temperature), 3)) for n in range(20)} == {1}


def test_logits_are_those_of_the_window_at_once(reader, forward):
    """One by one, through two fresh starts where the context is full."""
    text = np.random.default_rng(3).integers(0, 256, 24)
    window = list(text[:3])
    found = [np.asarray(reader.start(window))]
    wanted = [forward(window)]
    for token in text[3:]:
        window = [*window, token] if len(window) < CONTEXT else [*window[-(CONTEXT // 2 - 1) :], token]
        found.append(np.asarray(reader.read(token)))
        wanted.append(forward(window))
        assert reader.window == window
    assert np.ptp(wanted[0]) > 1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, CONTEXT, CONTEXT + 5])
def test_a_start_of_any_length(reader, forward, length):
    text = np.random.default_rng(length).integers(0, 256, length)
    np.testing.assert_allclose(reader.start(text), forward(text[-CONTEXT:]), rtol=0, atol=1e-5)
    more = [*text[-CONTEXT:], 7]
    kept = more if length < CONTEXT else more[-CONTEXT // 2 :]
    np.testing.assert_allclose(reader.read(7), forward(kept), rtol=0, atol=1e-5)


def test_a_context_of_one_token():
    config = TransformerConfig(vocab_size=16, width=8, depth=1, head_dim=8, context=1)
    reader = Reader(filled(config))
    first = np.asarray(reader.start([3]))
    reader.read(5)
    np.testing.assert_array_equal(reader.read(3), first)


def take(tokens, count):
    return [token for _, token in zip(range(count), tokens, strict=False)]


def test_the_likeliest_tokens_are_those_of_a_loop_without_cache(reader, forward):
    window, wanted = [1, 2], []
    for _ in range(12):
        wanted.append(int(np.argmax(forward(window)[:256])))
        window = [*window, wanted[-1]] if len(window) < CONTEXT else [*window[-(CONTEXT // 2 - 1) :], wanted[-1]]
    assert take(sample_tokens(reader, [1, 2], ByteTokenizer(), jax.random.key(0), Sampling(0.0)), 12) == wanted


def test_the_key_decides(reader):
    a, b, c = (take(sample_tokens(reader, [1, 2], ByteTokenizer(), jax.random.key(k), Sampling()), 20) for k in (0, 0, 1))
    assert a == b != c and len(set(a)) > 5 and max(a) < 256


TEXT = "Où était — 日本語 😀 the naïve 👩‍🚀?"


def streamed(tokenizer, tokens, before=()):
    stream = TextStream(tokenizer, before)
    return [*(stream.add(token) for token in tokens), stream.end()]


def test_bytes_are_shown_as_whole_characters():
    pieces = streamed(ByteTokenizer(), ByteTokenizer().encode(TEXT).tolist())
    assert "".join(pieces) == TEXT
    assert [piece for piece in pieces if piece] == list(TEXT)  # each as soon as it is complete


def test_bytes_that_are_no_text_do_not_hold_up_what_follows():
    pieces = streamed(ByteTokenizer(), [*b"a", 0xC3, *b"b", 0xE6, 0x97])
    assert pieces == ["a", "", "\ufffdb", "", "", "\ufffd"]


@pytest.fixture(scope="module", params=["byte level", "metaspace"])
def file_tokenizer(request, tmp_path_factory):
    made = Tokenizer(models.BPE())
    if request.param == "byte level":
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # whose first word has no space before it
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = sorted(set(TEXT))
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the naïve and the others of the others"] * 5, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return FileTokenizer(path)


def test_tokens_of_a_file_are_shown_as_they_decode(file_tokenizer):
    tokens = file_tokenizer.encode(TEXT).tolist()
    whole = file_tokenizer.decode(tokens)
    assert whole == TEXT and len(tokens) < len(TEXT.encode())
    for cut in range(len(tokens)):
        before = file_tokenizer.decode(tokens[:cut])
        if before.endswith("\ufffd"):  # amid a character, where no prompt ends
            continue
        pieces = streamed(file_tokenizer, tokens[cut:], tokens[:cut])
        assert before + "".join(pieces) == whole and "\ufffd" not in "".join(pieces)
