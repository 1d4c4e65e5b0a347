"""All branches of a run, one after the other: checked before the first starts, continued where they were stopped."""

import contextlib
import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.branch.plan import SPAN_PARTS, Asked, Branch, Source, plan, read_source
from scaling_jax.branch.results import RESULTS_FILE, Result, known_results, read, store
from scaling_jax.console import LiveLine
from scaling_jax.data.corpus import RunData, open_run_data
from scaling_jax.errors import UserError
from scaling_jax.mesh import make_mesh
from scaling_jax.train.checkpoint import Checkpoints, Start
from scaling_jax.train.evaluate import Evaluator
from scaling_jax.train.loop import train
from scaling_jax.train.step import Trainer
from scaling_jax.train.workdir import BRANCHES, digest, write_json

LOCK_FILE = ".lock"


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
    for at_tokens, span_tokens in {b.at_tokens: b.span_tokens for b in branches}.items():
        wanted, name = asked.span_tokens, f"--span_tokens={asked.span_tokens}"
        if wanted is None:
            wanted, name = at_tokens / SPAN_PARTS, "an eighth of these"
        if span_tokens != wanted:
            line.say(f"span from {at_tokens:,} tokens on: {name}, rounded up to {span_tokens:,}, whole batches of every factor")
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
            result = _result(b, None, None, None) if summary["status"] == "diverged" else losses.of(b)
            results[b.at_tokens, b.factor] = result
            store(root, result)
    return [results[b.at_tokens, b.factor] for b in branches]


def _result(b: Branch, *losses) -> Result:
    return Result(b.at_tokens, b.factor, b.batch_tokens, b.lr_rule, b.span_tokens, *losses)


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
    if root.exists() and not root.is_dir():
        raise UserError(f"--run={run}: {root} is a file, must be a directory")
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
    stored = read(root)
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
    ours = {(b.at_tokens, b.factor) for b in branches}
    return {key: result for result in known_results(source.workdir) if (key := (result.tokens, result.factor)) in ours}


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
        if not math.isfinite(loss := float(losses_N.mean())):
            return _result(b, None, None, None)  # its parameters overflow without gradients
        se = float(losses_N.std(ddof=1) / math.sqrt(len(losses_N))) if len(losses_N) > 1 else None
        return _result(b, loss, se, losses_N)
