import json

import numpy as np
import pytest

from scaling_jax.data.tokenizers import ByteTokenizer, FileTokenizer, load_tokenizer
from scaling_jax.errors import UserError

TEXT = "Naïve café: 東京 🙂\n\n\ttabs, and  two spaces.\r\n"


def train_file(path, special=("<|endoftext|>",), vocab_size=400):
    """A byte-level BPE tokenizer.json at `path`."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the union of the states and the people of the union"] * 20, trainer)
    tokenizer.save(str(path))
    return path


def test_byte_tokens_are_the_utf8_bytes():
    tokenizer = load_tokenizer("bytes")
    tokens = tokenizer.encode(TEXT)
    assert tokens.tolist() == list(TEXT.encode("utf-8"))
    assert np.issubdtype(tokens.dtype, np.integer)
    assert (tokenizer.vocab_size, tokenizer.end_token, tokenizer.name) == (256, 255, "bytes")
    assert tokenizer.encode("").shape == (0,)


def test_byte_decoding_drops_end_tokens_and_survives_garbage():
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(np.concatenate([tokens, [255], tokens])) == TEXT + TEXT
    assert tokenizer.decode([0xC3]) == "\ufffd"  # half a character


def test_file_tokenizer_returns_the_text_and_has_merges(tmp_path):
    tokenizer = load_tokenizer(str(train_file(tmp_path / "tokenizer.json")))
    tokens = tokenizer.encode(TEXT + "the union")
    assert tokenizer.decode(tokens) == TEXT + "the union"
    assert len(tokenizer.encode("the union")) < len("the union")  # it does merge
    assert tokens.max() < tokenizer.vocab_size and tokens.dtype == np.int32
    assert tokenizer.end_token == 0
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_token]) == "a"


def test_text_that_spells_the_end_token_stays_text(tmp_path):
    # Otherwise a document about tokenizers would be cut into several.
    tokenizer = FileTokenizer(train_file(tmp_path / "tokenizer.json"))
    tokens = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_token not in tokens
    assert tokenizer.decode(tokens) == "a<|endoftext|>b"


def test_truncation_padding_and_added_specials_of_the_file_are_ignored(tmp_path):
    import tokenizers

    path = train_file(tmp_path / "tokenizer.json", ("[SEP]",))
    plain = FileTokenizer(path).encode("the people " * 50).tolist()
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.enable_truncation(8)
    inner.enable_padding(length=4096)
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 0)])
    inner.save(str(path))
    assert len(inner.encode("the people " * 50).ids) == 4096  # the file does say so
    assert FileTokenizer(path).encode("the people " * 50).tolist() == plain


def test_vocabulary_is_bounded_by_the_largest_id_where_ids_have_gaps(tmp_path):
    path = train_file(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] = 5000
    path.write_text(json.dumps(content))
    assert FileTokenizer(path).vocab_size == 5001


def test_end_token_is_the_first_known_one(tmp_path):
    tokenizer = FileTokenizer(train_file(tmp_path / "a.json", ("[SEP]", "</s>", "<eos>")))
    assert tokenizer.end_token == 1
    with pytest.raises(UserError, match=r"b\.json.*<\|endoftext\|>"):
        FileTokenizer(train_file(tmp_path / "b.json", ("<pad>",)))


def test_fingerprint_follows_the_content_and_not_the_path(tmp_path):
    first = FileTokenizer(train_file(tmp_path / "a.json"))
    same = FileTokenizer(train_file(tmp_path / "b.json"))
    other = FileTokenizer(train_file(tmp_path / "c.json", vocab_size=262))
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_bad_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="tokenizer.json"):
        load_tokenizer(str(path))
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))  # a directory
