"""When the batch grows, and that the log of decisions says so again."""

import json

import numpy as np
import pytest
from helpers import small_config

from scaling_jax import batch_schedule
from scaling_jax.errors import UserError
from scaling_jax.laws.law_file import write_law
from scaling_jax.laws.power_law import PowerLaw
from scaling_jax.train.batch_size import KEY, BatchSize, Followed, microbatches, replay

STEP = 128  # tokens of a step at the start


def following(**fields):
    defaults = {"batch__schedule": "follow", "train__tokens": 60 * STEP, "batch__look_tokens": 300, "batch__max_tokens": 8 * STEP}
    return small_config(**defaults | {f"batch__{name}" if "__" not in name else name: value for name, value in fields.items()})


def walk(config, low_at, start_tokens=0):
    """The run step by step: the batch of every step, and a record for every look."""
    size, tokens, step, batches, records = BatchSize(config, start_tokens), start_tokens, 0, [], []
    due = size.next_due(tokens)
    while tokens < config.train.tokens:
        batches.append(size.batch_tokens)
        tokens, step = tokens + size.batch_tokens, step + 1
        if tokens == due:
            low = low_at(tokens)
            records.append(size.decide(tokens, (None if low is None else 2 * low, low, None)).record(step))
            due = size.next_due(tokens)
    return batches, json.loads(json.dumps(records))


def by_the_rule(config, low_at):
    """The same by the words of the rule, with no state but the list of looks since the last doubling."""
    b, batch, tokens, looks, batches = config.batch, config.train.batch_tokens, 0, [], []
    while tokens < config.train.tokens:
        batches.append(batch)
        crossed = any((tokens + i) % b.look_tokens == 0 for i in range(1, batch + 1))
        tokens += batch
        if crossed and tokens < config.train.tokens:
            low = low_at(tokens)
            looks.append(low is not None and low >= b.multiple * batch)
            if len(looks) >= b.hold and all(looks[-b.hold :]) and 2 * batch <= b.max_tokens:
                batch, looks = 2 * batch, []
    return batches


@pytest.mark.parametrize("seed", range(20))
def test_the_batch_doubles_as_the_rule_says(seed):
    rng = np.random.default_rng(seed)
    config = following(
        multiple=float(rng.choice([0.25, 1.0, 3.0])),
        hold=int(rng.integers(1, 5)),
        look_tokens=int(rng.integers(50, 700)),
        max_tokens=int(rng.integers(1, 12)) * STEP,
    )
    scale = config.batch.multiple * STEP * 8 ** rng.uniform(0, 1)
    lows = {tokens: None if rng.random() < 0.1 else scale * tokens / 3000 * rng.uniform(0.5, 1.5) for tokens in range(0, 100 * STEP, STEP)}
    batches, records = walk(config, lows.get)
    assert batches == by_the_rule(config, lows.get)
    assert [r[KEY] for r in records] == [
        b for b, t in zip([*batches, None], np.cumsum([0, *batches]), strict=True) if t in {r["tokens"] for r in records}
    ]


def test_the_bound_may_be_equal_and_must_be_passed_in_a_row():
    config = following(hold=2, multiple=2.0, train__tokens=300 * STEP)
    for lows, expected in (
        ([256, 256], STEP * 2),
        ([255.9, 1e9], STEP),
        ([256, None, 256], STEP),
        ([256, 255, 256, 256], STEP * 2),
        ([512, 512, 512], STEP * 2),  # looks before the doubling do not count for the next
        ([512, 512, 512, 512], STEP * 4),
        ([1e9] * 20, STEP * 8),  # batch.max_tokens
        ([512, 512, 0, 0, 0, 0], STEP * 2),  # it never shrinks
        ([float("nan"), float("inf")], STEP),
    ):
        size, tokens = BatchSize(config), 0
        for low in lows:
            tokens = size.next_due(tokens)
            size.decide(tokens, (low, low, None))
        assert size.batch_tokens == expected, lows


def test_defaults_of_look_and_bound():
    config = following(look_tokens=0, max_tokens=0, train__tokens=6400)
    assert batch_schedule.look_tokens(config) == 100 and batch_schedule.max_tokens(config) == 8 * STEP


def log(config):
    return walk(config, lambda tokens: 60 * tokens / 1000)


def test_replay_takes_every_decision_again_up_to_any_step():
    config = following()
    batches, records = log(config)
    assert max(batches) == 4 * STEP
    size, decisions = replay(config, [{"tokens": 5, "loss": 1.0}, *records])
    assert [d.batch_tokens for d in decisions] == [r[KEY] for r in records] and size.batch_tokens == batches[-1]
    for tokens, batch in zip(np.cumsum([0, *batches[:-1]]), batches, strict=True):
        assert replay(config, records, tokens=int(tokens))[0].batch_tokens == batch


@pytest.mark.parametrize("key", [KEY, "batch/followed", "batch/low", "batch/threshold", "batch/passes", "tokens"])
def test_a_log_that_was_changed_is_caught(key):
    """All but the value itself, on which nothing rests; of the bound, a change that it matters for."""
    config = following()
    _, records = log(config)
    for i, record in enumerate(records):
        low = record["batch/low"]
        other = {"batch/low": 0.0 if low >= record["batch/threshold"] else 1e9}.get(key, record[key] * 2 + 1)
        changed = [*records[:i], record | {key: other}, *records[i + 1 :]]
        if key == "batch/followed":
            assert replay(config, changed)
        else:
            with pytest.raises(UserError, match="log of decisions about the batch has"):
                replay(config, changed)


def test_a_log_with_a_hole_or_an_addition_is_caught():
    config = following()
    batches, records = log(config)
    end = sum(batches)
    for wrong in (
        *(records[:i] + records[i + 1 :] for i in range(len(records))),
        [records[1], records[0], *records[2:]],
        [records[0], *records],
        [*records, records[-1] | {"tokens": end}],
        [*records[:-1], records[-1] | {"batch/more": 1}],
        [],
    ):
        with pytest.raises(UserError, match="Restore metrics.jsonl"):
            replay(config, wrong, tokens=end)
    with pytest.raises(UserError, match="which no step ends at"):
        replay(config, records, tokens=end - STEP)
    with pytest.raises(UserError):  # another rule
        replay(following(hold=3), records)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("batch/low", "x", "whose batch/low is 'x', no number"),
        ("batch/high", [1], "whose batch/high is [1], no number"),
        ("batch/followed", 10**400, "whose batch/followed is 1000"),
        ("tokens", "a", "whose tokens is 'a', no integer"),
        ("tokens", None, "whose tokens is None, no integer"),
        ("step", None, "whose step is None, no integer"),
        (KEY, 256.0, "whose batch/batch_tokens is 256.0, no integer"),
    ],
)
def test_a_log_that_holds_no_numbers_is_named(key, value, said):
    _, records = log(following())
    with pytest.raises(UserError) as caught:
        replay(following(), [*records[:2], records[2] | {key: value}], tokens=60 * STEP)
    assert said in str(caught.value) and "Restore metrics.jsonl" in str(caught.value)


STAGES = ("0=64", "500=256", "600=512", "2000=128", "7600=1024")


def stage_run(config, start_tokens=0):
    """(tokens at the start, batch) of every step: the last stage that has begun."""
    table = [tuple(map(int, stage.split("="))) for stage in config.batch.stages]
    tokens, steps = start_tokens, []
    while tokens < config.train.tokens:
        steps.append((tokens, ([config.train.batch_tokens] + [batch for at, batch in table if tokens >= at])[-1]))
        tokens += steps[-1][1]
    return steps, tokens


@pytest.mark.parametrize("stages", [STAGES, STAGES[1:], ("500=64",), ("1=256", "2=128", "3=512")])
@pytest.mark.parametrize("start_tokens", [0, 640, 5120])
def test_a_stage_begins_with_the_first_step_that_starts_at_or_after_it(stages, start_tokens):
    config = small_config(batch__schedule="stages", batch__stages=stages, train__tokens=7680)
    steps, end = stage_run(config, start_tokens)
    batches, records = walk(config, lambda _: None, start_tokens)
    assert batches == [batch for _, batch in steps]
    assert batch_schedule.end_tokens(config, start_tokens) == end
    assert [r["tokens"] for r in records] == [
        t for (before, _), (t, _) in zip(steps, steps[1:], strict=False) if any(before < int(s.split("=")[0]) <= t for s in stages)
    ]
    assert all(set(r) == {"step", "tokens", KEY} for r in records)
    assert replay(config, records, start_tokens, end)[0].batch_tokens == steps[-1][1]


def test_a_constant_run_has_no_decisions_and_ends_with_its_last_whole_step():
    config = small_config(train__tokens=10 * STEP + 1)
    assert walk(config, lambda _: 1e9) == ([STEP] * 11, [])
    assert batch_schedule.end_tokens(config) == batch_schedule.lr_end_tokens(config) == 11 * STEP
    assert batch_schedule.lr_end_tokens(following()) == 60 * STEP


def test_no_run_that_follows_reads_more_than_its_bound_says():
    rng = np.random.default_rng(0)
    for _ in range(50):
        config = following(hold=1, max_tokens=int(rng.integers(1, 9)) * STEP, train__tokens=int(rng.integers(1000, 9000)))
        batches, _ = walk(config, lambda _: 1e9)
        assert sum(batches) <= batch_schedule.end_tokens(config)


@pytest.mark.parametrize("base, accumulation, shards", [(8, 1, 1), (8, 4, 1), (8, 2, 4), (12, 3, 2), (12, 1, 3)])
def test_microbatches_stay_as_large_as_they_were(base, accumulation, shards):
    config = small_config(train__batch_tokens=base * 16, train__accumulation=accumulation, mesh__fsdp=shards)
    assert microbatches(config, base) == accumulation
    for sequences in range(shards, 8 * base, shards):
        found = microbatches(config, sequences)
        sound = [
            n
            for n in range(1, sequences + 1)
            if sequences % n == 0 and sequences // n % shards == 0 and sequences // n <= base // accumulation
        ]
        assert found == sound[0]
        if sequences % base == 0:
            assert found == accumulation * sequences // base


def test_a_law_file_is_followed_by_its_lower_bound(tmp_path):
    law = PowerLaw(exponent=0.5, exponent_se=0.1, log_scale=1.0, points=8, centre=8.0, centre_se=0.2)
    write_law(tmp_path / "law.json", "branch", law)
    followed = Followed(following(follow=str(tmp_path / "law.json")))
    value, low, high = followed.read(10_000, dict)
    deviation = np.hypot(0.2, 0.1 * (np.log(10_000) - 8))
    np.testing.assert_allclose([value, low, high], np.exp(1 + np.array([0, -1.96, 1.96]) * deviation) * 100, rtol=1e-4)
    # Its content counts, and not where it lies.
    (tmp_path / "copy.json").write_text(json.dumps(json.loads((tmp_path / "law.json").read_text())))
    assert Followed(following(follow=str(tmp_path / "copy.json"))).fingerprint == followed.fingerprint
    write_law(tmp_path / "copy.json", "branch", law._replace(exponent=0.51))
    assert Followed(following(follow=str(tmp_path / "copy.json"))).fingerprint != followed.fingerprint


def test_what_cannot_be_followed_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.batch.follow is 'nois': must be noise, preconditioned, or the path of a law file"):
        Followed(following(follow="nois"))
    (tmp_path / "law.json").write_text('{"definition": "branch", "exponent": 0.5, "log_scale": 1}')
    with pytest.raises(UserError, match="no lower bound to follow"):
        Followed(following(follow=str(tmp_path / "law.json")))
    write_law(
        tmp_path / "law.json", "branch", PowerLaw(exponent=300.0, exponent_se=0.1, log_scale=1.0, points=8, centre=8.0, centre_se=0.2)
    )
    with pytest.raises(UserError, match="law's value at config.train.tokens, 7680, is not finite"):
        Followed(following(follow=str(tmp_path / "law.json")))
    assert Followed(following()).read(5, lambda: {"noise": (3.0, 2.0, None)}) == (3.0, 2.0, None)
