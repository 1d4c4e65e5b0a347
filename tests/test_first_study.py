"""The first study's folder: its parts are commands that exist, and its laws are of the tables beside them."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def test_the_held_back_condition_lies_about_what_was_predicted():
    about = runpy.run_path(str(FIRST / "held_back.py"))["about"]
    points = list(about(64, 2.0, 4385.2, 0.01))
    assert {point["train.batch_tokens"] for point in points} == {137 * 64}
    np.testing.assert_allclose([point["optimizer.lr"] for point in points], 0.01 * 2.0 ** np.arange(-0.5, 1.6, 0.5))
    if (FIRST / "held_back/prediction.json").exists():
        study = load_study(str(FIRST / "held_back.py"))
        assert len(resolve(study)) == 15 and study.horizons[-1] == 1 << 23


@pytest.mark.parametrize("laws", sorted(FIRST.glob("*/laws.json")), ids=lambda path: path.parent.name)
def test_laws_are_of_the_tables_beside_them(laws):
    assert json.loads(laws.read_text())["data"]["fingerprint"] == store.fingerprint(results.load(laws.parent))


sys.path.insert(0, str(FIRST))
import claims  # noqa: E402 (of the study's folder)
from claims import Figure  # noqa: E402

sys.path.remove(str(FIRST))


@pytest.mark.parametrize(
    ("rule", "figure", "verdict"),
    [
        (claims.sign(1), Figure(0.5, 0.2, 0.8), claims.SEEN),
        (claims.sign(1), Figure(0.5, 0.2, None), claims.SEEN),
        (claims.sign(1), Figure(-0.5, -0.8, -0.2), claims.NOT_SEEN),
        (claims.sign(1), Figure(0.01, -0.05, 0.06), claims.NOT_SEEN),
        (claims.sign(1), Figure(0.3, -0.05, 0.6), claims.UNDECIDED),
        (claims.sign(-1), Figure(-0.3, -0.6, -0.1), claims.SEEN),
        (claims.sign(-1), Figure(0.3, 0.1, 0.6), claims.NOT_SEEN),
        (claims.sign(-1), Figure(None), claims.UNDECIDED),
        (claims.unchanged(0.1), Figure(0.03, 0.01, 0.05), claims.SEEN),
        (claims.unchanged(0.1), Figure(0.3, 0.2, 0.4), claims.NOT_SEEN),
        (claims.unchanged(0.1), Figure(-0.3, None, -0.2), claims.NOT_SEEN),
        (claims.unchanged(0.1), Figure(0.1, 0.05, 0.15), claims.UNDECIDED),
        (claims.unchanged(0.1), Figure(0.0, None, 0.05), claims.UNDECIDED),
        (claims.is_about(1, 0.5), Figure(0.9, 0.8, 1.1), claims.SEEN),
        (claims.is_about(1, 0.5), Figure(0.9, 0.6, 1.2), claims.UNDECIDED),
        (claims.is_about(1, 0.5), Figure(0.5, 0.4, 0.6), claims.NOT_SEEN),
        (claims.is_about(1, 0.5), Figure(1.0, 0.9, None), claims.UNDECIDED),
    ],
)
def test_verdicts_follow_from_intervals(rule, figure, verdict):
    assert rule(figure) == verdict


def test_a_claim_of_figures_that_differ_is_undecided(tmp_path):
    numbers = [{"name": name, "value": value, "low": value - 0.1, "high": value + 0.1} for name, value in {"a": 1.0, "b": -1.0}.items()]
    fits = {"f": {"parameters": {"p": {"value": 2.0, "low": 1.5, "high": None, "not_identified": None}}}}
    laws = {"laws": {"law": {"numbers": numbers, "fits": fits}}, "not_fitted": {"other": "too few points"}}
    (tmp_path / "study").mkdir()
    (tmp_path / "study/laws.json").write_text(json.dumps(laws))
    laws = claims.Laws(tmp_path)

    def claim(**figures):
        return claims.Claim(
            "A paper", "it rises", "x", {name: ("study", *where) for name, where in figures.items()}, claims.sign(1), "part"
        )

    assert claims.verdict(claim(a=("law", "a")), laws) == claims.SEEN
    assert claims.verdict(claim(b=("law", "b")), laws) == claims.NOT_SEEN
    both = claim(a=("law", "a"), b=("law", "b"), p=("law", "f", "p"), none=("other", "q"))
    assert claims.verdict(both, laws) == claims.UNDECIDED
    row = claims.table([both, both._replace(figures={"x": ("not run", "law", "a")})], laws).splitlines()[2:]
    figures = "a: 1.00 (0.90 to 1.10); b: −1.00 (−1.10 to −0.90); p: 2.00 (1.50 to ∞); none: not identified"
    assert row == [f"| it rises (A paper) | x | {figures} | undecided at this scale | `part` |"]
    with pytest.raises(KeyError, match="law has no number 'c', only"):
        laws.figure(("study", "law", "c"))


def test_claims_are_of_numbers_that_the_laws_have():
    laws = claims.Laws()
    for claim in claims.CLAIMS:
        assert set(claim.parts.split()) <= set(PARTS)
        for where in claim.figures.values():
            if where[0] in laws.studies:
                laws.figure(where)


def test_it_is_small():
    assert sum(path.stat().st_size for path in FIRST.rglob("*") if path.is_file()) < 30e6
