"""The course of runs that train together: every step's loss and gradient norm, and now and then the noise scale.

It is written in pieces, one before each checkpoint, whole files that are never appended to: so it works in a bucket, and a continued leg
cuts off what came later than its checkpoint by deleting files.
"""

import io
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from scaling_jax import storage

PER_DOUBLING = 64  # readings of the noise scale, in tokens seen


class Step(NamedTuple):
    """What one step saw. M members; noise is (value, low, high) in tokens, nan where unknown, high inf where open."""

    step: int
    tokens: int
    loss_M: np.ndarray
    grad_norm_M: np.ndarray
    noise_Mx3: np.ndarray | None


class Curves:
    """Of one leg of a group. Records wait in memory until `write`.

    Args:
      directory: of the leg's pieces.
      trajectories: ids of the members.
      tokens: where the leg continues; pieces that end later are deleted.
      trunk: directory of the leg that it started from, and after how many tokens of that.
    """

    def __init__(self, directory: epath.Path, trajectories: list[str], tokens: int, trunk: tuple[epath.Path, int] | None = None):
        self.directory, self.trajectories, self.trunk = directory, trajectories, trunk
        self.waiting: list[Step] = []
        for path in pieces(directory):
            if end_of(path) > tokens:
                path.unlink()

    def add(self, step: Step) -> None:
        self.waiting.append(step)

    def write(self) -> None:
        """What waits, as a piece of its own."""
        if not self.waiting:
            return
        noisy = [s for s in self.waiting if s.noise_Mx3 is not None]
        content = io.BytesIO()
        np.savez(
            content,
            trajectories=np.array(self.trajectories),
            step_S=np.array([s.step for s in self.waiting], np.int64),
            tokens_S=np.array([s.tokens for s in self.waiting], np.int64),
            loss_SxM=np.array([s.loss_M for s in self.waiting], np.float32),
            grad_norm_SxM=np.array([s.grad_norm_M for s in self.waiting], np.float32),
            noise_tokens_K=np.array([s.tokens for s in noisy], np.int64),
            noise_KxMx3=np.array([s.noise_Mx3 for s in noisy], np.float64).reshape(len(noisy), len(self.trajectories), 3),
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(self.directory / f"{self.waiting[-1].tokens:015d}.npz", content.getvalue())
        self.waiting = []

    def last(self, steps: int) -> np.ndarray:
        """Training losses of the last so many steps, those of the trunk too, or of as many as there are: [S, M]."""
        found = [s.loss_M for s in self.waiting]
        for directory, until in filter(None, ((self.directory, math.inf), self.trunk)):
            for path in reversed(pieces(directory)):
                if len(found) >= steps:
                    break
                with np.load(io.BytesIO(path.read_bytes())) as piece:
                    found = [*piece["loss_SxM"][piece["tokens_S"] <= until], *found]
        return np.array(found[-steps:], np.float64).reshape(-1, len(self.trajectories))


def pieces(directory: epath.Path) -> list[epath.Path]:
    """Files of a leg, in the order of tokens."""
    return sorted(directory.glob("*.npz"), key=end_of) if directory.exists() else []


def end_of(path: epath.Path) -> int:
    return int(path.name.removesuffix(".npz"))


def noise_due(before: int, after: int) -> bool:
    """Whether a step from `before` to `after` tokens is one whose noise scale is kept: evenly spread over the logarithm of tokens."""

    def mark(tokens: int) -> int:
        return math.floor(PER_DOUBLING * math.log2(tokens)) if tokens else -1

    return mark(before) < mark(after)


def read(directory: epath.Path) -> Iterator[dict[str, np.ndarray]]:
    """The pieces of a leg, as `write` names their arrays."""
    for path in pieces(directory):
        with np.load(io.BytesIO(path.read_bytes())) as piece:
            yield dict(piece)
