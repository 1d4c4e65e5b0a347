"""What is wrong with a study before any of its points is looked at; all of it at once."""

import contextlib
import numbers
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.fields import FIELDS
from scaling_jax.sweep.grid import Grid

if TYPE_CHECKING:
    from scaling_jax.sweep.study import Study

ONE_FOR_ALL = ("constant", "wsd")  # schedules of which one trajectory serves all horizons
_INTEGERS = {"cpus": 1, "tpus": 0, "max_members": 1, "stop_after_rises": 0, "least_steps": 0}  # least values


def taken(name: str, value: Any) -> Any:
    """`value` in the type of the field: an integer for a number, a list for a tuple, NumPy's scalars; UserError for anything else."""
    kind = type(FIELDS[name].default)
    if type(value) is kind and kind is not tuple:
        return value + 0.0 if kind is float else value  # -0.0 is 0.0
    if not isinstance(value, bool):
        if kind is float and isinstance(value, numbers.Real):
            with contextlib.suppress(OverflowError):  # an integer beyond 1.8e308
                return float(value)
        if kind is int and isinstance(value, numbers.Integral):
            return int(value)
        if kind is tuple and isinstance(value, tuple | list) and all(isinstance(entry, str | int) for entry in value):
            return tuple(value)
    raise UserError(f"config.{name} is {value!r}: must be of type {kind.__name__}")


def checked(study: "Study") -> tuple[ConfigDict, list[dict[str, Any]]]:
    """The base of a study's points, a copy, and the assignments of its grid, their values in the fields' own types.

    train.tokens of the base is the last horizon, where there are horizons. UserError with everything that is wrong.
    """
    for what, kind in (("base", ConfigDict), ("grid", Grid)):
        if not isinstance(getattr(study, what), kind):
            must = "a changed scaling_jax.config.default_config()" if kind is ConfigDict else "made by scaling_jax.sweep.grid"
            raise UserError(f"the study's {what} is of type {type(getattr(study, what)).__name__}: must be {must}")
    base = study.base.copy_and_resolve_references()
    if faults := config_lib.field_faults(base):
        raise UserError("\n".join(faults))
    assignments, faults = _assignments(study.grid)
    faults += _setting_faults(study) + _horizon_faults(study)
    if faults:
        raise UserError("\n".join(faults))
    faults = _use_faults(study, config_lib.flatten(base), assignments)
    if faults:
        raise UserError("\n".join(faults))
    if study.horizons:
        base.train.tokens = int(study.horizons[-1])
    base.checkpoint.keep_at_tokens = ()  # a group's checkpoints are its own
    return base, assignments


def _assignments(grid: Grid) -> tuple[list[dict[str, Any]], list[str]]:
    if not len(grid):
        return [], ["the study's grid has no points; it must have at least one (grid.product() is the base alone)"]
    unknown = [f"{name} in the grid: no such field{config_lib.nearest(str(name))}" for name in grid.names if name not in FIELDS]
    if unknown:
        return [], unknown
    found, faults = [], {}
    for assignment in grid:
        try:
            found.append({name: taken(name, value) for name, value in assignment.items()})
        except UserError as error:
            faults[f"{error}, in the grid"] = None  # each once
    return found, list(faults)[:5]


def _setting_faults(study: "Study") -> list[str]:
    faults = []
    for name, least in _INTEGERS.items():
        value = getattr(study, name)
        if type(value) is not int or value < least:
            faults.append(f"the study's {name} is {value!r}: must be an integer, at least {least}")
    fraction = study.decay_fraction
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
        faults.append(f"the study's decay_fraction is {fraction!r}: must be greater than 0 and less than 1, or 0 for schedule.decay_tokens")
    if study.compute_dtype not in ("", "fastest"):
        faults.append(f"the study's compute_dtype is {study.compute_dtype!r}: must be 'fastest', or '' for the config's own")
    return faults


def _horizon_faults(study: "Study") -> list[str]:
    horizons = study.horizons
    if not isinstance(horizons, tuple | list):
        return [f"the study's horizons are {horizons!r}: must be a tuple of tokens"]
    for horizon in horizons:
        if isinstance(horizon, bool) or not isinstance(horizon, numbers.Integral) or horizon < 1:
            return [f"the study's horizons have {horizon!r}: must be integers, in tokens, at least 1"]
    for earlier, later in zip(horizons, horizons[1:], strict=False):
        if later <= earlier:
            return [f"the study's horizons have {later} after {earlier}: must ascend, each once"]
    return []


def _use_faults(study: "Study", plain: dict[str, Any], assignments: list[dict[str, Any]]) -> list[str]:
    """Fields that a study does not let the grid, or anybody, set."""
    faults, names = [], study.grid.names

    def of(name: str) -> set[Any]:
        return {fields.get(name, plain[name]) for fields in assignments}

    if "train.tokens" in names and study.horizons:
        faults.append("train.tokens in the grid, and the study has horizons: these are the tokens; leave out one of the two")
    if stops := of("train.stop_at_tokens") - {0}:
        faults.append(f"config.train.stop_at_tokens is {max(stops)}: must be 0 in a study, which trains to its horizons")
    if of("batch.schedule") & {"follow"}:
        faults.append("config.batch.schedule is follow: not in a study, whose points have batches of their own; must be constant or stages")
    if "mesh.member" in names or plain["mesh.member"] != 1:
        faults.append("config.mesh.member: must be 1 in a study; who trains together is decided for each group")
    for name in ("eval.tokens", "model.context"):
        if len(of(name)) > 1 and (name == "eval.tokens" or plain["eval.tokens"]):
            also = "" if name == "eval.tokens" else ", or config.eval.tokens=0, all of them"
            faults.append(f"{name} differs in the grid: points are compared on the same held-out tokens; must be one for all{also}")
    if study.compute_dtype and "model.compute_dtype" in names:
        faults.append(f"model.compute_dtype in the grid, and the study's compute_dtype is {study.compute_dtype}: leave out one of the two")
    if config_lib.FASTEST in of("model.compute_dtype"):
        faults.append(
            "config.model.compute_dtype is 'fastest': a study measures once for all its points; must be float32 or bfloat16, with the "
            "study's compute_dtype='fastest'"
        )
    if study.least_steps and not study.horizons:
        faults.append(f"the study's least_steps is {study.least_steps}: says which horizons a point has, and there are none; must be 0")
    schedules = of("schedule.name")
    if study.decay_fraction and "wsd" not in schedules:
        faults.append(f"the study's decay_fraction is {study.decay_fraction}: is for schedule.name wsd, not {', '.join(sorted(schedules))}")
    if study.decay_fraction and "schedule.decay_tokens" in names:
        faults.append("schedule.decay_tokens in the grid, and the study has a decay_fraction: leave out one of the two")
    if study.stop_after_rises and (others := sorted(schedules - {*ONE_FOR_ALL})):
        faults.append(
            f"the study's stop_after_rises is {study.stop_after_rises}: takes one run for all horizons, schedule.name "
            f"{' or '.join(ONE_FOR_ALL)}, not {', '.join(others)}; must be 0"
        )
    return faults
