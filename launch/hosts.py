"""The shell texts that hosts run: install the package, start a job that outlives the connection, tell its state, stop it.

A job is told by a digest of what it does, and lives in ~/scaling_jax/jobs/DIGEST of each host: job.sh, log, pid, exit. Who runs holds
a lock, which falls with the process however it ends, so that a host that was started anew is not taken for one that trains.
"""

import hashlib
import re
import shlex
from collections.abc import Sequence

SECRETS = ".scaling_jax_secrets"  # in the home directory, of mode 600, until a job has read it
ROOT = '"$HOME"/scaling_jax'
JOIN_SECONDS = 900  # that a run waits for its processes: an installation takes longer on one host than on another
MOUNT_FLAGS = (
    "implicit-dirs",
    "rename-dir-limit=100000",
    "metadata-cache-ttl-secs=0",
    "metadata-cache-negative-ttl-secs=0",
    "enable-streaming-writes=false",
)
_STATE = re.compile(r"^scaling_jax_state (\S+) (\S+) (\w+)(?: (\d+))?$", re.MULTILINE)


def install(repository: str, ref: str, extras: str) -> str:
    """Checks out `ref` to ~/scaling_jax/source and installs it, with what jax needs, into ~/scaling_jax/venv; leaves the shell there.

    TPU images come with Python 3.10; uv fetches a newer one.
    """
    return f"""\
mkdir -p {ROOT}/source
cd {ROOT}/source
[ -d .git ] || git init --quiet
GIT_TERMINAL_PROMPT=0 git fetch --quiet --depth 1 {shlex.quote(repository)} {shlex.quote(ref)}
git checkout --quiet --force --detach FETCH_HEAD
uv="$HOME"/.local/bin/uv
[ -x "$uv" ] || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
[ -x {ROOT}/venv/bin/python ] || "$uv" venv --quiet --python '>=3.11' {ROOT}/venv
"$uv" pip install --quiet --python {ROOT}/venv/bin/python -c requirements.lock -e {shlex.quote(f".[{extras}]")}
export PATH={ROOT}/venv/bin:"$PATH"
"""


def mount(bucket: str) -> str:
    """Mounts a bucket at /mnt/BUCKET with Cloud Storage FUSE, which is installed if need be; nothing for no bucket.

    On TPU machines its version 3 keeps what it knows of files for ever, and an fsync leaves a file that nobody else sees: both are
    unset, as a run's hosts read what another one wrote.
    """
    if not bucket:
        return ""
    return f"""\
if ! mountpoint --quiet /mnt/{bucket}; then
  if ! command -v gcsfuse > /dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    sudo curl --fail --silent --show-error --retry 5 --output $key https://packages.cloud.google.com/apt/doc/apt-key.gpg
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get -o DPkg::Lock::Timeout=600 update --quiet
    sudo apt-get -o DPkg::Lock::Timeout=600 install --quiet --yes gcsfuse
  fi
  sudo umount -l /mnt/{bucket} 2> /dev/null || true  # of one that died
  sudo mkdir -p /mnt/{bucket}
  sudo chown "$(id -u)" /mnt/{bucket}
  gcsfuse {" ".join(f"--{flag}" for flag in MOUNT_FLAGS)} {bucket} /mnt/{bucket} 9>&-
fi
"""


def read_secrets(path: str) -> str:
    """Takes what `common.exports` wrote from a file into the environment, and deletes the file."""
    return f"if [ -e {path} ]; then . {path}; rm -f {path}; fi\n"


def need_secrets(wanted: bool) -> str:
    """Fails where a copy of the secrets did not arrive: gcloud's scp succeeds also when it reaches nobody."""
    test = f'[ -e "$HOME"/{SECRETS} ]'
    return f'{test} || {{ echo "$(hostname): the secrets did not arrive" >&2; exit 1; }}\n' if wanted else ""


def digest(command: Sequence[str], setup: str) -> str:
    """Of twelve digits: the same for the same job."""
    return hashlib.sha256("\0".join([setup, *command]).encode()).hexdigest()[:12]


def start(command: Sequence[str], setup: str, secrets: bool = False) -> str:
    """Shell text that starts the job, unless it runs already; fails if another one does.

    Args:
      command: what to run, in the directory and environment that the setup leaves.
      setup: shell text that comes before, in the job's log like the command.
      secrets: whether it fails without a file of them.
    """
    name = digest(command, setup)
    body = f"""\
job={ROOT}/jobs/{name}
echo $$ > "$job/leader"
set -eu
trap 'echo "setup $?" > "$job/exit"' EXIT
echo "$(date -u +%FT%TZ) start on $(hostname)"
export SCALING_JAX_JOIN_SECONDS={JOIN_SECONDS}
{read_secrets('"$job/secrets"')}{setup}trap - EXIT
set +e
{shlex.join(command)} &
echo $! > "$job/pid"
wait $!
echo "exit $?" > "$job/exit"
"""
    return f"""\
set -eu
jobs={ROOT}/jobs
job="$jobs"/{name}
secrets="$HOME"/{SECRETS}
mkdir -p "$job"
exec 9>> "$jobs/lock"
if ! flock -w 1 9; then  # a second, as somebody may be asking for the state
  rm -f "$secrets"
  if [ "$(cat "$jobs/current")" = {name} ]; then echo "$(hostname): runs already"; exit 0; fi
  echo "$(hostname): another job runs; stop it first" >&2
  exit 1
fi
{need_secrets(secrets)}printf %s {name} > "$jobs/current"
rm -f "$job/exit" "$job/pid" "$job/stopped" "$job/secrets"
if [ -e "$secrets" ]; then mv "$secrets" "$job/secrets"; fi
printf %s {shlex.quote(body)} > "$job/job.sh"
setsid bash "$job/job.sh" >> "$job/log" 2>&1 < /dev/null &
echo "$(hostname): started"
"""


_CURRENT = f"""\
jobs={ROOT}/jobs
current=$(cat "$jobs/current" 2> /dev/null) || current=-
current=${{current:--}}
job="$jobs/$current"
running() {{ [ -e "$jobs/lock" ] && ! flock -n "$jobs/lock" true; }}
"""

STATE = f"""\
{_CURRENT}\
if running; then state=running
elif [ -e "$job/stopped" ]; then state=stopped
elif [ -e "$job/exit" ]; then state=$(cat "$job/exit"); state=${{state:-lost}}  # empty where the disk was full
elif [ -e "$job" ]; then state=lost
else state=none
fi
echo "scaling_jax_state ${{HOSTNAME:-$(hostname)}} $current $state"
"""

STOP = f"""\
{_CURRENT}\
if [ -e "$job" ] && [ "$(cat "$job/exit" 2> /dev/null)" != "exit 0" ]; then touch "$job/stopped"; fi
if running; then
  if [ -e "$job/pid" ]; then kill -TERM "$(cat "$job/pid")"; else kill -TERM -- "-$(cat "$job/leader")"; fi || true
fi
"""

_STARTED = re.compile(r": (started|runs already)$", re.MULTILINE)
LOGS = f'tail -n 200 -F {ROOT}/jobs/"$(cat {ROOT}/jobs/current)"/log'


def started(text: str) -> int:
    """Number of hosts that run the job, as the texts of `start` printed it."""
    return len(_STARTED.findall(text))


def states(text: str, job: str | None = None) -> dict[str, str]:
    """State by host, as the texts of STATE printed it.

    Args:
      text: what all hosts printed.
      job: digest of the job that is meant; a host whose last job was another has "none". None means whichever it was.

    Returns:
      "running", "stopped" (it was asked to, and has ended), "exit 0" with its exit code, "setup 1" (it did not get as far as the
      command), "lost" (the host went down under it), "other" (another job is running), or "none".
    """
    found = {}
    for host, current, state, code in _STATE.findall(text):
        mine = job is None or current == job
        found[host] = f"{state} {code}".strip() if mine else "other" if state == "running" else "none"
    return found
