"""Where the tasks of a study are done: processes of this machine. `scaling_jax.sweep.ray_engine` has those of a cluster."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from scaling_jax.errors import UserError

WORKER = "scaling_jax.sweep.worker"
END_SECONDS = 5.0  # for a process without a task to end by itself
STOPPED = {"state": "stopped", "reason": None}


class WorkerLost(Exception):
    """The process of a task died. The message says how, in one line."""


class TaskError(Exception):
    """A task raised an exception that is no fault of the user's. The message is one line."""


class Engine(Protocol):
    """`submit` gives what `worker.perform` returns; the future raises WorkerLost, TaskError or UserError."""

    def submit(self, task: dict[str, Any]) -> Future[dict[str, Any]]: ...
    def stop(self) -> None:
        """Has every task save and be answered as stopped, those that have not begun too."""

    def close(self) -> None:
        """Ends all processes; at once those that still have a task."""


def unwrap(reply: dict[str, Any]) -> dict[str, Any]:
    """What a task returned; raises what it raised."""
    if "error" in reply:
        raise (UserError if reply["user"] else TaskError)(reply["error"])
    return reply


class LocalEngine:
    """`workers` processes, each started at its first task, kept for all that follow, and started anew where it died."""

    def __init__(self, workers: int, cpus: int = 1, module: str = WORKER):
        """`cpus`: threads of each; `module`: what a process runs, which calls `worker.serve`."""
        path = os.pathsep.join(filter(None, [*os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path]))
        self._environment = os.environ | {"PJRT_NPROC": str(cpus), "OMP_NUM_THREADS": str(cpus), "PYTHONPATH": path}
        self._module = module
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="worker")
        self._own = threading.local()
        self._lock = threading.Lock()
        self._processes: set[_Process] = set()
        self._stopping = False

    def submit(self, task: dict[str, Any]) -> Future[dict[str, Any]]:
        return self._pool.submit(self._do, task)

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            for process in self._processes:
                process.ask_to_stop()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._stopping = True
            for process in self._processes:
                process.end()
            self._processes.clear()
        self._pool.shutdown()

    def _do(self, task: dict[str, Any]) -> dict[str, Any]:
        process = self._process()
        if process is None:
            return STOPPED
        try:
            return unwrap(process.ask(task))
        except WorkerLost:
            with self._lock:
                self._processes.discard(process)
                if self._stopping:  # before it could heed the signal, or with nothing to save
                    return STOPPED
            raise

    def _process(self) -> "_Process | None":
        """That of this thread, alive; None once a stop was asked for."""
        with self._lock:
            if self._stopping:
                return None
            process = getattr(self._own, "process", None)
            if process not in self._processes or not process.alive():
                self._processes.discard(process)
                process = self._own.process = _Process(self._module, self._environment)
                self._processes.add(process)
            return process


class _Process:
    def __init__(self, module: str, environment: dict[str, str]):
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],  # not what happens to lie in the working directory
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,  # Ctrl-C is for the driver, which has them save
        )

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except (OSError, ValueError):  # a broken pipe; or closed by end()
            reply = ""
        if not reply.endswith("\n"):
            raise WorkerLost(self._how_it_died())
        try:
            return json.loads(reply)
        except ValueError:
            self._process.kill()
            raise WorkerLost(f"it printed {reply.strip()[:200]!r} where its answer should be") from None

    def ask_to_stop(self) -> None:
        self._process.terminate()

    def end(self) -> None:
        """Once it has no task, or where what it does is given up."""
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _how_it_died(self) -> str:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its output and lives
            self._process.kill()
            code = self._process.wait()
        how = f"exit code {code}"
        if code < 0:
            number = -code
            name = signal.Signals(number).name if number in signal.valid_signals() else number
            how = f"killed by {name}" + (", perhaps for want of memory" if number == signal.SIGKILL else "")
        self._stderr.seek(0)
        lines = [line for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return f"{how}: {lines[-1].strip()[:300]}" if lines else how


def default_workers(cpus: int) -> int:
    """One to every `cpus` CPUs that this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // cpus)


MakeEngine = Callable[[int], Engine]  # of the number of tasks that there are at most at a time
