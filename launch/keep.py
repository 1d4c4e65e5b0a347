"""Keeping a job running on preemptible hosts: what to do next is decided from what Cloud and the hosts say, and from nothing else.

So it may itself be stopped and started again at any time. A job that was preempted continues from its last checkpoint by itself.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import common
import hosts
import queued

MAX_OWN_FAILURES = 3  # what diverged, or failed by itself, will do so again; steady running before it changes nothing


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
    return _Keeper(args, topology.hosts, {"create": create, "delete": delete}, job).run()


class _Look(NamedTuple):
    cloud: str
    jobs: dict[str, str]  # by host, of those that answered
    step: str


class _Keeper:
    def __init__(self, args: argparse.Namespace, hosts_number: int, commands: Mapping[str, list[str]], job: str):
        self.args, self.hosts_number, self.commands, self.job = args, hosts_number, commands, job
        self.attempts = self.own_failures = 0
        self.running_since = self.silent_since = None
        self.said = ""

    def run(self) -> int:
        look = self.look()  # a project or an account that is not as it must be is told now
        while True:
            self._say(f"{look.cloud}{self._counts(look)}")
            code = self._result(look)
            if code is not None:
                return code
            if look.step == "wait":
                self._waited(look)
                time.sleep(self.args.poll_seconds)
            elif self._same_after_backoff(look):
                self._act(look)
            look = self._look_again()

    def look(self) -> _Look:
        cloud, jobs = queued.state(self.args, self.args.name), {}
        if cloud == queued.ACTIVE:
            try:
                jobs = queued.job_states(self.args, self.args.name, self.job)
            except common.CommandError as error:  # they do not answer
                self._say(str(error))
        return _Look(cloud, jobs, decide(cloud, jobs, self.hosts_number))

    def _look_again(self) -> _Look:
        try:
            return self.look()
        except common.CommandError as error:  # the network, or gcloud: it may come back
            return _Look(str(error), {}, "wait")

    def _result(self, look: _Look) -> int | None:
        """The exit code where this is the end; None where it is not."""
        if look.step == "done":
            print("the job is done; delete the queued resource, it costs until then")
            return 0
        if look.step == "stopped":
            print("the job was stopped; the same command continues it after `run`, or after `delete`")
            return 0
        why = None
        if look.step == "refused":
            why = "every host refused the input (exit code 2), see `logs`"
        elif look.step == "other":
            why = "another job runs there, see `stop`"
        elif _failed_by_itself(look) and self.own_failures >= MAX_OWN_FAILURES - 1:
            why = f"gave up after {MAX_OWN_FAILURES} runs that diverged or failed with an error of their own (exit code 1), see `logs`"
        elif self.attempts + (look.step in ("create", "start")) > self.args.max_attempts:
            tried = f"{self.args.max_attempts} attempts"
            why = f"gave up after {tried} without {self.args.steady_seconds:g} s of running, see `status` and `logs`"
        if why is None:
            return None
        print(f"tpu keep: {why}; the queued resource costs until it is deleted", file=sys.stderr)
        return 1

    def _waited(self, look: _Look) -> None:
        """What a look at which there is nothing to do says of the attempts: steady running ends their count, silence adds to it."""
        now = time.monotonic()
        self.running_since = (self.running_since or now) if "running" in look.jobs.values() else None
        if self.running_since is not None and now - self.running_since >= self.args.steady_seconds:
            self.attempts = 0
        self.silent_since = (self.silent_since or now) if self._silent(look) else None
        if self.silent_since is not None and now - self.silent_since >= self.args.silent_seconds:
            self.attempts, self.silent_since = self.attempts + 1, now

    def _same_after_backoff(self, look: _Look) -> bool:
        """Whether the step is still the one to take when its turn comes; what must be deleted costs nothing, and need not wait."""
        wait = common.backoff(self.args.poll_seconds, self.attempts) if look.step != "delete" else 0.0
        time.sleep(wait)
        return not wait or self._look_again() == look

    def _act(self, look: _Look) -> None:
        self.running_since = self.silent_since = None
        self.attempts += look.step != "delete"  # what follows a deletion counts
        try:
            if look.step == "start":
                queued.start_job(self.args, self.args.name, self.hosts_number)
                self.own_failures += _failed_by_itself(look)
            else:
                common.run(self.commands[look.step])
                time.sleep(self.args.poll_seconds if look.step == "delete" else 0)
        except common.CommandError as error:
            self._say(str(error))
            time.sleep(self.args.poll_seconds)

    def _counts(self, look: _Look) -> str:
        found = sorted(look.jobs.values())
        answer = f", {len(found)} of {self.hosts_number} hosts answer" if self._silent(look) else ""
        return "".join(f", {found.count(state)} {state}" for state in dict.fromkeys(found)) + answer

    def _silent(self, look: _Look) -> bool:
        return look.cloud == queued.ACTIVE and len(look.jobs) < self.hosts_number

    def _say(self, text: str) -> None:
        if text != self.said:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", flush=True)
        self.said = text


def _failed_by_itself(look: _Look) -> bool:
    return look.step == "start" and "exit 1" in look.jobs.values()
