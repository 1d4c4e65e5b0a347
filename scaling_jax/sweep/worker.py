"""One task of a study, in whatever process it is; and a process of the local engine, `python -m scaling_jax.sweep.worker`.

That process reads a task a line, JSON, from its standard input, and writes an answer a line to its standard output. SIGTERM, Ctrl-C
or the end of its input ask it to stop: a group that trains is saved and answered as stopped, and the process ends. A second signal ends
it at once, and so does the first where there is nothing to save.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from etils import epath

from scaling_jax.errors import UserError
from scaling_jax.process import keep_freed_memory, leave_out_absent_tpu, use_compilation_cache
from scaling_jax.sweep.plan import FILE as PLAN_FILE

SAVE_SECONDS = 120.0  # what a group has to save in once the driver is gone
SEEN_SECONDS = 40.0  # after which another host sees a new file; those of NFS look at a directory again after 30


def perform(task: dict[str, Any], stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Does a task: {"do": "group", "directory", "group"}, {"do": "class", "values", "count", "max_members", "cpus"} or
    {"do": "dtype", "values"}.

    Returns {"state": "done" | "stopped" | "failed", "reason": str | None}; the decisions of a class, as the plan has them; or
    {"compute_dtype", "seconds", "why"}. `stop` is asked before each step of a group.
    """
    if task["do"] == "group":
        return _group(epath.Path(task["directory"]), task["group"], stop)
    from scaling_jax.sweep import measure

    if task["do"] == "class":
        return measure.decide_class(task["values"], task["count"], task["max_members"], task["cpus"])
    return measure.decide_dtype(task["values"])._asdict()


def _group(directory: epath.Path, group: str, stop: Callable[[], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + SEEN_SECONDS
    while not (directory / PLAN_FILE).exists():
        if time.monotonic() > deadline or stop():
            host = os.uname().nodename
            return {"state": "failed", "reason": f"node {host} does not see {directory / PLAN_FILE}; all nodes must share --workdir"}
        time.sleep(0.5)
    from scaling_jax.sweep.group import run_group

    state, reason = run_group(directory, group, stop)
    return {"state": state, "reason": reason}


def answer(task: dict[str, Any], stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """What `perform` returns; for an exception {"error": one line, "user": whether the user can mend it}."""
    try:
        return perform(task, stop)
    except UserError as error:
        return {"error": str(error), "user": True}
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {text}", "user": False}


class Asked:
    """Whether this process was asked to stop; called, it says so."""

    def __init__(self) -> None:
        self._asked = False
        self.saves = False  # there is a task that heeds it

    def __call__(self) -> bool:
        return self._asked

    def ask(self, number: int = signal.SIGTERM, _: Any = None) -> None:
        if self._asked or not self.saves:
            os._exit(128 + number)
        self._asked = True

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """In the main thread."""
        before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(answer: Callable[[dict[str, Any], Callable[[], bool]], dict[str, Any]] = answer) -> None:
    """Answers tasks until there are no more, or a stop is asked for."""
    replies = _own_output()
    asked = Asked()
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(tasks, asked), daemon=True).start()
    with asked.heeding_signals():
        while not asked() and (line := tasks.get()):
            task = json.loads(line)
            asked.saves = task["do"] == "group"
            reply = json.dumps(answer(task, asked))
            with contextlib.suppress(BrokenPipeError):  # the driver is gone; the group is saved all the same
                print(reply, file=replies, flush=True)
            asked.saves = False
    os._exit(0)  # nothing is left to do, and threads of libraries would take their time


def _own_output() -> TextIO:
    """Standard output, which from here on is standard error to everybody else."""
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "w")


def _read(tasks: queue.SimpleQueue[str], asked: Asked) -> None:
    for line in sys.stdin:
        tasks.put(line)
    tasks.put("")
    asked.ask()
    time.sleep(SAVE_SECONDS)  # no step, and no compilation, takes so long where a study is trained on one machine
    os._exit(128 + signal.SIGTERM)


def main() -> None:
    leave_out_absent_tpu()
    keep_freed_memory()
    use_compilation_cache()
    serve()


if __name__ == "__main__":
    main()
