"""What a figure calls a bound: a minimum at the edge of its grid, drawn as an open triangle; never a cell with too few points for one."""

import numpy as np
import pandas
import pytest
from test_report_study_laws import BEST, drawn, finding, grid_rows, source

from scaling_jax.errors import UserError
from scaling_jax.report.study import batch, lr
from scaling_jax.report.study.plot import one_setting


def test_only_bounds_are_open_triangles():
    cells = pandas.DataFrame({"params": 1e6, "batch_tokens": 1e4, "tokens": [1e8, 1e9, 1e10, 1e11], "lr": [0.01, 0.004, 0.002, 0.03]})
    cells = cells.assign(lr_log_se=0.1, loss=3.0, bound=["", "", "low", "high"], runs=5)
    plot = lr.lr_against_tokens(source(grid_rows(), lr_optimum=finding("o", cells)))
    marks = [line for line in drawn(plot).axes[0].lines if line.get_markerfacecolor() == "none"]
    assert {line.get_marker(): line.get_xydata().tolist() for line in marks} == {"v": [[1e10, 0.002]], "^": [[1e11, 0.03]]}
    assert "2 minima" in plot.caption and "2 bounds" in plot.caption and "T^−0.40 at B = 10k" in plot.caption


def test_where_three_rates_are_missing_there_is_neither_a_minimum_nor_a_bound():
    b, t = (a.ravel() for a in np.meshgrid([1e4, 1e5], [1e8, 1e9], indexing="ij"))
    cells = pandas.DataFrame({"params": 1e6, "batch_tokens": b, "tokens": t, "lr": [0.01, 0.004, 0.002, 0.03], "loss": 3.0, "runs": 5})
    cells = cells.assign(lr_log_se=0.1, bound=["", "", "low", "too few"])
    rows = pandas.concat([cells.assign(lr=lr_) for lr_ in (0.002, 0.03)], ignore_index=True)
    for make, minima, used in ((lr.lr_against_tokens, 2, 15), (lr.lr_against_batch, 1, 10)):
        plot = make(source(rows, lr_optimum=finding("o", cells)))
        assert f"{minima} minima" in plot.caption and "and 1 bounds" in plot.caption and f"from {used} rows" in plot.caption
        assert set(plot.data["bound"]) == {"", "low"}
        with pytest.raises(UserError, match="^no batch size and horizon has three learning rates that did not diverge$"):
            make(source(rows, lr_optimum=finding("o", cells.assign(bound="too few"))))
    curves_ = lr.lr_curves(source(rows, lr_optimum=finding("o", cells)), 0)
    assert "local parabolas (2)" in curves_.caption and "edge of their grid (1)" in curves_.caption
    marks = [line.get_marker() for axes in drawn(curves_).axes for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert sorted(marks) == ["<", "o", "o"]
    none = lr.lr_curves(source(rows, lr_optimum=finding("o", cells.assign(bound="too few"))), 0)
    assert "local parabolas (0)" in none.caption and "edge of their grid (0)" in none.caption
    batches = pandas.DataFrame(BEST | {"bound": ["", "high", "too few"]})
    plot = batch.best_batch(source(rows, batch_optimum=finding("b", batches)))
    assert "1 minima" in plot.caption and "and 1 bounds" in plot.caption and 1e10 not in set(plot.data["tokens"])
    with pytest.raises(UserError, match="at no size and horizon do three batch sizes"):
        batch.best_batch(source(rows, batch_optimum=finding("b", batches.assign(bound="too few"))))


def test_how_runs_were_carried_out_hides_none_of_them():
    rows = pandas.DataFrame({"params": 1e5, "batch_tokens": [64.0, 128.0, 256.0], "train.accumulation": [1, 2, 4]})
    kept, said = one_setting(rows)
    assert len(kept) == 3 and said == ""
    kept, said = one_setting(rows.rename(columns={"train.accumulation": "model.mlp_ratio"}))
    assert len(kept) == 1 and "model.mlp_ratio 1" in said
