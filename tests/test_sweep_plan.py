"""Plans: what was decided stays decided, whatever points and horizons a study is given later."""

import json
import time

import pytest
from helpers import small_config

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.sweep import grid
from scaling_jax.sweep.plan import balanced, extend, read_plan, undecided, write_plan
from scaling_jax.sweep.study import Study, resolve, trajectories

DATA = {"sotu": "d" * 64}


def study(over, horizons=(1024, 4096), schedule="constant", fields=None, **settings):
    return Study(small_config(schedule__name=schedule, **(fields or {})), over, horizons, **settings)


def commanded(plan, mine, members=2, data=DATA, dtype=None):
    """The plan after a command, and its points; every class that is undecided gets so many members."""
    points = resolve(mine, lambda values: data[values["data.path"]], dtype)
    found = trajectories(points)
    decided = {key: {"members": members, "why": "asked"} for key in undecided(plan, found)}
    return extend(plan, mine, points, found, decided), points


def over_lr(*lrs):
    return grid.over("optimizer.lr", lrs)


def groups_of(plan):
    return {name: (group["class"], [tid for tid, _ in group["trajectories"]]) for name, group in plan.groups.items()}


def test_a_plan_comes_back_from_its_file(tmp_path):
    over = grid.product(grid.over("model.width", [16, 32]), grid.over("data.eval_domains", [("a=b",)]), over_lr(0.1, 0.2, 0.3))
    plan, _ = commanded(None, study(over, cpus=2))
    assert read_plan(tmp_path) is None
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    assert plan.settings == {"decay_fraction": 0.0, "stop_after_rises": 0, "cpus": 2, "tpus": 0, "max_members": 16}
    assert plan.data == {DATA["sotu"]: "sotu (bytes)"} and plan.compute_dtype is None


@pytest.mark.parametrize("schedule, settings", [("constant", {}), ("cosine", {}), ("wsd", {"decay_fraction": 0.25})])
def test_the_config_of_a_point_is_that_of_the_run_alone(tmp_path, schedule, settings):
    over = grid.product(grid.over("model.width", [16, 32]), grid.over("model.remat", ["full"]), over_lr(0.1, 0.2))
    plan, points = commanded(None, study(over, schedule=schedule, **settings))
    write_plan(tmp_path, plan)
    for point in points:
        for horizon in point.horizons:
            config = read_plan(tmp_path).config(point.id, horizon)
            expected = point.values | {"train.tokens": horizon}
            if settings:
                expected["schedule.decay_tokens"] = horizon // 4
            assert config_lib.flatten(config) == expected
            config_lib.validate(config)
        assert plan.config(point.id) == plan.config(point.id, 4096)


def test_groups_are_few_and_even_and_the_largest_come_first():
    over = grid.product(grid.over("model.width", [16, 32]), over_lr(0.1, 0.2, 0.3, 0.4, 0.5))
    plan, points = commanded(None, study(over), members=2)
    sizes = {len(group["trajectories"]) for group in plan.groups.values()}
    assert len(plan.groups) == 6 and sizes == {1, 2}
    assert [point for _, tids in groups_of(plan).values() for point in tids] == [point.id for point in points]
    width_of = {point.id: point.values["model.width"] for point in points}
    cost = [
        (width_of[group["trajectories"][0][1]] ** 2 * 12 * 2 * 6 + 12 * 2 * 16 * width_of[group["trajectories"][0][1]])
        * len(group["trajectories"])
        for group in (plan.groups[name] for name in plan.order)
    ]
    assert cost == sorted(cost, reverse=True) and sorted(plan.order) == sorted(plan.groups)
    assert [plan.group_flops(name) for name in plan.order] == pytest.approx([4096 * c for c in cost])


@pytest.mark.parametrize("count", range(1, 30))
@pytest.mark.parametrize("most", [1, 3, 8])
def test_balanced_chunks(count, most):
    chunks = balanced(list(range(count)), most)
    sizes = [len(chunk) for chunk in chunks]
    assert [item for chunk in chunks for item in chunk] == list(range(count))
    assert len(sizes) == -(-count // most) and max(sizes) <= most and max(sizes) - min(sizes) <= 1


def test_the_same_command_again_changes_nothing():
    mine = study(over_lr(0.1, 0.2, 0.3))
    plan, points = commanded(None, mine)
    assert undecided(plan, trajectories(points)) == []
    assert commanded(plan, mine)[0] == plan


def test_points_added_later_never_regroup_earlier_ones():
    plan, points = commanded(None, study(over_lr(0.1, 0.3, 0.5)), members=2)
    later = study(grid.chain(over_lr(0.05, 0.1, 0.2, 0.3, 0.4, 0.5), grid.product(grid.over("model.width", [32]), over_lr(0.1))))
    found = trajectories(resolve(later, lambda values: DATA["sotu"]))
    assert undecided(plan, found) == [found[-1].class_key]  # the other class is known
    longer, _ = commanded(plan, later, members=7)
    assert groups_of(plan).items() <= groups_of(longer).items()
    new = {name: group for name, group in longer.groups.items() if name not in plan.groups}
    assert sorted(len(group["trajectories"]) for group in new.values()) == [1, 1, 2]  # by the two members that were decided first
    assert longer.classes[found[0].class_key] == plan.classes[found[0].class_key] and longer.classes[found[-1].class_key]["members"] == 7
    shorter, _ = commanded(longer, study(over_lr(0.1)))
    assert shorter.points == longer.points and groups_of(shorter) == groups_of(longer)  # what is not asked for stays


def test_horizons_are_added_to_the_groups_of_one_run_and_else_are_new_runs():
    over = over_lr(0.1, 0.2)
    plan, points = commanded(None, study(over))
    longer, again = commanded(plan, study(over, horizons=(2048, 8192)))
    assert groups_of(longer) == groups_of(plan) and [point.id for point in again] == [point.id for point in points]
    assert [group["horizons"] for group in longer.groups.values()] == [[1024, 2048, 4096, 8192]]
    assert longer.config(points[0].id).train.tokens == 8192
    plan, _ = commanded(None, study(over, schedule="cosine"))
    longer, _ = commanded(plan, study(over, schedule="cosine", horizons=(1024, 8192)))
    assert sorted(group["horizons"] for group in longer.groups.values()) == [[1024], [4096], [8192]]
    assert groups_of(plan).items() <= groups_of(longer).items()


def test_execution_is_that_of_the_newest_command():
    over = over_lr(0.1, 0.2)
    plan, points = commanded(None, study(over, fields={"data__path": "sotu", "logging__every_tokens": 128}))
    moved, _ = commanded(
        plan, study(over, fields={"data__path": "moved", "eval__batch_sequences": 4}, cpus=3), data={"moved": DATA["sotu"]}
    )
    assert moved.points.keys() == plan.points.keys() and groups_of(moved) == groups_of(plan) and moved.settings["cpus"] == 3
    config = moved.config(points[0].id)
    assert (config.data.path, config.eval.batch_sequences, config.logging.every_tokens) == ("moved", 4, 0)
    assert moved.data == {DATA["sotu"]: "moved (bytes)"}
    third, _ = commanded(moved, study(over_lr(0.2)))  # without the first point
    assert third.config(points[0].id).eval.batch_sequences == 128


def test_what_is_grouped_is_decided_however_it_is_carried_out():
    plan, points = commanded(None, study(over_lr(0.1, 0.2)))
    otherwise = trajectories(resolve(study(over_lr(0.1, 0.2), fields={"model__remat": "full"}), lambda values: DATA["sotu"]))
    assert otherwise[0].class_key not in plan.classes and undecided(plan, otherwise) == []


def test_the_dtype_that_was_found_is_kept():
    mine = study(over_lr(0.1), compute_dtype="fastest")
    plan, points = commanded(None, mine, dtype="bfloat16")
    assert plan.compute_dtype == "bfloat16" and plan.config(points[0].id).model.compute_dtype == "bfloat16"
    assert commanded(plan, mine, dtype=plan.compute_dtype)[0] == plan


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(over=over_lr(0.1, 0.2), fields={"model__depth": 3}), "config.model.depth: 2 there, 3 here"),
        (dict(over=over_lr(0.3, 0.4)), "config.optimizer.lr: 0.1, 0.2 there, 0.3, 0.4 here"),
        (dict(over=over_lr(0.1, 0.2), schedule="linear"), "config.schedule.name: 'constant' there, 'linear' here"),
    ],
)
def test_another_study_is_refused_with_what_differs(other, said):
    plan, _ = commanded(None, study(over_lr(0.1, 0.2)))
    with pytest.raises(UserError) as error:
        commanded(plan, study(**other))
    assert "holds another study" in str(error.value) and str(error.value).split("\n")[1:] == [f"  {said}"]


def test_other_data_are_refused():
    plan, _ = commanded(None, study(over_lr(0.1)))
    with pytest.raises(UserError, match=r"config.data.path is sotu: holds other data .* \(eeeeeeeeeeee, not dddddddddddd\)"):
        commanded(plan, study(over_lr(0.1)), data={"sotu": "e" * 64})
    with pytest.raises(UserError, match="another study.*\n  training data: dddddddddddd there, eeeeeeeeeeee here$"):
        commanded(plan, study(over_lr(0.1), fields={"data__path": "x"}), data={"x": "e" * 64})


@pytest.mark.parametrize("name, value, schedule", [("stop_after_rises", 2, "constant"), ("decay_fraction", 0.5, "wsd")])
def test_settings_that_decide_a_result_stay(name, value, schedule):
    settings = {"decay_fraction": 0.25} if schedule == "wsd" else {}
    plan, _ = commanded(None, study(over_lr(0.1), schedule=schedule, **settings))
    with pytest.raises(UserError, match=f"the study's {name} is {value}: in its plan it is"):
        commanded(plan, study(over_lr(0.1), schedule=schedule, **(settings | {name: value})))


def test_a_damaged_plan_is_named(tmp_path):
    plan, _ = commanded(None, study(over_lr(0.1)))
    write_plan(tmp_path, plan)
    sound = json.loads((tmp_path / "plan.json").read_text())
    for stored, said in (
        (sound | {"version": 2}, "is of version 2, this scaling_jax writes 1"),
        ({"my": "plan"}, "not a plan that scaling_jax wrote"),
        ([], "not a plan that scaling_jax wrote"),
        ({name: value for name, value in sound.items() if name != "order"}, "damaged: has no order"),
        (sound | {"groups": [], "points": 1}, "damaged: has no points, groups"),
        (sound | {"base": sound["base"] | {"model.height": 1}}, "has config.model.height, which is no field"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(stored))
        with pytest.raises(UserError) as error:
            read_plan(tmp_path)
        assert said in str(error.value) and str(tmp_path / "plan.json") in str(error.value)


def test_a_plan_of_ten_thousand_points_is_quickly_made(tmp_path):
    """1.5 s on a quiet core to make, write and read; three times that here, of this process's own time."""
    mine = study(grid.product(over_lr(*(0.001 * i for i in range(1, 101))), grid.over("train.seed", range(100))))
    points = resolve(mine)
    found = trajectories(points)
    begun = time.process_time()
    plan = extend(None, mine, points, found, {found[0].class_key: {"members": 16}})
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan and len(plan.groups) == 625
    assert time.process_time() - begun < 4.5


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored["settings"].pop("stop_after_rises"),
        lambda stored: next(iter(stored["groups"].values())).pop("class"),
        lambda stored: stored["order"].append("unknown"),
        lambda stored: stored["base"].pop("optimizer.b2"),
        lambda stored: stored["points"].clear(),
    ],
)
def test_a_plan_that_lacks_something_is_refused(tmp_path, damage):
    plan, _ = commanded(None, study(over_lr(0.1, 0.3)), members=2)
    write_plan(tmp_path, plan)
    stored = json.loads((tmp_path / "plan.json").read_text())
    damage(stored)
    (tmp_path / "plan.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="plan.json: damaged, or of another version"):
        read_plan(tmp_path)


def test_a_class_of_which_there_was_one_is_decided_anew_with_others():
    plan, _ = commanded(None, study(over_lr(0.1)), members=1)
    later = study(over_lr(0.1, 0.2, 0.3))
    found = trajectories(resolve(later, lambda values: DATA["sotu"]))
    assert undecided(plan, found) == [found[0].class_key]
    more = extend(plan, later, resolve(later, lambda values: DATA["sotu"]), found, {found[0].class_key: {"members": 2}})
    assert sorted(len(group["trajectories"]) for group in more.groups.values()) == [1, 2]
