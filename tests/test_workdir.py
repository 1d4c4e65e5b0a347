import json
from pathlib import Path

import pytest

from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.train.workdir import claim, digest, read_identity, release, write_json


def claim_once(workdir: Path, fingerprint: str = "data", overwrite: bool = False, **train: int) -> None:
    config = default_config()
    config.train.update(train)
    release(claim(workdir, config, fingerprint, overwrite))


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_workdir_belongs_to_one_run(tmp_path: Path):
    run = tmp_path / "deep" / "run"
    claim_once(run)
    claim_once(run, accumulation=2)  # execution
    before = (run / "config.json").read_bytes()
    assert json.loads(before)["config"]["train"]["accumulation"] == 2
    with pytest.raises(UserError, match=r"config\.train\.seed: 0 there, 1 here") as caught:
        claim_once(run, seed=1)
    assert "accumulation" not in str(caught.value)
    with pytest.raises(UserError, match="training data: 'data' there, 'other' here"):
        claim_once(run, "other")
    assert (run / "config.json").read_bytes() == before
    claim_once(run)  # every refusal freed the lock


def test_identity_that_is_no_field_counts_too(tmp_path: Path):
    run, start = tmp_path / "run", {"identity": "0123", "tokens": 5}
    release(claim(run, default_config(), "data", others={"start": start, "batch.follow": "law 1"}))
    release(claim(run, default_config(), "data", others={"start": start, "batch.follow": "law 1"}))
    for others, words in (
        ({"batch.follow": "law 1"}, r"  start: \{'identity': '0123', 'tokens': 5\} there, 'absent' here"),
        ({"start": start | {"tokens": 6}, "batch.follow": "law 1"}, "'tokens': 5} there, {'identity': '0123', 'tokens': 6} here"),
        ({"start": start, "batch.follow": "law 2"}, "config.batch.follow: 'law 1' there, 'law 2' here"),
    ):
        with pytest.raises(UserError, match=words):
            claim(run, default_config(), "data", others=others)
    identity = read_identity(run)
    assert identity["start"] == start and digest(identity) == digest(dict(reversed(identity.items()))) != digest(
        identity | {"train.seed": 1}
    )
    with pytest.raises(UserError, match="holds no run"):
        read_identity(tmp_path)


def test_the_lock_lasts_until_release(tmp_path: Path):
    lock = claim(tmp_path / "run", default_config(), "data")
    with pytest.raises(UserError, match="in use by another process"):
        claim_once(tmp_path / "run", overwrite=True)
    release(lock)
    claim_once(tmp_path / "run")


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path: Path):
    run = tmp_path / "run"
    claim_once(run)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "figures").mkdir()
    (run / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "100").write_text("")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")  # a larger disk
    claim_once(run, seed=1, overwrite=True)
    assert names(run) == {".lock", "config.json", "notes.txt"}
    assert names(tmp_path / "elsewhere") == {"100"}


def test_a_run_without_its_config_is_not_adopted(tmp_path: Path):
    run = tmp_path / "run"
    claim_once(run)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds a run but no config\.json"):
        claim_once(run)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a config that scaling_jax wrote"):
        claim_once(run)
    assert (run / "metrics.jsonl").exists()
    claim_once(run, overwrite=True)
    assert names(run) == {".lock", "config.json"}


@pytest.mark.parametrize("name", ["figures", "config.json", "checkpoints", "tensorboard", "metrics.jsonl"])
def test_what_only_looks_like_a_run_is_never_deleted(tmp_path: Path, name: str):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text('{"somebody": "else"}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"holds {name} of something else"):
            claim_once(run, overwrite=overwrite)
    assert names(run) == {name}


def test_a_copy_without_hidden_files_is_still_the_run(tmp_path: Path):
    run = tmp_path / "run"
    claim_once(run)
    (run / ".lock").unlink()
    claim_once(run)
    claim_once(run, seed=1, overwrite=True)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fails(self: Path, text: str) -> None:
        self.touch()
        raise OSError("full")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="full"):
        write_json(path, {"a": 2})
    assert names(tmp_path) == {"x.json"} and json.loads(path.read_text()) == {"a": 1}
