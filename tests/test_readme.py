"""Every command and every snippet of the README works as printed (made small where it trains)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS[2:] for line in block.splitlines() if line]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALL = {
    "model.width": 16,
    "model.depth": 1,
    "model.head_dim": 8,
    "model.context": 16,
    "train.tokens": 6400,
    "train.batch_tokens": 256,
    "schedule.warmup_tokens": 640,
    "eval.tokens": 512,
}
QUICK = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # what is made small trains in less time than it takes to optimize


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder as the commands expect it: configs and benchmarks beside texts of one's own."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "benchmarks", "launch", "studies"):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for name, count in (("texts", 20), ("other", 3)):
        (folder / name).mkdir()
        for i in range(count):
            words = ("".join(rng.choice(list("abcdefgh"), rng.integers(1, 8))) for _ in range(400))
            (folder / name / f"{i}.txt").write_text(" ".join(words))
    return folder


def test_the_two_commands_are_single_lines_that_do_their_own_set_up():
    """They are what .ci/run runs; here only that they are where it looks."""
    for block, tool in zip(BLOCKS[:2], ("scaling-jax train", "pytest"), strict=True):
        assert len(block.splitlines()) == 1 and "venv" in block and "pip install" in block and tool in block


def small(command):
    """The command with its training made short; benchmarks that take long with their smallest figures."""
    if "scaling-jax branch" in command:
        return "scaling-jax branch --run=runs/long --at_tokens=2048,4096 --factors=1,2 --span_tokens=2048"
    if "scaling-jax train " in command and "kaplan" in command:  # is small
        return command + " --config.train.tokens=20480"
    if "scaling-jax train " in command:
        small = SMALL | ({"model.vocab_size": 512} if "vocab_size" in command else {})
        command = command.replace("--profile_at_tokens=100000", "--profile_at_tokens=1000")
        command = command.replace("(400384,800768)", "(2048,4096)").replace("400000=2048,800000=4096", "2048=512,4096=1024")
        return command + "".join(f" --config.{name}={value}" for name, value in small.items())
    if "scaling-jax compile" in command:
        smaller = {"model.width": 256, "model.depth": 2, "model.vocab_size": 512, "model.context": 256, "train.batch_tokens": 1 << 15}
        return command.replace("find_compiled=2", "find_compiled=1") + "".join(f" --config.{n}={value}" for n, value in smaller.items())
    if "scaling-jax sweep" in command:
        return command + " --config.noise_scale.every=0"
    if "scaling-jax coord-check" in command:
        smaller = re.sub(r"--widths=\S+", "--widths=32,64,128", command)
        return smaller + " --config.model.head_dim=8 --config.model.context=16 --batch_tokens=256 --steps=5"
    return command


@pytest.mark.parametrize("command", [c for c in COMMANDS if "scaling-jax" in c])
def test_command(command, clone):
    """In order: later ones use what earlier ones made."""
    if "scaling-jax compile" in command:
        pytest.importorskip("libtpu")
    run = small(command).replace("scaling-jax", f"{shlex.quote(sys.executable)} -m scaling_jax")
    done = subprocess.run(run, shell=True, cwd=clone, env=QUICK, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "scaling-jax sweep" in command:
        assert "--dry_run" in command or (clone / re.search(r"--workdir=(\S+)", command)[1] / "results.parquet").exists()
    elif workdir := re.search(r"--workdir=(\S+)", command):
        assert {"metrics.jsonl", "summary.json", "config.json", "figures"} <= {p.name for p in (clone / workdir[1]).iterdir()}


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch/" in c])
def test_launch_command(command, clone):
    done = subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gcloud" in done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("studies/")])
def test_study_command(command, clone):
    done = subprocess.run(shlex.split(command), cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0 and "parts: data" in done.stdout, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "benchmarks/" in c])
def test_benchmark_command_is_understood(command, clone):
    """Each script answers --help and knows the flags that the README gives it; what they do is tested by module."""
    arguments = shlex.split(command)
    done = subprocess.run([sys.executable, arguments[1], "--help"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in arguments[2:]:
        assert flag.split("=")[0] in done.stdout


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet, clone):
    """After the commands: one may read what they made."""
    file = clone / "snippet.py"
    file.write_text(snippet)
    done = subprocess.run([sys.executable, str(file)], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
