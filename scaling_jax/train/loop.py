"""A run from its config to its summary: resume, train, measure, evaluate, save, stop cleanly."""

import errno
import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.data.corpus import RunData, open_run_data
from scaling_jax.data.source import Prefetcher
from scaling_jax.errors import UserError
from scaling_jax.mesh import make_mesh
from scaling_jax.train import workdir as workdir_lib
from scaling_jax.train.applied import applied_table
from scaling_jax.train.checkpoint import Checkpoints
from scaling_jax.train.evaluate import Evaluator
from scaling_jax.train.metrics import MetricsWriter, Progress, read_records, train_record
from scaling_jax.train.step import StepMetrics, Trainer, TrainState, transformer_config


class _NotFinite(Exception):
    """A step whose loss, gradient or held-out loss is not finite; args: tokens."""


def train(config: ConfigDict, workdir: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Trains, or continues, the run that `config` describes in `workdir`; returns what summary.json holds.

    The summary's `status` is 'finished', 'interrupted' (saved; the same call continues) or 'diverged' (loss or gradient not
    finite; the last good checkpoint is kept).

    Raises:
      UserError: the config, the data, the work directory or the disk do not allow the run.
    """
    workdir = Path(workdir)
    devices = jax.devices()
    config_lib.resolve_mesh(config, len(devices))
    config_lib.validate(config, len(devices))
    data = open_run_data(config, verify=config.data.verify)
    lock = workdir_lib.claim(workdir, config, data.fingerprint, overwrite)
    try:
        with Checkpoints(workdir, config.checkpoint.keep_latest, config.checkpoint.keep_at_tokens) as checkpoints:
            return _Run(config, workdir, data, checkpoints).run()
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


class _Run:
    def __init__(self, config: ConfigDict, workdir: Path, data: RunData, checkpoints: Checkpoints):
        self.config, self.workdir, self.data, self.checkpoints = config, workdir, data, checkpoints
        # On one device there is nothing to shard, and the model runs as in anybody's loop.
        mesh = config.mesh
        self.mesh = make_mesh(mesh.replica, mesh.fsdp, mesh.tensor, mesh.member) if len(jax.devices()) > 1 else None
        self.trainer = Trainer(config, self.mesh)
        self.evaluator = Evaluator(config, data, self.trainer)
        self.progress = Progress(config.train.tokens, config.logging.console_seconds)
        self.context = config.model.context
        self.batch_sequences = config_lib.sequences_per_batch(config)
        self.total_sequences = config_lib.total_steps(config) * self.batch_sequences
        self.held_out: float | None = None
        self.noise_keys: dict[str, Any] = {}
        self.stop_signal: int | None = None

    def run(self) -> dict[str, Any]:
        state, tokens = self.restore_or_init()
        if tokens >= self.total_sequences * self.context and (finished := workdir_lib.finished_summary(self.workdir)):
            self.progress.say(f"{self.workdir}: already finished; --overwrite trains it again")
            return finished
        table = applied_table(self.trainer, state)
        self.table_fingerprint = table["fingerprint"]
        workdir_lib.write_json(self.workdir / workdir_lib.TABLE_FILE, table)
        self.writer = MetricsWriter(self.workdir, tokens, self.config.logging.tensorboard)
        self.saved_tokens = tokens if tokens in self.checkpoints.tokens() else None
        stops = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        previous = {number: signal.signal(number, self.on_signal) for number in stops}
        started = time.monotonic()
        try:
            status, tokens, state = self.steps(state)
            self.checkpoints.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.progress.end()
            self.writer.close()
        summary = self.summary(status, tokens, time.monotonic() - started)
        workdir_lib.write_json(self.workdir / workdir_lib.SUMMARY_FILE, summary)
        return summary

    def restore_or_init(self) -> tuple[TrainState, int]:
        restored = self.checkpoints.restore_latest(self.trainer.abstract_sharded_state, self.progress.say)
        if restored is None:
            return self.trainer.init(self.config.train.seed), 0
        tokens, state = restored
        if tokens < self.total_sequences * self.context:
            self.progress.say(f"continuing from the checkpoint at {tokens:,} tokens")
        return state, tokens

    def steps(self, state: TrainState) -> tuple[str, int, TrainState]:
        """Trains to the end of the budget, a signal, or a loss that is not finite: (status, tokens, state)."""
        every = self.config.noise_scale.every
        sequences, step = int(state.sequences), int(state.step)
        pending: tuple[int, int, StepMetrics] | None = None
        with Prefetcher(lambda key: self.data.train.batch(*key), self.config.data.prefetch) as batches:
            try:
                while sequences < self.total_sequences and self.stop_signal is None:
                    tokens_AxBxL = self.place(batches.get((sequences, self.batch_sequences)))
                    state, metrics = self.trainer.step(state, tokens_AxBxL, bool(every) and (step + 1) % every == 0)
                    # Written while the next step runs, so that the device never waits for the host.
                    self.record(pending)
                    step, before, sequences = step + 1, sequences, sequences + self.batch_sequences
                    pending = step, sequences * self.context, metrics
                    if self.due(before, sequences):
                        self.record(pending)
                        pending = None
                        self.evaluate_and_save(state, step, before, sequences)
                self.record(pending)
            except _NotFinite as error:
                return self.diverged(*error.args), *error.args, state
        tokens = sequences * self.context
        if self.stop_signal is not None and sequences < self.total_sequences:
            self.progress.say(f"{signal.Signals(self.stop_signal).name}: saving")
            if tokens:
                self.save(state, tokens)
            return "interrupted", tokens, state
        return "finished", tokens, state

    def place(self, tokens_BxL: np.ndarray) -> jax.Array | np.ndarray:
        tokens_AxBxL = tokens_BxL.reshape(self.config.train.accumulation, -1, tokens_BxL.shape[1])
        return tokens_AxBxL if self.mesh is None else jax.device_put(tokens_AxBxL, self.trainer.batch_sharding)

    def record(self, pending: tuple[int, int, StepMetrics] | None) -> None:
        if pending is None:
            return
        step, tokens, metrics = pending
        metrics = jax.device_get(metrics)
        batch_tokens = self.config.train.batch_tokens
        record = train_record(step, tokens, batch_tokens, self.context, metrics)
        record["tokens_per_second"] = self.progress.tokens_per_second(tokens)
        finite = math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)
        every = self.config.logging.every_tokens
        if not finite:
            record["event"] = "not finite"
        # A record that is written on a step without measurement has the newest one since the last record.
        self.noise_keys |= {key: value for key, value in record.items() if key.startswith(("noise_scale", "grad_sq", "grad_trace"))}
        last = tokens >= self.total_sequences * self.context
        if not finite or not every or last or _crosses(every, tokens - batch_tokens, tokens):
            self.writer.write(record | self.noise_keys)
            self.noise_keys = {}
        if not finite:
            raise _NotFinite(tokens)
        self.progress.show(record, self.held_out)

    def due(self, before: int, after: int) -> bool:
        return self.eval_due(before, after) or self.save_due(before, after)

    def eval_due(self, before: int, after: int) -> bool:
        return after >= self.total_sequences or _crosses(self.config.eval.every_tokens, before * self.context, after * self.context)

    def save_due(self, before: int, after: int) -> bool:
        before, after, c = before * self.context, after * self.context, self.config.checkpoint
        return (
            after >= self.total_sequences * self.context
            or _crosses(c.every_tokens, before, after)
            or any(before < tokens <= after for tokens in c.keep_at_tokens)
        )

    def evaluate_and_save(self, state: TrainState, step: int, before: int, sequences: int) -> None:
        if self.eval_due(before, sequences) and self.data.domains:
            tokens = sequences * self.context
            record = {"step": step, "tokens": tokens} | self.evaluator(state.params)
            losses = [record[f"eval/{name}/loss"] for name in self.data.domains]
            finite = all(map(math.isfinite, losses))
            self.writer.write(record if finite else record | {"event": "not finite"})
            if not finite:  # the parameters are spoilt: not to be saved
                raise _NotFinite(tokens)
            self.held_out = losses[0]
        if self.save_due(before, sequences):
            self.save(state, sequences * self.context)

    def save(self, state: TrainState, tokens: int) -> None:
        if self.saved_tokens != tokens:
            self.writer.sync()
            self.checkpoints.save(tokens, state)
            self.saved_tokens = tokens

    def diverged(self, tokens: int) -> str:
        self.checkpoints.wait()
        kept = self.checkpoints.tokens()
        where = f"the checkpoint at {kept[-1]:,} tokens is kept" if kept else "there is no checkpoint before it"
        self.progress.say(f"loss or gradient not finite at {tokens:,} tokens; {where}")
        return "diverged"

    def on_signal(self, number: int, _: Any) -> None:
        if self.stop_signal is not None:  # asked twice: at once
            raise KeyboardInterrupt
        self.stop_signal = number  # and no word: the main thread may be in the middle of one

    def summary(self, status: str, tokens: int, seconds: float) -> dict[str, Any]:
        model = transformer_config(self.config)
        records = read_records(self.workdir)
        training = [r for r in records if "loss" in r and r["tokens"] <= tokens]
        tail = [r["loss"] for r in training[-max(1, len(training) // 20) :] if r["loss"] is not None]
        summary = {
            "status": status,
            "signal": self.stop_signal if status == "interrupted" else None,
            "tokens": tokens,
            "steps": tokens // self.config.train.batch_tokens,
            "params": model.params,
            "total_params": sum(x.size for x in jax.tree.leaves(self.trainer.abstract_state.params)),
            "flops_per_token": model.flops_per_token,
            "parametrization_fingerprint": self.table_fingerprint,
            "train_loss": float(np.mean(tail)) if tail else None,  # over the last twentieth of the run
            "checkpoints": self.checkpoints.tokens(),
        }
        measured = [r for r in training if "noise_scale_tokens" in r]
        if measured:
            names = ("noise_scale_tokens", "noise_scale_tokens_low", "noise_scale_tokens_high")
            summary |= {name: measured[-1][name] for name in names}
        evaluations = [r for r in records if any(key.startswith("eval/") for key in r)]
        if evaluations:
            summary |= {key: value for key, value in evaluations[-1].items() if key.startswith("eval/")}
        return summary | {
            "versions": {name: sys.modules[name].__version__ for name in ("jax", "flax", "optax")},
            "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
            "timing": {"seconds": round(seconds, 1)},
        }


def _crosses(every: int, before: int, after: int) -> bool:
    return bool(every) and before // every < after // every


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether this error, or what caused it, is a full disk; TensorStore tells it in words only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
