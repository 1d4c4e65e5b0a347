"""The floors of docs/architecture.md: an import never goes up, and no module grows too long."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "scaling_jax"
FLOORS = {
    "errors": -1, "console": -1, "fields": -1, "process": -1, "storage": -0.8, "curves": -0.5, "batch_schedule": -0.5,
    "config": 0, "results": 0, "noise_scale": 0,
    "laws": 1, "parametrization": 1, "mesh": 1,
    "model": 2, "optimizer": 2, "data": 2, "parameters": 1.5,
    "train": 3,
    "coord_check": 4, "pods": 4, "branch": 4, "interop": 4, "sweep": 4,
    "report": 5, "verbs": 5, "cli": 5, "__main__": 6, "__init__": 6,
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Parts of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" if node.module == "scaling_jax" else node.module for alias in node.names]
        for name in names:
            if name and name.startswith("scaling_jax."):
                yield name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    for imported in imports(path):
        assert imported in FLOORS, f"{imported} has no floor"
        assert FLOORS[imported] < FLOORS[part(path)] or imported == part(path) or (FLOORS[imported] == FLOORS[part(path)] == 5), imported


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400
