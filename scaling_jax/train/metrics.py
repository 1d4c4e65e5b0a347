"""What a run writes down and shows: metrics.jsonl, TensorBoard events, and the progress line."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from scaling_jax.model import KINDS
from scaling_jax.train.step import StepMetrics

FILE = "metrics.jsonl"


def train_record(step: int, tokens: int, batch_tokens: int, context: int, metrics: StepMetrics) -> dict[str, Any]:
    """One step as a record. Noise scales are in tokens; what is unknown or unbounded is None.

    `grad_sq` and `grad_trace` (per sequence) are means over the noise window, `…_step` the step's own unbiased estimates.
    """
    record = {
        "step": step,
        "tokens": tokens,
        "loss": _number(metrics.loss),
        "lr": _number(metrics.lr),
        "grad_norm": _number(metrics.grad_norm),
        "batch_tokens": batch_tokens,
        "batch_sequences": batch_tokens // context,
    }
    if metrics.noise is None:
        return record
    n = metrics.noise
    in_tokens = [np.asarray(x, np.float64) * context for x in (n.sequences, n.low, n.high)]
    for i, name in ((-1, ""), *((i, f"/{kind}") for i, kind in enumerate(KINDS))):
        for suffix, values in zip(("", "_low", "_high"), in_tokens, strict=True):
            record[f"noise_scale_tokens{suffix}{name}"] = _number(values[i])
        record[f"grad_sq{name}"] = _number(n.grad_sq[i])
        record[f"grad_trace{name}"] = _number(n.grad_trace[i])
    record["grad_sq_step"] = _number(metrics.grad_sq_step)
    record["grad_trace_step"] = _number(metrics.grad_trace_step)
    return record


def _number(x: Any) -> float | None:
    value = float(x)
    return value if math.isfinite(value) else None


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, in order; a last line that was cut off is left out."""
    path = workdir / FILE
    return [record for _, record in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(end offset, record) of every whole line."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            try:
                yield end, json.loads(line)
            except ValueError:
                return


class MetricsWriter:
    """Appends records to metrics.jsonl and TensorBoard, from where a checkpoint left off.

    Records later than `tokens` are cut off first: the run that continues from there writes them again.
    """

    def __init__(self, workdir: Path, tokens: int, tensorboard: bool = True):
        path = workdir / FILE
        end = step = 0
        if path.exists():
            for offset, record in _lines(path):
                if record["tokens"] > tokens:
                    break
                end, step = offset, record["step"]
        self._file = path.open("ab")
        self._file.truncate(end)
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        if self._events is not None:
            for key, value in record.items():
                if key not in ("step", "event") and value is not None:
                    self._events.add_scalar(key, value, record["step"])

    def sync(self) -> None:
        """On disk before a checkpoint is, so that a resumed run finds every record up to it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


class Progress:
    """One live line on a terminal; elsewhere a plain line every `seconds`."""

    def __init__(self, total_tokens: int, seconds: float, out: TextIO | None = None):
        self.total, self.seconds, self.out = total_tokens, seconds, out or sys.stderr
        self.live = self.out.isatty()
        self._marks: list[tuple[float, int]] = []  # (time, tokens) of the last half minute
        self._shown = -math.inf

    def tokens_per_second(self, tokens: int) -> float | None:
        """Over the last half minute at most; None before two steps were seen."""
        now = time.monotonic()
        self._marks.append((now, tokens))
        while len(self._marks) > 2 and self._marks[0][0] < now - 30:
            self._marks.pop(0)
        (then, before), *_ = self._marks
        return (tokens - before) / (now - then) if now > then else None

    def show(self, record: dict[str, Any], held_out: float | None) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self.live else self.seconds):
            return
        self._shown = now
        line = self.line(record, held_out)
        self.out.write(f"\r{line:<100}" if self.live else line + "\n")
        self.out.flush()

    def line(self, record: dict[str, Any], held_out: float | None) -> str:
        tokens, speed = record["tokens"], record.get("tokens_per_second")
        parts = [f"{human(tokens)}/{human(self.total)} tokens", f"loss {_text(record['loss'], '.3f')}"]
        if held_out is not None:
            parts.append(f"held-out {held_out:.3f}")
        if "noise_scale_tokens" in record:
            low, high = (record[f"noise_scale_tokens_{end}"] for end in ("low", "high"))
            interval = f" [{human(low)}, {human(high)}]" if low is not None else ""
            parts.append(f"noise scale {human(record['noise_scale_tokens'])}{interval} tokens")
        if speed:
            parts += [f"{human(speed)} tokens/s", f"{_duration((self.total - tokens) / speed)} left"]
        return " · ".join(parts)

    def say(self, message: str) -> None:
        """A message on a line of its own."""
        self.end()
        self.out.write(message + "\n")
        self.out.flush()

    def end(self) -> None:
        if self.live and self._shown > -math.inf:
            self.out.write("\n")
            self._shown = -math.inf


def human(count: float | None) -> str:
    """1234567 -> '1.23M'; None -> '∞'."""
    if count is None:
        return "∞"
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.9995 * scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.3g}"


def _text(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}:{seconds:02}"
