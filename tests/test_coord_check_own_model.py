"""A module of one's own that is not there, cannot be built or called, or lacks a role: named, and nothing written."""

import pytest
from coord_checks import MODULE, check_of, config_of, refused

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("module") / "tiny.py"
    path.write_text(MODULE)
    return path


def test_a_parameter_without_a_role_is_named(tmp_path, module):
    refused(config_of(), check_of(module, "Roleless"), tmp_path / "out", f"--model={module}:Roleless", "parameter gain has no role")


def test_a_module_that_cannot_be_built_is_named_with_its_line(tmp_path, module):
    line = 1 + MODULE.splitlines().index('        raise ValueError("no such shape")')
    refused(config_of(), check_of(module, "FailsToBuild"), tmp_path / "out", f":FailsToBuild, line {line}", "no such shape")


def test_a_module_whose_call_fails_is_named_with_its_line(tmp_path, module):
    line = 1 + MODULE.splitlines().index("        return self.table[...][tokens] @ jnp.ones((3, 4))")
    refused(config_of(), check_of(module, "FailsInItsCall"), tmp_path / "out", f":FailsInItsCall, line {line}")


def test_a_module_that_returns_no_logits_is_named(tmp_path, module):
    refused(config_of(), check_of(module, "NoLogits"), tmp_path / "out", f"--model={module}:NoLogits", "must be logits")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.py:Tiny", ["--model=nowhere.py:Tiny: must be FILE.py:NAME"]),
        ("{module}", ["must be FILE.py:NAME"]),
        ("{module}:", ["must be FILE.py:NAME"]),
        ("{module}:Missing", ["has no class or function Missing"]),
        ("{module}:number", ["has no class or function number"]),
    ],
)
def test_a_model_that_is_not_there_is_named(tmp_path, module, spec, words):
    refused(config_of(), check_of(module, model=spec.format(module=module)), tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1\nx = (\n", [", line 2: syntax error"]),
        ("import math\n\nmath.sqrt('2')\n", [", line 3: TypeError"]),
        ("import no_such_package\n", [", line 1: ModuleNotFoundError: No module named 'no_such_package'"]),
        ("raise SystemExit(3)\n", [", line 1: SystemExit"]),
    ],
)
def test_broken_code_is_named_with_its_line(tmp_path, code, words):
    path = tmp_path / "broken.py"
    path.write_text(code)
    refused(config_of(), check_of(path), tmp_path / "out", f"--model={path}:Tiny", *words)


# What is claimed
