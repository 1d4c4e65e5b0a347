"""The first study's folder: its parts are commands that exist, and its laws are of the tables beside them."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from scaling_jax import config as config_lib
from scaling_jax import results
from scaling_jax.laws import store
from scaling_jax.sweep.study import load_study, resolve

ROOT = Path(__file__).parents[1]
FIRST = ROOT / "studies/first"
SCRIPT = (FIRST / "run").read_text()
PARTS = re.search(r'^parts="(.*)"$', SCRIPT, re.MULTILINE)[1].split()


def test_the_script_is_sound_and_refuses_a_part_that_there_is_not():
    named = subprocess.run([str(FIRST / "run")], cwd=ROOT, capture_output=True, text=True)
    assert named.returncode == 0 and named.stdout == f"parts: {' '.join(PARTS)}\n"
    assert set(PARTS) == set(re.findall(r"^(\w+)\(\) {", SCRIPT, re.MULTILINE)) - {"sweep"}
    refused = subprocess.run([str(FIRST / "run"), "no_such"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "no_such: no such part; must be of data" in refused.stderr


@pytest.mark.parametrize("sweep", re.findall(r"sweep (\w+ \w+ \S+);", SCRIPT), ids=lambda sweep: sweep.split()[2])
def test_every_sweep_resolves_and_its_table_is_of_its_points(sweep):
    folder, name, config = sweep.split()
    points = resolve(load_study(str(ROOT / "configs/sweeps" / config)))
    table = FIRST / folder / f"{name}.parquet"
    if not table.exists():
        pytest.skip(f"{table.relative_to(ROOT)}: that part has not been run")
    table = results.load(table, required=("loss", "tokens", "lr", "batch_tokens"))
    assert (table.status != "pending").all()
    cells = {(p.values["optimizer.lr"], p.values["train.batch_tokens"], p.values["model.width"], h) for p in points for h in p.horizons}
    assert set(zip(table.lr, table.batch_tokens, table.width, table.horizon_tokens, strict=True)) == cells


def test_the_branched_run_is_of_the_study():
    config = config_lib.load(str(FIRST / "branch.py"))
    config_lib.validate(config)
    study = load_study(str(ROOT / "configs/sweeps/time_transfer_cpu.py:prose,width=64"))
    fields = {"model.width": 64, "train.batch_tokens": config.train.batch_tokens, "optimizer.lr": config.optimizer.lr}
    assert any(point.fields.items() >= fields.items() for point in resolve(study))
    asked = re.search(r"--at_tokens=(\S+)", SCRIPT)[1]
    assert tuple(map(int, asked.split(","))) == config.checkpoint.keep_at_tokens


@pytest.mark.parametrize("laws", sorted(FIRST.glob("*/laws.json")), ids=lambda path: path.parent.name)
def test_laws_are_of_the_tables_beside_them(laws):
    assert json.loads(laws.read_text())["data"]["fingerprint"] == store.fingerprint(results.load(laws.parent))


def test_it_is_small():
    assert sum(path.stat().st_size for path in FIRST.rglob("*") if path.is_file()) < 30e6
