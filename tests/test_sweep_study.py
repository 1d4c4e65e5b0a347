"""Studies: what makes a point the same point, what trains as one program, and everything that is refused, with its words."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import time

import ml_collections
import numpy as np
import pytest
from helpers import small_config

from scaling_jax import config as config_lib
from scaling_jax.data.source import TokenSource
from scaling_jax.errors import UserError
from scaling_jax.fields import FIELDS
from scaling_jax.sweep import grid
from scaling_jax.sweep.study import (
    VALUES,
    WHOLE_RUN,
    Study,
    check_lengths,
    config_of,
    data_key,
    end_tokens,
    resolve,
    trajectories,
)

HORIZONS = (1024, 4096)


def study(over=None, horizons=HORIZONS, schedule="constant", fields=None, **settings):
    return Study(small_config(schedule__name=schedule, **(fields or {})), grid.product() if over is None else over, horizons, **settings)


def only(*args, fingerprint="f", dtype=None, **kwargs):
    (point,) = resolve(study(*args, **kwargs), lambda values: fingerprint, dtype)
    return point


# What a point is


def test_a_point_has_the_base_the_assignment_and_the_last_horizon():
    points = resolve(study(grid.product(grid.over("optimizer.lr", [1, 0.5]), grid.over("model.width", np.array([16, 32])))))
    assert [point.fields for point in points] == [{"optimizer.lr": lr, "model.width": width} for lr in (1.0, 0.5) for width in (16, 32)]
    assert all(type(p.fields["optimizer.lr"]) is float and type(p.fields["model.width"]) is int for p in points)
    expected = config_lib.flatten(small_config(schedule__name="constant", train__tokens=4096, optimizer__lr=0.5, model__width=32))
    assert points[3].values == expected | {"noise_scale.window_tokens": WHOLE_RUN}
    assert points[3].horizons == HORIZONS
    assert config_lib.flatten(config_of(points[3].values)) == points[3].values


def test_the_id_is_the_digest_of_the_identity_fields_and_the_data():
    point = only(fingerprint="abc")
    identity = {name: value for name, value in point.values.items() if not FIELDS[name].execution and name != "train.tokens"}
    text = json.dumps(identity | {"data.fingerprint": "abc"}, sort_keys=True)
    assert point.id == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_horizons_are_no_part_of_a_point(schedule):
    decay = {"decay_fraction": 0.25} if schedule == "wsd" else {}
    short, long = (only(horizons=horizons, schedule=schedule, **decay) for horizons in (HORIZONS, (512, 8192)))
    assert short.id == long.id and long.values["train.tokens"] == 8192
    if decay:
        assert (short.values["schedule.decay_tokens"], long.values["schedule.decay_tokens"]) == (1024, 2048)
    without = [only(horizons=(), schedule=schedule, fields={"train__tokens": t}, **decay) for t in (4096, 8192)]
    assert without[0].id != without[1].id and [p.horizons for p in without] == [(4096,), (8192,)]


FIXED = ("train.tokens", "train.stop_at_tokens", "mesh.member", "batch.stages", "checkpoint.keep_at_tokens")  # by a study, or another field
OTHER = {
    "model.width": 32, "model.head_dim": 4, "model.kv_heads": 1, "model.context": 32, "model.vocab_size": 300, "model.attention": "einsum",
    "model.loss_chunk_tokens": 8, "parametrization.name": "standard", "schedule.name": "cosine", "schedule.warmup_tokens": 128,
    "train.batch_tokens": 256, "batch.schedule": "stages", "mesh.fsdp": 2, "mesh.replica": 2, "mesh.tensor": 2, "data.train_tokens": 64,
    "data.eval_domains": ("a=b",),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({*FIELDS} - {*FIXED}))
def test_identity_fields_make_another_point_and_execution_fields_the_same(name):
    default = config_lib.flatten(small_config())[name]
    kinds = {bool: lambda: not default, int: lambda: default + 1, float: lambda: default / 2 + 0.1, str: lambda: "x"}
    choices = [choice for choice in FIELDS[name].choices if choice != default]
    changed = OTHER[name] if name in OTHER else choices[0] if choices else kinds[type(default)]()
    fields = {name.replace(".", "__"): changed} | ({"batch__stages": ("512=256",)} if name == "batch.schedule" else {})
    changed_point = only(schedule=changed) if name == "schedule.name" else only(fields=fields)
    assert (changed_point.id == only().id) == FIELDS[name].execution


def test_the_data_are_part_of_a_point_and_asked_for_once_for_each():
    asked = []

    def fingerprint_of(values):
        asked.append(values["data.path"])
        return values["data.path"] + "'s content"

    over = grid.product(grid.over("data.path", ["here", "there"]), grid.over("optimizer.lr", [0.1, 0.2]))
    points = resolve(study(over), fingerprint_of)
    assert asked == ["here", "there"] and len({point.id for point in points}) == 4
    assert points[0].data == "here's content" and only(fingerprint="a").id != only(fingerprint="b").id


def test_the_fastest_dtype_is_part_of_a_point_once_it_is_known():
    assert only(compute_dtype="fastest").id == only().id
    assert only(compute_dtype="fastest", dtype="bfloat16").id == only(fields={"model__compute_dtype": "bfloat16"}).id
    assert only(dtype="bfloat16").id == only().id  # nothing was to decide


# What is one program


def keys(over=None, **kwargs):
    return [t.class_key for t in trajectories(resolve(study(over, **kwargs)))]


def test_points_that_differ_in_values_are_one_class_and_in_anything_else_are_not():
    over = grid.product(*(grid.over(name, [1, 2]) for name in VALUES))
    assert len(keys(over)) == 32 and len(set(keys(over))) == 1
    for name, value in {
        "model.width": 32, "optimizer.b1": 0.5, "schedule.warmup_tokens": 64, "train.batch_tokens": 256, "model.compute_dtype": "bfloat16",
        "noise_scale.window_tokens": 512, "data.train_tokens": 5000, "optimizer.clip_norm": 2.0,
    }.items():  # fmt: skip
        assert len(set(keys(grid.over(name, [config_lib.flatten(small_config())[name], value])))) == 2, name
    for name, value in {"train.accumulation": 2, "model.remat": "full", "mesh.tensor": 2, "eval.batch_sequences": 4}.items():
        assert keys(fields={name.replace(".", "__"): value}) != keys(), name
    for name, value in {"data.prefetch": 5, "logging.tensorboard": True, "checkpoint.every_tokens": 128}.items():
        assert keys(fields={name.replace(".", "__"): value}) == keys(), name


def test_one_trajectory_serves_all_horizons_where_the_lr_has_no_end():
    over = grid.over("optimizer.lr", [0.1, 0.2])
    for schedule, settings in {"constant": {}, "wsd": {"decay_fraction": 0.5}}.items():
        points = resolve(study(over, schedule=schedule, **settings))
        found = trajectories(points)
        assert [(t.id, t.horizons) for t in found] == [(point.id, HORIZONS) for point in points]
        assert {t.class_key for t in found} == set(keys(over, schedule=schedule, horizons=(512, 1024, 8192), **settings))
    for schedule in ("linear", "cosine"):
        points = resolve(study(over, schedule=schedule))
        found = trajectories(points)
        assert [t.id for t in found] == [f"{point.id}-{horizon}" for point in points for horizon in HORIZONS]
        assert [t.horizons for t in found] == [(h,) for h in HORIZONS] * 2
        assert found[0].class_key == found[2].class_key != found[1].class_key == found[3].class_key


def test_budgets_in_the_grid_are_classes_of_their_own():
    assert len(set(keys(grid.over("train.tokens", [1024, 2048]), horizons=()))) == 2


# Speed


@pytest.mark.parametrize("wide", [False, True])
def test_ten_thousand_points_resolve_quickly(wide):
    """1.5 s on a quiet core, names and classes included; three times that here, of this process's own time."""
    if wide:
        over = grid.product(grid.over("train.batch_tokens", [32 * i for i in range(1, 5001)]), grid.over("optimizer.lr", [0.1, 0.2]))
    else:
        over = grid.product(
            grid.over("optimizer.lr", grid.geometric(2**-12, 2**-3, 2)),
            grid.over("train.seed", range(10)),
            grid.over("train.batch_tokens", [32 * i for i in range(1, 11)]),
            grid.over("model.width", [16 * i for i in range(1, 11)]),
        )
    begun = time.process_time()
    points = resolve(study(over), lambda values: "f")
    assert len({point.id for point in points}) == 10_000
    assert len({t.class_key for t in trajectories(points)}) == (5_000 if wide else 100)
    assert time.process_time() - begun < 4.5


def test_a_study_is_resolved_without_jax():
    code = "import sys; from scaling_jax.sweep import grid, study; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# What is refused


def over_lr(*values):
    return grid.over("optimizer.lr", values)


WSD = {"schedule": "wsd"}
BAD = {
    "empty grid": (dict(over=over_lr()), "the study's grid has no points"),
    "no grid": (dict(over=[{"optimizer.lr": 1}]), "the study's grid is of type list"),
    "unknown field": (dict(over=grid.over("optimizer.l", [1])), "optimizer.l in the grid: no such field (did you mean config.optimizer.lr"),
    "text for a number": (dict(over=over_lr(0.1, "0.2")), "config.optimizer.lr is '0.2': must be of type float"),
    "half a width": (dict(over=grid.over("model.width", [16, 24.5])), "config.model.width is 24.5: must be of type int"),
    "true for a number": (dict(over=grid.over("model.depth", [True])), "config.model.depth is True: must be of type int"),
    "one point twice": (dict(over=over_lr(0.1, 0.1)), "has the point optimizer.lr=0.1 twice"),
    "one identity": (
        dict(over=grid.product(over_lr(0.1), grid.over("model.remat", ["none", "full"]))),
        "optimizer.lr=0.1, model.remat=none and optimizer.lr=0.1, model.remat=full differ in model.remat, which only says how",
    ),
    "horizons fall": (dict(horizons=(4096, 1024)), "horizons have 1024 after 4096: must ascend"),
    "horizons repeat": (dict(horizons=(1024, 1024)), "horizons have 1024 after 1024: must ascend"),
    "horizons of floats": (dict(horizons=(1024.0,)), "horizons have 1024.0: must be integers"),
    "no horizon": (dict(horizons=(0, 1)), "horizons have 0: must be integers, in tokens, at least 1"),
    "one horizon": (dict(horizons=1024), "horizons are 1024: must be a tuple"),
    "two budgets": (dict(over=grid.over("train.tokens", [1024])), "train.tokens in the grid, and the study has horizons"),
    "stop": (dict(over=grid.over("train.stop_at_tokens", [5])), "config.train.stop_at_tokens is 5: must be 0 in a study"),
    "follow": (dict(over=grid.over("batch.schedule", ["constant", "follow"])), "config.batch.schedule is follow: not in a study"),
    "held-out tokens": (dict(over=grid.over("eval.tokens", [16, 32])), "eval.tokens differs in the grid: points are compared on the same"),
    "contexts": (dict(over=grid.over("model.context", [16, 32])), "model.context differs in the grid: points are compared on the same"),
    "member": (dict(over=grid.over("mesh.member", [1])), "config.mesh.member: must be 1 in a study"),
    "members": (dict(fields={"mesh__member": 2}), "config.mesh.member: must be 1 in a study"),
    "fraction": (dict(decay_fraction=1.0, **WSD), "decay_fraction is 1.0: must be greater than 0 and less than 1"),
    "negative fraction": (dict(decay_fraction=-0.1, **WSD), "decay_fraction is -0.1: must be greater than 0"),
    "fraction of what": (dict(decay_fraction=0.5), "decay_fraction is 0.5: is for schedule.name wsd, not constant"),
    "two decays": (dict(over=grid.over("schedule.decay_tokens", [5]), decay_fraction=0.5, **WSD), "schedule.decay_tokens in the grid"),
    "dtype": (dict(compute_dtype="bfloat16"), "compute_dtype is 'bfloat16': must be 'fastest'"),
    "two dtypes": (dict(over=grid.over("model.compute_dtype", ["float32"]), compute_dtype="fastest"), "model.compute_dtype in the grid"),
    "dtype of the base": (dict(fields={"model__compute_dtype": "fastest"}), "with the study's compute_dtype='fastest'"),
    "dtype in the grid": (dict(over=grid.over("model.compute_dtype", ["float32", "fastest"])), "config.model.compute_dtype is 'fastest'"),
    "cpus": (dict(cpus=0), "cpus is 0: must be an integer, at least 1"),
    "max_members": (dict(max_members=1.5), "max_members is 1.5: must be an integer, at least 1"),
    "tpus": (dict(tpus=-1), "tpus is -1: must be an integer, at least 0"),
    "rises": (dict(stop_after_rises=-1), "stop_after_rises is -1: must be an integer, at least 0"),
    "rises of each": (dict(stop_after_rises=1, schedule="cosine"), "stop_after_rises is 1: takes one run for all horizons"),
    "warmup": (dict(fields={"schedule__warmup_tokens": 2048}), "horizon 1024: config.schedule has 2048 tokens of warmup"),
    "warmup of each": (dict(fields={"schedule__warmup_tokens": 2048}, schedule="linear"), "horizon 1024: config.schedule has 2048 tokens"),
    "warmup of all": (dict(fields={"schedule__warmup_tokens": 5000}), "config.schedule.warmup_tokens is 5000: longer than the run"),
    "decay": (
        dict(fields={"schedule__warmup_tokens": 600, "schedule__decay_tokens": 600}, **WSD),
        "horizon 1024: config.schedule has 600 tokens of warmup and 600 of decay, more than there are",
    ),
    "decay of a fraction": (
        dict(fields={"schedule__warmup_tokens": 600}, decay_fraction=0.5, **WSD),
        "horizon 1024: config.schedule has 600 tokens of warmup and 512 of decay",
    ),
    "a stage": (
        dict(fields={"batch__schedule": "stages", "batch__stages": ("2048=256",)}, schedule="cosine"),
        "horizon 1024: config.batch.stages has '2048=256': must begin within the run",
    ),
    "a value": (dict(over=over_lr(0.1, -1)), "point optimizer.lr=-1.0: config.optimizer.lr is -1.0: must be greater than 0"),
    "a choice": (dict(over=grid.over("model.mlp", ["gelu", "geglu"])), "point model.mlp=geglu: config.model.mlp is 'geglu': must be one"),
    "no end": (dict(over=over_lr(float("inf"))), "config.optimizer.lr is inf: must be finite"),
    "not a number": (dict(over=over_lr(float("nan"))), "config.optimizer.lr is nan"),
    "a relation": (
        dict(over=grid.product(over_lr(0.1), grid.over("model.width", [16, 100]))),
        "point optimizer.lr=0.1, model.width=100: config.model.width is 100: must be a multiple of config.model.head_dim, 8",
    ),
    "the base": (dict(fields={"model__mlp": "geglu"}), "config.model.mlp is 'geglu'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(case):
    arguments, said = BAD[case]
    with pytest.raises(UserError) as error:
        resolve(study(**arguments))
    assert said in str(error.value) and len(str(error.value).split("\n")) == 1


def test_several_settings_are_said_at_once_and_of_faulty_points_five():
    with pytest.raises(UserError) as error:
        resolve(study(cpus=0, tpus=-1, horizons=(2, 1)))
    assert len(str(error.value).split("\n")) == 3
    with pytest.raises(UserError) as error:
        resolve(study(grid.product(grid.over("model.width", [16, 17, 18, 19]), grid.over("train.seed", [0, 1, 2]))))
    lines = str(error.value).split("\n")
    assert len(lines) == 6 and lines[-1] == "and 4 more"
    assert lines[0].startswith("point model.width=17, train.seed=0: config.model.width is 17: must be a multiple")


def test_a_point_of_many_contexts_is_no_fault_where_all_held_out_tokens_are_used():
    assert len(resolve(study(grid.over("model.context", [16, 32]), fields={"eval__tokens": 0}))) == 2
    assert only(fields={"mesh__fsdp": -1}).values["mesh.fsdp"] == -1  # as the workers find their devices


# The data's length


class Stream:
    """What TokenSource asks of a stream, of 100 sequences of 16 tokens."""

    directory = "here"

    def __len__(self):
        return 100 * 16 + 1


def length_check(values):
    chosen = {name: values[f"data.{name}"] for name in ("train_tokens", "repeat")}
    return TokenSource(Stream(), context=values["model.context"], seed=0, **chosen).check_length


def test_a_horizon_beyond_the_data_is_refused_unless_they_repeat():
    batches = grid.over("train.batch_tokens", [128, 256, 512])
    check_lengths(resolve(study(batches, horizons=(512, 1408))), length_check)  # 3 x 512 = 1536 of 1600
    with pytest.raises(UserError) as error:  # to a whole batch
        check_lengths(resolve(study(batches, horizons=(512, 1537))), length_check)
    assert "point train.batch_tokens=128: horizon 1537: the run reads 1664 tokens" in str(error.value)
    assert "1600" in str(error.value) and "config.data.repeat" in str(error.value)
    check_lengths(resolve(study(batches, horizons=(512, 1537), fields={"data__repeat": True})), length_check)
    with pytest.raises(UserError, match=r"point data.train_tokens=800: horizon 1024: .*800"):
        check_lengths(resolve(study(grid.over("data.train_tokens", [1600, 800]), horizons=(1024,))), length_check)


def test_a_ragged_grid_has_no_horizon_of_few_steps_after_warmup():
    config = small_config(schedule__name="constant", schedule__warmup_tokens=1024)
    points = grid.over("train.batch_tokens", (64, 256, 1024))
    horizons = (1663, 3584, 11_264, 11_265)  # the first ends a token short of ten steps of 64
    found = resolve(Study(config, points, horizons=horizons, least_steps=10))
    assert [point.horizons for point in found] == [horizons[1:], horizons[1:], horizons[2:]]
    everything = resolve(Study(config, points, horizons=horizons[1:]))
    assert [point.id for point in found] == [point.id for point in everything]
    assert {point.values["train.tokens"] for point in found} == {11_265}
    with pytest.raises(UserError, match=r"batch_tokens=1024: has 10 steps after its warmup by the last horizon, 11265, and .* is 11;"):
        resolve(Study(config, points, horizons=horizons, least_steps=11))
    config.schedule.name = "wsd"
    with pytest.raises(UserError, match="batch_tokens=1024: has 10 steps"):
        resolve(Study(config, points, horizons=horizons, least_steps=11, decay_fraction=0.2))
    with pytest.raises(UserError, match="least_steps is 5: .* must be 0"):
        resolve(Study(config, points, least_steps=5))


def test_where_a_horizon_ends():
    """A whole batch at or past it, as a run of that budget does."""
    assert [end_tokens(only().values, h) for h in (1, 128, 129)] == [128, 128, 256]
    staged = only(fields={"batch__schedule": "stages", "batch__stages": ("200=512",)}).values
    assert [end_tokens(staged, h) for h in (128, 256, 300, 800)] == [128, 256, 768, 1280]  # 128, 256 | 768, 1280


def test_data_keys_tell_apart_what_is_read():
    points = resolve(study(grid.product(over_lr(0.1, 0.2), grid.over("data.train_tokens", [320, 640]))))
    first, second, third, fourth = (data_key(point.values) for point in points)
    assert first == third != second == fourth


# Files


def test_a_study_is_left_as_it_is():
    base = small_config(schedule__name="constant")
    before = ml_collections.FrozenConfigDict(base)
    mine = Study(base, grid.over("model.width", [16, 32]), HORIZONS)
    resolve(mine)
    assert ml_collections.FrozenConfigDict(base) == before and dataclasses.replace(mine) == mine
