"""What is branched off a run, and how: the config of every branch, and all that stands against it before anything runs.

A branch continues a run from one of its checkpoints with k times the batch (Merrill et al. 2025, arXiv:2505.23971). All branches of a
checkpoint see the same tokens in the same order and end at the same token count.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from scaling_jax.batch_schedule import batch_at, lr_end_tokens, stages
from scaling_jax.branch.results import branch_dir
from scaling_jax.errors import UserError
from scaling_jax.train.batch_size import microbatches, replay
from scaling_jax.train.metrics import read_records
from scaling_jax.train.opened import read_config, saved_tokens
from scaling_jax.train.workdir import BRANCHES

LEAST_STEPS = 4  # of a branch: with fewer, the first steps after the change are all there is to see
SPAN_PARTS = 8  # of the tokens seen so far, of which a span is one where none is asked for
MOST = (1 << 31) - 1  # sequences that a run can count
LR_RULES = ("sqrt", "linear", "none")


class Source(NamedTuple):
    """The run that is branched off."""

    workdir: Path
    config: ConfigDict
    identity: dict[str, Any]
    checkpoints: list[int]  # token counts


class Asked(NamedTuple):
    """What to measure. `span_tokens` None is an eighth of the tokens seen; `lr_rule` the power of k that the lr is times, see LR_RULES."""

    at_tokens: Sequence[int]
    factors: Sequence[int]
    span_tokens: int | None = None
    lr_rule: str = "sqrt"


class Branch(NamedTuple):
    """`config` is that of the branch's own run, which starts from the source's checkpoint at `at_tokens`."""

    at_tokens: int
    factor: int
    batch_tokens: int
    lr_rule: str
    end_tokens: int
    workdir: Path
    config: ConfigDict

    @property
    def span_tokens(self) -> int:
        return self.end_tokens - self.at_tokens

    @property
    def steps(self) -> int:
        return self.span_tokens // self.batch_tokens


def read_source(run: str | Path) -> Source:
    """The run in a work directory; UserError if there is none. Opens no checkpoint: the run may still be training."""
    config, identity = read_config(Path(run))
    return Source(Path(run), config, identity, saved_tokens(Path(run)))


def plan(source: Source, asked: Asked) -> list[Branch]:
    """Every branch, by checkpoint and then by factor; UserError that names the flag at fault."""
    _check_flags(asked)
    missing = [at for at in asked.at_tokens if at not in source.checkpoints]
    if missing:
        there = ", ".join(map(str, source.checkpoints)) or "none"
        raise UserError(
            f"--at_tokens={','.join(map(str, missing))}: {source.workdir} has no such checkpoint; there are {there}. "
            "config.checkpoint.keep_at_tokens names those that a run keeps for good"
        )
    branches = []
    for at_tokens in sorted(set(asked.at_tokens)):
        batch_tokens = batch_there(source, at_tokens)
        span_tokens = _span(source, asked, at_tokens, batch_tokens)
        for factor in asked.factors:
            workdir = branch_dir(source.workdir / BRANCHES, at_tokens, factor)
            config = _config(source, asked.lr_rule, at_tokens, batch_tokens, factor, at_tokens + span_tokens)
            branch = Branch(at_tokens, factor, factor * batch_tokens, asked.lr_rule, at_tokens + span_tokens, workdir, config)
            branches.append(branch)
    return branches


def _check_flags(asked: Asked) -> None:
    faults = []
    shown = ",".join(map(str, asked.factors))
    if len(asked.factors) < 2 or asked.factors[0] != 1 or any(b <= a for a, b in zip(asked.factors, asked.factors[1:], strict=False)):
        faults.append(f"--factors={shown}: must ascend from 1, the batch that the others are compared with, for example 1,2,4,8")
    elif asked.factors[-1] > MOST:
        faults.append(f"--factors: the largest is a number of {len(str(asked.factors[-1]))} digits; must be at most {MOST}")
    if not asked.at_tokens:
        faults.append("--at_tokens=… is missing: token counts of checkpoints of the run, comma-separated")
    if asked.span_tokens is not None and asked.span_tokens < 1:
        faults.append(f"--span_tokens={asked.span_tokens}: must be at least 1")
    if asked.lr_rule not in LR_RULES:
        faults.append(f"--lr_rule={asked.lr_rule}: must be one of {', '.join(LR_RULES)}")
    if faults:
        raise UserError("\n".join(faults))


def batch_there(source: Source, at_tokens: int) -> int:
    """The batch, in tokens, with which the run itself goes on from `at_tokens`; where it follows a measurement its log tells."""
    if source.config.batch.schedule != "follow":
        return batch_at(source.config, at_tokens)
    start = source.identity.get("start")  # of a run that itself began with another's checkpoint
    start_tokens = start["tokens"] if isinstance(start, dict) else 0
    try:
        return replay(source.config, read_records(source.workdir), start_tokens, at_tokens)[0].batch_tokens
    except UserError as error:
        raise UserError(f"--run={source.workdir}: {error}") from error


def _span(source: Source, asked: Asked, at_tokens: int, batch_tokens: int) -> int:
    """Tokens from a checkpoint to the end of its branches, whole batches of every one of them."""
    unit = math.lcm(*asked.factors) * batch_tokens
    wanted = asked.span_tokens or -(-at_tokens // SPAN_PARTS)
    span, largest = -(-wanted // unit) * unit, max(asked.factors) * batch_tokens
    if span < LEAST_STEPS * largest:
        raise UserError(
            f"--factors={','.join(map(str, asked.factors))}: the largest batch, {largest} tokens, takes {span // largest} steps in the "
            f"{span} tokens from {at_tokens} on; must be at least {LEAST_STEPS}: leave it out, or "
            f"--span_tokens={-(-LEAST_STEPS * largest // unit) * unit}"
        )
    if span > 2 * wanted:
        raise UserError(
            f"--factors={','.join(map(str, asked.factors))}: all of them together end a batch every {unit} tokens only, and so take a span "
            f"of {span} from {at_tokens} on in place of {wanted}; must be factors that divide each other, or --span_tokens={span}"
        )
    if at_tokens + span > (most := MOST * source.config.model.context):
        raise UserError(f"--span_tokens={span}: must be at most {max(0, most - at_tokens)} from {at_tokens} on, more a run cannot count")
    schedule, end = source.config.schedule.name, lr_end_tokens(source.config)
    if schedule != "constant" and at_tokens + span > end:
        fits = (end - at_tokens) // unit * unit
        instead = f"must be at most {fits}, or" if fits >= LEAST_STEPS * largest else "it takes smaller factors, an earlier checkpoint or"
        raise UserError(
            f"--span_tokens={span}: from {at_tokens} on beyond {end} tokens, where the run's lr schedule, {schedule}, ends; {instead} "
            "a run with config.schedule.name=constant"
        )
    return span


def _config(source: Source, lr_rule: str, at_tokens: int, batch_tokens: int, factor: int, end_tokens: int) -> ConfigDict:
    config = source.config.copy_and_resolve_references()
    train, batch = config.train, config.batch
    past = [f"{stage.tokens}={stage.batch_tokens}" for stage in stages(source.config) if stage.tokens < at_tokens]
    if batch_tokens != train.batch_tokens and batch.lr_rule != lr_rule:
        if batch.lr_rule != "none":
            raise UserError(
                f"--lr_rule={lr_rule}: at {at_tokens} tokens the run has a batch of {batch_tokens} with the lr of "
                f"config.batch.lr_rule={batch.lr_rule}; must be {batch.lr_rule} too"
            )
        # The lr was that of the peak, whatever the batch: the rule counts from the batch there, in as many microbatches.
        train.accumulation = microbatches(source.config, batch_tokens // config.model.context)
        train.batch_tokens, past = batch_tokens, []
    batch.schedule, batch.stages, batch.lr_rule = "stages", (*past, f"{at_tokens}={factor * batch_tokens}"), lr_rule
    # The source's own course: its lr, and what its noise scale looks back. A constant lr has no end, so such a branch may go on
    # beyond the run.
    config.noise_scale.window_tokens = config.noise_scale.window_tokens or max(1, round(train.tokens / 8))
    constant = config.schedule.name == "constant"
    train.tokens = max(end_tokens, config.schedule.warmup_tokens) if constant else lr_end_tokens(source.config)
    train.stop_at_tokens = end_tokens
    config.eval.every_tokens, config.checkpoint.keep_latest, config.checkpoint.keep_at_tokens = 0, 1, ()
    config.data.verify = False  # once is enough
    config.logging.wandb = ""  # each would be a run there
    config.data.repeat = True  # of its budget no more is read than up to end_tokens, which the data have
    return config
