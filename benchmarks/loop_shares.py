"""What a run spends beside its steps: on evaluation, checkpoints and records, and on waits for data or for the host.

    python benchmarks/loop_shares.py                               # the demo, whole
    python benchmarks/loop_shares.py --tokens=400000 --json=loop_shares.json
    python benchmarks/loop_shares.py --config=configs/cpu_demo.py --config.eval.tokens=32768

Runs `scaling-jax train` in this process, with clocks around the parts of its loop, in a fresh work directory and with nothing compiled
beforehand. Shares are of the time from the end of the first step to the end of the last save.

  evaluation          in the evaluator; the first one compiles
  saving              in the loop: the state is copied, and the save before this one has to be complete
  slower steps        the steps beside which a save was written, beyond the mean of the others; noise may make it negative
  last save           waited for once all steps are taken
  records             from a step's end to its line in metrics.jsonl and TensorBoard: seconds of the loop's thread on a core. The next
                      step runs meanwhile, and on a CPU lacks that core; where the thread waits for one, the step has it
  together            all of these
  idle device         between the end of a step and the dispatch of the next, evaluations and saves apart: the host was late
  waiting for data    in the loop, for the reader's thread, while the step before runs; where that ends first, it is idle device too
  report              after the run: laws, figures and the table
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from machine import describe_machine, machine_line, prepare_process
from reporting import table, write_json

from scaling_jax import cli

CONFIG = Path(__file__).parent.parent / "configs" / "cpu_demo.py"
TOGETHER = ("evaluation", "saving", "slower steps", "last save", "records")
BESIDE = ("idle device", "waiting for data", "report")


class Step(NamedTuple):
    """When a step was given to the device and when it was done; both in seconds of one clock."""

    dispatched: float
    done: float
    saving: bool  # a save was being written behind when it was given


class Clocks:
    """Spans of a run's time by name, and its steps."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[float, float]]] = {}
        self.steps: list[Step] = []
        self.cpu: dict[str, float] = {}  # seconds on a core, by name
        self._dispatched: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spans.setdefault(name, []).append((began, time.perf_counter()))

    @contextlib.contextmanager
    def cpu_span(self, name: str) -> Iterator[None]:
        """One within another of the same name counts once."""
        before, began = self.cpu.get(name, 0.0), time.thread_time()
        try:
            yield
        finally:
            self.cpu[name] = before + time.thread_time() - began

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return function(*args, **kwargs)

        return call

    def watched(self, step: Callable[..., Any], is_saving: Callable[[], bool | None]) -> Callable[..., Any]:
        @functools.wraps(step)
        def call(*args: Any, **kwargs: Any) -> Any:
            saving = is_saving()
            if saving is None:  # not of the run: it has not begun
                return step(*args, **kwargs)
            called = time.perf_counter()
            state, metrics = step(*args, **kwargs)
            # Where the call comes back with the step done, it did not give the device work but waited for it.
            dispatched = called if metrics.loss.is_ready() else time.perf_counter()
            self._dispatched.put((dispatched, metrics.loss, saving))
            return state, metrics

        return call

    def _watch(self) -> None:
        while (watched := self._dispatched.get()) is not None:
            dispatched, loss, saving = watched
            loss.block_until_ready()
            self.steps.append(Step(dispatched, time.perf_counter(), saving))

    def __enter__(self) -> "Clocks":
        self._switch = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)  # the watcher is to see a step's end at once, though the main thread be busy
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._dispatched.put(None)
        self._watcher.join()
        sys.setswitchinterval(self._switch)

    def seconds(self, name: str, since: float = 0.0) -> float:
        return sum(end - max(began, since) for began, end in self.spans.get(name, ()) if end > since)

    def slower_steps(self) -> float:
        """Seconds that steps beside a save took beyond the mean of the others."""
        took = [(step.done - max(step.dispatched, before.done), step.saving) for before, step in itertools.pairwise(self.steps)]
        alone = [seconds for seconds, saving in took if not saving]
        return sum(seconds - statistics.fmean(alone) for seconds, saving in took if saving) if alone else math.nan

    def idle(self) -> float:
        """Seconds between steps, evaluations and saves apart, which have clocks of their own."""
        others = self.spans.get("evaluation", []) + self.spans.get("saving", [])
        total = 0.0
        for before, step in itertools.pairwise(self.steps):
            within = sum(max(0.0, min(end, step.dispatched) - max(began, before.done)) for began, end in others)
            total += max(0.0, step.dispatched - before.done - within)
        return total


@contextlib.contextmanager
def clocks_on_the_loop() -> Iterator[Clocks]:
    """The parts of `scaling_jax.train.loop` on clocks."""
    import jax

    from scaling_jax.data.source import Prefetcher
    from scaling_jax.report import run as report
    from scaling_jax.train import loop
    from scaling_jax.train.checkpoint import Checkpoints
    from scaling_jax.train.evaluate import Evaluator
    from scaling_jax.train.step import Trainer

    opened: list[Checkpoints] = []
    enter, finish, record = Checkpoints.__enter__, loop._Run.finish, loop._Run.record

    def opening(checkpoints: Checkpoints) -> Checkpoints:
        opened.append(checkpoints)
        return enter(checkpoints)

    def finishing(run: Any, pending: Any) -> None:
        if pending is not None:
            jax.block_until_ready(pending.metrics)  # the step's own time
        with clocks.cpu_span("records"):
            finish(run, pending)

    def recording(run: Any) -> None:
        with clocks.cpu_span("records"):
            record(run)

    with contextlib.ExitStack() as stack:
        clocks = stack.enter_context(Clocks())
        parts = {
            (Evaluator, "__call__"): clocks.timed("evaluation", Evaluator.__call__),
            (Checkpoints, "__enter__"): opening,
            (Checkpoints, "save"): clocks.timed("saving", Checkpoints.save),
            (Checkpoints, "wait"): clocks.timed("last save", Checkpoints.wait),
            (Prefetcher, "get"): clocks.timed("waiting for data", Prefetcher.get),
            (Trainer, "step"): clocks.watched(Trainer.step, lambda: opened[-1]._manager.is_saving_in_progress() if opened else None),
            (loop._Run, "finish"): finishing,
            (loop._Run, "record"): recording,
            (report, "report_run"): clocks.timed("report", report.report_run),
        }
        for (owner, name), clocked in parts.items():
            stack.enter_context(mock.patch.object(owner, name, clocked))
        yield clocks


def rows_of(clocks: Clocks) -> list[dict[str, Any]]:
    """name, seconds and share of each row."""
    since, until = clocks.steps[0].done, clocks.spans["last save"][-1][1]
    spans = ("evaluation", "saving", "last save", "waiting for data", "report")
    seconds = {name: clocks.seconds(name, since) for name in spans} | clocks.cpu
    seconds |= {"slower steps": clocks.slower_steps(), "idle device": clocks.idle()}
    seconds["together"] = sum(seconds[name] for name in TOGETHER)
    seconds["the run"] = until - since
    order = (*TOGETHER, "together", *BESIDE, "the run")
    return [{"name": name, "seconds": seconds[name], "share": seconds[name] / (until - since)} for name in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--tokens", type=int, help="stop there, with the whole run's schedule")
    parser.add_argument("--json", help="file to write the figures to")
    args, overrides = parser.parse_known_args()
    if args.tokens:
        overrides.append(f"--config.train.stop_at_tokens={args.tokens}")
    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        with clocks_on_the_loop() as clocks:
            code = cli.main(["train", f"--config={args.config}", f"--workdir={folder}/run", *overrides])
    if code:
        sys.exit(code)
    rows = rows_of(clocks)
    evaluations, saves = (len(clocks.spans.get(name, ())) for name in ("evaluation", "saving"))
    print(f"\n{machine_line(describe_machine())}; {len(clocks.steps)} steps, {evaluations} evaluations, {saves} saves")
    print(table(rows))
    if args.json:
        write_json(args.json, args, rows)


if __name__ == "__main__":
    main()
