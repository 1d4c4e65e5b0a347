"""Files that are whole, whatever happens while they are written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from scaling_jax import storage
from scaling_jax.errors import UserError


def test_json_comes_back(tmp_path):
    path = epath.Path(tmp_path) / "a" / "b.json"  # with the directory above it
    storage.write_json(path, {"x": (1, 2.5, None), "ü": "π"})
    assert storage.read_json(path) == {"x": [1, 2.5, None], "ü": "π"} == json.loads((tmp_path / "a" / "b.json").read_text())
    storage.write_json(str(path), 3)
    assert storage.read_json(str(path)) == 3
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b.json"]


def test_what_is_not_there_has_a_default(tmp_path):
    (tmp_path / "file").write_text("1")
    assert storage.read_json(tmp_path / "none.json") is None
    assert storage.read_json(tmp_path / "none.json", {}) == {}
    assert storage.read_json(tmp_path / "file" / "none.json", 5) == 5


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json: damaged"):
        storage.read_json(tmp_path / "x.json")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    storage.write_json(tmp_path / "x.json", "old")
    with pytest.raises(TypeError):
        storage.write_json(tmp_path / "x.json", object())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"x\.json: cannot be written: No space left"):
        storage.write_json(tmp_path / "x.json", "new")
    assert storage.read_json(tmp_path / "x.json") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """Two values of a megabyte in turn, kill -9 amid them: what is there is one of the two."""
    code = f"""
from scaling_jax import storage
while True:
    for letter in (b"a", b"b"):
        storage.write_bytes({str(tmp_path / "x")!r}, letter * 1_000_000)
"""
    writer = subprocess.Popen([sys.executable, "-c", code])
    try:
        seen, deadline = set(), time.monotonic() + 60
        while len(seen) < 2 and time.monotonic() < deadline:
            if (tmp_path / "x").exists():
                seen.add((tmp_path / "x").read_bytes())  # a reader amid the writes
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    whole = {b"a" * 1_000_000, b"b" * 1_000_000}
    assert seen == whole and (tmp_path / "x").read_bytes() in whole


def test_a_bucket_is_no_local_path():
    assert storage.is_local("runs/x") and storage.is_local("/a/b") and storage.is_local(epath.Path("a:b"))
    assert not storage.is_local("gs://bucket/x") and not storage.is_local(epath.Path("s3://bucket/x"))
