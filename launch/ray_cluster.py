"""A Ray cluster for sweeps: `python launch/ray_cluster.py VERB --flag=value …`.

Each slice is one host, asked for by itself as queued resource NAME-0, NAME-1, …, so that a run on one knows of no other. NAME-0 is the
head. A submitted command takes some of a host's chips, by default all, and waits its turn; larger runs are those of launch/tpu.py.
"""

import argparse
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import common
import hosts
import queued

from scaling_jax.errors import UserError
from scaling_jax.pods.chips import MAX_SLICES, Topology

PORT, DASHBOARD_PORT = 6379, 8265
JOBS = f"--address=http://127.0.0.1:{DASHBOARD_PORT}"
RAY = f"{hosts.ROOT}/venv/bin/ray"
WORKERS = 16  # hosts that are installed at a time
SAVE_SECONDS = 300  # from SIGTERM to SIGKILL when a command is stopped; Ray's own 3 are too few for saving
# Half of a host of 8: libtpu would take the visible chips for the whole host's shape, and Ray sets shapes for 1 and 2 chips only.
_HALF_HOST = ["env", "TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1", "TPU_PROCESS_BOUNDS=1,1,1"]
_START = f"RAY_JOB_STOP_WAIT_TIME_S={SAVE_SECONDS} {RAY} start"


def head_start(chips: int) -> str:
    """Shell text that starts Ray's head, unless it runs; its dashboard, which takes commands, listens on the head itself only."""
    start = f"{_START} --head --port={PORT} --dashboard-host=127.0.0.1 --dashboard-port={DASHBOARD_PORT} {_node_flags(chips)}"
    return f"{RAY} status --address=127.0.0.1:{PORT} > /dev/null 2>&1 || {start}\n"


def worker_start(chips: int, head: str) -> str:
    """Shell text that joins a host to the head at address `head`, unless it has joined."""
    joined = 'pgrep --full --uid "$(id -u)" "raylet/rayle[t]" > /dev/null'
    return f"{joined} || {_START} --address={head}:{PORT} {_node_flags(chips)}\n"


def submit(command: list[str], chips: int) -> str:
    """Shell text, for the head, that submits a command to run where so many chips are free; one of no chips runs at once."""
    needs = f"--entrypoint-resources={shlex.quote(json.dumps({'TPU': chips}))}" if chips else "--entrypoint-num-cpus=1"
    return f"cd {hosts.ROOT}/source && {RAY} job submit {JOBS} --no-wait {needs} -- {shlex.join(command)}\n"


def _node_flags(chips: int) -> str:
    return f"--disable-usage-stats --resources={shlex.quote(json.dumps({'TPU': chips}))}"


def _up(args: argparse.Namespace) -> int:
    topology, names = _topology(args), _names(args)
    creations = {name: queued.create_command(args, name, Topology(topology.chip, topology.shape)) for name in names}
    secrets = common.secrets_of(args)
    take = hosts.need_secrets(bool(secrets)) + hosts.read_secrets(f'"$HOME"/{hosts.SECRETS}')
    setup = f"set -eu\n{take}{queued.job_setup(args)}"
    _wait_for_hosts(args, creations)
    head = "HEAD" if args.dry_run else _head_address(args, names[0])

    def join(name: str) -> None:
        start = head_start(topology.slice_chips) if name == names[0] else worker_start(topology.slice_chips, head)
        queued.send_secrets(args, name, secrets)
        command = queued.ssh(args, name, f'{setup}{start}echo "$(hostname): joined"\n')
        if args.dry_run:
            common.run(command, dry_run=True)
            return
        if ": joined" not in common.shown_output(command):  # gcloud's ssh succeeds also when it reaches nobody
            raise common.CommandError(f"{name} did not answer; what gcloud said stands above")

    join(names[0])
    with ThreadPoolExecutor(1 if args.dry_run else WORKERS) as pool:  # installing takes each a minute or two
        list(pool.map(join, names[1:]))
    return 0


def _wait_for_hosts(args: argparse.Namespace, creations: dict[str, list[str]]) -> None:
    """Asks for the queued resources that are missing or were preempted, and waits until all are there; ever longer where they fail."""
    if args.dry_run:
        for create in creations.values():
            common.run(create, dry_run=True)
        return
    end, said, failures = time.monotonic() + args.timeout_seconds, {}, 0
    while True:
        states = {name: queued.state(args, name) for name in creations}
        for name, state in states.items():
            if said.get(name) != state:
                print(f"{name:<24}{state}", flush=True)
            if state in queued.GONE:
                common.run(queued.delete_command(args, name))
            if state in (*queued.GONE, queued.ABSENT):
                common.run(creations[name])
        if set(states.values()) == {queued.ACTIVE}:
            return
        if time.monotonic() > end:
            raise common.CommandError(f"not all hosts are there after {args.timeout_seconds:g} s; the same command waits on")
        said = states
        failures += "FAILED" in states.values()
        time.sleep(max(args.poll_seconds, min(common.backoff(args.poll_seconds, failures), end - time.monotonic())))


def _head_address(args: argparse.Namespace, name: str) -> str:
    node = common.json_output(["gcloud", "compute", "tpus", "tpu-vm", "describe", name, *common.place_flags(args)])
    return node["networkEndpoints"][0]["ipAddress"]


def _status(args: argparse.Namespace) -> int:
    head = _names(args)[0]
    common.run(queued.ssh(args, head, f"{RAY} status --address=127.0.0.1:{PORT}; {RAY} job list {JOBS}\n", "0", "0"), args.dry_run)
    return 0


def _submit(args: argparse.Namespace) -> int:
    topology = _topology(args)
    chips = topology.slice_chips if args.chips is None else args.chips
    if chips not in (0, 1, 2, 4, 8) or chips > topology.slice_chips:
        raise UserError(f"--chips={chips}: must be 0, 1, 2, 4 or 8, and at most the {topology.slice_chips} of a host of {topology.name}")
    command = [*(_HALF_HOST if (chips, topology.slice_chips) == (4, 8) else []), *args.command]
    common.run(queued.ssh(args, _names(args)[0], submit(command, chips), "0", "0"), args.dry_run)
    return 0


def _logs(args: argparse.Namespace) -> int:
    common.required(args, "job")
    text = f"{RAY} job logs {JOBS} --follow -- {shlex.quote(args.job)}\n"
    common.run(queued.ssh(args, _names(args)[0], text, "0", "0"), args.dry_run)
    return 0


def _stop(args: argparse.Namespace) -> int:
    common.required(args, "job")
    text = f"{RAY} job stop {JOBS} -- {shlex.quote(args.job)}\n"
    common.run(queued.ssh(args, _names(args)[0], text, "0", "0"), args.dry_run)
    return 0


def _down(args: argparse.Namespace) -> int:
    for name in _names(args):
        if args.dry_run or queued.state(args, name) != queued.ABSENT:
            common.run(queued.delete_command(args, name), args.dry_run)
    return 0


def _topology(args: argparse.Namespace) -> Topology:
    topology = common.topology_of(args)
    if topology.slice_hosts > 1:
        raise UserError(f"--topology={topology.name}: must be of one host, such as v5e:2x4 or v5p:2x2x1; launch/tpu.py has more")
    return topology


def _names(args: argparse.Namespace) -> list[str]:
    common.required(args, "zone")
    common.check_name("name", args.name)
    queued.check_way(args)
    if not 1 <= args.slices <= MAX_SLICES:
        raise UserError(f"--slices={args.slices}: must be from 1 to {MAX_SLICES}")
    return [f"{args.name}-{index}" for index in range(args.slices)]


def _define(parser: argparse.ArgumentParser) -> None:
    queued.define_hosts(parser)
    common.define_topology(parser)


def _define_up(parser: argparse.ArgumentParser) -> None:
    queued.define_hosts(parser)
    queued.define_creation(parser)
    queued.define_job(parser)
    parser.set_defaults(extras="tpu,wandb,ray")
    parser.add_argument("--poll_seconds", type=common.seconds, default=30, help="between looks at the queued resources")
    parser.add_argument("--timeout_seconds", type=common.seconds, default=3600, help="how long to wait for hosts")


def _define_submit(parser: argparse.ArgumentParser) -> None:
    _define(parser)
    parser.add_argument(
        "--chips",
        type=int,
        help="chips of one host that the command takes, by default all; 0 for a sweep, whose groups take them",
    )


def _define_job(parser: argparse.ArgumentParser) -> None:
    _define(parser)
    parser.add_argument("--job", help="name that `submit` printed")


VERBS = {
    "up": common.Verb("create the hosts that are missing, and join them", _define_up, _up),
    "status": common.Verb("hosts, chips and commands of the cluster", _define, _status),
    "submit": common.Verb("queue a command for one host", _define_submit, _submit, takes_command=True),
    "logs": common.Verb("follow the output of a command", _define_job, _logs),
    "stop": common.Verb("have a command save and end", _define_job, _stop),
    "down": common.Verb("delete all hosts", _define, _down),
}


def main() -> int:
    return common.main("ray_cluster", "A Ray cluster for sweeps, on hosts of Cloud TPU.", VERBS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
