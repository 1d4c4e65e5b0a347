"""Keeping a job on preemptible hosts: the decisions, and whole lives of a job in a cloud that is a directory."""

import os
import signal
import sys

import pytest
from launch_cloud import LAUNCH, Cloud

sys.path.insert(0, str(LAUNCH))
from keep import decide

sys.path.remove(str(LAUNCH))

ARGV = ["--name=run", "--zone=z", "--topology=v5e:4x4", "--poll_seconds=0.1"]  # 4 hosts
INSTALL = ["--repository=https://example.org/a.git", "--ref=v1"]
# Counts its starts in a file outside of the hosts, as a run does in its bucket, and is done the second time.
TWICE = ["bash", "-c", 'echo >> "$OUT/$HOSTNAME"; [ $(wc -l < "$OUT/$HOSTNAME") = 2 ] || sleep 60']


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path, hosts=4)
    yield cloud
    cloud.close()


def keep(cloud, command, *flags, **env):
    return cloud.run("tpu.py", "keep", *ARGV, *INSTALL, *flags, "--", *command, **env)


@pytest.mark.parametrize(
    "cloud, jobs, step",
    [
        ("absent", [], "create"),
        ("WAITING_FOR_RESOURCES", [], "wait"),
        ("PROVISIONING", [], "wait"),
        ("SUSPENDING", [], "wait"),
        ("DELETING", [], "wait"),
        ("SUSPENDED", [], "delete"),
        ("FAILED", [], "delete"),
        ("ACTIVE", ["none", "none"], "start"),
        ("ACTIVE", ["none"], "wait"),  # one host does not answer: it may be going
        ("ACTIVE", [], "wait"),
        ("ACTIVE", ["running", "running"], "wait"),
        ("ACTIVE", ["running", "exit 1"], "wait"),  # the other notices by itself
        ("ACTIVE", ["running", "lost"], "wait"),
        ("ACTIVE", ["exit 0", "exit 0"], "done"),
        ("ACTIVE", ["exit 0", "lost"], "start"),
        ("ACTIVE", ["exit 1", "exit 1"], "start"),
        ("ACTIVE", ["exit 143", "exit 143"], "start"),  # nobody asked for it
        ("ACTIVE", ["setup 1", "exit 1"], "start"),
        ("ACTIVE", ["stopped", "stopped"], "stopped"),
        ("ACTIVE", ["stopped", "running"], "wait"),
        ("ACTIVE", ["exit 2", "exit 2"], "refused"),
        ("ACTIVE", ["exit 2", "exit 1"], "start"),
        ("ACTIVE", ["other", "none"], "other"),
    ],
)
def test_what_is_done_next(cloud, jobs, step):
    assert decide(cloud, dict(enumerate(jobs)), 2) == step


def test_a_preempted_job_is_brought_back_until_it_is_done(cloud):
    cloud.plan("absent", "WAITING_FOR_RESOURCES", "ACTIVE:1", "ACTIVE", "SUSPENDING", "SUSPENDED", "absent", "PROVISIONING", "ACTIVE")
    done = keep(cloud, TWICE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.verbs() == ["create", "start", "delete", "create", "start"]
    assert "the job is done" in done.stdout and "ACTIVE, 4 running" in done.stdout and "SUSPENDED" in done.stdout
    for host in range(4):
        assert (cloud.root / f"out/host{host}").read_text() == "\n\n"


def test_a_job_whose_hosts_fail_is_started_again_on_them(cloud):
    flaky = ["bash", "-c", 'echo >> "$OUT/$HOSTNAME"; [ $(wc -l < "$OUT/$HOSTNAME") = 2 ] || exit 137']
    assert keep(cloud, flaky).returncode == 0
    assert cloud.verbs() == ["start", "start"]


def test_it_gives_up_on_what_never_runs(cloud):
    done = keep(cloud, ["false"], "--max_attempts=3")
    assert done.returncode == 1 and "gave up after 3" in done.stderr
    assert cloud.verbs() == ["start"] * 3


def test_it_gives_up_on_what_is_never_granted(cloud):
    cloud.plan(*["FAILED", "absent"] * 9)
    done = keep(cloud, ["true"], "--max_attempts=2")
    assert done.returncode == 1 and cloud.verbs() == ["delete", "create", "delete", "create", "delete"]


def test_a_job_that_ran_for_long_may_be_preempted_any_number_of_times(cloud):
    """With three attempts allowed, of which each life takes two."""
    lives = [["absent", f"ACTIVE:{number}", *["ACTIVE"] * 3, "SUSPENDED"] for number in (1, 2)]
    cloud.plan(*lives[0], *lives[1], "absent", "ACTIVE")
    thrice = ["bash", "-c", 'echo >> "$OUT/$HOSTNAME"; [ $(wc -l < "$OUT/$HOSTNAME") = 3 ] || sleep 60']
    done = keep(cloud, thrice, "--max_attempts=3", "--steady_seconds=0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.verbs() == ["create", "start", "delete"] * 2 + ["create", "start"]


def test_input_that_every_host_refuses_is_not_tried_again(cloud):
    done = keep(cloud, ["bash", "-c", "exit 2"])
    assert done.returncode == 1 and "refused the input" in done.stderr and cloud.verbs() == ["start"]


def test_it_may_be_interrupted_and_started_again_meanwhile(cloud):
    cloud.plan("absent", "ACTIVE")
    waits = ["bash", "-c", 'until [ -e "$OUT/go" ]; do sleep 0.05; done']
    first = cloud.start("tpu.py", "keep", *ARGV, *INSTALL, "--", *waits)
    cloud.wait("hosts/*/scaling_jax/jobs/*/pid", 4)
    os.killpg(first.pid, signal.SIGINT)
    assert "runs on" in first.communicate(timeout=20)[1] and first.returncode == 130
    (cloud.root / "out/go").touch()
    assert keep(cloud, waits).returncode == 0
    assert cloud.verbs() == ["create", "start"]


def test_a_job_that_was_stopped_on_purpose_is_not_started_again(cloud):
    assert cloud.run("tpu.py", "run", *ARGV[:2], *INSTALL, "--", "sleep", "60").returncode == 0
    cloud.wait("hosts/*/scaling_jax/jobs/*/pid", 4)
    assert cloud.run("tpu.py", "stop", *ARGV[:2], "--poll_seconds=0.05").returncode == 0
    done = keep(cloud, ["sleep", "60"])
    assert done.returncode == 0 and "was stopped" in done.stdout and cloud.verbs() == ["start"]


def test_another_job_on_the_hosts_is_left_alone(cloud):
    assert cloud.run("tpu.py", "run", *ARGV[:2], *INSTALL, "--", "sleep", "60").returncode == 0
    cloud.wait("hosts/*/scaling_jax/jobs/*/pid", 4)
    done = keep(cloud, ["sleep", "61"])
    assert done.returncode == 1 and "another job" in done.stderr and cloud.verbs() == ["start"]


def test_secrets_reach_every_life_of_the_job(cloud):
    cloud.plan("ACTIVE:1", "SUSPENDED", "absent", "ACTIVE")
    command = ["bash", "-c", 'echo "$TOKEN" >> "$OUT/$HOSTNAME"; [ $(wc -l < "$OUT/$HOSTNAME") = 2 ] || sleep 60']
    done = keep(cloud, command, "--secret_env=TOKEN", TOKEN="s3cret value")
    assert done.returncode == 0 and "s3cret" not in done.stdout + done.stderr + (cloud.root / "calls.jsonl").read_text()
    assert (cloud.root / "out/host3").read_text() == "s3cret value\n" * 2
