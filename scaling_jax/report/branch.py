"""What the branches of a run show: a table for each checkpoint, and the critical batch size by the branches there."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scaling_jax.branch.run import Result
from scaling_jax.laws.critical_batch import CriticalBatch
from scaling_jax.laws.critical_batch import branch as critical_batch
from scaling_jax.train.workdir import BRANCHES, write_json

CRITICAL_BATCH_FILE = "critical_batch.json"
_DIVERGED = 1e3  # nats per token, more than any tolerance: in the comparison of branches, those that have no loss


def report_branches(results: Sequence[Result], tolerance: float, run: str | Path) -> tuple[str, bool]:
    """The tables as text, and whether every checkpoint has a critical batch; adds these to `run`/branches/critical_batch.json.

    Args:
      results: of any number of checkpoints, in the order of these and of the factors.
      tolerance: nats per token that a branch may lose against any with a smaller batch.
      run: the work directory that was branched off.
    """
    parts, found = [], []
    checkpoints = list(dict.fromkeys(result.branch.at_tokens for result in results))
    for at_tokens in checkpoints:
        there = [result for result in results if result.branch.at_tokens == at_tokens]
        if there[0].losses_N is None:
            why = "factor 1, which the others are compared with, diverged"
            parts.append(f"{_table(there, None)}\n\nno critical batch at {at_tokens:,} tokens: {why}")
            continue
        (critical,) = critical_batch([_row(result, len(there[0].losses_N)) for result in there], tolerance)
        found.append(critical)
        parts.append(f"{_table(there, critical)}\n\n{_sentence(critical, there)}")
    path = Path(run) / BRANCHES / CRITICAL_BATCH_FILE
    before = json.loads(path.read_text()) if path.exists() else {"tolerance": tolerance, "points": []}
    kept = [point for point in before["points"] if before["tolerance"] == tolerance and point["tokens"] not in checkpoints]
    points = sorted([*kept, *(c._asdict() for c in found)], key=lambda point: point["tokens"])
    write_json(path, {"tolerance": tolerance, "points": points})
    return "\n\n".join(parts), len(found) == len(checkpoints)


def _row(result: Result, sequences: int) -> dict:
    losses_N = np.full(sequences, _DIVERGED) if result.losses_N is None else result.losses_N
    return result.record() | {"loss": float(losses_N.mean()), "losses": losses_N if sequences > 1 else None}


def _table(results: Sequence[Result], critical: CriticalBatch | None) -> str:
    """The differences are to factor 1, paired by held-out sequence, with their standard errors over sequences."""
    rows = [("factor", "batch tokens", "steps", "held-out loss", "over factor 1", "± s.e.", "")]
    base_N = results[0].losses_N
    for result in results:
        b, cells = result.branch, ("diverged", "", "")
        if result.loss is not None and base_N is not None:
            excess_N = result.losses_N - base_N
            se = f"{excess_N.std(ddof=1) / np.sqrt(len(excess_N)):.4f}" if b.factor > 1 and len(excess_N) > 1 else ""
            cells = (f"{result.loss:.4f}", f"{excess_N.mean():+.4f}" if b.factor > 1 else "", se)
        elif result.loss is not None:
            cells = (f"{result.loss:.4f}", "", "")
        verdict = "" if critical is None or b.factor == 1 else "no loss" if b.batch_tokens <= critical.batch_tokens else "too large"
        rows.append((f"x{b.factor}", f"{b.batch_tokens:,}", f"{b.steps:,}", *cells, verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = results[0].branch
    title = f"{first.span_tokens:,} tokens from {first.at_tokens:,} on, lr rule {first.lr_rule}"
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}" for row in rows]
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _sentence(critical: CriticalBatch, results: Sequence[Result]) -> str:
    """The critical batch with its interval, and in words where that is open."""
    text = f"critical batch (branch) at {critical.tokens:,.0f} tokens: {critical.batch_tokens:,.0f} tokens"
    if critical.low is not None and critical.high is not None:
        return f"{text}, between {critical.low:,.0f} and {critical.high:,.0f}"
    if critical.high is not None:
        return f"{text}, at most {critical.high:,.0f}"
    if critical.batch_tokens == results[-1].branch.batch_tokens:
        why = "the largest factor tried still loses nothing"
    else:
        why = "what the larger factors lose cannot be told from the noise of the held-out sequences"
    low = "" if critical.low is None else f", at least {critical.low:,.0f}"
    return f"{text}{low}, with no upper end: {why}"
