"""plan.json of a study: its points, who trains together, and what was decided by measuring. Written by the driver alone, read by workers.

Nothing that is in a plan is decided again: points that are added get groups of their own and leave the earlier ones as they are, and what a
config no longer has stays, with its results.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax import storage
from scaling_jax.errors import UserError
from scaling_jax.fields import FIELDS
from scaling_jax.sweep.study import Point, Study, Trajectory, config_of, decay_tokens

FILE, VERSION = "plan.json", 1
_FIXED = ("decay_fraction", "stop_after_rises")  # settings that decide what a cell is
_SETTINGS = (*_FIXED, "cpus", "tpus", "max_members")
_MOST_SHOWN = 4  # values of a field


@dataclasses.dataclass(frozen=True)
class Plan:
    """What plan.json holds, in JSON's own types: tuples are lists. Made by `extend` and `read_plan`, never changed."""

    base: dict[str, Any]  # every field of the first config
    execution: dict[str, Any]  # execution fields of the newest
    settings: dict[str, Any]  # of the study: decay_fraction, stop_after_rises, cpus, tpus, max_members
    data: dict[str, str]  # fingerprint: path and tokenizer
    compute_dtype: str | None  # that was found to be the fastest; None where nothing was to decide
    classes: dict[str, dict[str, Any]]  # class key: members, seconds_per_step, params, flops_per_token, …
    points: dict[str, dict[str, Any]]  # point id: values (where they differ from the base), fields (that the grid set), data
    groups: dict[str, dict[str, Any]]  # group id: class, trajectories [[trajectory id, point id], …], horizons
    order: list[str]  # group ids, most FLOPs first

    def config(self, point_id: str, horizon: int | None = None) -> ConfigDict:
        """The config of a point that ends at `horizon`; None is the last that the plan has for it."""
        values = self.base | self.execution | self.points[point_id]["values"]
        values["train.tokens"] = self.last_horizon(point_id) if horizon is None else horizon
        fraction = self.settings["decay_fraction"]
        if fraction and values["schedule.name"] == "wsd":
            values["schedule.decay_tokens"] = decay_tokens(fraction, values["train.tokens"])
        return config_of(values)

    def last_horizon(self, point_id: str) -> int:
        """The last horizon of any of the point's trajectories."""
        return max(group["horizons"][-1] for group in self.groups.values() if any(point == point_id for _, point in group["trajectories"]))

    def group_flops(self, group_id: str) -> float:
        """Of all members, to the last horizon; a decay that branches off is not counted."""
        group = self.groups[group_id]
        return self.classes[group["class"]]["flops_per_token"] * group["horizons"][-1] * len(group["trajectories"])


def read_plan(directory: epath.PathLike) -> Plan | None:
    """The plan in a study's directory, None where there is none; UserError where it is damaged or of another version."""
    path = epath.Path(directory) / FILE
    stored = storage.read_json(path)
    if stored is None:
        return None
    names = [field.name for field in dataclasses.fields(Plan)]
    if not isinstance(stored, dict) or "version" not in stored:
        raise UserError(f"{path}: not a plan that scaling_jax wrote; restore it, or give another directory")
    if stored["version"] != VERSION:
        raise UserError(f"{path}: is of version {stored['version']!r}, this scaling_jax writes {VERSION}; give another directory")
    dicts = [name for name in names if name not in ("compute_dtype", "order")]
    if missing := [name for name in dicts if not isinstance(stored.get(name), dict)] or [name for name in names if name not in stored]:
        raise UserError(f"{path}: damaged: has no {', '.join(missing)}; restore it, or give another directory")
    lacking = [f"settings.{name}" for name in _SETTINGS if name not in stored["settings"]]
    lacking += [f"config.{name}" for name in FIELDS if name not in stored["base"]]
    for name, group in stored["groups"].items():
        sound = isinstance(group, dict) and group.keys() >= {"class", "trajectories", "horizons"} and group["class"] in stored["classes"]
        lacking += [] if sound and all(point in stored["points"] for _, point in group["trajectories"]) else [f"what group {name} needs"]
    if set(stored["order"]) != set(stored["groups"]):
        lacking.append("an order of its groups")
    if lacking:
        raise UserError(f"{path}: damaged, or of another version: has no {', '.join(lacking[:3])}; restore it, or give another directory")
    if unknown := [name for name in stored["base"] if name not in FIELDS]:
        raise UserError(f"{path}: has config.{unknown[0]}, which is no field of this scaling_jax; give another directory")
    return Plan(**{name: stored[name] for name in names})


def write_plan(directory: epath.PathLike, plan: Plan) -> None:
    """Whole or not at all."""
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(Plan)}
    storage.write_json(epath.Path(directory) / FILE, {"version": VERSION, **values})


def undecided(plan: Plan | None, trajectories: Iterable[Trajectory]) -> list[str]:
    """Keys of the classes of which no group size is decided, in the order of trajectories; those that have a group need none.

    Where there was only one of a kind, nothing was measured: with others it is decided anew, for them.
    """
    grouped = _grouped(plan)
    decided = {key for key, values in plan.classes.items() if values.get("seconds_per_step") or values["members"] > 1} if plan else set()
    return list(dict.fromkeys(t.class_key for t in trajectories if t.id not in grouped and t.class_key not in decided))


def extend(
    plan: Plan | None, study: Study, points: Sequence[Point], trajectories: Sequence[Trajectory], decided: Mapping[str, dict[str, Any]]
) -> Plan:
    """The plan with a command's points in it.

    New trajectories get new groups, in the order of the points: of one class, as few groups as its `members` allow, of sizes that differ by
    one at most. Horizons are added to groups that one run takes to all of them.

    Args:
      plan: of earlier commands, or None.
      study: of this one.
      points, trajectories: its own, resolved.
      decided: by class key, at least `members` of every class that is `undecided`.

    Raises:
      UserError: the plan is of another study or of other data, or a setting that decides what a cell is has changed.
    """
    settings = {name: getattr(study, name) for name in _SETTINGS}
    plain = _plain(config_lib.flatten(study.base))
    execution = {name: value for name, value in plain.items() if FIELDS[name].execution} | {"checkpoint.keep_at_tokens": []}
    if plan is None:
        plan = Plan(plain, execution, settings, {}, None, {}, {}, {}, [])
    else:
        _check_same(plan, settings, points)
    classes = plan.classes | {key: dict(decided[key]) for key in undecided(plan, trajectories)}
    for trajectory in trajectories:
        if "flops_per_token" not in classes.get(trajectory.class_key, {"flops_per_token"}):
            classes[trajectory.class_key] |= model_size(trajectory.point.values)
    groups = _with_horizons(plan, trajectories) | _new_groups(plan, trajectories, classes)
    extended = dataclasses.replace(
        plan,
        execution=execution,
        settings=settings,
        data=plan.data | {point.data: data_name(point.values) for point in points if point.data},
        compute_dtype=plan.compute_dtype or (points[0].values["model.compute_dtype"] if study.compute_dtype else None),
        classes=classes,
        points=plan.points | {point.id: _entry(point, plan.base) for point in points},
        groups=groups,
    )
    return dataclasses.replace(extended, order=sorted(groups, key=lambda group: -extended.group_flops(group)))


def data_name(values: Mapping[str, Any]) -> str:
    """What a person calls the data of a point: their path and tokenizer."""
    return f"{values['data.path']} ({values['data.tokenizer']})"


def model_size(values: Mapping[str, Any]) -> dict[str, int]:
    """`params`, N without embeddings, and `flops_per_token` of a config's model."""
    from scaling_jax.model import TransformerConfig  # imports jax

    fields = {name.split(".")[1]: value for name, value in values.items() if name.startswith("model.")}
    model = TransformerConfig(**(fields | {"attention": "einsum"}))
    return {"params": model.params, "flops_per_token": model.flops_per_token}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _entry(point: Point, base: Mapping[str, Any]) -> dict[str, Any]:
    """Of its values those that say what the point is, and those that the grid set; what follows from the horizons is left out."""
    own = {
        name: value
        for name, value in _plain(point.values).items()
        if name not in point.derived and (name in point.fields or not FIELDS[name].execution)
    }
    values = {name: value for name, value in own.items() if name in point.fields or value != base.get(name)}
    return {"values": values, "fields": _plain(point.fields), "data": point.data}


def _grouped(plan: Plan | None) -> set[str]:
    return {trajectory for group in plan.groups.values() for trajectory, _ in group["trajectories"]} if plan else set()


def _with_horizons(plan: Plan, trajectories: Sequence[Trajectory]) -> dict[str, dict[str, Any]]:
    """The groups that there are, with the horizons that a command adds."""
    wanted = {t.id: t.horizons for t in trajectories}
    groups = {}
    for name, group in plan.groups.items():
        horizons = sorted({*group["horizons"]}.union(*(wanted.get(trajectory, ()) for trajectory, _ in group["trajectories"])))
        groups[name] = group | {"horizons": horizons}
    return groups


def _new_groups(plan: Plan, trajectories: Sequence[Trajectory], classes: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    grouped, alike = _grouped(plan), {}
    for trajectory in trajectories:
        if trajectory.id not in grouped:
            alike.setdefault((trajectory.class_key, trajectory.horizons), []).append(trajectory)
    groups = {}
    for (class_key, horizons), found in alike.items():
        for chunk in balanced(found, classes[class_key]["members"]):
            name = hashlib.sha256(" ".join(t.id for t in chunk).encode()).hexdigest()[:12]
            groups[name] = {"class": class_key, "trajectories": [[t.id, t.point.id] for t in chunk], "horizons": list(horizons)}
    return groups


def balanced(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """In their order, as few chunks of at most `most` as there can be, of sizes that differ by one at most."""
    count = -(-len(items) // most)
    ends = [len(items) * i // count for i in range(count + 1)]
    return [items[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def _check_same(plan: Plan, settings: Mapping[str, Any], points: Sequence[Point]) -> None:
    for name in _FIXED:
        if settings[name] != plan.settings[name]:
            raise UserError(
                f"the study's {name} is {settings[name]}: in its plan it is {plan.settings[name]}, and results hang on it; must stay, or "
                "give another --workdir"
            )
    there = {name: fingerprint for fingerprint, name in plan.data.items()}
    for name, point in {data_name(point.values): point for point in points}.items():
        if there.get(name, point.data) != point.data and point.data not in plan.data:
            raise UserError(
                f"config.data.path is {point.values['data.path']}: holds other data than the study was begun with "
                f"({point.data[:12]}, not {there[name][:12]}); restore them, or give another --workdir"
            )
    if plan.points and not any(point.id in plan.points for point in points):
        raise UserError(f"--workdir: holds another study; give another directory. What differs:\n{_differences(plan, points)}")


def _differences(plan: Plan, points: Sequence[Point]) -> str:
    """A line for each field of which no value is in both, or, where there is none, of which some are not."""
    left_out = {name for point in points for name in point.derived}
    here, there = [_plain(point.values) for point in points], [plan.base | entry["values"] for entry in plan.points.values()]
    apart, partly = [], []

    def compare(name: str, ours: Iterable[str], theirs: Iterable[str]) -> None:
        ours, theirs = dict.fromkeys(ours), dict.fromkeys(theirs)
        if ours.keys() != theirs.keys():
            (partly if ours.keys() & theirs.keys() else apart).append(f"  {name}: {_some(theirs)} there, {_some(ours)} here")

    for name in [name for name, field in FIELDS.items() if not field.execution and name not in left_out]:
        compare(f"config.{name}", (repr(values.get(name)) for values in here), (repr(values.get(name)) for values in there))
    compare("training data", (point.data[:12] for point in points), (entry["data"][:12] for entry in plan.points.values()))
    return "\n".join(apart or partly or ["  which values of the grid go together"])


def _some(values: Iterable[str]) -> str:
    shown = list(values)
    return ", ".join(shown[:_MOST_SHOWN]) + (", …" if len(shown) > _MOST_SHOWN else "")
