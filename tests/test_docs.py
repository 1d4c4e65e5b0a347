"""The file and the commands of docs/parametrization.md work as printed, made small."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/parametrization.md").read_text()
(MODEL,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
(CHECK,) = re.findall(r"^    scaling-jax (.*--model=.*)$", TEXT, re.MULTILINE)


def check(folder, source):
    """The printed command on my_model.py, made small; in a process of its own, without the tests' strict promotion."""
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my_model.py").write_text(source)
    small = ["--config.model.context=16", "--config.model.head_dim=8", "--batch_tokens=256", "--steps=5"]
    command = [sys.executable, "-m", "scaling_jax", *shlex.split(CHECK), *small]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_model_of_ones_own_passes_the_check(tmp_path):
    done = check(tmp_path, MODEL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"hidden", "narrow", "bias"} <= set(done.stdout.split())


def test_forgetting_a_multiplier_in_it_fails_the_check(tmp_path):
    """The page says that three multipliers are the model's own to apply."""
    assert "self.logit_multiplier * (x" in MODEL
    done = check(tmp_path, MODEL.replace("self.logit_multiplier * (x", "(x"))
    assert done.returncode == 1 and "FAIL: logits" in done.stdout, done.stdout + done.stderr


def test_the_tolerances_are_those_of_the_code():
    from scaling_jax.coord_check.verdict import EXACT, TOLERANCE

    stated = re.search(
        r"\*\*Tolerances\*\*: ([\d.]+) for activations, ([\d.]+) for updates, ([\d.]+) for epsilon, ([\d.]+) for decay and", TEXT
    )
    numbers = [float(number) for number in stated.groups()]
    for axis in ("width", "depth"):
        assert [TOLERANCE[axis, quantity] for quantity in ("activation", "update", "epsilon", "decay")] == numbers
        assert TOLERANCE[axis, "change"] == numbers[0] and numbers[3] == EXACT
