"""A cloud of one directory for the tests of launch/: programs named gcloud, git, uv … on the PATH, which do on this machine what they
would do there. Each host is a home directory; what its shell is told is really run."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch"

GCLOUD = r"""
import json, os, pathlib, shutil, signal, stat, subprocess, sys

root = pathlib.Path(os.environ["FAKE_CLOUD"])
argv = sys.argv[1:]
with open(root / "calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\n")
flags = dict(word[2:].split("=", 1) for word in argv if word.startswith("--") and "=" in word)
words = [word for word in argv if not word.startswith("--") and word != "alpha"]
home = lambda host: root / "hosts" / host
hosts = [f"host{index}" for index in range(int((root / "size").read_text()))]

def lose_hosts():
    for host in hosts:
        for leader in home(host).glob("scaling_jax/jobs/*/leader"):
            try:
                os.killpg(int(leader.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(home(host), ignore_errors=True)

def have_hosts():
    for host in hosts:
        uv = home(host) / ".local/bin/uv"
        uv.parent.mkdir(parents=True, exist_ok=True)
        made = uv.with_name("uv.new")  # a job may be running the other, and what is being written cannot be run
        made.write_text((root / "uv").read_text())
        made.chmod(0o755)
        made.rename(uv)

verb = words[3]
if verb == "list":
    plan = json.loads((root / "plan").read_text())
    state, _, lives = plan[0].partition(":")
    written = [root / "out" / host for host in hosts]
    if len(plan) > 1 and all(file.exists() and len(file.read_text().splitlines()) >= int(lives) for file in written if lives):
        plan.pop(0)
    (root / "plan").write_text(json.dumps(plan))
    have_hosts() if state == "ACTIVE" else lose_hosts()
    name = "projects/p/locations/z/queuedResources/"
    rows = [{"name": name + "another", "state": {"state": "FAILED"}}]
    print(json.dumps(rows + ([] if state == "absent" else [{"name": name + "run", "state": {"state": state}}])))
elif verb == "ssh":
    chosen = hosts if flags["worker"] == "all" else [hosts[int(flags["worker"])]]
    os.environ.pop("TOKEN", None)  # of the tests' secrets, which do not come by themselves
    shells = [
        subprocess.Popen(["bash", "-c", flags["command"]], cwd=home(host), env={**os.environ, "HOME": str(home(host)), "HOSTNAME": host})
        for host in chosen
    ]
    sys.exit(max(shell.wait() for shell in shells))
elif verb == "scp":
    assert stat.S_IMODE(os.stat(words[4]).st_mode) == 0o600 and flags["scp-flag"] == "-p"
    for host in hosts:
        shutil.copy(words[4], home(host) / words[5].split(":")[1])
elif verb == "describe":
    print(json.dumps({"networkEndpoints": [{"ipAddress": "10.0.0.7"}]}))
"""
PROGRAMS = {
    "git": 'printf "%s\\n" "$@" >> "$HOME/git"; [ "$1" != init ] || mkdir .git',
    "mountpoint": "exit 1",
    "pgrep": "exit 1",  # of a Ray that this machine may run
    "sudo": ":",
    "gcsfuse": 'printf "%s\\n" "$@" > "$HOME/gcsfuse"; sleep 3 > /dev/null 2>&1 &',
}
UV = r"""#!/bin/bash
printf "%s\n" "$@" >> "$HOME/uv"
last="${@: -1}"
if [ "$1" = venv ]; then mkdir -p "$last/bin"; : > "$last/bin/python"; chmod +x "$last/bin/python"; fi
"""


class Cloud:
    """`plan`: states that the queued resource "run" has, one for each time that somebody asks; it stays in the last.

    "ACTIVE:N" is ACTIVE until each host's command has written N lines to a file of the host's name in $OUT.
    """

    def __init__(self, root: Path, hosts: int = 2, plan: tuple[str, ...] = ("ACTIVE",)):
        self.root = root
        (root / "bin").mkdir()
        for name, text in {
            "gcloud": f"#!{sys.executable}\n{GCLOUD}",
            **{key: f"#!/bin/bash\n{body}\n" for key, body in PROGRAMS.items()},
        }.items():
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        (root / "uv").write_text(UV)
        (root / "size").write_text(str(hosts))
        (root / "calls.jsonl").touch()
        self.plan(*plan)
        for index in range(hosts):
            self.home(index).mkdir(parents=True)
            (self.home(index) / ".local/bin").mkdir(parents=True)
            (self.home(index) / ".local/bin/uv").write_text(UV)
            (self.home(index) / ".local/bin/uv").chmod(0o755)
        self.env = {
            **os.environ,
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "FAKE_CLOUD": str(root),
            "OUT": str(root / "out"),  # where the tests' commands write
        }
        (root / "out").mkdir()

    def plan(self, *states: str) -> None:
        (self.root / "plan").write_text(json.dumps(states))

    def home(self, index: int) -> Path:
        return self.root / "hosts" / f"host{index}"

    def start(self, script: str, *argv: str, **env: str) -> subprocess.Popen:
        command = [sys.executable, str(LAUNCH / script), *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where these tests run in the background
        # A terminal's Ctrl-C is for a group.
        return subprocess.Popen(command, env={**self.env, **env}, start_new_session=True, preexec_fn=heed, **pipes)

    def run(self, script: str, *argv: str, **env: str) -> subprocess.CompletedProcess:
        process = self.start(script, *argv, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def calls(self) -> list[list[str]]:
        """Arguments of every call of gcloud."""
        return [json.loads(line) for line in (self.root / "calls.jsonl").read_text().splitlines()]

    def verbs(self) -> list[str]:
        """What gcloud was asked to change, and the starts of jobs."""
        named = [(call[3], call) for call in self.calls()]
        return ["start" if "job.sh" in str(call) else verb for verb, call in named if verb in ("create", "delete") or "job.sh" in str(call)]

    def wait(self, pattern: str, number: int = 1) -> list[Path]:
        """Files below the root that match, once there are so many."""
        end = time.monotonic() + 20
        while len(found := sorted(self.root.glob(pattern))) < number:
            assert time.monotonic() < end, f"no {pattern}"
            time.sleep(0.02)
        return found

    def close(self) -> None:
        """Ends what the hosts still run."""
        for leader in self.root.glob("hosts/*/scaling_jax/jobs/*/leader"):
            try:
                os.killpg(int(leader.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
