"""A run that is asked to stop: by SIGTERM or Ctrl-C, and where there are several processes at the same step of all."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jax.experimental import multihost_utils

from scaling_jax.train.hosts import Hosts


class Stop:
    """`signal` is the one that this process stops for, once `asked` has said that it does.

    Of several processes any may be signalled. JAX, which then heeds SIGTERM, tells the others and finds a step that none has begun
    (`multihost_utils.reached_preemption_sync_point`); Ctrl-C is passed on as SIGTERM.
    """

    def __init__(self, hosts: Hosts):
        self.signal: int | None = None
        self._several, self._calls = hosts.count > 1, 0
        self._interrupted = False

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Within it a signal asks for a stop, and a second one raises KeyboardInterrupt."""
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            numbers = ()
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self._several and numbers:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nobody asks JAX any more

    def asked(self) -> bool:
        """Whether to stop before the next step; all processes ask once before each."""
        if self._several and self.signal is None:
            self._calls += 1
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.signal = signal.SIGINT if self._interrupted else signal.SIGTERM
        return self.signal is not None

    def _on_signal(self, number: int, _: Any) -> None:
        if self.signal is not None or self._interrupted:  # asked twice: at once
            raise KeyboardInterrupt
        if self._several:
            self._interrupted = True
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = number  # and no word: the main thread may be in the middle of one
