"""What docs/sweeps.md shows works as printed, and its tables are those of the code."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scaling_jax import results
from scaling_jax.errors import UserError
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import VALUES, Study, load_study, resolve, trajectories
from scaling_jax.verbs import VERBS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/sweeps.md").read_text()
STUDY, READING, THEIRS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def rows(head: str) -> dict[str, list[str]]:
    """Of the table with this head: the other cells of each row by its first one."""
    body = TEXT[TEXT.index(head) :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body]
    return {first: others for first, *others in cells}


def test_columns_are_those_of_the_code():
    wanted = {f"`{name}`": [unit, meaning.replace("|", "\\|")] for name, (unit, meaning) in results.COLUMNS.items()}
    assert rows("| column | unit | meaning |") == wanted and list(rows("| column | unit | meaning |")) == list(wanted)


def test_settings_and_combinators_are_those_of_the_code():
    shown = [name for cell in rows("| of a `Study` | default | |") for name in re.findall(r"\w+", cell)]
    assert shown == [field.name for field in dataclasses.fields(Study)]
    defaults = {name: row[0] for cell, row in rows("| of a `Study` | default | |").items() for name in [re.findall(r"\w+", cell)[0]]}
    for field in dataclasses.fields(Study)[2:]:
        if field.name not in ("cpus", "tpus"):
            assert eval(defaults[field.name].strip("`")) == field.default, field.name
    assert defaults["cpus"] == "1, 0"
    for cell in rows("| combinator | points |"):
        assert callable(getattr(grid, re.match(r"`(\w+)\(", cell)[1]))
    for name in VALUES:
        assert name.split(".")[1] in TEXT.replace("learning rate", "lr").replace("weight decay", "weight_decay")


def test_the_study_resolves_and_shares_programs_as_it_is_said_to(tmp_path):
    file = tmp_path / "study.py"
    file.write_text(STUDY)
    points = resolve(load_study(str(file)))
    assert len(points) == 2 * 5 * 2 and len({trajectory.class_key for trajectory in trajectories(points)}) == 2
    assert {(p.values["train.batch_tokens"], p.values["optimizer.b2"]) for p in points} == {(256, 0.99), (512, 0.98)}
    assert resolve(load_study(f"{file}:text", {"eval.tokens": 512}))[0].values["eval.tokens"] == 512
    with pytest.raises(UserError, match="grid sets it"):
        load_study(str(file), {"optimizer.lr": 0.1})


def run(code: str, folder: Path) -> str:
    (folder / "snippet.py").write_text(code)
    done = subprocess.run([sys.executable, "snippet.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_other_peoples_data_are_read(tmp_path):
    said = run(THEIRS, tmp_path)
    assert "1.000000e+09" in said and "2.000000e+09" in said  # 6e17 / (6·1e8), 2.4e18 / (6·2e8)


def test_the_table_is_read_as_shown(tmp_path):
    """Of two cells of one point, without training."""
    import json

    from scaling_jax.config import default_config
    from scaling_jax.sweep.plan import extend, undecided, write_plan

    study = Study(default_config(), grid.over("optimizer.lr", (0.01,)), horizons=(1 << 19, 1 << 20))
    study.base.schedule.name = "constant"
    points = resolve(study, lambda values: "data")
    found = trajectories(points)
    decided = {key: {"members": 1, "params": 10, "total_params": 20, "flops_per_token": 60} for key in undecided(None, found)}
    plan = extend(None, study, points, found, decided)
    directory = tmp_path / "runs/small"
    (directory / "groups" / plan.order[0]).mkdir(parents=True)
    write_plan(directory, plan)
    cells = {str(t): {"tokens": t, "status": "finished", "loss": 2.0 + i, "loss_stderr": 0.01} for i, t in enumerate(study.horizons)}
    record = {"version": 1, "state": "done", "rows": {found[0].id: cells}}
    (directory / "groups" / plan.order[0] / "group.json").write_text(json.dumps(record))
    said = run(READING, tmp_path)
    assert f"{points[0].id}" in said and "524288" in said and "3.0" in said


def test_commands_are_ones_that_there_are():
    for command in COMMANDS:
        program, verb, *flags = command.split()
        assert program == "scaling-jax" and verb in VERBS, command
    assert {"time_transfer_cpu.py:small", "time_transfer.py:32m"} <= set(re.findall(r"configs/sweeps/(\S+)", " ".join(COMMANDS)))
