"""Files of a study, in a local directory or a bucket (gs://, s3://): each is written whole or not at all."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from etils import epath

from scaling_jax.errors import UserError


def is_local(path: epath.PathLike) -> bool:
    """Whether it is on a file system, so that it can be locked and renamed; a bucket's begins with its scheme, 'gs://'."""
    return "://" not in os.fspath(path)


def directory(flag: str, text: str) -> epath.Path:
    """What a flag names, of a file system or a bucket; UserError where it can be neither, or the bucket's package is not installed."""
    try:
        path = epath.Path(text)
        if "\0" in text:  # which no file system takes
            raise ValueError("embedded null byte")
        path.exists()
    except (ImportError, KeyError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        needed = "; pip install 'scaling_jax[gcs]' or 'scaling_jax[s3]'" if isinstance(error, ImportError) else ""
        raise UserError(f"{flag}={text!r}: must be a directory, or a bucket's gs://… or s3://… ({said}){needed}") from None
    except OSError as error:
        raise UserError(f"{flag}={text}: cannot be read: {error.strerror or error}") from None
    return path


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes the file, and the directories above it, so that whoever reads sees all of `data` or what was there before.

    Several may write at a time: the last one's is what stays. UserError where it cannot be written.
    """
    path = epath.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(path):
            path.write_bytes(data)  # an object is put whole
            return
        temporary = Path(path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp"))
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_writable(path: epath.PathLike) -> None:
    """UserError where `write_bytes` could not write the file, as far as its directory shows; nothing is made. A bucket is not asked."""
    if not is_local(path):
        return
    above = Path(path).absolute().parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "is no directory" if not above.is_dir() else "may not be written"
        raise UserError(f"{path}: cannot be written: {above} {why}")


def write_json(path: epath.PathLike, value: Any) -> None:
    """The same of a value as JSON; tuples become lists."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: epath.PathLike, default: Any = None, mend: str = "restore it") -> Any:
    """What the file holds, `default` where there is none; UserError where it is no JSON, which says how to `mend` that."""
    path = epath.Path(path)
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return default
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return json.loads(data)
    except ValueError:  # no UTF-8, or no JSON
        raise UserError(f"{path}: damaged: not the JSON that scaling_jax wrote; {mend}") from None
