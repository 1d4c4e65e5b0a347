"""Processes that meet as threads of this one, for tests of what they do then."""

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scaling_jax.errors import UserError
from scaling_jax.train import hosts as hosts_lib
from scaling_jax.train import meeting
from scaling_jax.train.hosts import Hosts
from scaling_jax.train.meeting import Place, meet


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]


class Ended(BaseException):
    """Instead of the end of the process, whose exit code it has."""


made: list[Hosts] = []


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.delenv("SCALING_JAX_JOIN_SECONDS", raising=False)
    monkeypatch.setattr(meeting, "JOIN_SECONDS", 20.0)
    monkeypatch.setattr(meeting, "LATE_SECONDS", 0.3)
    monkeypatch.setattr(hosts_lib, "BEAT_SECONDS", 0.001)
    monkeypatch.setattr(hosts_lib.os, "_exit", end)
    yield
    for hosts in made:  # a test that fails leaves some that would end this process
        hosts._over.set()
        for link in list(hosts._links.values()):
            link.close()
    made.clear()


def all_at_once(*acts: Callable[[], Any]) -> list[Any]:
    """What each returns, or the UserError that it raises."""
    results = [None] * len(acts)

    def run(i: int) -> None:
        try:
            results[i] = acts[i]()
        except UserError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return results


def met(places: list[Place], facts: list[dict[str, Any]] | None = None) -> list[Any]:
    facts = facts or [{}] * len(places)
    found = all_at_once(*(lambda place=place, fact=fact: meet(place, fact) for place, fact in zip(places, facts, strict=True)))
    return found


def places(count: int) -> list[Place]:
    coordinator = f"127.0.0.1:{free_port()}"
    return [Place(coordinator, count, process) for process in range(count)]


def several(count: int) -> list[Hosts]:
    made.extend(Hosts(process, m) for process, m in enumerate(met(places(count))))
    return made[-count:]


def leave(all_hosts: list[Hosts]) -> None:
    all_at_once(*(hosts.leave for hosts in all_hosts))
