"""`scaling-jax report`, in this process: of a table, a study, a run; and every bad input in one message with exit code 2."""

import json

import numpy as np
import pandas
import pytest
from test_report_critical_batch import BRANCHES, branched, run_records
from test_report_run import SUMMARY, with_records
from test_report_study import Page, csv, text_of
from test_results import planned, record, row

from scaling_jax.cli import main
from scaling_jax.sweep import grid

SIZES = np.array([1e5, 4e5, 1.6e6])


def theirs(path):
    loss = (8.8e13 / SIZES) ** 0.076
    pandas.DataFrame({"Model Size": SIZES, "FLOP": 6 * SIZES * 1e10, "final loss": loss}).to_csv(path, index=False)
    return str(path)


def test_a_table_of_somebody_elses(tmp_path, capsys):
    data, out = theirs(tmp_path / "theirs.csv"), tmp_path / "out"
    columns = "--columns=params=Model Size,flops=FLOP,loss=final loss"
    assert main(["report", data, columns, f"--out={out}"]) == 0
    assert capsys.readouterr().out.split() == ["report", str(out / "index.html")]
    text, parsed = text_of(out / "index.html"), Page((out / "index.html").read_text())
    assert "theirs" in text and "3 runs · 3 measurements · N = 100k to 1.6M" in text
    assert "tokens derived as flops / (6 params)" in text and "without a status, all taken as finished" in text
    assert [figure["id"] for figure in parsed.all("figure")] == ["loss_n", "loss_c"]
    assert np.allclose(csv(parsed, "loss_c")["loss"], (8.8e13 / SIZES) ** 0.076, rtol=1e-5)
    assert "The table has no noise_scale_tokens." in text


def test_a_directory_of_tables(tmp_path, capsys):
    table = pandas.DataFrame({"params": SIZES, "tokens": 1e10, "loss": (8.8e13 / SIZES) ** 0.076})
    (tmp_path / "both").mkdir()
    table[:1].to_csv(tmp_path / "both/1.csv", index=False)
    table[1:].to_parquet(tmp_path / "both/2.parquet")
    assert main(["report", str(tmp_path / "both")]) == 0
    assert "3 runs · 3 measurements · N = 100k to 1.6M" in text_of(tmp_path / "both/report/index.html")
    assert main(["fit", str(tmp_path / "both"), "--law=kaplan_n"]) == 0
    assert "alpha_n" in capsys.readouterr().out


def test_a_study_that_is_half_done(tmp_path):
    over = grid.product(grid.over("model.width", [16, 32]), grid.over("optimizer.lr", [0.1, 0.2]))
    plan, points = planned(tmp_path, over)
    narrow, _ = plan.groups
    rows = {points[0].id: {"1024": row(3.0), "4096": row(2.5, 4096)}, points[1].id: {"1024": row(2.9)}}
    record(tmp_path, narrow, rows, "running")
    assert main(["report", str(tmp_path)]) == 0
    page = tmp_path / "report" / "index.html"
    parsed, text = Page(page.read_text()), text_of(page)
    assert "3 finished" in text and "5 pending" in text and "optimizer" not in text.split("Key answers")[0]
    assert csv(parsed, "loss_curves")["lowest_loss"].tolist() == [2.9, 2.5]
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert main(["report", str(tmp_path)]) == 0
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_a_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    records = run_records(metrics=["noise"])
    with_records(run, [*records, {"step": records[-1]["step"], "tokens": records[-1]["tokens"], "eval/heldout/loss": 2.25}])
    branched(run, BRANCHES)
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"noise_scale_exponent": 0.61, "noise_scale_exponent_se": 0.02}))
    (run / "config.json").write_text(json.dumps({"config": {"model": {"width": 48}}, "identity": {}}))
    before = sorted(path.name for path in run.rglob("*"))
    assert main(["report", str(run), f"--out={tmp_path / 'out'}"]) == 0
    assert sorted(path.name for path in run.rglob("*")) == before  # no laws, no figures: they are the run's own
    parsed, text = Page((tmp_path / "out" / "index.html").read_text()), text_of(tmp_path / "out" / "index.html")
    assert [figure["id"] for figure in parsed.all("figure")] == ["loss", "noise_scale", "critical_batch"]
    assert "model.width||48" in text and "0.61 ± 0.02" in text and "heldout 2.25 nats per token" in text
    drawn = csv(parsed, "loss")
    assert drawn["loss"].dropna().tolist() == pytest.approx([r["loss"] for r in records], rel=1e-5)
    assert drawn["eval/heldout/loss"].dropna().tolist() == [2.25]
    points = csv(parsed, "critical_batch")
    branches = points[points["definition"] == "branch"]
    assert branches[["tokens", "batch_tokens", "low", "high"]].to_numpy().tolist() == [list(point) for point in BRANCHES]
    assert set(csv(parsed, "records").columns) >= {"step", "tokens", "loss", "noise_scale_tokens"}
    assert len(list((tmp_path / "out" / "figures").glob("*.p*"))) == 6


def test_a_run_that_measured_little(tmp_path):
    with_records(tmp_path, [{"step": 1, "tokens": 1024, "loss": 2.0, "batch_tokens": 1024, "batch_sequences": 16}])
    assert main(["report", str(tmp_path)]) == 0
    text = text_of(tmp_path / "report" / "index.html")
    assert "no summary: it is running, or was ended from outside" in text
    assert "No record has a noise scale" in text and "The run has no critical batch size" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "DIR is missing"),
        (["{}/nothing"], "nothing: no such directory or table"),
        (["{}/empty"], "holds neither a study, plan.json, nor a run, metrics.jsonl"),
        (["{}/t.csv"], "--out=DIR is missing: "),
        (["{}/gone.csv", "--out={}/new"], "gone.csv: no such file"),
        (["{}/t.csv", "--out={}/full"], "holds other files and no report"),
        (["{}/t.csv", "--out={}/t.csv"], "is a file; must be a directory"),
        (["{}/t.csv", "--out={}/new"], "the table has no loss"),
        (["{}/t.csv", "--out={}/new", "--columns=loss=no"], "no such column"),
        (["{}/empty", "--columns=loss=x"], "is no .csv or .parquet table; leave it out"),
        (["{}/norecords"], "metrics.jsonl: has no records"),
        (["{}/badsummary"], "summary.json: damaged"),
        (["{}/poorsummary"], "summary.json: damaged"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(tmp_path, capsys, arguments, message):
    for name in ("empty", "full", "norecords", "badsummary", "poorsummary"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    pandas.DataFrame({"params": [1.0, 2.0], "tokens": [3.0, 4.0]}).to_csv(tmp_path / "t.csv")
    (tmp_path / "norecords" / "metrics.jsonl").write_text("")
    for name, summary in (("badsummary", "{"), ("poorsummary", '{"status": "finished"}')):
        with_records(tmp_path / name, [{"step": 1, "tokens": 1024, "loss": 2.0, "batch_tokens": 1024}])
        (tmp_path / name / "summary.json").write_text(summary)
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *(argument.format(tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("scaling-jax report: ") and len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
