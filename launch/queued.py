"""Queued resources of Cloud TPU, by gcloud: what is created, its state, commands on its hosts."""

import argparse
import re

import common
import hosts

from scaling_jax.errors import UserError
from scaling_jax.pods.chips import Topology, shapes

GCLOUD = ["gcloud", "compute", "tpus", "queued-resources"]
RUNTIME_VERSIONS = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
ACTIVE = "ACTIVE"
GONE = ("SUSPENDED", "FAILED")  # preempted, or never had: only deleting and asking anew brings it back
ABSENT = "absent"
# A host that is gone without a word would hold a connection for ever.
_SSH_OPTIONS = ("-oConnectTimeout=30", "-oServerAliveInterval=15", "-oServerAliveCountMax=4")
_SECRET_IN_URL = re.compile(r"https?://.*@|[^/]*://[^/@]*:[^/]*@", re.IGNORECASE)


def define_creation(parser: argparse.ArgumentParser) -> None:
    common.define_topology(parser)
    parser.add_argument("--spot", action="store_true", help="preemptible, cheaper")
    parser.add_argument("--reserved", action="store_true", help="of a reservation")
    parser.add_argument("--runtime_version", default="", help="image of the hosts; by default that of the chip")
    parser.add_argument("--service_account", default="", help="account that the hosts act as; it needs access to the bucket")
    parser.add_argument("--network", default="", help="network of the hosts; by default gcloud's")
    parser.add_argument("--subnetwork", default="", help="subnetwork of the hosts")
    parser.add_argument("--no_external_ips", action="store_true", help="hosts without addresses in the internet")


def define_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="of the queued resource")
    common.define_place(parser)
    parser.add_argument("--internal_ip", action="store_true", help="connect within the network")
    parser.add_argument("--iap", action="store_true", help="connect through Identity-Aware Proxy")
    parser.add_argument("--ssh_seconds", type=common.seconds, default=900, help="what a look at all hosts, or a start, may take at most")


def define_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repository", help="git repository of this package that the hosts can read, https://…")
    parser.add_argument("--ref", help="tag, branch or full commit to install; the same when a run is to continue")
    parser.add_argument("--extras", default="tpu,wandb", help="extras of the package to install")
    parser.add_argument("--bucket", default="", help="bucket to mount at /mnt/BUCKET")
    common.define_secrets(parser)


def create_command(args: argparse.Namespace, name: str, topology: Topology) -> list[str]:
    """gcloud's command for `topology` under `name`; one slice is a node of that name, several are NAME-0, NAME-1, …

    Nodes of one request of several know of each other: their metadata has what jax and libtpu need to train across slices.
    """
    common.check_name("name", name)
    chip = topology.chip
    if chip.name not in RUNTIME_VERSIONS:
        raise UserError(f"--topology={topology.name}: {chip.name} is had on Kubernetes only; see launch/xpk.py")
    if args.spot and args.reserved:
        raise UserError("--spot and --reserved: at most one of them")
    default = next(shape for shape in shapes(chip) if Topology(chip, shape).slice_chips == topology.slice_chips)
    if topology.shape == default:
        gcloud, kind = GCLOUD, [f"--accelerator-type={topology.accelerator_type}"]
    else:  # without alpha, gcloud knows shapes of v4 only
        gcloud, kind = [GCLOUD[0], "alpha", *GCLOUD[1:]], [f"--type={chip.cloud_type}", f"--topology={topology.shape_name}"]
        kind += ["--provisioning-model=spot"] if args.spot else []  # of its two flags for this, alpha sends but one
    nodes = [f"--node-id={name}"] if topology.slices == 1 else [f"--node-count={topology.slices}", f"--node-prefix={name}"]
    optional = {"service-account": args.service_account, "network": args.network, "subnetwork": args.subnetwork}
    return [
        *[*gcloud, "create", name, *common.place_flags(args), *kind, *nodes],
        f"--runtime-version={args.runtime_version or RUNTIME_VERSIONS[chip.name]}",
        *[f"--{flag}={value}" for flag, value in optional.items() if value],
        *[f"--{flag}" for flag in ("spot", "reserved") if getattr(args, flag)],
        *(["--internal-ips"] if args.no_external_ips else []),
        "--quiet",
    ]


def delete_command(args: argparse.Namespace, name: str) -> list[str]:
    return [*GCLOUD, "delete", name, *common.place_flags(args), "--force", "--quiet"]


def state(args: argparse.Namespace, name: str) -> str:
    """Cloud's word for the state of a queued resource, such as ACTIVE; ABSENT if there is none of that name."""
    common.check_name("name", name)
    rows = common.json_output([*GCLOUD, "list", *common.place_flags(args)])
    return next((row["state"]["state"] for row in rows if row["name"].rsplit("/", 1)[-1] == name), ABSENT)


def ssh(args: argparse.Namespace, name: str, text: str, node: str = "all", worker: str = "all") -> list[str]:
    """gcloud's command that runs shell text on hosts, 64 at a time."""
    flags = [f"--ssh-flag={option}" for option in _SSH_OPTIONS]
    return [*GCLOUD, "ssh", name, *_reach(args, node, worker), *flags, f"--command={text}"]


def send_secrets(args: argparse.Namespace, name: str, secrets: dict[str, str]) -> None:
    """Copies the variables to a file of mode 600 on all hosts, where a job's start looks for them; nothing for none."""
    if not secrets:
        return
    remote = f"{name}:{hosts.SECRETS}"
    flags = [*_reach(args, "all", "all"), *[f"--scp-flag={option}" for option in (*_SSH_OPTIONS, "-p")]]
    if args.dry_run:
        print(f"# FILE, of mode 600: {', '.join(f'{key}=***' for key in secrets)}")
        common.run([*GCLOUD, "scp", "FILE", remote, *flags], dry_run=True)
        return
    with common.secret_file(common.exports(secrets)) as path:
        common.run([*GCLOUD, "scp", path, remote, *flags], timeout=args.ssh_seconds)


def start_job(args: argparse.Namespace, name: str, number: int = 1) -> None:
    """Starts args.command on all hosts of a queued resource that is active; CommandError where fewer than `number` say that it runs.

    That gcloud's ssh succeeds says nothing: it warns of hosts that it cannot reach, and does without them.
    """
    setup, secrets = job_setup(args), common.secrets_of(args)
    send_secrets(args, name, secrets)
    command = ssh(args, name, hosts.start(args.command, setup, bool(secrets)))
    if args.dry_run:
        common.run(command, dry_run=True)
        return
    started = hosts.started(common.shown_output(command, args.ssh_seconds))
    if started < number:
        raise common.CommandError(f"the job runs on {started} host(s), and not on at least {number}; what gcloud said stands above")


def job_setup(args: argparse.Namespace) -> str:
    """Shell text that comes before the command: the mount and the installation."""
    common.required(args, "repository", "ref")
    for flag in ("repository", "ref"):
        if getattr(args, flag).startswith("-"):
            raise UserError(f"--{flag}={getattr(args, flag)}: must not start with '-'")
    if _SECRET_IN_URL.match(args.repository):
        raise UserError("--repository: must be without a password or token, which would be printed; docs/pods.md shows how to hand on one")
    if args.bucket:
        common.check_bucket(args.bucket)
    return hosts.mount(args.bucket) + hosts.install(args.repository, args.ref, args.extras)


def job_states(args: argparse.Namespace, name: str, job: str | None = None) -> dict[str, str]:
    """States of the job by host (`hosts.states`); hosts that do not answer are missing."""
    return hosts.states(common.output(ssh(args, name, hosts.STATE), check=False, timeout=args.ssh_seconds), job)


def check_way(args: argparse.Namespace) -> None:
    if args.internal_ip and args.iap:
        raise UserError("--internal_ip and --iap: at most one of them")


def _reach(args: argparse.Namespace, node: str, worker: str) -> list[str]:
    ways = (["--internal-ip"] if args.internal_ip else []) + (["--tunnel-through-iap"] if args.iap else [])
    return [*common.place_flags(args), f"--node={node}", f"--worker={worker}", *ways, "--quiet"]
