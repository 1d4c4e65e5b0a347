"""Every command of docs/pods.md is one that its program takes: the launchers print what they would run, scaling-jax reads the flags."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scaling_jax import cli
from scaling_jax.pods.chips import CHIPS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/pods.md").read_text()
LINES = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ").splitlines()
LAUNCHED = [line for line in LINES if line.startswith("python launch/")]
OWN = [line[line.index("scaling-jax ") :] for line in LINES if re.search(r"(^| -- )scaling-jax ", line)]


def test_all_verbs_are_shown():
    sys.path.insert(0, str(ROOT / "launch"))
    import ray_cluster
    import tpu
    import xpk

    sys.path.remove(str(ROOT / "launch"))
    shown = {tuple(line.split()[1:3]) for line in LAUNCHED}
    assert shown == {(f"launch/{module.__name__}.py", verb) for module in (tpu, xpk, ray_cluster) for verb in module.VERBS}


@pytest.mark.parametrize("line", LAUNCHED)
def test_launchers_take_the_commands(line, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    words = shlex.split(line)[1:]
    at = words.index("--") if "--" in words else len(words)
    done = subprocess.run([sys.executable, *words[:at], "--dry_run", *words[at:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    assert printed[0].split()[0] in ("gcloud", "xpk") and "s3cret" not in done.stdout


@pytest.mark.parametrize("line", OWN)
def test_scaling_jax_takes_the_commands(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, verb, *flags = shlex.split(line)
    assert cli._parse(verb, flags) is not None


def test_the_table_of_chips_is_that_of_the_code():
    rows = dict(re.findall(r"^\| (v4|v5e|v5p|v6e|tpu7x) \| (.*) \|$", TEXT, re.MULTILINE))
    assert rows.keys() == CHIPS.keys()
    for name, row in rows.items():
        chip, numbers = CHIPS[name], [float(number) for number in re.findall(r"[\d.]+", row)]
        link = [chip.ici_links, chip.ici_link_bytes_per_s / 1e9]
        of_code = [chip.flops_bf16 / 1e12, chip.hbm_bytes / 2**30, chip.hbm_bytes_per_s / 1e9, *link, chip.dcn_bytes_per_s / 1e9]
        assert numbers == [*of_code, chip.max_chips, chip.devices_per_chip]
