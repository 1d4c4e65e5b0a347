"""What a branch's config says, and what is refused before anything runs."""

import json
from pathlib import Path

import pytest
from helpers import small_config

from scaling_jax import config as config_lib
from scaling_jax.branch.plan import Asked, Source, plan, read_source
from scaling_jax.errors import UserError
from scaling_jax.train.batch_size import BatchSize

B = 128  # the batch of small_config
AT = 16 * B


def source(workdir="run", checkpoints=(AT,), **fields):
    config = small_config(**{"schedule__name": "constant", "train__tokens": 40 * B} | fields)
    config_lib.validate(config, 1)
    return Source(Path(workdir), config, {}, list(checkpoints))


def refused(*args) -> str:
    with pytest.raises(UserError) as error:
        plan(*args)
    return str(error.value)


def test_branches_differ_from_their_run_in_batch_rule_and_end_only():
    run = source(checkpoint__keep_at_tokens=(AT,))
    branches = plan(run, Asked([AT], [1, 2, 4], 16 * B, "linear"))
    assert [(b.factor, b.batch_tokens, b.end_tokens, b.steps) for b in branches] == [
        (1, B, 32 * B, 16),
        (2, 2 * B, 32 * B, 8),
        (4, 4 * B, 32 * B, 4),
    ]
    theirs = config_lib.identity(run.config)
    for b in branches:
        config_lib.validate(b.config, 1)
        assert {name: value for name, value in config_lib.identity(b.config).items() if value != theirs[name]} == {
            "batch.schedule": "stages",
            "batch.stages": (f"{AT}={b.batch_tokens}",),
            "batch.lr_rule": "linear",
            "train.tokens": 32 * B,
            "noise_scale.window_tokens": 5 * B,  # an eighth of the run's 40, as the run has it
            "data.repeat": True,
        }
        assert b.config.train.stop_at_tokens == 32 * B and b.workdir == Path(f"run/branches/{AT}/x{b.factor}")


def test_the_span_is_an_eighth_of_the_tokens_seen_in_whole_batches_of_every_factor():
    run = source(checkpoints=(96 * B, 100 * B), train__tokens=200 * B)
    spans = {at: {b.span_tokens for b in plan(run, Asked([at], [1, 2, 3]))} for at in run.checkpoints}
    assert spans == {96 * B: {12 * B}, 100 * B: {18 * B}}  # batches of 1, 2 and 3 end together after every 6
    both = plan(run, Asked([100 * B, 96 * B], [1, 2]))
    assert [(b.at_tokens, b.factor) for b in both] == [(96 * B, 1), (96 * B, 2), (100 * B, 1), (100 * B, 2)]


def test_a_constant_lr_goes_on_beyond_the_run_and_any_other_does_not():
    assert {b.config.train.tokens for b in plan(source(), Asked([AT], [1, 2], 32 * B))} == {48 * B}
    warm = source(schedule__warmup_tokens=40 * B)
    assert {b.config.train.tokens for b in plan(warm, Asked([AT], [1, 2], 8 * B))} == {40 * B}  # the same slope
    cosine = source(schedule__name="cosine", train__tokens=40 * B - 1)  # ends with a whole batch, at 40
    branches = plan(cosine, Asked([AT], [1, 2], 24 * B))
    assert {(b.config.train.tokens, b.config.train.stop_at_tokens) for b in branches} == {(40 * B, 40 * B)}
    assert {b.config.train.tokens for b in plan(cosine, Asked([AT], [1, 2], 8 * B))} == {40 * B}
    text = refused(cosine, Asked([AT], [1, 2], 25 * B))
    assert f"--span_tokens={26 * B}" in text and "cosine" in text and f"at most {24 * B}" in text and "schedule.name=constant" in text
    late = source(schedule__name="cosine", checkpoints=[38 * B])
    assert "an earlier checkpoint or a run with config.schedule.name=constant" in refused(late, Asked([38 * B], [1, 2], 8 * B))


def test_factors_are_on_the_batch_that_the_run_has_there():
    """A run with stages whose lr did not follow: the rule counts from the batch there."""
    stages = {"batch__schedule": "stages", "batch__stages": (f"{8 * B}={2 * B}", f"{AT}={4 * B}"), "train__accumulation": 2}
    run = source(checkpoints=(8 * B, 12 * B, AT), train__tokens=80 * B, **stages)
    one, two = plan(run, Asked([12 * B], [1, 2], 16 * B))
    assert (one.batch_tokens, two.batch_tokens) == (2 * B, 4 * B)
    assert two.config.train.batch_tokens == 2 * B and two.config.batch.stages == (f"{12 * B}={4 * B}",)
    assert two.config.train.accumulation == 4  # microbatches of half of B, as the run had them
    assert plan(run, Asked([AT], [1, 2], 32 * B))[0].batch_tokens == 4 * B  # with which the run itself goes on from there


def test_a_run_whose_lr_followed_its_batch_keeps_its_rule():
    stages = {"batch__schedule": "stages", "batch__stages": (f"{8 * B}={2 * B}", f"{20 * B}={4 * B}")}
    run = source(checkpoints=(12 * B,), batch__lr_rule="sqrt", **stages)
    two = plan(run, Asked([12 * B], [1, 2], 16 * B, "sqrt"))[1]
    assert two.config.train.batch_tokens == B and two.config.batch.stages == (f"{8 * B}={2 * B}", f"{12 * B}={4 * B}")
    text = refused(run, Asked([12 * B], [1, 2], 16 * B, "linear"))
    assert "--lr_rule=linear" in text and f"a batch of {2 * B}" in text and "must be sqrt too" in text


@pytest.mark.parametrize("start_tokens", [0, 6 * B])
def test_where_the_batch_followed_a_measurement_its_log_tells(tmp_path, start_tokens):
    """A run that logs its last step only, the step before the doubling at the checkpoint."""
    run = source(tmp_path, batch__schedule="follow", batch__look_tokens=2 * B, batch__hold=1)
    run = run._replace(identity={"start": {"identity": "abc", "tokens": start_tokens}} if start_tokens else {})
    size, tokens, lines = BatchSize(run.config, start_tokens), start_tokens, []
    while tokens < AT:
        tokens = size.next_due(tokens)
        low = 4.0 * B if tokens == AT else 0.0
        lines.append(size.decide(tokens, (low, low, None)).record((tokens - start_tokens) // B))
    assert tokens == AT and size.batch_tokens == 2 * B
    lines = [{"tokens": AT, "batch_tokens": B, "loss": 2.0}, *lines, {"tokens": AT, "eval/heldout/loss": 2.0}]
    text = refused(run, Asked([AT], [1, 2], 16 * B))
    assert text.startswith(f"--run={tmp_path}: the log of decisions about the batch has none at {start_tokens + 2 * B:,} tokens")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two = plan(run, Asked([AT], [1, 2], 16 * B))
    assert one.batch_tokens == 2 * B and one.config.batch.schedule == "stages" and two.config.batch.stages == (f"{AT}={4 * B}",)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked([AT], [2, 4]), "--factors=2,4: must ascend from 1"),
        (Asked([AT], [1]), "--factors=1: must ascend from 1"),
        (Asked([AT], [1, 4, 2]), "--factors=1,4,2: must ascend from 1"),
        (Asked([AT], [1, 2, 2]), "--factors=1,2,2: must ascend from 1"),
        (Asked([AT], [-1, 1]), "--factors=-1,1: must ascend from 1"),
        (Asked([AT], [1, 2], 0), "--span_tokens=0: must be at least 1"),
        (Asked([AT], [1, 2], None, "square"), "--lr_rule=square: must be one of sqrt, linear, none"),
        (Asked([], [1, 2]), "--at_tokens=… is missing"),
        (Asked([AT, 5], [1, 2]), f"--at_tokens=5: run has no such checkpoint; there are {AT}. config.checkpoint.keep_at_tokens"),
        (Asked([AT], [1, 8], 16 * B), f"--factors=1,8: the largest batch, {8 * B} tokens, takes 2 steps"),
        (Asked([AT], [1, 3], 16 * B - 1), [18, 6]),
        (Asked([AT], [1, 3, 5], 16 * B), [30, 10, 6]),
        (
            Asked([AT], [1, 3, 5, 7], 16 * B),
            f"every {105 * B} tokens only, and so take a span of {105 * B} from {AT} on in place of {16 * B}",
        ),
        (
            Asked([64 * B], [1, 2, 3, 5, 7], None),
            f"in place of {8 * B}; must be factors that divide each other, or --span_tokens={210 * B}",
        ),
        (Asked([AT], [1, 10**400]), "--factors: the largest is a number of 401 digits; must be at most 2147483647"),
        (Asked([AT], [1, 2], 10**400), f"must be at most {(2**31 - 1) * 16 - AT} from {AT} on, more a run cannot count"),
        (Asked([AT], [1, 6], 16 * B), f"at least 4: leave it out, or --span_tokens={24 * B}"),
    ],
)
def test_what_is_asked_for_wrongly_is_named(asked, words):
    run = source(checkpoints=[AT, 64 * B] if 64 * B in asked.at_tokens else [AT])
    if isinstance(words, list):
        assert [b.steps for b in plan(run, asked)] == words
    else:
        assert words in refused(run, asked)


def test_a_stored_config_is_read_back_as_it_was(tmp_path):
    config = small_config(checkpoint__keep_at_tokens=(AT,), batch__schedule="stages", batch__stages=(f"{AT}=256",), optimizer__lr=0.1)
    stored = {"config": config_lib.to_json(config), "identity": {"train.seed": 0}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    for name in (f"{AT}", "512", "640.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    run = read_source(tmp_path)
    assert config_lib.flatten(run.config) == config_lib.flatten(config) and run.checkpoints == [512, AT]
    del stored["config"]["batch"]  # of a version before
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_source(tmp_path).config.batch.schedule == "constant"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "must be the work directory of a run"),
        ("{", "is not a config that scaling_jax wrote"),
        ('{"config": 3, "identity": {}}', "is not a config that scaling_jax wrote"),
        ('{"config": {"model": {"width": "x"}}, "identity": {}}', "is not a config that scaling_jax wrote"),
        ('{"config": {"model": {"colour": 3}}, "identity": {}}', "another version of scaling_jax: config.model.colour: no such field"),
    ],
)
def test_a_directory_without_a_run_is_named(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_source(tmp_path)
    assert str(error.value).startswith(f"--run={tmp_path}: ") and words in str(error.value)
