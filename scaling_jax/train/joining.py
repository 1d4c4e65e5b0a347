"""Several processes become one run: where this one belongs, and JAX's distributed start and end."""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import scaling_jax
from scaling_jax.errors import UserError
from scaling_jax.train.hosts import ALONE, LOST_SECONDS, Hosts
from scaling_jax.train.meeting import Place, join_seconds, meet

_PACKAGES = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "scaling_jax"


def place_of_flags(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """What --coordinator, --processes and --process say; None where none is given. UserError where they are wrong or not all given."""
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if processes == 1 and coordinator is None and not process:
        return Place("", 1, 0)
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(
            f"{', '.join(missing)}: missing; several processes need --coordinator=HOST:PORT, --processes=N and --process=I, "
            "and one process none of them"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator={coordinator}: must be HOST:PORT, the host of process 0 and a port that is free there")
    if processes < 1:
        raise UserError(f"--processes={processes}: must be at least 1")
    if not 0 <= process < processes:
        raise UserError(f"--process={process}: must be from 0 to {processes - 1}, for --processes={processes}")
    return Place(coordinator, processes, process)


def several_workers(environ: Mapping[str, str], on_tpu_vm: bool) -> bool:
    """Whether the environment may be that of one process of several, so that JAX's own detection is asked.

    Args:
      environ: of the process: TPU workers (GKE, XPK, multislice), Slurm, Open MPI, or a coordinator that is named to JAX.
      on_tpu_vm: of Cloud TPU, where the metadata server knows the workers.
    """
    workers = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if "JAX_COORDINATOR_ADDRESS" in environ or (workers is not None and "," in workers):
        return True
    if any(environ.get(name, "1") not in ("", "0", "1") for name in ("MEGASCALE_NUM_SLICES", "OMPI_COMM_WORLD_SIZE")):
        return True
    if "SLURM_STEP_NODELIST" in environ and environ.get("SLURM_NTASKS", "1") != "1":
        return True
    return on_tpu_vm and workers is None and "TPU_SKIP_MDS_QUERY" not in environ


def place_of_environment() -> Place | None:
    """What a TPU pod, GKE, Slurm or Open MPI says, as `jax.distributed.initialize` detects it; None where this process is alone."""
    from jax._src import cloud_tpu_init, clusters

    if not several_workers(os.environ, cloud_tpu_init.running_in_cloud_tpu_vm):
        return None
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    seconds = max(1, int(join_seconds()))
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(coordinator, None, None, None, None, seconds)
    except Exception as error:  # of a metadata server or an environment that lacks something
        raise UserError(
            f"the environment is that of several hosts, but does not say which is which ({error}); give --coordinator=HOST:PORT, "
            "--processes=N and --process=I, or --processes=1 for this host alone (a worker of a slice of several hosts then needs "
            "TPU_PROCESS_BOUNDS, TPU_CHIPS_PER_PROCESS_BOUNDS and TPU_VISIBLE_CHIPS too, or libtpu waits for the other workers)"
        ) from error
    coordinator, processes, process, local_devices = found
    if processes == 1:
        return None
    if None in (coordinator, processes, process):
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={coordinator}: but nothing says how many processes there are and which this is; give "
            "--coordinator=HOST:PORT, --processes=N and --process=I, or --processes=1 for this host alone"
        )
    return Place(coordinator, processes, process, None if local_devices is None else list(local_devices), detected=True)


def _versions() -> dict[str, str]:
    """Of packages, and of this one's code: two checkouts may well have one version, or none."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    root, code = Path(scaling_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return versions | {"code of scaling_jax": code.hexdigest()[:12]}


@contextlib.contextmanager
def joined(place: Place | None, facts: Mapping[str, Any], program: str = "scaling-jax train") -> Iterator[Hosts]:
    """The processes of a run, from their meeting to their end. For one process alone nothing is started.

    Whatever ends one of them ends all: with the error's own message where it was raised, the code of a UserError, 130 for Ctrl-C and 1
    for anything else; elsewhere with a message that names that process and its error, and exit code 2 or `hosts.FAILED`. One that is lost
    once all are done ends none: the others exit with `hosts.code`, which is the caller's to set.

    Args:
      place: of this process; None for one that is alone.
      facts: what must be the same on all, by name, beside the versions of packages and this one's code.
      program: begins each message.

    Raises:
      UserError: the processes do not come together, or differ. Nothing is written then.
    """
    if place is None or place.processes == 1:
        yield ALONE
        return
    hosts = Hosts(place.process, meet(place, _versions() | dict(facts)), program)
    try:
        _start_jax(place, hosts)
        yield hosts
        hosts.leave()
    except BaseException as error:
        _exit(hosts, error, program)
    import jax

    try:
        jax.distributed.shutdown()
    except BaseException:  # another was killed on its way out; all that was to be done is done
        hosts.end_well()


def _start_jax(place: Place, hosts: Hosts) -> None:
    import jax

    _explain_abort(hosts)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=60,
        heartbeat_timeout_seconds=int(2 * LOST_SECONDS) + 30,  # ours, which have something to say, come first
        shutdown_timeout_seconds=10,  # all have left together
    )


_keep: list[Callable[..., None]] = []  # what C calls must not be collected


def _explain_abort(hosts: Hosts) -> None:
    """JAX aborts the process the moment it loses its coordinator, process 0, or any other as it shuts down, and takes no function to call
    (jaxlib 0.10.2 has one, which fails as it converts its argument). So the signal itself is caught, before it ends the process."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number: int) -> None:
        if hosts.left:
            hosts.end_well()
        if not hosts.first and hosts.is_cut_off():
            hosts.end_cut_off()  # otherwise something else aborted, and may

    _keep.append(on_abort)
    ctypes.CDLL(None).signal(signal.SIGABRT, on_abort)


def _exit(hosts: Hosts, error: BaseException, program: str) -> NoReturn:
    """Without the interpreter's orderly end, in which JAX waits for the others, who are gone."""
    code = 1
    if isinstance(error, SystemExit):
        raise error
    if not isinstance(error, UserError | KeyboardInterrupt):
        text = "".join(traceback.format_exception(error))
    else:
        code = error.code if isinstance(error, UserError) else 130
        text = f"{program}: {error if isinstance(error, UserError) else 'interrupted; the same command on all hosts continues'}\n"
    try:
        hosts.fail(error, lambda: print(text, end="", file=sys.stderr, flush=True))
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    finally:
        os._exit(code)
