"""A study's file: its argument, the overrides, and what is said of a file that gives none."""

import pytest

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.sweep.study import load_study

HEADER = """
from scaling_jax.config import default_config
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import Study
"""
SOUND = (
    HEADER
    + """
def get_study(width="128"):
    base = default_config()
    base.model.width = int(width)
    return Study(base, grid.over("optimizer.lr", [0.1, 0.2]), horizons=(4096,))
"""
)


def written(tmp_path, text):
    path = tmp_path / "study.py"
    path.write_text(text)
    return str(path)


def test_a_file_gives_a_study_with_an_argument_and_overrides(tmp_path):
    path = written(tmp_path, SOUND)
    assert load_study(path).base.model.width == 128 and len(load_study(path).grid) == 2
    changed = load_study(f"{path}:64", {"model.depth": 5, "optimizer.weight_decay": 1})
    assert (changed.base.model.width, changed.base.model.depth, changed.base.optimizer.weight_decay) == (64, 5, 1.0)
    for name, value in {"optimizer.lr": 0.5, "train.tokens": 100}.items():
        with pytest.raises(UserError, match=f"--config.{name}={value}: the study's (grid sets it|horizons set it)"):
            load_study(path, {name: value})


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "no such file"),
        ("x = 1", "defines no function get_study()"),
        ("def get_config(): pass", "is the config of one run, get_config(); `scaling-jax train`"),
        ("def get_study(): return 3", "get_study() returned int; must return a scaling_jax.sweep.study.Study"),
        ("def get_study(\n", "line 1: syntax error"),
        ("def get_study():\n  return 1 / 0", "line 2: ZeroDivisionError"),
        (SOUND.replace("base.model.width", "base.model.widht"), "line 8: no such field: widht (did you mean config.model.width?)"),
        (SOUND.replace('grid.over("optimizer.lr", [0.1, 0.2])', 'grid.over("optimizer.lr", "0.1")'), "line 9: over('optimizer.lr', '0.1')"),
        (SOUND.replace("grid.over", "grid.ovr"), "line 9: AttributeError: module 'scaling_jax.sweep.grid' has no attribute 'ovr'"),
        (SOUND.replace("0.2])", "0.2]).where(len)"), "line 9: AttributeError: 'Grid' object has no attribute 'where'"),
    ],
)  # fmt: skip
def test_a_file_that_gives_no_study_is_named_with_its_line(tmp_path, text, said):
    path = written(tmp_path, text) if text else str(tmp_path / "study.py")
    with pytest.raises(UserError) as error:
        load_study(path)
    assert said in str(error.value) and str(error.value).startswith(f"--config={path}") and "\n" not in str(error.value)


def test_a_run_is_not_started_from_a_study(tmp_path):
    with pytest.raises(UserError, match=r"is a study, get_study\(\), a grid of runs; `scaling-jax sweep` trains it"):
        config_lib.load(written(tmp_path, SOUND))
