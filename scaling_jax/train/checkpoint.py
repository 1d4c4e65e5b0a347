"""Checkpoints by Orbax: asynchronous, atomic, numbered by tokens seen.

The newest few are kept, and for good those at the token counts of checkpoint.keep_at_tokens. A checkpoint that cannot be read is
set aside and the one before it is used.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PreservationPolicy

from scaling_jax.errors import UserError

DIRECTORY = "checkpoints"
SET_ASIDE = "unreadable_checkpoints"


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
        with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
            try:
                return manager.restore(self.tokens, args=ocp.args.StandardRestore(abstract_state))
            except Exception as error:  # whatever a damaged file makes the reader raise
                raise UserError(f"{directory / str(self.tokens)}: cannot be read ({_one_line(error)})") from error


@dataclasses.dataclass(frozen=True)
class KeepAt(PreservationPolicy):
    """Keeps the first checkpoint at or after each of these token counts."""

    tokens: tuple[int, ...]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        saved = [checkpoint.step for checkpoint in checkpoints]
        kept = {min((s for s in saved if s >= tokens), default=None) for tokens in self.tokens}
        return [s in kept for s in saved]


class Checkpoints:
    """The checkpoints of one work directory. Close it, or use it as a context manager, so that the last save completes."""

    def __init__(self, workdir: Path, keep_latest: int = 2, keep_at_tokens: Sequence[int] = ()):
        self.workdir = workdir
        self.directory = workdir / DIRECTORY
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports its ordinary course as warnings, and errors twice
        self._open = lambda: ocp.CheckpointManager(
            self.directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep_latest), KeepAt(tuple(keep_at_tokens))]),
                cleanup_tmp_directories=True,
            ),
        )
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def tokens(self) -> list[int]:
        """Token counts of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, tokens: int, state: Any) -> None:
        """Starts a save and returns once `state` may be donated; waits for the save before this one first."""
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.workdir).free
        if free < 1.1 * size:
            raise UserError(
                f"{self.workdir}: no space left for a checkpoint: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; "
                "free some and run the same command again"
            )
        self._manager.save(tokens, args=ocp.args.StandardSave(state))

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises what it raised."""
        self._manager.wait_until_finished()

    def restore(self, tokens: int, abstract_state: Any) -> Any:
        """The checkpoint at exactly `tokens`, laid out as `abstract_state` says."""
        return self._manager.restore(tokens, args=ocp.args.StandardRestore(abstract_state))

    def restore_latest(self, abstract_state: Any, say: Callable[[str], None]) -> tuple[int, Any] | None:
        """(tokens, state) of the newest readable checkpoint; None if there is none at all.

        Every unreadable one is named through `say` and moved to unreadable_checkpoints/.
        """
        unreadable = []
        for tokens in reversed(self.tokens()):
            try:
                state = self.restore(tokens, abstract_state)
            except Exception as error:  # whatever a damaged file makes the reader raise
                unreadable.append((tokens, _one_line(error)))
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
        target = self.workdir / SET_ASIDE / str(tokens)
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        self._manager.close()
        self._path(tokens).rename(target)
        self._manager = self._open()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 200 else text[:200] + "…"
