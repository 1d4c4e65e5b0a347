"""The processes of a run meet before JAX starts: each says who it is and what it is about to do, and process 0 says whether they fit.

JAX's own start ends a process that lacks a partner with a crash, and a config that differs shows as a hang. Here what is wrong is one
message, the same for all. They meet at the coordinator's port, which JAX's service takes over afterwards; the connections stay, for
`scaling_jax.train.hosts`. Messages are lines of JSON.
"""

import contextlib
import json
import math
import os
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from scaling_jax.errors import UserError

JOIN_SECONDS = 300.0  # for all to come: the hosts of a pod do not start at once
LATE_SECONDS = 30.0  # that process 0 stays to refuse those who come after what is wrong was found
FAILED = 3  # exit code of a process that ends because another one failed, or did not come
_HELLO_SECONDS = 5.0  # in which a new connection says who it is
_HELLO_BYTES = 1 << 20  # of a line, at most, before all are known to be of this run
_SEND_SECONDS = 10.0
_MAGIC = "scaling_jax 1"
_LINES = 20  # of differences that are listed


class Place(NamedTuple):
    """A process's place among those of its run."""

    coordinator: str  # HOST:PORT, of process 0
    processes: int
    process: int
    local_devices: list[int] | None = None  # where several processes share a host; None is all that it has
    detected: bool = False  # by its environment, that of a pod, say, and not given by hand


def join_seconds() -> float:
    """For all to come: SCALING_JAX_JOIN_SECONDS or five minutes. UserError where that is no positive number."""
    text = os.environ.get("SCALING_JAX_JOIN_SECONDS")
    if text is None:
        return JOIN_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"SCALING_JAX_JOIN_SECONDS={text}: must be a positive number, the seconds in which all processes come")
    return seconds


class Link:
    """One connection."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(_SEND_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self._rest = sock, b""
        self._kept: list[dict[str, Any]] = []  # messages that came with one that was asked for
        self.trusted = False  # known to be of this run
        self._sending = threading.Lock()  # a line is not to stand within another thread's

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """A connection that does not take it is ended, which whoever reads notices."""
        with self._sending:
            try:
                self.sock.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come whole, once there is something to read; None where the other side has ended, or is none of ours."""
        try:
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _HELLO_BYTES and not self.trusted:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def take_kept(self) -> list[dict[str, Any]]:
        """The messages that came with the one that `read_one` gave."""
        kept, self._kept = self._kept, []
        return kept

    def read_one(self, deadline: float) -> dict[str, Any] | None:
        """The first message; None where none comes until `deadline`, the other side has ended, or it is no message of ours."""
        while (left := deadline - time.monotonic()) > 0:
            self.sock.settimeout(min(left, _SEND_SECONDS))
            try:
                messages = self.read()
            finally:
                self.sock.settimeout(_SEND_SECONDS)
            if messages is None:
                return None
            if messages:
                first, *self._kept = messages
                return first
        return None

    def close(self) -> None:
        self.sock.close()


def readable(links: Iterable[Link | socket.socket], seconds: float) -> set[Link | socket.socket]:
    """Those that have something to read or have ended, once there are any, within so many seconds. OSError, ValueError: one is closed."""
    poll = select.poll()  # select.select counts files to 1024
    by_number = {link.fileno(): link for link in links}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return {by_number[number] for number, _ in poll.poll(1000 * seconds)}


class Met(NamedTuple):
    """The connections of process 0 to each other one, of each other one to process 0; and the name of every process's host."""

    links: dict[int, Link]
    names: list[str]


def meet(place: Place, facts: Mapping[str, Any]) -> Met:
    """Waits for all processes, and compares what they are about to do.

    Args:
      place: of this process.
      facts: what must be the same on all: by name, values that JSON can hold.

    Raises:
      UserError: the others did not come or cannot be reached, two claim one place, or the facts differ. The same on all that came. Its
        code is FAILED where they may yet come: a process is missing, or process 0 of a place that was detected.
    """
    seconds = join_seconds()
    hello = {"magic": _MAGIC, "process": place.process, "processes": place.processes, "name": socket.gethostname()}
    hello["facts"] = json.loads(json.dumps(facts, default=str))
    return _receive_all(place, hello, seconds) if place.process == 0 else _reach(place, hello, seconds)


def _receive_all(place: Place, own: dict[str, Any], seconds: float) -> Met:
    deadline = time.monotonic() + seconds
    links, hellos, fault, code = {}, {0: own}, None, 2

    def refuse(refused: Iterable[Link]) -> None:
        for link in refused:
            link.send({"refused": fault, "code": code})
            link.close()

    try:
        with _listen(place) as listener, _Knocks(listener) as knocks:
            while len(hellos) < place.processes and (left := deadline - time.monotonic()) > 0:
                ready = readable([listener, *knocks.since, *links.values()], min(left, 0.5))
                for process in [process for process, link in links.items() if link in ready and link.read() is None]:
                    links.pop(process).close()  # it came and went; it, or another in its place, may come again
                    del hellos[process]
                for link, hello in knocks.hellos(ready):
                    misplaced = _misplaced(place, hello, hellos)
                    if misplaced is None:
                        hellos[hello["process"]] = hello
                    elif fault is None:
                        fault, deadline = misplaced, time.monotonic() + LATE_SECONDS
                        refuse(links.values())
                        links.clear()
                    if fault is None:
                        links[hello["process"]] = link
                    else:
                        refuse([link])
        if fault is None and len(hellos) < place.processes:
            fault, code = _missing(place, hellos, seconds), FAILED
        fault = fault or differences(hellos)
        if fault is not None:
            refuse(links.values())
            raise UserError(fault, code)
        names = [hellos[process]["name"] for process in range(place.processes)]
        for link in links.values():
            link.trusted = True
            link.send({"welcome": names})
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return Met(links, names)


class _Knocks:
    """Connections that have yet to say who they are: side by side, so that a silent one keeps nobody out."""

    def __init__(self, listener: socket.socket):
        self.listener = listener
        self.since: dict[Link, float] = {}

    def __enter__(self) -> "_Knocks":
        return self

    def __exit__(self, *error: object) -> None:
        for link in self.since:
            link.close()

    def hellos(self, ready: set[Any]) -> Iterator[tuple[Link, dict[str, Any]]]:
        """Of those that are `ready`, the ones that say who they are. What says something else, or nothing for long, is closed."""
        now = time.monotonic()
        for link in list(self.since):
            messages = link.read() if link in ready else []
            if messages:
                del self.since[link]
                if _is_hello(messages[0]):
                    yield link, messages[0]
                else:
                    link.close()
            elif messages is None or now - self.since[link] > _HELLO_SECONDS:
                del self.since[link]
                link.close()
        if self.listener in ready:
            with contextlib.suppress(OSError):  # it has gone again
                self.since[Link(self.listener.accept()[0])] = now


def _is_hello(message: dict[str, Any]) -> bool:
    process, processes = message.get("process"), message.get("processes")
    return (
        message.get("magic") == _MAGIC
        and type(process) is int
        and type(processes) is int
        and 0 <= process < processes
        and isinstance(message.get("name"), str)
        and isinstance(message.get("facts"), dict)
    )


def _listen(place: Place) -> socket.socket:
    port = int(place.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=place.processes
        )
        listener.settimeout(1.0)
        return listener
    except OSError as error:
        raise UserError(
            f"--coordinator={place.coordinator}: process 0 cannot listen on port {port} ({error.strerror}); must be a free port of its host"
        ) from error


def _missing(place: Place, hellos: Mapping[int, Any], seconds: float) -> str:
    missing = [str(process) for process in range(place.processes) if process not in hellos]
    more = f" and {len(missing) - 9} more" if len(missing) > 9 else ""
    return (
        f"--coordinator={place.coordinator}: {len(hellos)} of {place.processes} processes came within {seconds:.0f} s; missing "
        f"{', '.join(missing[:9])}{more}. Start the same command on every host, each with its own --process"
    )


def _misplaced(place: Place, hello: dict[str, Any], hellos: Mapping[int, Any]) -> str | None:
    process, name = hello["process"], hello["name"]
    if hello["processes"] != place.processes:
        return (
            f"--processes={place.processes} on process 0, --processes={hello['processes']} on process {process} ({name}); "
            "must be the same on all"
        )
    if process in hellos:
        return f"--process={process}: given twice, on {hellos[process]['name']} and on {name}; every process must have its own"
    return None


def differences(hellos: Mapping[int, Mapping[str, Any]]) -> str | None:
    """One message for all facts that are not process 0's; None where there are none."""
    ours, absent = hellos[0]["facts"], "absent"
    lines = []
    for process, hello in sorted(hellos.items()):
        theirs = hello["facts"]
        lines += [
            f"  {name}: {ours.get(name, absent)!r} on process 0 ({hellos[0]['name']}), "
            f"{theirs.get(name, absent)!r} on process {process} ({hello['name']})"
            for name in ours | theirs
            if ours.get(name, absent) != theirs.get(name, absent)
        ]
    if not lines:
        return None
    more = [f"  and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
    return "\n".join(["the processes of a run must agree; give all the same command. What differs:", *lines[:_LINES], *more])


def _reach(place: Place, hello: dict[str, Any], seconds: float) -> Met:
    host, _, port = place.coordinator.rpartition(":")
    deadline, error = time.monotonic() + seconds, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            link = Link(socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5)))
        except OSError as refusal:
            error = refusal.strerror or str(refusal)
            time.sleep(min(left, 0.5))
            continue
        link.send(hello)
        answer = link.read_one(time.monotonic() + seconds + 5)  # it waits for the others at most so long
        if answer is None or not {"welcome", "refused"} & set(answer):  # one that is ending: an earlier run, perhaps
            link.close()
            error = "no answer"
            time.sleep(min(left, 0.5))
            continue
        if "refused" in answer:
            link.close()
            raise UserError(answer["refused"], answer.get("code", 2))
        link.trusted = True
        return Met({0: link}, answer["welcome"])
    raise UserError(
        f"--coordinator={place.coordinator}: process 0 cannot be reached there within {seconds:.0f} s ({error}); must be its host and "
        "a port that is free on it and open to the others",
        FAILED if place.detected else 2,
    )
