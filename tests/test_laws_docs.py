"""What docs/laws.md and docs/noise_scale.md say about commands and names is so."""

import re
import shlex
from pathlib import Path

import pytest

from scaling_jax import cli
from scaling_jax.laws.catalogue import ANALYSES
from scaling_jax.verbs.columns import parse_columns

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/laws.md").read_text()
COMMANDS = [
    line.split("#")[0]
    for block in re.findall(r"```\w*\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("scaling-jax")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    """Its flags are there, its laws and columns too; what it does is tested with its verb."""
    verb, *arguments = shlex.split(command)[1:]
    arguments = [argument for argument in arguments if not argument.startswith("--config=")]  # a config would be read
    values = cli._parse(verb, arguments)
    if "law" in values and values.law != "all":
        assert set(values.law.split(",")) <= set(ANALYSES)
    if "columns" in values:
        parse_columns(values.columns)


def test_every_law_is_in_a_table():
    named = set(re.findall(r"`(\w+)`", "\n".join(line for line in TEXT.splitlines() if line.startswith("| `"))))
    assert set(ANALYSES) <= named


def test_the_scripts_that_are_named_are_there():
    for script in re.findall(r"benchmarks/\w+\.py|tests/\w+\.py", TEXT):
        assert (ROOT / script).exists(), script
