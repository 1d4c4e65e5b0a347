"""Checkpoints by Orbax: asynchronous, atomic, numbered by tokens seen.

The newest few are kept, and for good those at the token counts of checkpoint.keep_at_tokens. A checkpoint that cannot be read is
set aside and the one before it is used.
"""

import dataclasses
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PreservationPolicy

from scaling_jax import storage
from scaling_jax.errors import UserError
from scaling_jax.train.hosts import ALONE, Hosts

DIRECTORY = "checkpoints"
SET_ASIDE = "unreadable_checkpoints"
SEEN_SECONDS = 40.0  # after which all hosts see the same checkpoints; those of NFS look at a directory again after 30


class Start(NamedTuple):
    """Where a run begins that continues another one: that one's work directory, and its checkpoint at exactly so many tokens."""

    workdir: Path
    tokens: int

    def check(self) -> None:
        """UserError where there is no such checkpoint."""
        directory = self.workdir / DIRECTORY
        there = sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal()) if directory.is_dir() else []
        if self.tokens not in there:
            names = f"there are {', '.join(map(str, there))}" if there else "there is none"
            raise UserError(
                f"{self.workdir}: no checkpoint at {self.tokens} tokens to start from; {names}. config.checkpoint.keep_at_tokens keeps them"
            )

    def restore(self, abstract_state: Any) -> Any:
        """The state there, laid out as `abstract_state` says; what is there stays as it is, though its run may still be going on.

        Raises:
          UserError: the checkpoint is missing or cannot be read.
        """
        self.check()
        directory = (self.workdir / DIRECTORY).absolute()
        try:
            return _read(directory, self.tokens, abstract_state)
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise UserError(f"{directory / str(self.tokens)}: cannot be read ({_one_line(error)})") from error


def _read(directory: Path, tokens: int, abstract_state: Any) -> Any:
    """The checkpoint at `tokens`. Each process reads what its devices hold, and waits for no other: reading may fail on one alone."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"read{here}")
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
    with ocp.CheckpointManager(directory, options=options) as manager:
        return manager.restore(tokens, args=ocp.args.StandardRestore(abstract_state))


@dataclasses.dataclass(frozen=True)
class KeepAt(PreservationPolicy):
    """Keeps the first checkpoint at or after each of these token counts."""

    tokens: tuple[int, ...]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        saved = [checkpoint.step for checkpoint in checkpoints]
        kept = {min((s for s in saved if s >= tokens), default=None) for tokens in self.tokens}
        return [s in kept for s in saved]


class _Manager(ocp.CheckpointManager):
    """Orbax would ask JAX for a preemption itself, by tokens; but JAX finds the step at which all save by counting them one by one."""

    preempted = False

    def reached_preemption(self, step: int) -> bool:
        return self.preempted


def _meet_unless_failed(*, key: str, timeout_ms: int) -> None:
    """Where Orbax's threads wait for each other. One whose part of a save failed does so too, in a `finally`, at a point that the others
    never come to, and keeps its error until then; it is to raise that error at once."""
    if error := sys.exception():
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class Checkpoints:
    """The checkpoints of one work directory. Close it, or use it as a context manager, so that the last save completes.

    In several processes all call the same methods, and find, keep and set aside the same checkpoints.
    """

    def __init__(self, workdir: Path, keep_latest: int = 2, keep_at_tokens: Sequence[int] = (), hosts: Hosts = ALONE):
        self.workdir, self.hosts = workdir, hosts
        self.directory = workdir / DIRECTORY
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports its ordinary course as warnings, and errors twice
        self._open = lambda: _Manager(
            self.directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep_latest), KeepAt(tuple(keep_at_tokens))]),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=_meet_unless_failed) if hosts.count > 1 else None,
            ),
        )
        self._manager = self._open()
        self._check_seen()

    def _check_seen(self) -> None:
        """UserError unless all processes see the same checkpoints: otherwise one would save, and wait for the others, where they do not."""
        if self.hosts.count == 1:
            return
        there, deadline = self.hosts.tell(self.tokens), time.monotonic() + SEEN_SECONDS
        while self.tokens() != there and time.monotonic() < deadline:
            time.sleep(0.2)
            self._manager.reload()
        differ = f"{self.directory}: has other checkpoints, {self.tokens()}, than for process 0, {there}; all hosts must share it"
        self.hosts.all_well(None if self.tokens() == there else differ)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def tokens(self) -> list[int]:
        """Token counts of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, tokens: int, state: Any, preempted: bool = False) -> None:
        """Starts a save and returns once `state` may be donated; waits for the save before this one first.

        `preempted`: it is made because the machine is about to be taken away.
        """
        self.hosts.do(lambda: self._check_space(state))
        self._manager.preempted = preempted
        self._manager.save(tokens, args=ocp.args.StandardSave(state))

    def _check_space(self, state: Any) -> None:
        if not storage.is_local(self.workdir):
            return
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.workdir).free
        if free < 1.1 * size:
            raise UserError(
                f"{self.workdir}: no space left for a checkpoint: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; "
                "free some and run the same command again"
            )

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises what it raised."""
        self._manager.wait_until_finished()

    def restore(self, tokens: int, abstract_state: Any) -> Any:
        """The checkpoint at exactly `tokens`, laid out as `abstract_state` says: on whatever devices, of however many processes."""
        if self.hosts.count > 1:
            return _read(self.directory.absolute(), tokens, abstract_state)
        return self._manager.restore(tokens, args=ocp.args.StandardRestore(abstract_state))

    def restore_latest(self, abstract_state: Any, say: Callable[[str], None]) -> tuple[int, Any] | None:
        """(tokens, state) of the newest readable checkpoint; None if there is none at all.

        Every unreadable one is named through `say` and moved to unreadable_checkpoints/.
        """
        unreadable = []
        for tokens in reversed(self.tokens()):
            state, reason = None, None
            try:
                state = self.restore(tokens, abstract_state)
            except Exception as error:  # whatever a damaged file makes the reader raise
                reason = _one_line(error)
            if reason := next(filter(None, self.hosts.collect(reason)), None):  # on any process
                unreadable.append((tokens, reason))
                continue
            for bad, reason in unreadable:
                say(f"checkpoint {self._path(bad)} cannot be read ({reason}); using the one at {tokens:,} tokens instead")
                self._set_aside(bad)
            return tokens, state
        if unreadable:
            names = "; ".join(f"{self._path(tokens)} ({reason})" for tokens, reason in unreadable)
            raise UserError(f"no checkpoint can be read: {names}. Restore one from a backup, or start again with --overwrite")
        return None

    def _path(self, tokens: int) -> Path:
        return self.directory / str(tokens)

    def _set_aside(self, tokens: int) -> None:
        self._manager.close()
        self.hosts.do(lambda: self._move_aside(tokens))
        self._manager = self._open()
        self._check_seen()

    def _move_aside(self, tokens: int) -> None:
        target = self.workdir / SET_ASIDE / str(tokens)
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        self._path(tokens).rename(target)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 200 else text[:200] + "…"
