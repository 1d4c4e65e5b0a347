"""A run from its config to its summary: resume, train, measure, evaluate, save, stop cleanly."""

import contextlib
import errno
import functools
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from scaling_jax import batch_schedule
from scaling_jax import config as config_lib
from scaling_jax.console import LiveLine
from scaling_jax.data.corpus import RunData, open_run_data
from scaling_jax.data.source import Prefetcher
from scaling_jax.errors import UserError
from scaling_jax.mesh import make_mesh
from scaling_jax.optimizer import RoleState
from scaling_jax.train import checkpoint as checkpoint_lib
from scaling_jax.train import profile, wandb
from scaling_jax.train import workdir as workdir_lib
from scaling_jax.train.applied import applied_table
from scaling_jax.train.batch_size import KEY, UNKNOWN, Followed, replay
from scaling_jax.train.batches import Batches
from scaling_jax.train.checkpoint import Checkpoints, Start
from scaling_jax.train.compute_dtype import fastest
from scaling_jax.train.evaluate import Evaluator
from scaling_jax.train.hosts import ALONE, Hosts
from scaling_jax.train.metrics import NOISE_KEYS, MetricsWriter, Progress, Unwritten, read_records, train_record
from scaling_jax.train.step import StepMetrics, Trainer, TrainState
from scaling_jax.train.stopping import Stop
from scaling_jax.train.summary import summarize

# Steps are recorded several at a time, which takes a fraction of the time: one by one, each record would find the processor's caches
# full of what its step left there.
RECORDS_AT_ONCE = 16
RECORD_SECONDS = 0.5  # a step waits no longer for its record


class _NotFinite(Exception):
    """A step whose loss, gradient or held-out loss is not finite; args: step, tokens."""


class _Step(NamedTuple):
    """A step that was dispatched: its number, tokens seen before and after it, what it saw."""

    number: int
    before: int
    tokens: int
    metrics: StepMetrics


def train(
    config: ConfigDict,
    workdir: str | Path,
    overwrite: bool = False,
    start: Start | None = None,
    profile_at_tokens: Sequence[int] = (),
    report: Callable[[dict[str, Any]], Sequence[Path]] | None = None,
    hosts: Hosts = ALONE,
) -> dict[str, Any]:
    """Trains, or continues, the run that `config` describes in `workdir`; returns what summary.json holds.

    The summary's `status` is 'finished', 'interrupted' (saved; the same call continues), 'stopped' (at train.stop_at_tokens; saved, and
    a larger value continues) or 'diverged' (loss or gradient not finite; the last good checkpoint is kept).

    Args:
      config: of the run.
      workdir: its directory.
      overwrite: delete a run that is there first.
      start: the checkpoint of another run, of the same model, that this run begins with. Parameters, moments, noise scale and
        position in the data are the checkpoint's; the learning rate, the batch and all else are what `config` says.
      profile_at_tokens: positions after which a few steps are traced, into workdir/profile (`profile.StepTraces`).
      report: called with the summary, once it is written, unless the run was interrupted. It returns the figures (PNG) that TensorBoard
        and W&B show as well, and may add to the summary.
      hosts: the processes that train together, each of which calls this with the same arguments (`scaling_jax.train.joining.joined`).
        The first of them alone writes, but for its part of a checkpoint, and calls `report`.

    Raises:
      UserError: the config, the data, the work directory or the disk do not allow the run.
    """
    if jax.process_count() != hosts.count:
        raise ValueError(f"{jax.process_count()} processes: train needs the hosts that scaling_jax.train.joining.joined gives")
    workdir = Path(workdir)
    devices = jax.devices()
    config_lib.resolve_mesh(config, len(devices))
    config_lib.validate(config, len(devices))
    profile.check(profile_at_tokens, _end_tokens(config))
    hosts.do(lambda: wandb.check(config.logging.wandb))
    data = open_run_data(config, verify=config.data.verify and hosts.first)
    contents = {"the training data": data.train.stream} | {f"domain {name}": stream for name, stream in data.domains.items()}
    hosts.agree(**{f"content of {name}": stream.index.fingerprint for name, stream in contents.items()})
    followed = Followed(config)
    others = {} if followed.fingerprint is None else {"batch.follow": f"law {followed.fingerprint}"}
    if start is not None:
        start = Start(Path(start.workdir), start.tokens)
        others["start"] = _check_start(config, workdir, start, data, overwrite)
    hosts.agree(**others)
    line = LiveLine(config.logging.console_seconds) if hosts.first else None
    lock, find_dtype = None, functools.partial(fastest, config, _mesh(config), hosts, line)
    try:
        lock = workdir_lib.claim(workdir, config, data.fingerprint, overwrite, others, hosts, find_dtype)
        with Checkpoints(workdir, config.checkpoint.keep_latest, config.checkpoint.keep_at_tokens, hosts) as checkpoints:
            return _Run(config, workdir, data, checkpoints, followed, start, hosts).run(profile_at_tokens, report)
    except UserError:
        raise
    except Exception as error:
        if _is_full_disk(error):
            raise UserError(
                f"--workdir={workdir}: no space left on the disk; free some and run the same command again: "
                "the run continues from its last checkpoint"
            ) from error
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                f"out of memory ({str(error).splitlines()[0]}); raise config.train.accumulation, set config.model.remat=full, "
                "or use more devices, config.mesh.fsdp"
            ) from error
        raise
    finally:
        workdir_lib.release(lock)


def _check_start(config: ConfigDict, workdir: Path, start: Start, data: RunData, overwrite: bool) -> dict[str, Any]:
    """What a run's identity says of its start; UserError where the run cannot begin there."""
    where = f"{start.workdir} at {start.tokens} tokens"
    if workdir.resolve() == start.workdir.resolve():
        raise UserError(f"--workdir={workdir}: the run starts from there; give another directory")
    theirs = workdir_lib.read_identity(start.workdir)
    config_lib.settle_compute_dtype(config, theirs.get("model.compute_dtype", "float32"))
    ours = config_lib.identity(config)
    same = [name for name in ours if name.startswith(("model.", "parametrization.")) or name == "noise_scale.preconditioned"]
    differ = [f"config.{name} is {ours[name]}, {theirs.get(name)} there" for name in same if ours[name] != theirs.get(name)]
    if bool(config.noise_scale.every) != bool(theirs.get("noise_scale.every")):  # the state has the noise's running means, or not
        differ.append(f"config.noise_scale.every is {config.noise_scale.every}, {theirs.get('noise_scale.every')} there")
    if differ:
        raise UserError(f"the run starts from {where}, whose state does not fit: {'; '.join(differ)}")
    if start.tokens >= config.train.tokens:
        raise UserError(f"config.train.tokens is {config.train.tokens}: the run starts from {where}; must be more")
    if overwrite or not any((workdir / checkpoint_lib.DIRECTORY).glob("[0-9]*")):
        start.check()
    data.train.check_length(batch_schedule.end_tokens(config, start.tokens))
    return {"identity": workdir_lib.digest(theirs), "tokens": start.tokens}


class _Run:
    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        data: RunData,
        checkpoints: Checkpoints,
        followed: Followed,
        start: Start | None,
        hosts: Hosts,
    ):
        self.config, self.workdir, self.data, self.checkpoints = config, workdir, data, checkpoints
        self.followed, self.start, self.hosts = followed, start, hosts
        self.mesh = _mesh(config)
        self.trainer = Trainer(config, self.mesh)
        self.evaluator = Evaluator(config, data, self.trainer)
        self.batches = Batches(config, data.train, self.trainer.batch_sharding)
        self.end_tokens = _end_tokens(config)
        follows = config.batch.schedule != "constant"
        self.progress = Progress(self.end_tokens, config.logging.console_seconds, show_batch=follows, quiet=not hosts.first)
        self.context, self.total_tokens = config.model.context, config.train.tokens
        self.held_out: float | None = None
        self.noise_keys: dict[str, Any] = {}
        self.unrecorded: list[tuple[_Step, float]] = []  # steps that are done, and when by time.monotonic
        self.recorded = -math.inf  # when the last of those before them were
        self.stop = Stop(hosts)

    def run(self, profile_at_tokens: Sequence[int], report: Callable[[dict[str, Any]], Sequence[Path]] | None) -> dict[str, Any]:
        hosts = self.hosts
        state, tokens = self.restore_or_init()
        if tokens >= self.total_tokens and (finished := hosts.tell(lambda: workdir_lib.finished_summary(self.workdir))):
            self.progress.say(f"{self.workdir}: already finished; --overwrite trains it again")
            if report is not None:
                hosts.do(lambda: report(finished))
            return finished
        table = applied_table(self.trainer, state)
        hosts.do(lambda: workdir_lib.write_json(self.workdir / workdir_lib.TABLE_FILE, table))
        decisions = hosts.tell(lambda: [record for record in read_records(self.workdir) if KEY in record])
        self.batch_size, _ = replay(self.config, decisions, self.start.tokens if self.start else 0, tokens)
        at_tokens = profile_at_tokens if hosts.first else ()
        self.traces = profile.StepTraces(self.workdir / profile.DIRECTORY, at_tokens, tokens, self.progress.say)
        start_wandb = functools.partial(wandb.WandbRun, self.config, self.workdir, self.progress.say) if self.config.logging.wandb else None
        writer = hosts.do(lambda: MetricsWriter(self.workdir, tokens, self.config.logging.tensorboard, start_wandb))
        self.writer = writer or Unwritten()
        self.saved_tokens = tokens if tokens in self.checkpoints.tokens() else None
        started = time.monotonic()
        with contextlib.closing(self.writer):
            try:
                with self.stop.heeding_signals():
                    status, step, tokens = self.steps(state)
                    self.checkpoints.wait()
            finally:
                self.progress.end()

            def conclude() -> dict[str, Any]:
                summary = {"status": status, "signal": self.stop.signal if status == "interrupted" else None}
                summary |= summarize(self.trainer, self.workdir, step, tokens)
                summary |= {"parametrization_fingerprint": table["fingerprint"], "checkpoints": self.checkpoints.tokens()}
                summary["timing"] = {"seconds": round(time.monotonic() - started, 1)}
                workdir_lib.write_json(self.workdir / workdir_lib.SUMMARY_FILE, summary)
                self.writer.end(summary, () if report is None or status == "interrupted" else report(summary))
                return summary

            return hosts.tell(conclude) | {"signal": self.stop.signal if status == "interrupted" else None}

    def restore_or_init(self) -> tuple[TrainState, int]:
        restored = self.checkpoints.restore_latest(self.trainer.abstract_sharded_state, self.progress.say)
        if restored is None:
            state = self.trainer.init(self.config.train.seed)
            return (state, 0) if self.start is None else (self.started(state), self.start.tokens)
        tokens, state = restored
        if tokens < self.total_tokens:
            self.progress.say(f"continuing from the checkpoint at {tokens:,} tokens")
        return state, tokens

    def started(self, fresh: TrainState) -> TrainState:
        """The state at the start, with the learning rates, decays and epsilons of this run's own config."""
        self.progress.say(f"starting from the checkpoint at {self.start.tokens:,} tokens of {self.start.workdir}")
        state = self.start.restore(self.trainer.abstract_sharded_state)
        parts = zip(state.opt_state, fresh.opt_state, strict=True)
        return state._replace(opt_state=tuple(ours if isinstance(ours, RoleState) else theirs for theirs, ours in parts))

    def steps(self, state: TrainState) -> tuple[str, int, int]:
        """Trains to the end of the budget, a stop, a signal, or a loss that is not finite: (status, steps, tokens)."""
        every = self.config.noise_scale.every
        sequences, step = int(state.sequences), int(state.step)
        tokens = sequences * self.context
        decision_due = self.batch_size.next_due(tokens)
        pending: _Step | None = None
        with Prefetcher(self.batches.read, self.config.data.prefetch) as batches, contextlib.closing(self.traces):
            try:
                while tokens < self.end_tokens and not self.stop.asked():
                    batch_sequences = self.batch_size.batch_tokens // self.context
                    tokens_AxBxL = self.batches.place(batches.get((sequences, batch_sequences)), batch_sequences)
                    measure = bool(every) and (step + 1) % every == 0
                    state, metrics = self.traces.step(self.trainer.step, step + 1, tokens, state, tokens_AxBxL, measure)
                    # While the next step runs, so that the device never waits for the host.
                    self.finish(pending)
                    step, sequences, before = step + 1, sequences + batch_sequences, tokens
                    tokens = sequences * self.context
                    pending = _Step(step, before, tokens, metrics)
                    if tokens == decision_due or self.eval_due(before, tokens) or self.save_due(before, tokens):
                        self.finish(pending)
                        self.record()
                        pending = None
                        if tokens == decision_due:  # before a checkpoint of this step, whose log then holds it
                            self.decide(state, step, tokens)
                            decision_due = self.batch_size.next_due(tokens)
                        self.evaluate_and_save(state, step, before, tokens)
                self.finish(pending)
            except _NotFinite as error:
                step, tokens = error.args
                return self.diverged(tokens), step, tokens
            finally:
                self.record()
        if tokens >= self.total_tokens:
            return "finished", step, tokens
        if self.stop.signal is not None:
            self.progress.say(f"{signal.Signals(self.stop.signal).name}: saving")
        if tokens:
            self.save(state, tokens)
        return "stopped" if self.stop.signal is None else "interrupted", step, tokens

    def decide(self, state: TrainState, step: int, tokens: int) -> None:
        """What the batch is from here on. The state is read, and not the records, which are written later and not at every step."""
        before = self.batch_size.batch_tokens
        follows = self.config.batch.schedule == "follow"
        reading = self.followed.read(tokens, lambda: self.trainer.read_noise(state)) if follows else UNKNOWN
        decision = self.batch_size.decide(tokens, self.hosts.tell(lambda: reading))
        self.writer.write(decision.record(step))
        if decision.batch_tokens != before:
            self.progress.say(f"batch of {decision.batch_tokens:,} tokens from {tokens:,} on")

    def finish(self, pending: _Step | None) -> None:
        """Waits for a step, which is recorded now or soon; _NotFinite, and everything recorded, if its loss or gradient is not finite."""
        if pending is None:
            return
        finite = _is_finite(pending.metrics)
        self.unrecorded.append((pending, time.monotonic()))
        if not finite or len(self.unrecorded) == RECORDS_AT_ONCE or time.monotonic() - self.recorded > RECORD_SECONDS:
            self.record()
        if not finite:
            raise _NotFinite(pending.number, pending.tokens)

    def record(self) -> None:
        """Writes down the steps that are not yet, and shows the last."""
        finished, self.unrecorded = self.unrecorded, []
        kinds, every = self.trainer.meter.kinds if self.trainer.meter else (), self.config.logging.every_tokens
        for (step, before, tokens, metrics), seconds in finished:
            metrics = jax.tree.map(np.asarray, metrics)  # a few numbers each, for which device_get takes several times as long
            record = train_record(step, tokens, tokens - before, self.context, metrics, kinds)
            record["tokens_per_second"] = self.progress.tokens_per_second(tokens, seconds)
            finite = _is_finite(metrics)
            if not finite:
                record["event"] = "not finite"
            # A record that is written on a step without measurement has the newest one since the last record.
            self.noise_keys |= {key: value for key, value in record.items() if key.startswith(NOISE_KEYS)}
            if not finite or not every or tokens >= self.total_tokens or _crosses(every, before, tokens):
                self.writer.write(record | self.noise_keys)
                self.noise_keys = {}
        if finished and finite:
            self.progress.show(record, self.held_out)
        self.recorded = time.monotonic()

    def eval_due(self, before: int, after: int) -> bool:
        return after >= self.total_tokens or _crosses(self.config.eval.every_tokens, before, after)

    def save_due(self, before: int, after: int) -> bool:
        c = self.config.checkpoint
        return (
            after >= self.total_tokens
            or _crosses(c.every_tokens, before, after)
            or any(before < tokens <= after for tokens in c.keep_at_tokens)
        )

    def evaluate_and_save(self, state: TrainState, step: int, before: int, tokens: int) -> None:
        if self.eval_due(before, tokens) and self.data.domains:
            record = {"step": step, "tokens": tokens} | self.evaluator(state.params)
            losses = [record[f"eval/{name}/loss"] for name in self.data.domains]
            finite = all(map(math.isfinite, losses))
            self.writer.write(record if finite else record | {"event": "not finite"})
            if not finite:  # the parameters are spoilt: not to be saved
                raise _NotFinite(step, tokens)
            self.held_out = losses[0]
        if self.save_due(before, tokens):
            self.save(state, tokens)

    def save(self, state: TrainState, tokens: int) -> None:
        if self.saved_tokens != tokens:
            self.writer.sync()
            self.checkpoints.save(tokens, state, preempted=self.stop.signal is not None)
            self.saved_tokens = tokens

    def diverged(self, tokens: int) -> str:
        self.checkpoints.wait()
        kept = self.checkpoints.tokens()
        where = f"the checkpoint at {kept[-1]:,} tokens is kept" if kept else "there is no checkpoint before it"
        self.progress.say(f"loss or gradient not finite at {tokens:,} tokens; {where}")
        return "diverged"


def _mesh(config: ConfigDict) -> Mesh | None:
    """On one device there is nothing to shard, and the model runs as in anybody's loop."""
    mesh = config.mesh
    return make_mesh(mesh.replica, mesh.fsdp, mesh.tensor, mesh.member) if len(jax.devices()) > 1 else None


def _is_finite(metrics: StepMetrics) -> bool:
    return all(math.isfinite(np.asarray(x)) for x in (metrics.loss, metrics.grad_norm))


def _end_tokens(config: ConfigDict) -> int:
    """Where this start of the run ends at the latest; its last step may reach beyond."""
    return min(config.train.tokens, config.train.stop_at_tokens or config.train.tokens)


def _crosses(every: int, before: int, after: int) -> bool:
    return bool(every) and before // every < after // every


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether this error, or what caused it, is a full disk; TensorStore tells it in words only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
