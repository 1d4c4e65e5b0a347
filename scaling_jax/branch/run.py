"""All branches of a run, one after the other: checked before the first starts, continued where they were stopped."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.branch.plan import Asked, Branch, Source, plan, read_source
from scaling_jax.console import LiveLine
from scaling_jax.data.corpus import RunData, open_run_data
from scaling_jax.errors import UserError
from scaling_jax.mesh import make_mesh
from scaling_jax.train.checkpoint import Checkpoints, Start
from scaling_jax.train.evaluate import Evaluator
from scaling_jax.train.loop import train
from scaling_jax.train.step import Trainer
from scaling_jax.train.workdir import BRANCHES, digest, write_json

RESULTS_FILE, LOSSES_FILE, LOCK_FILE = "branches.json", "heldout_losses.npy", ".lock"


class Result(NamedTuple):
    """A branch that ran. Losses are held-out nats per token of its last checkpoint; None where it diverged."""

    branch: Branch
    loss: float | None
    loss_se: float | None  # standard error over the sequences
    losses_N: np.ndarray | None  # per sequence, the same ones for every branch

    def record(self) -> dict[str, Any]:
        """As `branches.json` holds it."""
        b = self.branch
        return {
            "tokens": b.at_tokens,
            "factor": b.factor,
            "batch_tokens": b.batch_tokens,
            "lr_rule": b.lr_rule,
            "span_tokens": b.span_tokens,
            "loss": self.loss,
            "loss_se": self.loss_se,
        }


class Stopped(Exception):
    """A signal asked for the end; the branch at hand is saved. args: the signal's number."""


def branch(run: str | Path, asked: Asked, overwrite: bool = False) -> list[Result]:
    """Runs what `asked` names and the run in `run` does not have yet; returns all of it, in the order of checkpoints and factors.

    Branches lie in `run`/branches/TOKENS/xFACTOR, each a work directory of its own; their losses in `run`/branches/branches.json.

    Args:
      run: work directory of a run. It is only read, and may still be training; its checkpoints at `asked.at_tokens` must stay.
      asked: checkpoints, factors, span and rule.
      overwrite: delete the branches of these checkpoints that are there.

    Raises:
      UserError: run, data or flags do not allow it (nothing is written then), or what there is has other settings.
      Stopped: by a signal; the same call continues.
    """
    source = read_source(run)
    _to_this_machine(source.config)
    branches = plan(source, asked)
    for b in branches:
        config_lib.validate(b.config, len(jax.devices()))
    data = _open_data(source, branches)
    line = LiveLine(seconds=10, at_once=False)
    if asked.span_tokens and any(b.span_tokens != asked.span_tokens for b in branches):
        spans = " and ".join(f"{span:,}" for span in dict.fromkeys(b.span_tokens for b in branches))
        line.say(f"--span_tokens={asked.span_tokens}: rounded up to {spans}, whole batches of every factor")
    root = source.workdir / BRANCHES
    with _locked(root, run):
        results = _claim(root, source, branches, overwrite)
        if results:
            line.say(f"{root}: has {len(results)} of {len(branches)} branches; --overwrite runs them again")
        losses = _HeldOut(source, data)
        for i, b in enumerate(branches):
            if (b.at_tokens, b.factor) in results:
                continue
            line.say(
                f"branch {i + 1} of {len(branches)}: x{b.factor} from {b.at_tokens:,} to {b.end_tokens:,} tokens, "
                f"{b.steps:,} steps of {b.batch_tokens:,} tokens"
            )
            summary = train(b.config, b.workdir, start=Start(source.workdir, b.at_tokens))
            if summary["status"] == "interrupted":
                raise Stopped(summary["signal"])
            result = Result(b, None, None, None) if summary["status"] == "diverged" else losses.of(b)
            results[b.at_tokens, b.factor] = result
            _store(root, result)
    return [results[b.at_tokens, b.factor] for b in branches]


def _to_this_machine(config: ConfigDict) -> None:
    devices = len(jax.devices())
    mesh = config.mesh
    if mesh.replica * mesh.fsdp * mesh.tensor * mesh.member != devices:
        mesh.fsdp = -1  # the run was elsewhere
    config_lib.resolve_mesh(config, devices)
    config_lib.validate(config, devices)


def _open_data(source: Source, branches: Sequence[Branch]) -> RunData:
    data = open_run_data(source.config, verify=source.config.data.verify)
    if data.fingerprint != source.identity.get("data.fingerprint"):
        raise UserError(f"--run={source.workdir}: config.data.path, {source.config.data.path!r}, has other training data than the run had")
    if not data.domains:
        raise UserError(
            f"--run={source.workdir}: its data have no held-out domain, and branches are compared by held-out loss; "
            "`scaling-jax tokenize --holdout_every=…` makes one"
        )
    for b in branches:
        try:
            data.train.check_length(b.end_tokens)
        except UserError as error:
            left = data.train.sequences_per_epoch * data.train.context - b.at_tokens
            raise UserError(
                f"--span_tokens={b.span_tokens}: from {b.at_tokens} on beyond one pass over the training data, which has {left} tokens "
                "more; must be shorter, or the run's config.data.repeat True"
            ) from error
    return data


@contextlib.contextmanager
def _locked(root: Path, run: str | Path) -> Iterator[None]:
    try:
        root.mkdir(exist_ok=True)
        lock = os.open(root / LOCK_FILE, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise UserError(f"--run={run}: {root} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however it ends
    except BlockingIOError:
        raise UserError(f"--run={run}: its branches are in use by another process") from None
    else:
        yield
    finally:
        os.close(lock)


def _claim(root: Path, source: Source, branches: Sequence[Branch], overwrite: bool) -> dict[tuple[int, int], Result]:
    """Makes the checkpoints' directories these branches', and reads the results that are there; UserError where they are others'."""
    stored = _read(root)
    for at_tokens in dict.fromkeys(b.at_tokens for b in branches):
        one = next(b for b in branches if b.at_tokens == at_tokens)
        settings = {
            "run": digest(source.identity),
            "batch_tokens": one.batch_tokens,
            "span_tokens": one.span_tokens,
            "lr_rule": one.lr_rule,
        }
        before = stored["settings"].get(str(at_tokens), settings)
        if overwrite:
            if (root / str(at_tokens)).exists():
                shutil.rmtree(root / str(at_tokens))
            stored["branches"] = [row for row in stored["branches"] if row["tokens"] != at_tokens]
        elif before != settings:
            changed = ", ".join(f"{key} {before.get(key)} -> {settings[key]}" for key in settings if before.get(key) != settings[key])
            raise UserError(
                f"--run={source.workdir}: its branches at {at_tokens} tokens have other settings ({changed}); give theirs, or --overwrite "
                "to delete those branches"
            )
        stored["settings"][str(at_tokens)] = settings
    write_json(root / RESULTS_FILE, stored)
    done = {(row["tokens"], row["factor"]): row for row in stored["branches"]}
    results = {}
    for b in branches:
        row, path = done.get((b.at_tokens, b.factor)), b.workdir / LOSSES_FILE
        if row is not None and (row["loss"] is None or path.exists()):
            losses_N = None if row["loss"] is None else np.load(path)
            results[b.at_tokens, b.factor] = Result(b, row["loss"], row["loss_se"], losses_N)
    return results


def _read(root: Path) -> dict[str, Any]:
    path = root / RESULTS_FILE
    if not path.exists():
        return {"settings": {}, "branches": []}
    try:
        stored = json.loads(path.read_text())
        return {"settings": dict(stored["settings"]), "branches": list(stored["branches"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged; delete it: the branches stay, and their losses are measured again") from error


def _store(root: Path, result: Result) -> None:
    if result.losses_N is not None:
        np.save(result.branch.workdir / LOSSES_FILE, result.losses_N)
    stored, row = _read(root), result.record()
    others = [other for other in stored["branches"] if (other["tokens"], other["factor"]) != (row["tokens"], row["factor"])]
    stored["branches"] = sorted([*others, row], key=lambda row: (row["tokens"], row["factor"]))
    write_json(root / RESULTS_FILE, stored)


class _HeldOut:
    """The loss of a branch's last checkpoint on every sequence of the first held-out domain."""

    def __init__(self, source: Source, data: RunData):
        mesh = source.config.mesh
        self.mesh = make_mesh(mesh.replica, mesh.fsdp, mesh.tensor, mesh.member) if len(jax.devices()) > 1 else None
        self.trainer = Trainer(source.config, self.mesh)
        self.evaluator = Evaluator(source.config, data, self.trainer)
        self.domain = next(iter(data.domains))

    def of(self, b: Branch) -> Result:
        with Checkpoints(b.workdir) as checkpoints:
            state = checkpoints.restore(b.end_tokens, self.trainer.abstract_sharded_state)
        losses_N = self.evaluator.losses(state.params, self.evaluator.sequences[self.domain])
        se = float(losses_N.std(ddof=1) / np.sqrt(len(losses_N))) if len(losses_N) > 1 else None
        return Result(b, float(losses_N.mean()), se, losses_N)
