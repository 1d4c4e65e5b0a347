"""Traces of a few steps of a run, for XProf."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from scaling_jax.errors import UserError

DIRECTORY = "profile"
STEPS = 3  # of one trace


def check(at_tokens: Sequence[int], end_tokens: int) -> None:
    """UserError unless all are positions within a run that ends at `end_tokens`."""
    for tokens in at_tokens:
        if not 0 < tokens < end_tokens:
            raise UserError(f"--profile_at_tokens={tokens}: must be positive and below {end_tokens}, where the run ends")


class StepTraces:
    """Traces the `STEPS` steps that follow the first one to reach each of `at_tokens`, into `directory`/TOKENS.

    The device is waited for before and after a trace, so that it holds its steps whole and no other. The first step of a process,
    which is compiled, is in none. What the steps compute is the same.
    """

    def __init__(self, directory: Path, at_tokens: Sequence[int], tokens: int, say: Callable[[str], None]):
        """`tokens`: where the run begins or continues; positions before it are said to be past."""
        self._directory, self._say = directory, say
        self._due = sorted({at for at in at_tokens if at >= tokens})
        self._warm, self._left, self._metrics = False, 0, None
        for at in sorted(set(at_tokens) - set(self._due)):
            say(f"--profile_at_tokens={at}: is past, the run continues from {tokens:,} tokens")

    def step(self, step: Callable[..., tuple[Any, Any]], number: int, tokens: int, state: Any, *args: Any) -> tuple[Any, Any]:
        """step(state, *args), which gives a state and metrics: the step `number`, taken at `tokens` tokens."""
        if not self._left and self._warm and tokens >= (self._due or [math.inf])[0]:
            self._now = self._due.pop(0)
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory / str(self._now))
            self._left = STEPS
        self._warm = True
        if not self._left:
            return step(state, *args)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state, self._metrics = step(state, *args)
        self._left -= 1
        if not self._left:
            self._stop()
        return state, self._metrics

    def close(self) -> None:
        """Ends a trace whose steps were not all taken."""
        if self._left:
            self._stop()
        for at in self._due:
            self._say(f"--profile_at_tokens={at}: nothing was traced, the run took no step after it")

    def _stop(self) -> None:
        traced, self._left = STEPS - self._left, 0
        try:
            jax.block_until_ready(self._metrics)
        finally:
            jax.profiler.stop_trace()
        self._say(f"{traced} steps traced, for XProf: {self._directory / str(self._now)}")
