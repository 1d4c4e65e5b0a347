"""A directory that is to be a study's: it must not be anything else's, and of one driver at a time."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from scaling_jax import storage
from scaling_jax.errors import UserError
from scaling_jax.sweep.plan import FILE as PLAN_FILE

LOCK_FILE, RUN_FILE = ".lock", "config.json"
LOOK_SECONDS = 0.5  # more than `in_use` holds the lock
_OWN = ("groups", "results.parquet")


def check_directory(directory: epath.Path) -> None:
    """UserError where it is a file, a run's, or holds something that goes by the names of a study's files."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--workdir={directory}: is a file, must be a directory")
    if (directory / RUN_FILE).exists():
        raise UserError(f"--workdir={directory}: holds a run, {RUN_FILE}; give another directory")
    there = [name for name in _OWN if (directory / name).exists()]
    if there and not (directory / PLAN_FILE).exists():
        raise UserError(f"--workdir={directory}: holds {' and '.join(there)} but no {PLAN_FILE}; give another directory")


@contextlib.contextmanager
def locked(directory: epath.Path) -> Iterator[None]:
    """Makes the directory, and holds it against another driver, where it is a file system's; takes it away where nothing came into it."""
    if not storage.is_local(directory):
        yield
        return
    path = Path(directory)
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK_FILE, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise UserError(f"--workdir={directory}: cannot be written: {error.strerror}") from error
    deadline = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however it ends
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise UserError(f"--workdir={directory}: in use by another process") from None
            time.sleep(0.05)
    try:
        yield
    finally:
        if made and os.listdir(path) == [LOCK_FILE]:
            (path / LOCK_FILE).unlink()
            for parent in made:
                parent.rmdir()
        os.close(lock)


def in_use(directory: epath.Path) -> bool:
    """Whether a driver is at work in it; False where that cannot be told."""
    if not storage.is_local(directory):
        return False
    try:
        lock = os.open(Path(directory) / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
