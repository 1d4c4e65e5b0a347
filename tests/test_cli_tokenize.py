"""`scaling-jax tokenize` from the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from shells import Shell, write_texts

from scaling_jax import console
from scaling_jax.cli import main
from scaling_jax.data.tokenizers import ByteTokenizer

pytestmark = pytest.mark.usefixtures("handlers_stay")


def test_tokenize_then_train_with_a_second_domain(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console.time, "monotonic", iter(range(0, 100_000, 20)).__next__)  # every call is due
    texts, more = write_texts(tmp_path / "texts", 10), write_texts(tmp_path / "more", 3, seed=1)
    assert main(["tokenize", f"--input={texts}", f"--out={tmp_path / 'a'}", "--holdout_every=5"]) == 0
    out, err = shell.capsys.readouterr()
    monkeypatch.undo()
    header, *rows = (line.split() for line in out.splitlines())
    assert header == ["split", "documents", "tokens", "bytes", "shards", "directory"]
    for split, documents in (("train", 8), ("heldout", 2)):
        row = next(row for row in rows if row[0] == split)
        index = json.loads((tmp_path / "a" / split / "index.json").read_text())
        assert row[1:] == [str(documents), f"{index['tokens']:,}", f"{index['text_bytes']:,}", "1", str(tmp_path / "a" / split)]
    told = r"^100% · 10/10 files · [\d.,/]+ MB read · [\d,]+ tokens · [\d.,]+ MB/s of text"
    assert "\r" not in err and re.search(told, err, re.MULTILINE)

    assert main(["tokenize", f"--input={more}", f"--out={tmp_path / 'b'}", "--holdout_every=0"]) == 0
    code, out, _ = shell.train(f"--config.data.path={tmp_path / 'a'}", f"--config.data.eval_domains=('x={tmp_path / 'b'}',)")
    assert code == 0 and "x loss" in out and "heldout loss" in out
    assert {"eval/x/loss", "eval/heldout/loss"} <= shell.records()[-1].keys()


@pytest.mark.parametrize(
    "args, words",
    [
        (["--out=O"], ["--input=FILES is missing"]),
        (["--input=T"], ["--out=DIR is missing"]),
        (["--input=T", "--out=O", "--holdout_every=1"], ["--holdout_every=1: must be 0 (none) or at least 2"]),
        (["--input=T", "--out=O", "--holdout_every=-3"], ["--holdout_every=-3: must be"]),
        (["--input=T", "--out=O", "--holdout_every=x"], ["--holdout_every=x: must be an integer"]),
        (["--input=T", "--out=O", "--holdout_every=50"], ["12 documents"]),
        (["--inputt=T", "--out=O"], ["--inputt: no such flag (did you mean --input?)"]),
        (["--input=nowhere", "--out=O"], ["nowhere: no .txt, .jsonl, .parquet file, plain or .gz, .xz, .zst there"]),
        (["--input=T", "--out=O", "--tokenizer=zzz"], ["zzz: cannot be read as a tokenizer"]),
        (["--input=T", "--out=T"], ["T: already exists"]),
        (["--input=E", "--out=O", "--holdout_every=0"], ["no text in 1 files"]),
        (["--input=T", "T", "--out=O"], ["unexpected argument 'T'"]),
        (["--input=T", "--out=O", "--config.model.width=3"], ["--config.model.width: no such flag"]),
    ],
)
def test_tokenize_refuses(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: list[str]):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "T", 12)
    (tmp_path / "E").mkdir()
    (tmp_path / "E" / "blank.txt").write_text("\n")
    shell.refuses(["tokenize", *args], *words)


@pytest.mark.parametrize("every", [0, 4])
def test_an_interrupted_tokenize_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], every: int
):
    texts = write_texts(tmp_path / "texts", 12)
    encode, calls = ByteTokenizer.encode, []

    def interrupted(self: ByteTokenizer, text: str) -> np.ndarray:
        calls.append(text)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", interrupted)
    assert main(["tokenize", f"--input={texts}", f"--out={tmp_path / 'out'}", f"--holdout_every={every}"]) == 130
    assert capsys.readouterr().err.endswith("scaling-jax tokenize: interrupted; the same command continues\n")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
