"""How far beyond what was measured a law is asked, input by input."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.fit import LawFit
from scaling_jax.laws.store import Laws

FURTHEST = 1000.0  # times beyond the nearer end of the measured range; no law is followed further


class Reach(NamedTuple):
    """An input of a law, and where it was measured."""

    name: str
    low: float
    high: float
    asked: float

    @property
    def factor(self) -> float:
        """How many times beyond the nearer end of the measured range; 1 inside."""
        return max(self.low / self.asked, self.asked / self.high, 1.0)

    @property
    def inside(self) -> bool:
        return self.factor <= 1 + 1e-9

    @property
    def side(self) -> str:
        """Of the measured range, "above" or "below"; of no use inside."""
        return "above" if self.asked > self.high else "below"


def reaches(laws: Laws, law: str, fitted: LawFit, x: Mapping[str, Any], batch_tokens: float | None = None) -> tuple[Reach, ...]:
    """Of every input, and of N and T, where the law has no term of them, from the range of the table.

    Args:
      laws: that the law is one of.
      law: its name, for the message.
      fitted: the law.
      x: its inputs, of one run.
      batch_tokens: the run's, where the number depends on it beside the law's inputs.

    Raises:
      UserError: an input is more than `FURTHEST` times beyond what was measured.
    """
    ranges = {name: ends for name, ends in fitted.ranges.items() if name in x}
    asked = {name: float(np.ravel(x[name])[0]) for name in x}
    others = ["params"] if "data_tokens" in ranges else ["params", "tokens"]
    if batch_tokens is not None:
        asked["batch_tokens"] = batch_tokens
        others.append("batch_tokens")
    ranges |= {name: laws.ranges[name] for name in others if name not in ranges and name in asked and name in laws.ranges}
    found = tuple(Reach(name, *ends, asked[name]) for name, ends in ranges.items())
    for reach in found:
        if reach.factor > FURTHEST:
            raise UserError(
                f"not supported: {law}: {reach.name} was measured from {reach.low:.4g} to {reach.high:.4g}, and {reach.asked:.4g} is "
                f"{reach.factor:.3g} times {reach.side} that; no law is followed beyond {FURTHEST:g} times"
            )
    return found
