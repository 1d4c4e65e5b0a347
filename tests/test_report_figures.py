"""Figures of a run: that they are drawn, and that no gap in the records breaks them."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.report.figures import human_tokens, loss_figure, noise_figure

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
