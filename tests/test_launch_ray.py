"""launch/ray_cluster.py: which hosts are asked for, and what each is told; a fake ray keeps what it was called with."""

import argparse
import json
import shlex
import sys
import types

import pytest
from launch_cloud import GCLOUD, LAUNCH, Cloud

sys.path.insert(0, str(LAUNCH))
import ray_cluster

sys.path.remove(str(LAUNCH))

PLACE = ["--name=sweep", "--zone=us-west4-a", "--topology=v5e:2x4", "--slices=2"]
INSTALL = ["--repository=https://example.org/a.git", "--ref=v1"]
NASTY = ["two words", 'quote"quote', "it's", "$(touch never)", "new\nline", "--config.x=(1, 2)", "\\", "*", "", "ünï"]
SECRET = "s3cret '\"$(x)"
RAY = (
    f"#!{sys.executable}"
    + """
import json, os, sys
with open(os.environ["HOME"] + "/ray", "a") as file:
    variables = [os.environ.get(name) for name in ("TOKEN", "PATH", "PWD", "RAY_JOB_STOP_WAIT_TIME_S")]
    file.write(json.dumps([sys.argv[1:], *variables]) + "\\n")
sys.exit(sys.argv[1] == "status")
"""
)
INSTALL_RAY = 'if [ "$1" = venv ]; then printf "%s" "$FAKE_RAY" > "$last/bin/ray"; chmod +x "$last/bin/ray"; fi\n'
SWEEP = GCLOUD.replace('name + "run"', 'name + "sweep-0"').replace('print(json.dumps(rows + (', (
    'rows.append({"name": name + "sweep-1", "state": {"state": state}}); print(json.dumps([] if state == "absent" else rows + ('
))  # fmt: skip


@pytest.fixture
def cloud(tmp_path):
    """Both queued resources share two hosts; what is for one of them alone is told by gcloud's arguments."""
    cloud = Cloud(tmp_path)
    gcloud = tmp_path / "bin/gcloud"
    gcloud.write_text(gcloud.read_text().replace(GCLOUD, SWEEP))
    (tmp_path / "uv").write_text((tmp_path / "uv").read_text() + INSTALL_RAY)
    cloud.env["FAKE_RAY"] = RAY
    yield cloud
    cloud.close()


def ray(cloud, verb, *argv, **env):
    return cloud.run("ray_cluster.py", verb, *PLACE, *argv, **env)


def calls_of_ray(cloud, host=0):
    return [json.loads(line) for line in (cloud.home(host) / "ray").read_text().splitlines()]


def test_hosts_are_asked_for_one_by_one_and_joined(cloud):
    cloud.plan("absent", "absent", "ACTIVE")
    done = ray(cloud, "up", *INSTALL, "--spot", "--poll_seconds=0.05", "--secret_env=TOKEN", TOKEN=SECRET)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = [call for call in cloud.calls() if call[3] == "create"]
    assert [call[4] for call in asked] == ["sweep-0", "sweep-1"]
    assert all({f"--node-id={call[4]}", "--accelerator-type=v5litepod-8", "--spot"} <= set(call) for call in asked)
    told = [(call[4], call[-1]) for call in cloud.calls() if call[3] == "ssh"]
    assert [name for name, _ in told] == ["sweep-0", "sweep-1"]
    assert "--head --port=6379" in told[0][1] and "--address=10.0.0.7:6379" in told[1][1]
    assert ".[tpu,wandb,ray]" in (cloud.home(0) / "uv").read_text()
    status, head, worker = calls_of_ray(cloud)
    assert status[0] == ["status", "--address=127.0.0.1:6379"] and "--head" in head[0] and "--address=10.0.0.7:6379" in worker[0]
    for arguments, token, path, cwd, save_seconds in (head, worker):
        assert '--resources={"TPU": 8}' in arguments and "--disable-usage-stats" in arguments and token == SECRET
        assert "scaling_jax/venv/bin" in path.split(":")[0] and cwd.endswith("scaling_jax/source")
        assert int(save_seconds) >= 120  # Ray kills a command that is stopped after 3 by default
    assert "s3cret" not in done.stdout + done.stderr + (cloud.root / "calls.jsonl").read_text()
    assert not list(cloud.root.glob("hosts/*/.scaling_jax_secrets"))


def test_a_preempted_host_is_replaced_by_the_same_command(cloud):
    cloud.plan("SUSPENDED", "SUSPENDED", "ACTIVE")
    assert ray(cloud, "up", *INSTALL, "--poll_seconds=0.05").returncode == 0
    assert cloud.verbs() == ["delete", "create", "delete", "create"]


def test_hosts_that_fail_are_asked_for_ever_more_rarely(monkeypatch):
    clock, waits, looks = [0.0], [], ["FAILED"] * 4 + ["WAITING_FOR_RESOURCES", "FAILED"]

    def sleep(seconds):
        waits.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(ray_cluster, "time", types.SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    monkeypatch.setattr(ray_cluster.queued, "state", lambda *_: looks.pop(0) if len(looks) > 1 else looks[0])
    monkeypatch.setattr(ray_cluster.queued, "delete_command", lambda *_: ["delete"])
    monkeypatch.setattr(ray_cluster.common, "run", lambda *_: None)
    with pytest.raises(ray_cluster.common.CommandError, match="after 300 s"):
        ray_cluster._wait_for_hosts(argparse.Namespace(dry_run=False, poll_seconds=10.0, timeout_seconds=300.0), {"sweep-0": ["create"]})
    assert waits == [10, 10, 20, 40, 40, 80, 100, 10]  # the last but one to the end of what there is


def test_a_host_that_has_joined_is_left_alone(cloud):
    (cloud.root / "bin/pgrep").write_text('#!/bin/bash\n[ "$*" = "--full --uid $(id -u) raylet/rayle[t]" ]\n')
    assert ray(cloud, "up", *INSTALL).returncode == 0
    assert not [arguments for arguments, *_ in calls_of_ray(cloud) if "--address=10.0.0.7:6379" in arguments]


def test_secrets_come_before_the_installation(cloud):
    (cloud.root / "bin/git").write_text('#!/bin/bash\necho "$TOKEN" >> "$OUT/git"; [ "$1" != init ] || mkdir .git\n')
    assert ray(cloud, "up", *INSTALL, "--secret_env=TOKEN", TOKEN="key").returncode == 0
    assert set((cloud.root / "out/git").read_text().split()) == {"key"}


def test_a_host_that_nobody_reached_is_told_of(cloud):
    gcloud = cloud.root / "bin/gcloud"
    text = gcloud.read_text()
    gcloud.write_text(text.replace("verb = words[3]\n", "verb = words[3]\nif verb == 'ssh': sys.exit(0)\n"))
    done = ray(cloud, "up", *INSTALL)
    assert done.returncode == 1 and "sweep-0 did not answer" in done.stderr
    gcloud.write_text(text.replace("verb = words[3]\n", "verb = words[3]\nif verb == 'scp': sys.exit(0)\n"))
    done = ray(cloud, "up", *INSTALL, "--secret_env=TOKEN", TOKEN="key")
    assert done.returncode == 1 and "the secrets did not arrive" in done.stderr


def test_it_waits_for_hosts_no_longer_than_told(cloud):
    cloud.plan("WAITING_FOR_RESOURCES")
    done = ray(cloud, "up", *INSTALL, "--poll_seconds=0.05", "--timeout_seconds=0.1")
    assert done.returncode == 1 and "the same command waits on" in done.stderr


def test_a_command_is_submitted_intact_for_so_many_chips(cloud):
    cloud.plan("ACTIVE")
    assert ray(cloud, "up", *INSTALL).returncode == 0
    assert ray(cloud, "submit", "--chips=4", "--", "scaling-jax", "train", *NASTY).returncode == 0
    assert ray(cloud, "submit", "--", "true").returncode == 0
    assert ray(cloud, "submit", "--chips=0", "--", "true").returncode == 0
    four, whole, none = (arguments for arguments, *_ in calls_of_ray(cloud)[-3:])
    assert four[:4] == ["job", "submit", "--address=http://127.0.0.1:8265", "--no-wait"]
    half = ["env", "TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1", "TPU_PROCESS_BOUNDS=1,1,1"]  # of a host of 8
    assert four[4:] == ['--entrypoint-resources={"TPU": 4}', "--", *half, "scaling-jax", "train", *NASTY]
    assert whole[4:] == ['--entrypoint-resources={"TPU": 8}', "--", "true"]
    assert none[4:] == ["--entrypoint-num-cpus=1", "--", "true"]
    assert not list(cloud.root.rglob("never"))
    assert [call[4] for call in cloud.calls()][-3:] == ["sweep-0"] * 3


def test_down_deletes_every_host(cloud):
    assert ray(cloud, "down").returncode == 0
    assert [call[4] for call in cloud.calls() if call[3] == "delete"] == ["sweep-0", "sweep-1"]


def test_a_dry_run_prints_and_does_nothing(cloud):
    done = ray(cloud, "up", *INSTALL, "--dry_run", "--secret_env=TOKEN", TOKEN=SECRET)
    assert done.returncode == 0 and not cloud.calls() and "s3cret" not in done.stdout
    commands = "".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith("#"))
    assert shlex.split(commands).count("gcloud") == 6  # two are created; each gets the secrets, and is told
    for verb, *argv in (["status"], ["submit", "--", "true"], ["logs", "--job=a b"], ["stop", "--job=raysubmit_1"], ["down"]):
        done = ray(cloud, verb, "--dry_run", *argv)
        assert done.returncode == 0 and done.stdout.startswith("gcloud compute tpus") and not cloud.calls()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["up", *PLACE, *INSTALL, "--topology=v5e:4x4"], "must be of one host, such as v5e:2x4"),
        (["up", *PLACE, *INSTALL, "--topology=v5p:2x2x2"], "must be of one host"),
        (["up", *PLACE, *INSTALL, "--slices=0"], "slices is 0"),
        (["submit", *PLACE, "--chips=3", "--", "true"], "must be 0, 1, 2, 4 or 8"),
        (["submit", *PLACE, "--topology=v5e:2x2", "--chips=8", "--", "true"], "at most the 4"),
        (["status", *PLACE, "--slices=1001"], "--slices=1001: must be from 1 to 1000"),
        (["up", *PLACE, *INSTALL, "--timeout_seconds=nan"], "--timeout_seconds: must be positive"),
        (["status", *PLACE, "--iap", "--internal_ip"], "--internal_ip and --iap: at most one"),
        (["submit", *PLACE], "command is missing"),
        (["logs", *PLACE], "--job=… is missing"),
        (["down", "--zone=z", "--name=Sweep"], "--name=Sweep"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(cloud, argv, message):
    done = cloud.run("ray_cluster.py", *argv)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not cloud.calls()
