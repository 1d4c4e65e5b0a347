"""The five definitions of the critical batch size: planted values come back, intervals hold them, published figures are met."""

import csv
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.errors import UserError
from scaling_jax.laws.critical_batch import CriticalBatch, branch, kink, kink_fit, law, noise, overhead, tradeoff, tradeoff_fit
from scaling_jax.laws.power_law import power_law

ROOT = Path(__file__).parents[1]
SHARED = ROOT / os.environ.get("SCALING_JAX_SHARED", "../shared")
_SPEC = importlib.util.spec_from_file_location("critical_batch_quadratic", ROOT / "benchmarks" / "critical_batch_quadratic.py")
quadratic = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(quadratic)

BATCHES = 512.0 * 2 ** np.arange(6, 15)


def steps_table(critical, batches=BATCHES, error=0.0, rng=None):
    """Steps to a loss for S_min = 1500, with log-normal errors."""
    errors = np.zeros(len(batches)) if rng is None else error * rng.normal(size=len(batches))
    return [{"batch_tokens": b, "steps": 1500 * (1 + critical / b) * np.exp(e)} for b, e in zip(batches, errors, strict=True)]


def lr_table(shape, error=0.0, rng=None, batches=BATCHES):
    errors = np.zeros(len(batches)) if rng is None else error * rng.normal(size=len(batches))
    return [{"batch_tokens": b, "lr": 3e-3 * shape(b) * np.exp(e), "tokens": 1e9} for b, e in zip(batches, errors, strict=True)]


def surge(critical):
    return lambda b: 2 / (np.sqrt(b / critical) + np.sqrt(critical / b))


def plateau(critical):
    return lambda b: 1 / np.sqrt(1 + critical / b)


# ---------------------------------------------------------------------------------------------------------------------- noise


def test_noise_is_in_tokens_and_each_metric_reads_its_own_keys():
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, 601):
        noisy = 1 + 0.1 * rng.normal(size=4)
        keys = ("grad_sq_step", "grad_trace_step", "preconditioned_grad_sq_step", "preconditioned_grad_trace_step")
        estimates = dict(zip(keys, noisy * [2.0, 60.0, 5.0, 400.0], strict=True))
        records.append({"tokens": 512.0 * step, "batch_tokens": 512, "batch_sequences": 8} | estimates)
    for metric, truth in (("noise", 30 * 64), ("preconditioned", 80 * 64)):
        points = noise(records, metric)
        assert 5 <= len(points) <= 10 and {point.definition for point in points} == {metric}
        assert np.mean([point.low < truth < point.high for point in points]) >= 0.8
        assert np.mean([point.batch_tokens for point in points]) == pytest.approx(truth, rel=0.03)
    assert len(noise(records, bins=3)) == 3
    assert noise(records, bins=1, from_tokens=2e5)[0].tokens > 2e5
    assert noise([{"tokens": 5.0}], "preconditioned") == []
    with pytest.raises(UserError, match="metric is 'hessian'; it must be one of noise, preconditioned"):
        noise(records, "hessian")
    for wrong, said in (({"bins": 0}, "bins is 0"), ({"bins": 1.5}, "bins is 1.5"), ({"from_tokens": "x"}, "from_tokens is 'x'")):
        with pytest.raises(UserError, match=f"{said}; it must be a"):
            noise(records, **wrong)


# ------------------------------------------------------------------------------------------------------- tradeoff and overhead


def test_tradeoff_of_exact_steps():
    fit = tradeoff_fit(steps_table(2e6))
    assert (fit.min_steps, fit.batch_tokens, fit.min_tokens) == pytest.approx((1500, 2e6, 3e9), rel=1e-5)
    point = tradeoff(steps_table(2e6))
    assert (point.definition, point.tokens, point.batch_tokens) == ("tradeoff", fit.min_tokens, fit.batch_tokens)
    # By Kaplan et al., eq. 5.1, at any batch: (S/S_min − 1)(E/E_min − 1) = 1.
    for row in steps_table(2e6):
        assert (row["steps"] / fit.min_steps - 1) * (row["steps"] * row["batch_tokens"] / fit.min_tokens - 1) == pytest.approx(1, rel=1e-4)


def test_tradeoff_interval_covers():
    rng = np.random.default_rng(1)
    fits = [tradeoff(steps_table(2e6, error=0.1, rng=rng)) for _ in range(150)]
    inside = np.mean([point.low < 2e6 < point.high for point in fits])
    assert 0.9 < inside <= 0.995  # 95% of 150, less 2.5 of its standard deviations
    assert np.median([np.log(point.high / point.low) for point in fits]) < 1.0


def test_no_bend_among_the_batches_leaves_ends_open():
    linear = tradeoff_fit(steps_table(1e12))  # S ∝ 1/B: all batches far below the critical one
    assert linear.batch_tokens is None and linear.min_steps is None and linear.high is None
    assert linear.low > 10 * BATCHES[-1]
    assert linear.min_tokens == pytest.approx(1500 * 1e12, rel=1e-3)
    constant = tradeoff_fit(steps_table(1.0))
    assert constant.batch_tokens is None and constant.min_tokens is None and constant.low is None
    assert constant.min_steps == pytest.approx(1500, rel=1e-3) and constant.high < BATCHES[0] / 10
    noisy = tradeoff(steps_table(4 * BATCHES[-1], error=0.2, rng=np.random.default_rng(2)))
    assert noisy.high is None and noisy.low > BATCHES[-1] / 100
    assert overhead(steps_table(1e12), 1e5) == CriticalBatch("overhead", None, None, 0.2 * linear.low + 1.2e5, None)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_overhead_is_where_the_steps_exceed_linear_scaling(share):
    reference, critical = 131072.0, 2e6
    point = overhead(steps_table(critical), reference, share)

    def steps(b):
        return 1500 * (1 + critical / b)

    assert steps(point.batch_tokens) == pytest.approx((1 + share) * steps(reference) * reference / point.batch_tokens, rel=1e-5)
    assert point.tokens == pytest.approx(steps(reference) * reference, rel=1e-5)
    assert point.definition == "overhead"


def test_published_steps_to_a_loss():
    """Zhang et al. 2024, five models, sequences of 512: their law of the overhead, and E_min/S_min, another quantity."""
    path = SHARED / "data" / "zhang_cbs" / "steps_to_target.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    models = {}
    for row in csv.DictReader(path.open()):
        table = models.setdefault(float(row["N_millions"]), [])
        table.append({"batch_tokens": 512 * float(row["batch_size_seqs"]), "steps": float(row["steps_to_target"])})
    found = [overhead(table, reference_batch_tokens=256 * 512).batch_tokens / 512 for table in models.values()]
    fitted = power_law(list(models), found)
    assert (np.exp(fitted.log_scale), fitted.exponent) == pytest.approx((93.197, 0.4683), rel=1e-4)
    found = [tradeoff(table).batch_tokens / 512 for table in models.values()]
    assert found == pytest.approx([2191, 3240, 5433, 7907, 11131], rel=0.02)


@pytest.mark.parametrize("measure", [tradeoff, lambda table: overhead(table, 1e5)])
def test_faulty_tables_of_steps(measure):
    good = steps_table(2e6)
    for faulty, message in [
        (good[:2], "the table has 2 rows; a trade-off between steps and tokens needs at least 3"),
        (good[:1] * 4, "batch_tokens takes 1 different values in the table; at least 2"),
        ([*good[:3], {"batch_tokens": 5.0}], "row 4 of the table has no steps; it has batch_tokens"),
        ([*good[:3], good[3] | {"steps": 0}], "row 4 of the table: steps is 0; it must be a positive number"),
        ([good[0] | {"batch_tokens": float("inf")}, *good], "row 1 of the table: batch_tokens is inf"),
        ([good[0] | {"steps": "many"}, *good], "row 1 of the table: steps is 'many'"),
    ]:
        with pytest.raises(UserError) as caught:
            measure(faulty)
        assert message in str(caught.value)


def test_faulty_settings_of_overhead():
    with pytest.raises(UserError, match="reference_batch_tokens is 0; it must be a positive number"):
        overhead(steps_table(2e6), 0)
    with pytest.raises(UserError, match="overhead is -0.2; it must be a positive number"):
        overhead(steps_table(2e6), 1e5, -0.2)


@pytest.mark.parametrize("noise_of", ["curvature", "even"])
def test_tradeoff_on_a_quadratic_is_the_hessian_weighted_noise_scale(noise_of):
    """Exact moments of SGD, no sampling. With c·ε_opt(B) at small c the two agree; with one lr for all batches they do not."""
    problem = quadratic.power_spectrum(dims=40, noise=noise_of)
    for c in (0.02, 0.05):
        fit, path, *_ = quadratic.compare(problem, 0.2, c=c)
        assert fit.batch_tokens == pytest.approx(path.hessian, rel=0.05)
        assert np.abs(fit.residuals).max() < 0.02
    assert not 1 / 1.3 < path.simple / path.hessian < 1.3  # the simple noise scale is another number
    for lr in (0.03, 0.3):
        fit, *_ = quadratic.compare(problem, 0.2, lr=lr)
        assert fit.batch_tokens < path.hessian / 8


def test_the_quadratics_moments_are_those_of_sampled_runs():
    rng = np.random.default_rng(3)
    problem, batch, lr, steps = quadratic.power_spectrum(dims=5), 32.0, 0.5, 6
    theta = np.ones((20000, 5))
    for _ in range(steps):
        before = theta
        theta = theta - lr * (problem.curvature * theta + np.sqrt(problem.variance / batch) * rng.normal(size=theta.shape))
    loss, loss_before = (0.5 * (x**2 @ problem.curvature) for x in (theta, before))
    found = quadratic.descend(problem, np.array([batch]), loss.mean(), lr_B=np.array([lr]))
    fall = np.log(loss_before.mean() / loss.mean())  # in one step
    assert fall > 0.1
    assert found[0] == pytest.approx(steps, abs=4 * loss.std() / loss.mean() / np.sqrt(len(loss)) / fall)


# ---------------------------------------------------------------------------------------------------------------------- branch


def branches(means, factors=(1, 2, 4, 8, 16), tokens=1e8, **more):
    return [
        {"tokens": tokens, "factor": k, "batch_tokens": 1000.0 * k, "loss": loss} | {key: values[i] for key, values in more.items()}
        for i, (k, loss) in enumerate(zip(factors, means, strict=True))
    ]


@pytest.mark.parametrize(
    ("losses", "tolerance", "largest"),
    [
        ([3.0, 3.005, 3.009, 3.02, 3.1], 0.01, 4),
        ([3.0, 3.005, 3.009, 3.02, 3.1], 0.0, 1),
        ([3.0, 2.98, 2.995, 3.0, 2.989], 0.01, 16),  # k = 4 and 8 are worse than k = 2; k = 16 is within the tolerance of all before
        ([3.0, 2.98, 3.005, 3.0, 2.995], 0.01, 2),  # 4 is within the tolerance of 1, but not of 2
        ([3.0, 3.0, 3.0, None, None], 0.01, 4),  # diverged
    ],
)
def test_largest_factor_that_loses_nothing(losses, tolerance, largest):
    rows = branches(losses)
    np.random.default_rng(4).shuffle(rows)
    assert branch(rows, tolerance) == [CriticalBatch("branch", 1e8, 1000.0 * largest, None, None)]


def paired(rng, means, spread, sequences=400):
    """Losses of sequences that differ much from each other and little, by `spread`, between branches; means exact."""
    common = 3 + 0.5 * rng.normal(size=sequences)
    own = spread * rng.normal(size=(len(means), sequences))
    return list(common - common.mean() + np.array(means)[:, None] + own - own.mean(axis=1, keepdims=True))


def test_interval_of_a_branch_is_of_paired_differences():
    means = [3.0, 3.0, 3.006, 3.013, 3.1]
    # The differences' standard error is √2·spread/√400; 0.02 makes 1.96 of them 0.0028, and 0.05 makes them 0.0069.
    for spread, low, high in [(0.02, 4000.0, 8000.0), (0.05, 2000.0, 16000.0)]:
        (point,) = branch(branches(means, losses=paired(np.random.default_rng(5), means, spread)))
        assert point == CriticalBatch("branch", 1e8, 4000.0, low, high), spread
    unpaired = [np.random.default_rng(i).permutation(of_one) for i, of_one in enumerate(paired(np.random.default_rng(5), means, 0.02))]
    (point,) = branch(branches(means, losses=unpaired))  # 1.96 standard errors are now 0.07
    assert point == CriticalBatch("branch", 1e8, 4000.0, None, 16000.0)


def test_interval_of_a_branch_is_open_where_nothing_fails_and_where_nothing_smaller_was_tried():
    rng = np.random.default_rng(7)
    (point,) = branch(branches([3.0] * 5, losses=paired(rng, [3.0] * 5, 0.02)))
    assert point == CriticalBatch("branch", 1e8, 16000.0, 16000.0, None)
    worse = [3.0, 3.1, 3.2, 3.3, 3.4]
    (point,) = branch(branches(worse, losses=paired(rng, worse, 0.02)))
    assert point == CriticalBatch("branch", 1e8, 1000.0, None, 2000.0)
    half = [3.0, 3.0, 3.0, None, None]
    losses = [*paired(rng, [3.0] * 3, 0.02), None, None]
    assert branch(branches(half, losses=losses)) == [CriticalBatch("branch", 1e8, 4000.0, 4000.0, 8000.0)]


def test_interval_of_a_branch_covers():
    """Losses that rise as 0.0025·k, so that k = 5 is the last within 0.01: the interval holds 5, whatever the luck of the sequences."""
    rng = np.random.default_rng(8)
    factors = np.array([1, 2, 4, 8, 16])
    inside = []
    for _ in range(400):
        common, own = rng.normal(size=300), 0.04 * rng.normal(size=(5, 300))
        losses = 3 + common + own + 0.0025 * factors[:, None]
        (point,) = branch(branches(losses.mean(axis=1), losses=list(losses)))
        inside.append((point.low or 0.0) <= 5000.0 <= (point.high or np.inf))
    assert np.mean(inside) > 0.93


def test_one_point_a_checkpoint():
    rows = branches([3.0, 3.0, 3.1], (1, 2, 4), tokens=4e8) + branches([3.2, 3.3, 3.4], (1, 2, 4), tokens=1e8)
    assert [(point.tokens, point.batch_tokens) for point in branch(rows)] == [(1e8, 1000.0), (4e8, 2000.0)]


def test_faulty_tables_of_branches():
    good = branches([3.0] * 5)
    for faulty, message in [
        (good[:1], "the table has one factor, 1, at tokens 1e+08"),
        ([*good, good[2]], "factor 4 twice at tokens 1e+08"),
        ([good[0] | {"loss": None}, *good[1:]], "factor 1, the smallest at tokens 1e+08, diverged"),
        ([{k: v for k, v in good[0].items() if k != "loss"}, *good[1:]], "row 1 of the table has no loss"),
        ([good[0] | {"factor": -1}, *good[1:]], "row 1 of the table: factor is -1; it must be a positive number"),
        (branches([3.0] * 5, losses=[[3.0, 3.0]] * 4 + [[3.0]]), "losses at tokens 1e+08 hold [2, 2, 2, 2, 1] sequences"),
        ([*good, "x"], "row 6 of the table is 'x'; it must be a dict of columns"),
        (branches([3.0] * 5, losses=["x"] * 5), "losses at tokens 1e+08, factor 1 are 'x'; they must be a list of numbers, one a sequence"),
        (branches([3.0] * 5, losses=[[3.0, [3.0]]] * 5), "factor 1 are [3.0, [3.0]]; they must be a list of numbers"),
        (branches([3.0] * 5, losses=[[3.0, 3.0]] * 4 + [[3.0, 3.1]]), "factor 16 have the mean 3.05, and loss is 3; it must be their mean"),
        (branches([3.0] * 5, losses=[[3.0, 3.0]] * 4 + [[3.0, np.nan]]), "losses at tokens 1e+08, factor 16 are not all finite"),
    ]:
        with pytest.raises(UserError) as caught:
            branch(faulty)
        assert message in str(caught.value)
    for tolerance in (-1, "x", None, True):
        with pytest.raises(UserError, match="tolerance is .*; it must be a number of nats per token, 0 or more"):
            branch(good, tolerance)


# ------------------------------------------------------------------------------------------------------------------------ kink


@pytest.mark.parametrize(("form", "shape"), [("surge", surge), ("plateau", plateau)])
def test_planted_bend(form, shape):
    fit = kink_fit(lr_table(shape(5e5)), form)
    assert (fit.batch_tokens, fit.lr, fit.rms) == pytest.approx((5e5, 3e-3, 0), rel=1e-5, abs=1e-7)
    rng = np.random.default_rng(9)
    points = [kink(lr_table(shape(5e5), error=0.1, rng=rng), form) for _ in range(50)]
    assert np.mean([(point.low or 0) < 5e5 < (point.high or np.inf) for point in points]) > 0.88
    assert {(point.definition, point.tokens) for point in points} == {(f"kink_{form}", 1e9)}


def test_pure_power_has_no_bend():
    table = lr_table(lambda b: (b / 1e5) ** 0.5)
    fit = kink_fit(table, "power")
    assert (fit.exponent, fit.lr) == pytest.approx((0.5, 3e-3 * 1e5**-0.5))
    assert fit.batch_tokens is None and fit.rms < 1e-6
    for form in ("surge", "plateau"):  # and the other two say so: the bend is anywhere above
        point = kink(table, form)
        assert point.batch_tokens is None and point.high is None and point.low > BATCHES[-1]


def test_forms_that_fit_alike_give_different_bends():
    """Batches up to the bend of a surge, lrs known to 10%: a plateau fits within that, with its bend at less than half."""
    table = lr_table(surge(5e5), batches=BATCHES[:5])
    fits = {form: kink_fit(table, form) for form in ("surge", "plateau")}
    assert fits["surge"].rms < 1e-6 and 0.005 < fits["plateau"].rms < 0.1
    assert fits["plateau"].batch_tokens < fits["surge"].batch_tokens / 2
    assert fits["surge"].aicc < fits["plateau"].aicc


def test_errors_of_the_lrs_are_weights():
    table = lr_table(surge(5e5), error=0.02, rng=np.random.default_rng(11))
    table[3]["lr"] *= 5
    off = np.log(kink(table, "surge").batch_tokens / 5e5)
    weighted = [row | {"lr_se": row["lr"] * (10.0 if i == 3 else 0.02)} for i, row in enumerate(table)]
    assert abs(np.log(kink(weighted, "surge").batch_tokens / 5e5)) < abs(off) / 3


def test_faulty_tables_of_lrs():
    good = lr_table(surge(5e5))
    for faulty, message in [
        (good[:3], "the table has 3 rows; a bend of the learning rate needs at least 4"),
        (good[:2] * 3, "batch_tokens takes 2 different values in the table; at least 3"),
        ([*good, good[0] | {"lr": None}], "row 10 of the table has no lr"),
        ([*good, good[0] | {"lr_se": 0.1}], "row 1 of the table has no lr_se"),
        ([*good, good[0] | {"tokens": 2e9}], "row 10 of the table: tokens is 2e+09, in row 1 it is 1e+09"),
    ]:
        with pytest.raises(UserError) as caught:
            kink(faulty, "surge")
        assert message in str(caught.value)
    with pytest.raises(UserError, match="form is 'power'; it must be surge or plateau"):
        kink(good, "power")
    with pytest.raises(UserError, match="form is 'spline'; it must be one of surge, plateau, power"):
        kink_fit(good, "spline")


# ------------------------------------------------------------------------------------------------------------------------- law


def test_law_of_points():
    points = [CriticalBatch("branch", t, 3 * t**0.5, 2 * t**0.5, 4 * t**0.5) for t in (1e6, 1e7, 1e8, 1e9)]
    assert law(points).exponent == pytest.approx(0.5) and law(points).points == 4
    assert law([*points, CriticalBatch("branch", 1e10, 1.0, 1.0, None)]) == law(points)  # an open end: unknown
    assert law([point._replace(low=None, high=None) for point in points]).exponent == pytest.approx(0.5)
    assert law(points[:2]) is None and law([]) is None
    with pytest.raises(ValueError, match="one law of several definitions"):
        law([*points, points[0]._replace(definition="noise")])
