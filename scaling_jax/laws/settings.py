"""What a study varies besides learning rate and seed: which rows are one cell, and whether settings that differ can be told from it."""

from collections.abc import Sequence

from scaling_jax.errors import UserError
from scaling_jax.fields import FIELDS

CELL = ("params", "width", "batch_tokens", "tokens")
_SETTINGS = ("depth", "head_dim", "context", "weight_decay", "warmup_tokens", "data_tokens", "parametrization", "schedule")
_RUNS_SHARED = ("constant", "wsd")  # schedules where one run serves all horizons


def grid_columns(table) -> list[str]:
    """Columns by dotted name, of fields that a grid set; but not those that only say how a run was carried out."""
    return [str(name) for name in table.columns if "." in str(name) and not (name in FIELDS and FIELDS[name].execution)]


def cell_columns(table) -> list[str]:
    """Columns that tell one cell of a study from another: all that its grid varies but the learning rate and the seed."""
    dotted = [name for name in grid_columns(table) if not name.startswith("optimizer.lr")]
    differ = [name for name in (*_SETTINGS, *dotted) if name in table and table[name].nunique(dropna=False) > 1]
    sizes = [name for name in ("params", "width") if name in table]
    return [*sizes, *differ, "batch_tokens", "horizon_tokens" if "horizon_tokens" in table else "tokens"]


def _settings(points) -> list[str]:
    return [*(name for name in points.columns if name in _SETTINGS), *grid_columns(points)]


def one_setting(points, same: Sequence[str] = CELL) -> None:
    """UserError where points that agree in the columns `same` are of settings that differ."""
    repeated = points[points.duplicated(list(same), keep=False)]
    if len(repeated):
        of_cells = repeated.groupby(list(same), dropna=False)
        names = [name for name in [*_settings(points), "width"] if name not in same and of_cells[name].nunique(dropna=False).max() > 1]
        sized = ["size", *(name for name in same if name not in ("params", "width"))]
        raise UserError(
            f"{', '.join(names) or 'settings'} differ at the same {', '.join(sized[:-1])} and {sized[-1]}; one setting at a time can be "
            "fitted: select rows of one"
        )


def confounded(points) -> list[str]:
    """A sentence for each setting that differs along with batch size or horizon, or schedule and parametrization along with the size: a
    law in these has the effect of the setting in its exponents."""
    said = []
    for name in _settings(points):
        if points.groupby(list(CELL), dropna=False)[name].nunique(dropna=False).max() > 1:
            continue  # cells of their own, which no law takes together
        within = points.groupby(["params", "width"], dropna=False)[name].nunique(dropna=False).max() > 1
        if not within and (name not in ("schedule", "parametrization") or points[name].nunique(dropna=False) < 2):
            continue
        along = ("tokens", "batch_tokens") if within else ("params", "width")
        fixed = [column for column in along if points.groupby(column, dropna=False)[name].nunique(dropna=False).max() == 1]
        values = ", ".join(map(str, points[name].drop_duplicates().tolist()[:4]))
        where = " and ".join(fixed or along)
        said.append(f"{name} is not the same throughout ({values}) and goes with {where}: its effect is in what is said of these.")
    return said


def runs_shared(table) -> bool:
    """Whether horizons may be of one run. Somebody else's table, with neither schedule nor status, has a run for each."""
    if "schedule" in table:
        return bool(table["schedule"].isin(_RUNS_SHARED).any())
    return "status" in table
