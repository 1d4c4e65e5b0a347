"""The clocks of benchmarks/loop_shares.py, on times made by hand and on a run that is made slow where they are to see it."""

import importlib
import time
from pathlib import Path

import pytest
from helpers import small_config

from scaling_jax.train import loop
from scaling_jax.train.batches import Batches
from scaling_jax.train.evaluate import Evaluator

STEP = 128  # tokens


@pytest.fixture(scope="module")
def shares():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("loop_shares")


def test_shares_of_times_made_by_hand(shares):
    clocks = shares.Clocks()
    # Dispatched while the one before runs; 2 s late; right after 3 s of evaluation and save, and half a second; beside a save.
    times = [(0, 1, False), (0.5, 2, False), (4, 5, False), (8.5, 9.5, False), (9, 11, True)]
    clocks.steps = [shares.Step(*step) for step in times]
    clocks.spans = {"evaluation": [(-4, -3), (5, 7)], "saving": [(7, 8)], "last save": [(10.5, 11)], "waiting for data": [(0.5, 3.5)]}
    clocks.cpu = {"records": 0.25}
    seconds = {"evaluation": 2, "saving": 1, "slower steps": 0.5, "last save": 0.5, "records": 0.25, "together": 4.25}
    seconds |= {"idle device": 2.5, "waiting for data": 2.5, "report": 0, "the run": 10}
    rows = shares.rows_of(clocks)
    assert [row["name"] for row in rows] == list(seconds)
    assert [row["seconds"] for row in rows] == pytest.approx(list(seconds.values()))
    assert [row["share"] for row in rows] == pytest.approx([value / 10 for value in seconds.values()])


def test_a_run_that_is_made_slow(shares, tmp_path, monkeypatch, quick_compilation):
    evaluate, read = Evaluator.__call__, Batches.read

    def slow_evaluation(self, params):
        time.sleep(0.3)
        return evaluate(self, params)

    def slow_read(self, key):
        time.sleep(0.06)
        return read(self, key)

    monkeypatch.setattr(Evaluator, "__call__", slow_evaluation)
    monkeypatch.setattr(Batches, "read", slow_read)
    config = small_config(train__tokens=20 * STEP, eval__every_tokens=10 * STEP, checkpoint__every_tokens=10 * STEP, data__prefetch=1)
    with shares.clocks_on_the_loop() as clocks:
        loop.train(config, tmp_path / "run")
    seconds = {row["name"]: row["seconds"] for row in shares.rows_of(clocks)}
    assert len(clocks.steps) == 20 and len(clocks.spans["saving"]) == 2
    assert 0.6 < seconds["evaluation"] < seconds["the run"]
    assert seconds["waiting for data"] > 0.4  # 19 reads of 60 ms, of which steps of a few ms hide little
    assert 0.4 < seconds["idle device"] < seconds["the run"] - 0.6
    assert seconds["records"] > 0 and seconds["saving"] > 0
