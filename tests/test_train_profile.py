"""Traces of a run's steps, read back as XProf does."""

import signal
from collections import Counter

import jax
import numpy as np
import pytest
from helpers import small_config

from scaling_jax.errors import UserError
from scaling_jax.train.loop import train
from scaling_jax.train.metrics import MetricsWriter, read_records

STEP = 128  # tokens
pytestmark = pytest.mark.usefixtures("quick_compilation")


def config(**fields):
    return small_config(model__depth=1, noise_scale__every=0, **fields)


def events(directory):
    (path,) = directory.glob("plugins/profile/*/*.xplane.pb")
    return [e for plane in jax.profiler.ProfileData.from_file(str(path)).planes for line in plane.lines for e in line.events]


def steps(directory):
    return [dict(e.stats)["step_num"] for e in events(directory) if e.name == "train"]


def losses(workdir):
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in read_records(workdir) if "loss" in r}


def at_step(monkeypatch, number, act):
    """Calls `act` when the record of a step was written."""
    write = MetricsWriter.write

    def acting(self, record):
        write(self, record)
        if record["step"] == number:
            act()

    monkeypatch.setattr(MetricsWriter, "write", acting)
    monkeypatch.setattr("scaling_jax.train.loop.RECORDS_AT_ONCE", 1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "plain"
    train(config(), workdir)
    return workdir


def test_three_whole_steps_are_traced_and_the_run_is_the_same(tmp_path, plain, capsys):
    train(config(), tmp_path / "run", profile_at_tokens=(12 * STEP, 5 * STEP - 1, 20 * STEP - 1))
    assert losses(tmp_path / "run") == losses(plain)
    assert {path.name for path in (tmp_path / "run" / "profile").iterdir()} == {str(12 * STEP), str(5 * STEP - 1)}
    assert steps(tmp_path / "run" / "profile" / str(12 * STEP)) == [13, 14, 15]
    found = events(tmp_path / "run" / "profile" / str(5 * STEP - 1))
    annotated = [e for e in found if e.name == "train"]
    assert [dict(e.stats)["step_num"] for e in annotated] == [6, 7, 8]
    counts = Counter(e.name for e in found)
    ops = {name: n for name, n in counts.items() if f"end: {name}" in counts}
    # No step is cut: every operation has ended, and ran equally often in each of the three.
    assert len(ops) > 50 and all(n % 3 == 0 and counts[f"end: {name}"] == n for name, n in ops.items()) and 3 in ops.values()
    first = min(e.start_ns for e in found if e.name in ops)
    assert first > min(e.start_ns for e in annotated)
    assert not any("backend_compile" in name for name in counts)
    err = capsys.readouterr().err
    assert f"3 steps traced, for XProf: {tmp_path / 'run' / 'profile' / str(5 * STEP - 1)}" in err
    assert f"--profile_at_tokens={20 * STEP - 1}: nothing was traced" in err


def test_a_resumed_run_traces_what_is_still_to_come(tmp_path, plain, capsys):
    train(config(train__stop_at_tokens=6 * STEP), tmp_path / "run")
    train(config(), tmp_path / "run", profile_at_tokens=[2 * STEP, 6 * STEP])
    assert f"--profile_at_tokens={2 * STEP}: is past, the run continues from {6 * STEP:,} tokens" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "profile").iterdir()] == [str(6 * STEP)]
    assert steps(tmp_path / "run" / "profile" / str(6 * STEP)) == [8, 9, 10]  # step 7 is compiled
    assert losses(tmp_path / "run") == losses(plain)


@pytest.mark.parametrize("ending", ["signal", "error", "end"])
def test_a_run_that_ends_amid_a_trace_leaves_a_whole_one(tmp_path, monkeypatch, ending):
    def fail():
        raise RuntimeError("amid a trace")

    fields = {}
    if ending == "signal":
        at_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))  # step 6 is on its way
    elif ending == "error":
        at_step(monkeypatch, 5, fail)
    else:
        fields = {"train__stop_at_tokens": 6 * STEP}
    if ending == "error":
        with pytest.raises(RuntimeError, match="amid a trace"):
            train(config(), tmp_path / "run", profile_at_tokens=[4 * STEP])
    else:
        assert train(config(**fields), tmp_path / "run", profile_at_tokens=[4 * STEP])["tokens"] == 6 * STEP
    found = Counter(e.name for e in events(tmp_path / "run" / "profile" / str(4 * STEP)))
    ops = {name: n for name, n in found.items() if f"end: {name}" in found}
    assert found["train"] == 2 and len(ops) > 50 and all(n % 2 == 0 and found[f"end: {name}"] == n for name, n in ops.items())
    jax.profiler.start_trace(tmp_path / "other")  # RuntimeError while another is running
    jax.profiler.stop_trace()


@pytest.mark.parametrize("at", [0, -5, 20 * STEP, 21 * STEP])
def test_positions_outside_the_run_are_refused(tmp_path, at):
    with pytest.raises(UserError, match=rf"--profile_at_tokens={at}: must be positive and below {20 * STEP}"):
        train(config(), tmp_path / "run", profile_at_tokens=[STEP, at])
    assert not (tmp_path / "run").exists()


def test_a_position_beyond_the_stop_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"below {6 * STEP}, where the run ends"):
        train(config(train__stop_at_tokens=6 * STEP), tmp_path / "run", profile_at_tokens=np.array([7 * STEP]))
    assert not (tmp_path / "run").exists()
