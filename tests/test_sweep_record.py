"""What a group knows of itself."""

import json
import math

import pytest
from etils import epath

from scaling_jax.errors import UserError
from scaling_jax.sweep.record import DIVERGED, FINISHED, STOPPED_EARLY, GroupRecord
from scaling_jax.train.evaluate import Estimate, Evaluation


def found(loss):
    return {"heldout": Evaluation(10, 2, Estimate(loss, 0.1), Estimate(loss * 1.5, 0.2), [], []),
            "code": Evaluation(10, 2, Estimate(2 * loss, 0.3), Estimate(None, None), [], [])}  # fmt: skip


def record_of(path, rises=0, tids=("a", "b")):
    return GroupRecord(epath.Path(path), list(tids), rises)


def test_rows_have_every_domain_and_what_was_measured(tmp_path):
    record = record_of(tmp_path)
    record.begin("trunk", 0)
    record.add_row("a", 100, 104, found(2.0), {"train_loss": 1.9})
    record.write()
    row = json.loads((tmp_path / "group.json").read_text())["rows"]["a"]["100"]
    assert row.pop("seconds") >= 0
    of_first = {"loss": 2.0, "loss_stderr": 0.1, "bits_per_byte": 3.0, "bits_per_byte_stderr": 0.2}
    of_code = {"loss_code": 4.0, "loss_code_stderr": 0.3, "bits_per_byte_code": None, "bits_per_byte_code_stderr": None}
    assert row == {"tokens": 104, "status": FINISHED, "reason": None, "train_loss": 1.9} | of_first | of_code


def test_a_loss_that_is_not_finite_ends_the_trajectory(tmp_path):
    record = record_of(tmp_path)
    record.begin("trunk", 0)
    record.add_row("a", 100, 104, found(math.nan), {})
    record.add_row("b", 100, 104, found(2.0), {})
    record.reached([100])
    assert record.ended == {"a": {"tokens": 104, "status": DIVERGED, "reason": "held-out loss not finite at 104 tokens"}}
    record.add_ended_row("a", 200)
    assert record.rows["a"]["200"]["status"] == DIVERGED and "loss" not in record.rows["a"]["200"]


def test_losses_that_rise_so_often_in_a_row_stop_a_trajectory(tmp_path):
    record = record_of(tmp_path, rises=2)
    record.begin("trunk", 0)
    losses = {"a": [3.0, 2.0, 2.1, 2.0, 2.2, 2.3], "b": [3.0, 3.1, 2.9, 3.0, 2.8, 2.9]}
    for i in range(6):
        for tid in ("a", "b"):
            record.add_row(tid, 100 * (i + 1), 100 * (i + 1), found(losses[tid][i]), {})
        record.reached([100 * (n + 1) for n in range(i + 1)])
        assert ("a" in record.ended) == (i == 5), i
    assert record.ended["a"]["status"] == STOPPED_EARLY and "b" not in record.ended
    record.write()
    again = record_of(tmp_path, rises=2)  # found again from the rows, whatever was known
    again.values["ended"] = {}
    again.begin("trunk", 600, earlier=[100, 200, 300, 400, 500, 600])
    assert again.ended.keys() == {"a"}


def test_what_ended_later_than_the_checkpoint_is_not_known_yet(tmp_path):
    record = record_of(tmp_path)
    record.begin("trunk", 0)
    record.end("a", 300, DIVERGED, "why")
    record.write()
    earlier, later = record_of(tmp_path), record_of(tmp_path)
    earlier.begin("trunk", 200)
    later.begin("trunk", 300)
    assert (list(earlier.ended), list(later.ended)) == ([], ["a"])


def test_a_decay_takes_over_what_ended_before_it_branched_off(tmp_path):
    record = record_of(tmp_path)
    record.begin("trunk", 0)
    record.end("a", 300, DIVERGED, "why")
    record.begin("decay-250", 200, "trunk")
    assert not record.ended
    record.end("b", 230, DIVERGED, "here only")
    record.begin("decay-500", 400, "trunk")
    assert record.ended.keys() == {"a"} and not record.all_ended


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "group.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="group.json: not a record of this version"):
        record_of(tmp_path)
