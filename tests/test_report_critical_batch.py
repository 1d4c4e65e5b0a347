"""The critical batch size of a run: which definitions it has, their laws, and what of them is drawn."""

import json
import math

import matplotlib.figure
import numpy as np
import pytest

from scaling_jax.errors import UserError
from scaling_jax.laws.critical_batch import CriticalBatch
from scaling_jax.laws.law_file import read_law
from scaling_jax.report.critical_batch import critical_batch_figure, critical_batches, write_laws
from scaling_jax.report.figures import noise_figure

CONTEXT = 64
PLANTED = {"noise": 0.6, "preconditioned": 0.3}  # powers of tokens


def run_records(steps=400, metrics=("noise", "preconditioned"), depth=3, seed=0):
    """A run whose noise scales are powers of tokens, of block k (k + 1) times as large; its batch doubles half-way."""
    rng, tokens, records = np.random.default_rng(seed), 0, []
    for step in range(1, steps + 1):
        sequences = 16 if step <= steps / 2 else 32
        tokens += sequences * CONTEXT
        record = {"step": step, "tokens": tokens, "loss": 2.0, "batch_tokens": sequences * CONTEXT, "batch_sequences": sequences}
        for metric in metrics:
            prefix = "" if metric == "noise" else f"{metric}_"
            scale = 5000 * (tokens / 1e5) ** PLANTED[metric]
            grad_trace = 0.5 * scale / CONTEXT
            record[f"{prefix}grad_sq_step"] = 0.5 + 0.05 * (0.5 + grad_trace / sequences) * rng.normal()
            record[f"{prefix}grad_trace_step"] = grad_trace * (1 + 0.3 * rng.normal())
            known = step > 20
            for end, factor in (("", 1.0), ("_low", 0.8), ("_high", 1.3)):
                key = f"{prefix}noise_scale_tokens{end}"
                record[key] = scale * factor if known else None
                record[f"{key}/mlp"] = record[f"{key}/something"] = record[key]
                record[f"{key}/layers"] = [scale * factor * (k + 1) if known else None for k in range(depth)]
        records.append(record)
    return records


def branched(workdir, points):
    (workdir / "branches").mkdir()
    content = {"tolerance": 0.01, "points": [CriticalBatch("branch", *point)._asdict() for point in points]}
    (workdir / "branches" / "critical_batch.json").write_text(json.dumps(content))


BRANCHES = [(1e5, 1024.0, 512.0, 2048.0), (2e5, 2048.0, 1024.0, 4096.0), (4e5, 4096.0, 2048.0, 8192.0)]


@pytest.fixture
def drawn(monkeypatch):
    """Keeps the figure that is written, for a look at what is on it."""
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_each_definition_is_fitted_by_itself_and_written(tmp_path):
    """The planted powers of the noise, and slope 1 of branches whose batch doubles with the tokens."""
    branched(tmp_path, BRANCHES)
    found = critical_batches(tmp_path, run_records())
    laws = write_laws(tmp_path, found)
    assert set(laws) == {"noise", "preconditioned", "branch"}
    assert laws["branch"].exponent == pytest.approx(1.0) and laws["branch"](3e5) == pytest.approx(3072)
    for metric, exponent in PLANTED.items():
        assert abs(laws[metric].exponent - exponent) < 1.96 * laws[metric].exponent_se < 0.2
        assert {point.definition for point in found[metric]} == {metric}
    for definition, law in laws.items():
        assert read_law(tmp_path / "laws" / f"{definition}.json") == (definition, law)


def test_a_run_has_what_it_measured(tmp_path):
    assert set(critical_batches(tmp_path, run_records(metrics=["noise"]))) == {"noise"}
    assert critical_batches(tmp_path, run_records(5)) == {}  # too few steps for an interval
    branched(tmp_path, [BRANCHES[0], (2e5, 2048.0, None, None)])
    found = critical_batches(tmp_path, [])
    assert found == {"branch": [CriticalBatch("branch", *BRANCHES[0]), CriticalBatch("branch", 2e5, 2048.0, None, None)]}


def test_a_law_that_no_longer_holds_leaves_no_file(tmp_path):
    points = [CriticalBatch("branch", *point) for point in BRANCHES]
    write_laws(tmp_path, {"branch": points})
    assert (tmp_path / "laws" / "branch.json").exists()
    assert write_laws(tmp_path, {"branch": points[:2]}) == {}
    assert not (tmp_path / "laws" / "branch.json").exists()


POINT = {"definition": "branch", "tokens": 1e5, "batch_tokens": 512.0, "low": None, "high": None}
DAMAGED_POINTS = [POINT | {"tokens": "a"}, POINT | {"tokens": None}, POINT | {"low": "1"}, POINT | {"definition": "noise"}, {"tokens": 1}]


@pytest.mark.parametrize("content", ["{", "[]", '{"tolerance": 0.01}', *(json.dumps({"points": [point]}) for point in DAMAGED_POINTS)])
def test_a_damaged_file_of_branches_is_named(tmp_path, content):
    (tmp_path / "branches").mkdir()
    (tmp_path / "branches" / "critical_batch.json").write_text(content)
    with pytest.raises(UserError, match=r"critical_batch\.json: damaged"):
        critical_batches(tmp_path, [])


def test_every_curve_says_which_definition_it_is_and_its_power(tmp_path, drawn):
    branched(tmp_path, BRANCHES[:2])
    records = run_records()
    found = critical_batches(tmp_path, records)
    laws = write_laws(tmp_path, found)
    assert critical_batch_figure(found, laws, records, tmp_path / "a.png", {"name": "a run"})
    (figure,) = drawn
    law = laws["noise"]
    expected = f"noise, tr Σ / |G|² ∝ tokens$^{{\\,{law.exponent:.2f} \\pm {law.exponent_se:.2f}}}$"
    assert labels(figure)[0] == expected
    assert labels(figure)[1].startswith("preconditioned, tr PΣ / GᵀPG ∝ tokens$^")
    assert labels(figure)[2] == "branch, largest batch that loses nothing (too few bounded points for a fit)"
    assert labels(figure)[3:] == ["slope 1, for reference", "batch size of the run"]
    whole = figure.axes[0]
    assert whole.get_xscale() == whole.get_yscale() == "log"
    (guide,) = [line for line in whole.lines if line.get_label() == "slope 1, for reference"]
    assert np.ptp(np.log(guide.get_ydata())) == pytest.approx(np.ptp(np.log(guide.get_xdata())))


def test_the_batch_is_a_step_where_it_changed(tmp_path, drawn):
    records = run_records(metrics=["noise"], depth=0)
    found = critical_batches(tmp_path, records)
    critical_batch_figure(found, {}, records, tmp_path / "a.png")
    (line,) = [line for line in drawn[0].axes[0].lines if line.get_label() == "batch size of the run"]
    tokens, batch = line.get_xdata(), line.get_ydata()
    assert line.get_drawstyle() == "steps-pre"  # a record's batch holds for the tokens before it
    assert set(batch[tokens <= 200 * 16 * CONTEXT]) == {16 * CONTEXT} and set(batch[tokens > 200 * 16 * CONTEXT]) == {32 * CONTEXT}


def test_an_open_end_is_an_arrow_and_what_is_unknown_no_point(tmp_path, drawn):
    points = [
        (1e5, 2000.0, 1000.0, 4000.0),  # bounded
        (2e5, 3000.0, 1500.0, None),  # no upper end
        (3e5, None, 2500.0, None),  # |G|² below zero: no value either
        (4e5, 3500.0, None, 7000.0),  # no lower end
        (5e5, 3600.0, None, None),  # nothing known of its interval
        (6e5, None, None, None),
    ]
    found = {"noise": [CriticalBatch("noise", *point) for point in points]}
    assert critical_batch_figure(found, {}, [], tmp_path / "a.png")
    axes = drawn[0].axes[0]
    bottom, top = axes.get_ylim()
    arrows = sorted((note.xyann[0], note.xyann[1], note.xy[1]) for note in axes.texts)
    assert arrows == [(2e5, 3000.0, top), (3e5, 2500.0, top), (4e5, 3500.0, bottom)]
    (container,) = axes.containers
    markers, _, (bars,) = container
    known = np.isfinite(markers.get_ydata())
    np.testing.assert_array_equal(np.asarray(markers.get_xdata())[known], [1e5, 2e5, 4e5, 5e5])
    ends = {segment[0, 0]: list(segment[:, 1]) for segment in bars.get_segments() if len(segment)}
    assert ends == {1e5: [1000, 4000], 2e5: [1500, 3000], 4e5: [3500, 7000], 5e5: [3600, 3600]}


@pytest.mark.parametrize("depth", [1, 3, 32])
def test_a_panel_for_the_blocks_of_each_metric(tmp_path, drawn, depth):
    records = run_records(depth=depth)
    found = critical_batches(tmp_path, records)
    records[200]["noise_scale_tokens_low/layers"][0] = None  # a value without interval is not known
    critical_batch_figure(found, {}, records, tmp_path / "a.png")
    whole, plain, preconditioned, *bar = drawn[0].axes
    assert len(bar) == (depth > 1) and whole.get_shared_y_axes().joined(whole, plain)
    for axes, metric in ((plain, "noise"), (preconditioned, "preconditioned")):
        assert axes.get_title(loc="left").startswith("preconditioned") == (metric == "preconditioned")
        blocks = [line for line in axes.lines if line.get_linestyle() == "-"]
        assert len(blocks) == depth and len({tuple(line.get_color()) for line in blocks}) == depth
        for k, line in enumerate(blocks):
            tokens, values = np.asarray(line.get_xdata()), line.get_ydata()
            assert tokens.min() >= 0.02 * records[-1]["tokens"] and np.isnan(values[tokens <= 20 * 16 * CONTEXT]).all()
            after = tokens > 20 * 16 * CONTEXT
            if metric == "noise" and k == 0:
                assert np.isnan(values[tokens == records[200]["tokens"]]).all()
                after &= tokens != records[200]["tokens"]
            np.testing.assert_allclose(values[after], (k + 1) * 5000 * (tokens[after] / 1e5) ** PLANTED[metric])


def test_no_panel_without_blocks_and_nothing_without_points(tmp_path, drawn):
    records = run_records(metrics=["noise"], depth=0)
    assert critical_batch_figure(critical_batches(tmp_path, records), {}, records, tmp_path / "a.png")
    assert len(drawn[0].axes) == 1
    assert not critical_batch_figure({}, {}, records, tmp_path / "b.png")
    nothing = {"noise": [CriticalBatch("noise", 1e5, None, None, None)]}
    assert not critical_batch_figure(nothing, {}, [{"tokens": None}, {}], tmp_path / "c.png")
    assert [text.get_text() for text in drawn[2].texts] == ["no data"]


def test_the_noise_figure_takes_kinds_and_neither_blocks_nor_another_metric(tmp_path, drawn):
    records = run_records(depth=2)
    for record in records:
        record["preconditioned_noise_scale_tokens/attention"] = 1.0
    assert noise_figure(records, tmp_path / "noise.png")
    by_kind = drawn[0].axes[1]
    assert [text.get_text() for text in by_kind.get_legend().get_texts()] == ["mlp", "something"]
    assert min(math.log10(y) for y in drawn[0].axes[0].get_ylim()) > 1  # the other metric's 1.0 is not on it
