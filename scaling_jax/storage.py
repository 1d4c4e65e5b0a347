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


def write_json(path: epath.PathLike, value: Any) -> None:
    """The same of a value as JSON; tuples become lists."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: epath.PathLike, default: Any = None) -> Any:
    """What the file holds, `default` where there is none; UserError where it is no JSON."""
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
        raise UserError(f"{path}: damaged: not the JSON that scaling_jax wrote; restore it") from None
