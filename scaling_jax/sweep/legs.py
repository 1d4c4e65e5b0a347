"""Which way a group's trajectories take to their horizons: one leg, or a trunk and a decay that branches off it for each horizon.

With a constant lr one leg serves all horizons. With warmup-stable-decay the trunk has the constant part of the longest, and each decay
starts from the trunk's checkpoint; what it ends with is what a run of that budget alone ends with. Linear and cosine have a leg for each.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from scaling_jax.batch_schedule import batch_at, lr_end_tokens
from scaling_jax.sweep import study

TRUNK = "trunk"


class Leg(NamedTuple):
    """A stretch of training. All token counts are ends of whole steps, but for the horizons, which are as asked for."""

    name: str
    start_tokens: int  # of the trunk, whose checkpoint there it begins with; 0 is a fresh state
    end_tokens: int
    horizons: tuple[tuple[int, int], ...]  # (horizon, tokens at which it is reached)
    keep_at_tokens: tuple[int, ...] = ()  # where others branch off
    schedule: str = ""  # in the place of the config's
    budget_tokens: int = 0  # train.tokens of this leg
    decay_tokens: int = 0

    def config(self, config: ConfigDict) -> ConfigDict:
        """That of a run which is this leg."""
        config = config.copy_and_resolve_references()
        config.schedule.name = self.schedule
        config.train.tokens, config.schedule.decay_tokens = self.budget_tokens, self.decay_tokens
        return config

    @property
    def tokens(self) -> int:
        """That are trained on."""
        return self.end_tokens - self.start_tokens


def legs_of(config: ConfigDict, horizons: Sequence[int], decay_fraction: float = 0.0) -> list[Leg]:
    """The legs of a trajectory, in the order in which they are trained.

    Args:
      config: of the trajectory; train.tokens does not matter.
      horizons: ascending; one only where the schedule is linear or cosine.
      decay_fraction: of a horizon that decays (wsd); 0 is the config's decay_tokens.
    """
    name = config.schedule.name
    if name != "wsd":
        reached = tuple((horizon, step_end(config, horizon)) for horizon in horizons)
        return [Leg(TRUNK, 0, reached[-1][1], reached, (), name, horizons[-1], config.schedule.decay_tokens)]
    decays = []
    for horizon in horizons:
        decay_tokens = study.decay_tokens(decay_fraction, horizon) if decay_fraction else config.schedule.decay_tokens
        of_horizon = config.copy_and_resolve_references()
        of_horizon.train.tokens = horizon
        start = step_end(config, lr_end_tokens(of_horizon) - decay_tokens, before=True)
        end = step_end(config, horizon)
        decays.append(Leg(f"decay-{horizon}", start, end, ((horizon, end),), (), "wsd", horizon, decay_tokens))
    starts = tuple(sorted({leg.start_tokens for leg in decays} - {0}))
    trunk = Leg(TRUNK, 0, starts[-1], (), starts, "constant", starts[-1]) if starts else None
    return [trunk, *decays] if trunk else decays


def step_end(config: ConfigDict, tokens: int, before: bool = False) -> int:
    """The end of the first step that reaches `tokens`, or, with `before`, of the last that does not pass them."""
    if config.batch.schedule == "constant":
        batch_tokens = config.train.batch_tokens
        return tokens // batch_tokens * batch_tokens if before else -(-tokens // batch_tokens) * batch_tokens
    at = 0
    while at < tokens:
        following = at + batch_at(config, at)
        if before and following > tokens:
            break
        at = following
    return at
