"""A group of a study, from its newest checkpoint to its last horizon: what a worker does."""

import contextlib
import fcntl
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax import storage
from scaling_jax.batch_schedule import batch_at
from scaling_jax.curves import Curves, Step, noise_due
from scaling_jax.data.corpus import RunData, open_run_data
from scaling_jax.data.source import Prefetcher
from scaling_jax.errors import UserError
from scaling_jax.mesh import make_mesh
from scaling_jax.sweep.faults import ONE_FOR_ALL
from scaling_jax.sweep.legs import TRUNK, Leg, legs_of
from scaling_jax.sweep.plan import Plan, read_plan
from scaling_jax.sweep.population import Population, program, stack_values
from scaling_jax.sweep.record import DIVERGED, FILE, GroupRecord
from scaling_jax.train import checkpoint as checkpoint_lib
from scaling_jax.train.checkpoint import Checkpoints, Start
from scaling_jax.train.evaluate import HeldOut, batch_sequences, evaluate_members
from scaling_jax.train.noise import PLAIN
from scaling_jax.train.step import StepMetrics, TrainState

SAVE_SECONDS = 30.0  # between checkpoints, unless the config says when; and never less than twenty times what one takes
LOCK_SECONDS = 60.0  # that a worker whose driver was killed may take to save


class _Dispatched(NamedTuple):
    """A step that the devices have been given: its number, tokens seen before and after it, what it saw."""

    number: int
    before: int
    tokens: int
    metrics: StepMetrics
    measured: bool


def run_group(directory: epath.PathLike, group_id: str, stop: Callable[[], bool] = lambda: False) -> tuple[str, str | None]:
    """Trains a group of the study in `directory`, or what is left of it.

    Args:
      directory: of the study, which has a plan.
      group_id: of the plan.
      stop: asked before each step; once it says so the group is saved.

    Returns:
      'done', 'stopped' (saved; another call continues) or 'failed', and the reason.
    """
    directory = epath.Path(directory)
    record = None
    try:
        plan = read_plan(directory)
        if plan is None:
            raise UserError(f"{directory}: has no plan here; all workers must share the study's directory")
        group_dir = group_directory(directory, group_id)
        with _locked(group_dir, stop) as locked:
            if not locked:
                return "stopped", None
            if not (group_dir / FILE).exists():  # who has ended is known there alone
                for leg in [path for path in group_dir.iterdir() if path.is_dir()] if group_dir.exists() else []:
                    leg.rmtree()
            record = GroupRecord(group_dir, [tid for tid, _ in plan.groups[group_id]["trajectories"]], plan.settings["stop_after_rises"])
            state = _Group(plan, group_id, group_dir, record, stop).run()
            record.write("done" if state == "done" else "running")
            return state, None
    except Exception as error:
        reason = _reason(error)
        with contextlib.suppress(UserError):
            if record is not None:
                record.write("failed", reason)
        return "failed", reason


def group_directory(directory: epath.PathLike, group_id: str) -> epath.Path:
    return epath.Path(directory) / "groups" / group_id


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in text:
        return "out of memory; more config.train.accumulation, config.model.remat=full or fewer config.eval.batch_sequences need less"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'a file'}: {error.strerror}"
    text = text if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {text}"
    return text if len(text) < 500 else text[:500] + "…"


@contextlib.contextmanager
def _locked(directory: epath.Path, stop: Callable[[], bool]) -> Iterator[bool]:
    """Holds the group; False where it was asked to stop before. UserError where another process keeps it."""
    if not storage.is_local(directory):
        yield True  # a bucket has no locks; the engine sees to it that nobody else has the group
        return
    directory.mkdir(parents=True, exist_ok=True)
    lock, deadline = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR), time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however it ends
                break
            except BlockingIOError:
                if stop():
                    yield False
                    return
                if time.monotonic() > deadline:
                    raise UserError(f"{directory}: in use by another process") from None
                time.sleep(0.2)
        yield True
    finally:
        os.close(lock)


def device_mesh(config: ConfigDict) -> tuple[jax.sharding.Mesh | None, int]:
    """The mesh of a group on this machine, and the length of its axis of members: all devices that the config's own axes leave."""
    devices = len(jax.devices())
    if devices == 1:
        return None, 1
    config_lib.resolve_mesh(config, devices)
    own = config.mesh.replica * config.mesh.fsdp * config.mesh.tensor
    if devices % own:
        raise UserError(
            f"config.mesh is replica {config.mesh.replica} x fsdp {config.mesh.fsdp} x tensor {config.mesh.tensor} = {own} devices for "
            f"each member: must divide the {devices} that there are"
        )
    members = devices // own
    return make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor, members), members


@functools.lru_cache(maxsize=4)
def _population(key: str, members: int) -> Population:
    """Compiled programs outlive a group: the next of its class has the same."""
    config = config_lib.from_json(json.loads(key))
    mesh, along = device_mesh(config)
    return Population(config, -(-members // along) * along, mesh)


@functools.lru_cache(maxsize=16)
def _data(key: str) -> tuple[RunData, dict[str, HeldOut]]:
    config = config_lib.from_json(json.loads(key))
    data = open_run_data(config)  # the driver has verified it
    return data, {name: HeldOut(s, config.model.context, config.eval.tokens, data.bytes_V) for name, s in data.domains.items()}


def _data_of(config: ConfigDict) -> tuple[RunData, dict[str, HeldOut]]:
    """Cached by what data depend on."""
    other = config_lib.default_config()
    other.data, other.model.context, other.model.vocab_size = config.data, config.model.context, config.model.vocab_size
    other.train.seed, other.eval.tokens = config.train.seed, config.eval.tokens
    other.train.tokens = other.train.batch_tokens = config.model.context  # the study has checked its lengths
    return _data(json.dumps(config_lib.to_json(other)))


class _Group:
    def __init__(self, plan: Plan, group_id: str, directory: epath.Path, record: GroupRecord, stop: Callable[[], bool]):
        self.directory, self.record, self.stop = directory, record, stop
        group = plan.groups[group_id]
        self.configs = [plan.config(point_id) for _, point_id in group["trajectories"]]
        self.legs = legs_of(self.configs[0], group["horizons"], plan.settings["decay_fraction"])
        self.record.values["total_tokens"] = sum(leg.tokens for leg in self.legs)
        opened = [_data_of(config) for config in self.configs]
        self.data, self.held_out = [data for data, _ in opened], opened[0][1]
        if not self.held_out:
            raise UserError(
                f"config.data.path is {self.configs[0].data.path!r}: has no held-out domain, and points are compared by its loss"
            )

    def run(self) -> str:
        for leg in self.legs:
            if self.wanted(leg) and not self.train(leg):
                return "stopped"
        for leg in self.legs:  # a trunk may be asked for more horizons
            if leg.name != TRUNK or self.configs[0].schedule.name not in ONE_FOR_ALL:
                checkpoints = self.directory / leg.name / checkpoint_lib.DIRECTORY
                if checkpoints.exists():
                    checkpoints.rmtree()
        return "done"

    def wanted(self, leg: Leg) -> bool:
        """Whether it has a horizon that is not reached yet, or lacks a checkpoint that a leg starts from which has one."""
        if self.record.values["legs"].get(leg.name) not in (None, leg.tokens):  # begun, perhaps anew, and not at its end
            return True
        if leg.horizons:
            return any(self.record.missing(horizon) for horizon, _ in leg.horizons)
        starts = {other.start_tokens for other in self.legs if other.horizons and self.wanted(other)} - {0}
        return not starts <= set(self.saved(leg))

    def saved(self, leg: Leg) -> list[int]:
        folder = self.directory / leg.name / checkpoint_lib.DIRECTORY
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []

    def train(self, leg: Leg) -> bool:
        """Trains a leg to its end; False where it was stopped before, and saved."""
        saved = self.saved(leg)
        wanted = [at for horizon, at in leg.horizons if self.record.missing(horizon)] or [
            at for at in leg.keep_at_tokens if at not in saved
        ]
        if saved and wanted and saved[-1] > min(wanted):  # an earlier horizon, asked for later
            self.record.at(leg.name, 0)
            self.record.write()
            (self.directory / leg.name).rmtree()
        return _LegRun(self, leg).run()


class _LegRun:
    def __init__(self, group: _Group, leg: Leg):
        self.group, self.leg, self.record = group, leg, group.record
        self.directory = group.directory / leg.name
        self.configs = [leg.config(config) for config in group.configs]
        self.config = self.configs[0]
        self.population = _population(program(self.config), len(self.configs))
        padded = self.configs + [self.configs[-1]] * (self.population.members - len(self.configs))
        self.values, self.padded = stack_values(padded), padded
        self.tids = self.record.trajectories

    def run(self) -> bool:
        leg = self.leg
        self.directory.mkdir(parents=True, exist_ok=True)
        with Checkpoints(self.directory, keep_latest=2, keep_at_tokens=leg.keep_at_tokens) as self.checkpoints:
            tokens, state = self.restore_or_begin()
            branched = TRUNK if leg.name != TRUNK else None
            earlier = [
                h
                for other in self.group.legs
                for h, at in other.horizons
                if (h < leg.horizons[-1][0] if branched else leg.horizons and at <= tokens)
            ]
            self.record.begin(leg.name, tokens, branched, earlier)
            if state is None and not self.record.all_ended:
                where = self.group.directory / TRUNK / checkpoint_lib.DIRECTORY / str(tokens)
                raise UserError(f"{where}: missing, and a decay starts from it; delete {self.group.directory}: the group is trained again")
            before = (self.group.directory / TRUNK / "curves", leg.start_tokens) if branched else None
            self.curves = Curves(self.directory / "curves", self.tids, tokens, before)
            self.saved_tokens, self.saved_at, self.save_took = tokens, time.monotonic(), 0.0
            return self.steps(state, tokens)

    def restore_or_begin(self) -> tuple[int, TrainState | None]:
        """Where the leg goes on, and the state there; None where it starts from a checkpoint that there is not, as all had ended before."""
        own = self.population.abstract_members(len(self.tids))
        restored = self.checkpoints.restore_latest(own, print)
        if restored is not None:
            return restored[0], self.population.fill(restored[1])
        if tokens := self.leg.start_tokens:
            trunk = self.group.directory / TRUNK
            if not (trunk / checkpoint_lib.DIRECTORY / str(tokens)).exists():
                return tokens, None
            return tokens, self.population.fill(Start(trunk, tokens).restore(own))
        return 0, self.population.init(self.padded)

    def read(self, key: tuple[int, int]) -> np.ndarray:
        """The batch (first sequence, count) of every member; those of one seed have the same."""
        by_seed = {}
        for config, data in zip(self.configs, self.group.data, strict=True):
            if config.train.seed not in by_seed:
                by_seed[config.train.seed] = data.train.batch(*key)
        return np.stack([by_seed[config.train.seed] for config in self.padded])

    def steps(self, state: TrainState | None, tokens: int) -> bool:
        config, leg = self.config, self.leg
        context, every = config.model.context, config.noise_scale.every
        step, sequences = int(np.asarray(state.step)[0]) if state else 0, tokens // context
        pending: _Dispatched | None = None
        self.reach(state, tokens)  # horizons added since that end with the step of one that was there
        with Prefetcher(self.read, config.data.prefetch) as batches:
            while tokens < leg.end_tokens and not self.record.all_ended:
                if self.stopped(pending):
                    self.save(state, tokens)
                    self.checkpoints.wait()
                    return False
                count = batch_at(config, tokens) // context
                measure = bool(every) and (step + 1) % every == 0
                tokens_MxAxBxL = self.population.place(batches.get((sequences, count)))
                state, metrics = self.population.step(state, self.values, tokens_MxAxBxL, measure)
                self.note(pending)  # while the next step runs
                step, sequences, before = step + 1, sequences + count, tokens
                tokens = sequences * context
                pending = _Dispatched(step, before, tokens, metrics, measure)
                reached = any(at == tokens for _, at in leg.horizons)
                if reached or self.save_due(before, tokens):
                    self.note(pending)
                    pending = None
                    self.reach(state, tokens)
                    if self.save_due(before, tokens):
                        self.save(state, tokens)
                    elif reached:
                        self.record.at(leg.name, tokens - leg.start_tokens)
                        self.record.write()
            self.note(pending)
        for horizon, _ in leg.horizons:  # of those that all ended before it
            for tid in self.tids:
                if str(horizon) not in self.record.rows.get(tid, {}):
                    self.record.add_ended_row(tid, horizon)
        if state is not None:
            self.save(state, tokens)
        self.checkpoints.wait()
        self.record.at(leg.name, leg.tokens)
        self.record.write()
        return True

    def reach(self, state: TrainState, tokens: int) -> None:
        """Has every row of the horizons that end here, and ends whom they say."""
        for horizon, at in self.leg.horizons:
            if at == tokens:
                self.evaluate(state, horizon, tokens)
                self.record.reached([h for other in self.group.legs for h, _ in other.horizons if h <= horizon])

    def stopped(self, pending: _Dispatched | None) -> bool:
        if not self.group.stop():
            return False
        self.note(pending)
        return True

    def note(self, pending: _Dispatched | None) -> None:
        """Takes down what a step saw, and whom it ended."""
        if pending is None:
            return
        loss_M, grad_norm_M = (np.array(x, np.float32) for x in jax.device_get((pending.metrics.loss, pending.metrics.grad_norm)))
        for m, tid in enumerate(self.tids):
            if tid not in self.record.ended and not math.isfinite(loss_M[m] + grad_norm_M[m]):
                self.record.end(tid, pending.tokens, DIVERGED, f"loss or gradient not finite at {pending.tokens:,} tokens")
            if tid in self.record.ended:
                loss_M[m] = grad_norm_M[m] = np.nan
        members = len(self.tids)
        noise_Mx3 = None
        since = max(0, pending.tokens - self.config.noise_scale.every * (pending.tokens - pending.before))  # about the last measurement
        if pending.measured and noise_due(since, pending.tokens):
            reading = jax.device_get(pending.metrics.noise[PLAIN])
            ends = (np.asarray(x, np.float64)[:members, -1] for x in (reading.sequences, reading.low, reading.high))
            noise_Mx3 = np.stack(list(ends), axis=1) * self.config.model.context
        self.curves.add(Step(pending.number, pending.tokens, loss_M[:members], grad_norm_M[:members], noise_Mx3))

    def evaluate(self, state: TrainState, horizon: int, tokens: int) -> None:
        """Adds every trajectory's row for a horizon that was just reached, unless it is there."""
        members = len(self.tids)
        if not self.record.missing(horizon):
            return
        config = self.population.config
        shards = config.mesh.replica * config.mesh.fsdp if self.population.mesh is not None else 1
        batch = max(1, batch_sequences(config) // members // shards) * shards  # all members' logits are there at a time
        if not self.record.all_ended:
            found = {
                name: evaluate_members(self.population, state.params, held_out, batch, self.population.members)
                for name, held_out in self.group.held_out.items()
            }
            noise = self.population.read_noise(state)
            train_loss_M = self.curves.last(max(1, int(np.asarray(state.step)[0]) // 20)).mean(0)
        for m in range(members):
            tid = self.tids[m]
            if tid in self.record.ended:
                self.record.add_ended_row(tid, horizon)
                continue
            measured: dict[str, Any] = {"train_loss": float(train_loss_M[m])}
            for metric, values in noise[m].items():
                prefix = "" if metric == PLAIN else f"{metric}_"
                measured |= {f"{prefix}noise_scale_tokens{end}": v for end, v in zip(("", "_low", "_high"), values, strict=True)}
            self.record.add_row(tid, horizon, tokens, {name: each[m] for name, each in found.items()}, measured)

    def save_due(self, before: int, tokens: int) -> bool:
        every = self.config.checkpoint.every_tokens
        kept = any(before < at <= tokens for at in self.leg.keep_at_tokens)
        long_ago = time.monotonic() - self.saved_at > max(SAVE_SECONDS, 20 * self.save_took)
        return kept or tokens >= self.leg.end_tokens or (before // every < tokens // every if every else long_ago)

    def save(self, state: TrainState, tokens: int) -> None:
        """Saves the group as it is; what it knows is on disk before the checkpoint is."""
        if tokens == self.saved_tokens:
            return
        self.curves.write()
        self.record.at(self.leg.name, tokens - self.leg.start_tokens)
        self.record.write()
        started = time.monotonic()
        self.checkpoints.save(tokens, self.population.members_of(state, len(self.tids)))
        self.saved_tokens, self.saved_at, self.save_took = tokens, time.monotonic(), time.monotonic() - started
