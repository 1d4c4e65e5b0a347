"""What the branches of a run show: a table for each checkpoint, and the critical batch size by the branches there."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scaling_jax.branch.results import Result, known_results
from scaling_jax.laws.critical_batch import CriticalBatch
from scaling_jax.laws.critical_batch import branch as critical_batch
from scaling_jax.train.workdir import BRANCHES, write_json

CRITICAL_BATCH_FILE = "critical_batch.json"


def report_branches(run: str | Path, at_tokens: Sequence[int], tolerance: float) -> tuple[str, bool]:
    """The tables of some checkpoints as text, and whether each of them has a critical batch.

    Judged is all that is stored of a checkpoint, whatever factors were asked for last. branches/critical_batch.json is written anew: the
    points of all checkpoints of the run, by this tolerance.

    Args:
      run: the work directory that was branched off.
      at_tokens: checkpoints with branches.
      tolerance: nats per token that a branch may lose against any with a smaller batch.
    """
    by_checkpoint: dict[int, list[Result]] = {}
    for result in known_results(run):
        by_checkpoint.setdefault(result.tokens, []).append(result)
    found = {at: point for at, there in by_checkpoint.items() if (point := _point(there, tolerance)) is not None}
    content = {"tolerance": tolerance, "points": [point._asdict() for point in found.values()]}
    write_json(Path(run) / BRANCHES / CRITICAL_BATCH_FILE, content)
    parts, asked = [], sorted(set(at_tokens))
    for at in asked:
        there, critical = by_checkpoint[at], found.get(at)
        why = f"no critical batch at {at:,} tokens: factor 1, which the others are compared with, diverged"
        parts.append(f"{_table(there, critical, tolerance)}\n\n{why if critical is None else _sentence(critical, there)}")
    return "\n\n".join(parts), all(at in found for at in asked)


def _point(results: Sequence[Result], tolerance: float) -> CriticalBatch | None:
    """None where factor 1 has no loss, or nothing to be compared with."""
    if len(results) < 2 or results[0].factor != 1 or results[0].loss is None:
        return None
    single = len(results[0].losses_N) == 1  # without an interval
    (point,) = critical_batch([result.record() | {"losses": None if single else result.losses_N} for result in results], tolerance)
    return point


def _table(results: Sequence[Result], critical: CriticalBatch | None, tolerance: float) -> str:
    """The differences are to factor 1, paired by held-out sequence, with their standard errors over sequences. A verdict is that of the row
    itself, against all smaller factors."""
    rows = [("factor", "batch tokens", "steps", "held-out loss", "over factor 1", "± s.e.", "")]
    base_N = results[0].losses_N
    for k, result in enumerate(results):
        cells = ("-", "", "")
        if result.loss is not None and base_N is not None and k:
            excess_N = result.losses_N - base_N
            se = f"{excess_N.std(ddof=1) / np.sqrt(len(excess_N)):.4f}" if len(excess_N) > 1 else ""
            cells = (f"{result.loss:.4f}", f"{excess_N.mean():+.4f}", se)
        elif result.loss is not None:
            cells = (f"{result.loss:.4f}", "", "")
        verdict = _verdict(result, results[:k], tolerance) if critical is not None or result.loss is None else ""
        if critical is not None and result.batch_tokens == critical.batch_tokens:
            verdict = f"{verdict}, critical".removeprefix(", ")
        rows.append((f"x{result.factor}", f"{result.batch_tokens:,}", f"{result.steps:,}", *cells, verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = results[0]
    title = f"{first.span_tokens:,} tokens from {first.tokens:,} on, lr rule {first.lr_rule}"
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}" for row in rows]
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _verdict(result: Result, smaller: Sequence[Result], tolerance: float) -> str:
    if result.loss is None:
        return "diverged"
    others = [other.loss for other in smaller if other.loss is not None]
    if not others:
        return ""
    return "no loss" if result.loss - min(others) - tolerance <= 0 else "too large"


def _sentence(critical: CriticalBatch, results: Sequence[Result]) -> str:
    """The critical batch with its interval, and in words where that is open."""
    text = f"critical batch (branch) at {critical.tokens:,.0f} tokens: {critical.batch_tokens:,.0f} tokens"
    if critical.low is not None and critical.high is not None:
        return f"{text}, between {critical.low:,.0f} and {critical.high:,.0f}"
    if critical.high is not None:
        return f"{text}, at most {critical.high:,.0f}"
    if critical.batch_tokens == results[-1].batch_tokens:
        why = "the largest factor tried still loses nothing"
    else:
        why = "what the larger factors lose cannot be told from the noise of the held-out sequences"
    low = "" if critical.low is None else f", at least {critical.low:,.0f}"
    return f"{text}{low}, with no upper end: {why}"
