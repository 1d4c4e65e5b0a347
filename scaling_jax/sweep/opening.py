"""A study about to be run: its points with their data, and the directory that they go to; all that can be wrong is found here."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from scaling_jax import config as config_lib
from scaling_jax.data.corpus import RunData, open_run_data
from scaling_jax.errors import UserError
from scaling_jax.sweep import plan as plan_lib
from scaling_jax.sweep.claim import check_directory
from scaling_jax.sweep.plan import Plan
from scaling_jax.sweep.study import DATA, Point, Study, Trajectory, check_lengths, data_key, resolve, trajectories


class Opened(NamedTuple):
    """A study and what its directory has of it."""

    study: Study
    points: list[Point]
    trajectories: list[Trajectory]
    plan: Plan | None  # that is in the directory
    provisional: Plan  # with all points; classes that are not decided train as many together as the study allows at most
    undecided: list[str]  # keys of those classes


class Data:
    """Opens the data of points, each once."""

    def __init__(self, verify: bool):
        self._verify = verify
        self._verified: set[Any] = set()
        self._opened: dict[Any, RunData] = {}

    def of(self, values: dict[str, Any]) -> RunData:
        key = data_key(values)
        if key not in self._opened:
            config = config_lib.default_config()
            for name in DATA:
                section, field = name.split(".")
                value = values[name]
                config[section][field] = tuple(value) if isinstance(value, list) else value
            config.train.tokens = config.train.batch_tokens = config.model.context  # lengths are checked for every horizon
            files = (values["data.path"], tuple(values["data.eval_domains"]))
            data = open_run_data(config, verify=self._verify and config.data.verify and files not in self._verified)
            self._verified.add(files)
            if not data.domains:
                raise UserError(
                    f"config.data.path is {config.data.path!r}: has no held-out domain, and points are compared by held-out loss; "
                    "`scaling-jax tokenize --holdout_every=…` makes one"
                )
            self._opened[key] = data
        return self._opened[key]

    def fingerprint(self, values: dict[str, Any]) -> str:
        """Of the training data and of the held-out text that points are compared on."""
        data = self.of(values)
        return hashlib.sha256(f"{data.fingerprint} {_compared_on(data)}".encode()).hexdigest()

    def check_compared(self, points: Sequence[Point]) -> None:
        """UserError where points are compared on different text."""
        found = {_compared_on(self.of(point.values)): point for point in points}
        if len(found) > 1:
            paths = ", ".join(repr(point.values["data.path"]) for point in found.values())
            raise UserError(
                f"the study's grid has data of different held-out text, {paths}: points are compared on the same held-out tokens"
            )


def _compared_on(data: RunData) -> str:
    name, stream = next(iter(data.domains.items()))
    return f"{name} {stream.index.fingerprint}"


def open_study(study: Study, directory: epath.Path | None, data: Data, compute_dtype: str | None = None) -> Opened:
    """Resolves and checks; writes nothing.

    Args:
      directory: None where it is to go nowhere.
      compute_dtype: what 'fastest' was found to be, where the directory has no plan that says so.

    Raises:
      UserError: a fault of the study, of its data, or the directory is that of something else.
    """
    plan = None
    if directory is not None:
        check_directory(directory)
        plan = plan_lib.read_plan(directory)
    points = resolve(study, data.fingerprint, (plan and plan.compute_dtype) or compute_dtype)
    data.check_compared(points)
    check_lengths(points, lambda values: data.of(values).train.check_length)
    found = trajectories(points)
    undecided = plan_lib.undecided(plan, found)
    try:
        provisional = plan_lib.extend(plan, study, points, found, {key: {"members": study.max_members} for key in undecided})
    except UserError as error:
        raise UserError(str(error).replace("--workdir:", f"--workdir={directory}:", 1)) from None
    return Opened(study, points, found, plan, provisional, undecided)


def costliest(points: Sequence[Point]) -> Point:
    """That whose speed matters most: the largest model, and of equals the first."""
    sizes: dict[Any, int] = {}

    def flops(point: Point) -> int:
        shape = tuple(value for name, value in point.values.items() if name.startswith("model."))
        if shape not in sizes:
            sizes[shape] = plan_lib.model_size(point.values)["flops_per_token"]
        return sizes[shape]

    return max(points, key=flops)


def work(opened: Opened) -> dict[str, tuple[dict[str, Any], int]]:
    """By class the values of one of its points, and the tokens that all its trajectories train on."""
    found: dict[str, tuple[dict[str, Any], int]] = {}
    for trajectory in opened.trajectories:
        values, tokens = found.get(trajectory.class_key, (trajectory.point.values, 0))
        found[trajectory.class_key] = values, tokens + trajectory.horizons[-1]
    return found
