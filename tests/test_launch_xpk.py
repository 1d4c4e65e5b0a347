"""launch/xpk.py: the exact commands, run through xpk's own dry run where xpk is installed, and the container's shell line run here."""

import base64
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "launch/xpk.py"
PLACE = ["--cluster=pod", "--zone=us-east5-a", "--project=p"]
RUN = ["run", *PLACE, "--name=run", "--topology=v5p:8x8x8", "--slices=2", "--image=gcr.io/p/image:1"]
NASTY = [
    "two words",
    'quote"quote',
    "it's",
    "$(touch never)",
    "new\nline",
    "tab\there",
    "{braces} {0} %s",
    "\\",
    "*",
    "",
    "ünï",
    "a: b # c",
]
SECRET = "s3cret '\"$(x)\nvalue"
PRINT = [sys.executable, "-c", "import json,os,sys; print(json.dumps([sys.argv[1:], os.environ.get('TOKEN')]))"]
FAKE = f"#!{sys.executable}\n" + (
    "import os, stat, sys; path = dict(w.split('=', 1) for w in sys.argv if w.startswith('--') and '=' in w)['--env-file'];"
    "assert stat.S_IMODE(os.stat(path).st_mode) == 0o600; open('environment', 'w').write(open(path).read());"
    "open(os.environ['TMPDIR'] + '/workload.yaml', 'w'); open('tmpdir', 'w').write(os.environ['TMPDIR']);"
    "open('argv', 'w').write('\\0'.join(sys.argv))"
)


def xpk(*argv, cwd=None, **env):
    return subprocess.run([sys.executable, SCRIPT, *argv], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def command_of(text):
    """Arguments of the command that a dry run printed last."""
    return shlex.split(text[text.index("xpk workload") :])


@pytest.mark.parametrize(
    "argv, commands",
    [
        (
            [*RUN, "--priority=high", "--max_restarts=5", "--bucket=data", "--", "scaling-jax", "train", "--workdir=/mnt/data/a"],
            "xpk workload create --workload=run --cluster=pod --zone=us-east5-a --project=p --tpu-type=v5p-8x8x8 --num-slices=2 "
            "--docker-image=gcr.io/p/image:1 --priority=high --max-restarts=5 --termination-grace-period-seconds=120 "
            "--restart-on-exit-codes=3 --storage=data "
            "'--command=export SCALING_JAX_JOIN_SECONDS=1800; exec scaling-jax train --workdir=/mnt/data/a'",
        ),
        (
            ["attach", *PLACE, "--bucket=data"],
            "xpk storage attach data --bucket=data --cluster=pod --zone=us-east5-a --project=p --type=gcsfuse --mount-point=/mnt/data "
            "--readonly=false --auto-mount=false --size=1000 --mount-options=implicit-dirs,rename-dir-limit=100000,"
            "metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0,write:enable-streaming-writes:false",
        ),
        (
            ["cluster", *PLACE, "--topology=v5e:16x16", "--slices=2", "--spot"],
            "xpk cluster create --cluster=pod --zone=us-east5-a --project=p --tpu-type=v5litepod-16x16 --num-slices=2 --spot "
            "--enable-workload-identity --enable-gcsfuse-csi-driver",
        ),
        (["status", *PLACE], "xpk workload list --cluster=pod --zone=us-east5-a --project=p"),
        (["delete", *PLACE, "--name=run"], "xpk workload delete --workload=run --force --cluster=pod --zone=us-east5-a --project=p"),
        (["delete-cluster", *PLACE], "xpk cluster delete --force --cluster=pod --zone=us-east5-a --project=p"),
        (
            ["logs", *PLACE, "--name=run", "--slice=1", "--host=3"],
            "gcloud container clusters get-credentials pod --location=us-east5 --dns-endpoint --project=p\n"
            "kubectl logs --follow --tail=200 --container=jax-tpu "
            "--selector=xpk.google.com/workload=run,jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=3",
        ),
    ],
)
def test_the_exact_commands(argv, commands):
    at = argv.index("--") if "--" in argv else len(argv)
    done = xpk(*argv[:at], "--dry_run", *argv[at:])
    assert done.returncode == 0, done.stderr
    assert done.stdout == commands + "\n"


def test_arguments_arrive_intact_in_a_line_without_newlines():
    printed = xpk(*RUN, "--dry_run", "--", *PRINT, *NASTY).stdout
    line = next(word for word in command_of(printed) if word.startswith("--command=")).removeprefix("--command=")
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", f"({line})"], capture_output=True, text=True)
    assert json.loads(done.stdout) == [NASTY, os.environ.get("TOKEN")]


def test_secrets_go_by_a_file_of_mode_600_and_are_printed_nowhere(tmp_path):
    (tmp_path / "xpk").write_text(FAKE)
    (tmp_path / "xpk").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOKEN": SECRET}
    argv = [*RUN, "--secret_env=TOKEN", "--", *PRINT, *NASTY]
    dry = xpk(*argv[: argv.index("--")], "--dry_run", *argv[argv.index("--") :], cwd=tmp_path, **env)
    assert "TOKEN=***" in dry.stdout
    done = xpk(*argv, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    told = dry.stdout + dry.stderr + done.stdout + done.stderr + (tmp_path / "argv").read_text()
    assert "s3cret" not in told and base64.b64encode(b"export TOKEN")[:12].decode() not in told
    assert not Path((tmp_path / "tmpdir").read_text()).exists()  # where xpk leaves the workload, secrets and all
    name, value = (tmp_path / "environment").read_text().rstrip("\n").split("=", 1)
    line = next(word for word in (tmp_path / "argv").read_text().split("\0") if word.startswith("--command="))
    inside = subprocess.run(["bash", "-c", f"({line[10:]})"], env={**os.environ, name: value}, capture_output=True, text=True)
    assert json.loads(inside.stdout) == [NASTY, SECRET]


def test_the_signal_of_a_pod_that_must_go_reaches_the_run():
    """In the shell that xpk puts around a command: its trap signals the process of the parentheses."""
    catches = "import signal,sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); signal.pause()"
    printed = xpk(*RUN, "--dry_run", "--", sys.executable, "-c", catches).stdout
    line = next(word for word in command_of(printed) if word.startswith("--command=")).removeprefix("--command=")
    script = f"({line}) & PID=$!; kill -STOP $$; kill -TERM $PID; wait $PID; exit $?"
    process = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(18)  # SIGCONT
    assert process.wait(timeout=20) == 7


@pytest.mark.skipif(shutil.which("xpk") is None, reason="xpk is not installed")
@pytest.mark.parametrize("topology", ["v5p:8x8x8", "v5p:4x4x32", "v5e:2x4", "v5e:16x16", "v6e:4x4", "v4:4x4x4", "tpu7x:4x4x4"])
def test_xpk_understands_them(topology, tmp_path):
    """Its dry run prints what it would give to Kubernetes: shape, hosts, chips, restarts, and a command that arrives."""
    yaml = pytest.importorskip("yaml")
    from scaling_jax.pods.chips import parse_topology

    wanted = parse_topology(topology, 2)
    argv = [*RUN, f"--topology={topology}", "--max_restarts=9", "--restart_on_exit_codes=5", "--dry_run"]
    command = command_of(xpk(*argv, "--", *PRINT, *NASTY).stdout)
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([*command, "--dry-run", "--skip-validation"], capture_output=True, text=True, env=home, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout[done.stdout.index("apiVersion: jobset") : done.stdout.index("[XPK] Task: `Creating Workload`")]
    job = yaml.safe_load(text)["spec"]
    (slice_job,) = job["replicatedJobs"]
    pods = slice_job["template"]["spec"]
    pod = pods["template"]["spec"]
    assert job["failurePolicy"]["maxRestarts"] == 9 and slice_job["replicas"] == 2
    assert 5 in pods["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == wanted.shape_name
    (container,) = [container for container in pod["containers"] if container["name"] == "jax-tpu"]
    chips_per_pod = int(container["resources"]["limits"]["google.com/tpu"])
    assert pods["parallelism"] * chips_per_pod == wanted.slice_chips
    assert pod["terminationGracePeriodSeconds"] == 120
    (line,) = [line for line in container["command"][2].splitlines() if "& PID=$!" in line]
    inside = subprocess.run(["bash", "-c", line.replace("& PID=$!;", "")], capture_output=True, text=True)
    assert json.loads(inside.stdout)[0] == NASTY


@pytest.mark.skipif(shutil.which("xpk") is None, reason="xpk is not installed")
@pytest.mark.parametrize(
    "argv, printed",
    [
        (["status", *PLACE], "kubectl get workloads"),
        (["delete", *PLACE, "--name=run"], " run -n default"),
        (["delete-cluster", *PLACE], "clusters delete pod"),
    ],
)
def test_xpk_takes_the_other_commands(argv, printed, tmp_path):
    command = shlex.split(xpk(*argv, "--dry_run").stdout)
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, env=home, cwd=tmp_path)
    assert done.returncode == 0 and printed in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "argv, message",
    [
        ([*RUN[:-1], "--", "true"], "--image=… is missing"),
        ([*RUN, "--topology=v5e:2x2", "--", "true"], "xpk has v5e from 2x4 on"),
        ([*RUN, "--topology=v5p:8x8", "--", "true"], "v5p has 2x2x1"),
        ([*RUN, "--priority=urgent", "--", "true"], "invalid choice: 'urgent'"),
        ([*RUN, "--max_restarts=-1", "--", "true"], "must not be negative"),
        (["run", "--zone=z", "--", "true"], "--cluster=…"),
        (["cluster", *PLACE, "--topology=v5p:8x8x8"], "one of --spot, --on_demand and --reservation"),
        (["cluster", *PLACE, "--topology=v5p:8x8x8", "--spot", "--on_demand"], "one of --spot"),
        (["attach", *PLACE], "--bucket=… is missing"),
        (["attach", *PLACE, "--bucket=gs://x"], "--bucket=gs://x: must be the name of a bucket alone"),
        ([*RUN, "--bucket=a/b", "--", "true"], "--bucket=a/b: must be the name of a bucket alone"),
        ([*RUN, "--restart_on_exit_codes=3,x", "--", "true"], "--restart_on_exit_codes=3,x: must be numbers from 0 to 255"),
        ([*RUN, "--restart_on_exit_codes=256", "--", "true"], "--restart_on_exit_codes=256: must be numbers"),
        ([*RUN, "--slices=1001", "--", "true"], "slices is 1001: must be at most 1000"),
        (["logs", *PLACE, "--name=run", "--host=-1"], "--host: must be 0 or more"),
        (["logs", *PLACE], "--name=…"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(argv, message):
    done = xpk(*argv)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_what_is_started_again_is_what_ended_because_another_failed():
    from scaling_jax.train.hosts import FAILED

    assert f"--restart-on-exit-codes={FAILED}" in command_of(xpk(*RUN, "--dry_run", "--", "true").stdout)
