"""A worker's process: one answer a line whatever else is printed, and what it does when it is asked to stop or left alone."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etils import epath

from scaling_jax.errors import UserError
from scaling_jax.sweep import worker
from scaling_jax.train.compute_dtype import Choice

# "group" waits until it is asked to stop; "class" for ever; the others say what they were given.
STUB = """
import os, sys, time
from scaling_jax.sweep.worker import serve

def answer(task, stop):
    print("noise", flush=True)
    os.write(1, b"more noise\\n")
    if task["do"] == "group":
        print("waiting", file=sys.stderr, flush=True)
        while not stop():
            time.sleep(0.01)
        return {"state": "stopped"}
    if task["do"] == "class":
        print("waiting", file=sys.stderr, flush=True)
        time.sleep(60)
    return {"got": task}

serve(answer)
"""


class Worker:
    def __init__(self, code: str):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", code], text=True, start_new_session=True, **pipes)

    def send(self, **task: str) -> None:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def wait_for_task(self) -> None:
        while self.process.stderr.readline().strip() != "waiting":
            assert self.process.poll() is None


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    started = []

    def make(code: str = STUB) -> Worker:
        started.append(Worker(code))
        return started[-1]

    yield make
    for one in started:
        one.process.kill()
        one.process.wait()
        for pipe in (one.process.stdin, one.process.stdout, one.process.stderr):
            pipe.close()


def test_answers_are_all_that_its_output_has(start: Callable[..., Worker]):
    own = start()
    for n in range(2):
        own.send(do="other", n=str(n))
        assert own.receive() == {"got": {"do": "other", "n": str(n)}}
    own.process.stdin.close()
    assert own.process.stdout.read() == ""
    assert own.process.wait(10) == 143  # nothing was at hand
    noise = own.process.stderr.read()
    assert noise.count("noise") == 4


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "left alone"])
def test_a_group_is_saved_when_a_stop_is_asked_for(start: Callable[..., Worker], how: signal.Signals | str):
    own = start()
    own.send(do="group")
    own.wait_for_task()
    if how == "left alone":
        own.process.stdin.close()
    else:
        own.process.send_signal(how)
    assert own.receive() == {"state": "stopped"}
    assert own.process.wait(10) == 0


def test_it_ends_at_once_where_there_is_nothing_to_save(start: Callable[..., Worker]):
    measuring, idle = start(), start()
    measuring.send(do="class")
    measuring.wait_for_task()
    idle.send(do="other")
    idle.receive()
    for own in (measuring, idle):
        own.process.send_signal(signal.SIGTERM)
        assert own.process.wait(10) == 143


def test_a_second_signal_ends_it_at_once(start: Callable[..., Worker]):
    own = start(STUB.replace("while not stop():", "while True:"))
    own.send(do="group")
    own.wait_for_task()
    own.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert own.process.poll() is None
    own.process.send_signal(signal.SIGTERM)
    assert own.process.wait(10) == 143


def test_one_that_is_left_alone_does_not_live_for_long(start: Callable[..., Worker]):
    """Even if what it does never asks whether to stop."""
    code = STUB.replace("while not stop():", "while True:").replace(
        "serve(", "from scaling_jax.sweep import worker; worker.SAVE_SECONDS = 0.3; serve("
    )
    own = start(code)
    own.send(do="group")
    own.wait_for_task()
    own.process.stdin.close()
    assert own.process.wait(10) == 143


def test_a_node_that_does_not_see_the_study_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker, "SEEN_SECONDS", 0.1)
    reply = worker.perform({"do": "group", "directory": str(tmp_path), "group": "abc"})
    assert reply["state"] == "failed"
    assert str(tmp_path / "plan.json") in reply["reason"] and "all nodes must share --workdir" in reply["reason"]


def test_exceptions_are_answers(monkeypatch: pytest.MonkeyPatch):
    def fail(error: Exception) -> dict:
        def perform(*_) -> None:
            raise error

        monkeypatch.setattr(worker, "perform", perform)
        return worker.answer({"do": "class"})

    assert fail(UserError("config.model.width is 3")) == {"error": "config.model.width is 3", "user": True}
    assert fail(ValueError("two\nlines")) == {"error": "ValueError: two", "user": False}


def test_tasks_reach_what_does_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from scaling_jax.sweep import group, measure

    (tmp_path / "plan.json").write_text("{}")
    stop = lambda: False  # noqa: E731
    seen = []
    monkeypatch.setattr(group, "run_group", lambda *args: (seen.append(args), ("failed", "why"))[1])
    assert worker.perform({"do": "group", "directory": str(tmp_path), "group": "abc"}, stop) == {"state": "failed", "reason": "why"}
    assert seen == [(epath.Path(tmp_path), "abc", stop)]
    monkeypatch.setattr(measure, "decide_class", lambda *args: {"members": list(args)})
    task = {"do": "class", "values": {"a": 1}, "count": 3, "max_members": 2, "cpus": 1}
    assert worker.perform(task) == {"members": [{"a": 1}, 3, 2, 1]}
    monkeypatch.setattr(measure, "decide_dtype", lambda values: Choice("bfloat16", {"float32": 2.0}, "why"))
    assert worker.perform({"do": "dtype", "values": {}}) == {"compute_dtype": "bfloat16", "seconds": {"float32": 2.0}, "why": "why"}
