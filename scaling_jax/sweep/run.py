"""A study from its config to its table: what is measured first, what is done where, and what happens when something dies."""

import concurrent.futures
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from etils import epath

from scaling_jax import results, storage
from scaling_jax.console import LiveLine
from scaling_jax.errors import UserError
from scaling_jax.sweep import plan as plan_lib
from scaling_jax.sweep.claim import locked
from scaling_jax.sweep.engine import Engine, TaskError, WorkerLost
from scaling_jax.sweep.opening import Data, Opened, costliest, open_study
from scaling_jax.sweep.plan import Plan
from scaling_jax.sweep.record import GroupRecord
from scaling_jax.sweep.status import DONE, FAILED, clock, group_path, group_status, weights
from scaling_jax.sweep.study import Study
from scaling_jax.train.hosts import ALONE
from scaling_jax.train.stopping import Stop

TABLE_SECONDS = 15.0  # between two writings of the table
SHOWN_SHARE = 0.02  # of the work that must be done before it is said how long the rest takes
LOOK_SECONDS = 2.0  # between two looks at how far groups are
MAX_LOSSES = 3  # of a group's worker in a row, without a new checkpoint between
_LOOKED_AT = 64  # groups at most, each time


class Stopped(Exception):
    """A signal asked for the end; everything is saved. args: the signal's number."""


class Outcome(NamedTuple):
    """What a command has done."""

    table: pd.DataFrame  # of all that the directory has
    failed: dict[str, str]  # group: why


def sweep(study: Study, directory: epath.PathLike, make_engine: Callable[[int], Engine], line: LiveLine | None = None) -> Outcome:
    """Does what of the study is not done yet.

    Args:
      study: as its file gives it.
      directory: of the study; a path that all workers see.
      make_engine: from how many tasks there can be at a time to what does them; called once the study is known to be sound.
      line: for messages and progress.

    Raises:
      UserError: the study, its data or the directory are no good; nothing is written then.
      Stopped: by SIGTERM or Ctrl-C; the same call continues. A second signal is a KeyboardInterrupt.
    """
    directory = epath.Path(directory)
    if storage.is_local(directory):
        directory = epath.Path(Path(directory).absolute())  # workers of a cluster have other working directories
    line = line or LiveLine(seconds=10)
    data = Data(verify=True)
    open_study(study, directory, data)
    with locked(directory):
        opened = open_study(study, directory, data)  # another driver may have been at work until now
        engine, stop = None, Stop(ALONE)
        try:
            with stop.heeding_signals():
                engine = make_engine(len(opened.trajectories))
                opened = _with_dtype(opened, directory, data, engine, line, stop)
                plan = _decide(opened, directory, engine, line, stop)
                return _Driver(directory, plan, opened, engine, line, stop).run()
        finally:
            line.end()
            if engine is not None:
                engine.close()


def _with_dtype(opened: Opened, directory: epath.Path, data: Data, engine: Engine, line: LiveLine, stop: Stop) -> Opened:
    """The study in the dtype that is found to be the fastest, where that is asked for and not known yet."""
    if not opened.study.compute_dtype or (opened.plan is not None and opened.plan.compute_dtype is not None):
        return opened
    values = costliest(opened.points).values
    try:
        (reply,) = _answers(engine, [{"do": "dtype", "values": values}], line, stop, "compute dtypes")
        name = reply["compute_dtype"]
        line.say(f"compute dtype: {name}, {reply['why']}")
    except (WorkerLost, TaskError) as error:
        name = values["model.compute_dtype"]
        line.say(f"compute dtype: {name}, the config's own; the others could not be measured: {error}")
    return open_study(opened.study, directory, data, name)


def _decide(opened: Opened, directory: epath.Path, engine: Engine, line: LiveLine, stop: Stop) -> Plan:
    """The plan with everything in it that the command asks for, written down."""
    first = {}
    for trajectory in opened.trajectories:
        first.setdefault(trajectory.class_key, []).append(trajectory)
    most = opened.study.max_members

    def task(key: str) -> dict[str, Any]:
        settings = {"count": min(most, len(first[key])), "max_members": most, "cpus": opened.study.cpus}
        return {"do": "class", "values": first[key][0].point.values, **settings}

    answers = _answers(engine, [task(key) for key in opened.undecided], line, stop, "classes of points", lost_too=True)
    decided = {}
    for key, answer in zip(opened.undecided, answers, strict=True):
        if isinstance(answer, Exception):
            answer = {"members": 1, "seconds_per_step": {}, "why": f"one by one: measuring failed: {answer}"}
            line.say(f"points of {first[key][0].point.fields}: {answer['why']}")
        decided[key] = answer
    plan = plan_lib.extend(opened.plan, opened.study, opened.points, opened.trajectories, decided)
    plan_lib.write_plan(directory, plan)
    return plan


def _answers(engine: Engine, tasks: Sequence[dict], line: LiveLine, stop: Stop, what: str, lost_too: bool = False) -> list[Any]:
    """The tasks' answers, in order; with `lost_too` an answer may be the exception that there is instead."""
    futures = [engine.submit(task) for task in tasks]
    stopping, pending = False, set(futures)
    while pending:
        _, pending = concurrent.futures.wait(pending, timeout=0.2)
        if stop.asked() and not stopping:
            stopping = True
            engine.stop()
        line.show(f"measuring {what}: {len(futures) - len(pending)}/{len(futures)}")
    if stopping:
        raise Stopped(stop.signal)
    answers: list[Any] = []
    for future in futures:
        error = future.exception()
        if error is not None and not (lost_too and isinstance(error, WorkerLost | TaskError)):
            raise error
        answers.append(future.result() if error is None else error)
    return answers


class _Driver:
    def __init__(self, directory: epath.Path, plan: Plan, opened: Opened, engine: Engine, line: LiveLine, stop: Stop):
        self.directory, self.plan, self.engine, self.line, self.stop = directory, plan, engine, line, stop
        wanted = {trajectory.id for trajectory in opened.trajectories}
        self.groups = [g for g in plan.order if any(tid in wanted for tid, _ in plan.groups[g]["trajectories"])]
        self.weights = weights(plan, self.groups)
        self.fractions = {g: group_status(directory, plan, g).fraction for g in self.groups}
        self.done = {g for g in self.groups if self.fractions[g] == 1.0 and group_status(directory, plan, g).state == DONE}
        self.left_of_point: dict[str, set[str]] = {point.id: set() for point in opened.points}
        for g in self.groups:
            for _, point in plan.groups[g]["trajectories"]:
                if point in self.left_of_point and g not in self.done:
                    self.left_of_point[point].add(g)
        self.failed: dict[str, str] = {}
        self.losses: dict[str, tuple[int, int]] = {}  # group: how often in a row its worker was lost, and its tokens then
        self.running: dict[Future[dict[str, Any]], str] = {}
        self.stopping = False
        self.started, self.began = time.monotonic(), self._weight_done()
        self.table_due, self.look_due = self.started + TABLE_SECONDS, 0.0

    def run(self) -> Outcome:
        todo = [g for g in self.groups if g not in self.done]
        if len(todo) < len(self.groups):
            self.line.say(f"{self.directory}: has {len(self.groups) - len(todo)} of {len(self.groups)} groups")
        for group in todo:
            self._submit(group)
        while self.running:
            finished, _ = concurrent.futures.wait(self.running, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
            if self.stop.asked() and not self.stopping:
                self.stopping = True
                self.line.say("interrupted; saving")
                self.engine.stop()
            for future in finished:
                self._settle(self.running.pop(future), future)
            self._show()
        table = results.write_table(self.directory)
        if self.stopping:
            raise Stopped(self.stop.signal)
        return Outcome(table, self.failed)

    def _submit(self, group: str) -> None:
        self.running[self.engine.submit({"do": "group", "directory": str(self.directory), "group": group})] = group

    def _settle(self, group: str, future: Future[dict[str, Any]]) -> None:
        try:
            reply = future.result()
        except WorkerLost as error:
            reply = {"state": "lost", "reason": str(error)}
        except (TaskError, UserError) as error:
            reply = {"state": FAILED, "reason": str(error)}
            self._record_failure(group, str(error))
        match reply["state"]:
            case "done":
                self.fractions[group] = 1.0
                self.done.add(group)
                self._end(group)
            case "failed":
                self._fail(group, reply["reason"])
            case _ if not self.stopping:  # a worker that died, or that saved since its node is about to go
                self._lose(group, reply["reason"] or "asked to stop")

    def _lose(self, group: str, why: str) -> None:
        count, before = self.losses.get(group, (0, -1))
        tokens = group_status(self.directory, self.plan, group).tokens
        count = 1 if tokens > before else count + 1
        self.losses[group] = (count, tokens)
        if count < MAX_LOSSES:
            self.line.say(f"group {group}: its worker is gone ({why}); it continues from its last checkpoint")
            self._submit(group)
            return
        reason = f"its worker died {count} times without getting further: {why}"
        self._record_failure(group, reason)
        self._fail(group, reason)

    def _record_failure(self, group: str, reason: str) -> None:
        tids = [tid for tid, _ in self.plan.groups[group]["trajectories"]]
        with contextlib.suppress(UserError):  # where its record is damaged, which is the reason then
            GroupRecord(group_path(self.directory, group).parent, tids).write(FAILED, reason)

    def _fail(self, group: str, reason: str) -> None:
        self.failed[group] = reason
        self.line.say(f"group {group} failed: {reason}")
        self._end(group)

    def _end(self, group: str) -> None:
        for _, point in self.plan.groups[group]["trajectories"]:
            self.left_of_point.get(point, set()).discard(group)

    def _show(self) -> None:
        now = time.monotonic()
        if now >= self.table_due:
            results.write_table(self.directory)
            self.table_due = time.monotonic() + TABLE_SECONDS
        if self.stopping or not self.line.due() or now < self.look_due:
            return
        self.look_due = now + LOOK_SECONDS
        for group in itertools.islice((g for future, g in self.running.items() if future.running()), _LOOKED_AT):
            self.fractions[group] = group_status(self.directory, self.plan, group).fraction
        self.line.show(self._progress(now - self.started))

    def _progress(self, seconds: float) -> str:
        points = sum(not left for left in self.left_of_point.values())
        flops = {g: self.plan.group_flops(g) for g in self.groups}
        share = sum(flops[g] * self.fractions[g] for g in self.groups) / sum(flops.values())
        parts = [
            f"{points:,}/{len(self.left_of_point):,} points",
            f"{len(self.done):,}/{len(self.groups):,} groups",
            f"{share:.0%} of FLOPs",
        ]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        weight = self._weight_done()
        total = sum(self.weights[g] for g in self.groups)
        if weight - self.began > SHOWN_SHARE * total:  # groups say how far they are at their checkpoints only
            left = sum(self.weights[g] for g in self.groups if g not in self.failed) - weight
            parts.append(f"{clock(max(0.0, left) * seconds / (weight - self.began))} left")
        return " · ".join(parts)

    def _weight_done(self) -> float:
        return sum(self.weights[g] * self.fractions[g] for g in self.groups)
