import json
import types

import numpy as np
import pytest

from scaling_jax.data.shard_writer import ShardWriter
from scaling_jax.data.shards import TokenStream, is_token_directory
from scaling_jax.data.tokenizers import ByteTokenizer
from scaling_jax.errors import UserError


def numbers(vocab_size):
    """A stand-in for a tokenizer whose tokens are numbers."""
    return types.SimpleNamespace(
        name=f"numbers{vocab_size}", vocab_size=vocab_size, end_token=0, fingerprint=f"{vocab_size:064x}", lossless=False
    )


def write(directory, lengths=(5, 1, 12, 0, 7), vocab_size=1000, shard_tokens=4):
    """Random documents; returns the tokens that the directory should hold."""
    rng = np.random.default_rng(0)
    expected = []
    with ShardWriter(directory, numbers(vocab_size), shard_tokens) as writer:
        for length in lengths:
            document = rng.integers(1, vocab_size, length)
            writer.add(document, text_bytes=3 * length)
            expected += [*document, 0]
    return np.asarray(expected)


@pytest.mark.parametrize("vocab_size, itemsize", [(256, 2), (65536, 2), (65537, 4), (1 << 20, 4)])
def test_every_read_equals_the_concatenated_documents(tmp_path, vocab_size, itemsize):
    expected = write(tmp_path / "tokens", vocab_size=vocab_size)
    stream = TokenStream(tmp_path / "tokens", verify=True)
    assert len(stream) == len(expected) == 30
    sizes = [file.stat().st_size for file in sorted((tmp_path / "tokens").glob("*.bin"))]
    assert sizes == [4 * itemsize] * 7 + [2 * itemsize]
    for start in range(31):
        for count in range(31 - start):
            tokens = stream.read(start, count)
            assert tokens.dtype == np.int32
            np.testing.assert_array_equal(tokens, expected[start : start + count])


def test_tokens_of_the_whole_range_survive(tmp_path):
    # 65535 needs all 16 bits; 70000 would wrap around in 16.
    for vocab_size, token in ((65536, 65535), (70001, 70000)):
        with ShardWriter(tmp_path / str(vocab_size), numbers(vocab_size)) as writer:
            writer.add([token], 1)
        assert TokenStream(tmp_path / str(vocab_size)).read(0, 2).tolist() == [token, 0]


def test_shards_are_little_endian(tmp_path):
    with ShardWriter(tmp_path / "tokens", numbers(1000)) as writer:
        writer.add([0x102], 1)
    assert (tmp_path / "tokens" / "tokens-00000.bin").read_bytes() == b"\x02\x01\x00\x00"


@pytest.mark.parametrize("start, count", [(-1, 2), (0, 31), (30, 1), (5, -1)])
def test_reads_outside_are_refused(tmp_path, start, count):
    write(tmp_path / "tokens")
    with pytest.raises(IndexError):
        TokenStream(tmp_path / "tokens").read(start, count)


def test_index_counts(tmp_path):
    write(tmp_path / "tokens")
    index = TokenStream(tmp_path / "tokens").index
    assert (index.tokens, index.documents, index.text_bytes, index.vocab_size) == (30, 5, 75, 1000)
    assert index.tokenizer.end_token == 0


def test_documents_in_parts_equal_documents_at_once(tmp_path):
    text = np.arange(1, 200)
    with ShardWriter(tmp_path / "whole", ByteTokenizer(), 16) as writer:
        writer.add(text, 199)
    with ShardWriter(tmp_path / "parts", ByteTokenizer(), 16) as writer:
        for part in np.array_split(text, 7):
            writer.extend(part, len(part))
        writer.end_document()
        assert not (tmp_path / "parts").exists()  # until the end
    assert writer.index == TokenStream(tmp_path / "whole").index


def test_fingerprint_is_the_contents(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert TokenStream(tmp_path / "a").index.fingerprint == TokenStream(tmp_path / "b").index.fingerprint
    write(tmp_path / "c", lengths=(5, 1, 12, 0, 8))
    write(tmp_path / "d", vocab_size=1001)  # another tokenizer
    assert len({TokenStream(tmp_path / name).index.fingerprint for name in "acd"}) == 3


def test_an_error_leaves_nothing_behind(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), ShardWriter(tmp_path / "tokens", numbers(10), 2) as writer:
            writer.add([1, 2, 3], 3)
            raise error
    with pytest.raises(UserError, match=r"tokens.*10.*ends at 9"), ShardWriter(tmp_path / "tokens", numbers(10), 2) as writer:
        writer.add([1, 2, 3], 3)
        writer.add([10], 1)
    with pytest.raises(UserError, match="-1"), ShardWriter(tmp_path / "tokens", numbers(10)) as writer:
        writer.add([-1], 1)
    with pytest.raises(ValueError, match="not ended"), ShardWriter(tmp_path / "tokens", numbers(10)) as writer:
        writer.extend([1], 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("documents", [[], [[]]])
def test_an_empty_corpus_is_refused(tmp_path, documents):
    with pytest.raises(UserError, match="tokens: no text"), ShardWriter(tmp_path / "tokens", numbers(10)) as writer:
        for document in documents:
            writer.add(document, 0)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_and_untouched(tmp_path):
    (tmp_path / "tokens").mkdir()
    with pytest.raises(UserError, match="tokens: already exists"):
        ShardWriter(tmp_path / "tokens", numbers(10))
    with pytest.raises(UserError, match="late: already exists"), ShardWriter(tmp_path / "late", numbers(10)) as writer:
        writer.add([1], 1)
        (tmp_path / "late").mkdir()  # by someone else; a plain rename would replace it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "tokens"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/tokens: cannot be written"), ShardWriter(tmp_path / "file" / "tokens", numbers(10)):
        pass


def test_the_directory_is_as_readable_as_any_other(tmp_path):
    write(tmp_path / "tokens")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "tokens").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_damaged_shards_are_named(tmp_path):
    directory = tmp_path / "tokens"
    write(directory)
    shard = directory / "tokens-00003.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[::-1])
    TokenStream(directory)  # of the right size
    with pytest.raises(UserError, match=r"tokens-00003\.bin: sha256"):
        TokenStream(directory, verify=True)
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"tokens-00003\.bin: 7 bytes; the index says 8"):
        TokenStream(directory)
    shard.unlink()
    with pytest.raises(UserError, match=r"tokens-00003\.bin.* 8 bytes"):
        TokenStream(directory)


def edit(**fields):
    return lambda index: json.dumps({**json.loads(index), **fields})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda index: index[:-40], "not JSON"),
        (lambda index: "[]", "not an index"),
        (edit(format="other"), "not an index"),
        (edit(version=3), "version 3, this program reads versions 1 and 2"),
        (edit(tokens=31), "contradict"),
        (edit(documents=4), "contradict"),
        (edit(dtype="uint32"), "contradict"),
        (edit(shards=None), "damaged"),
        (edit(tokenizer={"name": "x"}), "damaged"),
        (edit(vocab_size="many"), "damaged"),
    ],
)
def test_damaged_index_is_named(tmp_path, damage, message):
    directory = tmp_path / "tokens"
    write(directory)
    index = directory / "index.json"
    index.write_text(damage(index.read_text()))
    with pytest.raises(UserError, match=rf"index\.json: .*{message}"):
        TokenStream(directory)


def test_losslessness_is_recorded_and_version_1_which_did_not_is_read(tmp_path):
    write(tmp_path / "numbers")
    with ShardWriter(tmp_path / "bytes", ByteTokenizer()) as writer:
        writer.add([65], 1)
    for name, lossless in (("numbers", False), ("bytes", True)):
        index = TokenStream(tmp_path / name).index
        assert index.tokenizer.lossless is lossless
        content = index.to_json() | {"version": 1}
        content["tokenizer"].pop("lossless")
        (tmp_path / name / "index.json").write_text(json.dumps(content))
        assert TokenStream(tmp_path / name).index == index  # its fingerprint too


def test_a_directory_without_an_index_is_refused(tmp_path):
    assert not is_token_directory(tmp_path)
    with pytest.raises(UserError, match=r"index\.json: no such file.*scaling-jax tokenize"):
        TokenStream(tmp_path)
