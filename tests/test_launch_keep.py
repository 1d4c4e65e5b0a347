"""Keeping a job on preemptible hosts: the decisions, and whole lives of a job in a cloud that is a directory."""

import argparse
import os
import re
import signal
import sys
import types

import pytest
from launch_cloud import LAUNCH, Cloud

sys.path.insert(0, str(LAUNCH))
import keep as keeper
from common import CommandError
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
    first = ("absent", "WAITING_FOR_RESOURCES", "ACTIVE:1", "ACTIVE", "SUSPENDING", "SUSPENDED")
    cloud.plan(*first, "absent", "absent", "PROVISIONING", "ACTIVE")  # it looks again after the back-off
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
    done = keep(cloud, ["bash", "-c", "exit 137"], "--max_attempts=3")
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


def play(monkeypatch, looks, **flags):
    """Exit code and steps of `keep` where Cloud and the hosts say `looks`, one after the other; no code where it still waits then.

    A look is the state of the queued resource with the hosts' of the job, if they answer, or an error. Time passes by sleeping alone.
    """
    steps, clock, looks = [], [1000.0], iter(looks)

    def sleep(seconds):
        clock[0] += seconds
        if seconds:
            steps.append(seconds)

    def state(*_):
        look = next(looks, None)
        if look is None:
            raise EOFError
        if isinstance(look, CommandError):
            raise look
        state.jobs = look[1:]
        return look[0]

    def job_states(*_):
        if state.jobs == ("timeout",):
            raise CommandError("did not end")
        return dict(enumerate(state.jobs))

    fake_time = types.SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0], strftime=lambda _: "now")
    monkeypatch.setattr(keeper, "time", fake_time)
    monkeypatch.setattr(keeper.queued, "state", state)
    monkeypatch.setattr(keeper.queued, "job_states", job_states)
    monkeypatch.setattr(keeper.queued, "start_job", lambda *_: steps.append("start"))
    monkeypatch.setattr(keeper.common, "run", lambda command: steps.append(command))
    args = argparse.Namespace(
        name="run", **{"poll_seconds": 10.0, "steady_seconds": 1800.0, "silent_seconds": 900.0, "max_attempts": 20, **flags}
    )
    try:
        code = keeper._Keeper(args, 4, {"create": "create", "delete": "delete"}, "job").run()
    except EOFError:
        code = None
    return code, steps


def on_all(state):
    return ("ACTIVE", *[state] * 4)


def test_it_waits_twice_as_long_before_each_further_start(monkeypatch):
    code, steps = play(monkeypatch, [on_all("exit 137")] * 99, max_attempts=5)
    assert code == 1 and steps == ["start", "start", 10, "start", 20, "start", 40, "start"]
    code, steps = play(monkeypatch, [("absent",)] * 99, max_attempts=12)
    assert code == 1 and steps[-2] == 960


@pytest.mark.parametrize("then, code", [(on_all("stopped"), 0), (on_all("running"), None)])
def test_after_such_a_wait_it_looks_again_before_it_acts(monkeypatch, then, code):
    ended, steps = play(monkeypatch, [on_all("exit 137")] * 3 + [then] * 2, max_attempts=9)
    assert ended == code and steps.count("start") == 2
    steps = play(monkeypatch, [("absent",)] * 3 + [on_all("running")] * 2)[1]
    assert steps.count("create") == 2


def test_a_healthy_slice_is_not_deleted_for_what_it_was(monkeypatch):
    """Nothing comes between the look that finds it suspended and its deletion."""
    steps = play(monkeypatch, [("absent",)] * 4 + [("SUSPENDED",), on_all("running")])[1]
    assert steps == ["create", "create", 10, "create", "delete", 10, 10]


def test_errors_of_gcloud_end_it_at_the_first_look_alone(monkeypatch):
    with pytest.raises(CommandError, match="PERMISSION_DENIED"):
        play(monkeypatch, [CommandError("PERMISSION_DENIED")])
    assert play(monkeypatch, [on_all("running"), CommandError("network"), CommandError("network"), on_all("exit 0")])[0] == 0


def test_a_run_that_fails_by_itself_is_started_twice_more_however_long_it_ran(monkeypatch, capsys):
    life = [on_all("running")] * 4 + [("ACTIVE", "exit 1", "exit 3", "exit 3", "exit 3")] * 2
    code, steps = play(monkeypatch, [on_all("none"), *life * 9], steady_seconds=25.0)
    assert code == 1 and steps.count("start") == 3 and "3 runs that diverged" in capsys.readouterr().err


def test_other_failures_after_long_runs_are_not_counted_so(monkeypatch):
    life = [on_all("running")] * 4 + [on_all("exit 3")]
    assert play(monkeypatch, [on_all("none"), *life * 5], steady_seconds=25.0, max_attempts=2) == (
        None,
        [*["start", *[10.0] * 4] * 5, "start"],
    )


@pytest.mark.parametrize(
    "answers, said", [(("none",) * 3, "3 of 4 hosts answer"), ((), "0 of 4 hosts answer"), (("timeout",), "0 of 4 hosts")]
)
def test_hosts_of_an_active_slice_that_never_answer_are_not_waited_for_without_end(monkeypatch, capsys, answers, said):
    code, steps = play(monkeypatch, [("ACTIVE", *answers)] * 999, max_attempts=2)
    assert code == 1 and sum(steps) == pytest.approx(3 * 900, abs=60) and said in capsys.readouterr().out


def test_hosts_that_do_not_answer_for_a_moment_are_waited_for(monkeypatch):
    looks = ([("ACTIVE",)] * 60 + [on_all("running")]) * 4 + [on_all("exit 0")]
    assert play(monkeypatch, looks, max_attempts=1)[0] == 0


def test_a_full_disk_is_a_failure_like_others(cloud):
    """The file that a run's exit code goes to is there, and empty."""
    assert cloud.run("tpu.py", "run", *ARGV[:2], *INSTALL, "--", "true").returncode == 0
    for path in cloud.wait("hosts/*/scaling_jax/jobs/*/exit", 4):
        end_with(path, "")
    assert cloud.run("tpu.py", "status", *ARGV[:2]).stdout.count("lost") == 4
    for path in cloud.wait("hosts/*/scaling_jax/jobs/current", 4):
        path.write_text("")
    assert cloud.run("tpu.py", "status", *ARGV[:2]).stdout.count("none") == 4
    assert keep(cloud, ["true"]).returncode == 0 and cloud.verbs() == ["start", "start"]


def end_with(path, text):
    while not path.read_text():  # its job is still writing
        pass
    path.write_text(text)


def test_stop_holds_while_it_waits_to_start_again(cloud):
    process = cloud.start(
        "tpu.py", "keep", *ARGV[:3], "--poll_seconds=2", *INSTALL, "--", "bash", "-c", 'echo >> "$OUT/$HOSTNAME"; exit 137'
    )
    cloud.wait("out/host3")
    while len((cloud.root / "out/host3").read_text()) < 2:
        pass
    done = cloud.run("tpu.py", "stop", *ARGV[:2], "--poll_seconds=0.1")
    assert done.returncode == 0, done.stderr
    assert "was stopped" in process.communicate(timeout=20)[0] and process.returncode == 0
    assert cloud.verbs() == ["start"] * 2


def test_a_look_that_hangs_ends(cloud):
    gcloud = cloud.root / "bin/gcloud"
    gcloud.write_text(gcloud.read_text().replace('elif verb == "ssh":', 'elif verb == "ssh":\n    import time; time.sleep(5)', 1))
    done = keep(cloud, ["true"], "--ssh_seconds=0.5", "--silent_seconds=0.1", "--max_attempts=1")
    assert done.returncode == 1 and "did not end within 0.5 s" in done.stdout and "gave up" in done.stderr


def test_a_start_that_misses_a_host_is_told_of(cloud):
    """gcloud's ssh that cannot prepare a host warns, does without it, and exits with 0."""
    gcloud = cloud.root / "bin/gcloud"
    gcloud.write_text(
        gcloud.read_text().replace("    shells = [", "    chosen = chosen[:3] if 'job.sh' in str(argv) else chosen\n    shells = [", 1)
    )
    done = keep(cloud, ["sleep", "0.5"], "--max_attempts=2")
    assert done.returncode == 1 and re.search(r"runs on 3 host\(s\), and not on at least 4", done.stdout), done.stdout + done.stderr
