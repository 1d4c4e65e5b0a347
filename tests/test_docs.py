"""The files and the commands of the documentation work as printed, made small."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/parametrization.md").read_text()
MODEL, TRAINING = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TABLE, CHECK = re.findall(r"^    scaling-jax (.*--model=.*)$", TEXT, re.MULTILINE)


def run(folder, source, *arguments):
    """Python beside my_model.py, in a process of its own, without the tests' strict promotion."""
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my_model.py").write_text(source)
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)


def check(folder, source):
    """The printed command, made small."""
    small = ["--config.model.context=16", "--config.model.head_dim=8", "--batch_tokens=256", "--steps=5"]
    return run(folder, source, "-m", "scaling_jax", *shlex.split(CHECK), *small)


def test_the_model_of_ones_own_passes_the_check(tmp_path):
    done = check(tmp_path, MODEL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"hidden", "narrow", "bias"} <= set(done.stdout.split())


def test_its_table_is_printed(tmp_path):
    done = run(tmp_path, MODEL, "-m", "scaling_jax", *shlex.split(TABLE))
    assert done.returncode == 0, done.stderr
    assert {"narrow", "readout", "vector", "fingerprint"} <= set(done.stdout.split())


def test_it_learns_in_the_loop_that_is_shown(tmp_path):
    (tmp_path / "training.py").write_text(TRAINING)
    done = run(tmp_path, MODEL, "training.py")
    assert done.returncode == 0, done.stderr
    first, *_, last = map(float, done.stdout.strip("[]\n").split(","))
    assert last < first


def test_forgetting_a_multiplier_in_it_fails_the_check(tmp_path):
    """The page says that three multipliers are the model's own to apply."""
    assert "self.logit_multiplier * (x" in MODEL
    done = check(tmp_path, MODEL.replace("self.logit_multiplier * (x", "(x"))
    assert done.returncode == 1 and "FAIL: logits, target logit" in done.stdout, done.stdout + done.stderr


def test_the_tolerances_are_those_of_the_code():
    from scaling_jax.coord_check.verdict import EXACT, TOLERANCE

    stated = re.search(
        r"\*\*Tolerances\*\*: ([\d.]+) for activations, ([\d.]+) for updates, ([\d.]+) for epsilon, ([\d.]+) for decay and", TEXT
    )
    numbers = [float(number) for number in stated.groups()]
    for axis in ("width", "depth"):
        assert [TOLERANCE[axis, quantity] for quantity in ("activation", "update", "epsilon", "decay")] == numbers
        assert TOLERANCE[axis, "change"] == numbers[0] and numbers[3] == EXACT


def test_any_model_is_measured_in_the_loop_that_is_shown(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/noise_scale.md").read_text(), re.DOTALL)
    done = run(tmp_path, snippet, "my_model.py")
    assert done.returncode == 0, done.stderr
    low, high = (float(re.search(rf"{end}=Array\(\[([0-9.]+|inf),", done.stdout)[1]) for end in ("low", "high"))
    assert 0 <= low < high


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", (ROOT / "docs/interop.md").read_text(), re.DOTALL))
def test_snippets_about_other_frameworks(snippet, tmp_path):
    done = run(tmp_path, snippet, "my_model.py")
    assert done.returncode == 0, done.stderr
