"""How far the measured compute frontier lies above converged losses, on simulated studies of L(N, S_min)."""

import re

import numpy as np
import pandas
import pytest
from kaplan_tables import TRAINING, frame, steps

from scaling_jax.laws import kaplan_allocation
from scaling_jax.laws.frontier import prepared, tuned

pytestmark = pytest.mark.usefixtures("quick_compilation")
TRUTH = TRAINING.alpha_n / TRAINING.alpha_s
MEASURED, CLOSED = "frontier above converged by, where sizes take over", "frontier above converged by, α_N/α_S"


def numbers(finding):
    return {number.name: number for number in finding.numbers}


def test_the_frontier_is_as_far_above_converged_as_the_closed_form_has_it():
    table = steps(np.random.default_rng(0), sizes=tuple(1e4 * 2.0 ** np.arange(9)), lrs=(1.0,))
    found = numbers(kaplan_allocation.allocation(table))
    assert found[MEASURED].value == pytest.approx(TRUTH, rel=0.04) and found[CLOSED].value == pytest.approx(TRUTH, rel=0.02)
    assert found[MEASURED].low < found[MEASURED].value < found[MEASURED].high
    assert found[MEASURED].published == found[CLOSED].published == 0.1


def plain(sizes, batch=2048, noise=3e-4):
    """Sizes × horizons at one batch size, of which B_crit is not known: L(N, S) of plain steps."""
    sizes, tokens = np.meshgrid(sizes, np.geomspace(2**16, 2**27, 23), indexing="ij")
    points = pandas.DataFrame({"params": sizes.ravel(), "tokens": tokens.ravel(), "batch_tokens": batch, "lr": 1.0, "seed": 0})
    points["point"] = points["params"].astype(str)
    loss = (3e9 / points["params"]) ** 0.12 + (100 * batch / points["tokens"]) ** 0.6
    return frame(points.to_dict("records"), loss.to_numpy(), np.random.default_rng(1), noise)


def test_without_a_critical_batch_it_is_by_plain_steps():
    """Of compute as spent the optimum is α_N/α_S above converged as well: here 0.2."""
    finding = kaplan_allocation.allocation(plain(1e4 * 2.0 ** np.arange(9)))
    found = numbers(finding)
    for name in (MEASURED, CLOSED):
        assert found[name].value == pytest.approx(0.2, rel=0.05)
        assert found[name].low - 0.01 < 0.2 < found[name].high + 0.01
    assert any(
        re.match(r"the measured frontier over L\(N, ∞\), less 1, a mean of \d+ budgets, is 0\.(19|2)", said) for said in finding.statements
    )
    assert any("closed form of Appendix B cannot be had" in sentence for sentence in finding.statements)


def test_the_best_size_between_two_of_a_coarse_ladder():
    """Its loss and size have closed forms; the loss where courses cross is more than 1% higher."""
    table = plain(1e4 * 4.0 ** np.arange(5), noise=0.0)
    points = kaplan_allocation.frontier_losses(tuned(prepared(table, ()), ("size", "horizon")), "flops")
    assert len(points) == 3  # of 4 takeovers one was passed by two sizes only
    steps = points["flops"] / (6 * points["params"] * 2048)
    np.testing.assert_allclose(points["loss"], (3e9 / points["params"]) ** 0.12 + (100 / steps) ** 0.6, rtol=7e-3)
    np.testing.assert_allclose(points["loss"] / (3e9 / points["params"]) ** 0.12, 1.2, rtol=5e-3)


def test_without_converged_losses_there_is_no_number():
    """Four sizes are too few for the four constants of L(N, S) to have intervals."""
    finding = kaplan_allocation.allocation(plain(1e4 * 4.0 ** np.arange(4)))
    found = numbers(finding)
    for name in (MEASURED, CLOSED):
        assert found[name].value is None and "not identified" in found[name].note
    assert any("how far the frontier is above L(N, ∞) cannot be told" in sentence for sentence in finding.statements)


def test_rows_without_a_noise_scale_are_counted_where_it_stands_for_the_critical_batch():
    table = plain(1e4 * 2.0 ** np.arange(9)).assign(noise_scale_tokens=4096.0)
    whole = kaplan_allocation.allocation(table)
    assert "B_crit is each row's noise scale (noise_scale_tokens), to a factor of 2 at 95%" in whole.statements
    table.loc[table["params"] == 1e4, "noise_scale_tokens"] = np.nan
    few = kaplan_allocation.allocation(table)
    left_out = "to a factor of 2 at 95%; 23 of 207 settings and horizons, whose B_crit is not known, are left out"
    assert any(left_out in sentence for sentence in few.statements)
