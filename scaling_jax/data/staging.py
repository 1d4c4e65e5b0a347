"""Directories that appear whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from scaling_jax.errors import UserError

DATA, RESUME = "data", "resume.json"


def refuse_existing(target: Path) -> None:
    """Raises UserError if anything, even a dangling link, is at `target`."""
    if os.path.lexists(target):
        raise UserError(f"{target}: already exists; name a new directory, or remove this one first")


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yields an empty hidden sibling of `target`: renamed to `target` on a clean exit, deleted on any error.

    Raises:
      UserError: `target` exists, before or at the end, or its parent cannot be written.
    """
    refuse_existing(target)
    # Not tempfile.mkdtemp: its directories are private to the user, and these become data that others read.
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        yield staging
        refuse_existing(target)  # rename would replace an empty directory
        try:
            os.rename(staging, target)
        except OSError as error:
            refuse_existing(target)
            raise UserError(f"{target}: cannot be written: {error.strerror}") from error
    except BaseException:  # KeyboardInterrupt too leaves nothing behind
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def resumable_directory(target: Path) -> Iterator[Path]:
    """Yields a hidden sibling of `target`, always the same one, for work that a later process may continue.

    Its subfolder data is renamed to `target` on a clean exit. On an error the whole is deleted, unless it holds the file RESUME, which
    says that there is something to continue from.

    Raises:
      UserError: `target` exists, before or at the end, another process is at work on it, or its parent cannot be written.
    """
    refuse_existing(target)
    partial = partial_of(target)
    try:
        (partial / DATA).mkdir(parents=True, exist_ok=True)
        lock = os.open(partial / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        _lock(lock, target)
        refuse_existing(target)  # that process has just finished
        try:
            yield partial
            refuse_existing(target)
            try:
                os.rename(partial / DATA, target)
            except OSError as error:
                refuse_existing(target)
                raise UserError(f"{target}: cannot be written: {error.strerror}") from error
            shutil.rmtree(partial, ignore_errors=True)
        except BaseException:
            if not (partial / RESUME).exists():
                shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def partial_of(target: Path) -> Path:
    """Where `resumable_directory` keeps what is not finished."""
    return target.parent / f".{target.name}.partial"


def _lock(file: int, target: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however it ends
    except BlockingIOError as error:
        raise UserError(f"{target}: another process is writing it") from error
    except OSError:  # a file system without locks
        pass
