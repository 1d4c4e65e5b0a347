"""The table: a study's directory laid out by hand, and other people's files."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
from helpers import small_config

from scaling_jax import results, storage
from scaling_jax.curves import Curves, Step
from scaling_jax.errors import UserError
from scaling_jax.sweep import grid
from scaling_jax.sweep.plan import extend, undecided, write_plan
from scaling_jax.sweep.study import Study, resolve, trajectories

SHARED = Path(__file__).parents[1] / os.environ.get("SCALING_JAX_SHARED", "../shared") / "data"
HORIZONS = (1024, 4096)


def planned(directory, over, horizons=HORIZONS, schedule="constant", members=2):
    """The plan of a study in `directory`, of which nothing is trained yet, and its points."""
    study = Study(small_config(schedule__name=schedule), over, horizons)
    points = resolve(study, lambda values: "fingerprint")
    found = trajectories(points)
    decided = {key: {"members": members, "total_params": 9999} for key in undecided(None, found)}
    plan = extend(None, study, points, found, decided)
    write_plan(directory, plan)
    return plan, points


def row(loss, tokens=1024, **more):
    return {"tokens": tokens, "status": "finished", "reason": None, "loss": loss, "loss_stderr": loss / 100, "seconds": 1.5} | more


def record(directory, group, rows, state="done", reason=None):
    storage.write_json(directory / "groups" / group / "group.json", {"version": 1, "state": state, "reason": reason, "rows": rows})


@pytest.fixture
def study(tmp_path):
    """Four points in two groups: one is done, with every kind of row, one failed."""
    over = grid.product(grid.over("model.width", [16, 32]), grid.over("optimizer.b1", [0.8]), grid.over("optimizer.lr", [0.1, 0.2]))
    plan, points = planned(tmp_path, over)
    (narrow, wide) = plan.groups
    noise = {"noise_scale_tokens": 50.0, "noise_scale_tokens_low": 20.0, "noise_scale_tokens_high": None}
    rows = {
        points[0].id: {
            "1024": row(3.0, noise_scale_tokens=None, noise_scale_tokens_low=None, noise_scale_tokens_high=None),
            "4096": row(2.5, 4096, loss_code=4.0, loss_code_stderr=0.1, bits_per_byte_code=5.0, **noise),
        },
        points[1].id: {"1024": {"tokens": 640, "status": "diverged", "reason": "loss is not finite", "seconds": 1.0}},
    }
    record(tmp_path, narrow, rows, "running")
    record(tmp_path, wide, {points[2].id: {"1024": row(2.0)}}, "failed", "out of memory")
    return tmp_path, plan, points


def test_a_row_for_each_point_and_horizon(study):
    directory, plan, points = study
    table = results.load(directory)
    assert list(zip(table["point"], table["horizon_tokens"], strict=True)) == [(p.id, h) for p in points for h in HORIZONS]
    assert list(table["status"]) == ["finished", "finished", "diverged", "pending", "finished", "failed", "failed", "failed"]
    assert list(table["reason"].fillna("")) == ["", "", "loss is not finite", "", "", *["out of memory"] * 3]
    assert list(table["group"].unique()) == list(plan.groups)
    assert table.attrs["study"] == str(directory)


def test_what_the_columns_hold(study):
    directory, _, points = study
    table = results.load(str(directory))
    first, second = table.iloc[0], table.iloc[1]
    base = small_config()
    assert (first["width"], first["depth"], first["head_dim"], first["context"]) == (16, 2, 8, 16)
    assert (first["batch_tokens"], first["seed"], first["vocab_size"], first["data_tokens"], first["warmup_tokens"]) == (128, 0, 256, 0, 0)
    assert (first["lr"], table["lr"].iloc[2], first["weight_decay"]) == (0.1, 0.2, base.optimizer.weight_decay)
    assert (first["parametrization"], first["schedule"], first["data"]) == ("mup", "constant", "fingerprint")
    params = 2 * (4 * 16 * 16 + 2 * 16 * 64)
    assert first["params"] == params and first["total_params"] == 9999
    assert second["flops"] == 4096 * (6 * params + 12 * 2 * 16 * 16)
    assert (second["tokens"], second["loss"], second["loss_stderr"], second["seconds"]) == (4096, 2.5, 0.025, 1.5)
    assert (second["loss_code"], second["loss_code_stderr"], second["bits_per_byte_code"]) == (4.0, 0.1, 5.0)
    assert list(table["optimizer.b1"]) == [0.8] * 8  # set by the grid, without a column of its own
    assert "model.width" not in table and "train.tokens" not in table and "preconditioned_noise_scale_tokens" not in table
    assert table["tokens"].isna().tolist() == [False, False, False, True, False, True, True, True]
    assert table["loss"].isna().tolist() == [False, False, True, True, False, True, True, True]


def test_an_open_interval_has_an_infinite_end_and_an_unknown_one_none(study):
    table = results.load(study[0])
    assert math.isnan(table["noise_scale_tokens_high"].iloc[0]) and math.isnan(table["noise_scale_tokens_high"].iloc[4])
    assert (table["noise_scale_tokens"].iloc[1], table["noise_scale_tokens_high"].iloc[1]) == (50.0, math.inf)


def test_the_columns_are_those_that_are_documented_in_their_order(study):
    table = results.load(study[0])
    documented = [name for name in results.COLUMNS if "<" not in name and not name.startswith("preconditioned_")]
    assert [name for name in table.columns if name in documented] == documented
    assert [n for n in table.columns if n not in documented] == [
        "loss_code", "loss_code_stderr", "bits_per_byte_code", "bits_per_byte_code_stderr", "optimizer.b1",
    ]  # fmt: skip
    kinds = {name: str(kind) for name, kind in table.dtypes.items()}
    assert kinds["horizon_tokens"] == "int64" and kinds["tokens"] == "Int64" and kinds["loss"] == "float64" and kinds["seed"] == "int64"
    assert {kinds[name] for name in ("point", "status", "reason", "schedule")} == {"string"}


def test_the_table_beside_the_study_is_the_same(study):
    directory = study[0]
    table = results.write_table(directory)
    again = results.load(directory / "results.parquet")
    pandas.testing.assert_frame_equal(again, table)
    assert "study" not in again.attrs  # a copy of it is one elsewhere
    assert [path.name for path in directory.glob(".*")] == []
    table.to_csv(directory / "copy.csv", index=False)
    copy = results.load(directory / "copy.csv", required=("params", "tokens", "loss"))
    assert list(copy["point"]) == list(table["point"]) and list(copy["loss"].dropna()) == list(table["loss"].dropna())


def test_nothing_trained_is_all_pending(tmp_path):
    plan, points = planned(tmp_path, grid.over("optimizer.lr", [0.1, 0.2]), schedule="cosine")
    table = results.load(tmp_path)
    assert list(table["status"]) == ["pending"] * 4 and list(table["horizon_tokens"]) == [*HORIZONS] * 2
    assert table["group"].nunique() == 2  # with cosine a group trains to one horizon
    record(tmp_path, table["group"].iloc[1], {f"{points[0].id}-4096": {"4096": row(1.0, 4096)}})
    assert list(results.load(tmp_path)["status"]) == ["pending", "finished", "pending", "pending"]


def test_the_lowest_loss_of_each_point(study):
    best = results.early_stopped(results.load(study[0]))
    assert list(best["point"]) == [study[2][0].id, study[2][2].id] and list(best["loss"]) == [2.5, 2.0]
    rising = pandas.DataFrame({"point": ["b", "b", "a", "a"], "status": ["finished"] * 4, "loss": [1.0, 2.0, 5.0, 4.0]})
    assert list(results.early_stopped(rising).index) == [0, 3]


def test_the_courses_of_all_trajectories(tmp_path):
    plan, points = planned(tmp_path, grid.over("optimizer.lr", [0.1, 0.2]))
    empty = results.curves(tmp_path)
    (group,) = plan.groups
    for leg, ends in (("trunk", (128, 256)), ("decay-1024", (384,))):
        for end in ends:
            curves = Curves(tmp_path / "groups" / group / leg / "curves", [point.id for point in points], end)
            curves.add(Step(end // 64 - 1, end - 64, np.array([3.0, 4.0]), np.array([1.0, 2.0]), None))
            noise_Mx3 = np.array([[10, 5, 20], [np.nan, 7, np.inf]])
            curves.add(Step(end // 64, end, np.array([2.0, np.nan]), np.array([0.5, 0.25]), noise_Mx3))
            curves.write()
    table = results.curves(tmp_path)
    assert list(table.columns) == list(empty.columns) and list(table.dtypes) == list(empty.dtypes) and not len(empty)
    assert list(table["trajectory"]) == list(table["point"]) == [points[0].id] * 6 + [points[1].id] * 6
    assert list(table["leg"]) == (["decay-1024"] * 2 + ["trunk"] * 4) * 2
    assert list(table["tokens"]) == [320, 384, 64, 128, 192, 256] * 2 and list(table["step"][:3]) == [5, 6, 1]
    np.testing.assert_array_equal(table["loss"], [3, 2] * 3 + [4, np.nan] * 3)
    np.testing.assert_array_equal(table["grad_norm"], [1, 0.5] * 3 + [2, 0.25] * 3)
    np.testing.assert_array_equal(table["noise_scale_tokens"], [np.nan, 10] * 3 + [np.nan] * 6)
    np.testing.assert_array_equal(table["noise_scale_tokens_high"], [np.nan, 20] * 3 + [np.nan, np.inf] * 3)


def test_a_table_of_two_hundred_points_loads_in_less_than_a_second(tmp_path):
    over = grid.product(grid.over("optimizer.lr", [0.001 * i for i in range(1, 41)]), grid.over("train.seed", range(5)))
    horizons = tuple(128 * i for i in range(1, 9))
    plan, _ = planned(tmp_path, over, horizons, members=8)
    for name, group in plan.groups.items():
        rows = {tid: {str(h): row(1.0, h, train_loss=1.0, bits_per_byte=2.0) for h in horizons} for tid, _ in group["trajectories"]}
        record(tmp_path, name, rows)
    begun = time.process_time()
    table = results.load(tmp_path)
    assert time.process_time() - begun < 1
    assert len(table) == 1600 and (table["status"] == "finished").all()


# What is no study


def test_what_is_no_study_is_said(tmp_path):
    for path, said in (
        (
            tmp_path / "none",
            "no such file or directory; must be a study's directory, a .csv or .parquet file, or a directory of such files",
        ),
        (tmp_path / "none.csv", "no such file"),
        (tmp_path, "holds no study, there is no plan.json"),
        (Path(__file__), "must be a study's directory, a .csv or .parquet file, or a directory of such files"),
    ):
        with pytest.raises(UserError) as error:
            results.load(path)
        assert str(error.value) == f"{path}: {said}" or said in str(error.value) and str(path) in str(error.value)
    (tmp_path / "plan.json").write_text('{"points": 3}')
    for read in (results.load, results.curves, results.write_table):
        with pytest.raises(UserError, match=r"plan\.json: damaged"):
            read(tmp_path)
    assert not (tmp_path / "results.parquet").exists()


def test_a_damaged_record_is_named(study):
    directory, plan, _ = study
    path = directory / "groups" / next(iter(plan.groups)) / "group.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=rf"{path}: damaged"):
        results.load(directory)


# Other people's


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "theirs.csv"
    path.write_text("Model Size,Training FLOP,loss,colour\n1000,6e6,3.5,red\n2000,2.4e7,,blue\n")
    return path


MAPPING = {"params": "Model Size", "flops": "Training FLOP"}


def test_a_mapping_makes_theirs_ours(theirs, tmp_path):
    table = results.load(theirs, MAPPING, required=("params", "tokens", "loss"))
    assert list(table.columns) == ["params", "flops", "loss", "colour", "tokens"]
    assert list(table["tokens"]) == [1000, 2000] and table.attrs["derived"] == {"tokens": "flops / (6 params)"}  # 6e6 / 6e3, 2.4e7 / 1.2e4
    assert math.isnan(table["loss"].iloc[1])
    pandas.read_csv(theirs).to_parquet(tmp_path / "theirs.parquet")
    pandas.testing.assert_frame_equal(results.load(tmp_path / "theirs.parquet", MAPPING), table)
    both = results.load(theirs, {"params": "Model Size", "total_params": "Model Size"})
    assert list(both["params"]) == list(both["total_params"]) == [1000, 2000]
    assert "tokens" not in both and "derived" not in both.attrs


def test_a_mapping_may_multiply(tmp_path):
    pandas.DataFrame({"bs": [8, 16], "bs*2": [1.0, 2.0], "loss": [3.0, 2.0]}).to_csv(tmp_path / "t.csv", index=False)
    for theirs, wanted in (("bs*2048", [16384.0, 32768.0]), ("bs * 1e3", [8e3, 16e3]), ("bs*2", [1.0, 2.0])):  # the last is a name there
        assert results.load(tmp_path / "t.csv", {"batch_tokens": theirs})["batch_tokens"].tolist() == wanted
    with pytest.raises(UserError, match="no such column there"):
        results.load(tmp_path / "t.csv", {"batch_tokens": "size*2048"})


@pytest.mark.parametrize("name, columns", [("point", {}), ("run", {"point": "run"})])
def test_a_name_of_digits_is_no_number(tmp_path, name, columns):
    (tmp_path / "x.csv").write_text(f"{name},loss\n0123456789012345,1\n12e4567890123456,2\n")
    assert list(results.load(tmp_path / "x.csv", columns)["point"]) == ["0123456789012345", "12e4567890123456"]


def test_a_column_of_ours_that_is_mapped_elsewhere_is_theirs_no_more(tmp_path):
    pandas.DataFrame({"loss": [1.0], "smooth loss": [2.0]}).to_csv(tmp_path / "x.csv", index=False)
    table = results.load(tmp_path / "x.csv", {"loss": "smooth loss"})
    assert list(table.columns) == ["loss"] and list(table["loss"]) == [2.0]


def test_a_study_can_be_read_by_the_loss_of_another_domain(study):
    assert results.load(study[0], {"loss": "loss_code"})["loss"].iloc[1] == 4.0


@pytest.mark.parametrize(
    "columns, required, said",
    [
        (
            {"params": "Model size"},
            (),
            "columns params=Model size: no such column there (did you mean 'Model Size'?); there",
        ),
        (
            {},
            ("params", "loss", "lr"),
            "has no params, lr; columns must say params=NAME, lr=NAME, with the names there: 'Mo",
        ),
        ({}, ("tokens",), "has no tokens; columns must say tokens=NAME, "),
        ({"params": "colour"}, (), "row 1: colour is 'red': must be a number, or empty"),
    ],
)
def test_missing_columns_are_named_with_the_mapping_to_give(theirs, columns, required, said):
    with pytest.raises(UserError) as error:
        results.load(theirs, columns, required)
    assert said in str(error.value) and str(theirs) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content", [("x.csv", b""), ("x.csv", b'a,b\n"1,2\n'), ("x.csv", b"a\n\xff\n"), ("x.parquet", b"PAR1 no")])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: damaged, or no "):
        results.load(tmp_path / name)


PUBLIC = {
    "steplaw/dense_lr_bs_loss.csv": ({"params": "N", "tokens": "D", "loss": "smooth loss"}, ("params", "tokens", "lr", "loss")),
    "epoch_chinchilla/svg_extracted_data.csv": (MAPPING, ("params", "tokens", "loss")),
    "zhang_cbs/steps_to_target.csv": ({"params": "N_millions", "context": "seq_len"}, ("params", "context")),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_data_load(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    columns, required = PUBLIC[name]
    table, plain = results.load(path, columns, required), pandas.read_csv(path)
    assert len(table) == len(plain) > 40 and all(np.isfinite(table[column]).all() for column in required)
    if "flops" in table:
        np.testing.assert_allclose(6 * table["params"] * table["tokens"], plain["Training FLOP"])


def test_the_table_is_read_without_jax():
    assert subprocess.run([sys.executable, "-c", "import sys, scaling_jax.results; sys.exit('jax' in sys.modules)"]).returncode == 0


def test_a_file_with_no_column_of_ours_is_told_what_to_map(tmp_path):
    (tmp_path / "theirs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="theirs.csv: .*params, tokens, loss.*columns must say params=NAME"):
        results.load(tmp_path / "theirs.csv")
    (tmp_path / "some.csv").write_text("a,lr\n1,2\n")
    assert results.load(tmp_path / "some.csv")["lr"].tolist() == [2]


def test_files_of_a_directory_are_parts_of_one_table(tmp_path):
    first = pandas.DataFrame({"point": ["a", "a", "b"], "horizon_tokens": [1, 2, 1], "loss": [3.0, 2.0, 4.0], "seed": [0, 0, 1]})
    second = pandas.DataFrame({"point": ["b", "c"], "horizon_tokens": [1, 1], "loss": [4.0, 5.0], "model.mlp": ["gelu", "swiglu"]})
    first.to_parquet(tmp_path / "1.parquet")
    second.to_csv(tmp_path / "2.csv", index=False)
    (tmp_path / "laws.json").write_text("{}")
    table = results.load(tmp_path)
    assert list(zip(table.point, table.horizon_tokens, table.loss, strict=True)) == [("a", 1, 3), ("a", 2, 2), ("b", 1, 4), ("c", 1, 5)]
    assert table.seed[:3].tolist() == [0, 0, 1] and np.isnan(table.seed[3]) and table["model.mlp"][3] == "swiglu"
    second.assign(loss=[4.5, 5.0]).to_csv(tmp_path / "2.csv", index=False)  # then they disagree, which is for who reads it to refuse
    assert len(results.load(tmp_path)) == 5


def test_parts_of_a_table_without_points_or_horizons_lose_no_rows(tmp_path):
    pandas.DataFrame({"point": ["a"], "horizon_tokens": [8], "tokens": [8], "loss": [3.0]}).to_csv(tmp_path / "1.csv")
    theirs = pandas.DataFrame({"params": [1e5, 2e5, 3e5], "tokens": [8, 8, 9], "loss": [2.0, 2.0, 1.0]})
    theirs.to_csv(tmp_path / "2.csv", index=False)
    table = results.load(tmp_path)
    assert table.horizon_tokens.tolist() == [8, 8, 8, 9] and table.loss.tolist() == [3, 2, 2, 1]


def test_a_study_is_its_plan_and_not_the_files_beside_it(study):
    pandas.DataFrame({"point": ["x"], "loss": [1.0]}).to_parquet(study[0] / "results.parquet")
    assert "x" not in set(results.load(study[0]).point)
