"""Tasks of a study on the nodes of a Ray cluster. Ray is imported here alone, and only once an engine is made."""

import contextlib
import functools
import os
import socket
import sys
import threading
from concurrent.futures import Future
from typing import Any

from scaling_jax.errors import UserError
from scaling_jax.process import keep_freed_memory, leave_out_absent_tpu, use_compilation_cache
from scaling_jax.sweep import worker
from scaling_jax.sweep.engine import STOPPED, WorkerLost, unwrap

LOCAL = "local"  # the address that means: a cluster of this machine alone, for as long as the engine is there
WAIT_SECONDS = 0.2
ANSWER_SECONDS = 10.0


class RayEngine:
    """Ray chooses the node, and keeps its processes for the tasks that follow; a task is tried once."""

    def __init__(self, address: str, cpus: int = 1, tpus: int = 0, **init: Any):
        """`address`: HOST:PORT of the head, 'auto' for the cluster that this machine is in, or 'local'.

        `cpus`, `tpus`: of one task. `init`: further arguments of `ray.init`.

        Raises:
          UserError: Ray is not installed, or there is no cluster at `address`.
        """
        try:
            import ray
        except ImportError:
            raise UserError("--engine=ray: Ray is not installed; pip install 'scaling_jax[ray]'") from None
        self._ray = ray
        _check_answers(address)
        env = {"PJRT_NPROC": str(cpus), "OMP_NUM_THREADS": str(cpus)} | ({} if tpus else {"JAX_PLATFORMS": "cpu"})
        try:
            ray.init(
                address=address,
                runtime_env={"env_vars": env},
                log_to_driver=False,
                logging_level="ERROR",
                **({"include_dashboard": False} if address == LOCAL else {}),
                **init,
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise _no_cluster(address, (str(error).splitlines() or [type(error).__name__])[0]) from None
        if what := _nowhere(ray.nodes(), {"CPU": cpus, "TPU": tpus}):
            if address == LOCAL:
                ray.shutdown()
                raise UserError(f"--ray_address={address}: {what}; must have as many, or the study's cpus and tpus be fewer")
            print(f"waiting for a node: {what} yet", file=sys.stderr)  # a cluster may grow
        options: dict[str, Any] = {"num_cpus": cpus, "max_retries": 0}
        if tpus:  # chips belong to a process until it ends
            options |= {"resources": {"TPU": tpus}, "max_calls": 1}
        self._remote = ray.remote(**options)(_task)
        self._lock = threading.Lock()
        self._running: dict[Any, Future[dict[str, Any]]] = {}  # by Ray's reference
        self._new = threading.Event()
        self._stopping = self._closed = False
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, task: dict[str, Any]) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._stopping:
                future.set_result(STOPPED)
            else:
                self._running[self._remote.remote(task, os.getcwd())] = future
                self._new.set()
        return future

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            references = list(self._running)
        for reference in references:
            self._ray.cancel(reference, force=False)

    def close(self) -> None:
        with self._lock:
            self._stopping = self._closed = True
            references = list(self._running)
        for reference in references:
            self._ray.cancel(reference, force=True)
        self._new.set()
        self._watcher.join()
        self._ray.shutdown()

    def _watch(self) -> None:
        while not self._closed:
            with self._lock:
                references = list(self._running)
                if not references:
                    self._new.clear()
            if not references:
                self._new.wait()
                continue
            done, _ = self._ray.wait(references, num_returns=len(references), timeout=WAIT_SECONDS)
            for reference in done:
                self._settle(reference)

    def _settle(self, reference: Any) -> None:
        with self._lock:
            future = self._running.pop(reference)
        exceptions = self._ray.exceptions
        try:
            future.set_result(unwrap(self._ray.get(reference)))
        except exceptions.TaskCancelledError:
            future.set_result(STOPPED)
        except exceptions.RayError as error:
            if self._stopping:
                future.set_result(STOPPED)
            else:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                future.set_exception(WorkerLost(f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__))
        except Exception as error:
            future.set_exception(error)


def _nowhere(nodes: list[dict[str, Any]], wanted: dict[str, int]) -> str:
    """Which of the wanted resources no living node has all of; '' where one has."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(node.get(name, 0) >= count for name, count in wanted.items()) for node in alive):
        return ""
    return "no node has " + " and ".join(f"{count} {name}" for name, count in wanted.items() if count)


def _check_answers(address: str) -> None:
    """UserError where nobody listens at the head's address: `ray.init` would wait for minutes."""
    try:
        from ray._private.services import canonicalize_bootstrap_address

        head = None if address.startswith("ray://") else canonicalize_bootstrap_address(address)
    except (ImportError, ValueError, OSError):  # another version of Ray; or an address that is none, which it says itself
        return
    host, _, port = (head or "").rpartition(":")
    if not host:  # 'local', or no cluster is known, which it says itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, f"{head}: {error}") from None


def _no_cluster(address: str, why: str) -> UserError:
    return UserError(
        f"--ray_address={address}: no Ray cluster answers there ({why}); start one with `ray start --head`, or give "
        f"--ray_address={LOCAL} for one of this machine"
    )


@functools.cache
def _prepare() -> None:
    leave_out_absent_tpu()
    keep_freed_memory()
    use_compilation_cache()


def _task(task: dict[str, Any], directory: str) -> dict[str, Any]:
    """In a process of Ray's. Ray's own cancelling is a SIGINT, and SIGTERM comes where a node is about to go."""
    _prepare()
    with contextlib.suppress(OSError):  # that of the driver, where there is one of this name: paths in a config may be relative
        os.chdir(directory)
    asked = worker.Asked()
    asked.saves = task["do"] == "group"
    with asked.heeding_signals():
        return worker.answer(task, asked)
