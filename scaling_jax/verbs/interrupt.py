"""Ctrl-C while modules are imported."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def ended_by_interrupt(verb: str) -> Iterator[None]:
    """Within it Ctrl-C ends the process at once, with one line and exit code 130. For imports, before there is anything to lose.

    A KeyboardInterrupt amid an import becomes whatever the module at hand makes of it: an ImportError, a crash, or nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_) -> None:
        os.write(2, f"scaling-jax {verb}: interrupted\n".encode())
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
