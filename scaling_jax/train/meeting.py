"""The processes of a run meet before JAX starts: each says who it is and what it is about to do, and process 0 says whether they fit.

JAX's own start ends a process that lacks a partner with a crash, and a config that differs shows as a hang. Here what is wrong is one
message, the same for all. They meet at the coordinator's port, which JAX's service takes over afterwards; the connections stay, for
`scaling_jax.train.hosts`. Messages are lines of JSON.
"""

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from scaling_jax.errors import UserError

JOIN_SECONDS = 300.0  # for all to come: the hosts of a pod do not start at once
_SEND_SECONDS = 10.0
_MAGIC = "scaling_jax 1"
_LINES = 20  # of differences that are listed


class Place(NamedTuple):
    """A process's place among those of its run."""

    coordinator: str  # HOST:PORT, of process 0
    processes: int
    process: int
    local_devices: list[int] | None = None  # where several processes share a host; None is all that it has


class Link:
    """One connection."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(_SEND_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self._rest = sock, b""
        self._sending = threading.Lock()  # a line is not to stand within another thread's

    def send(self, message: Mapping[str, Any]) -> None:
        """A connection that does not take it is ended, which whoever reads notices."""
        with self._sending:
            try:
                self.sock.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come whole, once there is something to read; None where the other side has ended."""
        try:
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def read_one(self, deadline: float) -> dict[str, Any] | None:
        """The next message; None where none comes until `deadline`, the other side has ended, or it is no message of ours."""
        while (left := deadline - time.monotonic()) > 0:
            self.sock.settimeout(min(left, _SEND_SECONDS))
            try:
                messages = self.read()
            except ValueError:
                return None
            finally:
                self.sock.settimeout(_SEND_SECONDS)
            if messages is None:
                return None
            if messages:
                return messages[0] if isinstance(messages[0], dict) else None
        return None

    def close(self) -> None:
        self.sock.close()


def readable(links: Iterable[Link], seconds: float) -> set[Link]:
    """Those that have something to read or have ended, once there are any, within so many seconds. OSError, ValueError: one is closed."""
    poll = select.poll()  # select.select counts files to 1024
    by_number = {link.sock.fileno(): link for link in links}
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
      UserError: the others did not come or cannot be reached, two claim one place, or the facts differ. The same on all that came.
    """
    hello = {"magic": _MAGIC, "process": place.process, "processes": place.processes, "name": socket.gethostname()}
    hello["facts"] = json.loads(json.dumps(facts, default=str))
    return _receive_all(place, hello) if place.process == 0 else _reach(place, hello)


def _receive_all(place: Place, own: dict[str, Any]) -> Met:
    deadline = time.monotonic() + JOIN_SECONDS
    links, hellos, fault = {}, {0: own}, None
    try:
        with _listen(place) as listener:
            while len(hellos) < place.processes and fault is None:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    link = Link(listener.accept()[0])
                except TimeoutError:
                    fault = _missing(place, hellos)
                    break
                hello = link.read_one(min(deadline, time.monotonic() + 5))
                if hello is None or hello.get("magic") != _MAGIC:  # somebody else's knock
                    link.close()
                    continue
                process = hello["process"]
                fault = _misplaced(place, hello, hellos)
                links[-1 if fault else process], hellos[process] = link, hello if fault is None else hellos.get(process, hello)
        fault = fault or differences(hellos)
        if fault is not None:
            for link in links.values():
                link.send({"refused": fault})
            raise UserError(fault)
        names = [hellos[process]["name"] for process in range(place.processes)]
        for link in links.values():
            link.send({"welcome": names})
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return Met(links, names)


def _listen(place: Place) -> socket.socket:
    port = int(place.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=place.processes
        )
    except OSError as error:
        raise UserError(
            f"--coordinator={place.coordinator}: process 0 cannot listen on port {port} ({error.strerror}); must be a free port of its host"
        ) from error


def _missing(place: Place, hellos: Mapping[int, Any]) -> str:
    missing = [str(process) for process in range(place.processes) if process not in hellos]
    more = f" and {len(missing) - 9} more" if len(missing) > 9 else ""
    return (
        f"--coordinator={place.coordinator}: {len(hellos)} of {place.processes} processes came within {JOIN_SECONDS:.0f} s; missing "
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


def _reach(place: Place, hello: dict[str, Any]) -> Met:
    host, _, port = place.coordinator.rpartition(":")
    deadline, error = time.monotonic() + JOIN_SECONDS, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            link = Link(socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5)))
        except OSError as refusal:
            error = refusal.strerror or str(refusal)
            time.sleep(min(left, 0.5))
            continue
        link.send(hello)
        answer = link.read_one(time.monotonic() + JOIN_SECONDS + 5)  # it waits for the others at most so long
        if answer is None or not {"welcome", "refused"} & set(answer):  # one that is ending: an earlier run, perhaps
            link.close()
            error = "no answer"
            time.sleep(min(left, 0.5))
            continue
        if "refused" in answer:
            link.close()
            raise UserError(answer["refused"])
        return Met({0: link}, answer["welcome"])
    raise UserError(
        f"--coordinator={place.coordinator}: process 0 cannot be reached there within {JOIN_SECONDS:.0f} s ({error}); must be its host and "
        "a port that is free on it and open to the others"
    )
