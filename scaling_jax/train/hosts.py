"""The processes of one run, one on each host: process 0 decides and the others are told, and when one fails none is left waiting.

Every process keeps a connection to process 0. One that fails says why; one that is killed is missed at once, for its connection ends;
one whose machine is lost, after LOST_SECONDS. The others then end with one message, wherever they are: a collective that lacks a
partner cannot be left in another way. All that is on disk is made to outlive that.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from scaling_jax.errors import UserError
from scaling_jax.train.meeting import FAILED, Link, Met, differences, readable

T = TypeVar("T")

LOST_SECONDS = 45.0  # of silence, after which a process counts as lost
BEAT_SECONDS = 2.0  # between two signs of life
LINGER_SECONDS = 5.0  # that process 0, whose end would end the others, waits for them to end by themselves
_REASON_LETTERS = 200  # of an error, in the others' message

_COMMUNICATION = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection reset", "Socket closed", "coordination", "barrier", "heartbeat")


class Hosts:
    """What the processes of a run say to each other. All call the same methods in the same order; alone they cost nothing."""

    def __init__(self, process: int = 0, met: Met | None = None, program: str = "scaling-jax train"):
        self.process = process
        self.code = 0  # exit code of the run, once it is over: whoever has it sets it
        self.left = False  # this process's part of the run is done
        self.names = met.names if met else [""]
        self._program = program
        self._links: dict[int, Link] = dict(met.links) if met else {}
        self._heard = dict.fromkeys(self._links, time.monotonic())
        self._number = 0  # of the last thing that was said
        self._told: dict[int, dict[str, Any]] = {}
        self._given: dict[int, dict[int, Any]] = {}
        self._news = threading.Condition()
        self._last_words = threading.Lock()  # taken once, by whoever ends the process
        self._over = threading.Event()  # all are ending, and know it
        if self._links:
            threading.Thread(target=self._watch, name="hosts", daemon=True).start()

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def first(self) -> bool:
        """Whether this is process 0, which alone decides and writes."""
        return self.process == 0

    def tell(self, decide: Callable[[], T]) -> T:
        """What `decide` returns on process 0, a value that JSON can hold, on all; or the UserError that it raises."""
        if self.count == 1:
            return decide()
        self._number += 1
        if not self.first:
            message = self._wait(lambda: self._told.pop(self._number, None))
            if "error" in message:
                self._over.set()
                raise UserError(message["error"])
            return message["value"]
        try:
            value = decide()
        except UserError as error:
            self._over.set()
            self._send_all({"told": self._number, "error": str(error)})
            raise
        self._send_all({"told": self._number, "value": value})
        return value

    def do(self, act: Callable[[], T]) -> T | None:
        """`act()` on process 0, which the others wait for: its value there and None elsewhere; its UserError on all."""
        done = []
        self.tell(lambda: done.append(act()))
        return done[0] if done else None

    def collect(self, value: Any) -> list[Any]:
        """Every process's value, on all. None goes on before all have come here."""
        gathered = self._gather(value)
        return self.tell(lambda: gathered)

    def agree(self, **facts: Any) -> None:
        """UserError on all, naming them, where some of the facts differ."""
        gathered = self._gather(facts)

        def check() -> None:
            hellos = {process: {"name": self.names[process], "facts": facts} for process, facts in enumerate(gathered)}
            if fault := differences(hellos):
                raise UserError(fault)

        self.tell(check)

    def all_well(self, fault: str | None) -> None:
        """UserError on all where one has a fault."""
        gathered = self._gather(fault)

        def check() -> None:
            if faults := [f"{fault} ({self._name(process)})" for process, fault in enumerate(gathered) if fault]:
                raise UserError(faults[0])

        self.tell(check)

    def leave(self) -> None:
        """At the end of the run. From here on an end is no failure."""
        self.collect(None)
        self._over.set()
        self.left = True

    def end_well(self) -> None:
        """Ends this process, which has left, though another one was lost meanwhile."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        self._linger()
        os._exit(self.code)

    def fail(self, error: BaseException, say: Callable[[], None]) -> None:
        """Before this process ends with `error`, which `say` says here, if it can: the others are told, and end too."""
        if self._over.is_set():  # they know
            with contextlib.suppress(OSError, ValueError):
                say()
            self._linger()
            return
        if _is_of_communication(error):  # another's failure, most likely: its own message then ends this process
            time.sleep(LOST_SECONDS + 2 * BEAT_SECONDS)
        self._last_words.acquire()
        self._send_all({"failed": self.process, "reason": _reason(error), "code": error.code if isinstance(error, UserError) else FAILED})
        with contextlib.suppress(OSError, ValueError):
            say()
        self._linger()

    def is_cut_off(self) -> bool:
        """Whether the connection to process 0 has ended."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            link = self._links[0]
            return bool(readable([link], 0.5)) and link.sock.recv(1, socket.MSG_PEEK) == b""
        return True

    def end_cut_off(self) -> None:
        """Ends this process, which has lost process 0."""
        self._end({"failed": 0, "reason": "ended without a word", "code": FAILED})

    def _gather(self, value: Any) -> list[Any]:
        """Every process's value, on process 0; this one's own elsewhere."""
        if self.count == 1:
            return [value]
        self._number += 1
        if not self.first:
            self._send_all({"given": self._number, "value": value})
            return [value]
        number = self._number
        theirs = self._wait(lambda: self._given.pop(number) if len(self._given.get(number, ())) == self.count - 1 else None)
        return [value, *(theirs[process] for process in range(1, self.count))]

    def _wait(self, find: Callable[[], T | None]) -> T:
        with self._news:
            while (found := find()) is None:
                self._news.wait(0.5)  # and heed Ctrl-C
            return found

    def _send_all(self, message: dict[str, Any]) -> None:
        for link in list(self._links.values()):
            link.send(message)

    def _watch(self) -> None:
        for process, link in list(self._links.items()):
            for message in link.take_kept():
                self._take(process, message)
        beaten = -float("inf")
        while self._links:
            now = time.monotonic()
            if now - beaten >= BEAT_SECONDS:
                beaten = now
                self._send_all({"beat": 1})
            try:
                ready = readable(list(self._links.values()), BEAT_SECONDS / 2)
            except (OSError, ValueError):  # closed by the main thread, which leaves
                return
            for process, link in list(self._links.items()):
                messages = link.read() if link in ready else []
                if messages is None:
                    self._links.pop(process).close()
                    self._missing(process, "ended without a word")
                    continue
                if messages:
                    self._heard[process] = time.monotonic()
                elif time.monotonic() - self._heard[process] > LOST_SECONDS:
                    self._links.pop(process)
                    how = f"gave no sign of life for {LOST_SECONDS:.0f} s"
                    if not self._over.is_set():
                        link.send({"failed": process, "reason": how, "code": FAILED})  # if it should wake
                    self._missing(process, how)
                for message in messages:
                    self._take(process, message)

    def _missing(self, process: int, how: str) -> None:
        if not self._over.is_set():
            self._end({"failed": process, "reason": how, "code": FAILED})

    def _take(self, process: int, message: dict[str, Any]) -> None:
        if "failed" in message and not self._over.is_set():
            self._end(message)
        with self._news:
            if "told" in message:
                self._told[message["told"]] = message
            elif "given" in message:
                self._given.setdefault(message["given"], {})[process] = message["value"]
            self._news.notify_all()

    def _end(self, failure: dict[str, Any]) -> None:
        """Ends this process because of another's failure, from whichever thread."""
        self._last_words.acquire()
        if self.first:
            self._send_all(failure)
        reason = failure["reason"]
        if reason.startswith(("ended", "gave")):
            reason += ": killed, crashed, or its machine or the network is down; its own output may say more"
        if failure["failed"] == self.process:
            reason += " here, the others say"
        again = "; the same command on all hosts continues from the last checkpoint" if failure["code"] == FAILED else ""
        text = f"{self._name(failure['failed'])} {reason}. This is {self._name(self.process)}, which ends too{again}"
        with contextlib.suppress(OSError, ValueError):  # a disk that is full, or nobody who listens
            print(f"{self._program}: {text}", file=sys.stderr, flush=True)
        self._linger()
        os._exit(failure["code"])

    def _linger(self) -> None:
        """JAX ends every process, with a crash, whose coordinator is gone; so process 0 goes last."""
        deadline = time.monotonic() + LINGER_SECONDS
        while self.first and self._links and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):  # one was closed meanwhile
                ready = readable(list(self._links.values()), 0.1)
                for process, link in list(self._links.items()):
                    if link in ready and link.read() is None:
                        self._links.pop(process, None)

    def _name(self, process: int) -> str:
        return f"process {process} of {self.count} ({self.names[process]})"


ALONE = Hosts()


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    if isinstance(error, UserError):
        return f"failed: {error}"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"failed: {text if len(text) <= _REASON_LETTERS else text[:_REASON_LETTERS] + '…'}"


def _is_of_communication(error: BaseException) -> bool:
    return not isinstance(error, UserError | KeyboardInterrupt) and any(word in str(error) for word in _COMMUNICATION)
