"""A study: a base config, a grid over its fields, and horizons in tokens; what its points and trajectories are, and how they are named.

A *point* is one assignment of the grid, resolved onto the base. It is named by its content: the identity fields of its config and the
fingerprint of its data. What follows from the horizons is no part of the name, so that a study can be given more of them. A *trajectory*
is what is trained: with a constant lr, or warmup-stable-decay, one serves all horizons of its point; with linear or cosine there is one
for each. Trajectories of one *class* differ in `VALUES` alone and are one compiled program.
"""

import dataclasses
import hashlib
import json
import math
import operator
import runpy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from scaling_jax import batch_schedule
from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.fields import FIELDS
from scaling_jax.sweep.faults import ONE_FOR_ALL, checked, taken
from scaling_jax.sweep.grid import Grid

VALUES = ("optimizer.lr", "optimizer.weight_decay", "train.seed", "parametrization.embedding_std", "parametrization.hidden_std")
WHOLE_RUN = 1 << 60  # noise_scale.window_tokens of a point that sets none: the later half of what was seen, whatever the horizon
MOST_SHOWN = 5  # faulty points

_IDENTITY = sorted(name for name, field in FIELDS.items() if not field.execution)
# Execution fields that make another program of a point, or other data to evaluate it on: never in one group.
_PROGRAM = ["train.accumulation", "model.remat", "model.attention", "model.loss_chunk_tokens", "eval.batch_sequences"]
_PROGRAM += [name for name in FIELDS if name.startswith("mesh.")] + ["data.path", "data.tokenizer", "data.eval_domains"]
_CLASS = sorted({*_IDENTITY, *_PROGRAM} - {*VALUES})
DATA = [*(name for name in FIELDS if name.startswith("data.")), "model.context", "model.vocab_size", "eval.tokens"]
_class_values, _data_values = operator.itemgetter(*_CLASS), operator.itemgetter(*DATA)
_canonical = json.JSONEncoder(sort_keys=True).encode


@dataclasses.dataclass(frozen=True)
class Study:
    """What a file's get_study() returns."""

    base: ConfigDict  # a changed scaling_jax.config.default_config()
    grid: Grid
    horizons: tuple[int, ...] = ()  # in tokens, ascending; () is each point's own train.tokens
    decay_fraction: float = 0.0  # wsd: a horizon's decay is this fraction of it; 0 is the config's schedule.decay_tokens
    compute_dtype: str = ""  # '' is the config's own; 'fastest' is measured once and stored in the plan
    cpus: int = 1  # threads of one group on a CPU
    tpus: int = 0  # chips of one group under Ray
    max_members: int = 16  # most trajectories that train together
    stop_after_rises: int = 0  # no further horizon of a point whose held-out loss rose at so many in a row; 0 is off
    least_steps: int = 0  # of train.batch_tokens after warmup, that a point must have taken by a horizon for it to have that one; 0 is all


class Point(NamedTuple):
    """One assignment of the grid. `derived` are the fields of `values` that follow from the horizons and are no part of `id`."""

    id: str
    fields: dict[str, Any]  # what the grid set
    values: dict[str, Any]  # every field of its config, train.tokens that of the last horizon
    horizons: tuple[int, ...]
    data: str = ""  # fingerprint of the training data
    derived: tuple[str, ...] = ()


class Trajectory(NamedTuple):
    """What is trained: a point to all its horizons, or, with a linear or cosine schedule, to one of them."""

    id: str
    point: Point
    horizons: tuple[int, ...]
    class_key: str


def load_study(spec: str, overrides: Mapping[str, Any] | None = None) -> Study:
    """What get_study() of a Python file returns; 'FILE:text' calls get_study('text').

    Args:
      spec: of the flag --config.
      overrides: values of fields of the base, by dotted name.

    Raises:
      UserError: there is no such file, its code fails (the line is named), it returns no Study; or an override is of a field that the
        study sets itself.
    """
    path, argument = config_lib.file_of(spec)
    try:
        names = runpy.run_path(path, run_name="scaling_jax_config")
        get_study = names.get("get_study")
        study = get_study(*argument) if callable(get_study) else None
    except (Exception, SystemExit) as error:  # whatever the file's own code raises
        of_config = not isinstance(error, AttributeError) or isinstance(error.obj, ConfigDict | None)
        said = str(error) if isinstance(error, UserError) else config_lib.reason(error, fields=of_config)
        raise UserError(f"--config={path}{config_lib.line_in(path, error)}: {said}") from error
    if not callable(get_study):
        if callable(names.get("get_config")):
            raise UserError(f"--config={path}: is the config of one run, get_config(); `scaling-jax train` runs it")
        raise UserError(f"--config={path}: defines no function get_study(); it must return a scaling_jax.sweep.study.Study")
    if not isinstance(study, Study):
        raise UserError(f"--config={path}: get_study() returned {type(study).__name__}; must return a scaling_jax.sweep.study.Study")
    return _overridden(study, overrides or {})


def _overridden(study: Study, overrides: Mapping[str, Any]) -> Study:
    if not overrides or not isinstance(study.base, ConfigDict):
        return study
    base = study.base.copy_and_resolve_references()
    for name, value in overrides.items():
        if isinstance(study.grid, Grid) and name in study.grid.names:
            raise UserError(f"--config.{name}={value}: the study's grid sets it; change the study's file")
        if name == "train.tokens" and study.horizons:
            raise UserError(f"--config.{name}={value}: the study's horizons set it; change the study's file")
        if name == "schedule.decay_tokens" and study.decay_fraction:
            raise UserError(f"--config.{name}={value}: the study's decay_fraction sets it; change the study's file")
        section, key = name.split(".")
        base[section][key] = taken(name, value)
    return dataclasses.replace(study, base=base)


def resolve(study: Study, fingerprint_of: Callable[[dict[str, Any]], str] | None = None, compute_dtype: str | None = None) -> list[Point]:
    """The points of a study, in the order of its grid, all checked.

    Args:
      study: as a file gave it.
      fingerprint_of: from the values of a point to the fingerprint of its training data; called once for each that `data_key` tells apart.
        None leaves the data out of the names, which are then others.
      compute_dtype: what 'fastest' was found to be; None while it is not decided: the base's own.

    Raises:
      UserError: with all that is wrong with the study; or with up to five of the points whose configs are no good; or with two points that
        are one.
    """
    base, assignments = checked(study)
    study = dataclasses.replace(study, horizons=tuple(map(int, study.horizons)))
    if study.compute_dtype and compute_dtype:
        base.model.compute_dtype = compute_dtype
    plain, check = config_lib.flatten(base), _Check(study.decay_fraction)
    points, faulty, fingerprints = [], [], {}
    for fields in assignments:
        values = plain | fields
        values["noise_scale.window_tokens"] = values["noise_scale.window_tokens"] or WHOLE_RUN
        horizons, derived = study.horizons or (values["train.tokens"],), ()
        if study.horizons:
            if study.least_steps:
                horizons = tuple(horizon for horizon in horizons if steps_after_warmup(values, horizon) >= study.least_steps)
            if not horizons:
                most = steps_after_warmup(values, study.horizons[-1])
                few = f"has {most} steps after its warmup by the last horizon, {study.horizons[-1]}, and least_steps is {study.least_steps}"
                faulty.append(f"point {describe(fields)}: {few}; take it out of the grid, or add a longer horizon")
                continue
            values["train.tokens"], derived = study.horizons[-1], ("train.tokens",)
        if study.decay_fraction and values["schedule.name"] == "wsd":
            values["schedule.decay_tokens"] = decay_tokens(study.decay_fraction, horizons[-1])
            derived += ("schedule.decay_tokens",)
        if found := check.faults(fields, values, horizons):
            faulty.append(f"point {describe(fields)}: {'; '.join(found)}")
            continue
        fingerprint = ""
        if fingerprint_of:
            if (key := data_key(values)) not in fingerprints:
                fingerprints[key] = fingerprint_of(values)
            fingerprint = fingerprints[key]
        identity = {name: values[name] for name in _IDENTITY if name not in derived} | {"data.fingerprint": fingerprint}
        points.append(Point(_digest(identity), fields, values, horizons, fingerprint, derived))
    if faulty:
        more = [f"and {len(faulty) - MOST_SHOWN} more"] if len(faulty) > MOST_SHOWN else []
        raise UserError("\n".join(faulty[:MOST_SHOWN] + more))
    _check_distinct(points)
    return points


class _Check:
    """Faults of points' configs: a field's own at every point, relations once for each assignment of fields that are not in VALUES."""

    def __init__(self, decay_fraction: float) -> None:
        self.decay_fraction = decay_fraction
        self.sound: set[tuple[str, Any]] = set()
        self.related: dict[tuple[tuple[str, Any], ...], list[str]] = {}

    def faults(self, fields: dict[str, Any], values: dict[str, Any], horizons: tuple[int, ...]) -> list[str]:
        for item in fields.items():
            if item not in self.sound:
                if not _within(*item):
                    return _said(values)
                self.sound.add(item)
        key = tuple(item for item in fields.items() if item[0] not in VALUES)
        if key not in self.related:
            self.related[key] = self._relations(values, horizons)
        return self.related[key]

    def _relations(self, values: dict[str, Any], horizons: tuple[int, ...]) -> list[str]:
        faults = config_lib.relation_faults(_Sections(values), None)
        if faults or len(horizons) == 1:
            return faults
        schedule, warmup, first, decay = values["schedule.name"], values["schedule.warmup_tokens"], horizons[0], 0
        if schedule not in ONE_FOR_ALL and values["batch.schedule"] == "stages":  # which begin within each horizon's own run
            faults = config_lib.relation_faults(_Sections(values | {"train.tokens": first}), None)
        elif schedule == "wsd":
            decay = decay_tokens(self.decay_fraction, first) if self.decay_fraction else values["schedule.decay_tokens"]
        if not faults and warmup + decay > first:
            what = f"{warmup} tokens of warmup" + (f" and {decay} of decay" if decay else "")
            faults = [f"config.schedule has {what}, more than there are; must be at most {first}"]
        return [f"horizon {first}: {fault}" for fault in faults]


class _Section(dict):
    __getattr__ = dict.__getitem__


class _Sections(_Section):
    """A config to be read alone, from values by dotted name. A ConfigDict takes ten times as long, which ten thousand points feel."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in values.items():
            section, key = name.split(".")
            self.setdefault(section, _Section())[key] = value


def _said(values: Mapping[str, Any]) -> list[str]:
    """In the words of `config.validate`, what is wrong with the fields of a config."""
    try:
        config_lib.validate(config_of(values))
    except UserError as error:
        return str(error).split("\n")
    return []


def _within(name: str, value: Any) -> bool:
    """Whether a value of the right type is one that the field may have."""
    field = FIELDS[name]
    return not (
        (field.choices and value not in field.choices)
        or (field.minimum is not None and not value >= field.minimum)
        or (field.above is not None and not value > field.above)
        or (field.below is not None and not value < field.below)
        or (isinstance(value, float) and not math.isfinite(value))
    )


def _check_distinct(points: list[Point]) -> None:
    seen: dict[str, Point] = {}
    for point in points:
        other = seen.setdefault(point.id, point)
        if other is point:
            continue
        differ = [name for name in other.fields | point.fields if other.values[name] != point.values[name]]
        if not differ:
            raise UserError(f"the grid has the point {describe(point.fields)} twice; each must be another config")
        execution = all(FIELDS[name].execution for name in differ)
        why = "only says how a run is carried out, not what it is" if execution else "makes no difference here"
        raise UserError(
            f"two points of the grid are one run: {describe(other.fields)} and {describe(point.fields)} differ in "
            f"{', '.join(differ)}, which {why}; leave one of them out"
        )


def check_lengths(points: Iterable[Point], check_of: Callable[[dict[str, Any]], Callable[[int], None]]) -> None:
    """UserError for a horizon that the data are too short for: one pass, unless data.repeat.

    Args:
      points: resolved.
      check_of: from the values of a point to `TokenSource.check_length` of its data; called once for each that `data_key` tells apart.
    """
    checks: dict[Any, Callable[[int], None]] = {}
    done = set()
    for point in points:
        values, key = point.values, data_key(point.values)
        case = (key, values["train.batch_tokens"], values["batch.schedule"], values["batch.stages"], point.horizons[-1])
        if case in done:
            continue
        done.add(case)
        if key not in checks:
            checks[key] = check_of(values)
        try:
            checks[key](end_tokens(values, point.horizons[-1]))
        except UserError as error:
            raise UserError(f"point {describe(point.fields)}: horizon {point.horizons[-1]}: {error}") from error


def data_key(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Points for which this is the same read the same data, cut in the same way."""
    return _data_values(values)


def end_tokens(values: Mapping[str, Any], horizon: int) -> int:
    """Tokens of the first whole batch at or past the horizon: where the loss of that horizon is measured."""
    if values["batch.schedule"] == "constant":
        return -(-horizon // values["train.batch_tokens"]) * values["train.batch_tokens"]
    train = {"tokens": horizon, "batch_tokens": values["train.batch_tokens"]}
    batch = {"schedule": values["batch.schedule"], "stages": values["batch.stages"]}
    return batch_schedule.end_tokens(ConfigDict({"train": train, "batch": batch}))


def steps_after_warmup(values: Mapping[str, Any], horizon: int) -> int:
    """Whole steps of the (first) batch size between the warmup and a horizon; negative where that is within the warmup."""
    return (horizon - values["schedule.warmup_tokens"]) // values["train.batch_tokens"]


def decay_tokens(fraction: float, horizon: int) -> int:
    """Tokens of decay at the end of a horizon of which they are this fraction."""
    return max(1, round(fraction * horizon))


def trajectories(points: Iterable[Point]) -> list[Trajectory]:
    """What is trained for these points, in their order, and of each by horizon."""
    found, digests = [], {}
    for point in points:
        of_each = point.values["schedule.name"] not in ONE_FOR_ALL
        left_out = (*point.derived, "train.tokens") if of_each else point.derived
        program = (*_class_values(point.values), point.data, left_out)
        if program not in digests:
            digests[program] = _digest({name: point.values[name] for name in _CLASS if name not in left_out} | {"data": point.data})
        for horizon in point.horizons if of_each else ():
            class_key = _digest({"program": digests[program], "train.tokens": horizon})
            found.append(Trajectory(f"{point.id}-{horizon}", point, (horizon,), class_key))
        if not of_each:
            found.append(Trajectory(point.id, point, point.horizons, digests[program]))
    return found


def config_of(values: Mapping[str, Any]) -> ConfigDict:
    """The config with these values, by dotted name; a field that they lack has its default. Lists become tuples."""
    config = config_lib.default_config()
    for name, value in values.items():
        section, key = name.split(".")
        config[section][key] = tuple(value) if isinstance(value, list) else value
    return config


def describe(fields: Mapping[str, Any]) -> str:
    """'optimizer.lr=0.1, model.width=128', '(the base)' for a point that sets nothing."""
    return ", ".join(f"{name}={value}" for name, value in fields.items()) or "(the base)"


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(identity).encode()).hexdigest()[:16]
