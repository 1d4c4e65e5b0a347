"""What the fields batch.* of a config say: stages, bounds, where the run ends, and what is wrong with them."""

from typing import NamedTuple

from ml_collections import ConfigDict

LOOKS = 64  # of a run, unless batch.look_tokens says otherwise
LARGEST = 8  # times train.batch_tokens, unless batch.max_tokens says otherwise
NOISE, PRECONDITIONED = "noise", "preconditioned"  # anything else in batch.follow is the path of a law file


class Stage(NamedTuple):
    """From `tokens` on, the batch is `batch_tokens`."""

    tokens: int
    batch_tokens: int


def stages(config: ConfigDict) -> list[Stage]:
    """The stages of batch.stages where batch.schedule is 'stages', else none. ValueError for an entry that is no stage."""
    return [parse_stage(entry) for entry in config.batch.stages] if config.batch.schedule == "stages" else []


def parse_stage(entry: str) -> Stage:
    """'400000=2048' is Stage(400000, 2048); ValueError for what is no 'tokens=batch_tokens'."""
    tokens, _, batch_tokens = str(entry).partition("=")
    return Stage(int(tokens), int(batch_tokens))


def batch_at(config: ConfigDict, tokens: int) -> int:
    """The batch, in tokens, of a step that starts at `tokens`, as far as the config alone decides it."""
    begun = [stage.batch_tokens for stage in stages(config) if stage.tokens <= tokens]
    return begun[-1] if begun else config.train.batch_tokens


def look_tokens(config: ConfigDict) -> int:
    """Tokens between two looks at what the batch follows."""
    return config.batch.look_tokens or max(1, config.train.tokens // LOOKS)


def max_tokens(config: ConfigDict) -> int:
    """What the batch does not grow beyond when it follows."""
    return config.batch.max_tokens or LARGEST * config.train.batch_tokens


def end_tokens(config: ConfigDict, start_tokens: int = 0) -> int:
    """Tokens at which a run that starts at `start_tokens` ends: with the first whole batch at or past train.tokens.

    Where the batch follows a measurement, the largest that this can be.
    """
    total = config.train.tokens
    if config.batch.schedule == "follow":
        return total - 1 + max_tokens(config)
    tokens = start_tokens
    for until in [*(stage.tokens for stage in stages(config)), total]:
        batch_tokens = batch_at(config, tokens)
        tokens += -(-max(0, min(until, total) - tokens) // batch_tokens) * batch_tokens
    return tokens


def lr_end_tokens(config: ConfigDict) -> int:
    """Tokens at which the lr schedule ends: with the run where the batch is constant, else at train.tokens."""
    return end_tokens(config) if config.batch.schedule == "constant" else config.train.tokens


def faults(config: ConfigDict, shards: int) -> list[str]:
    """Messages for every relation between the fields batch.* and the rest that does not hold.

    Args:
      config: every field of its own type and range.
      shards: devices that share a batch, 1 where that is not known yet.
    """
    batch = config.batch
    if batch.schedule == "stages":
        return _stage_faults(config, shards) or _length_faults(config)
    found = []
    if batch.stages:
        found.append(f"config.batch.stages is {batch.stages}: takes config.batch.schedule=stages, which is {batch.schedule!r}")
    found += _follow_faults(config) if batch.schedule == "follow" else []
    return found or _length_faults(config)


def _length_faults(config: ConfigDict) -> list[str]:
    """A run that one batch makes longer than sequences can be counted. What train.tokens does so is said with that field."""
    beyond, end, train = (1 << 31) * config.model.context, end_tokens(config), config.train
    if end < beyond or train.tokens - 1 + train.batch_tokens >= beyond:
        return []
    most = f"the run may end at {end} tokens; at context {config.model.context} it has at most {beyond - config.model.context}"
    if config.batch.schedule == "stages":
        largest = max(stages(config), key=lambda stage: stage.batch_tokens)
        return [f"config.batch.stages has '{largest.tokens}={largest.batch_tokens}': {most}"]
    return [f"config.batch.max_tokens is {config.batch.max_tokens}: {most}"] if config.batch.max_tokens else []


def _stage_faults(config: ConfigDict, shards: int) -> list[str]:
    try:
        found = stages(config)
    except ValueError:
        found = []
    if not found:
        return [f"config.batch.stages is {config.batch.stages}: must be 'tokens=batch_tokens', one or more, for example '400000=2048'"]
    faults, unit, least = [], config.model.context * shards, 2 * config.model.context
    for stage, earlier in zip(found, [None, *found], strict=False):
        name = f"config.batch.stages has '{stage.tokens}={stage.batch_tokens}'"
        if not 0 <= stage.tokens < config.train.tokens:
            faults.append(f"{name}: must begin within the run, before config.train.tokens {config.train.tokens}")
        elif earlier and stage.tokens <= earlier.tokens:
            faults.append(f"{name} after '{earlier.tokens}={earlier.batch_tokens}': must be in ascending order of tokens")
        if stage.batch_tokens <= 0 or stage.batch_tokens % unit:
            faults.append(f"{name}: the batch must be a multiple of {unit} (context {config.model.context} x replica·fsdp {shards})")
        elif config.noise_scale.every and stage.batch_tokens < least:
            faults.append(
                f"{name}: one sequence, but noise is measured between sequences; the batch must be at least {least}, "
                "or config.noise_scale.every=0"
            )
    return faults


def _follow_faults(config: ConfigDict) -> list[str]:
    batch, noise = config.batch, config.noise_scale
    faults = []
    if batch.follow in (NOISE, PRECONDITIONED) and not noise.every:
        faults.append(f"config.noise_scale.every is 0: config.batch.follow={batch.follow} follows what is measured; must be at least 1")
    if batch.follow == PRECONDITIONED and not noise.preconditioned:
        faults.append("config.noise_scale.preconditioned is False: config.batch.follow=preconditioned takes it to be True")
    if max_tokens(config) < config.train.batch_tokens:
        faults.append(
            f"config.batch.max_tokens is {batch.max_tokens}: must be at least where the batch starts, config.train.batch_tokens "
            f"{config.train.batch_tokens}, or 0 for {LARGEST} times that"
        )
    return faults
