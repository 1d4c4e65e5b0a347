"""A table is checked before anything is fitted to it: each fault by its row, column and value."""

import numpy as np
import pandas
import pytest

from scaling_jax.errors import UserError
from scaling_jax.laws.observations import checked, different, enough, observations


def table(**columns):
    base = {"params": [1e6, 1e6, 2e6, 2e6], "tokens": [1e7, 2e7, 1e7, 2e7], "lr": [0.01] * 4, "loss": [4.0, 3.5, 3.8, 3.3]}
    return pandas.DataFrame({name: values for name, values in (base | columns).items() if values is not None})


def test_only_finished_rows_remain_and_the_others_are_counted():
    found = checked(table(status=["finished", "diverged", "finished", "pending"], loss=[4.0, np.inf, 3.8, np.nan]))
    assert found["loss"].tolist() == [4.0, 3.8] and found.attrs["left_out"] == {"diverged": 1, "pending": 1}
    assert len(checked(table())) == 4  # without a status all are finished


@pytest.mark.parametrize(
    ("columns", "need", "message"),
    [
        ({"status": ["diverged"] * 4}, ("loss",), "none of the 4 rows is finished: 4 diverged"),
        ({"status": ["diverged"] * 4, "loss": [np.nan] * 4}, ("loss",), "none of the 4 rows is finished: 4 diverged"),
        ({"loss": [4.0, 3.5, np.nan, 3.3]}, ("loss",), "row 3: loss is nan; a finished run has a positive one (1 such rows)"),
        ({"loss": [4.0, -3.5, 3.8, 0.0]}, ("loss",), "row 2: loss is -3.5; a finished run has a positive one (2 such rows)"),
        ({"tokens": [1e7, 0.0, 1e7, 2e7]}, ("loss",), "row 2: tokens is 0; must be a positive number"),
        ({"data": ["a", "a", "b", "b"]}, ("loss",), "rows of several data (a, b): their losses cannot be compared"),
        ({"vocab_size": [256, 256, 512, 256]}, ("loss",), "rows of several vocab_size (256, 512)"),
        (
            {"params": [1e6] * 4, "tokens": [1e7] * 4},
            ("loss",),
            "rows 1 and 4 are one run (params=1000000.0, tokens=10000000.0, lr=0.01) with losses 4 and 3.3",
        ),
        ({"lr": None}, ("lr", "batch_tokens"), "the table has no lr, batch_tokens; it has params, tokens, loss"),
    ],
)
def test_faulty_tables(columns, need, message):
    with pytest.raises(UserError) as caught:
        checked(table(**columns), need)
    assert message in str(caught.value)


def test_one_run_twice_is_found_where_other_columns_are_empty():
    twice = table(params=[1e6] * 4, tokens=[1e7, 2e7, 1e7, 2e7], weight_decay=[np.nan] * 4, loss=[4.0, 3.5, 4.0, 3.4])
    twice.index = [7, 7, 8, 8]
    with pytest.raises(UserError, match=r"rows 8 and 9 are one run \(params=1000000.0, tokens=20000000.0, .*losses 3.5 and 3.4"):
        checked(twice)
    beta = table(params=[1e6] * 4, tokens=[1e7] * 4, beta2=[0.9, 0.95, 0.9, 0.95], loss=[4.0, 3.5, 4.0, 3.5])
    assert len(checked(beta)) == 4  # a column of few values was chosen


def test_numbers_that_may_be_missing_become_floats():
    rows = checked(table(horizon_tokens=pandas.array([1, 2, None, 4], dtype="Int64")))
    assert rows["horizon_tokens"].dtype == float and np.isnan(rows["horizon_tokens"].iloc[2])
    for column, value in (("horizon_tokens", 0), ("data_tokens", -1)):
        with pytest.raises(UserError, match=f"row 1: {column} is {value}; must be"):
            checked(table(**{column: [value, 1, 1, 1]}))


def test_rows_of_unknown_points_or_batches_are_no_contradiction():
    rows = pandas.DataFrame(
        {"point": ["a", "a", None, None], "params": 1e5, "tokens": 1e6, "lr": [0.1, 0.1, 0.1, 0.2], "loss": [3.0, 3.0, 2.0, 2.1]}
    )
    assert len(checked(rows)) == 4  # of the last two the lr tells them apart
    with pytest.raises(UserError, match=r"rows 3 and 4 are one run \(params=100000.0"):
        checked(rows.assign(lr=0.1))
    theirs = pandas.DataFrame({"params": 1e5, "tokens": 1e6, "lr": 0.1, "batch_tokens": [64.0, np.nan, np.nan], "loss": [3.0, 2.0, 2.1]})
    assert len(checked(theirs)) == 3
    with pytest.raises(UserError, match="are one run"):
        checked(theirs.drop(columns="batch_tokens"))


def test_equal_losses_of_equal_rows_and_other_seeds_are_no_contradiction():
    alike = {"params": [1e6] * 4, "tokens": [1e7] * 4}
    assert len(checked(table(**alike, loss=[4.0] * 4))) == 4
    assert len(checked(table(**alike, seed=[0, 1, 2, 3]))) == 4
    assert len(checked(table(**alike, point=["a", "b", "c", "d"]))) == 4


def test_observations_leave_censored_points_out_and_cluster_by_columns():
    frame = table(point=["a", "a", "b", "b"], censored=[False, False, True, False])
    found = observations(frame, ["params", "tokens"], "loss", ["point"], "all")
    assert found.y.tolist() == [4.0, 3.5, 3.3] and found.x["tokens"].tolist() == [1e7, 2e7, 2e7]
    assert found.cluster[0] == found.cluster[1] != found.cluster[2] and len(found.frame) == 4
    assert len(set(observations(frame, ["params"], "loss", [], "all").cluster)) == 3


def test_too_few():
    with pytest.raises(UserError, match="a law needs at least 3 points; there are 2"):
        enough([1, 2], 3, "a law")
    with pytest.raises(UserError, match="a law needs at least 2 different batch_tokens; there is 1: 4096"):
        different([4096, 4096], "batch_tokens", 2, "a law")
