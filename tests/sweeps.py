"""Small studies, planned without a command."""

from helpers import small_config

from scaling_jax.sweep import grid
from scaling_jax.sweep.plan import extend, read_plan, undecided, write_plan
from scaling_jax.sweep.study import Study, resolve, trajectories

HORIZONS = (640, 1280, 2560)


def small_study(points=None, horizons=HORIZONS, settings=None, **fields):
    """Two learning rates of width 16, context 16, to 5, 10 and 20 steps of 8 sequences; `fields` as section__key=value."""
    base = small_config(**{"schedule__name": "constant", "checkpoint__every_tokens": 512} | fields)
    return Study(base, grid.over("optimizer.lr", [2.0**-8, 2.0**-6]) if points is None else points, horizons, **(settings or {}))


def planned(directory, study, members=16):
    """Writes the study's plan, or adds to it; groups of at most so many."""
    plan, points = read_plan(directory), resolve(study, lambda values: "data")
    found = trajectories(points)
    decided = {key: {"members": members, "params": 1, "total_params": 1, "flops_per_token": 1} for key in undecided(plan, found)}
    plan = extend(plan, study, points, found, decided)
    write_plan(directory, plan)
    return plan
