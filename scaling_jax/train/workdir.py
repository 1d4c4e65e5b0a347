"""A work directory belongs to one run: it says whose it is, and refuses another."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.train import checkpoint, metrics
from scaling_jax.train.compute_dtype import DTYPES, Choice
from scaling_jax.train.hosts import ALONE, Hosts

CONFIG_FILE, SUMMARY_FILE, TABLE_FILE, FIGURES, LOCK_FILE = "config.json", "summary.json", "parametrization.json", "figures", ".lock"
LAWS, BRANCHES, EVALUATIONS = "laws", "branches", "evaluations"
FOUND_DTYPE = "fastest"  # of config.json: how the dtype was chosen, where it was not given
STUDY_FILE = "plan.json"  # of `scaling-jax sweep`
_OWN = (
    *(CONFIG_FILE, SUMMARY_FILE, TABLE_FILE, FIGURES, LAWS, BRANCHES, EVALUATIONS),
    *(metrics.FILE, "tensorboard", "wandb", "profile", checkpoint.DIRECTORY, checkpoint.SET_ASIDE),
)
SEEN_SECONDS = 40.0  # after which every host sees what one wrote; those of NFS look at a directory again after 30


def claim(
    workdir: Path,
    config: ConfigDict,
    data_fingerprint: str,
    overwrite: bool = False,
    others: Mapping[str, Any] | None = None,
    hosts: Hosts = ALONE,
    find_dtype: Callable[[], Choice] | None = None,
) -> int | None:
    """Makes `workdir` this run's, or finds that it is; returns a file descriptor that holds its lock, None on processes but the first.

    `others` are parts of its identity beside the config's fields, or instead of one: another run that it starts from, the content of a
    file that a field names. Where config.model.compute_dtype is 'fastest' it becomes, in place, that of the run that is there, or else what
    `find_dtype` finds, which all processes call and which is kept in config.json.

    UserError where its identity fields differ (listed), where it is in use or cannot be written, where it holds a run without a
    config.json, or files that go by the names of a run's but are none; and where other processes do not see what the first wrote there.
    """
    made = hosts.first and not workdir.exists()
    lock = hosts.do(lambda: _take(workdir))
    try:
        _check_shared(workdir, hosts, made)
        stored = hosts.tell(lambda: None if overwrite else _stored(workdir))
        found = _settle_dtype(config, stored, find_dtype)
        identity = json.loads(json.dumps(config_lib.identity(config) | {"data.fingerprint": data_fingerprint} | dict(others or {})))
        contents = {"config": config_lib.to_json(config), "identity": identity} | ({FOUND_DTYPE: found} if found else {})
        hosts.do(lambda: _write(workdir, contents, stored, overwrite))
    except BaseException:
        release(lock)
        raise
    return lock


def _take(workdir: Path) -> int:
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file, must be a directory")
    if (workdir / STUDY_FILE).exists():
        raise UserError(f"--workdir={workdir}: holds a study, {STUDY_FILE}; give another directory")
    there = [name for name in _OWN if os.path.lexists(workdir / name)]
    if there and not _was_run(workdir):  # somebody's figures/, which --overwrite must not delete
        raise UserError(f"--workdir={workdir}: holds {', '.join(there)} of something else than a run; give another directory")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        return _lock(workdir)
    except OSError as error:
        raise UserError(_cannot_write(workdir, error)) from error


def _check_shared(workdir: Path, hosts: Hosts, made: bool) -> None:
    """UserError on all processes where one does not see the file that the first holds locked; what was `made` for it is gone then."""
    if hosts.count == 1:
        return
    path = workdir / LOCK_FILE

    def mark() -> str:
        path.write_text(word := secrets.token_hex(8))
        return word

    word, deadline, fault = hosts.tell(mark), time.monotonic() + SEEN_SECONDS, None
    while not _holds(path, word):
        if time.monotonic() > deadline:
            fault = f"--workdir={workdir}: is not the directory that process 0 sees; all hosts must share it (NFS, a mounted bucket)"
            break
        time.sleep(0.2)
    try:
        hosts.all_well(fault)
    except UserError:
        if made:
            path.unlink()
            workdir.rmdir()
        raise


def _holds(path: Path, word: str) -> bool:
    try:
        return path.read_text() == word
    except OSError:
        return False


def _stored(workdir: Path) -> dict[str, Any] | None:
    """What config.json holds; None where there is no run."""
    path = workdir / CONFIG_FILE
    if not path.exists():
        if any((workdir / name).exists() for name in _OWN):
            raise UserError(
                f"--workdir={workdir}: holds a run but no {CONFIG_FILE}; give another directory, or --overwrite to delete the run"
            )
        return None
    try:
        stored = json.loads(path.read_text())
        if isinstance(stored["identity"], dict):
            return stored
    except OSError as error:
        raise UserError(_cannot_write(workdir, error)) from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: not a config that scaling_jax wrote; restore it, or --overwrite the run")


def _settle_dtype(config: ConfigDict, stored: dict[str, Any] | None, find_dtype: Callable[[], Choice] | None) -> dict[str, Any] | None:
    """Decides model.compute_dtype = 'fastest', in place. Returns what the run keeps of how that was found, None where it was given."""
    if stored is not None:
        theirs = stored["identity"].get("model.compute_dtype")
        config_lib.settle_compute_dtype(config, theirs if theirs in DTYPES else DTYPES[0])
        return stored.get(FOUND_DTYPE)
    if config.model.compute_dtype != config_lib.FASTEST:
        return None
    found = find_dtype()
    config.model.compute_dtype = found.compute_dtype
    return found._asdict()


def _write(workdir: Path, contents: dict[str, Any], stored: dict[str, Any] | None, overwrite: bool) -> None:
    if stored is not None:
        _check_identity(workdir, contents["identity"], stored["identity"])
    try:
        if overwrite:
            _delete(workdir)
        write_json(workdir / CONFIG_FILE, contents)
    except OSError as error:
        raise UserError(_cannot_write(workdir, error)) from error


def _was_run(workdir: Path) -> bool:
    """Whether a run ever claimed it: there is a lock, or, in a copy without hidden files, a run's config."""
    if (workdir / LOCK_FILE).exists():
        return True
    try:
        return "identity" in json.loads((workdir / CONFIG_FILE).read_text())
    except (OSError, ValueError, TypeError):
        return False


def _delete(workdir: Path) -> None:
    for name in _OWN:
        path = workdir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _cannot_write(workdir: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"--workdir={workdir}: no space left on the disk; free some and run the same command again"
    return f"--workdir={workdir}: cannot be written: {error.strerror}"


def _check_identity(workdir: Path, identity: dict[str, Any], theirs: dict[str, Any]) -> None:
    missing = "absent"
    differ = [
        f"  config.{name}: {theirs.get(name, missing)!r} there, {identity.get(name, missing)!r} here"
        for name in identity | theirs
        if theirs.get(name, missing) != identity.get(name, missing)
    ]
    if differ:
        lines = "\n".join(differ).replace("config.data.fingerprint", "training data").replace("  config.start:", "  start:")
        raise UserError(
            f"--workdir={workdir}: holds another run; give another directory, or --overwrite to delete it. What differs:\n{lines}"
        )


def read_identity(workdir: Path) -> dict[str, Any]:
    """The identity of the run in `workdir`; UserError where there is none."""
    path = workdir / CONFIG_FILE
    try:
        identity = json.loads(path.read_text())["identity"]
    except OSError as error:
        raise UserError(f"{workdir}: holds no run; {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        identity = None
    if not isinstance(identity, dict):
        raise UserError(f"{path}: not a config that scaling_jax wrote")
    return identity


def digest(identity: Mapping[str, Any]) -> str:
    """One word for an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _lock(workdir: Path) -> int:
    lock = os.open(workdir / LOCK_FILE, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however it ends
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"--workdir={workdir}: in use by another process") from None
    return lock


def finished_summary(workdir: Path) -> dict[str, Any] | None:
    """summary.json of a run that ended, else None."""
    try:
        summary = json.loads((workdir / SUMMARY_FILE).read_text())
    except (OSError, ValueError):
        return None
    return summary if summary.get("status") == "finished" else None


def release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
