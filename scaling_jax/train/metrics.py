"""What a run writes down and shows: metrics.jsonl, and the progress line."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from scaling_jax.console import LiveLine
from scaling_jax.model import KINDS
from scaling_jax.noise_scale import NoiseScale
from scaling_jax.train.noise import PLAIN, PRECONDITIONED
from scaling_jax.train.step import StepMetrics
from scaling_jax.train.tensorboard import DIRECTORY, Events

FILE = "metrics.jsonl"
NOISE_KEYS = ("noise_scale", "grad_sq", "grad_trace", f"{PRECONDITIONED}_")  # beginnings of the keys that only measured steps have


def train_record(
    step: int, tokens: int, batch_tokens: int, context: int, metrics: StepMetrics, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    """One step as a record. Noise scales are in tokens; what is unknown or unbounded is None.

    `grad_sq` and `grad_trace` (per sequence) are means over the noise window, `…_step` the step's own unbiased estimates; `…/KIND` is one
    kind of parameters (`kinds` has their order in the readings), `…/layers` a list, one number a block.
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
    for metric, reading in (metrics.noise or {}).items():
        prefix = "" if metric == PLAIN else f"{metric}_"
        n = NoiseScale(*(np.asarray(x, np.float64) for x in reading))
        values = {f"noise_scale_tokens{end}": x * context for end, x in (("", n.sequences), ("_low", n.low), ("_high", n.high))}
        values |= {"grad_sq": n.grad_sq, "grad_trace": n.grad_trace}
        for name, value_R in values.items():
            by_kind, by_block = value_R[: len(kinds)], value_R[len(kinds) : -1]
            record[prefix + name] = _number(value_R[-1])
            record |= {f"{prefix}{name}/{kind}": _number(value) for kind, value in zip(kinds, by_kind, strict=True)}
            record[f"{prefix}{name}/layers"] = [_number(value) for value in by_block]
        record[f"{prefix}grad_sq_step"] = _number(metrics.noise_step[metric].grad_sq)
        record[f"{prefix}grad_trace_step"] = _number(metrics.noise_step[metric].grad_trace)
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
                record = json.loads(line)
            except ValueError:
                return
            if not isinstance(record, dict):
                return
            yield end, record


class Service(Protocol):
    """Where records go as well, such as W&B."""

    def catch_up(self, records: Sequence[dict[str, Any]]) -> None: ...
    def write(self, record: dict[str, Any]) -> None: ...
    def end(self, summary: dict[str, Any], figures: Sequence[Path]) -> None: ...
    def close(self) -> None: ...


class MetricsWriter:
    """Appends records to metrics.jsonl, TensorBoard and a service, from where a checkpoint left off.

    Records later than `tokens` are cut off first: the run that continues from there writes them again. `start_service` is called
    after that, and what it returns given the records that stay.
    """

    def __init__(self, workdir: Path, tokens: int, tensorboard: bool = True, start_service: Callable[[], Service] | None = None):
        path = workdir / FILE
        end = step = 0
        if path.exists():
            for offset, record in _lines(path):
                if record["tokens"] > tokens:
                    break
                end, step = offset, record["step"]
        self._file = path.open("ab")
        self._file.truncate(end)
        self._others: list[Events | Service] = [Events(workdir / DIRECTORY, step + 1)] if tensorboard else []
        if start_service is not None:
            service = start_service()
            self._others.append(service)
            service.catch_up(read_records(workdir))

    def write(self, record: dict[str, Any]) -> None:
        record = {key: _number(value) if isinstance(value, float) else value for key, value in record.items()}  # JSON has no nan
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        for other in self._others:
            other.write(record)

    def end(self, summary: dict[str, Any], figures: Sequence[Path]) -> None:
        """Adds the summary and figures (PNG) where there is a place for them."""
        for other in self._others:
            other.end(summary, figures)

    def sync(self) -> None:
        """On disk before a checkpoint is, so that a resumed run finds every record up to it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for other in self._others:
                stack.callback(other.close)
            self._file.close()  # flushes, which a full disk refuses


class Unwritten:
    """In the place of a MetricsWriter where another process writes."""

    def write(self, record: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class Progress:
    """Speed and progress of a run, on the console."""

    def __init__(self, total_tokens: int, seconds: float, out: TextIO | None = None, show_batch: bool = False, quiet: bool = False):
        """`out`: where to, stderr by default; `quiet`: nowhere, as another process shows it."""
        self.total, self.show_batch = total_tokens, show_batch
        self._quiet, self._line = quiet, LiveLine(seconds, out)
        self.end = self._line.end
        self._marks: list[tuple[float, int]] = []  # (time, tokens) of the last half minute

    def tokens_per_second(self, tokens: int, now: float) -> float | None:
        """Over the last half minute at most; None before two steps were seen. `now`: when `tokens` was reached, by time.monotonic."""
        self._marks.append((now, tokens))
        while len(self._marks) > 2 and self._marks[0][0] < now - 30:
            self._marks.pop(0)
        (then, before), *_ = self._marks
        return (tokens - before) / (now - then) if now > then else None

    def say(self, message: str) -> None:
        if not self._quiet:
            self._line.say(message)

    def show(self, record: dict[str, Any], held_out: float | None) -> None:
        if not self._quiet and self._line.due():
            self._line.show(self.line(record, held_out))

    def line(self, record: dict[str, Any], held_out: float | None) -> str:
        tokens, speed = record["tokens"], record.get("tokens_per_second")
        parts = [f"{human(tokens)}/{human(self.total)} tokens", f"loss {_text(record['loss'], '.3f')}"]
        if self.show_batch:
            parts.append(f"batch {human(record['batch_tokens'])} tokens")
        if held_out is not None:
            parts.append(f"held-out {held_out:.3f}")
        if "noise_scale_tokens" in record:
            low, high = (record[f"noise_scale_tokens_{end}"] for end in ("low", "high"))
            interval = f" [{human(low)}, {human(high)}]" if low is not None else ""
            parts.append(f"noise scale {human(record['noise_scale_tokens'])}{interval} tokens")
        if speed:
            parts += [f"{human(speed)} tokens/s", f"{_duration((self.total - tokens) / speed)} left"]
        return " · ".join(parts)


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
