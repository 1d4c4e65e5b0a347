"""What is a document in each kind of file, however it is packed, and what is said of bad ones."""

import gzip
import json
import lzma
import os
import tracemalloc

import numpy as np
import pytest

from scaling_jax.cli import main
from scaling_jax.data import documents, unpack
from scaling_jax.data.documents import DocumentReader, find_text_files, split_lines, split_text
from scaling_jax.data.shards import TokenStream
from scaling_jax.errors import UserError

TEXTS = ["Naïve café: 東京 🙂\r\n\ttabs ", "second\n\ndocument", "  ", "third 'quoted' \\ \" \u2028 line", "x" * 3000]


def zst(content):
    return pytest.importorskip("zstandard", reason="zstandard is not installed").ZstdCompressor().compress(content)


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)).encode()


def parquet(path, texts, field="text", **options):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"more": [{"a": 1, "b": [2]}] * len(texts), field: texts}), path, **options)
    return path.read_bytes()


def read(path, **options):
    whole = [""]
    for piece, ends in DocumentReader(path, **options):
        whole[-1] += piece
        if ends:
            whole.append("")
    assert whole.pop() == ""
    return whole


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_every_kind_and_packing_gives_the_documents(tmp_path, kind, packing, monkeypatch):
    path = tmp_path / f"x{kind}{packing}"
    if kind == ".txt":
        content = "<e>".join(TEXTS).encode()
    else:
        content = jsonl(TEXTS) if kind == ".jsonl" else parquet(tmp_path / "y", TEXTS, row_group_size=2)
    for size in (3, 1 << 18):
        monkeypatch.setattr(unpack, "READ", size)
        path.write_bytes(PACK[packing](content))
        reader = DocumentReader(path, separator="<e>")
        assert "".join(piece + "|" * ends for piece, ends in reader) == "|".join(text for text in TEXTS if text.strip()) + "|"
        assert reader.read_bytes == path.stat().st_size
    if kind != ".parquet" and packing:  # members and frames follow each other in one file
        path.write_bytes(PACK[packing](content) + PACK[packing](content))
        whole = "".join(piece for piece, _ in DocumentReader(path))
        assert len(whole) == 2 * (len(content.decode()) if kind == ".txt" else sum(len(text) for text in TEXTS if text.strip()))


def test_the_field_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl(TEXTS, "body"))
    parquet(tmp_path / "x.parquet", TEXTS, "body")
    for name in ("x.jsonl", "x.parquet"):
        assert read(tmp_path / name, field="body") == [text for text in TEXTS if text.strip()]
        with pytest.raises(UserError, match=rf"{name}.* no field 'text'.*body"):
            read(tmp_path / name)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_columns_of_every_kind_of_text_are_read(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    wanted = pyarrow.dictionary(pyarrow.int32(), pyarrow.string()) if kind == "dictionary" else getattr(pyarrow, kind)()
    parquet.write_table(pyarrow.table({"text": pyarrow.array(TEXTS).cast(wanted)}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [text for text in TEXTS if text.strip()]
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"y\.parquet: field 'text' holds int64"):
        read(tmp_path / "y.parquet")


def test_two_columns_of_one_name_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: 2 columns are called 'text'"):
        read(tmp_path / "x.parquet")


def test_a_number_of_any_length_is_no_fault(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"n": ' + b"1" * 5000 + b', "text": "a"}')
    assert read(tmp_path / "x.jsonl") == ["a"]


def test_a_byte_order_mark_and_blank_lines_are_no_fault_of_a_jsonl(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n \n{"text": "b"}')  # and no line end at the end
    assert read(path) == ["a", "b"]


BAD_LINES = [
    (b'{"text": "a"', "not JSON"),
    (b"text", "not JSON"),
    (b'["text"]', "not a JSON object"),
    (b'{"body": "a"}', "no field 'text'; it has 'body'"),
    (b'{"text": null}', "field 'text' is null, must be a string"),
    (b'{"text": 3}', "field 'text' is a number"),
    (b'{"text": ' + b"3" * 5000 + b"}", "field 'text' is a number"),
    (
        json.dumps(dict.fromkeys(["y" * 5000, *"abcdefghijklm"])).encode(),
        f"no field 'text'; it has '{'y' * 60}…', 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i' and 4 others",
    ),
    (b'{"text": "ab\xff"}', "not UTF-8 at byte 12 of the line"),
    (b'{"text": "a\\ud800b"}', "field 'text' has half of a surrogate pair at character 1"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "' + b"y" * 200_000 + b'"}', "longer than 150,000 bytes"),
]


@pytest.mark.parametrize("line, message", BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_bad_line_is_named_and_can_be_skipped(tmp_path, capsys, monkeypatch, line, message):
    monkeypatch.setattr(documents, "LINE", 150_000)
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n' + line + b"\n")
    command = ["tokenize", f"--input={tmp_path / 'x.jsonl'}", f"--out={tmp_path / 'out'}", "--holdout_every=0"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"scaling-jax tokenize: {tmp_path / 'x.jsonl'}, line 3: {message}") and "--skip_bad" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    assert main([*command, "--skip_bad"]) == 0
    assert f"2 bad lines or rows were left out, the first: {tmp_path / 'x.jsonl'}, line 3: {message}" in capsys.readouterr().err
    stream = TokenStream(tmp_path / "out")
    assert bytes(stream.read(0, len(stream)).astype(np.uint8)) == b"one\xfftwo\xff"


def test_a_bad_row_is_named_and_can_be_skipped(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [b"one", None, b"a\xff", b"two"]}), tmp_path / "x.parquet", row_group_size=1)
    command = ["tokenize", f"--input={tmp_path}", f"--out={tmp_path / 'out'}", "--holdout_every=0"]
    assert main(command) == 2
    assert f"{tmp_path / 'x.parquet'}, row 2: field 'text' is null, must be a string" in capsys.readouterr().err
    with pytest.raises(UserError, match="row 3: field 'text' is not UTF-8 at byte 1: invalid start byte"):
        parquet.write_table(pyarrow.table({"text": [b"one", b"two", b"a\xff"]}), tmp_path / "y.parquet")
        read(tmp_path / "y.parquet")
    (tmp_path / "y.parquet").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
    assert main([*command, "--skip_bad"]) == 0
    assert "2 bad lines or rows were left out" in capsys.readouterr().err
    assert TokenStream(tmp_path / "out").index.documents == 2


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("packing", PACK)
def test_damaged_files_are_refused_even_with_skip_bad(tmp_path, capsys, kind, packing):
    rng = np.random.default_rng(0)  # incompressible enough to be long
    texts = ["".join(map(chr, rng.integers(0x20, 0x7F, 4000))) for _ in range(9)]
    content = parquet(tmp_path / "y", texts) if kind == ".parquet" else jsonl(texts) if kind == ".jsonl" else "\n".join(texts).encode()
    (tmp_path / "y").unlink(missing_ok=True)
    whole = PACK[packing](content)
    path = tmp_path / f"x{kind}{packing}"
    damages = [whole[: len(whole) // 2], b"no such thing " * 100, whole[:-1] if packing else b""]
    if not packing:  # half a text is a text
        damages = damages[:2] if kind == ".parquet" else [content[:-5] + b"\xff"] if kind == ".txt" else []
    if packing:
        damages.append(b"")
    for damaged in damages:
        path.write_bytes(damaged)
        command = ["tokenize", f"--input={path}", f"--out={tmp_path / 'out'}", "--holdout_every=0", "--skip_bad"]
        assert main(command) == 2
        err = capsys.readouterr().err
        message = "damaged" if packing or kind == ".parquet" else "not UTF-8 at byte"
        assert err.startswith(f"scaling-jax tokenize: {path}: {message}") and err.count("\n") == 1
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_separator_needs_a_txt(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(jsonl(TEXTS))
    assert main(["tokenize", f"--input={tmp_path}", f"--out={tmp_path / 'out'}", "--split_documents=|"]) == 2
    assert "split_documents is '|', for .txt files; there are only .jsonl" in capsys.readouterr().err


def test_lines_do_not_depend_on_how_the_bytes_arrive(monkeypatch):
    monkeypatch.setattr(documents, "LINE", 5)
    rng = np.random.default_rng(0)
    for _ in range(300):
        content = rng.choice(np.frombuffer(b"ab\n", np.uint8), rng.integers(0, 40), p=[0.45, 0.3, 0.25]).tobytes()
        expected = [line if len(line) <= 5 else None for line in content.removesuffix(b"\n").split(b"\n")] if content else []
        for size in (1, 3, 100):
            assert list(split_lines(content[i : i + size] for i in range(0, len(content), size))) == expected


def test_a_line_without_an_end_is_not_kept(monkeypatch):
    monkeypatch.setattr(documents, "LINE", 100_000)
    tracemalloc.start()
    assert list(split_lines(bytes(10_000) for _ in range(500))) == [None]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_inputs_are_files_directories_and_patterns_each_file_once(tmp_path):
    texts = make(tmp_path, {"x/1.txt": "", "x/2.txt": "", "x/y/3.txt.xz": "", "x/4.json": "", "odd[1].txt": ""})
    names = {path: [file.relative_to(tmp_path).as_posix() for file in find_text_files([str(texts / path)])] for path in ("x", "x/*", "**")}
    assert names["x"] == ["x/1.txt", "x/2.txt", "x/y/3.txt.xz"]
    assert names["x/*"] == names["x"]  # a folder that a pattern matches is searched too
    assert names["**"] == ["odd[1].txt", *names["x"]]
    assert len(find_text_files([str(texts / "x"), str(texts / "x/1.txt"), str(texts / "x/*.txt")])) == 3
    assert find_text_files([str(texts / "odd[1].txt")]) == [texts / "odd[1].txt"]  # a name before it is a pattern


def test_a_file_is_read_once_under_all_its_names(tmp_path, monkeypatch):
    texts = make(tmp_path / "in", {"b/1.txt": "", "b/deep/2.TXT": "", "c/3.Jsonl.GZ": ""})
    (texts / "a").symlink_to("b", target_is_directory=True)
    (texts / "b/deep/up").symlink_to(texts, target_is_directory=True)
    (texts / "c/4.txt").symlink_to("../b/1.txt")
    (texts / "nothing.txt").symlink_to("nowhere")
    monkeypatch.chdir(texts)
    for inputs in (["."], ["**"], ["*"], ["./c", "../in/**", str(texts)], [str(texts / "b/../b/1.txt"), "**", "b/deep/2.TXT", "c"]):
        found = find_text_files(inputs)
        assert [os.path.realpath(file) for file in found] != [] and found == sorted(found)
        assert sorted(os.path.realpath(file) for file in found) == [
            str(texts / name) for name in ("b/1.txt", "b/deep/2.TXT", "c/3.Jsonl.GZ")
        ]
    assert [str(file) for file in find_text_files(["b/1.txt", "a/1.txt"])] == ["a/1.txt"]
    (texts / "b/deep/2.TXT").write_text("text")
    (texts / "c/3.Jsonl.GZ").write_bytes(gzip.compress(b'{"text": "packed"}'))
    assert read(texts / "b/deep/2.TXT") == ["text"] and read(texts / "c/3.Jsonl.GZ") == ["packed"]


@pytest.mark.parametrize("verb", ["tokenize", "train-tokenizer"])
@pytest.mark.parametrize("names", [",", "x.txt,", " ,x.txt"])
def test_an_empty_name_is_not_the_current_directory(tmp_path, monkeypatch, capsys, names, verb):
    make(tmp_path, {"x.txt": "text"})
    monkeypatch.chdir(tmp_path)
    assert main([verb, f"--input={names}", "--out=out"]) == 2
    assert "a name in it is empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("verb", ["tokenize", "train-tokenizer"])
def test_a_name_that_is_too_long_is_one_message(tmp_path, capsys, verb):
    make(tmp_path, {"x.txt": "text " * 500})
    long = "y" * 250  # with what is added to it
    assert main([verb, f"--input={tmp_path / ('y' * 300)}", f"--out={tmp_path / 'out'}"]) == 2
    assert (
        main(
            [
                verb,
                f"--input={tmp_path / 'x.txt'}",
                f"--out={tmp_path / long}",
                "--holdout_every=0" if verb == "tokenize" else "--vocab_size=260",
            ]
        )
        == 2
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "merging"]
    assert len(lines) == 2 and lines[0].endswith("y: cannot be read: File name too long")
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    texts = make(tmp_path / "in", {"1.txt": "", "deep/2.txt": ""})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for name in (texts, texts / "deep", texts / "*"):
        with pytest.raises(UserError, match=r"in/deep: cannot be read: Permission denied"):
            find_text_files([str(name)])


def make(directory, files):
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


@pytest.mark.parametrize("separator", ["", "|", "<e>", "aaab"])
def test_splitting_does_not_depend_on_how_the_text_arrives(monkeypatch, separator):
    # Against str.split, with pieces and chunks so small that separators lie across every kind of border.
    monkeypatch.setattr(documents, "PIECE", 7)
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(["a", "b", " ", "\n", "\n\n", separator or "é"], rng.integers(0, 60)))
        expected = text.split(separator) if separator else [text]
        if expected[-1] == "":
            expected.pop()  # nothing stands after the last separator
        ways = []
        for size in (1, 3, 1000):
            pieces = list(split_text([text[i : i + size] for i in range(0, len(text), size)], separator))
            whole = [""]
            for piece, ends in pieces:
                assert len(piece) <= 7 and (piece or ends)
                whole[-1] += piece
                if ends:
                    whole.append("")
            assert whole == [*expected, ""]
            ways.append(pieces)
        assert ways[0] == ways[1] == ways[2]


def test_stretches_end_between_paragraphs():
    def stretches(text, size=1000):
        pieces = list(split_text([text[i : i + size] for i in range(0, len(text), size)], "", 20))
        assert all(ends for _, ends in pieces) and "".join(piece for piece, _ in pieces) == text
        return [piece for piece, _ in pieces]

    assert stretches("a b c\n\nde f g h\n\n" + "i" * 15) == ["a b c\n\nde f g h\n\n", "i" * 15]  # the last blank line in reach
    assert stretches("a\n\n" + "b " * 10 + "c") == ["a\n\n" + "b " * 7 + "b", " b b c"]  # a first paragraph of two letters is none
    spaced = "a b c de f\r\n \t\r\n"  # a blank line may have spaces
    assert stretches(spaced + "c" + " d" * 9) == [spaced, "c" + " d" * 9]
    assert stretches("a" * 50) == ["a" * 20, "a" * 20, "a" * 10]
    rng = np.random.default_rng(0)
    for _ in range(100):
        text = "".join(rng.choice(["a", "b", " ", "\n", "\n\n"], rng.integers(1, 200)))
        found = stretches(text, 1)
        assert found == stretches(text, 7) == stretches(text) and max(map(len, found)) <= 20


def test_pieces_end_before_a_space(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 10)

    def pieces(text):
        return [piece for piece, _ in split_text([text], "")]

    assert pieces("ab cd\nef ghi") == ["ab cd\nef", " ghi"]
    assert pieces("abcd\nefghijk") == ["abcd", "\nefghijk"]  # failing that a line end
    assert pieces("ab\ncd   \n  efgh") == ["ab\ncd", "   \n  efgh"]  # the first space of a run
    assert pieces("ab\u00a0 efghijk") == ["ab\u00a0 efghij", "k"]  # of any kind
    assert pieces("abcdefghijkl") == ["abcdefghij", "kl"]
