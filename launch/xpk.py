"""Training on Google Kubernetes Engine: `python launch/xpk.py VERB --flag=value …`, by xpk (tried with 1.16) and kubectl."""

import argparse
import base64
import shlex
import sys
import tempfile

import common

from scaling_jax.errors import UserError
from scaling_jax.pods.chips import Topology

# As launch/hosts.py mounts, for the same reasons; what is none of gcsfuse's flags goes by its place in the configuration.
MOUNT_OPTIONS = (
    "implicit-dirs",
    "rename-dir-limit=100000",
    "metadata-cache:ttl-secs:0",
    "metadata-cache:negative-ttl-secs:0",
    "write:enable-streaming-writes:false",
)
PRIORITIES = ("very-low", "low", "medium", "high", "very-high")
ANOTHER_FAILED = "3"  # exit code of a run's process that ends because one on another host did
JOIN_SECONDS = 1800  # that a run waits for its processes: Kubernetes starts a slice's pods as its nodes come
SECRETS = "SCALING_JAX_SECRETS"  # in the container's environment until the command starts


def device_type(topology: Topology) -> str:
    """xpk's name of a slice by its shape, "v5p-8x8x8"."""
    if topology.chip.name == "v5e" and topology.slice_chips < 8:
        raise UserError(f"--topology={topology.name}: xpk has v5e from 2x4 on")
    return f"{topology.chip.cloud_type}-{topology.shape_name}"


def shell_line(command: list[str], secrets: bool) -> str:
    """The command as one line of bash, which xpk writes into a YAML block: newlines as $'\\n'.

    It ends in `exec`, so that the SIGTERM that Kubernetes sends reaches the run itself.
    """
    take = f'eval "$(printf %s "${SECRETS}" | base64 -d)"; unset {SECRETS}; ' if secrets else ""
    return f"export SCALING_JAX_JOIN_SECONDS={JOIN_SECONDS}; {take}exec " + " ".join(_quoted(word) for word in command)


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(letter if letter.isprintable() else _escape(letter) for letter in escaped) + "'"


def _escape(letter: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in letter.encode())


def _xpk(argv: list[str], dry_run: bool = False, asks: bool = False) -> None:
    """Runs xpk, whose temporary files, workloads with their secrets among them, it leaves behind: they go with their directory."""
    with tempfile.TemporaryDirectory(prefix="scaling_jax_") as directory:
        common.run(["xpk", *argv], dry_run, asks, env={"TMPDIR": directory})


def _cluster(args: argparse.Namespace) -> int:
    topology = _topology_and_cluster(args)
    if bool(args.spot) + bool(args.on_demand) + bool(args.reservation) != 1:
        raise UserError("one of --spot, --on_demand and --reservation=NAME is needed")
    capacity = [f"--reservation={args.reservation}"] if args.reservation else ["--spot" if args.spot else "--on-demand"]
    create = ["cluster", "create", *_cluster_flags(args), f"--tpu-type={device_type(topology)}", f"--num-slices={topology.slices}"]
    _xpk([*create, *capacity, "--enable-workload-identity", "--enable-gcsfuse-csi-driver"], args.dry_run, asks=True)
    return 0


def _attach(args: argparse.Namespace) -> int:
    _topology_and_cluster(args, topology=False)
    common.required(args, "bucket")
    common.check_bucket(args.bucket)
    flags = ["--type=gcsfuse", f"--mount-point=/mnt/{args.bucket}", "--readonly=false", "--auto-mount=false", "--size=1000"]
    options = f"--mount-options={','.join(MOUNT_OPTIONS)}"
    storage = ["storage", "attach", args.bucket, f"--bucket={args.bucket}", *_cluster_flags(args), *flags, options]
    _xpk(storage, args.dry_run, asks=True)
    return 0


def _run(args: argparse.Namespace) -> int:
    topology = _topology_and_cluster(args)
    common.check_name("name", args.name)
    common.required(args, "image")
    if args.bucket:
        common.check_bucket(args.bucket)
    codes = args.restart_on_exit_codes.split(",") if args.restart_on_exit_codes else []
    if not all(code.isascii() and code.isdigit() and int(code) < 256 for code in codes):
        raise UserError(f"--restart_on_exit_codes={args.restart_on_exit_codes}: must be numbers from 0 to 255, comma-separated")
    if args.max_restarts < 0 or args.grace_seconds < 1:
        raise UserError("--max_restarts must not be negative, --grace_seconds must be positive")
    secrets = common.secrets_of(args)
    create = [
        *["workload", "create", f"--workload={args.name}", *_cluster_flags(args)],
        *[f"--tpu-type={device_type(topology)}", f"--num-slices={topology.slices}", f"--docker-image={args.image}"],
        *[f"--priority={args.priority}", f"--max-restarts={args.max_restarts}"],
        f"--termination-grace-period-seconds={args.grace_seconds}",
        *([f"--restart-on-exit-codes={args.restart_on_exit_codes}"] if args.restart_on_exit_codes else []),
        *([f"--storage={args.bucket}"] if args.bucket else []),
        f"--command={shell_line(args.command, bool(secrets))}",
    ]
    if not secrets:
        _xpk(create, args.dry_run)
    elif args.dry_run:
        print(f"# FILE, of mode 600: {SECRETS}= base64 of {', '.join(f'{name}=***' for name in secrets)}")
        _xpk([*create, "--env-file=FILE"], dry_run=True)
    else:
        encoded = base64.b64encode(common.exports(secrets).encode()).decode()
        with common.secret_file(f"{SECRETS}={encoded}\n") as path:
            _xpk([*create, f"--env-file={path}"])
    return 0


def _status(args: argparse.Namespace) -> int:
    _topology_and_cluster(args, topology=False)
    _xpk(["workload", "list", *_cluster_flags(args)], args.dry_run)
    return 0


def _logs(args: argparse.Namespace) -> int:
    _topology_and_cluster(args, topology=False)
    common.check_name("name", args.name)
    region = args.zone.rsplit("-", 1)[0]  # where xpk's clusters are
    project = [f"--project={args.project}"] if args.project else []
    credentials = ["gcloud", "container", "clusters", "get-credentials", args.cluster, f"--location={region}", "--dns-endpoint"]
    common.run([*credentials, *project], args.dry_run)
    labels = {
        "xpk.google.com/workload": args.name,
        "jobset.sigs.k8s.io/job-index": args.slice,
        "batch.kubernetes.io/job-completion-index": args.host,
    }
    selector = ",".join(f"{label}={value}" for label, value in labels.items())
    common.run(["kubectl", "logs", "--follow", "--tail=200", "--container=jax-tpu", f"--selector={selector}"], args.dry_run)
    return 0


def _delete(args: argparse.Namespace) -> int:
    _topology_and_cluster(args, topology=False)
    common.check_name("name", args.name)
    _xpk(["workload", "delete", f"--workload={args.name}", "--force", *_cluster_flags(args)], args.dry_run)
    return 0


def _delete_cluster(args: argparse.Namespace) -> int:
    _topology_and_cluster(args, topology=False)
    _xpk(["cluster", "delete", "--force", *_cluster_flags(args)], args.dry_run, asks=True)
    return 0


def _topology_and_cluster(args: argparse.Namespace, topology: bool = True) -> Topology | None:
    common.check_name("cluster", args.cluster)
    common.required(args, "zone")
    return common.topology_of(args) if topology else None


def _cluster_flags(args: argparse.Namespace) -> list[str]:
    return [f"--cluster={args.cluster}", *common.place_flags(args)]


def _define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", help="name of the cluster")
    common.define_place(parser)


def _define_cluster(parser: argparse.ArgumentParser) -> None:
    _define(parser)
    common.define_topology(parser)
    parser.add_argument("--spot", action="store_true", help="preemptible, cheaper")
    parser.add_argument("--on_demand", action="store_true", help="not preemptible")
    parser.add_argument("--reservation", default="", help="name of a reservation")


def _define_attach(parser: argparse.ArgumentParser) -> None:
    _define(parser)
    parser.add_argument("--bucket", help="bucket that runs can mount at /mnt/BUCKET")


def _define_run(parser: argparse.ArgumentParser) -> None:
    _define(parser)
    common.define_topology(parser)
    parser.add_argument("--name", help="of the workload")
    parser.add_argument("--image", help="docker image with the package installed, see launch/Dockerfile")
    parser.add_argument("--bucket", default="", help="bucket to mount at /mnt/BUCKET, once `attach`ed")
    parser.add_argument("--priority", default="medium", choices=PRIORITIES, help="in the cluster's queue")
    parser.add_argument("--max_restarts", type=int, default=100, help="after a preemption or a failure")
    parser.add_argument(
        "--restart_on_exit_codes", default=ANOTHER_FAILED, help="codes to restart on besides 42 and 127 to 255, comma-separated"
    )
    parser.add_argument("--grace_seconds", type=int, default=120, help="from SIGTERM to the end, for saving")
    common.define_secrets(parser)


def _define_named(parser: argparse.ArgumentParser) -> None:
    _define(parser)
    parser.add_argument("--name", help="of the workload")


def _define_logs(parser: argparse.ArgumentParser) -> None:
    _define_named(parser)
    parser.add_argument("--slice", type=common.index, default=0, help="which slice, from 0")
    parser.add_argument("--host", type=common.index, default=0, help="which host of the slice, from 0")


VERBS = {
    "cluster": common.Verb("create a cluster with slices", _define_cluster, _cluster),
    "attach": common.Verb("let a cluster's runs mount a bucket", _define_attach, _attach),
    "run": common.Verb("start a command on all hosts of all slices, again after preemptions", _define_run, _run, takes_command=True),
    "status": common.Verb("list the cluster's runs", _define, _status),
    "logs": common.Verb("follow the log of one host", _define_logs, _logs),
    "delete": common.Verb("have a run save and end, and delete it", _define_named, _delete),
    "delete-cluster": common.Verb("delete a cluster and its hosts", _define, _delete_cluster),
}


def main() -> int:
    return common.main("xpk", "Training on Google Kubernetes Engine.", VERBS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
