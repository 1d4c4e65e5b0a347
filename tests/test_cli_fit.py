"""`scaling-jax fit`, in this process: a table's laws with intervals, and every bad input in one message with exit code 2."""

import json

import numpy as np
import pandas
import pytest

from scaling_jax.cli import main
from scaling_jax.verbs.columns import parse_columns

SIZES = np.geomspace(1e5, 1e9, 12)


def write(path, **columns):
    rng = np.random.default_rng(0)
    loss = (8.8e13 / SIZES) ** 0.076 * np.exp(0.01 * rng.normal(size=12))
    frame = pandas.DataFrame({"Model Size": SIZES, "FLOP": 6 * SIZES * 1e10, "final loss": loss} | columns)
    frame.to_csv(path, index=False)
    return str(path)


COLUMNS = "--columns=params=Model Size,flops=FLOP,loss=final loss"


def test_a_table_of_somebody_elses(tmp_path, capsys):
    data, out = write(tmp_path / "theirs.csv"), tmp_path / "laws.json"
    assert main(["fit", data, COLUMNS, "--law=kaplan_n,kaplan_d", f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "tokens are not in the table: flops / (6 params)" in said
    row = next(line for line in said.splitlines() if " alpha_n " in line)
    value, low, high, published = (float(row.split()[i]) for i in (2, 3, 5, 6))
    assert low < 0.076 < high and low < value < high and published == 0.076
    assert "not fitted" in said and "kaplan_d: " in said
    content = json.loads(out.read_text())
    assert content["data"]["derived"] and content["laws"]["kaplan_n"]["fits"]["kaplan_n"]["parameters"]["alpha_n"]["published"] == 0.076
    assert list(tmp_path.iterdir()) == [tmp_path / "theirs.csv", out] or sorted(tmp_path.iterdir()) == sorted(
        [tmp_path / "theirs.csv", out]
    )


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({}, ["--law=kaplan"], "--law=kaplan: no such law; must be all, or of lr_optimum,"),
        ({}, ["--law=,"], "--law=,: must be all, or of "),
        ({}, ["--law=kaplan_d"], "kaplan_d: needs data_tokens, which the table does not have; --columns='data_tokens=NAME' says what"),
        ({"final loss": [np.nan] * 12}, ["--law=kaplan_n"], "the table has no loss"),
        ({"final loss": [-1.0, *[3.0] * 11]}, ["--law=kaplan_n"], "row 1: loss is -1"),
        ({"status": ["diverged"] * 12}, ["--law=kaplan_n"], "none of the 12 rows is finished: 12 diverged"),
        ({"tokenizer": ["bpe", "bytes"] * 6}, ["--law=kaplan_n"], "several tokenizer (bpe, bytes)"),
        ({"Model Size": [1e6] * 12, "FLOP": [6e16] * 12}, ["--law=kaplan_n"], "are one run"),
        ({}, ["--columns=params"], "--columns=params: 'params' must be OURS=THEIRS"),
        ({}, ["--columns=params=Model Size,params=FLOP"], "params is given twice"),
        ({}, ["--columns=params=Model size"], "no such column there (did you mean 'Model Size'?)"),
    ],
)
def test_bad_input(tmp_path, capsys, columns, arguments, message):
    data = write(tmp_path / "theirs.csv", **columns)
    arguments = arguments if arguments[0].startswith("--columns") else [COLUMNS, *arguments]
    assert main(["fit", data, *arguments, f"--out={tmp_path}/laws.json"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("scaling-jax fit: ")
    assert not (tmp_path / "laws.json").exists()


def test_no_data(tmp_path, capsys):
    assert main(["fit"]) == 2 and "DATA is missing" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "none")]) == 2 and "no such file or directory" in capsys.readouterr().err
    assert main(["fit", str(tmp_path)]) == 2 and "holds no study" in capsys.readouterr().err


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["fit", write(tmp_path / "theirs.csv"), COLUMNS, "--law=kaplan_n", f"--out={tmp_path}/file/laws.json"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_columns():
    assert parse_columns("params=N, loss = smooth loss ,batch_tokens=bs*2048") == {
        "params": "N",
        "loss": "smooth loss",
        "batch_tokens": "bs*2048",
    }
    assert parse_columns("") == {}
