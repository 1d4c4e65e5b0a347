"""Training on Cloud TPU: `python launch/tpu.py VERB --flag=value …`, by gcloud. docs/pods.md shows it from an empty project on."""

import argparse
import sys
import time

import common
import hosts
import keep
import queued

from scaling_jax.errors import UserError


def _create(args: argparse.Namespace) -> int:
    topology = common.topology_of(args)
    common.run(queued.create_command(args, args.name, topology), args.dry_run)
    print(f"# {topology.slices} x {topology.name}: {topology.chips} chips, {topology.devices} devices, {topology.hosts} hosts")
    return 0


def _run(args: argparse.Namespace) -> int:
    _named(args)
    queued.start_job(args, args.name)
    return 0


def _logs(args: argparse.Namespace) -> int:
    _named(args)
    common.run(queued.ssh(args, args.name, hosts.LOGS, str(args.slice), str(args.host)), args.dry_run)
    return 0


def _status(args: argparse.Namespace) -> int:
    _named(args)
    if args.dry_run:
        common.run([*queued.GCLOUD, "list", *common.place_flags(args), "--format=json"], dry_run=True)
        common.run(queued.ssh(args, args.name, hosts.STATE), dry_run=True)
        return 0
    cloud = queued.state(args, args.name)
    print(f"{'queued resource':<24}{cloud}")
    for host, state in sorted(queued.job_states(args, args.name).items() if cloud == queued.ACTIVE else []):
        print(f"{host:<24}{state}")
    return 0


def _stop(args: argparse.Namespace) -> int:
    """SIGTERM on every host, so that the run saves, and waiting for its end."""
    _named(args)
    common.run(queued.ssh(args, args.name, hosts.STOP), args.dry_run)
    if args.dry_run:
        return 0
    end = time.monotonic() + args.timeout_seconds
    while "running" in (states := queued.job_states(args, args.name)).values():
        if time.monotonic() > end:
            raise common.CommandError(f"the job still runs after {args.timeout_seconds:g} s, see `logs`; stop again, or delete")
        time.sleep(args.poll_seconds)
    if not states:
        raise common.CommandError("no host answered; see `status`")
    print(f"stopped on {len(states)} host(s)")
    return 0


def _delete(args: argparse.Namespace) -> int:
    _named(args)
    common.run(queued.delete_command(args, args.name), args.dry_run)
    return 0


def _keep(args: argparse.Namespace) -> int:
    _named(args)
    if args.max_attempts < 1:
        raise UserError(f"--max_attempts={args.max_attempts}: must be at least 1")
    return keep.keep(args)


def _named(args: argparse.Namespace) -> None:
    common.required(args, "zone")
    common.check_name("name", args.name)
    queued.check_way(args)


def _define_create(parser: argparse.ArgumentParser) -> None:
    queued.define_hosts(parser)
    queued.define_creation(parser)


def _define_run(parser: argparse.ArgumentParser) -> None:
    queued.define_hosts(parser)
    queued.define_job(parser)


def _define_logs(parser: argparse.ArgumentParser) -> None:
    queued.define_hosts(parser)
    parser.add_argument("--slice", type=common.index, default=0, help="which slice, from 0")
    parser.add_argument("--host", type=common.index, default=0, help="which host of the slice, from 0")


def _define_stop(parser: argparse.ArgumentParser) -> None:
    queued.define_hosts(parser)
    parser.add_argument("--timeout_seconds", type=common.seconds, default=600, help="how long to wait for the run to save")
    parser.add_argument("--poll_seconds", type=common.seconds, default=10, help="between looks")


def _define_keep(parser: argparse.ArgumentParser) -> None:
    queued.define_hosts(parser)
    queued.define_creation(parser)
    queued.define_job(parser)
    add = parser.add_argument
    add("--poll_seconds", type=common.seconds, default=30, help="between looks; the wait before further starts doubles from it")
    add("--steady_seconds", type=common.seconds, default=1800, help="a job that ran so long counts as one that works")
    add("--silent_seconds", type=common.seconds, default=900, help="so long without an answer of all hosts counts as one more attempt")
    add("--max_attempts", type=int, default=20, help="creations and starts in a row without running so long")


VERBS = {
    "create": common.Verb("ask for slices, as a queued resource", _define_create, _create),
    "run": common.Verb("start a command on all hosts; it runs on when the connection ends", _define_run, _run, takes_command=True),
    "keep": common.Verb("create and run, again after each preemption, until the run is done", _define_keep, _keep, takes_command=True),
    "status": common.Verb("state of the queued resource, and of the job on every host", queued.define_hosts, _status),
    "logs": common.Verb("follow the log of one host", _define_logs, _logs),
    "stop": common.Verb("have the run save and end, on all hosts", _define_stop, _stop),
    "delete": common.Verb("delete the queued resource and its hosts", queued.define_hosts, _delete),
}


def main() -> int:
    return common.main("tpu", "Training on Cloud TPU.", VERBS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
