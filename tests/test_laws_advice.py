"""Advice against closed forms of laws that were chosen, and on planted worlds against the truth."""

import json

import made_laws
import numpy as np
import pytest
from made_laws import BATCH, BATCHES, CURVATURE, GROWTH, POWER, SHARES, SURGE, T0, TOKENS, fitted
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


def surge_lr(batch, tokens, lr_crit=SURGE["lr_crit"]):
    ratio = batch / (SURGE["batch_crit"] * (tokens / T0) ** SURGE["batch_crit_tokens_exponent"])
    return lr_crit * (tokens / T0) ** SURGE["lr_crit_tokens_exponent"] * 2 / (np.sqrt(ratio) + 1 / np.sqrt(ratio))


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
    assert advice.row("cost of a factor 2 in batch")[2:5] == pytest.approx((SHARES.value * loss, SHARES.low * loss, SHARES.high * loss))
    given = advice.row("cost of this batch")
    assert given.value == pytest.approx(4 * SHARES.value * loss) and given.low < given.value < given.high  # two doublings
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
    right, _ = share_right(World(run_sd=1.5e-3), range(10), tmp_path / "laws.json")
    assert right >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("form", ["surge", "plateau", "power"])
def test_advice_is_near_the_truth_in_95_of_100_studies(tmp_path, form):
    right, covered = share_right(World(run_sd=1.5e-3, form=form), range(100), tmp_path / "laws.json")
    print(f"{form}: {right:.0%} right; intervals hold the lr in {covered[0]:.0%}, the batch in {covered[1]:.0%}")
    assert right >= 0.95
