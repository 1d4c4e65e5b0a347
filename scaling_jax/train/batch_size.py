"""The batch of every step: what the config says, or what a measurement says that the run itself or a law file gives.

A batch that follows looks at fixed token counts. Where the lower 95% bound of what it follows is at least batch.multiple times the
batch at batch.hold looks in a row, it doubles; it never shrinks. (Growth with the noise scale: McCandlish et al. 2018, §2.) A look depends
on the config, on the looks before it and on the bound alone, so that the log of looks is the whole state: a resumed run replays
it, and anybody can check it.
"""

import hashlib
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from scaling_jax import batch_schedule
from scaling_jax.errors import UserError
from scaling_jax.laws.law_file import read_law
from scaling_jax.laws.table import is_number

KEY = "batch/batch_tokens"  # records of decisions have it, and no others

Reading = tuple[float | None, float | None, float | None]  # value, low, high in tokens; None is unknown, or no upper end
UNKNOWN: Reading = (None, None, None)


class Decision(NamedTuple):
    """What was decided after `tokens`: the batch from there on, and why.

    `reading` is what is followed, with its 95% interval, `threshold` what its lower end had to reach, in tokens; `passes` is the
    number of looks in a row, since the last doubling, at which it did. Stages have no reading.
    """

    tokens: int
    batch_tokens: int
    reading: Reading = UNKNOWN
    threshold: float | None = None
    passes: int = 0

    def record(self, step: int) -> dict[str, Any]:
        """As a line of metrics.jsonl."""
        record = {"step": step, "tokens": self.tokens, KEY: self.batch_tokens}
        if self.threshold is None:
            return record
        names = ("batch/followed", "batch/low", "batch/high", "batch/threshold", "batch/passes")
        return record | dict(zip(names, (*self.reading, self.threshold, self.passes), strict=True))


def reading_of(record: Mapping[str, Any]) -> Reading:
    """The reading of a decision's record."""
    return record.get("batch/followed"), record.get("batch/low"), record.get("batch/high")


class BatchSize:
    """The batch, step after step. Its state, `batch_tokens` and `passes`, is a pure function of the decisions so far.

    Args:
      config: a valid config.
      start_tokens: where the run begins; a run that continues another's checkpoint begins there.
    """

    def __init__(self, config: ConfigDict, start_tokens: int = 0):
        self.config = config
        self.batch_tokens = batch_schedule.batch_at(config, start_tokens)
        self.passes = 0

    def next_due(self, tokens: int) -> int | None:
        """The token count, the end of a step, at which the next decision is to be taken; None if there is none before the run's end."""
        marks = [stage.tokens for stage in batch_schedule.stages(self.config) if stage.tokens > tokens]
        if self.config.batch.schedule == "follow":
            every = batch_schedule.look_tokens(self.config)
            marks = [(tokens // every + 1) * every]
        if not marks:
            return None
        due = tokens + -(-(marks[0] - tokens) // self.batch_tokens) * self.batch_tokens
        return due if due < self.config.train.tokens else None

    def decide(self, tokens: int, reading: Reading = UNKNOWN) -> Decision:
        """Takes the decision that is due at `tokens`."""
        if self.config.batch.schedule == "stages":
            self.batch_tokens = batch_schedule.batch_at(self.config, tokens)
            return Decision(tokens, self.batch_tokens)
        _, low, _ = reading = tuple(float(x) if x is not None and math.isfinite(x) else None for x in reading)
        threshold = self.config.batch.multiple * self.batch_tokens
        passes = self.passes + 1 if low is not None and low >= threshold else 0
        grows = passes >= self.config.batch.hold and 2 * self.batch_tokens <= batch_schedule.max_tokens(self.config)
        self.passes = 0 if grows else passes
        self.batch_tokens *= 2 if grows else 1
        return Decision(tokens, self.batch_tokens, reading, threshold, passes)


def microbatches(config: ConfigDict, sequences: int) -> int:
    """Microbatches of a step on so many sequences: as few as keep each no larger than at train.batch_tokens, where there are
    train.accumulation, and spread it evenly over the devices of a resolved mesh."""
    largest = config.train.batch_tokens // config.model.context // config.train.accumulation
    shards = config.mesh.replica * config.mesh.fsdp
    return next(n for n in range(-(-sequences // largest), sequences + 1) if sequences % (n * shards) == 0)


class Followed:
    """What batch.follow names: the noise scale that the run measures, or a law file's critical batch.

    `fingerprint` is that of the law file's content, None where there is no file.

    Raises:
      UserError: the law file cannot be read.
    """

    def __init__(self, config: ConfigDict):
        self.name, self.law, self.fingerprint = config.batch.follow, None, None
        if config.batch.schedule != "follow" or self.name in (batch_schedule.NOISE, batch_schedule.PRECONDITIONED):
            return
        if not Path(self.name).is_file():
            raise UserError(f"config.batch.follow is {self.name!r}: must be noise, preconditioned, or the path of a law file; no such file")
        definition, self.law = read_law(self.name)
        value, low, _ = self._of_law(config.train.tokens)
        if not math.isfinite(value):
            raise UserError(
                f"config.batch.follow is {self.name!r}: the law's value at config.train.tokens, {config.train.tokens}, is not finite; must "
                "be a law in tokens, exp(log_scale) · tokens^exponent"
            )
        if not math.isfinite(low):
            raise UserError(
                f"config.batch.follow is {self.name!r}: a law without exponent_se, centre or centre_se has no lower bound to follow"
            )
        self.fingerprint = hashlib.sha256(json.dumps([definition, *self.law]).encode()).hexdigest()[:16]

    def read(self, tokens: int, noise: Callable[[], Mapping[str, Reading]]) -> Reading:
        """Its value and 95% interval after `tokens` of the run; `noise` is asked only where there is no law."""
        if self.law is None:
            return noise()[self.name]
        return self._of_law(tokens)

    def _of_law(self, tokens: int) -> Reading:
        with np.errstate(over="ignore", invalid="ignore"):  # an end may be infinite
            return float(self.law(tokens)), *map(float, self.law.interval(tokens))


def replay(
    config: ConfigDict, records: Iterable[Mapping[str, Any]], start_tokens: int = 0, tokens: int | None = None
) -> tuple[BatchSize, list[Decision]]:
    """Takes all decisions of a run's log again, from the numbers that it looked at and the config.

    Args:
      config: of the run.
      records: of metrics.jsonl; those that are no decisions do not matter.
      start_tokens: where the run began.
      tokens: how far the log must reach; those later are left out. By default as far as it does reach.

    Returns:
      The batch size as it was then, and the decisions.

    Raises:
      UserError: a decision is missing from the log, or is another than its own numbers lead to.
    """
    size, decisions, at = BatchSize(config, start_tokens), [], start_tokens
    logged = [record for record in records if KEY in record]
    for record in logged:
        _check_numbers(record)
    logged = [record for record in logged if tokens is None or record["tokens"] <= tokens]
    for record in logged:
        due = size.next_due(at)
        if record["tokens"] != due:
            raise _inconsistent(f"has one at {record['tokens']:,} tokens, where {'none' if due is None else f'one at {due:,}'} is due")
        decision = size.decide(due, reading_of(record))
        again = decision.record(record["step"])
        if again != record:
            differ = ", ".join(f"{key} is {record.get(key)}, not {again.get(key)}" for key in again if record.get(key) != again.get(key))
            raise _inconsistent(f"has another at {due:,} tokens than its numbers lead to: {differ or 'unknown keys'}")
        decisions.append(decision)
        at = due
    due = size.next_due(at)
    if tokens is not None and due is not None and due <= tokens:
        raise _inconsistent(f"has none at {due:,} tokens")
    if tokens is not None and (tokens - at) % size.batch_tokens:
        raise _inconsistent(f"leads to {size.batch_tokens:,} tokens from {at:,} on, which no step ends at {tokens:,} with")
    return size, decisions


def _check_numbers(record: Mapping[str, Any]) -> None:
    for key in ("step", "tokens", KEY):
        if type(record.get(key)) is not int:
            raise _inconsistent(f"has one whose {key} is {reprlib.repr(record.get(key))}, no integer")
    for key, value in zip(("batch/followed", "batch/low", "batch/high"), reading_of(record), strict=True):
        if value is not None and not is_number(value):
            raise _inconsistent(f"has one at {record['tokens']:,} tokens whose {key} is {reprlib.repr(value)}, no number")


def _inconsistent(what: str) -> UserError:
    return UserError(
        f"the log of decisions about the batch {what}; the batch cannot be told without it. Restore metrics.jsonl, or train again with "
        "--overwrite"
    )
