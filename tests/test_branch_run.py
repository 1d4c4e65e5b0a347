"""Branches of a small run, run: what they share with it, what differs, and that they continue where they were stopped."""

import fcntl
import json
import math
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import small_config

from scaling_jax.branch.plan import Asked
from scaling_jax.branch.results import Result
from scaling_jax.branch.run import Stopped, branch
from scaling_jax.cli import main
from scaling_jax.errors import UserError
from scaling_jax.train.checkpoint import Checkpoints
from scaling_jax.train.loop import train
from scaling_jax.train.metrics import MetricsWriter, read_records
from scaling_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, AT, END = 128, 8 * 128, 16 * 128  # tokens
ASKED = Asked([AT], [1, 2], END - AT)
CONFIG = {
    "schedule__name": "cosine",
    "optimizer__lr": 0.02,
    "train__tokens": END,
    "checkpoint__keep_at_tokens": (AT,),
    "eval__tokens": 128,
    "noise_scale__every": 0,
}


@pytest.fixture(scope="module")
def branched(tmp_path_factory):
    """A run to its end, and its branches over the later half."""
    run = tmp_path_factory.mktemp("branched") / "run"
    train(small_config(**CONFIG), run)
    argv = ["branch", f"--run={run}", f"--at_tokens={AT}", "--factors=1,2", f"--span_tokens={END - AT - 1}", "--tolerance=10"]
    assert main(argv) == 0
    return run


def state_of(run, tokens):
    with Checkpoints(run) as checkpoints:
        return jax.tree.leaves(checkpoints.restore(tokens, Trainer(small_config(**CONFIG)).abstract_sharded_state))


def steps_of(run):
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read_records(run) if "loss" in r]


def test_factor_1_is_the_run_itself(branched):
    """Bit for bit: parameters, moments, records and held-out loss."""
    x1 = branched / "branches" / str(AT) / "x1"
    for ours, theirs in zip(state_of(x1, END), state_of(branched, END), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert steps_of(x1) == [r for r in steps_of(branched) if r["tokens"] > AT]
    row = json.loads((branched / "branches" / "branches.json").read_text())["branches"][0]
    summary = json.loads((branched / "summary.json").read_text())
    assert row["loss"] == pytest.approx(summary["eval/heldout/loss"], rel=1e-12)
    losses_N = np.load(x1 / "heldout_losses.npy")
    assert row["loss_se"] == pytest.approx(losses_N.std(ddof=1) / math.sqrt(len(losses_N)))  # branches are compared by sequences


def test_factor_2_takes_half_the_steps_at_the_run_s_lr_times_the_root_of_2(branched):
    records = steps_of(branched / "branches" / str(AT) / "x2")
    assert [(r["step"], r["tokens"], r["batch_tokens"]) for r in records] == [(8 + n, AT + 2 * B * n, 2 * B) for n in range(1, 5)]
    middles = [(r["tokens"] - B) / END for r in records]  # of a step's tokens, in parts of the run
    expected = [math.sqrt(2) * 0.02 * 0.5 * (1 + math.cos(math.pi * part)) for part in middles]
    np.testing.assert_allclose([r["lr"] for r in records], expected, rtol=1e-5)


def test_results_hold_every_sequence_s_loss(branched, monkeypatch):
    """The same call runs nothing, and returns what the first one did."""
    monkeypatch.setattr("scaling_jax.branch.run.train", pytest.fail)
    one, two = branch(branched, ASKED)
    assert one.losses_N.shape == two.losses_N.shape == (8,) and not np.array_equal(one.losses_N, two.losses_N)
    rows = json.loads((branched / "branches" / "branches.json").read_text())["branches"]
    for result, row in zip((one, two), rows, strict=True):
        assert result.record() == row and row["span_tokens"] == END - AT and row["lr_rule"] == "sqrt" and row["tokens"] == AT
        np.testing.assert_allclose(row["loss"], result.losses_N.mean(), rtol=1e-12)
    critical = json.loads((branched / "branches" / "critical_batch.json").read_text())
    assert critical["tolerance"] == 10 and critical["points"][0]["batch_tokens"] == 2 * B  # 10 nats are all that there are


@pytest.fixture
def copy(branched, tmp_path):
    """The same with factor 2 yet to run."""
    run = tmp_path / "run"
    shutil.copytree(branched, run)
    shutil.rmtree(run / "branches" / str(AT) / "x2")
    path = run / "branches" / "branches.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"branches": stored["branches"][:1]}))
    return run


def test_a_stopped_branch_continues_as_if_it_never_stopped(branched, copy, monkeypatch, capsys):
    write, written = MetricsWriter.write, []

    def stopping(self, record):
        write(self, record)
        written.append(record)
        if len(written) == 1:
            signal.raise_signal(signal.SIGTERM)

    argv = ["branch", f"--run={copy}", f"--at_tokens={AT}", "--factors=1,2", f"--span_tokens={END - AT}"]
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", stopping)
        assert main(argv) == 143
    assert "interrupted, saved; the same command continues" in capsys.readouterr().err
    x2 = copy / "branches" / str(AT) / "x2"
    reached = json.loads((x2 / "summary.json").read_text())["tokens"]
    assert AT < reached < END
    capsys.readouterr()
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert f"continuing from the checkpoint at {reached:,} tokens" in err and "has 1 of 2 branches" in err and "branch 2 of 2" in err
    assert f"critical batch (branch) at {AT:,} tokens: " in out
    whole = branched / "branches" / str(AT) / "x2"
    np.testing.assert_array_equal(np.load(x2 / "heldout_losses.npy"), np.load(whole / "heldout_losses.npy"))
    assert steps_of(x2) == steps_of(whole)


def snapshot(directory: Path):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def refused(run, asked, monkeypatch) -> str:
    """The message; nothing ran, nothing was written."""
    monkeypatch.setattr("scaling_jax.branch.run.train", pytest.fail)
    before = snapshot(run)
    with pytest.raises(UserError) as error:
        branch(run, asked)
    assert snapshot(run) == before
    return str(error.value)


def test_other_settings_are_refused_and_overwrite_deletes_the_branches(copy, monkeypatch):
    text = refused(copy, ASKED._replace(lr_rule="none"), monkeypatch)
    assert f"branches at {AT} tokens have other settings (lr_rule sqrt -> none)" in text and "--overwrite" in text
    ran = []

    def diverging(config, workdir, start):
        ran.append((workdir.name, config.batch.lr_rule, start.tokens, (copy / "branches" / str(AT) / "x1").exists()))
        workdir.mkdir(parents=True)
        return {"status": "diverged"}

    monkeypatch.setattr("scaling_jax.branch.run.train", diverging)
    results = branch(copy, ASKED._replace(lr_rule="none"), overwrite=True)
    assert ran == [("x1", "none", AT, False), ("x2", "none", AT, True)]
    assert [result.loss for result in results] == [None, None]
    assert branch(copy, ASKED._replace(lr_rule="none")) == results and len(ran) == 2  # that a branch diverged is a result


@pytest.mark.parametrize("damage", ["absent", "truncated", "empty", "another mean"])
def test_a_result_without_its_losses_is_measured_again(copy, monkeypatch, damage):
    path = copy / "branches" / str(AT) / "x1" / "heldout_losses.npy"
    whole = path.read_bytes()
    path.unlink()
    if damage == "another mean":
        np.save(path, np.full(8, 2.0))
    elif damage != "absent":
        path.write_bytes(whole[: {"truncated": -9, "empty": 0}[damage]])
    factors = []

    def interrupted(config, workdir, start):
        factors.append(workdir.name)
        return {"status": "interrupted", "signal": 2}

    monkeypatch.setattr("scaling_jax.branch.run.train", interrupted)
    with pytest.raises(Stopped):
        branch(copy, ASKED)
    assert factors == ["x1"]


def test_branches_in_use_and_damaged_results_are_named(copy, monkeypatch):
    with open(copy / "branches" / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert f"--run={copy}: its branches are in use by another process" in refused(copy, ASKED, monkeypatch)
    path = copy / "branches" / "branches.json"
    stored = json.loads(path.read_text())
    row = stored["branches"][0]
    for damaged in (
        "{",
        "[]",
        stored | {"branches": [{}]},
        stored | {"branches": [3]},
        stored | {"branches": [row | {"loss": "2.5"}]},
        stored | {"branches": [row | {"factor": None}]},
        stored | {"settings": {str(AT): 3}},
    ):
        path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        assert "branches.json: damaged; delete it" in refused(copy, ASKED, monkeypatch)
    shutil.rmtree(copy / "branches")
    (copy / "branches").touch()
    assert refused(copy, ASKED, monkeypatch) == f"--run={copy}: {copy / 'branches'} is a file, must be a directory"


def test_a_full_disk_is_one_message(copy, monkeypatch, capsys):
    """Where the losses and where the results are written: a device that is always full."""
    monkeypatch.setattr("scaling_jax.branch.run.train", lambda config, workdir, start: {"status": "stopped"})
    monkeypatch.setattr(
        "scaling_jax.branch.run._HeldOut.of", lambda self, b: Result(AT, 2, 2 * B, "sqrt", END - AT, 3.0, 0.0, np.full(8, 3.0))
    )
    (copy / "branches" / str(AT) / "x2").mkdir()
    argv = ["branch", f"--run={copy}", f"--at_tokens={AT}", "--factors=1,2", f"--span_tokens={END - AT}"]
    for name in (f"{AT}/x2/heldout_losses.npy", "branches.json.tmp"):
        full = copy / "branches" / name
        full.symlink_to("/dev/full")
        capsys.readouterr()
        assert main(argv) == 2
        assert f"--run={copy}: no space left on the disk; free some and run the same command again\n" in capsys.readouterr().err
        full.unlink(missing_ok=True)
    assert main(argv) == 0
