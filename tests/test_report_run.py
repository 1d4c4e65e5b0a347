"""The table, the figures and the laws that a run leaves."""

import json

import pytest
from test_report_critical_batch import BRANCHES, PLANTED, branched, run_records

from scaling_jax.laws.law_file import read_law
from scaling_jax.report.run import draw_critical_batch, report_run

SUMMARY = {"status": "finished", "tokens": 1000, "steps": 10, "params": 10, "total_params": 20, "train_loss": 2.0, "timing": {"seconds": 3}}


def with_records(workdir, records):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return workdir


def test_the_table_names_both_noise_scales_their_growth_laws_and_figures(tmp_path):
    measured = {"noise_scale_tokens": 9000.0, "noise_scale_tokens_low": 7000.0, "noise_scale_tokens_high": None}
    measured |= {f"preconditioned_{key}": value and value / 10 for key, value in measured.items()}
    table = report_run(with_records(tmp_path, run_records()), SUMMARY | measured).table.splitlines()
    rows = [line[:24].strip() for line in table]
    after = rows.index("training loss") + 1
    assert rows[after : after + 4] == ["noise scale", "its growth", "preconditioned noise", "its growth"]
    assert table[after].endswith("9k tokens, 95% interval 7k to ∞") and table[after + 2].endswith("900 tokens, 95% interval 700 to ∞")
    kept = json.loads((tmp_path / "summary.json").read_text())
    for metric, prefix in (("noise", ""), ("preconditioned", "preconditioned_")):
        exponent, error = (kept[f"{prefix}noise_scale_exponent{end}"] for end in ("", "_se"))
        assert abs(exponent - PLANTED[metric]) < 1.96 * error
        assert (exponent, error) == read_law(tmp_path / "laws" / f"{metric}.json")[1][:2]
    files = [line[24:] for line, name in zip(table, rows, strict=True) if name in ("law", "figure")]
    expected = ["laws/noise.json", "laws/preconditioned.json", "figures/loss.png", "figures/noise_scale.png", "figures/critical_batch.png"]
    assert files == [str(tmp_path / name) for name in expected]
    assert all((tmp_path / name).exists() for name in expected)


def test_a_run_without_noise_has_no_such_rows(tmp_path):
    records = [{"step": 1, "tokens": 1024, "loss": 2.0, "batch_tokens": 1024, "batch_sequences": 16}]
    table = report_run(with_records(tmp_path, records), dict(SUMMARY)).table.splitlines()
    assert [line[:24].strip() for line in table] == ["status", "tokens", "parameters", "training loss", "time", "figure"]
    assert draw_critical_batch(tmp_path) is None and not (tmp_path / "laws").exists()


def test_a_noise_scale_that_is_not_known_is_no_number(tmp_path):
    unknown = {"noise_scale_tokens": None, "noise_scale_tokens_low": 7000.0, "noise_scale_tokens_high": None}
    table = report_run(tmp_path, SUMMARY | unknown).table
    assert "not known, 95% interval 7k to ∞" in table and "∞ tokens" not in table


def test_branches_join_the_figure_of_a_run_that_has_ended(tmp_path):
    with_records(tmp_path, run_records(metrics=["noise"]))
    report_run(tmp_path, dict(SUMMARY))
    before = (tmp_path / "figures" / "critical_batch.png").read_bytes()
    branched(tmp_path, BRANCHES)
    assert draw_critical_batch(tmp_path) == tmp_path / "figures" / "critical_batch.png"
    assert (tmp_path / "figures" / "critical_batch.png").read_bytes() != before
    definition, law = read_law(tmp_path / "laws" / "branch.json")
    assert definition == "branch" and law.exponent == pytest.approx(1.0)
    (tmp_path / "metrics.jsonl").write_text("")
    noise = (tmp_path / "laws" / "noise.json").read_text()
    draw_critical_batch(tmp_path)
    assert (tmp_path / "laws" / "noise.json").read_text() == noise
