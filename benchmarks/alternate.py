"""Programs that are timed against each other: a process for each, which take turns of a few steps.

A machine that grows slower or faster does so for all of them; what is compared is paired, turn by turn. Every other round runs in the
opposite order. In each turn a process first measures the matrix-multiply peak, and then its steps.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import QUIET_BLAS

_WORKER = Path(__file__).parent / "worker.py"


class Failed(Exception):
    """A program could not be built, or its process ended; the message is for the user."""


class Turns(NamedTuple):
    """R rounds of P programs."""

    seconds_RxP: np.ndarray  # per step
    peaks_RxP: np.ndarray  # float32 matrix-multiply peak just before, FLOP/s


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


class Worker:
    """A process that has built one program, and runs steps of it on command.

    Args:
      program: what worker.py builds.
      checkout: another checkout of this project, whose code is used; None is the one that is installed.

    Raises:
      Failed: the program could not be built.
    """

    def __init__(self, program: Mapping[str, Any], checkout: Path | None = None):
        env, program = os.environ | QUIET_BLAS, dict(program)
        if checkout is not None:
            program["checkout"] = str(checkout)
            env["PYTHONPATH"] = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._stderr = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr, "text": True}
        self._process = subprocess.Popen([sys.executable, str(_WORKER), json.dumps(program)], env=env, **pipes)
        try:
            self.built = self._answer()  # what worker.py says of the program
        except BaseException:
            self.close()
            raise

    def turn(self, steps: int) -> tuple[float, float]:
        """Seconds per step over so many, and the peak just before in FLOP/s."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["peak"]

    def steps_in(self, seconds: float) -> int:
        return max(1, round(seconds / self.built["seconds"]))

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._stderr.seek(0)
            said = self._stderr.read().strip().splitlines() or [f"code {self._process.wait()}"]
            raise Failed(f"the measuring process ended: {said[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer


@contextlib.contextmanager
def started(programs: Sequence[tuple[Mapping[str, Any], Path | None]]) -> Iterator[list[Worker]]:
    """A worker for each (program, checkout), built one after the other."""
    with contextlib.ExitStack() as stack:
        workers = []
        for program in programs:
            workers.append(Worker(*program))
            stack.callback(workers[-1].close)
        yield workers


def take_turns(workers: Sequence[Worker], rounds: int, seconds: float) -> Turns:
    """So many rounds, in each of which every program runs for about so many seconds."""
    steps = [worker.steps_in(seconds) for worker in workers]
    found_RxPx2 = np.empty((rounds, len(workers), 2))
    for r in range(rounds):
        for p in range(len(workers))[:: -1 if r % 2 else 1]:
            found_RxPx2[r, p] = workers[p].turn(steps[p])
    return Turns(found_RxPx2[..., 0], found_RxPx2[..., 1])


def quartiles(ratios_R: np.ndarray) -> Quartiles:
    return Quartiles(*(float(x) for x in np.quantile(ratios_R, [0.25, 0.5, 0.75])))
