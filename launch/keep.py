"""Keeping a job running on preemptible hosts: what to do next is decided from what Cloud and the hosts say, and from nothing else.

So it may itself be stopped and started again at any time. A job that was preempted continues from its last checkpoint by itself.
"""

import argparse
import sys
import time
from collections.abc import Mapping

import common
import hosts
import queued

MAX_WAIT_SECONDS = 960.0


def decide(cloud: str, jobs: Mapping[str, str], number: int) -> str:
    """What to do next.

    Args:
      cloud: state of the queued resource (`queued.state`).
      jobs: state of the job by host (`hosts.states`), of the hosts that answered.
      number: of hosts.

    Returns:
      "create"; "delete" (and create it anew after); "start" (the job, on all hosts); "wait"; "done"; "stopped"; "refused": every host
      says that the input is bad, exit code 2; or "other": another job is running.
    """
    if cloud == queued.ABSENT:
        return "create"
    if cloud in queued.GONE:
        return "delete"
    if cloud != queued.ACTIVE or len(jobs) < number:
        return "wait"
    found = set(jobs.values())
    if "other" in found:
        return "other"
    if "running" in found:  # also while hosts that lost a fellow are still noticing it
        return "wait"
    if "stopped" in found:
        return "stopped"
    if found == {"exit 0"}:
        return "done"
    return "refused" if found == {"exit 2"} else "start"


def keep(args: argparse.Namespace) -> int:
    """Creates, starts, watches, and creates and starts again, until the job is done or was stopped."""
    topology = common.topology_of(args)
    create, delete = queued.create_command(args, args.name, topology), queued.delete_command(args, args.name)
    job = hosts.digest(args.command, queued.job_setup(args))
    common.secrets_of(args)  # a missing one is told now
    if args.dry_run:
        common.run(create, dry_run=True)
        queued.start_job(args, args.name)
        print("# and when it was preempted:")
        common.run(delete, dry_run=True)
        return 0
    attempts, running_since, said = 0, None, ""
    while True:
        try:
            cloud = queued.state(args, args.name)
            jobs = queued.job_states(args, args.name, job) if cloud == queued.ACTIVE else {}
            step = decide(cloud, jobs, topology.hosts)
        except common.CommandError as error:  # the network, or gcloud: it may come back
            cloud, jobs, step = str(error), {}, "wait"
        said = _say(f"{cloud}{_counts(jobs)}", said)
        if step == "done":
            print("the job is done; delete the queued resource, it costs until then")
            return 0
        if step == "stopped":
            print("the job was stopped; the same command continues it after `run`, or after `delete`")
            return 0
        if step in ("refused", "other"):
            why = "every host refused the input (exit code 2), see `logs`" if step == "refused" else "another job runs there, see `stop`"
            print(f"tpu keep: {why}", file=sys.stderr)
            return 1
        if step == "wait":
            running_since = (running_since or time.monotonic()) if "running" in jobs.values() else None
            if running_since is not None and time.monotonic() - running_since >= args.steady_seconds:
                attempts = 0
            time.sleep(args.poll_seconds)
            continue
        running_since = None
        attempts += step != "delete"  # what follows a deletion counts
        if attempts > args.max_attempts:
            tried = f"{args.max_attempts} creations and starts"
            print(f"tpu keep: gave up after {tried} without {args.steady_seconds:g} s of running, see `status` and `logs`", file=sys.stderr)
            return 1
        time.sleep(min(MAX_WAIT_SECONDS, args.poll_seconds * 2 ** (attempts - 3)) if attempts > 2 else 0)
        try:
            if step == "start":
                queued.start_job(args, args.name)
            else:
                common.run(create if step == "create" else delete)
        except common.CommandError as error:
            said = _say(str(error), said)
            time.sleep(args.poll_seconds)


def _counts(jobs: Mapping[str, str]) -> str:
    found = sorted(jobs.values())
    return "".join(f", {found.count(state)} {state}" for state in dict.fromkeys(found))


def _say(text: str, said: str) -> str:
    if text != said:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", flush=True)
    return text
