"""launch/tpu.py against a cloud that is a directory: what gcloud is asked, and what the hosts then really do."""

import json
import os
import shlex
import signal

import pytest
from launch_cloud import Cloud

PLACE = ["--name=run", "--zone=us-east5-a"]
INSTALL = ["--repository=https://example.org/a b.git", "--ref=v1.0"]
# Prints its arguments and a variable as JSON, under a name of its own.
RECORD = 'import json,os,sys; json.dump([sys.argv[1:], os.environ.get("TOKEN")], open(os.environ["OUT"]+"/"+os.environ["HOSTNAME"], "w"))'
# Awaits SIGTERM, and exits with the code that says so.
SAVES = (
    "import os,signal,sys,time; name=os.environ['OUT']+'/'+os.environ['HOSTNAME'];"
    "signal.signal(signal.SIGTERM, lambda *_: (open(name+'.saved','w').close(), os._exit(143))); open(name,'w').close(); time.sleep(60)"
)
NASTY = ["two words", 'quote"quote', "it's", "$(touch never)", "`touch never`", "new\nline", "--config.x=(1, 2)", "\\", "*", "", "ünï"]
SECRET = "s3cret '\"$(x)\nvalue"


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.close()


def tpu(cloud, verb, *argv, **env):
    return cloud.run("tpu.py", verb, *PLACE, *argv, **env)


@pytest.mark.parametrize(
    "flags, kind",
    [
        (["--topology=v5p:8x8x8"], ["--accelerator-type=v5p-1024", "--node-id=run", "--runtime-version=v2-alpha-tpuv5"]),
        (
            ["--topology=v5p:4x4x32", "--spot"],
            ["--type=v5p", "--topology=4x4x32", "--provisioning-model=spot", "--node-id=run", "--runtime-version=v2-alpha-tpuv5", "--spot"],
        ),
        (["--topology=v5p:4x4x32"], ["--type=v5p", "--topology=4x4x32", "--node-id=run", "--runtime-version=v2-alpha-tpuv5"]),
        (
            ["--topology=v5e:16x16", "--slices=3", "--spot"],
            ["--accelerator-type=v5litepod-256", "--node-count=3", "--node-prefix=run", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"],
        ),
        (
            ["--topology=v6e:2x4", "--reserved", "--runtime_version=x", "--service_account=a@b", "--no_external_ips", "--project=p"],
            ["--project=p", "--accelerator-type=v6e-8", "--node-id=run", "--runtime-version=x", "--service-account=a@b", "--reserved"]
            + ["--internal-ips"],
        ),
        (["--topology=v4:4x4x4"], ["--accelerator-type=v4-128", "--node-id=run", "--runtime-version=tpu-ubuntu2204-base"]),
    ],
)
def test_what_is_asked_for(cloud, flags, kind):
    """Names and flags as in gcloud's reference and the pages of the chips."""
    assert tpu(cloud, "create", *flags).returncode == 0
    (call,) = cloud.calls()
    if "--type=v5p" in kind:  # flags of gcloud 528: without alpha, --type is v2, v3 or v4
        assert call.pop(0) == "alpha"
    assert call[:5] == ["compute", "tpus", "queued-resources", "create", "run"]
    assert call[5:] == ["--zone=us-east5-a", *kind, "--quiet"]


def test_arguments_and_secrets_arrive_intact_on_every_host_and_are_printed_nowhere(cloud):
    done = tpu(cloud, "run", *INSTALL, "--secret_env=TOKEN", "--", "python3", "-c", RECORD, *NASTY, TOKEN=SECRET)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started") == 2
    cloud.wait("hosts/*/scaling_jax/jobs/*/exit", 2)
    for host in ("host0", "host1"):
        assert json.loads((cloud.root / "out" / host).read_text()) == [NASTY, SECRET]
    assert not list(cloud.root.rglob("never"))
    told = done.stdout + done.stderr + (cloud.root / "calls.jsonl").read_text()
    for part in ("s3cret", json.dumps(SECRET)[1:-1]):
        assert part not in told
    left = [path for path in cloud.root.rglob("*") if path.is_file() and "out" not in path.parts and "s3cret" in path.read_text()]
    assert not left
    fetched = (cloud.home(0) / "git").read_text().splitlines()
    assert fetched[-2:] == ["--detach", "FETCH_HEAD"] and "https://example.org/a b.git" in fetched
    assert "v1.0" in fetched and ".[tpu,wandb]" in (cloud.home(0) / "uv").read_text()


def test_a_dry_run_prints_what_would_be_run_and_no_secret(cloud):
    argv = [*INSTALL, "--bucket=data", "--", "echo", *NASTY]
    dry = tpu(cloud, "run", "--dry_run", *argv)
    assert dry.returncode == 0 and not cloud.calls()
    assert tpu(cloud, "run", *argv).returncode == 0
    assert shlex.split(dry.stdout)[1:] == cloud.calls()[0]
    secret = tpu(cloud, "run", *INSTALL, "--dry_run", "--secret_env=TOKEN", "--", "true", TOKEN=SECRET)
    assert "TOKEN=***" in secret.stdout and "s3cret" not in secret.stdout + secret.stderr


def test_the_file_of_secrets_is_for_its_owner_alone(cloud):
    """The cloud's scp refuses any other mode; and a run that is refused leaves none behind."""
    assert tpu(cloud, "run", *INSTALL, "--", "sleep", "60").returncode == 0
    cloud.wait("hosts/*/scaling_jax/jobs/*/pid", 2)
    again = tpu(cloud, "run", *INSTALL, "--secret_env=TOKEN", "--", "true", TOKEN=SECRET)
    assert again.returncode == 1 and "another job runs" in again.stderr
    (sent,) = [call for call in cloud.calls() if call[3] == "scp"]
    assert sent[5] == "run:.scaling_jax_secrets"
    assert not list(cloud.root.glob("hosts/*/.scaling_jax_secrets"))
    same = tpu(cloud, "run", *INSTALL, "--", "sleep", "60")
    assert same.returncode == 0 and same.stdout.count("runs already") == 2


def test_a_host_that_refuses_the_job_is_told_of(cloud):
    assert tpu(cloud, "run", *INSTALL, "--", "bash", "-c", '[ "$HOSTNAME" = host0 ] || sleep 60').returncode == 0
    cloud.wait("hosts/host0/scaling_jax/jobs/*/exit")
    cloud.wait("hosts/host1/scaling_jax/jobs/*/pid")
    done = tpu(cloud, "run", *INSTALL, "--", "true")
    assert done.returncode == 1 and "started" in done.stdout and "another job runs" in done.stderr


def test_stop_lets_the_run_save_on_every_host(cloud):
    assert tpu(cloud, "run", *INSTALL, "--", "python3", "-c", SAVES).returncode == 0
    cloud.wait("out/host?", 2)
    assert sorted(tpu(cloud, "status").stdout.split()) == sorted("queued resource ACTIVE host0 running host1 running".split())
    done = tpu(cloud, "stop", "--poll_seconds=0.1")
    assert done.returncode == 0, done.stderr
    assert "stopped on 2 host(s)" in done.stdout and len(list(cloud.root.glob("out/*.saved"))) == 2
    assert [path.read_text() for path in cloud.root.glob("hosts/*/scaling_jax/jobs/*/exit")] == ["exit 143\n"] * 2
    assert "host1                   stopped" in tpu(cloud, "status").stdout


def test_a_run_that_does_not_stop_is_told_of(cloud):
    deaf = "import signal,time,os; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(os.environ['OUT']+'/up','w'); time.sleep(60)"
    assert tpu(cloud, "run", *INSTALL, "--", "python3", "-c", deaf).returncode == 0
    cloud.wait("out/up")
    done = tpu(cloud, "stop", "--poll_seconds=0.05", "--timeout_seconds=0.2")
    assert done.returncode == 1 and "still runs after 0.2 s" in done.stderr


def test_a_mounted_bucket_does_not_keep_the_job_alive(cloud):
    """Cloud Storage FUSE goes into the background, and must not inherit the lock by which a job is known to run."""
    assert tpu(cloud, "run", *INSTALL, "--bucket=data", "--", "true").returncode == 0
    cloud.wait("hosts/*/scaling_jax/jobs/*/exit", 2)
    *flags, bucket, place = (cloud.home(0) / "gcsfuse").read_text().split()
    assert (bucket, place) == ("data", "/mnt/data")
    cached = {"--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0", "--enable-streaming-writes=false"}
    assert set(flags) == {"--implicit-dirs", "--rename-dir-limit=100000", *cached}
    assert "exit 0" in tpu(cloud, "status").stdout


def test_an_installation_that_fails_is_told_from_a_run_that_fails(cloud):
    (cloud.root / "bin/git").write_text("#!/bin/bash\necho no such ref >&2; exit 128\n")
    assert tpu(cloud, "run", *INSTALL, "--", "true").returncode == 0
    cloud.wait("hosts/*/scaling_jax/jobs/*/exit", 2)
    assert "setup 128" in tpu(cloud, "status").stdout
    assert all("no such ref" in path.read_text() for path in cloud.root.glob("hosts/*/scaling_jax/jobs/*/log"))


def test_logs_follow_the_host_that_is_asked_for(cloud):
    assert tpu(cloud, "run", *INSTALL, "--", "echo", "hello").returncode == 0
    cloud.wait("hosts/*/scaling_jax/jobs/*/exit", 2)
    follow = cloud.start("tpu.py", "logs", *PLACE, "--host=1")
    lines = [follow.stdout.readline() for _ in range(2)]
    os.killpg(follow.pid, signal.SIGINT)
    assert "interrupted" in follow.communicate(timeout=20)[1] and follow.returncode == 130
    assert "start on" in lines[0] and lines[1] == "hello\n"
    assert "--worker=1" in cloud.calls()[-1]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["fly"], "tpu fly: no such verb; there are create"),
        (["create", "--zone=z", "--topology=v5p:8x8x8"], "--name=…: must be of a to z"),
        (["create", "--name=-x", "--zone=z", "--topology=v5p:8x8x8"], "--name=-x: must be"),
        (["create", "--name=x", "--topology=v5p:8x8x8"], "--zone=… is missing"),
        (["create", *PLACE], "--topology=… is missing"),
        (["create", *PLACE, "--topology=v5p:8x8x7"], "v5p has 2x2x1"),
        (["create", *PLACE, "--topology=v7:8x8x7"], "chips are v4, v5e"),
        (["create", *PLACE, "--topology=v5e:4x4", "--slices=0"], "slices is 0"),
        (["create", *PLACE, "--topology=v5e:4x4", "--slices=1001"], "slices is 1001: must be at most 1000"),
        (["create", *PLACE, "--topology=v5e:4x4", "--slices=two"], "invalid int value: 'two'"),
        (["create", *PLACE, "--topology=v5e:4x4", "--spot", "--reserved"], "at most one"),
        (["create", *PLACE, "--topology=tpu7x:4x4x4"], "launch/xpk.py"),
        (["create", *PLACE, "--zon=x"], "--zon=x"),
        (["run", *PLACE, *INSTALL], "command is missing"),
        (["run", *PLACE, "--ref=x", "--", "true"], "--repository=… is missing"),
        (["run", *PLACE, "--repository=-x", "--ref=x", "--", "true"], "must not start with '-'"),
        (["run", *PLACE, *INSTALL, "--bucket=gs://x/y", "--", "true"], "name of a bucket alone"),
        (["run", *PLACE, *INSTALL, "--bucket=Data", "--", "true"], "name of a bucket alone"),
        (["run", *PLACE, *INSTALL, "--secret_env=PATH,ghp_123", "--", "true"], "entry 2 names no variable"),
        (["run", *PLACE, *INSTALL, "--secret_env=sk-123", "--", "true"], "entry 1 must be the name of"),
        (["run", *PLACE, "--ref=x", "--repository=https://me:ghp_123@x.org/a.git", "--", "true"], "without a password or token"),
        (["run", *PLACE, "--ref=x", "--repository=HTTPS://ghp_123@x.org/a.git", "--", "true"], "without a password or token"),
        (["run", *PLACE, "--ref=x", "--repository=ssh://git:ghp_123@x.org/a.git", "--", "true"], "without a password or token"),
        (["keep", *PLACE, *INSTALL, "--topology=v5e:4x4", "--iap", "--internal_ip", "--", "true"], "--internal_ip and --iap: at most one"),
        (["run", *PLACE, *INSTALL, "--", "\udcff"], "argument 7 is '\\udcff': must be UTF-8"),
        (["stop", *PLACE, "--poll_seconds=0"], "--poll_seconds: must be positive and finite, not 0"),
        (["keep", *PLACE, *INSTALL, "--topology=v5e:4x4", "--steady_seconds=nan", "--", "true"], "must be positive and finite, not nan"),
        (["keep", *PLACE, *INSTALL, "--topology=v5e:4x4", "--poll_seconds=inf", "--", "true"], "must be positive and finite, not inf"),
        (["logs", *PLACE, "--host=-1"], "--host: must be 0 or more, not -1"),
        (["logs", *PLACE, "--slice=-1"], "--slice: must be 0 or more, not -1"),
        (["stop", *PLACE, "--", "true"], "unexpected command"),
        (["keep", *PLACE, *INSTALL, "--topology=v5e:4x4", "--max_attempts=0", "--", "true"], "must be at least 1"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(cloud, argv, message):
    done = cloud.run("tpu.py", *argv)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not cloud.calls() and not done.stdout
    assert "123" not in done.stderr  # of what may be a secret


def test_without_gcloud_it_says_so(cloud):
    done = cloud.run("tpu.py", "delete", *PLACE, PATH=str(cloud.root))
    assert done.returncode == 2 and done.stderr == "tpu delete: gcloud is not installed, or not on the PATH\n"


def test_what_gcloud_refuses_is_exit_code_1(cloud):
    (cloud.root / "bin/gcloud").write_text("#!/bin/bash\necho 'ERROR: quota' >&2; exit 5\n")
    done = tpu(cloud, "create", "--topology=v5e:4x4")
    assert done.returncode == 1 and "ERROR: quota" in done.stderr and "failed with exit code 5" in done.stderr


def test_a_gcloud_that_cannot_be_run_is_one_message(cloud):
    (cloud.root / "bin/gcloud").chmod(0o644)
    done = tpu(cloud, "delete", PATH=str(cloud.root / "bin"))
    assert done.returncode == 2 and done.stderr == "tpu delete: gcloud cannot be run: Permission denied\n"


def test_too_long_a_command_is_one_message(cloud):
    done = tpu(cloud, "run", *INSTALL, "--", "echo", *["x" * 60000] * 3)
    assert done.returncode == 2 and done.stderr == "tpu run: gcloud cannot be run: Argument list too long\n"


def test_a_reader_that_ends_is_no_error(cloud):
    process = cloud.start("tpu.py", "create", *PLACE, "--topology=v5e:4x4", "--dry_run")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141
    process.stderr.close()


def reaches_nobody(cloud, *verbs):
    """gcloud 528 warns of hosts that it cannot prepare, goes on with those that are left, and exits with 0."""
    gcloud = cloud.root / "bin/gcloud"
    gcloud.write_text(gcloud.read_text().replace("verb = words[3]\n", f"verb = words[3]\nif verb in {verbs}: sys.exit(0)\n"))


def test_a_start_that_reaches_nobody_is_a_failure(cloud):
    reaches_nobody(cloud, "ssh")
    done = tpu(cloud, "run", *INSTALL, "--", "true")
    assert done.returncode == 1 and "runs on 0 host(s)" in done.stderr
    assert "no host answered" in tpu(cloud, "stop").stderr


def test_a_job_does_not_start_without_its_secrets(cloud):
    reaches_nobody(cloud, "scp")
    done = tpu(cloud, "run", *INSTALL, "--secret_env=TOKEN", "--", "touch", f"{cloud.root}/out/x", TOKEN=SECRET)
    assert done.returncode == 1 and done.stderr.count("the secrets did not arrive") == 2
    assert not list(cloud.root.glob("hosts/*/scaling_jax/jobs/*/job.sh"))


def test_connections_to_hosts_that_are_gone_end(cloud):
    assert tpu(cloud, "run", *INSTALL, "--secret_env=TOKEN", "--", "true", TOKEN=SECRET).returncode == 0
    for verb, flag in (("ssh", "ssh-flag"), ("scp", "scp-flag")):
        (call,) = [call for call in cloud.calls() if call[3] == verb]
        assert {f"--{flag}=-oConnectTimeout=30", f"--{flag}=-oServerAliveInterval=15", f"--{flag}=-oServerAliveCountMax=4"} <= set(call)


def test_a_job_in_its_setup_is_stopped_and_starts_anew(cloud):
    (cloud.root / "bin/git").write_text('#!/bin/bash\n[ -e "$OUT/go" ] || sleep 60\n')
    assert tpu(cloud, "run", *INSTALL, "--", "true").returncode == 0
    cloud.wait("hosts/*/scaling_jax/jobs/*/leader", 2)
    assert tpu(cloud, "status").stdout.count("running") == 2
    assert tpu(cloud, "stop", "--poll_seconds=0.05", "--timeout_seconds=5").returncode == 0
    assert tpu(cloud, "status").stdout.count("stopped") == 2
    (cloud.root / "out/go").touch()
    assert tpu(cloud, "run", *INSTALL, "--", "true").returncode == 0
    cloud.wait("hosts/*/scaling_jax/jobs/*/pid", 2)
    cloud.wait("hosts/*/scaling_jax/jobs/*/exit", 2)
    assert tpu(cloud, "status").stdout.count("exit 0") == 2


def test_stop_marks_a_job_that_failed_but_not_one_that_is_done(cloud):
    assert tpu(cloud, "run", *INSTALL, "--", "bash", "-c", '[ "$HOSTNAME" = host0 ]').returncode == 0
    for path in cloud.wait("hosts/*/scaling_jax/jobs/*/exit", 2):
        while not path.read_text():
            pass
    assert tpu(cloud, "stop").returncode == 0
    assert tpu(cloud, "status").stdout.split()[3:] == "host0 exit 0 host1 stopped".split()


def test_a_host_that_goes_down_has_lost_the_job(cloud):
    assert tpu(cloud, "run", *INSTALL, "--", "sleep", "60").returncode == 0
    cloud.wait("hosts/*/scaling_jax/jobs/*/pid", 2)
    cloud.close()  # kills all that they run
    assert tpu(cloud, "status").stdout.count("lost") == 2


def test_processes_of_a_run_wait_for_each_others_installation(cloud):
    assert tpu(cloud, "run", *INSTALL, "--", "bash", "-c", 'echo "$SCALING_JAX_JOIN_SECONDS" > "$OUT/$HOSTNAME"').returncode == 0
    cloud.wait("hosts/*/scaling_jax/jobs/*/exit", 2)
    assert (cloud.root / "out/host1").read_text() == "900\n"


def test_the_mount_outlasts_what_fresh_machines_do(cloud):
    """apt that is locked, a connection that fails, and a Cloud Storage FUSE that died; what apt refuses ends it."""
    (cloud.root / "bin/gcsfuse").unlink()
    (cloud.root / "bin/sudo").write_text(
        '#!/bin/bash\necho "$*" >> "$HOME/sudo"; [[ "$*" != *install* ]] || ln -sf /bin/true "$HOME/gcsfuse"\n'
    )
    (cloud.root / "bin/lsb_release").write_text("#!/bin/bash\necho jammy\n")
    (cloud.root / "bin/lsb_release").chmod(0o755)
    tpu(cloud, "run", *INSTALL, "--bucket=data", "--", "true")
    cloud.wait("hosts/*/scaling_jax/jobs/*/exit", 2)
    told = [line for line in (cloud.home(0) / "sudo").read_text().splitlines() if not line.startswith("tee")]
    assert told[0].startswith("curl --fail") and "--retry 5" in told[0]
    assert told[1:3] == [f"apt-get -o DPkg::Lock::Timeout=600 {words}" for words in ("update --quiet", "install --quiet --yes gcsfuse")]
    assert told[3] == "umount -l /mnt/data" and told[4] == "mkdir -p /mnt/data"
    (cloud.root / "bin/sudo").write_text('#!/bin/bash\necho "$*" >> "$HOME/again"; [[ "$*" != *update* ]]\n')
    tpu(cloud, "run", *INSTALL, "--bucket=data", "--", "true", "again")
    cloud.wait("hosts/*/scaling_jax/jobs/*/exit", 4)
    assert "update" in (cloud.home(0) / "again").read_text().splitlines()[-1] and "setup 1" in tpu(cloud, "status").stdout
