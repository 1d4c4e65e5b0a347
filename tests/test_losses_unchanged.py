"""The verdicts of benchmarks/losses_unchanged.py, on numbers made by hand."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("losses_unchanged", FOLDER / "losses_unchanged.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("factor, unchanged", [(1 + 2e-6, True), (1 + 2e-5, False)])
def test_one_step_that_differs_is_found(script, factor: float, unchanged: bool):
    theirs = {"losses": np.array([3.0, 2.0]), "gradient_norms": np.array([1.0, 1.0]), "w": np.array([3.0, 4.0])}
    ours = theirs | {"losses": theirs["losses"] * [1.0, factor], "w": np.array([3.0, 4.5])}
    row = script.differences(ours, theirs)
    assert row["losses"] == pytest.approx(factor - 1, rel=1e-6) and row["unchanged"] is unchanged
    assert row["parameters"] == pytest.approx(0.5 / 5.0) and row["gradient_norms"] == 0.0


@pytest.mark.parametrize("shift, unchanged", [(0.01, True), (0.03, False), (-0.03, False)])
def test_the_mean_difference_is_held_against_a_runs_standard_error(script, shift: float, unchanged: bool):
    rows = [
        {"seed": seed, "float32": 1.3, "bfloat16": 1.3 + d, "difference": d, "standard_error_of_a_run": 0.02}
        for seed, d in enumerate((shift - 0.001, shift + 0.001))
    ]
    row = script.mean_row(rows)
    assert row["difference"] == pytest.approx(shift) and row["unchanged"] is unchanged
    assert row["standard_error"] == pytest.approx(0.001)  # of two that lie 0.002 apart: their scatter √2·0.001, over √2
