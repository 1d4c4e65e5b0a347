"""Directories that appear whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from scaling_jax.errors import UserError


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
