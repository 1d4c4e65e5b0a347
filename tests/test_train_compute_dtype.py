"""config.model.compute_dtype=fastest: what is timed, what follows from it, and that a run keeps what it once found."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from helpers import Trainers, small_config
from meetings import all_at_once, impatient, leave, several  # noqa: F401
from ml_collections import ConfigDict

from scaling_jax import cli
from scaling_jax.config import from_json
from scaling_jax.coord_check import run as coord_check_module
from scaling_jax.errors import UserError
from scaling_jax.pods import compile as compile_module
from scaling_jax.train import compute_dtype, loop
from scaling_jax.train.checkpoint import Start
from scaling_jax.train.compute_dtype import Choice, choose, fastest, time_dtypes
from scaling_jax.train.loop import train
from scaling_jax.train.step import Trainer

STEP = 128  # tokens
AMX, PLAIN = "flags\t\t: fpu amx_tile amx_bf16\n", "flags\t\t: fpu avx512f avx512vl\n"
FOUND = {"float32": 0.098, "bfloat16": 0.0612}
ONE = dict(optimizer__lr=2.0**-7, noise_scale__every=0, data__verify=False, eval__tokens=64, model__depth=1)


@pytest.fixture(scope="module", autouse=True)
def _shared_programs(quick_compilation):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", Trainers())
        yield


@pytest.fixture(autouse=True)
def _with_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    on_machine(monkeypatch, tmp_path, AMX)


def on_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpuinfo: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}")
    monkeypatch.setattr(compute_dtype, "CPUINFO", tmp_path / "cpuinfo")


def timed(monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float) -> list[str]:
    """Plants the seconds of a step; the list has an entry for each time that they were asked for."""
    asked = []

    def time_dtypes(config: ConfigDict, mesh: Any, hosts: Any) -> dict[str, float]:
        asked.append(config.model.compute_dtype)
        return {"float32": float32, "bfloat16": bfloat16}

    monkeypatch.setattr(compute_dtype, "time_dtypes", time_dtypes)
    return asked


def a_run(dtype: str = "fastest", **fields: Any) -> ConfigDict:
    return small_config(**(ONE | {"train__tokens": 4 * STEP, "model__compute_dtype": dtype} | fields))


def stored(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "config.json").read_text())


def test_bfloat16_where_it_saves_a_twentieth():
    assert choose(FOUND) == Choice("bfloat16", FOUND, "61 ms a step (float32: 98 ms)")
    assert choose({"float32": 0.005, "bfloat16": 0.004751})[::2] == ("float32", "5.0 ms a step (bfloat16: 4.8 ms)")
    assert choose({"float32": 0.005, "bfloat16": 0.004749}).compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("platform", "cpuinfo", "found"),
    [
        ("tpu", PLAIN, "bfloat16"),
        ("cpu", PLAIN, "float32"),
        ("cpu", AMX, None),
        ("cpu", "flags\t\t: fpu avx512_bf16\n", None),
        ("cpu", "Features\t: fp asimd\n", None),  # of an ARM: measured
        ("gpu", PLAIN, None),
    ],
)
def test_what_needs_no_measuring(monkeypatch, tmp_path, capsys, platform: str, cpuinfo: str, found: str | None):
    on_machine(monkeypatch, tmp_path, cpuinfo)
    monkeypatch.setattr(compute_dtype.jax, "default_backend", lambda: platform)
    asked = timed(monkeypatch, **FOUND)
    choice = fastest(a_run(), line=compute_dtype.LiveLine(10))
    assert (choice.compute_dtype, bool(choice.seconds), len(asked)) == ((found, False, 0) if found else ("bfloat16", True, 1))
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"compute_dtype fastest: {choice.compute_dtype}, {choice.why}")


def test_a_machine_that_does_not_say_what_it_can_do_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(compute_dtype, "CPUINFO", tmp_path / "none")
    assert timed(monkeypatch, **FOUND) == [] and fastest(a_run()).seconds == FOUND


class Planted:
    """A trainer on a clock of its own, whose first step takes long, and whose second is disturbed."""

    batch_sharding, seconds = None, {"float32": 0.3, "bfloat16": 0.2}

    def __init__(self, config: ConfigDict, mesh: None):
        self.dtype, self.taken = config.model.compute_dtype, 0

    def init(self, seed: int) -> int:
        return 0

    def step(self, state: int, tokens_AxBxL: Any, measure: bool) -> tuple[int, None]:
        steps.append((self.dtype, state, tokens_AxBxL.shape, measure))
        self.taken += 1
        clock[0] += {1: 60.0, 2: 5.0}.get(self.taken, self.seconds[self.dtype])
        return state + 1, None


clock, steps = [0.0], []


@pytest.mark.parametrize(("every", "budget", "rounds"), [(1, 0.0, 3), (0, 12.0, 6), (7, 1e9, 51)])
def test_steps_are_timed_in_turns_but_for_the_first(monkeypatch, every: int, budget: float, rounds: int):
    monkeypatch.setattr(compute_dtype, "Trainer", Planted)
    monkeypatch.setattr(compute_dtype, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(compute_dtype, "TIMED_SECONDS", budget)
    clock[:], steps[:] = [1.0], []
    config = a_run(noise_scale__every=every, train__accumulation=2)
    assert time_dtypes(config) == pytest.approx(Planted.seconds) and config.model.compute_dtype == "fastest"
    assert steps == [(("float32", "bfloat16")[i % 2], i, (2, 4, 17), every == 1) for i in range(2 * rounds)]


def test_a_step_is_really_timed():
    seconds = time_dtypes(a_run())
    assert set(seconds) == {"float32", "bfloat16"} and all(0 < value < 5 for value in seconds.values())


def test_a_run_keeps_what_it_found(monkeypatch, tmp_path, capsys):
    asked, run = timed(monkeypatch, **FOUND), tmp_path / "run"
    train(a_run(train__stop_at_tokens=2 * STEP), run)
    assert asked == ["fastest"] and "compute_dtype fastest: bfloat16, 61 ms a step (float32: 98 ms)\n" in capsys.readouterr().err
    found = {"compute_dtype": "bfloat16", "seconds": FOUND, "why": "61 ms a step (float32: 98 ms)"}
    assert stored(run)["fastest"] == found and stored(run)["identity"]["model.compute_dtype"] == "bfloat16"
    assert from_json(stored(run)["config"]).model.compute_dtype == "bfloat16"

    asked = timed(monkeypatch, float32=1.0, bfloat16=2.0)
    on_machine(monkeypatch, tmp_path, PLAIN)  # and one that would not measure at all
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"config\.model\.compute_dtype: 'bfloat16' there, 'float32' here"):
        train(a_run("float32"), run)
    assert (run / "config.json").read_bytes() == before
    assert train(a_run(train__stop_at_tokens=3 * STEP), run)["tokens"] == 3 * STEP
    train(a_run(), tmp_path / "from_it", start=Start(run, 3 * STEP))  # in no other dtype than what it starts from
    assert stored(tmp_path / "from_it")["identity"]["model.compute_dtype"] == "bfloat16"
    assert train(a_run("bfloat16"), run)["status"] == "finished"
    assert stored(run)["fastest"] == found and asked == [] and "compute_dtype" not in capsys.readouterr().err

    train(a_run("bfloat16"), tmp_path / "given")
    assert stored(tmp_path / "given")["identity"] == stored(run)["identity"] and "fastest" not in stored(tmp_path / "given")


def test_a_crash_after_the_choice_does_not_lose_it(monkeypatch, tmp_path):
    class Killed(loop._Run):
        def run(self, *_: Any) -> dict[str, Any]:
            raise SystemExit

    timed(monkeypatch, **FOUND)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop, "_Run", Killed)
        train(a_run(), tmp_path / "run")
    timed(monkeypatch, float32=1.0, bfloat16=2.0)
    train(a_run(), tmp_path / "run")
    kept = stored(tmp_path / "run")
    assert kept["identity"]["model.compute_dtype"] == "bfloat16" and kept["fastest"]["seconds"] == FOUND


def test_a_measurement_that_ends_early_leaves_no_run_and_no_damage(monkeypatch, tmp_path):
    def time_dtypes(*_: Any) -> None:
        raise error

    monkeypatch.setattr(compute_dtype, "time_dtypes", time_dtypes)
    error, run = KeyboardInterrupt(), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(a_run(), run)
    assert [path.name for path in run.iterdir()] == [".lock"]
    train(a_run("float32"), run)  # not locked, and nobody's yet
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 TB")
    with pytest.raises(UserError, match=r"out of memory \(RESOURCE_EXHAUSTED: 1 TB\)"):
        train(a_run(), run, overwrite=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert train(a_run(), run)["status"] == "finished"  # which has a dtype: nothing is timed
    assert stored(run)["identity"]["model.compute_dtype"] == "float32" and "fastest" not in stored(run)
    timed(monkeypatch, **FOUND)
    train(a_run(), run, overwrite=True)
    assert stored(run)["identity"]["model.compute_dtype"] == "bfloat16"


def test_process_0_chooses_for_all(monkeypatch):
    def time_dtypes(config: ConfigDict, mesh: None, hosts: Any) -> dict[str, float]:
        return FOUND if hosts.first else {"float32": 1.0, "bfloat16": 2.0}

    monkeypatch.setattr(compute_dtype, "time_dtypes", time_dtypes)
    all_hosts = several(2)
    found = all_at_once(*(lambda hosts=hosts: fastest(a_run(), None, hosts) for hosts in all_hosts))
    assert found == [choose(FOUND)] * 2
    leave(all_hosts)


def test_all_processes_take_as_many_steps_whatever_their_clocks_say(monkeypatch):
    class OfThread(Planted):
        def step(self, state: int, *_: Any) -> tuple[int, None]:
            time.sleep(0.001 if threading.current_thread() in quick else 0.02)
            return state + 1, taken.append(threading.current_thread())

    def of(hosts: Any) -> None:
        if hosts.first:
            quick.append(threading.current_thread())
        time_dtypes(a_run(), None, hosts)

    quick, taken = [], []
    monkeypatch.setattr(compute_dtype, "Trainer", OfThread)
    monkeypatch.setattr(compute_dtype, "TIMED_SECONDS", 0.1)
    all_hosts = several(2)
    all_at_once(*(lambda hosts=hosts: of(hosts) for hosts in all_hosts))
    assert len(taken) == 2 * taken.count(quick[0]) > 4 * 3
    leave(all_hosts)


def test_verbs_that_train_nothing_measure_nothing(monkeypatch, tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        "from scaling_jax.config import default_config\ndef get_config():\n    config = default_config()\n"
        "    config.model.width, config.model.depth, config.model.compute_dtype = 32, 1, 'fastest'\n    return config\n"
    )
    asked = timed(monkeypatch, **FOUND)
    own = tmp_path / "own.py"
    own.write_text(
        "import jax.numpy as jnp\nfrom scaling_jax.model import Transformer\n"
        "def make(config, *args, **kwargs):\n    jnp.dtype(config.compute_dtype)\n    return Transformer(config, *args, **kwargs)\n"
    )
    assert cli.main(["parametrization", f"--config={file}", f"--model={own}:make"]) == 0
    table = capsys.readouterr().out
    assert cli.main(["parametrization", f"--config={file}", "--config.model.compute_dtype=float32"]) == 0
    assert capsys.readouterr().out == table

    def compiled(config: ConfigDict, *_: Any) -> None:
        raise ValueError(f"in {config.model.compute_dtype}")

    def checked(config: ConfigDict, *_: Any) -> None:
        raise UserError(f"in {config.model.compute_dtype}")

    monkeypatch.setattr(compile_module, "prepare", lambda: None)
    monkeypatch.setattr(compile_module, "compile_step", compiled)
    assert cli.main(["compile", f"--config={file}", "--topology=v5e:2x4"]) == 3 and "in bfloat16" in capsys.readouterr().err
    monkeypatch.setattr(coord_check_module, "coord_check", checked)
    assert cli.main(["coord-check", f"--config={file}", "--widths=32,64,96", f"--out={tmp_path / 'check'}"]) == 2
    assert "in float32" in capsys.readouterr().err and asked == []


def test_a_trainer_of_ones_own_is_told_that_only_a_run_finds_it():
    with pytest.raises(UserError, match="compute_dtype is 'fastest'.*must be float32 or bfloat16"):
        Trainer(small_config(model__compute_dtype="fastest"))
