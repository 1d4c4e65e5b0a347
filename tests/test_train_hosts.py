"""Processes that meet, decide and are refused, as threads of this one; tests/test_multiprocess.py has real ones, which fail and end."""

import contextlib
import importlib.metadata
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from meetings import Ended, all_at_once, free_port, impatient, leave, made, met, places, several  # noqa: F401

from scaling_jax.errors import UserError
from scaling_jax.train import joining, meeting
from scaling_jax.train.hosts import ALONE, Hosts
from scaling_jax.train.meeting import FAILED, Link, Met, Place, meet


def refusal(results: list[Any]) -> str:
    assert all(isinstance(result, UserError) for result in results), results
    assert len({str(result) for result in results}) == 1
    return str(results[0])


def test_process_0_decides_and_the_others_are_told():
    all_hosts = several(3)
    asked = []

    def of(hosts: Hosts) -> Any:
        told = hosts.tell(lambda: asked.append(hosts.process) or {"x": [1, None, 0.1]})
        did = hosts.do(lambda: asked.append(hosts.process) or object())
        collected = hosts.collect(hosts.process**2)
        hosts.agree(content="same")
        hosts.all_well(None)
        return told, did is not None, collected

    found = all_at_once(*(lambda hosts=hosts: of(hosts) for hosts in all_hosts))
    assert [f[0] for f in found] == [{"x": [1, None, 0.1]}] * 3 and [f[1] for f in found] == [True, False, False]
    assert [f[2] for f in found] == [[0, 1, 4]] * 3 and asked == [0, 0]
    leave(all_hosts)


def test_nobody_goes_on_before_all_have_come():
    all_hosts = several(2)
    late, when = 0.5, {}

    def come(hosts: Hosts) -> None:
        time.sleep(late * hosts.process)
        hosts.collect(None)
        when[hosts.process] = time.monotonic()

    start = time.monotonic()
    all_at_once(*(lambda hosts=hosts: come(hosts) for hosts in all_hosts))
    assert min(when.values()) - start >= late
    leave(all_hosts)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda hosts: hosts.tell(lambda: fail("no space")), "no space"),
        (lambda hosts: hosts.do(lambda: fail("no space")), "no space"),
        (lambda hosts: hosts.all_well("no such directory" if hosts.process == 2 else None), "no such directory (process 2 of 3"),
        (lambda hosts: hosts.agree(law="ab" if hosts.process == 1 else "cd"), "law: 'cd' on process 0"),
    ],
)
def test_an_error_of_one_is_that_of_all(act: Callable[[Hosts], Any], words: str):
    all_hosts = several(3)
    assert words in refusal(all_at_once(*(lambda hosts=hosts: act(hosts) for hosts in all_hosts)))


def fail(text: str) -> None:
    raise UserError(text)


def test_alone_nothing_is_asked_of_anybody():
    value = object()
    assert ALONE.count == 1 and ALONE.first and ALONE.tell(lambda: value) is value and ALONE.do(lambda: value) is value
    assert ALONE.collect(value) == [value]
    ALONE.agree(content="same")
    ALONE.all_well(None)
    with pytest.raises(UserError, match="full"):
        ALONE.do(lambda: fail("full"))
    threads = threading.active_count()
    with joining.joined(None, {"a": 1}) as hosts, joining.joined(Place("", 1, 0), {}) as same:
        assert hosts is same is ALONE and threading.active_count() == threads and not jax.distributed.is_initialized()


def test_facts_that_differ_are_all_named():
    facts = [{"config.a": 1, "jax": "1.0", "same": [1, 2]}, {"config.a": 1, "jax": "1.1", "same": [1, 2]}, {"config.a": 2, "jax": "1.0"}]
    text = refusal(met(places(3), facts))
    name = socket.gethostname()
    assert text.splitlines()[1:] == [
        f"  jax: '1.0' on process 0 ({name}), '1.1' on process 1 ({name})",
        f"  config.a: 1 on process 0 ({name}), 2 on process 2 ({name})",
        f"  same: [1, 2] on process 0 ({name}), 'absent' on process 2 ({name})",
    ]


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCALING_JAX_JOIN_SECONDS", "2")
    three = places(3)
    found = met([three[0], three[2]])
    assert f"--coordinator={three[0].coordinator}: 2 of 3 processes came within 2 s; missing 1." in refusal(found)
    assert [error.code for error in found] == [FAILED] * 2  # it may come yet


def test_a_coordinator_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCALING_JAX_JOIN_SECONDS", "0.5")
    by_hand = Place(f"127.0.0.1:{free_port()}", 2, 1)
    for place, code in ((by_hand, 2), (by_hand._replace(detected=True), FAILED)):
        with pytest.raises(UserError, match=f"--coordinator={place.coordinator}: process 0 cannot be reached there .*refused") as error:
            meet(place, {})
        assert error.value.code == code
    with pytest.raises(UserError, match="--coordinator=no.such.host.invalid:80: process 0 cannot be reached there"):
        meet(Place("no.such.host.invalid:80", 2, 1), {})


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_seconds_that_are_no_positive_number_are_refused(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("SCALING_JAX_JOIN_SECONDS", text)
    with pytest.raises(UserError, match=f"SCALING_JAX_JOIN_SECONDS={text}: must be a positive number"):
        meet(Place("here:1", 2, 1), {})


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(UserError, match=f"--coordinator=here:{port}: process 0 cannot listen on port {port} .*in use"):
            meet(Place(f"here:{port}", 2, 0), {})


def test_two_that_claim_one_place_are_refused():
    first, second, _ = places(3)
    found = met([first, second, second])
    assert "--process=1: given twice" in str(found[0]) and all(isinstance(result, UserError) for result in found)


def test_another_number_of_processes_is_refused():
    first, _ = places(2)
    assert "--processes=2 on process 0, --processes=4 on process 3" in refusal(met([first, Place(first.coordinator, 4, 3)]))


def test_who_comes_after_the_refusal_is_refused_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meeting, "LATE_SECONDS", 10.0)
    first, second, third = places(3)
    acts = [(first, 0), (second, 0), (second, 0.2), (third, 1)]
    started = time.monotonic()
    found = all_at_once(*(lambda place=place, late=late: time.sleep(late) or meet(place, {}) for place, late in acts))
    assert "--process=1: given twice" in refusal(found) and time.monotonic() - started < 8  # no longer than until all have come


def test_one_that_came_and_went_may_come_again():
    first, second, third = places(3)

    def come_and_go() -> None:
        link = knock(first)
        link.sendall(hello(process=1, processes=3))
        time.sleep(0.3)
        link.close()

    found = all_at_once(lambda: meet(first, {}), come_and_go, *(lambda p=p: time.sleep(0.8) or meet(p, {}) for p in (second, third)))
    assert set(found[0].links) == {1, 2} and len(found[2].names) == 3


def knock(place: Place) -> socket.socket:
    """A connection to process 0, as soon as there is one."""
    for _ in range(1000):
        try:
            return socket.create_connection(("127.0.0.1", int(place.coordinator.rpartition(":")[2])))
        except OSError:
            time.sleep(0.01)
    raise AssertionError("nobody listens")


def hello(**changes: Any) -> bytes:
    """What process 1 of 2 says at the meeting."""
    return json.dumps({"magic": "scaling_jax 1", "process": 1, "processes": 2, "name": "x", "facts": {}} | changes).encode() + b"\n"


def test_somebody_elses_knock_is_ignored():
    two = places(2)
    others = [b"GET / HTTP/1.1\r\n\r\n", b"5\n", b'{"magic": "?"}\n', b"\xff\n", b"[" * 200_000 + b"\n", b"x" * 3_000_000]
    others += [b'{"magic": "scaling_jax 1"}\n', b"{}\n" + hello(), hello(name=1), hello(facts=5), hello(processes=True)]
    others += [hello(process=process) for process in ([1], "1", None, -1, 2, 1.0, True)]

    def disturb() -> None:
        for words in others:
            with knock(two[0]) as sock, contextlib.suppress(OSError):
                sock.sendall(words)
                sock.recv(1)  # closed without a word

    first, _, second = all_at_once(lambda: meet(two[0], {}), disturb, lambda: time.sleep(0.5) or meet(two[1], {}))
    assert set(first.links) == {1} and set(second.links) == {0} and len(first.names) == 2


def test_silent_connections_keep_nobody_out():
    two = places(2)
    silent = []
    started = time.monotonic()
    first, _, second = all_at_once(
        lambda: meet(two[0], {}), lambda: silent.extend(knock(two[0]) for _ in range(3)), lambda: time.sleep(0.3) or meet(two[1], {})
    )
    assert set(first.links) == {1} and set(second.links) == {0} and time.monotonic() - started < 4
    for sock in silent:
        assert sock.recv(1) == b""  # closed
        sock.close()


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return socket.create_connection(listener.getsockname()), listener.accept()[0]


def test_what_comes_with_the_welcome_is_heard():
    """Process 0 may decide, or fail, before another one has read that it is welcome."""
    ours, theirs = connected()
    theirs.sendall(b'{"welcome": ["a", "b"]}\n{"told": 1, "value": 5}\n')
    link = Link(ours)
    answer = link.read_one(time.monotonic() + 5)
    made.append(Hosts(1, Met({0: link}, answer["welcome"])))
    (told,) = all_at_once(lambda: made[-1].tell(lambda: fail("not process 0")))
    assert told == 5
    made[-1]._over.set()
    theirs.close()


def in_two(process: int) -> tuple[Hosts, Link]:
    """Process `process` of two, which watches nothing by itself, and the other's end of its connection."""
    ours, theirs = map(Link, connected())
    hosts = Hosts()
    hosts.process, hosts.names, hosts._links = process, ["a", "b"], {1 - process: ours}
    return hosts, theirs


def no_room() -> None:
    raise OSError("no space left on device")


def test_a_stderr_that_cannot_be_written_holds_nobody_up(monkeypatch: pytest.MonkeyPatch):
    class Full:
        write = flush = staticmethod(lambda *_: no_room())

    monkeypatch.setattr(sys, "stderr", Full())
    hosts, _ = in_two(1)
    with pytest.raises(Ended, match="3"):
        hosts.end_cut_off()
    hosts, other = in_two(1)
    hosts.fail(RuntimeError("no such luck"), no_room)
    assert other.read()[0]["reason"] == "failed: RuntimeError: no such luck"
    with pytest.raises(Ended, match="1"):
        joining._exit(in_two(1)[0], RuntimeError("no such luck"), "x")


def test_the_others_are_told_before_anything_is_said():
    hosts, other = in_two(1)
    heard = []
    hosts.fail(ValueError("long\n" + "and wide " * 1000), lambda: heard.extend(other.read()))
    assert heard[0]["code"] == FAILED and heard[0]["reason"].startswith("failed: ValueError: long and wide and wide ")
    assert "\n" not in heard[0]["reason"] and len(heard[0]["reason"]) < 220
    hosts, other = in_two(1)
    hosts.fail(UserError("mend this"), lambda: None)
    assert other.read() == [{"failed": 1, "reason": "failed: mend this", "code": 2}]


def test_who_has_left_ends_with_the_code_of_the_run(capsys: pytest.CaptureFixture[str]):
    both = several(2)
    leave(both)
    both[0].code = 143
    for link in list(both[1]._links.values()):  # a thread takes them out as they end
        link.sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(Ended, match="143"):
        both[0].end_well()
    assert both[0].left and capsys.readouterr().err == ""


def test_a_source_checkout_has_no_version_but_a_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def version(name: str) -> str:
        if name == "scaling_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    codes = []
    for text in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "module.py").write_text(text)
        monkeypatch.setattr(joining.scaling_jax, "__file__", str(tmp_path / "__init__.py"))
        versions = joining._versions()
        assert versions["scaling_jax"] == "not installed" and versions["jax"] == "1.0"
        codes.append(versions["code of scaling_jax"])
    assert codes[0] != codes[1] and codes[0] == codes[2]


def test_flags_name_a_place():
    assert joining.place_of_flags(None, None, None) is None
    assert joining.place_of_flags("host:1234", 4, 3) == Place("host:1234", 4, 3)
    assert joining.place_of_flags(None, 1, None).processes == 1
    for given, words in (
        (("host:1234", None, None), "--processes, --process: missing"),
        ((None, 2, 0), "--coordinator: missing"),
        (("host", 2, 0), "--coordinator=host: must be HOST:PORT"),
        (("host:0", 2, 0), "--coordinator=host:0: must be HOST:PORT"),
        (("host:1", 2, 2), "--process=2: must be from 0 to 1, for --processes=2"),
        (("host:1", 2, -1), "--process=-1: must be from 0 to 1"),
        (("host:1", 0, 0), "--processes=0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            joining.place_of_flags(*given)


SLURM = {"SLURM_JOB_ID": "70", "SLURM_STEP_NODELIST": "node[01-04],x", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environ", "on_tpu_vm", "several"),
    [
        ({}, False, False),
        ({}, True, True),  # the metadata server knows
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, True, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, True),
        ({"MEGASCALE_NUM_SLICES": "1"}, False, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, False, True),
        (SLURM | {"SLURM_NTASKS": "4"}, False, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False, False),
        ({"SLURM_NTASKS": "4"}, False, False),  # in the batch script, outside of srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, True),
    ],
)
def test_signs_of_several_workers(environ: dict[str, str], on_tpu_vm: bool, several: bool):
    assert joining.several_workers(environ, on_tpu_vm) is several


def test_the_environment_names_a_place(monkeypatch: pytest.MonkeyPatch):
    """As Slurm does, by JAX's own detection."""
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", *SLURM, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert joining.place_of_environment() is None
    for name, value in (SLURM | {"SLURM_NTASKS": "4"}).items():
        monkeypatch.setenv(name, value)
    assert joining.place_of_environment() == Place("node01:61510", 4, 2, [0], detected=True)
    for name in SLURM:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS=host:1: but nothing says"):
        joining.place_of_environment()


def test_what_two_threads_say_at_once_arrives_whole():
    """The main thread's long messages, and signs of life."""
    all_hosts = several(2)
    long = ["x" * 1000] * 3000
    found = all_at_once(*(lambda hosts=hosts: [hosts.collect(long) == [long, long] for _ in range(5)] for hosts in all_hosts))
    assert found == [[True] * 5] * 2
    leave(all_hosts)
