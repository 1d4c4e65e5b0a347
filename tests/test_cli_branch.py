"""`scaling-jax branch` as its users meet it: messages, exit codes, and the table. What branches do is in test_branch_run.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import small_config

from scaling_jax import config as config_lib
from scaling_jax.branch.plan import Asked, plan, read_source
from scaling_jax.branch.results import LOSSES_FILE, Result, branch_dir, store
from scaling_jax.branch.run import Stopped
from scaling_jax.cli import main
from scaling_jax.data.corpus import open_run_data

B = 128
AT = 16 * B


def write_run(workdir: Path, **fields) -> Path:
    """What a run leaves that is looked at before a branch starts."""
    config = small_config(**{"schedule__name": "constant", "train__tokens": 40 * B} | fields)
    identity = config_lib.identity(config) | {"data.fingerprint": open_run_data(config).fingerprint}
    for tokens in (AT, 40 * B):
        (workdir / "checkpoints" / str(tokens)).mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"config": config_lib.to_json(config), "identity": identity}))
    return workdir


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def refuses(capsys, run, args, *words) -> None:
    """Exit code 2, one message with all `words`, nothing written."""
    before = sorted(run.parent.rglob("*"))
    capsys.readouterr()
    assert main(["branch", f"--run={run}", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and err.startswith("scaling-jax branch: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert sorted(run.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--at_tokens="], ["--at_tokens=… is missing"]),
        (["--at_tokens=1e6"], ["--at_tokens=1e6: must be integers, comma-separated"]),
        (["--at_tokens=2049"], ["--at_tokens=2049: ", "no such checkpoint; there are 2048, 5120", "config.checkpoint.keep_at_tokens"]),
        (["--factors=1,2.5"], ["--factors=1,2.5: must be integers, comma-separated, for example 1,2,4,8"]),
        (["--factors=2,4"], ["--factors=2,4: must ascend from 1"]),
        (["--span_tokens=x"], ["--span_tokens=x: must be an integer"]),
        (
            ["--span_tokens=1024", "--factors=1,2,4"],
            ["--factors=1,2,4: the largest batch, 512 tokens, takes 2 steps", "--span_tokens=2048"],
        ),
        (["--span_tokens=2000000000"], ["--span_tokens=2000000000: from 2048 on beyond one pass over the training data"]),
        (["--lr_rule=cube"], ["--lr_rule=cube: must be one of sqrt, linear, none"]),
        (["--tolerance=-1"], ["--tolerance=-1.0: must be a number of nats per token, 0 or more"]),
        (["--tolerance=nan"], ["--tolerance=nan: must be a number"]),
        (["--facters=1,2"], ["--facters: no such flag (did you mean --factors?)"]),
        (["--run="], ["--run=DIR is missing"]),
        (["--run=nowhere"], ["--run=nowhere: no such directory; must be the work directory of a run"]),
    ],
)
def test_bad_input_is_exit_code_2_and_one_message(run, capsys, args, words):
    refuses(capsys, run, [f"--at_tokens={AT}", *args], *words)


def test_runs_that_cannot_be_branched_are_named(tmp_path, run, capsys):
    cosine = write_run(tmp_path / "cosine", schedule__name="cosine")
    span = ["--factors=1,2", "--span_tokens=8192"]
    refuses(capsys, cosine, [f"--at_tokens={AT}", *span], "--span_tokens=8192", "lr schedule, cosine, ends", "at most 3072")
    ends = write_run(tmp_path / "ends", schedule__name="linear", train__tokens=40 * B - 1)
    refuses(capsys, ends, [f"--at_tokens={40 * B}", "--span_tokens=4096"], "schedule, linear, ends", "an earlier checkpoint")
    train_only = open_run_data(small_config()).train.stream.directory
    bare = write_run(tmp_path / "bare", data__path=str(train_only))
    refuses(capsys, bare, [f"--at_tokens={AT}", "--span_tokens=4096"], f"--run={bare}: its data have no held-out domain")
    stored = json.loads((run / "config.json").read_text())
    stored["identity"]["data.fingerprint"] = "another"
    (run / "config.json").write_text(json.dumps(stored))
    refuses(capsys, run, [f"--at_tokens={AT}", "--span_tokens=4096"], "config.data.path, 'sotu', has other training data than the run had")


def results(run, losses, at_tokens=(AT,), sequences=500, factors=None):
    """Branches with these mean losses (None: diverged); their differences vary over sequences by 0.02."""
    rng = np.random.default_rng(0)
    branches = plan(read_source(run), Asked(at_tokens, factors or [2**k for k in range(len(losses))], 32 * B))
    common_N = rng.normal(0, 0.3, sequences)
    for b, loss in zip(branches, losses * len(at_tokens), strict=True):
        of = (b.at_tokens, b.factor, b.batch_tokens, b.lr_rule, b.span_tokens)
        if loss is None:
            yield Result(*of, None, None)
            continue
        noise_N = rng.normal(0, 0.02, sequences)
        losses_N = loss + common_N + noise_N - (common_N + noise_N).mean()
        yield Result(*of, loss, float(losses_N.std(ddof=1) / np.sqrt(sequences)), losses_N)


def shown(monkeypatch, capsys, run, losses, code=0, args=(), **options):
    """What the command prints where branches have these losses; those of calls before stay."""

    def branch(*_):
        for result in results(run, losses, **options):
            branch_dir(run / "branches", result.tokens, result.factor).mkdir(parents=True, exist_ok=True)
            store(run / "branches", result)

    monkeypatch.setattr("scaling_jax.branch.run.branch", branch)
    capsys.readouterr()
    at_tokens = ",".join(map(str, options.get("at_tokens", (AT,))))
    assert main(["branch", f"--run={run}", f"--at_tokens={at_tokens}", *args]) == code
    lines = capsys.readouterr().out.splitlines()
    return lines[:-2] if lines[-1] == f"figure {run / 'figures/critical_batch.png'}" else lines


def stored_points(run) -> dict:
    found = json.loads((run / "branches" / "critical_batch.json").read_text())
    return {"tolerance": found["tolerance"]} | {point["tokens"]: point["batch_tokens"] for point in found["points"]}


def test_the_table_and_the_verdict(run, monkeypatch, capsys):
    lines = shown(monkeypatch, capsys, run, [2.5, 2.504, 2.56, 2.7])
    assert lines[0] == "4,096 tokens from 2,048 on, lr rule sqrt"
    assert lines[1].split() == "factor batch tokens steps held-out loss over factor 1 ± s.e.".split()
    rows = [line.split() for line in lines[2:6]]
    assert [row[:4] for row in rows] == [["x1", "128", "32", "2.5000"], ["x2", "256", "16", "2.5040"]] + [
        ["x4", "512", "8", "2.5600"],
        ["x8", "1,024", "4", "2.7000"],
    ]
    assert [row[4] for row in rows[1:]] == ["+0.0040", "+0.0600", "+0.2000"]
    errors = [float(row[5]) for row in rows[1:]]  # of differences of two noises: √2 · 0.02 / √500, where each loss has 0.3 / √500
    np.testing.assert_allclose(errors, 0.00126, rtol=0.15)
    assert [" ".join(row[6:]) for row in rows[1:]] == ["no loss, critical", "too large", "too large"] and len(rows[0]) == 4
    assert lines[-1].startswith("critical batch (branch) at 2,048 tokens: 256 tokens, ") and lines[-1].endswith("512")
    assert (run / "figures/critical_batch.png").is_file() and not (run / "laws/branch.json").exists()  # one point makes no law
    found = json.loads((run / "branches" / "critical_batch.json").read_text())
    assert found["tolerance"] == 0.01 and found["points"][0]["batch_tokens"] == 256 and found["points"][0]["high"] == 512


def test_open_ends_are_said_in_words(run, monkeypatch, capsys):
    last = shown(monkeypatch, capsys, run, [2.5, 2.45, 2.44])[-1]
    assert last.endswith("512 tokens, at least 512, with no upper end: the largest factor tried still loses nothing")
    last = shown(monkeypatch, capsys, run, [2.5, 2.45, 2.461])[-1]
    assert last.endswith("256 tokens, at least 256, with no upper end: what the larger factors lose cannot be told from the noise of the "
                         "held-out sequences")  # fmt: skip
    shutil.rmtree(run / "branches")
    last = shown(monkeypatch, capsys, run, [2.5, 2.7])[-1]
    assert last.endswith("128 tokens, at most 256")
    last = shown(monkeypatch, capsys, run, [2.5, 2.7], args=["--tolerance=0.5"])[-1]
    assert "256 tokens, at least 256, with no upper end" in last


def test_several_checkpoints_have_a_table_each(run, monkeypatch, capsys):
    lines = shown(monkeypatch, capsys, run, [2.5, 2.4, 2.8], at_tokens=(AT, 40 * B))
    said = [line for line in lines if line.startswith("critical batch")]
    assert ["at 2,048 tokens: 256" in said[0], "at 5,120 tokens: 256" in said[1], len(said)] == [True, True, 2]


def test_a_branch_that_diverged_was_too_large(run, monkeypatch, capsys):
    lines = shown(monkeypatch, capsys, run, [2.5, 2.4, None])
    assert lines[3].split()[6:] == ["no", "loss,", "critical"] and lines[4].split()[3:] == ["-", "diverged"]
    assert lines[-1].endswith("256 tokens, between 256 and 512")
    lines = shown(monkeypatch, capsys, run, [None, 2.4, 2.3], code=1)
    assert lines[-1] == "no critical batch at 2,048 tokens: factor 1, which the others are compared with, diverged"
    assert lines[2].split()[3:] == ["-", "diverged"] and lines[3].split()[3:] == ["2.4000"]


def test_every_row_has_its_own_verdict(run, monkeypatch, capsys):
    """Factor 3 is the critical one though 2 loses; 6 is within the tolerance of 1 and not of 3."""
    lines = shown(monkeypatch, capsys, run, [3.0, 3.1, 2.995, None, 3.007], factors=[1, 2, 3, 4, 6])
    assert lines[2].split()[4:] == []
    verdicts = [" ".join(word for word in line.split()[4:] if word[0].isalpha()) for line in lines[3:7]]
    assert verdicts == ["too large", "no loss, critical", "diverged", "too large"]
    shutil.rmtree(run / "branches")
    lines = shown(monkeypatch, capsys, run, [3.0, 3.1])
    assert lines[2].split()[4:] == ["critical"] and lines[3].split()[-2:] == ["too", "large"]


def test_all_stored_branches_are_judged_whatever_is_asked_for(run, monkeypatch, capsys):
    first = shown(monkeypatch, capsys, run, [3.0, 3.0, 3.002, 3.1])
    assert stored_points(run) == {"tolerance": 0.01, AT: 512}
    losses = branch_dir(run / "branches", AT, 8) / LOSSES_FILE
    monkeypatch.setattr("scaling_jax.branch.run.branch", lambda *_: None)
    assert main(["branch", f"--run={run}", f"--at_tokens={AT}", "--factors=1,2"]) == 0
    assert stored_points(run) == {"tolerance": 0.01, AT: 512} and [line.split()[0] for line in first[2:6]] == ["x1", "x2", "x4", "x8"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:6]] == ["x1", "x2", "x4", "x8"]
    losses.write_bytes(losses.read_bytes()[:100])  # of no use, and not asked for
    assert main(["branch", f"--run={run}", f"--at_tokens={AT}", "--factors=1,2"]) == 0
    assert "x8" not in capsys.readouterr().out and stored_points(run) == {"tolerance": 0.01, AT: 512}


def test_another_tolerance_is_for_all_checkpoints(run, monkeypatch, capsys):
    shown(monkeypatch, capsys, run, [3.0, 3.05, 3.2], at_tokens=(40 * B,))
    assert stored_points(run) == {"tolerance": 0.01, 40 * B: 128}
    lines = shown(monkeypatch, capsys, run, [3.0, 3.0, 3.2], args=["--tolerance=0.1"])
    assert stored_points(run) == {"tolerance": 0.1, AT: 256, 40 * B: 256}
    assert not any("5,120" in line for line in lines)  # shown is what was asked for


@pytest.mark.parametrize("content", ["{", "[]", '{"tolerance": 0.01}'])
def test_a_damaged_file_of_points_is_written_anew(run, monkeypatch, capsys, content):
    (run / "branches").mkdir()
    (run / "branches" / "critical_batch.json").write_text(content)
    shown(monkeypatch, capsys, run, [3.0, 3.0, 3.2])
    assert stored_points(run) == {"tolerance": 0.01, AT: 256}


@pytest.mark.parametrize("records", [None, "{", ""])
def test_the_run_s_own_laws_stay(run, monkeypatch, capsys, records):
    (run / "laws").mkdir()
    for name in ("noise", "branch"):
        (run / "laws" / f"{name}.json").write_text("{}")
    if records is not None:
        (run / "metrics.jsonl").write_text(records)
    shown(monkeypatch, capsys, run, [3.0, 3.0, 3.2])
    assert (run / "laws/noise.json").read_text() == "{}" and not (run / "laws/branch.json").exists()


def test_how_a_span_was_rounded_is_said(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "late", train__tokens=90 * B)
    (run / "checkpoints" / str(90 * B)).mkdir()
    monkeypatch.setattr("scaling_jax.branch.run.train", lambda *_, **__: {"status": "diverged"})
    assert main(["branch", f"--run={run}", f"--at_tokens={90 * B}", "--factors=1,3"]) == 1
    assert "span from 11,520 tokens on: an eighth of these, rounded up to 1,536, whole batches of every factor" in capsys.readouterr().err
    args = [f"--at_tokens={90 * B}", "--factors=1,3", "--span_tokens=1500", "--overwrite"]
    assert main(["branch", f"--run={run}", *args]) == 1
    assert "span from 11,520 tokens on: --span_tokens=1500, rounded up to 1,536" in capsys.readouterr().err


def test_every_flag_reaches_the_branches_and_interrupts_have_their_codes(run, monkeypatch, capsys):
    seen = []

    def stop(error):
        def branch(*args):
            seen.append(args)
            raise error

        monkeypatch.setattr("scaling_jax.branch.run.branch", branch)

    argv = ["branch", f"--run={run}", "--at_tokens=2048,5120", "--factors=1,3", "--span_tokens=999", "--lr_rule=none", "--overwrite"]
    stop(Stopped(15))
    assert main(argv) == 143
    assert seen == [(str(run), Asked([2048, 5120], [1, 3], 999, "none"), True)]
    stop(KeyboardInterrupt())
    assert main(argv[:3]) == 130
    assert seen[-1] == (str(run), Asked([2048, 5120], [1, 2, 4, 8], None, "sqrt"), False)
    assert capsys.readouterr().err.endswith("scaling-jax branch: interrupted; the same command continues\n")
