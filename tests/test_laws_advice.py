"""Advice against closed forms of laws that were chosen, and on planted worlds against the truth."""

import json

import made_laws
import numpy as np
import pytest
from made_laws import BATCH, BATCHES, CURVATURE, GROWTH, POWER, SHARES, SURGE, TOKENS, fitted, surge_lr
from worlds import World

from scaling_jax import batch_schedule
from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.laws import catalogue, store
from scaling_jax.laws.advice import Question, advise, doublings
from scaling_jax.laws.chinchilla_form import BESIROGLU, allocation

RUN = Question(1e9, 4e10)


@pytest.fixture
def advice_of(tmp_path):
    def advice(question=RUN, **changes):
        path = made_laws.write(tmp_path / "laws.json", **changes)
        return advise(store.read(path), question)

    return advice


def hoffmann(params, tokens):
    A, B, E, alpha, beta = BESIROGLU.values()
    return E + A / params**alpha + B / tokens**beta


def test_lr_and_batch_are_those_of_the_laws_one_feeding_the_other(advice_of):
    advice = advice_of()
    batch = BATCH["batch"] * 40 ** BATCH["tokens_exponent"]
    row, lr = advice.row("batch"), advice.row("learning rate")
    assert row.value == pytest.approx(batch) and lr.value == pytest.approx(surge_lr(batch, 4e10))
    # ln B* = ln b + m·ln 40: errors of 5% in both; the interval of 1.96 of them on either side
    half = 1.96 * 0.05 * np.hypot(1, np.log(40))
    assert np.log([row.low / batch, row.high / batch]) == pytest.approx([-half, half], rel=0.15)
    assert row.reaches[0][:3] == ("tokens", *TOKENS) and row.reaches[0].factor == pytest.approx(4) and row.inside is False
    assert "width" in " ".join(lr.notes) and "independent" in " ".join(lr.notes)


def test_the_error_of_the_batch_widens_that_of_the_lr(advice_of):
    own, given = advice_of().row("learning rate"), advice_of(RUN._replace(batch_tokens=BATCH["batch"] * 40**0.4)).row("learning rate")
    assert given.value == pytest.approx(own.value)
    sharp = fitted(made_laws.findings()["lr_surface"].fits["surge"].form, SURGE, 0.0, {"batch_tokens": BATCHES, "tokens": TOKENS})
    of_batch = advice_of(lr_surface={"surge": sharp}).row("learning rate")
    spread = {name: np.log(row.high / row.low) for name, row in (("own", own), ("given", given), ("of batch", of_batch))}
    assert spread["own"] == pytest.approx(np.hypot(spread["given"], spread["of batch"]), rel=0.15)
    assert spread["own"] > 1.1 * spread["given"]


def test_tied_rivals_are_all_shown_and_the_interval_spans_them(advice_of):
    both = made_laws.findings()["lr_surface"].fits
    one = advice_of().row("learning rate")
    row = advice_of(lr_surface=dict(both)).row("learning rate")
    batch = BATCH["batch"] * 40 ** BATCH["tokens_exponent"]
    power = POWER["lr"] * (batch / 1e5) ** POWER["batch_exponent"] * 40 ** POWER["tokens_exponent"]
    assert row.value == one.value and row.low < power < one.low and row.high == one.high
    assert f"power {power:.4g}" in row.notes[0]


def test_loss_and_split_agree_with_hoffmanns_closed_form(advice_of):
    advice = advice_of(RUN._replace(flops=5.76e23))
    best, of_run = allocation(**BESIROGLU), 6 * RUN.params * RUN.tokens
    loss = hoffmann(1e9, 4e10)
    assert advice.row("loss").value == pytest.approx(loss)
    params, tokens = (advice.row(f"best {name} for the budget") for name in ("params", "tokens"))
    assert params.value == pytest.approx(best.params(5.76e23), rel=0.006) and tokens.value == pytest.approx(best.tokens(5.76e23), rel=0.006)
    assert tokens.value / params.value == pytest.approx(18.4, rel=0.03)  # Besiroglu et al. 2024, table of D/N at Gopher's compute
    assert params.low < best.params(5.76e23) < params.high and params.reaches[0].factor == pytest.approx(params.value / 1e8, rel=1e-6)
    there = (
        BESIROGLU["E"]
        + BESIROGLU["A"] / best.params(of_run) ** BESIROGLU["alpha"]
        + BESIROGLU["B"] / best.tokens(of_run) ** BESIROGLU["beta"]
    )
    excess = advice.row("excess over the best split of 6·N·T")
    assert excess.value == pytest.approx(loss - there, abs=1e-6) and 0 <= excess.low <= excess.value <= excess.high


def test_costs_of_a_factor_2_and_of_a_batch_that_was_given(advice_of):
    advice = advice_of(RUN._replace(batch_tokens=4 * BATCH["batch"] * 40**0.4))
    loss = advice.row("loss").value
    assert advice.row("cost of a factor 2 in lr").value == pytest.approx(0.5 * CURVATURE["curvature"] * 40**-0.1 * np.log(2) ** 2)
    of_batch = advice.row("cost of a factor 2 in batch")
    assert of_batch.value == pytest.approx(SHARES[""] * loss) and (of_batch.low, of_batch.high) == (None, None)  # least and most are none
    assert f"which have {SHARES[', least'] * loss:.3g} to {SHARES[', most'] * loss:.3g}" in of_batch.notes[0]
    given = advice.row("cost of this batch")
    assert given.value == pytest.approx(4 * SHARES[""] * loss) and given.low < given.value < given.high  # two doublings
    best = advice_of().row("batch")
    ends = [SHARES[""] * loss * np.log2(4 * best.value / end) ** 2 for end in (best.high, best.low)]
    assert (given.low, given.high) == pytest.approx(ends, rel=1e-4) and "have 0.5 to 2 of its curvature" in given.notes[1]
    assert advice.row("steps").value == pytest.approx(4e10 / (4 * BATCH["batch"] * 40**0.4))


def test_the_batch_schedule_takes_as_many_steps_and_is_one_that_a_run_accepts(advice_of):
    row = advice_of().row("batch schedule")
    given = dict(part.removeprefix("--config.").split("=", 1) for part in row.text.split())
    config = default_config()
    config.train.tokens, config.noise_scale.every = 40_000_000_000, 0
    config.train.batch_tokens, config.batch.schedule = int(given["train.batch_tokens"]), given["batch.schedule"]
    config.batch.stages = tuple(given["batch.stages"].split(","))
    assert batch_schedule.faults(config, 1) == []
    stages = batch_schedule.stages(config)
    starts = [0, *(stage.tokens for stage in stages), config.train.tokens]
    batches = [config.train.batch_tokens, *(stage.batch_tokens for stage in stages)]
    steps = sum((end - start) / b for start, end, b in zip(starts, starts[1:], batches, strict=False))
    assert steps == pytest.approx(advice_of().row("steps").value, rel=0.01)
    for earlier, later in zip(stages, stages[1:], strict=False):  # B_crit has doubled
        assert later.tokens / earlier.tokens == pytest.approx(2 ** (1 / GROWTH["tokens_exponent"]), rel=1e-6)
        assert later.batch_tokens == 2 * earlier.batch_tokens
    assert "nothing here has tested" in row.notes[0]


def test_doublings_of_a_batch_that_grows_with_the_tokens():
    first, stages = doublings(6400.0, 100.0, 1.0, 1)
    assert [at for at, _ in stages] == [100, 200, 400, 800, 1600, 3200] and [b for _, b in stages] == [first << k for k in range(1, 7)]
    assert doublings(6400.0, 100.0, 0.1)[1] == []


def test_what_the_fits_do_not_support_is_not_given(advice_of):
    surface = {"batch_tokens": BATCHES, "tokens": TOKENS}
    surge = made_laws.findings()["lr_surface"].fits["surge"].form
    wide = advice_of(lr_surface={"surge": fitted(surge, SURGE, 0.8, surface, ["batch_crit"])}).row("learning rate")
    assert wide.value is None and "not supported: lr_surface (surge)" in wide.why and "batch_crit is not identified" in wide.why
    # An unidentified parameter that does not matter here takes nothing away.
    sound = advice_of(lr_surface={"surge": fitted(surge, SURGE, 0.02, surface, ["batch_crit"])}).row("learning rate")
    assert sound.value is not None
    none = advice_of(lr_surface={"surge": fitted(surge, SURGE, 0.02, surface, resamples=0)}).row("learning rate")
    assert none.value is None and "there is no interval" in none.why


def test_missing_laws_leave_the_other_rows(advice_of):
    advice = advice_of(batch_optimum="the best batch is inside the grid nowhere; widen it")
    assert "widen it" in advice.row("batch").why and "--batch_tokens" in advice.row("learning rate").why
    assert advice.row("loss").value is not None and advice.told
    assert advice_of(RUN._replace(batch_tokens=1e5), batch_optimum="widen it").row("learning rate").value is not None
    nothing = advice_of(batch_optimum="one batch", chinchilla_3=None)
    assert "has no chinchilla_3" in nothing.row("loss").why and "fit --law=" in nothing.row("loss").why and not nothing.told


def test_how_far_outside_is_said_below_the_range_too(advice_of):
    advice = advice_of(Question(2e5, 2e7))
    for name in ("learning rate", "batch", "loss", "cost of a factor 2 in lr", "cost of a factor 2 in batch", "batch schedule", "steps"):
        row = advice.row(name)
        factors = {reach.name: (reach.factor, reach.side) for reach in row.reaches}
        assert factors["tokens"] == (pytest.approx(5), "below") and factors["params"] == (pytest.approx(5), "below"), name
        assert row.inside is False
    assert advice_of(Question(1e7, 1e9)).row("batch").inside is True


def test_a_law_without_a_term_of_params_is_outside_at_another_size_than_the_tables(advice_of):
    advice = advice_of(Question(1e9, 4e9), params=(1e7, 1e7), chinchilla_3=None)
    for name in ("learning rate", "batch", "cost of a factor 2 in lr", "cost of a factor 2 in batch", "batch schedule", "steps"):
        reach = next(reach for reach in advice.row(name).reaches if reach.name == "params")
        assert reach[1:] == (1e7, 1e7, 1e9) and reach.factor == pytest.approx(100) and advice.row(name).inside is False, name
    assert advice_of(Question(1e7, 4e9), params=(1e7, 1e7), chinchilla_3=None).row("batch").inside is True


def test_the_cost_of_a_batch_is_outside_where_the_batch_is(advice_of):
    row = advice_of(Question(1e7, 1e10, batch_tokens=1e8)).row("cost of this batch")
    assert [reach.factor for reach in row.reaches if reach.name == "batch_tokens"] == [pytest.approx(100)] and row.inside is False
    assert "batch_tokens was measured" in advice_of(Question(1e7, 1e10, batch_tokens=1.1e9)).row("cost of this batch").why


def test_no_law_is_followed_beyond_a_thousand_times(advice_of):
    told = ("learning rate", "batch", "loss", "cost of a factor 2 in lr", "cost of a factor 2 in batch", "batch schedule")
    for question, said in (
        (Question(1e7, 1.1e13), "tokens was measured from 1e+08 to 1e+10, and 1.1e+13 is 1.1e+03 times above"),
        (Question(1.1e11, 1e9), "params was measured from 1e+06 to 1e+08, and 1.1e+11 is 1.1e+03 times above"),
        (Question(500, 1e9), "params was measured from 1e+06 to 1e+08, and 500 is 2e+03 times below"),
    ):
        advice = advice_of(question)
        assert not advice.told
        for name in told:
            assert advice.row(name).value is None and advice.row(name).text == "" and said in advice.row(name).why, name
    assert advice_of(Question(1e7, 9.9e12)).row("batch").value is not None
    # A budget may lead further than the run that was asked for.
    far = advice_of(Question(1e8, 1e10, flops=1e28)).row("best params for the budget")
    assert far.value is None and "chinchilla_3: params was measured from 1e+06" in far.why


def test_a_batch_is_one_step_at_most(advice_of):
    with pytest.raises(UserError, match=r"--batch_tokens=2e\+08: not one step in --tokens=1e\+08"):
        advice_of(Question(1e7, 1e8, batch_tokens=2e8))
    form = made_laws.findings()["batch_optimum"].fits["batch_optimum"].form
    falls = {"batch_optimum": fitted(form, BATCH | {"tokens_exponent": -0.4}, 0.02, {"tokens": TOKENS})}
    assert "more than the run has" in advice_of(Question(1e7, 5e5), batch_optimum=falls).row("batch").why


def test_few_runs_widen_the_split_of_a_budget_about_its_value(advice_of):
    known = made_laws.findings()["chinchilla_3"].fits["chinchilla_3"]
    names = ("best params for the budget", "best tokens for the budget")
    one, wide = (advice_of(chinchilla_3={"chinchilla_3": known._replace(widen=widen)}) for widen in (1.0, 1.5))
    for name in names:
        a, b = one.row(name), wide.row(name)
        assert np.log([b.low / b.value, b.high / b.value]) == pytest.approx(1.5 * np.log([a.low / a.value, a.high / a.value]), rel=1e-3)
    a, b = (advice.row("excess over the best split of 6·N·T") for advice in (one, wide))
    assert b.high - b.value == pytest.approx(1.5 * (a.high - a.value), rel=1e-3) and b.low >= 0


def test_standard_parametrization_of_one_size_carries_no_lr_over(advice_of):
    row = advice_of(parametrization="standard").row("learning rate")
    assert row.value is None and "has no term of N" in row.why
    assert advice_of(parametrization="standard").row("batch").value is not None


@pytest.mark.parametrize("name, value", [("params", 0), ("tokens", -1.0), ("flops", float("nan")), ("batch_tokens", 0)])
def test_sizes_and_budgets_are_positive(advice_of, name, value):
    with pytest.raises(UserError, match=f"--{name}=.*positive"):
        advice_of(RUN._replace(**{name: value}))


# ------------------------------------------------------------------------------------------------ planted worlds, extrapolated eight times


def off_truth(world, seed, path):
    """ln of what is recommended over the truth at 8 times the longest horizon: of the lr, and of the batch."""
    table = world.table(seed)
    found = catalogue.analyse(table, ["lr_surface", "batch_optimum"])
    path.write_text(json.dumps(store.record(table, found, "planted", {})))
    tokens = 8 * max(world.horizons)
    advice = advise(store.read(path), Question(world.params(max(world.widths)), tokens))
    batch = world.best_batch(tokens)
    truth = {"learning rate": world.best_lr(batch, tokens), "batch": batch}
    rows = {name: advice.row(name) for name in truth}
    assert all(row.value is not None for row in rows.values()), [row.why for row in rows.values()]
    covered = [row.low <= truth[name] <= row.high for name, row in rows.items()]
    return [np.log(row.value / truth[name]) for name, row in rows.items()], covered


def share_right(world, seeds, path):
    """Of simulated studies whose lr is within 10% and batch within 25% of the truth; and of intervals of each that hold it."""
    off, covered = zip(*(off_truth(world, seed, path) for seed in seeds), strict=True)
    lr, batch = np.abs(np.expm1(np.array(off))).T
    return np.mean((lr <= 0.10) & (batch <= 0.25)), np.mean(covered, axis=0)


def test_advice_at_eight_times_the_horizon_is_near_the_truth(tmp_path):
    right, _ = share_right(World(run_sd=1.5e-3), range(5), tmp_path / "laws.json")
    assert right >= 0.8  # one in a hundred is not, by the test below, and seed 3 is that one: its batch is 25.5% off


@pytest.mark.slow
@pytest.mark.parametrize("form", ["surge", "plateau", "power"])
def test_advice_is_near_the_truth_in_95_of_100_studies(tmp_path, form):
    right, covered = share_right(World(run_sd=1.5e-3, form=form), range(100), tmp_path / "laws.json")
    print(f"{form}: {right:.0%} right; intervals hold the lr in {covered[0]:.0%}, the batch in {covered[1]:.0%}")
    assert right >= 0.95
