"""What is decided by measuring, on timings of the test's own; and one that is real."""

import pytest
from helpers import small_config

from scaling_jax.config import flatten
from scaling_jax.sweep import measure
from scaling_jax.sweep.measure import Timing, decide_class, decide_dtype, estimate
from scaling_jax.train import compute_dtype

VALUES = flatten(small_config(noise_scale__every=0))


def timed(monkeypatch, seconds, peak_bytes=1000):
    """`seconds` of a step, by the number of members."""
    asked = []

    def time_steps(population):
        asked.append(population.members)
        return Timing(seconds[population.members], peak_bytes * population.members)

    monkeypatch.setattr(measure, "time_steps", time_steps)
    return asked


def test_together_where_a_step_of_all_takes_less_for_each(monkeypatch):
    asked = timed(monkeypatch, {1: 1.0, 8: 7.9})
    decided = decide_class(VALUES, 8, 16)
    assert (decided["members"], decided["seconds_per_step"], asked) == (8, {"1": 1.0, "8": 7.9}, [1, 8])
    assert decided["params"] == 12 * 2 * 16**2 and decided["total_params"] == 12 * 2 * 16**2 + 2 * 256 * 16


def test_one_by_one_where_that_is_faster(monkeypatch):
    asked = timed(monkeypatch, {1: 1.0, 16: 20.0, 4: 4.4})
    assert decide_class(VALUES, 40, 16)["members"] == 1
    assert asked == [1, 16, 4]


def test_a_part_of_them_where_all_are_too_many(monkeypatch):
    timed(monkeypatch, {1: 1.0, 16: 20.0, 4: 3.0})
    assert decide_class(VALUES, 16, 16)["members"] == 4


def test_no_more_than_memory_has_room_for(monkeypatch):
    timed(monkeypatch, {1: 1.0, 6: 3.0}, peak_bytes=100)
    monkeypatch.setattr(measure, "memory_bytes", lambda cpus: 800)
    decided = decide_class(VALUES, 16, 16)
    assert decided["members"] == 6 and "memory has room for 6" in decided["why"]  # 80% of 800 bytes


def test_one_alone_is_not_timed(monkeypatch):
    asked = timed(monkeypatch, {})
    assert decide_class(VALUES, 1, 16)["members"] == 1 and decide_class(VALUES, 16, 1)["members"] == 1 and not asked


def test_a_study_measures_its_dtype_as_a_run_does(monkeypatch):
    asked = []

    def time_dtypes(config, mesh, hosts):
        asked.append((config.model.width, config.noise_scale.every, mesh))
        return {"float32": 1.0, "bfloat16": 0.5}

    monkeypatch.setattr(compute_dtype, "time_dtypes", time_dtypes)
    monkeypatch.setattr(compute_dtype, "_cpu_flags", lambda: compute_dtype.BFLOAT16_UNITS)
    assert decide_dtype(VALUES).compute_dtype == "bfloat16" and asked == [(16, 0, None)]


def test_classes_that_are_not_measured_are_as_slow_as_their_like_flop_for_flop(monkeypatch):
    monkeypatch.setattr(measure, "_forward_seconds", lambda config: 1e-3 * config.train.batch_tokens)
    small, large = VALUES | {"train.batch_tokens": 128}, VALUES | {"train.batch_tokens": 1024}
    both = estimate({"small": (small, 1280), "large": (large, 10240)})
    assert both["large"] == pytest.approx(8 * both["small"])  # a token takes the same
    assert both["small"] == pytest.approx(1.28 / measure.FORWARD_SHARE)
    other = estimate({"large": (large, 10240), "wide": (large | {"model.width": 32}, 10240)}, budget_seconds=0.0)
    flops = [measure.model_size(large | {"model.width": width})["flops_per_token"] for width in (16, 32)]
    assert other["wide"] / other["large"] == pytest.approx(flops[1] / flops[0])


def test_a_step_is_really_timed():
    timing = measure.time_steps(measure.Population(measure.config_of(VALUES), 2))
    state_bytes = 3 * 4 * 2 * (12 * 2 * 16**2 + 2 * 256 * 16)  # parameters and two moments, of two members
    assert 0 < timing.seconds < 10 and state_bytes < timing.peak_bytes < 100 * state_bytes


def test_memory_is_shared_by_the_groups_that_train_at_a_time(monkeypatch):
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda _: range(8))
    assert measure.memory_bytes(8) == pytest.approx(4 * measure.memory_bytes(2), rel=0.2)
