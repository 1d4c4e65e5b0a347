"""A study on a Ray cluster of this machine: two groups at a time, one of whose processes is killed amid its training."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_sweep_run import kills

from scaling_jax import results
from scaling_jax.errors import UserError
from scaling_jax.sweep import ray_engine, worker
from scaling_jax.sweep.engine import LocalEngine
from scaling_jax.sweep.ray_engine import RayEngine
from scaling_jax.sweep.run import Stopped, sweep
from scaling_jax.sweep.study import load_study

TOKENS = 32_000


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    pytest.importorskip("ray")
    try:
        engine = RayEngine("local", num_cpus=2)
    except UserError as error:  # processes or ports that this machine does not allow
        pytest.skip(f"Ray does not start here: {error}")
    yield engine
    engine.close()


@pytest.fixture
def make_engine(engine: RayEngine, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], RayEngine]:
    """The same one for all studies: Ray takes ten seconds to start."""
    with monkeypatch.context() as patched:
        patched.setattr(engine, "close", lambda: None)
        yield lambda tasks: engine


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was done without Ray, and its config beside it."""
    folder = tmp_path_factory.mktemp("local")
    study = load_study(str(kills.write_study(folder, TOKENS, seeds=1, lrs=1, members=1)))
    sweep(study, folder / "local", lambda tasks: LocalEngine(2))
    assert results.load(folder / "local")["status"].tolist() == ["finished"] * 6
    return folder / "local"


def in_the_background(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def holders_of(directory: Path) -> list[int]:
    """Processes that have one of the directory's files open: those that train its groups."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            names = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if int(process.name) != os.getpid() and any(name.startswith(str(directory / "groups")) for name in names):
            found.append(int(process.name))
    return found


def wait_for_checkpoint(directory: Path) -> None:
    while not any(directory.glob("groups/*/trunk/checkpoints/[0-9]*")):
        time.sleep(0.01)


def test_one_killed_amid_a_point_the_table_is_that_of_the_local_engine(
    local: Path, make_engine: Callable[[int], RayEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def kill() -> None:
        wait_for_checkpoint(tmp_path / "ray")
        os.kill(holders_of(tmp_path / "ray")[0], signal.SIGKILL)

    killer = in_the_background(kill)
    sweep(load_study(str(local.parent / "study.py")), tmp_path / "ray", make_engine)
    killer.join(10)
    err = capsys.readouterr().err
    assert "its worker is gone (WorkerCrashedError" in err and "it continues from its last checkpoint" in err
    kills.compare(local, tmp_path / "ray")


def test_what_ray_is_stopped_amid_is_saved_and_continued_elsewhere(local: Path, make_engine: Callable[[int], RayEngine], tmp_path: Path):
    """The last of those that use the engine."""

    def stop() -> None:
        wait_for_checkpoint(tmp_path / "ray")
        os.kill(os.getpid(), signal.SIGTERM)

    study, stopper = load_study(str(local.parent / "study.py")), in_the_background(stop)
    with pytest.raises(Stopped) as stopped:
        sweep(study, tmp_path / "ray", make_engine)
    stopper.join(10)
    assert stopped.value.args == (signal.SIGTERM,)
    for record in (tmp_path / "ray").glob("groups/*/group.json"):
        newest = max(int(path.name) for path in record.parent.glob("trunk/checkpoints/[0-9]*"))
        assert 0 < json.loads(record.read_text())["tokens"] == newest
    assert holders_of(tmp_path / "ray") == []
    assert "pending" in set(results.load(tmp_path / "ray")["status"])
    sweep(study, tmp_path / "ray", lambda tasks: LocalEngine(2))
    kills.compare(local, tmp_path / "ray")


def test_a_task_is_done_where_the_driver_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """config.data.path may be relative; and the handlers of signals are as before afterwards."""
    monkeypatch.chdir(tmp_path.parent)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(worker, "answer", lambda task, stop: {"at": os.getcwd(), "asked": stop()})
    assert ray_engine._task({"do": "group"}, str(tmp_path)) == {"at": str(tmp_path), "asked": False}
    assert ray_engine._task({"do": "group"}, str(tmp_path / "not here"))["at"] == str(tmp_path)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_without_ray_or_a_cluster_the_user_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine=ray: Ray is not installed; pip install 'scaling_jax\[ray\]'"):
        RayEngine("auto")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere.invalid:6379", "nonsense"])
def test_an_address_where_nobody_answers_is_refused_soon(address: str):
    pytest.importorskip("ray")
    started = time.monotonic()
    with pytest.raises(UserError, match=f"--ray_address={address}: no Ray cluster answers there"):
        RayEngine(address)
    assert time.monotonic() - started < 30


def test_resources_that_no_node_has_are_named():
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "TPU": 8.0}}]
    assert ray_engine._nowhere(nodes, {"CPU": 8, "TPU": 0}) == ""
    assert ray_engine._nowhere(nodes, {"CPU": 1, "TPU": 8}) == "no node has 1 CPU and 8 TPU"
    assert ray_engine._nowhere(nodes, {"CPU": 9, "TPU": 0}) == "no node has 9 CPU"
