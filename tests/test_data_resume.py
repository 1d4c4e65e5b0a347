"""What is written does not depend on how many processes wrote it, nor on how often they were stopped, nor how."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.cli import main
from scaling_jax.data import bpe, documents, encode_pool, tokenize
from scaling_jax.data.documents import DocumentReader
from scaling_jax.data.shard_writer import ShardFiles
from scaling_jax.data.shards import TokenStream
from scaling_jax.data.tokenize import tokenize_files
from scaling_jax.data.tokenizers import FileTokenizer
from scaling_jax.errors import UserError
from scaling_jax.verbs import tokenize as verb

WORDS = ["the ", "union ", "of ", "states", ", and ", "people.\n", "Größe ", "1 2", "\n\n", "東京"]


def words(count, seed):
    return "".join(np.random.default_rng(seed).choice(WORDS, count))


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "t.json"
    path.write_text(bpe.train_bpe([words(5000, 0)], 290))
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Everything at a small scale: pieces, batches, and input that is worth a process."""
    monkeypatch.setattr(documents, "PIECE", 300)
    monkeypatch.setattr(tokenize, "BATCH", 1000)
    monkeypatch.setattr(tokenize, "WORKER_BYTES", 1)


@pytest.fixture
def texts(tmp_path):
    directory = tmp_path / "in"
    directory.mkdir()
    for n in (0, 1, 3, 4):
        (directory / f"{n}.jsonl").write_text("".join(json.dumps({"text": words(60, 100 * n + i)}) + "\n" for i in range(25)))
    (directory / "2.txt").write_text(words(6000, 2))  # one document of many pieces
    return directory


def files(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def make(texts, out, tokenizer_file, **options):
    options = {"holdout_every": 3, "shard_tokens": 1500, "resume": True} | options
    return tokenize_files([str(texts)], out, FileTokenizer(tokenizer_file), **options)


class Crash(BaseException):
    """Nothing that anybody catches."""


def crash_after(batches):
    def on_progress(progress):
        nonlocal batches
        batches -= 1
        if batches < 0:
            raise Crash

    return on_progress


def test_the_number_of_processes_does_not_matter(tmp_path, texts, tokenizer_file):
    for workers in (1, 3):
        make(texts, tmp_path / str(workers), tokenizer_file, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "3")
    assert len(files(tmp_path / "1")) > 10  # several shards of both splits


@pytest.mark.parametrize("holdout_every", [0, 3])
@pytest.mark.parametrize("batches", [1, 2, 5, 11])
def test_crashes_do_not_matter(tmp_path, texts, tokenizer_file, holdout_every, batches):
    make(texts, tmp_path / "whole", tokenizer_file, holdout_every=holdout_every)
    said, crashes = [], 0
    while not (tmp_path / "out").exists():
        try:  # one batch more each time, or it would never come past a checkpoint that takes several
            on_progress = crash_after(batches + crashes)
            make(texts, tmp_path / "out", tokenizer_file, holdout_every=holdout_every, on_progress=on_progress, say=said.append)
        except Crash:
            crashes += 1
    assert crashes > 1 and len(said) > 0 and all("continues after" in message for message in said)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_a_crash_before_there_is_anything_to_keep_leaves_nothing(tmp_path, texts, tokenizer_file):
    for resume in (False, True):
        with pytest.raises(Crash):
            make(texts, tmp_path / "out", tokenizer_file, shard_tokens=1 << 20, on_progress=crash_after(20), resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.raises(Crash):  # for that one has to ask to resume
        make(texts, tmp_path / "out", tokenizer_file, on_progress=crash_after(20), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def crashed(texts, out, tokenizer_file, **options):
    """Leaves a third or so done, in the midst of 2.txt."""
    with pytest.raises(Crash):
        make(texts, out, tokenizer_file, on_progress=crash_after(24), **options)
    resume = json.loads((out.parent / f".{out.name}.partial" / "resume.json").read_text())
    assert [(state["position"]["file"], state["position"]["pieces"] > 0) for state in resume["states"]] == [(2, True), (2, False)]


def change_of(texts, n):
    path = texts / ("2.txt" if n == 2 else f"{n}.jsonl")
    path.write_text(path.read_text().replace("union", "onion"))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda texts: None, "continues after"),
        (lambda texts: change_of(texts, 3), "continues after"),  # it had not come so far
        (lambda texts: change_of(texts, 2), "continues after"),  # before that file
        (lambda texts: change_of(texts, 1), "starts again: {partial} was made from other files, or files that changed since"),
        (lambda texts: (texts / "5.txt").write_text("more"), "continues after"),
        (lambda texts: (texts / "00.txt").write_text("more"), "starts again: {partial} was made from other files"),
        (lambda texts: (texts / "0.jsonl").unlink(), "starts again: {partial} was made from other files"),
        (lambda texts: (texts.parent / ".out.partial/data/train/tokens-00000.bin").write_bytes(b""), "starts again: {partial} is damaged"),
        (lambda texts: (texts.parent / ".out.partial/resume.json").write_text("{"), "starts again: {partial} cannot be read"),
    ],
)
def test_input_that_changed_is_noticed(tmp_path, texts, tokenizer_file, change, words):
    crashed(texts, tmp_path / "out", tokenizer_file)
    change(texts)
    said = []
    make(texts, tmp_path / "out", tokenizer_file, say=said.append)
    assert len(said) == 1 and said[0].startswith(words.format(partial=tmp_path / ".out.partial"))
    make(texts, tmp_path / "whole", tokenizer_file)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("options", [{"holdout_every": 0}, {"holdout_every": 4}, {"split_documents": "\n\n"}, {"shard_tokens": 1400}])
def test_other_options_start_again(tmp_path, texts, tokenizer_file, options):
    crashed(texts, tmp_path / "out", tokenizer_file)
    said = []
    make(texts, tmp_path / "out", tokenizer_file, say=said.append, **options)
    assert said == [f"starts again: {tmp_path / '.out.partial'} was made with another tokenizer or other options"]
    make(texts, tmp_path / "whole", tokenizer_file, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("mend", [True, False])
def test_bad_input_can_be_mended_or_skipped_and_it_goes_on(tmp_path, texts, tokenizer_file, mend, capsys):
    good = (texts / "3.jsonl").read_text()
    lines = good.splitlines(keepends=True)
    (texts / "3.jsonl").write_text("".join([*lines[:20], "bad\n", *lines[20:]]))
    command = ["tokenize", f"--input={texts}", f"--out={tmp_path / 'out'}", f"--tokenizer={tokenizer_file}", "--shard_tokens=1500"]
    for _ in range(2):  # still bad
        assert main(command) == 2
        err = capsys.readouterr().err
        assert f"{texts / '3.jsonl'}, line 21: not JSON" in err
        assert f"{tmp_path / '.out.partial'} keeps what was done" in err and "the same command continues" in err
        assert not (tmp_path / "out").exists()
    if mend:
        (texts / "3.jsonl").write_text(good)
        assert main(command) == 0
    else:
        assert main([*command, "--skip_bad"]) == 0
    err = capsys.readouterr().err
    assert "continues after" in err and ("1 bad lines or rows were left out" in err) == (not mend)
    (texts / "3.jsonl").write_text(good)
    make(texts, tmp_path / "whole", tokenizer_file, holdout_every=10)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_file_can_still_be_mended_after_two_crashes_within_it(tmp_path, texts, tokenizer_file):
    crashed(texts, tmp_path / "out", tokenizer_file)
    before = (tmp_path / ".out.partial" / "resume.json").read_text()
    with pytest.raises(Crash):
        make(texts, tmp_path / "out", tokenizer_file, on_progress=crash_after(4))
    after = (tmp_path / ".out.partial" / "resume.json").read_text()
    assert after != before and [state["position"]["file"] for state in json.loads(after)["states"]] == [2, 2]
    change_of(texts, 2)
    said = []
    make(texts, tmp_path / "out", tokenizer_file, say=said.append)
    assert "continues after" in said[0]
    make(texts, tmp_path / "whole", tokenizer_file)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_bad_lines_are_counted_across_crashes(tmp_path, texts, tokenizer_file):
    for n in (0, 1, 4):
        with open(texts / f"{n}.jsonl", "a") as file:
            file.write("bad\n" * (n + 1))
    crashed(texts, tmp_path / "out", tokenizer_file, skip_bad=True)
    said = []
    make(texts, tmp_path / "out", tokenizer_file, say=said.append, skip_bad=True)
    assert (
        said[-1]
        == f"8 bad lines or rows were left out, the first: {texts / '0.jsonl'}, line 26: not JSON: " + said[-1].partition("JSON: ")[2]
    )


def test_what_was_left_out_is_not_kept_without_skip_bad(tmp_path, texts, tokenizer_file):
    with open(texts / "1.jsonl", "a") as file:
        file.write("bad\n")
    crashed(texts, tmp_path / "out", tokenizer_file, skip_bad=True)
    said = []
    with pytest.raises(UserError, match=r"1\.jsonl, line 26: not JSON"):
        make(texts, tmp_path / "out", tokenizer_file, say=said.append)
    assert said == [f"starts again: {tmp_path / '.out.partial'} was made with skip_bad, and left out bad lines or rows"]


def test_a_full_disk_keeps_what_was_done(tmp_path, texts, tokenizer_file, capsys, monkeypatch):
    append, calls = ShardFiles.append, []

    def full(self, *args):
        calls.append(args)
        if len(calls) == 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, *args)

    monkeypatch.setattr(ShardFiles, "append", full)
    command = ["tokenize", f"--input={texts}", f"--out={tmp_path / 'out'}", f"--tokenizer={tokenizer_file}", "--shard_tokens=1500"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "no space left on the disk" in err and ".out.partial keeps what was done" in err
    assert main(command) == 0 and "continues after" in capsys.readouterr().err
    make(texts, tmp_path / "whole", tokenizer_file, holdout_every=10)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_two_at_once_are_refused(tmp_path, texts, tokenizer_file):
    crashed(texts, tmp_path / "out", tokenizer_file)
    before = files(tmp_path / ".out.partial")
    with open(tmp_path / ".out.partial" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"out: another process is writing it$"):
            make(texts, tmp_path / "out", tokenizer_file)
    assert files(tmp_path / ".out.partial") == before


def test_an_encoding_process_that_dies_is_noticed(tmp_path, texts, tokenizer_file):
    def kill_one(progress):
        for child in children_of(os.getpid())[-1:]:
            os.kill(child, signal.SIGKILL)

    with pytest.raises(UserError, match="an encoding process ended with code -9"):
        make(texts, tmp_path / "out", tokenizer_file, workers=2, on_progress=kill_one)
    assert children_of(os.getpid()) == []


def test_the_encoding_processes_share_the_memory_for_words(tokenizer_file, monkeypatch):
    sent = []
    send = encode_pool._send
    monkeypatch.setattr(encode_pool, "_send", lambda stream, value: (sent.append(value), send(stream, value)))
    for workers, cache_bytes in ((2, 1 << 26), (4, 1 << 25)):
        with encode_pool.EncodePool(FileTokenizer(tokenizer_file), workers):
            assert [value[1] for value in sent] == [cache_bytes] * workers
        sent.clear()


def test_at_most_eight_processes_encode_by_default(tmp_path, monkeypatch):
    asked = []

    def tokenize_files(*args, workers, **options):
        asked.append(workers)
        raise UserError("enough")

    monkeypatch.setattr(tokenize, "tokenize_files", tokenize_files)
    for count in (3, 64):
        monkeypatch.setattr(verb, "cores", lambda count=count: count)
        for flags in ([], ["--workers=20"]):
            assert main(["tokenize", "--input=x.txt", f"--out={tmp_path / 'out'}", *flags]) == 2
    assert asked == [3, 20, 8, 20]


def test_modules_in_the_current_directory_do_not_reach_the_encoding_processes(tmp_path, texts, tokenizer_file, monkeypatch):
    for name in ("queue.py", "tokenize.py", "numpy.py"):
        (tmp_path / name).write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    make(texts, tmp_path / "out", tokenizer_file, workers=2)
    make(texts, tmp_path / "one", tokenizer_file)
    assert files(tmp_path / "out") == files(tmp_path / "one")


def children_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc")
    return [int(child) for child in children.read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_command_leaves_no_process_and_continues(tmp_path, tokenizer_file, number):
    texts = tmp_path / "in.txt"
    texts.write_text(words(30_000, 0) * 100)  # enough that it is not done before the signal comes
    command = ["tokenize", f"--input={texts}", f"--tokenizer={tokenizer_file}", "--holdout_every=0", "--shard_tokens=50000", "--workers=2"]
    # Of a test run in the background Ctrl-C is ignored, and children inherit that.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    small = f"{heeding}; import sys; from scaling_jax.data import tokenize; tokenize.WORKER_BYTES = tokenize.BATCH = 30_000"
    command = [sys.executable, "-c", f"{small}; from scaling_jax.cli import main; sys.exit(main())", *command]
    process = subprocess.Popen([*command, f"--out={tmp_path / 'out'}"], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".out.partial" / "resume.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    children = children_of(process.pid)
    assert len(children) == 2
    process.send_signal(number)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert "Traceback" not in err
    assert err.endswith("; the same command continues\n") or number == signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline, "an encoding process lives on"
        time.sleep(0.01)
    assert not (tmp_path / "out").exists()
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("continues after")
    stream = TokenStream(tmp_path / "out", verify=True)
    tokens = stream.read(0, len(stream)).tolist()
    assert tokens.pop() == stream.index.tokenizer.end_token
    assert FileTokenizer(tokenizer_file).decode(tokens) == texts.read_text()


def test_memory_does_not_grow_with_the_file(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.undo()
    line = json.dumps({"text": words(400, 0), "other": words(400, 1)}) + "\n"
    (tmp_path / "x.jsonl").write_text(line * 3000)
    tracemalloc.start()
    tokenize_files([str(tmp_path / "x.jsonl")], tmp_path / "out", FileTokenizer(tokenizer_file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x.jsonl").stat().st_size > 15e6
    assert peak < 6e6


def test_memory_does_not_grow_with_a_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    text = "".join(map(chr, rng.integers(0x20, 0x7F, 20_000)))
    rows = [text[i % 9999 :] + str(i) for i in range(2500)]  # 37 MB in one row group
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "x.parquet", use_dictionary=False, compression="none")
    assert parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups == 1
    del rows
    assert (tmp_path / "x.parquet").stat().st_size > 30e6
    assert 0 < highest_allocated(pyarrow, tmp_path / "x.parquet") < 20e6


@pytest.mark.parametrize("equal, bound", [(True, 30e6), (False, 10e6)])
def test_memory_does_not_grow_with_the_rows_of_a_parquet(tmp_path, monkeypatch, equal, bound):
    # Of equal rows, which are stored once, the file does not tell how much they are: few are taken at once. Of others it does.
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    monkeypatch.setattr(documents, "_PARQUET_READ", 1 << 22)
    texts = [np.random.default_rng(n).integers(0x20, 0x7F, 1_000_000, dtype=np.uint8).tobytes().decode() for n in range(1 if equal else 40)]
    rows = texts * 120 if equal else texts
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "x.parquet", use_dictionary=equal, compression="none")
    assert ((tmp_path / "x.parquet").stat().st_size < 2e6) == equal
    del rows, texts
    assert 0 < highest_allocated(pyarrow, tmp_path / "x.parquet") < bound


def highest_allocated(pyarrow, path):
    before = pyarrow.total_allocated_bytes()
    highest = 0
    for _ in DocumentReader(path):
        highest = max(highest, pyarrow.total_allocated_bytes() - before)
    return highest
