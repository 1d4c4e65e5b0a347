"""`scaling-jax fit`, in this process: a table's laws with intervals, and every bad input in one message with exit code 2."""

import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from scaling_jax.cli import main
from scaling_jax.laws import catalogue
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


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/laws.json", "cannot be written: "),
        ("theirs.csv", "theirs.csv: is there already and is no laws.json; nothing is overwritten"),
        ("notes.json", "notes.json: is there already and is no laws.json"),
        (".", "is a directory; must be a file, for example "),
    ],
)
def test_out_that_is_no_place_for_laws(tmp_path, capsys, monkeypatch, out, message):
    """Said before anything is fitted, and nothing is lost."""
    monkeypatch.setattr(catalogue, "analyse", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    data = write(tmp_path / "theirs.csv")
    before = Path(data).read_bytes()
    assert main(["fit", data, COLUMNS, "--law=kaplan_n", f"--out={tmp_path / out}"]) == 2
    assert message in capsys.readouterr().err
    assert Path(data).read_bytes() == before and (tmp_path / "notes.json").read_text() == '{"mine": 1}'


def test_earlier_laws_are_replaced(tmp_path):
    data, out = write(tmp_path / "theirs.csv"), tmp_path / "new" / "laws.json"
    for _ in range(2):
        assert main(["fit", data, COLUMNS, "--law=kaplan_n", f"--out={out}"]) == 0


def test_too_few_points_for_any_law(tmp_path, capsys):
    rows = pandas.DataFrame(
        {"params": [1e6] * 3, "tokens": [1e7] * 3, "batch_tokens": [1024] * 3, "lr": [1e-3, 2e-3, 4e-3], "loss": [3.0, 2.9, 2.8]}
    )
    rows.to_csv(tmp_path / "few.csv", index=False)
    assert main(["fit", str(tmp_path / "few.csv"), f"--out={tmp_path}/laws.json"]) == 2
    assert "none of the laws can be fitted to its 3 finished rows" in capsys.readouterr().err
    assert not (tmp_path / "laws.json").exists()


def test_columns():
    assert parse_columns("params=N, loss = smooth loss ,batch_tokens=bs*2048") == {
        "params": "N",
        "loss": "smooth loss",
        "batch_tokens": "bs*2048",
    }
    assert parse_columns("") == {}


def test_a_law_that_is_identified_in_part_is_told(capsys):
    """Of shapes that get better up to the edge of what was tried: the excess is known, the best aspect is not."""
    assert main(["fit", str(Path(__file__).parents[1] / "studies/first/kaplan_shape"), "--law=kaplan_shape"]) == 0
    out = capsys.readouterr().out
    assert "largest excess over the best shape" in out and "best_aspect is not identified" in out
