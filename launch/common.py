"""What the launchers share: verbs and flags, commands that are run or printed, secrets."""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from scaling_jax.errors import UserError
from scaling_jax.pods.chips import Topology, parse_topology

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # Cloud allows 63, and a node of several slices has a number appended
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
MAX_WAIT_SECONDS = 960.0  # between tries


class CommandError(Exception):
    """A command of another program failed; what it printed stands above the message."""


class Verb(NamedTuple):
    summary: str
    define: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    takes_command: bool = False  # the words after --


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


def main(program: str, summary: str, verbs: Mapping[str, Verb], argv: Sequence[str]) -> int:
    """Runs one command line; 0 done, 1 another program failed, 2 bad input (one message), 130 interrupted."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("\n".join([f"usage: python launch/{program}.py VERB --flag=value …", "", summary, ""]))
        print("\n".join(f"  {name:<12}{verb.summary}" for name, verb in verbs.items()))
        return 0 if argv else 2
    name, *rest = argv
    try:
        if name not in verbs:
            raise UserError(f"no such verb; there are {', '.join(verbs)}")
        for number, word in enumerate(argv, 1):
            if any("\ud800" <= letter <= "\udfff" for letter in word):  # what Python makes of other bytes
                raise UserError(f"argument {number} is {word!r}: must be UTF-8")
        code = verbs[name].run(_parse(program, name, verbs[name], rest))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{program} {name}: {error}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"{program} {name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{program} {name}: interrupted; what runs on the hosts runs on", file=sys.stderr)
        return 130


def _parse(program: str, name: str, verb: Verb, argv: Sequence[str]) -> argparse.Namespace:
    after = " -- COMMAND" if verb.takes_command else ""
    parser = _Parser(f"{program}.py {name}", f"%(prog)s --flag=value …{after}", verb.summary, allow_abbrev=False)
    verb.define(parser)
    parser.add_argument("--dry_run", action="store_true", help="print the commands, and run none")
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    args.command = list(argv[at + 1 :])
    if verb.takes_command and not args.command:
        raise UserError(
            "the command is missing: give it after --, for example -- scaling-jax train --config=configs/cpu_demo.py --workdir=DIR"
        )
    if args.command and not verb.takes_command:
        raise UserError(f"unexpected command {shlex.join(args.command)!r}: {name} takes flags only")
    return args


def seconds(text: str) -> float:
    """The type of a flag: a time that is positive and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, not {text}")
    return value


def index(text: str) -> int:
    """The type of a flag: a number from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def define_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--zone", help="zone of Google Cloud, for example us-east5-a")
    parser.add_argument("--project", default="", help="project of Google Cloud; by default gcloud's")


def define_topology(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", help="chip and shape of a slice, for example v5p:8x8x8")
    parser.add_argument("--slices", type=int, default=1, help="number of slices")


def define_secrets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--secret_env", default="", help="names of environment variables to hand on, comma-separated; never printed")


def required(args: argparse.Namespace, *flags: str) -> None:
    for flag in flags:
        if not getattr(args, flag):
            raise UserError(f"--{flag}=… is missing")


def place_flags(args: argparse.Namespace) -> list[str]:
    """gcloud's flags for --zone and --project."""
    required(args, "zone")
    return [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]


def topology_of(args: argparse.Namespace) -> Topology:
    required(args, "topology")
    return parse_topology(args.topology, args.slices)


def check_name(flag: str, name: str) -> None:
    if not NAME.fullmatch(name or ""):
        raise UserError(f"--{flag}={name or '…'}: must be of a to z, 0 to 9 and '-', a letter first, at most 40 of them")


def check_bucket(bucket: str) -> None:
    if not BUCKET.fullmatch(bucket):
        raise UserError(f"--bucket={bucket}: must be the name of a bucket alone, without gs:// and without a folder")


def secrets_of(args: argparse.Namespace) -> dict[str, str]:
    """Values of the variables of --secret_env, by name."""
    names = [name for name in args.secret_env.split(",") if name]
    for number, name in enumerate(names, 1):  # which may be a secret by mistake
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--secret_env: entry {number} must be the name of an environment variable, not its value")
        if name not in os.environ:
            raise UserError(f"--secret_env: entry {number} names no variable of the environment")
    return {name: os.environ[name] for name in names}


def exports(secrets: Mapping[str, str]) -> str:
    """Shell text that sets the variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in secrets.items())


@contextlib.contextmanager
def secret_file(text: str) -> Iterator[str]:
    """Path of a file of mode 600 with `text`, deleted afterwards."""
    descriptor, path = tempfile.mkstemp(prefix="scaling_jax_")  # mode 600 by contract
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        yield path
    finally:
        os.unlink(path)


def backoff(poll_seconds: float, tries: int) -> float:
    """Seconds to wait before one more try: none for the first two, then `poll_seconds`, twice that, …, at most MAX_WAIT_SECONDS."""
    return min(MAX_WAIT_SECONDS, poll_seconds * 2.0 ** min(tries - 2, 30)) if tries > 1 else 0.0


def run(
    argv: Sequence[str],
    dry_run: bool = False,
    asks: bool = False,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> None:
    """Runs a command with this terminal for its output, or prints it as a shell would read it; CommandError if it fails.

    One that `asks` has this terminal for its input too. It may take `timeout` seconds; `env` comes on top of the environment.
    """
    if dry_run:
        print(shlex.join(argv), flush=True)
        return
    done = _run(argv, stdin=None if asks else subprocess.DEVNULL, env={**os.environ, **env} if env else None, timeout=timeout)
    _check(argv, done.returncode)


def output(argv: Sequence[str], check: bool = True, timeout: float | None = None) -> str:
    """A command's standard output; its standard error goes to this terminal."""
    done = _run(argv, stdout=subprocess.PIPE, text=True, errors="replace", timeout=timeout)
    if check:
        _check(argv, done.returncode)
    return done.stdout


def shown_output(argv: Sequence[str], timeout: float | None = None) -> str:
    """A command's standard output, which goes to this terminal too once it has ended."""
    done = _run(argv, stdout=subprocess.PIPE, text=True, errors="replace", timeout=timeout)
    print(done.stdout, end="", flush=True)
    _check(argv, done.returncode)
    return done.stdout


def json_output(argv: Sequence[str]) -> Any:
    text = output([*argv, "--format=json"], timeout=600)
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise CommandError(f"{_brief(argv)} printed no JSON but {text[:80]!r}") from None


def _run(argv: Sequence[str], stdin: int | None = subprocess.DEVNULL, **options: Any) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(argv, stdin=stdin, **options)
    except FileNotFoundError:
        raise UserError(f"{argv[0]} is not installed, or not on the PATH") from None
    except OSError as error:  # no program, or too long a command
        raise UserError(f"{argv[0]} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{_brief(argv)} did not end within {options['timeout']:g} s") from None


def _check(argv: Sequence[str], code: int) -> None:
    if code:
        raise CommandError(f"{_brief(argv)} failed with exit code {code}")


def _brief(argv: Sequence[str]) -> str:
    return "`" + " ".join(word for word in argv[:6] if not word.startswith("-")) + "`"
