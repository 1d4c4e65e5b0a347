"""A run that is killed at random moments ends exactly as one that is not."""

import importlib.util
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kills.py"
_spec = importlib.util.spec_from_file_location("kills", _SCRIPT)
kills = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kills)


@pytest.mark.slow  # a minute; tests/test_train_batch.py stops a run at twelve moments, tests/test_train_wandb.py kills one
def test_three_kills_change_nothing(tmp_path):
    moments = kills.trial(tmp_path, 3, 64_000, seed=1)
    assert len(moments) == 3
    with pytest.raises(AssertionError):  # the comparison itself can fail: another seed is another run
        other = tmp_path / "other"
        kills.FIELDS["train.seed"] = 1
        try:
            kills.run_to_the_end(other, 6400)
        finally:
            del kills.FIELDS["train.seed"]
        kills.compare(tmp_path / "whole", other)


@pytest.mark.slow  # tests/test_train_batch.py stops such a run at twelve moments without starting processes
def test_kills_change_nothing_of_a_run_whose_batch_follows_its_noise(tmp_path, monkeypatch):
    follow = {"batch.schedule": "follow", "batch.lr_rule": "sqrt", "batch.multiple": 0.3, "batch.look_tokens": 500, "batch.max_tokens": 256}
    for name, value in follow.items():
        monkeypatch.setitem(kills.FIELDS, name, value)
    moments = kills.trial(tmp_path, 3, 48_000, seed=2)
    assert len(moments) == 3
    assert {record["batch/batch_tokens"] for record in kills.comparable(tmp_path / "killed") if "batch/batch_tokens" in record} == {
        64,
        128,
        256,
    }
