"""One line that says how far long work is."""

import math
import os
import sys
import time
from typing import TextIO


class LiveLine:
    """On a terminal one line that is written over, at most 5 times a second; elsewhere a plain line every `seconds`."""

    def __init__(self, seconds: float, out: TextIO | None = None, at_once: bool = True):
        """`at_once`: the first one does not wait, as where the first step of a run took long."""
        self.out = out or sys.stderr
        self.live = self.out.isatty()
        self.seconds = 0.2 if self.live else seconds
        self._shown = -math.inf if at_once else time.monotonic()  # when
        self._length = 0  # of what stands on the terminal's line

    def due(self) -> bool:
        return time.monotonic() - self._shown >= self.seconds

    def show(self, text: str) -> None:
        """Shows `text`, unless the last one is too fresh."""
        if not self.due():
            return
        self._shown = time.monotonic()
        if not self.live:
            self._write(text + "\n")
            return
        text = text[: _columns(self.out) - 1]  # a line that wraps could not be written over
        self._write("\r" + text.ljust(self._length))
        self._length = len(text)

    def say(self, message: str) -> None:
        """A message on a line of its own."""
        self.end()
        self._write(message + "\n")

    def end(self) -> None:
        """Leaves what stands there, and begins a new line."""
        if self._length:
            self._write("\n")
            self._length, self._shown = 0, -math.inf

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def _columns(out: TextIO) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns or 80  # some terminals say 0
    except OSError:
        return 80
