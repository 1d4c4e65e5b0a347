"""Every study in configs/sweeps loads, resolves, has the grid and the cost that its docstring says, and runs when it is small."""

import ast
import collections
import json
import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from scaling_jax import results
from scaling_jax.errors import UserError
from scaling_jax.optimizer import schedule
from scaling_jax.sweep.plan import model_size
from scaling_jax.sweep.study import Study, config_of, load_study, resolve, trajectories

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs/sweeps"
KAPLAN = ("nd", "steps", "shape", "transfer")
FULL = ["time_transfer_cpu", "mup_transfer_cpu", *(f"kaplan_cpu:{which}" for which in KAPLAN), "time_transfer"]
PROSE = [
    "time_transfer_cpu:prose",
    "time_transfer_cpu:prose,decay",
    "time_transfer_cpu:prose,wide",
    "time_transfer_cpu:prose,width=32",
    "mup_transfer_cpu:prose",
]
PROSE += [f"kaplan_cpu:{which},prose" for which in KAPLAN]
SMALL = ["time_transfer_cpu:small", "mup_transfer_cpu:small", *(f"kaplan_cpu:{which},small" for which in KAPLAN)]


@cache
def study_of(name: str) -> Study:
    file, _, argument = name.partition(":")
    return load_study(str(FOLDER / f"{file}.py") + (f":{argument}" if argument else ""))


@cache
def points_of(name: str):
    return resolve(study_of(name))


def values(name: str, field: str) -> list:
    """That the points have, ascending, each once."""
    return sorted({point.values[field] for point in points_of(name)})


def doc(name: str) -> str:
    """Of a study its file's docstring, or its own part of that."""
    file, _, which = name.partition(":")
    text = ast.get_docstring(ast.parse((FOLDER / f"{file}.py").read_text()))
    parts = re.split(rf"^({'|'.join(KAPLAN)}): ", text, flags=re.MULTILINE) if which else []
    return parts[parts.index(which) + 1] if which else text


def test_all_files_are_covered():
    assert {name.partition(":")[0] for name in FULL} == {path.stem for path in FOLDER.glob("*.py")} - {"prose"}


@pytest.mark.parametrize("name", FULL)
def test_docstring_has_the_command_and_what_to_expect(name):
    file, _, which = name.partition(":")
    whole = ast.get_docstring(ast.parse((FOLDER / f"{file}.py").read_text()))
    assert f"scaling-jax sweep --config=configs/sweeps/{file}.py{which and ':' + which} --workdir=" in whole
    assert "Expect" in doc(name) and "Cost:" in doc(name)


@pytest.mark.parametrize("name", FULL)
def test_docstring_has_the_cost(name):
    """Points, tokens and FLOPs, to the digits that are given."""
    cost = r"Cost: (\d+) points.*?([\d.]+e\d+) tokens(?:,| and) ([\d.]+e\d+) FLOPs"
    count, tokens, flops = re.search(cost, doc(name), re.DOTALL).groups()
    points, trained = points_of(name), trajectories(points_of(name))
    assert len(points) == int(count)
    assert sum(t.horizons[-1] for t in trained) == pytest.approx(float(tokens), rel=0.06)
    of_all = sum(model_size(t.point.values)["flops_per_token"] * t.horizons[-1] for t in trained)
    assert of_all == pytest.approx(float(flops), rel=0.06)
    assert re.search(r"(\d+|[\d.]+) (minutes|hours) on two CPU cores, estimated|chip-hours", doc(name))


@pytest.mark.parametrize("name", [*FULL, *SMALL, *PROSE])
def test_every_point_is_another_run_at_all_its_horizons(name):
    points = points_of(name)
    assert len({point.id for point in points}) == len(points) == len(study_of(name).grid)
    for point in points:
        horizons = study_of(name).horizons or (point.values["train.tokens"],)
        assert point.horizons == horizons[-len(point.horizons) :] and (len(point.horizons) == len(horizons) or study_of(name).least_steps)
        assert point.values["schedule.warmup_tokens"] < point.horizons[0]


@pytest.mark.parametrize("name", ["time_transfer_cpu", "time_transfer"])
def test_learning_rates_batches_and_horizons_reach_far_enough(name):
    lrs, batches, horizons = values(name, "optimizer.lr"), values(name, "train.batch_tokens"), study_of(name).horizons
    np.testing.assert_allclose(np.diff(np.log2(lrs)), 0.5, atol=1e-9)
    assert len(lrs) >= 9 and batches[-1] >= 32 * batches[0] and horizons[-1] >= 32 * horizons[0]
    assert len(values(name, "model.width")) >= 2 and values(name, "parametrization.name") == ["mup"]
    assert values(name, "schedule.name") == ["constant"] and len(values(name, "schedule.warmup_tokens")) == 1
    each = collections.Counter((p.values["model.width"], p.values["train.batch_tokens"], p.values["train.seed"]) for p in points_of(name))
    assert min(each.values()) == max(each.values()) >= (9 if name == "time_transfer" else 8)


@pytest.mark.parametrize("name", ["time_transfer_cpu", "time_transfer_cpu:prose"])
def test_time_transfer_on_a_cpu_has_the_grid_that_it_says(name):
    points = points_of(name)
    seeds = {(width, seed) for width, seed in ((p.values["model.width"], p.values["train.seed"]) for p in points)}
    assert seeds == {(16, 0), (32, 0), (32, 1), (64, 0)}
    assert values(name, "train.batch_tokens") == [2**k for k in range(8, 16)]
    assert study_of(name).horizons == tuple(2**k for k in range(17, 23))
    for batch in values(name, "train.batch_tokens"):
        lrs = sorted({p.values["optimizer.lr"] for p in points if p.values["train.batch_tokens"] == batch})
        centre = (2**-7.3 if "prose" in name else 2**-8) * (batch / 256) ** 0.45
        assert len(lrs) == 8 and abs(math.log2(math.prod(lrs) ** (1 / 8) / centre) - 0.25) <= 0.25 + 1e-9  # to half a step of the grid
    for point in points:
        batch, warmup, accumulation = (point.values[n] for n in ("train.batch_tokens", "schedule.warmup_tokens", "train.accumulation"))
        assert all((horizon - warmup) / batch >= 100 for horizon in point.horizons) and batch / accumulation <= 2**12
    reached = {b: {p.horizons for p in points if p.values["train.batch_tokens"] == b} for b in (2**8, 2**13, 2**15)}
    assert reached == {2**8: {tuple(2**k for k in range(17, 23))}, 2**13: {(2**20, 2**21, 2**22)}, 2**15: {(2**22,)}}
    assert len({t.class_key for t in trajectories(points)}) == 20  # widths and batches; seeds together


def test_the_widest_has_rates_and_batches_of_the_others():
    wide, whole = points_of("time_transfer_cpu:prose,wide"), points_of("time_transfer_cpu:prose")
    assert {p.values["model.width"] for p in wide} == {128} and study_of("time_transfer_cpu:prose,wide").horizons == (2**18, 2**19, 2**20)
    tried = {(p.values["train.batch_tokens"], p.values["optimizer.lr"]) for p in wide}
    assert tried < {(p.values["train.batch_tokens"], p.values["optimizer.lr"]) for p in whole} and len(tried) == len(wide) == 18


def test_the_decayed_part_has_points_of_the_grid_it_repeats():
    whole, decayed = points_of("time_transfer_cpu:prose"), points_of("time_transfer_cpu:prose,decay")
    assert {tuple(p.fields.items()) for p in decayed} < {tuple(p.fields.items()) for p in whole}
    assert {p.values["schedule.name"] for p in decayed} == {"wsd"} and study_of("time_transfer_cpu:prose,decay").decay_fraction == 0.2


def test_a_width_by_itself_has_the_points_of_the_whole():
    whole, part = points_of("time_transfer_cpu:prose"), points_of("time_transfer_cpu:prose,width=32")
    assert [p.id for p in part] == [p.id for p in whole if p.values["model.width"] == 32]


@pytest.mark.parametrize("name", PROSE)
def test_studies_on_prose_share_their_text(name):
    assert values(name, "data.path") == ["data/prose"] and values(name, "data.tokenizer") == ["data/prose.json"]
    assert values(name, "model.vocab_size") == [1024]


def test_mup_transfer_on_prose_has_three_batches_and_centred_rates():
    name = "mup_transfer_cpu:prose"
    assert values(name, "model.width") == [32, 64, 128, 256] and values(name, "train.batch_tokens") == [2**9, 2**10, 2**11]
    tried = {(kind, width): set() for kind in ("mup", "standard") for width in (32, 64, 128, 256)}
    for point in points_of(name):
        tried[point.values["parametrization.name"], point.values["model.width"]].add(math.log2(point.values["optimizer.lr"]))
    assert all(tried["mup", width] == set(range(-7, -2)) for width in (32, 64, 128, 256)) and tried["standard", 32] == tried["mup", 32]
    assert [(min(tried["standard", width]), max(tried["standard", width])) for width in (64, 128, 256)] == [(-8, -3), (-9, -4), (-10, -5)]


def test_kaplan_on_prose_has_faster_rates_and_more_domains():
    for which, factors in {"nd": {2}, "steps": {2}, "transfer": {1, 2, 4, 8}}.items():
        rates = {
            p.values["optimizer.lr"] / (0.003239 - 0.0001395 * math.log(model_size(p.values)["params"]))
            for p in points_of(f"kaplan_cpu:{which},prose")
        }
        assert {round(rate, 3) for rate in rates} == factors
    assert len(study_of("kaplan_cpu:transfer,prose").base.data.eval_domains) == 3
    assert [p.fields for p in points_of("kaplan_cpu:shape,prose")] == [p.fields for p in points_of("kaplan_cpu:shape")]
    sizes = [model_size(p.values)["params"] for p in points_of("kaplan_cpu:transfer,prose")]
    assert max(sizes) / min(sizes) >= 100


def test_mup_transfer_has_the_grid_that_it_says():
    name = "mup_transfer_cpu"
    assert values(name, "model.width") == [32, 64, 128, 256] and values(name, "parametrization.name") == ["mup", "standard"]
    np.testing.assert_allclose(values(name, "optimizer.lr"), 2.0 ** np.arange(-12, -2))


@pytest.mark.parametrize("which", KAPLAN)
def test_kaplan_learning_rates_are_the_papers(which):
    for point in points_of(f"kaplan_cpu:{which}"):
        params = model_size(point.values)["params"]
        assert point.values["optimizer.lr"] == pytest.approx(0.003239 - 0.0001395 * math.log(params), rel=1e-3)


def test_kaplan_data_are_subsets_read_over_and_over():
    name = "kaplan_cpu:nd"
    assert values(name, "data.train_tokens") == [0, *(2**k for k in range(14, 21))]
    assert values(name, "data.repeat") == [True] and values(name, "model.dropout") == [0.1] and study_of(name).stop_after_rises == 2
    assert all(not p.values["data.repeat"] for p in points_of("kaplan_cpu:steps"))
    for which in ("nd", "steps"):
        ratios = np.divide(study_of(f"kaplan_cpu:{which}").horizons[1:], study_of(f"kaplan_cpu:{which}").horizons[:-1])
        np.testing.assert_allclose(ratios, 2**0.5, rtol=1e-4)


def test_kaplan_shapes_are_of_one_size():
    name = "kaplan_cpu:shape"
    sizes = [model_size(point.values)["params"] for point in points_of(name)]
    assert max(sizes) / min(sizes) < 1.02 and len(values(name, "model.depth")) >= 5
    assert values(name, "model.mlp_ratio") == [1, 2, 4, 10] and {8, 16, 64} <= set(values(name, "model.head_dim"))
    aspects = [p.values["model.width"] / p.values["model.depth"] for p in points_of(name)]
    assert max(aspects) / min(aspects) > 100


def test_kaplan_transfer_is_steps_and_another_domain():
    steps, transfer = study_of("kaplan_cpu:steps"), study_of("kaplan_cpu:transfer")
    assert transfer.base.data.eval_domains == ("code=data/code",) and steps.base.data.eval_domains == ()
    assert [point.fields for point in points_of("kaplan_cpu:steps")] == [point.fields for point in points_of("kaplan_cpu:transfer")]


def test_kaplan_transfer_makes_its_data_as_it_says(tmp_path):
    """Its first command; the second is that of README and docs."""
    command, tokenize = re.findall(r"^ {4}((?:python|scaling-jax tokenize) .*)$", doc("kaplan_cpu:transfer"), re.MULTILINE)
    done = subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "code.jsonl").read_text().splitlines()
    assert len(lines) > 100 and any("def " in json.loads(line)["text"] for line in lines)
    assert tokenize == "scaling-jax tokenize --input=code.jsonl --out=data/code --holdout_every=0"


def test_time_transfer_has_the_papers_models_and_learning_rates():
    name = "time_transfer"
    np.testing.assert_allclose(values(name, "optimizer.lr"), 2.0 ** np.arange(-12, -6.9, 0.5))
    sizes = sorted({model_size(p.values)["params"] for p in points_of(name)})
    assert [round(12 * 24 * width**2) for width in (256, 512, 1024)] == sizes
    assert len(values(name, "train.batch_tokens")) == 6 and {2**18, 2**20} < set(values(name, "train.batch_tokens"))
    assert study_of(name).horizons == tuple(2**k for k in range(26, 34)) and study_of(name).tpus == 8
    for point in points_of(name):  # a microbatch of every member is 2^14 tokens, over two chips
        assert point.values["train.batch_tokens"] / point.values["train.accumulation"] == 2**14
        assert (point.values["mesh.replica"], point.values["mesh.fsdp"], point.values["model.compute_dtype"]) == (2, 1, "bfloat16")
    classes = collections.Counter(t.class_key for t in trajectories(points_of(name)))
    assert set(classes.values()) == {11} and len(classes) == 18
    fraction = schedule(config_of(points_of(name)[0].values))
    np.testing.assert_allclose([fraction(5e6), fraction(1e7), fraction(2.0**33)], [0.5, 1, 1], rtol=1e-5)
    assert len(points_of("time_transfer:32m,101m")) == 132


@pytest.mark.parametrize(
    "name",
    [
        "time_transfer_cpu:tiny",
        "time_transfer_cpu:small,prose",
        "mup_transfer_cpu:1",
        "kaplan_cpu:nd,small,prose",
        "kaplan_cpu:n",
        "time_transfer:1b",
    ],
)
def test_unknown_argument_is_refused_with_those_that_there_are(name):
    with pytest.raises(UserError, match="the argument is .*: must be "):
        study_of(name)


def test_a_small_study_runs_from_its_command_to_its_table(tmp_path):
    """In another process, as a user starts it."""
    command = ["sweep", f"--config={FOLDER / 'kaplan_cpu.py'}:nd,small", f"--workdir={tmp_path / 'study'}"]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-m", "scaling_jax", *command], cwd=ROOT, env=quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = results.load(tmp_path / "study", required=("loss", "data_tokens", "tokens"))
    assert len(table) == 6 and set(table.status) <= {"finished", "stopped_early"}
    assert sorted(set(table.data_tokens)) == [1 << 12, 1 << 13] and sorted(set(table.horizon_tokens)) == [1 << 12, 1 << 13, 1 << 14]
    finished = table[table.status == "finished"]
    assert (finished.loss < np.log(256)).all() and (finished.loss_stderr > 0).all()
