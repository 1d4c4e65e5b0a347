"""Kaplan's closed forms against brute force, and their published numbers as recomputed from the published constants."""

import numpy as np
import pytest

from scaling_jax.laws import kaplan_theory as theory
from scaling_jax.laws.kaplan_theory import PUBLISHED, TABLE_2, TABLE_5, TABLE_6

OTHER = PUBLISHED._replace(alpha_n=TABLE_5["alpha_n"], n_c=TABLE_5["n_c"])  # the paper's two sets of constants of L(N)
INVENTED = theory.Training(alpha_n=0.3, n_c=1e9, alpha_s=0.5, s_c=700.0, alpha_b=0.4, b_star=3e6)
SETS = pytest.mark.parametrize("k", [PUBLISHED, OTHER, INVENTED])


def test_batch_adjustment():
    """At B = B_crit twice the least steps and twice the least compute; and (S/S_min − 1)(E/E_min − 1) = 1 at any batch."""
    assert theory.min_steps(1000.0, 64.0, 64.0) == 500 and theory.min_compute(8.0, 64.0, 64.0) == 4
    batch, steps, critical = np.geomspace(1e3, 1e7, 9), 1e4, 2e5
    least_steps = theory.min_steps(steps, batch, critical)
    least_tokens = theory.min_compute(steps * batch, batch, critical)  # compute is tokens times a constant
    np.testing.assert_allclose((steps / least_steps - 1) * (steps * batch / least_tokens - 1), 1, rtol=1e-12)
    np.testing.assert_allclose(least_tokens / least_steps, critical, rtol=1e-12)


def test_critical_batch_doubles_for_each_13_percent_of_loss():
    one, other = theory.critical_batch([3.0, 3.0 * (1 - 0.1354627)], TABLE_5["b_star"], TABLE_5["alpha_b"])
    assert other / one == pytest.approx(2, rel=1e-5)


def brute_force(loss, k):
    """The size of least C_min = 6·N·S_min·B_crit(L) to a loss, and that compute in PF-days, on a fine grid."""
    params = k.n_c * loss ** (-1 / k.alpha_n) * np.geomspace(1.0000001, 1e8, 4_000_001)  # from where N alone gives the loss
    steps = k.s_c * (loss - (k.n_c / params) ** k.alpha_n) ** (-1 / k.alpha_s)
    flops = 6 * params * steps * theory.critical_batch(loss, k.b_star, k.alpha_b)
    best = flops.argmin()
    return params[best], steps[best], flops[best] / 8.64e19


@SETS
def test_closed_form_is_the_least_compute(k):
    for loss in (2.0, 3.5):
        params, steps, pf_days = brute_force(loss, k)
        found = theory.efficient(pf_days, k)
        assert found.loss == pytest.approx(loss, rel=1e-6)
        assert found.params == pytest.approx(params, rel=1e-3)
        assert found.min_steps == pytest.approx(steps, rel=1e-3)
        assert found.tokens == pytest.approx(found.min_steps * theory.critical_batch(loss, k.b_star, k.alpha_b), rel=1e-6)
        assert 6 * found.params * found.tokens / 8.64e19 == pytest.approx(pf_days, rel=1e-9)
        converged = (k.n_c / found.params) ** k.alpha_n
        assert loss / converged - 1 == pytest.approx(theory.stop_above_converged(k), rel=1e-6)


@SETS
def test_other_sizes_and_stops_by_brute_force(k):
    loss = 3.0
    params, steps, pf_days = brute_force(loss, k)
    for ratio in (0.8, 2.2):
        other_steps = k.s_c * (loss - (k.n_c / (ratio * params)) ** k.alpha_n) ** (-1 / k.alpha_s)
        found_steps, found_compute = theory.other_size(ratio, k)
        assert found_steps == pytest.approx(other_steps / steps, rel=1e-3)
        assert found_compute == pytest.approx(ratio * other_steps / steps, rel=1e-3)
    size = k.n_c * (1.02 / loss) ** (1 / k.alpha_n)  # the size whose converged loss is 2% below
    its_steps = k.s_c * (loss - loss / 1.02) ** (-1 / k.alpha_s)
    found = theory.other_stop(theory.stop_above_converged(k), 0.02, k)
    assert found == pytest.approx((params / size, steps / its_steps, params * steps / (size * its_steps)), rel=1e-3)


def test_a_model_too_small_never_reaches_the_loss():
    assert theory.other_size(0.01, INVENTED) == (np.inf, np.inf)


def test_appendix_b_with_the_papers_constants():
    exponents = [theory.compute_exponent(k) for k in (PUBLISHED, OTHER)]
    assert min(exponents) == pytest.approx(0.0520, abs=1e-4) and max(exponents) == pytest.approx(0.0525, abs=1e-4)
    assert sorted(theory.compute_scale(k) for k in (PUBLISHED, OTHER)) == pytest.approx([1.6e8, 2.2e8], rel=0.01)
    assert sorted(theory.efficient(1.0, k).params for k in (PUBLISHED, OTHER)) == pytest.approx([5.8e8, 6.0e8], rel=0.01)
    for k in (PUBLISHED, OTHER):
        assert theory.compute_exponent(k) / k.alpha_n == pytest.approx(0.68, abs=0.005)
        assert theory.compute_exponent(k) / k.alpha_s == pytest.approx(0.068, abs=0.0011)
        assert theory.stop_above_converged(k) == pytest.approx(0.10, abs=0.002)
        params, steps, compute = theory.other_stop(theory.stop_above_converged(k), 0.02, k)
        assert params == pytest.approx(2.7, abs=0.05) and 1 / steps == pytest.approx(7.7, abs=0.25)
        assert 1 - compute == pytest.approx(0.65, abs=0.01)
        steps, compute = theory.other_size([0.6, 2.2], k)
        assert compute.max() == pytest.approx(1.20, abs=0.005) and 1 - steps[1] == pytest.approx(0.45, abs=0.005)


def test_the_papers_constants_contradict_its_table_6():
    """What the closed form gives at a PF-day is less than half of what was fitted, and its exponents are others."""
    assert theory.efficient(1.0, PUBLISHED).params < 0.5 * TABLE_6["params"][0]
    assert theory.compute_exponent(PUBLISHED) / PUBLISHED.alpha_n < TABLE_6["params"][1] - 0.04
    assert theory.compute_exponent(PUBLISHED) / PUBLISHED.alpha_s > 2 * TABLE_6["min_steps"][1]


def test_intersection_of_section_6_3():
    law = (TABLE_5["alpha_c_min"], TABLE_5["c_c_min"], TABLE_5["alpha_d"], TABLE_5["d_c"])
    at, tokens, loss = theory.intersection(*law, *TABLE_6["tokens"])
    assert (at, tokens, loss) == (pytest.approx(1.1e4, rel=0.03), pytest.approx(2.5e11, rel=0.03), pytest.approx(1.67, abs=0.005))
    assert TABLE_6["params"][0] * at ** TABLE_6["params"][1] == pytest.approx(1.2e12, rel=0.04)
    assert (TABLE_5["d_c"] / tokens) ** TABLE_5["alpha_d"] == pytest.approx(loss, rel=1e-9)
    at, _, loss = theory.intersection(*law, *theory.DATA_OF_COMPUTE)
    assert (at, loss) == (pytest.approx(1.1e5, rel=0.04), pytest.approx(1.49, abs=0.005))
    assert np.isnan(theory.intersection(0.02, 1e8, 0.095, 5e13, 2e10, 0.27)).all()  # falls more slowly than its data allow


def test_overfitting_and_the_data_rule():
    k = TABLE_2
    params, data = np.array([1e6, 1e9, 1e12]), np.array([1e8, 1e10, 1e11])

    def loss(data_tokens):
        return ((k["n_c"] / params) ** (k["alpha_n"] / k["alpha_d"]) + k["d_c"] / data_tokens) ** k["alpha_d"]

    np.testing.assert_allclose(theory.overfitting(params, data, **k), loss(data) / loss(np.inf) - 1, rtol=1e-9)
    needed = theory.tokens_for(params, 0.02, **k)
    np.testing.assert_allclose(loss(needed) / loss(np.inf) - 1, 0.02, rtol=1e-9)
    assert np.log(needed[1] / needed[0]) / np.log(1e3) == pytest.approx(0.738, abs=5e-4)
    assert theory.DATA_RULE == (5e3, 0.74, 0.02)  # as printed: the exponent is that of Table 2's constants, the factor is not quite
    assert theory.DATA_RULE[1] == pytest.approx(k["alpha_n"] / k["alpha_d"], abs=0.005)
    first_order = theory.tokens_for(1.0, 1e-7, **k) * 1e-7 / 0.02  # δL is linear in 1/D where it is small
    assert first_order == pytest.approx(6.0e3, rel=0.01)
    assert 8**0.74 == pytest.approx(4.66, abs=0.005)


def test_early_stopping_bound():
    """At that step the term of L(N, S) is what overfitting adds."""
    bound = theory.least_stop(3.2, 3.0, 0.76, 2.1e3)
    assert (2.1e3 / bound) ** 0.76 == pytest.approx(0.2, rel=1e-12)
