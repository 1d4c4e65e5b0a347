import lzma
import tracemalloc

import numpy as np
import pytest

from scaling_jax.data import documents, tokenize, unpack
from scaling_jax.data.shards import TokenStream
from scaling_jax.data.tokenize import tokenize_files
from scaling_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from scaling_jax.errors import UserError

BYTES = ByteTokenizer()


def make(directory, files):
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = text if isinstance(text, bytes) else text.encode("utf-8")
        path.write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    return directory


def content(directory):
    stream = TokenStream(directory, verify=True)
    return bytes(stream.read(0, len(stream)).astype(np.uint8))


def only(directory, *names):
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)


def test_files_become_documents_in_sorted_order(tmp_path):
    texts = make(tmp_path / "in", {"b.txt": "béta\r\n", "sub/c.txt.xz": "🙂\n\nγ", "a.txt": "alpha", "notes.md": "no", "blank.txt": " \n"})
    summary = tokenize_files([str(texts)], tmp_path / "out", BYTES)
    assert content(tmp_path / "out") == b"alpha\xff" + "béta\r\n".encode() + b"\xff" + "🙂\n\nγ".encode() + b"\xff"
    index = TokenStream(tmp_path / "out").index
    assert (index.documents, index.text_bytes, index.tokens) == (3, 20, 23)
    assert summary == {
        "all": {
            "directory": str(tmp_path / "out"),
            "documents": 3,
            "tokens": 23,
            "text_bytes": 20,
            "shards": 1,
            "fingerprint": index.fingerprint,
        }
    }
    only(tmp_path, "in", "out")


@pytest.mark.parametrize("name", ["missing.txt", "x/*.csv", "x/4.json", "empty"])
def test_an_input_that_matches_nothing_is_named(tmp_path, name):
    make(tmp_path, {"x/1.txt": "text", "x/4.json": ""})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        tokenize_files([str(tmp_path / "x"), str(tmp_path / name)], tmp_path / "out", BYTES)
    assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(UserError, match="no input"):
        tokenize_files([], tmp_path / "out", BYTES)
    only(tmp_path, "x", "empty")


def test_every_nth_document_is_held_out(tmp_path):
    texts = make(tmp_path / "in", {f"{n}.txt": f"doc{n}" for n in range(1, 9)} | {"0.txt": "\n"})  # a blank one does not count
    summary = tokenize_files([str(texts)], tmp_path / "deep" / "out", BYTES, holdout_every=3)
    assert content(tmp_path / "deep/out/heldout") == b"doc3\xffdoc6\xff"
    assert content(tmp_path / "deep/out/train") == b"doc1\xffdoc2\xffdoc4\xffdoc5\xffdoc7\xffdoc8\xff"
    assert {split: part["documents"] for split, part in summary.items()} == {"train": 6, "heldout": 2}
    assert summary["train"]["directory"] == str(tmp_path / "deep/out/train")
    only(tmp_path / "deep", "out")


def test_impossible_holdouts_are_refused(tmp_path):
    texts = make(tmp_path / "in", {"1.txt": "a\n--\nb", "2.txt": "c\n--\n \n--\n"})
    for split, count in (("", 2), ("\n--\n", 3)):
        with pytest.raises(UserError, match=f"in: {count} documents, so every 4th is none"):
            tokenize_files([str(texts)], tmp_path / "out", BYTES, 4, split_documents=split)
        only(tmp_path, "in")
    for every in (1, -1):
        with pytest.raises(UserError, match=f"holdout_every is {every}"):
            tokenize_files([str(texts)], tmp_path / "out", BYTES, every)


def test_a_separator_splits_files_and_vanishes(tmp_path):
    texts = make(tmp_path / "in", {"1.txt": "<e>one<e><e>two <e> \n<e>", "2.txt": "three<<e>four"})
    tokenize_files([str(texts)], tmp_path / "out", BYTES, split_documents="<e>")
    assert content(tmp_path / "out") == b"one\xfftwo \xffthree<\xfffour\xff"
    assert TokenStream(tmp_path / "out").index.text_bytes == 17


def test_stretches_are_held_out_from_all_over_a_text(tmp_path):
    text = "".join(f"{number}\n\n" for number in range(100, 160))  # five bytes each, so stretches of 20 are four of them
    texts = make(tmp_path / "in", {"1.txt": text})
    tokenize_files([str(texts)], tmp_path / "out", BYTES, 5, stretch_characters=20)
    stretches = [text[start : start + 20].encode() + b"\xff" for start in range(0, 300, 20)]
    assert content(tmp_path / "out/heldout") == b"".join(stretches[4::5])
    assert content(tmp_path / "out/train") == b"".join(stretch for n, stretch in enumerate(stretches, 1) if n % 5)
    with pytest.raises(UserError, match="stretch_characters is 65537: must be from 1 to 65,536, or 0"):
        tokenize_files([str(texts)], tmp_path / "none", BYTES, 5, stretch_characters=65537)
    only(tmp_path, "in", "out")


def test_long_documents_in_pieces_are_one_document(tmp_path, monkeypatch):
    text = "".join(chr(code) for code in np.random.default_rng(0).choice([0x20, 0x41, 0xE9, 0x4E2D, 0x1F642], 3000))
    whole = make(tmp_path / "in", {"1.txt": text})
    monkeypatch.setattr(documents, "PIECE", 64)
    monkeypatch.setattr(unpack, "READ", 5)  # characters of up to 4 bytes lie across reads
    tokenize_files([str(whole)], tmp_path / "out", BYTES)
    assert content(tmp_path / "out") == text.encode() + b"\xff"
    assert TokenStream(tmp_path / "out").index.documents == 1


def test_memory_stays_bounded(tmp_path):
    texts = make(tmp_path / "in", {"1.txt": "word and more, " * (1 << 20)})  # 15 MiB in one document without a line
    tracemalloc.start()
    tokenize_files([str(texts)], tmp_path / "out", BYTES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert TokenStream(tmp_path / "out").index.tokens == 15 * (1 << 20) + 1
    assert peak < 4 << 20


def test_a_file_tokenizer_sees_whole_documents(tmp_path):
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[SEP]": 1, "the": 2, "union": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    texts = make(tmp_path / "in", {"1.txt": "the\n\nunion", "2.txt": "union other"})
    tokenize_files([str(texts)], tmp_path / "out", FileTokenizer(tmp_path / "tokenizer.json"))
    stream = TokenStream(tmp_path / "out")
    assert stream.read(0, len(stream)).tolist() == [2, 3, 1, 3, 0, 1]
    assert stream.index.tokenizer.name == "tokenizer.json" and stream.index.text_bytes == 21


@pytest.mark.parametrize("read", [4, 1 << 18])
@pytest.mark.parametrize("name", ["bad.txt", "bad.txt.xz"])
@pytest.mark.parametrize(
    "bad, offset", [(b"abc\xe9def", 3), ("é".encode() * 5 + b"\xff", 10), (b"abcdef\xe4\xb8", 6), (b"abc\xe4\xb8xyz", 3)]
)
def test_undecodable_bytes_are_placed(tmp_path, monkeypatch, bad, offset, name, read):
    monkeypatch.setattr(unpack, "READ", read)
    texts = make(tmp_path / "in", {"a.txt": "fine", name: bad})
    with pytest.raises(UserError, match=rf"{name}: not UTF-8 at byte {offset}:"):
        tokenize_files([str(texts)], tmp_path / "out", BYTES, 2)
    only(tmp_path, "in")


def test_damaged_xz_is_named(tmp_path):
    texts = make(tmp_path / "in", {"1.txt.xz": "text " * 10_000})
    path = texts / "1.txt.xz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"plain text", whole[:60] + b"\0\0\0\0" + whole[64:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"1\.txt\.xz: damaged xz"):
            tokenize_files([str(texts)], tmp_path / "out", BYTES)
        only(tmp_path, "in")


def test_no_text_and_existing_targets_are_refused(tmp_path):
    texts = make(tmp_path / "in", {"1.txt": "", "2.txt": "\n\n"})
    with pytest.raises(UserError, match="in: no text in 2 files"):
        tokenize_files([str(texts)], tmp_path / "out", BYTES)
    (tmp_path / "out").mkdir()
    for every in (0, 2):
        with pytest.raises(UserError, match="out: already exists"):
            tokenize_files([str(texts)], tmp_path / "out", BYTES, every)
    only(tmp_path, "in", "out")


def test_progress_counts_files_bytes_and_tokens(tmp_path, monkeypatch):
    texts = make(tmp_path / "in", {f"{n}.txt": "text" for n in range(3)})
    calls = []
    monkeypatch.setattr(tokenize, "BATCH", 1)
    tokenize_files([str(texts)], tmp_path / "out", BYTES, 2, on_progress=calls.append)
    assert [(call.read_bytes, call.text_bytes, call.tokens) for call in calls] == [
        (0, 0, 0),
        (4, 4, 5),
        (8, 8, 10),
        (12, 12, 15),
        (12, 12, 15),
    ]
    assert [call.files_done for call in calls] == [0, 0, 1, 2, 3] and {(call.files, call.total_bytes) for call in calls} == {(3, 12)}
