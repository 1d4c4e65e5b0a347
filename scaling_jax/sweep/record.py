"""What is known of a group: how far it is, the rows of the table that it has, and which of its trajectories ended early.

It is one small file, written whole: before every checkpoint and at every horizon. So what a checkpoint is past is always in it.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from scaling_jax import storage
from scaling_jax.errors import UserError
from scaling_jax.sweep.status import GROUP_FILE as FILE
from scaling_jax.sweep.status import MEND
from scaling_jax.train.evaluate import Evaluation

VERSION = 1
FINISHED, DIVERGED, STOPPED_EARLY = "finished", "diverged", "stopped_early"
_KEYS = ("state", "reason", "tokens", "total_tokens", "seconds", "rows", "ended", "legs")


class GroupRecord:
    """`group.json` of a group, and the clock that its seconds are counted by.

    Args:
      directory: of the group.
      trajectories: ids of its members.
      stop_after_rises: a trajectory ends whose held-out loss rose at so many horizons in a row; 0 is never.

    Raises:
      UserError: the file is damaged, or another version's.
    """

    def __init__(self, directory: epath.Path, trajectories: list[str], stop_after_rises: int = 0):
        self.path, self.trajectories, self.stop_after_rises = directory / FILE, trajectories, stop_after_rises
        stored = storage.read_json(self.path, mend=MEND)
        if stored is None:
            stored = {"version": VERSION, "state": "running", "reason": None, "tokens": 0, "total_tokens": 0, "seconds": 0.0}
            stored |= {"rows": {}, "ended": {}, "legs": {}}
        if not isinstance(stored, dict) or stored.get("version") != VERSION or not stored.keys() >= set(_KEYS):
            raise UserError(f"{self.path}: not a record of this version of scaling_jax, {VERSION}; {MEND}")
        self.values: dict[str, Any] = stored
        self.ended: dict[str, dict[str, Any]] = {}  # of the leg at hand: tokens, status, reason
        self._before, self._started = float(stored["seconds"]), time.monotonic()

    @property
    def rows(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By trajectory and horizon."""
        return self.values["rows"]

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def missing(self, horizon: int) -> bool:
        """Whether a trajectory has no row for this horizon."""
        return any(str(horizon) not in self.rows.get(tid, {}) for tid in self.trajectories)

    def begin(self, leg: str, tokens: int, trunk: str | None = None, earlier: Sequence[int] = ()) -> None:
        """A leg goes on at `tokens`: `ended`, its trajectories that go on no more, is what was known by then.

        Args:
          leg: its name.
          tokens: where it goes on.
          trunk: the leg that it started from: what ended there before is ended here.
          earlier: horizons before its own, at which a trajectory may have stopped early.
        """
        stored = self.values["ended"].get(trunk, {}) | self.values["ended"].get(leg, {})
        self.ended = {tid: end for tid, end in stored.items() if end["tokens"] <= tokens}
        self.values["ended"][leg] = self.ended
        for tid in self.trajectories:
            self._stop_early(tid, earlier)

    def at(self, leg: str, tokens: int) -> None:
        """A leg has come so far."""
        self.values["legs"][leg] = tokens

    def end(self, tid: str, tokens: int, status: str, reason: str) -> None:
        """A trajectory goes on no more in the leg at hand."""
        self.ended.setdefault(tid, {"tokens": tokens, "status": status, "reason": reason})

    @property
    def all_ended(self) -> bool:
        return all(tid in self.ended for tid in self.trajectories)

    def reached(self, horizons: Sequence[int]) -> None:
        """The last of these horizons, which has its rows, is reached: ends whom the rows say that it ends."""
        for tid in self.trajectories:
            row = self.rows[tid][str(horizons[-1])]
            if row["status"] == DIVERGED:
                self.end(tid, row["tokens"], DIVERGED, row["reason"])
            self._stop_early(tid, horizons)

    def add_row(self, tid: str, horizon: int, tokens: int, found: dict[str, Evaluation], measured: dict[str, Any]) -> None:
        """The row of a trajectory that goes on, from its evaluation by domain."""
        first = next(iter(found))
        if not math.isfinite(found[first].loss.value):
            reason = f"held-out loss not finite at {tokens:,} tokens"
            self._put(tid, horizon, {"tokens": tokens, "status": DIVERGED, "reason": reason})
            return
        row = {"tokens": tokens, "status": FINISHED, "reason": None}
        for name, evaluation in found.items():
            suffix = "" if name == first else f"_{name}"
            row |= {f"loss{suffix}": _finite(evaluation.loss.value), f"loss{suffix}_stderr": evaluation.loss.se}
            row |= {f"bits_per_byte{suffix}": evaluation.bits_per_byte.value, f"bits_per_byte{suffix}_stderr": evaluation.bits_per_byte.se}
        self._put(tid, horizon, row | measured)

    def add_ended_row(self, tid: str, horizon: int) -> None:
        """The row of a trajectory that ended before this horizon."""
        self._put(tid, horizon, dict(self.ended[tid]))

    def _put(self, tid: str, horizon: int, row: dict[str, Any]) -> None:
        self.rows.setdefault(tid, {})[str(horizon)] = row | {"seconds": round(self.seconds / len(self.trajectories), 3)}

    def _stop_early(self, tid: str, horizons: Sequence[int]) -> None:
        rows = [self.rows.get(tid, {}).get(str(horizon), {}) for horizon in horizons]
        rises = self.stop_after_rises
        for first in range(len(rows) - rises if rises else 0):  # at any of them: a decay does not go on from the one before
            few = rows[first : first + rises + 1]
            losses = [row.get("loss") for row in few]
            if None not in losses and all(a < b for a, b in zip(losses, losses[1:], strict=False)):
                self.end(tid, few[-1]["tokens"], STOPPED_EARLY, f"the held-out loss rose at {rises} horizons in a row")

    def write(self, state: str = "running", reason: str | None = None) -> None:
        self.values |= {"state": state, "reason": reason, "tokens": sum(self.values["legs"].values()), "seconds": round(self.seconds, 3)}
        storage.write_json(self.path, self.values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
