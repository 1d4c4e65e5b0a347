"""TensorBoard's events of a run."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DIRECTORY = "tensorboard"


class Events:
    """TensorBoard's file, written in the caller's thread: SummaryWriter leaves it to another, and waits for that forever once it
    died of a full disk."""

    def __init__(self, directory: Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        directory.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"), f".{first_step}")
        # Hides what a stopped process wrote from there on.
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = -math.inf

    def write(self, record: dict[str, Any]) -> None:
        self._add(record["step"], [self._summary.Value(tag=key, simple_value=value) for key, value in numbers(record)])
        if time.monotonic() - self._flushed > 10:
            self._writer.flush()
            self._flushed = time.monotonic()

    def end(self, summary: dict[str, Any], figures: Sequence[Path]) -> None:
        """Adds figures (PNG) as images at the last step."""
        for path in figures:
            png = path.read_bytes()
            width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))  # PNG's header comes first
            image = self._summary.Image(width=width, height=height, encoded_image_string=png)
            self._add(summary["steps"], [self._summary.Value(tag=f"figures/{path.stem}", image=image)])

    def _add(self, step: int, values: list[Any]) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a record but its step; those of a list get their index as name."""
    for key, value in record.items():
        for name, number in [(f"{key}/{i:02}", x) for i, x in enumerate(value)] if isinstance(value, list) else [(key, value)]:
            if isinstance(number, int | float) and key != "step":
                yield name, number
