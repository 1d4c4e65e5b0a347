"""What the branches of a run ended with: `branches.json`, and beside each branch the held-out loss of every sequence."""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.table import is_number
from scaling_jax.train.workdir import BRANCHES, write_json

RESULTS_FILE, LOSSES_FILE = "branches.json", "heldout_losses.npy"
_COUNTS = ("tokens", "factor", "batch_tokens", "span_tokens")


class Result(NamedTuple):
    """A branch that ran, from `tokens` on. Losses are held-out nats per token of its last checkpoint; None where it diverged."""

    tokens: int
    factor: int
    batch_tokens: int
    lr_rule: str
    span_tokens: int
    loss: float | None
    loss_se: float | None  # standard error over the sequences
    losses_N: np.ndarray | None = None  # per sequence, the same ones for every branch

    @property
    def steps(self) -> int:
        return self.span_tokens // self.batch_tokens

    def record(self) -> dict[str, Any]:
        """As `branches.json` holds it."""
        return {name: value for name, value in self._asdict().items() if name != "losses_N"}


def branch_dir(root: Path, tokens: int, factor: int) -> Path:
    """The work directory of a branch."""
    return root / str(tokens) / f"x{factor}"


def read(root: Path) -> dict[str, Any]:
    """`settings` by checkpoint and `branches`, the rows; UserError where the file is damaged."""
    path = root / RESULTS_FILE
    if not path.exists():
        return {"settings": {}, "branches": []}
    try:
        stored = json.loads(path.read_text())
        settings, rows = dict(stored["settings"]), list(stored["branches"])
        sound = all(isinstance(value, dict) for value in settings.values()) and all(map(_is_row, rows))
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{path}: damaged; delete it: the branches stay, and their losses are measured again")
    return {"settings": settings, "branches": rows}


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or set(row) != set(Result._fields) - {"losses_N"}:
        return False
    counts = all(type(row[name]) is int and row[name] > 0 for name in _COUNTS)
    return counts and isinstance(row["lr_rule"], str) and all(row[name] is None or is_number(row[name]) for name in ("loss", "loss_se"))


def known_results(run: str | Path) -> list[Result]:
    """All branches of a run with a known end, by checkpoint and factor. Those whose losses are lost are left out: they are run again."""
    root = Path(run) / BRANCHES
    found = (Result(**row) for row in read(root)["branches"])
    found = ((result, _losses(root, result)) for result in found)
    known = [result._replace(losses_N=losses_N) for result, losses_N in found if result.loss is None or losses_N is not None]
    return sorted(known, key=lambda result: (result.tokens, result.factor))


def _losses(root: Path, result: Result) -> np.ndarray | None:
    """None where they cannot be read, or have another mean than the result."""
    if result.loss is None:
        return None
    try:
        losses_N = np.load(branch_dir(root, result.tokens, result.factor) / LOSSES_FILE)
    except (OSError, ValueError, EOFError):
        return None
    sound = isinstance(losses_N, np.ndarray) and losses_N.ndim == 1 and losses_N.dtype.kind == "f" and len(losses_N) > 0
    return losses_N if sound and np.isclose(losses_N.mean(), result.loss) else None


def store(root: Path, result: Result) -> None:
    """Adds a branch's end to what is stored, in the place of an earlier one."""
    if result.losses_N is not None:
        content = io.BytesIO()  # np.save to a file hides why the disk refused it
        np.save(content, result.losses_N)
        (branch_dir(root, result.tokens, result.factor) / LOSSES_FILE).write_bytes(content.getvalue())
    stored = read(root)
    others = [row for row in stored["branches"] if (row["tokens"], row["factor"]) != (result.tokens, result.factor)]
    stored["branches"] = sorted([*others, result.record()], key=lambda row: (row["tokens"], row["factor"]))
    write_json(root / RESULTS_FILE, stored)
