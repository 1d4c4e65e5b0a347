"""The first study's folder: its parts are commands that exist, and its laws are of the tables beside them."""

import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
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
    assert set(PARTS) == set(re.findall(r"^(\w+)\(\) {", SCRIPT, re.MULTILINE)) - {"sweep", "of_each"}
    refused = subprocess.run([str(FIRST / "run"), "no_such"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "no_such: no such part; must be of data" in refused.stderr


@pytest.mark.parametrize("part, last", [("fit", "--law=all --out={0}/laws.json"), ("pages", "--out={0}/page")])
def test_a_folder_whose_links_lead_to_a_part_not_yet_run_is_left_out(tmp_path, part, last):
    here = tmp_path / "studies/first"
    for folder in ("part", "joined"):
        (here / folder).mkdir(parents=True)
    (here / "part/all.parquet").touch()
    (here / "joined/all.parquet").symlink_to("../part/all.parquet")
    (here / "joined/later.parquet").symlink_to("../later/all.parquet")
    for command in ("scaling-jax", "python"):
        (tmp_path / command).write_text("#!/bin/sh\necho $*\n")
        (tmp_path / command).chmod(0o755)

    def said() -> list[str]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        found = subprocess.run([FIRST / "run", part], cwd=tmp_path, env={"PATH": path}, check=True, capture_output=True, text=True)
        return [line for line in found.stdout.splitlines() if line != "studies/first/story.py"]

    done = {
        folder: f"{part.replace('pages', 'report')} {{0}} {last}".format(f"studies/first/{folder}")
        for folder in ("joined", "later", "part")
    }
    assert said() == [
        "studies/first/joined: left out, as the part of studies/first/joined/later.parquet is yet to be run",
        done["part"],
    ]
    (here / "later").mkdir()
    (here / "later/all.parquet").touch()
    assert said() == [done["joined"], done["later"], done["part"]]


SWEEPS = re.findall(r"sweep (\w+ \w+ \S+?);?\s", SCRIPT.replace("$sweeps", "configs/sweeps").replace("$here", "studies/first"))


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.split()[2])
def test_every_sweep_resolves_and_its_table_is_of_its_points(sweep):
    folder, name, config = sweep.split()
    points = resolve(load_study(str(ROOT / config)))
    table = results.load(FIRST / folder / f"{name}.parquet", required=("loss", "tokens", "lr", "batch_tokens"))
    assert (table.status != "pending").all()
    columns = ["lr", "batch_tokens", "width", "depth", "seed", "parametrization", "data_tokens", "schedule", "horizon_tokens"]
    names = ("optimizer.lr", "train.batch_tokens", "model.width", "model.depth", "train.seed", "parametrization.name", "data.train_tokens")
    cells = {(*(p.values[name] for name in (*names, "schedule.name")), horizon) for p in points for horizon in p.horizons}
    assert set(table[columns].itertuples(index=False, name=None)) == cells and table["point"].nunique() == len(points)


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
    study = load_study(str(FIRST / "held_back.py"))
    assert len(resolve(study)) == 15 and study.horizons[-1] == 1 << 23


@pytest.mark.parametrize("laws", sorted(FIRST.glob("*/laws.json")), ids=lambda path: path.parent.name)
def test_laws_are_of_the_tables_beside_them(laws):
    assert json.loads(laws.read_text())["data"]["fingerprint"] == store.fingerprint(results.load(laws.parent))


sys.path.insert(0, str(FIRST))
import claims  # noqa: E402 (of the study's folder)
import measured  # noqa: E402
import rules  # noqa: E402
import story  # noqa: E402
from measured import Figure  # noqa: E402

sys.path.remove(str(FIRST))


@pytest.mark.parametrize(
    ("rule", "figure", "verdict"),
    [
        (rules.sign(1), Figure(0.5, 0.2, 0.8), rules.SEEN),
        (rules.sign(1), Figure(0.5, 0.2, None), rules.SEEN),
        (rules.sign(1), Figure(-0.5, -0.8, -0.2), rules.NOT_SEEN),
        (rules.sign(1), Figure(0.01, -0.05, 0.06), rules.NOT_SEEN),
        (rules.sign(1), Figure(0.3, -0.05, 0.6), rules.UNDECIDED),
        (rules.sign(-1), Figure(-0.3, -0.6, -0.1), rules.SEEN),
        (rules.sign(-1), Figure(0.3, 0.1, 0.6), rules.NOT_SEEN),
        (rules.sign(-1), Figure(None), rules.UNDECIDED),
        (rules.about(0, 0.1), Figure(0.03, 0.01, 0.05), rules.SEEN),
        (rules.about(0, 0.1), Figure(0.3, 0.2, 0.4), rules.NOT_SEEN),
        (rules.about(0, 0.1), Figure(-0.3, None, -0.2), rules.NOT_SEEN),
        (rules.about(0, 0.1), Figure(0.1, 0.05, 0.15), rules.UNDECIDED),
        (rules.about(0, 0.1), Figure(0.0, None, 0.05), rules.UNDECIDED),
        (rules.about(1, 0.25), Figure(0.9, 0.8, 1.1), rules.SEEN),
        (rules.about(1, 0.25), Figure(0.9, 0.6, 1.2), rules.UNDECIDED),
        (rules.about(1, 0.25), Figure(0.0, -1.0, 0.98), rules.UNDECIDED),
        (rules.about(1, 0.25), Figure(0.5, 0.4, 0.6), rules.NOT_SEEN),
        (rules.about(1, 0.25), Figure(2.0, 1.5, None), rules.NOT_SEEN),
        (rules.about(1, 0.25), Figure(None), rules.UNDECIDED),
        (rules.below(3), Figure(2.0), rules.SEEN),
        (rules.below(3), Figure(4.0), rules.NOT_SEEN),
        (rules.below(3), Figure(2.0, 1.0, 4.0), rules.UNDECIDED),
        (rules.below(3), Figure(2.0, None, 2.5), rules.SEEN),
        (rules.below(3), Figure(5.0, 4.0, None), rules.NOT_SEEN),
        (rules.below(3), Figure(None), rules.UNDECIDED),
    ],
)
def test_verdicts_follow_from_intervals(rule, figure, verdict):
    assert rule.judge(figure) == verdict


def test_a_claim_of_figures_that_differ_is_undecided(tmp_path):
    numbers = [{"name": name, "value": value, "low": value - 0.1, "high": value + 0.1} for name, value in {"a": 1.0, "b": -1.0}.items()]
    fits = {"f": {"parameters": {"p": {"value": 2.0, "low": 1.5, "high": None, "not_identified": None}}, "constants": {"t0": 7.0}}}
    statements = ["seen in 3 cases", "another"]
    laws = {"laws": {"law": {"numbers": numbers, "fits": fits, "statements": statements}}, "not_fitted": {"other": "too few points"}}
    (tmp_path / "study").mkdir()
    (tmp_path / "study/laws.json").write_text(json.dumps(laws))
    laws = claims.Laws(tmp_path)

    def claim(**figures):
        return claims.Claim("A paper", "it rises", "x", {name: ("study", *where) for name, where in figures.items()}, rules.sign(1), "part")

    assert claims.verdict(claim(a=("law", "a")), laws) == rules.SEEN
    assert claims.verdict(claim(b=("law", "b")), laws) == rules.NOT_SEEN
    assert claims.verdict(claim(a=("law", "a"), b=("law", "b")), laws) == rules.IN_PART
    given = claim(a=("law", "a"))._replace(given=("b is small", ("study", "law", "b"), rules.below(-2)))
    assert claims.verdict(given, laws) == rules.UNDECIDED
    assert claims.verdict(given._replace(given=("b is small", ("study", "law", "b"), rules.below(0))), laws) == rules.SEEN
    assert "| above 0, given that b is small |" in claims.table([given], laws)
    both = claim(a=("law", "a"), b=("law", "b"), p=("law", "f", "p"), none=("other", "q"))
    assert claims.verdict(both, laws) == rules.UNDECIDED
    row = claims.table([both, both._replace(figures={"x": ("not run", "law", "a")})], laws).splitlines()[2:]
    figures = "a: 1.00 (0.90 to 1.10); b: −1.00 (−1.10 to −0.90); p: 2.00 (1.50 to ∞); none: not identified"
    assert row == [f"| it rises (A paper) | x | {figures} | above 0 | undecided at this scale | `part fit` |"]
    with pytest.raises(KeyError, match="law has no number 'c', only"):
        laws.figure(("study", "law", "c"))
    assert laws.figure(("study", "law", "f", "t0")) == Figure(7.0)
    assert laws.said("study", "law", r"in (\d) cases") == "3"
    with pytest.raises(ValueError, match="0 sentences of law"):
        laws.said("study", "law", r"(\d) of")


def test_claims_are_of_numbers_that_the_laws_have():
    laws = claims.Laws()
    for claim in claims.CLAIMS:
        assert set(claim.parts.split()) <= set(PARTS)
        for where in claim.names:
            if laws.has(where):
                laws.figure(where)


def test_it_is_small():
    assert sum(path.stat().st_size for path in FIRST.rglob("*") if path.is_file()) < 30e6


def test_ratios_have_the_relative_errors_of_both():
    ratio = Figure(2.0, 1.0, 4.0).over(Figure(0.5, 0.25, 1.0))
    np.testing.assert_allclose(ratio, (4.0, 4 * 2 ** -(2**0.5), 4 * 2 ** (2**0.5)))
    assert Figure(2.0, 2.0, None).over(Figure(4.0, 4.0, 4.0)) == Figure(0.5, 0.5, None)
    assert Figure(None).over(Figure(1.0)) == Figure(None)


def test_growth_is_the_widest_that_the_ends_allow(tmp_path):
    (tmp_path / "branch").mkdir()
    points = [("branch", 1 << 18, 512, 256, 1024), ("branch", 1 << 20, 2048, 1024, None)]
    keys = ("definition", "tokens", "batch_tokens", "low", "high")
    (tmp_path / "branch/critical_batch.json").write_text(json.dumps({"points": [dict(zip(keys, point, strict=True)) for point in points]}))
    run = pandas.DataFrame(
        {"width": 64, "batch_tokens": 512, "lr": 2**-7, "horizon_tokens": [1 << 18, 1 << 20], "tokens": [1 << 18, 1 << 20], "point": "p"}
    )
    other = run.assign(batch_tokens=1024, point="q")
    for rows, noise in ((run, 1000.0), (other, 7.0)):
        for name, factor in zip(measured.NOISE, (1, 0.5, 2), strict=True):
            rows[name] = noise * factor
    (tmp_path / "time_transfer").mkdir()
    pandas.concat([other, run]).assign(loss=3.0, seed=0, seconds=1.0).to_parquet(tmp_path / "time_transfer/width_64.parquet")
    found = dict(measured._branch(tmp_path))
    assert found["branch", "growth by branches"] == Figure(1.0, 0.0, None)
    assert found["branch", f"by noise at T = {1 << 20}"] == Figure(1000.0, 500.0, 2000.0)
    np.testing.assert_allclose(
        found["branch", f"branches over noise at T = {1 << 18}"], [0.512 * 2 ** (way * 2**0.5) for way in (0, -1, 1)]
    )


def test_the_truth_of_a_held_back_condition_is_that_of_its_grid():
    """A planted surface: η* = 0.01·(B/2048)^0.5, B* = 2300, a loss of 3 there; 5 rates at 3 batches, the middle one asked for."""
    planted, held = {"η*": 0.01, "B*": 2300, "L": 3.0}, dict.fromkeys(("η*", "B*", "L"), 0)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rows = []
        for tokens, batch, k in itertools.product((1 << 20, 1 << 21, 1 << 22), (1024, 2048, 4096), range(-2, 3)):
            lr = 0.011 * (batch / 2048) ** 0.5 * 2 ** (k / 2)
            off = np.log(lr / (0.01 * (batch / 2048) ** 0.5))
            loss = (3 + 0.2 * off**2 + 0.05 * np.log(batch / 2300) ** 2) * (1 + 1e-3 * rng.normal())
            rows.append({"params": 1e5, "width": 96, "batch_tokens": batch, "horizon_tokens": tokens, "lr": lr, "loss": loss})
        table = pandas.DataFrame(rows).assign(tokens=lambda table: table["horizon_tokens"])
        table["point"] = [f"{batch} {lr}" for batch, lr in zip(table.batch_tokens, table.lr, strict=True)]
        for what, figure in measured.truth(table, 2100.0).items():
            assert figure.high / figure.low < 1.3
            held[what] += figure.low < planted[what] < figure.high
    assert min(held.values()) >= 4, held


def test_a_page_has_the_numbers_of_the_results_and_no_other():
    class Known:
        joined: dict = {}

        def has(self, where):
            return where == ("s", "law", "p")

        def said(self, study, law, pattern):
            return re.search(pattern, f"{study} {law} has 3 of 7")[1]

        def figure(self, where):
            return {("s", "law", "p"): Figure(0.5, 0.4, 0.61), ("s", "share"): Figure(0.0712)}[where]

    claim = claims.Claim("A paper", "it rises", "x", {"p": ("s", "law", "p")}, rules.sign(1), "part")
    missing = claim._replace(text="another", figures={"q": ("t", "law", "q")})
    text = "p is {{s|law|p}}, so {{=s|law|p}}; {{%s|share}}%; {{verdict|rises}}: {{seen}} of\n{{claims}}, {{not seen}} not"
    text += "; {{said|s|law|has (\\d)}}{{holds|s|law|of 7}}{{holds|verdict|rises}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "CLAIMS", (claim, missing))
        assert story.filled(text, Known()) == "p is 0.50 (0.40 to 0.61), so 0.50; 7.12%; seen: 1 of\n1, 0 not; 3"
        with pytest.raises(KeyError):
            story.filled("{{s|no such}}", Known())
        with pytest.raises(TypeError):  # as no sentence has it
            story.filled("{{holds|s|law|of 9}}", Known())
        patch.setattr(story, "CLAIMS", (claim._replace(rule=rules.sign(-1)),))
        with pytest.raises(ValueError, match="'rises' is not seen, and the words"):
            story.filled("{{holds|verdict|rises}}", Known())


def test_the_pages_say_what_the_results_say():
    checked = subprocess.run([sys.executable, str(FIRST / "story.py"), "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    refused = subprocess.run([sys.executable, str(FIRST / "story.py"), "--chekc"], capture_output=True, text=True)
    assert refused.returncode == 2 and "--chekc: no such flag" in refused.stderr


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"), (-0.388, "−0.39"), (0.01543, "0.0154"), (-0.00438, "−0.0044"), (3.24e-5, "3.2e−5"), (12.34, "12.3"), (2961.4, "2,961"),
        (56510.0, "56,500"), (1.27e6, "1.27 million"), (8.1e8, "810 million"), (6.9e10, "6.9e10"),
    ],
)  # fmt: skip
def test_digits_suit_the_size(value, said):
    assert measured.digits(value) == said


def test_costs_are_of_each_run_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    rows = {"horizon_tokens": [1, 2, 2], "tokens": [1, 2, 2], "loss": 3.0, "point": ["p", "p", "q"], "seconds": [1800.0, 3600.0, 7200.0]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "a/width_16.parquet")
    (tmp_path / "b/width_16.parquet").symlink_to("../a/width_16.parquet")
    pandas.DataFrame(rows).iloc[2:].to_parquet(tmp_path / "b/width_32.parquet")
    found = dict(measured._cost(tmp_path))
    assert found["a", "runs"] == Figure(2) and found["a", "core hours"] == Figure(3)
    assert found["b", "runs"] == Figure(1) and found["all", "core hours"] == Figure(5)


def test_shapes_of_few_blocks_or_extreme_aspects_do_not_count(tmp_path):
    (tmp_path / "kaplan_shape").mkdir()
    shapes = [(90, 1, 2.0), (64, 2, 3.0), (32, 8, 3.3), (16, 32, 4.0)]
    rows = [
        {
            "width": width,
            "depth": depth,
            "loss": loss * np.exp(off),
            "model.mlp_ratio": 4,
            "head_dim": 16,
            "tokens": 1,
            "params": 1,
            "seed": seed,
        }
        for width, depth, loss in shapes
        for seed, off in enumerate((-0.01, 0.01))
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "kaplan_shape/all.parquet")
    (figure,) = dict(measured._shape(tmp_path)).values()
    error = np.sqrt(0.01**2 * 2 * 2 / 2)
    np.testing.assert_allclose(figure, [100 * np.expm1(np.log(1.1) + way * 1.96 * error) for way in (0, -1, 1)])


def test_the_prediction_is_by_the_laws_that_are_here():
    said = FIRST / "held_back/prediction.json"
    laws = json.loads((FIRST / "time_transfer/laws.json").read_text())
    assert json.loads(said.read_text())["laws"]["fingerprint"] == laws["data"]["fingerprint"]
