"""Figures of a run: what they are computed from, and that no gap in the records breaks them."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.report.figures import human_tokens, loss_figure, noise_bins, noise_exponent, noise_figure

CONTEXT, SEQUENCES = 64, 16
EXPONENT = 0.6


def run_records(steps=800, noise=0.1, seed=0):
    """A run whose noise scale is 5000·(tokens/1e5)^0.6 tokens and whose loss is a power law, with evaluations every 100 steps."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        tokens = step * SEQUENCES * CONTEXT
        grad_sq = 0.5 * (tokens / 1e5) ** -0.4
        grad_trace = grad_sq * 5000 * (tokens / 1e5) ** EXPONENT / CONTEXT
        running = grad_trace / grad_sq * CONTEXT
        known, bounded = step > 40, step > 100
        record = {
            "tokens": tokens,
            "loss": 1.2 + 3.5 * (tokens / 1e3 + 1) ** -0.3 + 0.05 * rng.normal(),
            "batch_tokens": SEQUENCES * CONTEXT,
            "batch_sequences": SEQUENCES,
            "grad_sq_step": grad_sq + noise * (grad_sq + grad_trace / SEQUENCES) * rng.normal(),
            "grad_trace_step": grad_trace * (1 + 0.3 * rng.normal()),
            "noise_scale_tokens": running if known else None,
            "noise_scale_tokens_low": running / 1.3 if known else None,
            "noise_scale_tokens_high": running * 1.3 if bounded else None,
        }
        for kind, factor in {"mlp": 1.0, "embedding": 0.3, "attention": 1.5, "unembedding": 4.0}.items():
            record[f"noise_scale_tokens/{kind}"] = running * factor if known else None
        records.append(record)
        if step % 100 == 0:
            loss = 1.25 + 3.5 * (tokens / 1e3 + 1) ** -0.3
            records.append({"tokens": tokens, "eval/a/loss": loss, "eval/a/loss_se": 0.02, "eval/a/bits_per_byte": loss / math.log(2)})
    return records


def is_png(path, inches):
    """A PNG of this size at 160 dots per inch."""
    header = Path(path).read_bytes()[:24]
    size = tuple(int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
    return header[:8] == b"\x89PNG\r\n\x1a\n" and size == tuple(round(160 * i) for i in inches)


def test_planted_exponent_is_recovered():
    law = noise_exponent(run_records(2000))
    assert abs(law.exponent - EXPONENT) < 1.96 * law.exponent_se
    assert law.exponent_se < 0.08


def test_exponent_is_covered_by_its_interval():
    laws = [noise_exponent(run_records(400, noise=0.2, seed=seed)) for seed in range(40)]
    covered = np.mean([abs(law.exponent - EXPONENT) < 1.96 * law.exponent_se for law in laws])
    assert covered >= 0.88  # 95% of 40, less two of its standard deviations


def test_one_bin_is_the_ratio_of_token_weighted_means():
    records = [
        {"tokens": 1000.0 + i, "batch_tokens": 64 * b, "batch_sequences": b, "grad_sq_step": 1.0 + i, "grad_trace_step": 10.0 + (-1) ** i}
        for i, b in enumerate([4, 8, 8, 16] * 8)
    ]
    (found,) = noise_bins(records, bins=1, blocks=16)
    weights = [r["batch_tokens"] for r in records]
    grad_sq, grad_trace = (np.average([r[key] for r in records], weights=weights) for key in ("grad_sq_step", "grad_trace_step"))
    assert found["noise_scale_tokens"] == pytest.approx(64 * grad_trace / grad_sq, rel=1e-5)
    assert found["low"] < found["noise_scale_tokens"] < found["high"]
    assert 1000 <= found["tokens"] <= 1031


def test_bins_leave_out_the_transient_and_cover_the_rest():
    records = run_records(2000)
    bins = noise_bins(records)
    tokens = [b["tokens"] for b in bins]
    assert len(bins) == 10 and tokens == sorted(tokens)
    assert tokens[0] > 0.02 * 2000 * SEQUENCES * CONTEXT
    truth = [5000 * (t / 1e5) ** EXPONENT for t in tokens]
    inside = sum(b["low"] <= y <= b["high"] for b, y in zip(bins, truth, strict=True))
    assert inside >= 8
    assert all(b["tokens"] > 1e6 for b in noise_bins(records, from_tokens=1e6))


def test_a_gradient_lost_in_noise_gives_no_ratio_and_no_upper_end():
    records = [r | {"grad_sq_step": 1e-3 * math.cos(7.0 * i)} for i, r in enumerate(run_records(600)) if "loss" in r]
    bins = noise_bins(records)
    assert any(b["high"] is None for b in bins)
    assert all(b["noise_scale_tokens"] is None or b["noise_scale_tokens"] > 0 for b in bins)


def test_too_few_steps_give_no_interval():
    assert noise_bins([]) == []
    assert noise_exponent([]) is None
    (found,) = noise_bins(run_records(5))
    assert found["low"] is None and found["high"] is None
    assert noise_exponent(run_records(5)) is None


@pytest.mark.parametrize("steps", [30, 800])
def test_figures_of_a_run(tmp_path, steps):
    records = run_records(steps)
    assert loss_figure(records, tmp_path / "loss.png", {"name": "a run"}) is True
    assert noise_figure(records, tmp_path / "noise.png", {"name": "a run"}) is True
    assert is_png(tmp_path / "loss.png", (7.2, 4.6))
    assert is_png(tmp_path / "noise.png", (11.5, 5.4) if steps > 40 else (7.2, 5.6))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_very_short_runs(tmp_path, count):
    records = run_records(count)
    assert loss_figure(records, tmp_path / "loss.png") is (count > 0)
    assert noise_figure(records, tmp_path / "noise.png") is False  # nothing is known of the noise yet
    assert is_png(tmp_path / "loss.png", (7.2, 4.6)) and is_png(tmp_path / "noise.png", (7.2, 4.6))


def test_missing_and_infinite_values(tmp_path):
    records = run_records(200)
    for i, record in enumerate(records):
        key = list(record)[i % len(record)]
        record[key] = (None, math.nan, math.inf)[i % 3]
        record.pop(list(record)[(3 * i + 1) % len(record)])
    assert loss_figure(records, tmp_path / "loss.png") and noise_figure(records, tmp_path / "noise.png")
    nothing = [{"tokens": None, "loss": None}, {"tokens": 10, "loss": None, "noise_scale_tokens": None}, {}]
    assert not loss_figure(nothing, tmp_path / "loss.png") and not noise_figure(nothing, tmp_path / "noise.png")


def test_only_evaluations_or_domains_that_disagree_on_bytes(tmp_path):
    evaluations = [r for r in run_records(300) if "loss" not in r]
    assert loss_figure(evaluations, tmp_path / "loss.png")
    for record in evaluations:
        record |= {"eval/b/loss": 2.0, "eval/b/bits_per_byte": 0.7}
    assert loss_figure(evaluations, tmp_path / "loss.png", {"bits_per_token_to_byte": 0.25})
    assert loss_figure(evaluations, tmp_path / "loss.png")


@pytest.mark.parametrize("tokens, text", [(0, "0"), (500, "500"), (1000, "1k"), (2.5e6, "2.5M"), (1e9, "1B"), (3e12, "3T")])
def test_human_tokens(tokens, text):
    assert human_tokens(tokens) == text


def test_no_global_plotting_state():
    code = """
import sys
from scaling_jax.report import figures
assert not {"matplotlib", "jax"} & set(sys.modules), "slow to import"
figures.loss_figure([{"tokens": 1, "loss": 2.0}], sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code, "/dev/null"], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
