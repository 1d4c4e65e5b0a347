"""The processes of the local engine: kept, replaced where they die, stopped and ended."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scaling_jax.errors import UserError
from scaling_jax.sweep.engine import LocalEngine, TaskError, WorkerLost, default_workers

STUB = """
import os, sys, time
from scaling_jax.sweep.worker import serve

def answer(task, stop):
    match task["do"]:
        case "group":
            if "file" in task:
                open(task["file"], "w").close()
            while not stop():
                time.sleep(0.01)
            return {"state": "stopped", "reason": "saved"}
        case "die":
            print("first line", file=sys.stderr)
            print("the last line", file=sys.stderr, flush=True)
            os.kill(os.getpid(), task["signal"]) if task["signal"] else os._exit(7)
        case "user":
            return {"error": "config.a is 3", "user": True}
        case "fail":
            return {"error": "ValueError: no", "user": False}
        case "hang":
            open(task["file"], "w").close()
            time.sleep(60)
    time.sleep(task.get("seconds", 0))
    return {"pid": os.getpid(), "env": {name: os.environ[name] for name in ("PJRT_NPROC", "OMP_NUM_THREADS")}}

serve(answer)
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalEngine]]:
    (tmp_path / "stub_worker.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    engines = []

    def engine(workers: int = 1, cpus: int = 1) -> LocalEngine:
        engines.append(LocalEngine(workers, cpus, "stub_worker"))
        return engines[-1]

    yield engine
    for one in engines:
        one.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_is_kept_for_all_tasks_and_told_its_threads(make: Callable[..., LocalEngine]):
    engine = make(1, cpus=3)
    replies = [engine.submit({"do": "other"}).result(20) for _ in range(3)]
    assert len({reply["pid"] for reply in replies}) == 1 and replies[0]["pid"] != os.getpid()
    assert replies[0]["env"] == {"PJRT_NPROC": "3", "OMP_NUM_THREADS": "3"}
    assert alive(replies[0]["pid"])
    engine.close()
    assert not alive(replies[0]["pid"])


def test_there_are_as_many_processes_as_workers(make: Callable[..., LocalEngine]):
    engine = make(2)
    futures = [engine.submit({"do": "other", "seconds": 0.3}) for _ in range(4)]
    assert len({future.result(20)["pid"] for future in futures}) == 2


@pytest.mark.parametrize(
    "number, how", [(0, "exit code 7: the last line"), (9, "killed by SIGKILL, perhaps for want of memory: the last line")]
)
def test_a_process_that_dies_is_lost_and_replaced(make: Callable[..., LocalEngine], number: int, how: str):
    engine = make(1)
    before = engine.submit({"do": "other"}).result(20)["pid"]
    with pytest.raises(WorkerLost) as lost:
        engine.submit({"do": "die", "signal": number}).result(20)
    assert str(lost.value) == how
    after = engine.submit({"do": "other"}).result(20)["pid"]
    assert before != after and alive(after) and not alive(before)


def test_one_that_died_between_tasks_is_replaced(make: Callable[..., LocalEngine]):
    engine = make(1)
    pid = engine.submit({"do": "other"}).result(20)["pid"]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert engine.submit({"do": "other"}).result(20)["pid"] != pid


def test_faults_of_tasks_are_raised(make: Callable[..., LocalEngine]):
    engine = make(1)
    with pytest.raises(UserError, match="config.a is 3"):
        engine.submit({"do": "user"}).result(20)
    with pytest.raises(TaskError, match="ValueError: no"):
        engine.submit({"do": "fail"}).result(20)


def test_stop_saves_what_runs_and_leaves_out_what_waits(make: Callable[..., LocalEngine], tmp_path: Path):
    engine = make(1)
    running = engine.submit({"do": "group", "file": str(tmp_path / "runs")})
    waiting = engine.submit({"do": "group", "file": str(tmp_path / "never")})
    wait_for(tmp_path / "runs")
    engine.stop()
    assert running.result(20) == {"state": "stopped", "reason": "saved"}
    assert waiting.result(20) == {"state": "stopped", "reason": None}
    assert engine.submit({"do": "other"}).result(20)["state"] == "stopped"
    assert not (tmp_path / "never").exists()


def test_stop_amid_a_measurement_is_no_loss(make: Callable[..., LocalEngine], tmp_path: Path):
    engine = make(1)
    measuring = engine.submit({"do": "hang", "file": str(tmp_path / "runs")})
    wait_for(tmp_path / "runs")
    engine.stop()
    assert measuring.result(20) == {"state": "stopped", "reason": None}


def test_workers_are_as_many_as_have_their_cpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    assert [default_workers(cpus) for cpus in (1, 2, 3, 8)] == [7, 3, 2, 1]


def test_what_a_worker_prints_before_its_answers_is_no_answer(make: Callable[..., LocalEngine], tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("print('hello there')")
    with pytest.raises(WorkerLost, match="it printed 'hello there' where its answer should be"):
        make().submit({"do": "other"}).result(20)


def test_files_of_the_working_directory_are_no_modules(make: Callable[..., LocalEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "tempfile.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path / "here")
    assert make().submit({"do": "other"}).result(20)["pid"]
