"""The noise scale in bins of a run with a planted law: the bins hold the truth, and its power is found again."""

import math

import numpy as np
import pytest

from scaling_jax.errors import UserError
from scaling_jax.laws.noise_bins import noise_bins, noise_exponent

CONTEXT, SEQUENCES = 64, 16
EXPONENT = 0.6


def run_records(steps=800, noise=0.1, seed=0):
    """A run whose noise scale is 5000·(tokens/1e5)^0.6 tokens, with an evaluation, which holds no noise, every 100 steps."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        tokens = step * SEQUENCES * CONTEXT
        grad_sq = 0.5 * (tokens / 1e5) ** -0.4
        grad_trace = grad_sq * 5000 * (tokens / 1e5) ** EXPONENT / CONTEXT
        record = {
            "tokens": tokens,
            "batch_tokens": SEQUENCES * CONTEXT,
            "batch_sequences": SEQUENCES,
            "grad_sq_step": grad_sq + noise * (grad_sq + grad_trace / SEQUENCES) * rng.normal(),
            "grad_trace_step": grad_trace * (1 + 0.3 * rng.normal()),
        }
        records.append(record)
        if step % 100 == 0:
            records.append({"tokens": tokens, "eval/a/loss": 2.0})
    return records


def test_planted_exponent_is_recovered():
    law = noise_exponent(run_records(2000))
    assert abs(law.exponent - EXPONENT) < 1.96 * law.exponent_se
    assert law.exponent_se < 0.08


def test_exponent_is_covered_by_its_interval():
    laws = [noise_exponent(run_records(400, noise=0.2, seed=seed)) for seed in range(40)]
    covered = np.mean([abs(law.exponent - EXPONENT) < 1.96 * law.exponent_se for law in laws])
    assert covered >= 0.88  # 95% of 40, less two of its standard deviations


def test_one_bin_is_the_ratio_of_token_weighted_means():
    rng = np.random.default_rng(0)
    records = [
        {
            "tokens": 1000.0 + i,
            "batch_tokens": 64 * b,
            "batch_sequences": b,
            "grad_sq_step": rng.uniform(1, 3),
            "grad_trace_step": rng.uniform(9, 11),
        }
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
    records = [r | {"grad_sq_step": 1e-3 * math.cos(7.0 * i)} for i, r in enumerate(run_records(600)) if "grad_sq_step" in r]
    bins = noise_bins(records)
    assert any(b["high"] is None for b in bins)
    assert all(b["noise_scale_tokens"] is None or b["noise_scale_tokens"] > 0 for b in bins)


def test_too_few_steps_give_no_interval():
    assert noise_bins([]) == []
    assert noise_exponent([]) is None
    (found,) = noise_bins(run_records(5))
    assert found["low"] is None and found["high"] is None
    assert noise_exponent(run_records(5)) is None


@pytest.mark.parametrize("value", ["x", [1.0], 10**400, True])
def test_a_record_that_holds_no_number_is_named(value):
    with pytest.raises(UserError, match=r"row 2 of the table: grad_sq_step is .*; it must be a number, or None"):
        noise_bins([*run_records(1), run_records(1)[0] | {"grad_sq_step": value}])
