"""What a law is fitted to: the usable rows of a results table, checked, and the observations that an analysis makes of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas

from scaling_jax import results
from scaling_jax.errors import UserError

# Columns of which one table must have one value: losses over other text, or in other tokens, cannot be compared.
_ONE_VALUE = ("data", "vocab_size", "tokenizer", "data.tokenizer", "data.path", "corpus", "dataset")
_LEAST = {"params": 1, "tokens": 1, "horizon_tokens": 1, "batch_tokens": 1, "lr": 1, "data_tokens": 0}  # 0 where it may be 0
_MEASURED = tuple(
    name
    for name in results.COLUMNS
    if name.startswith(("loss", "bits_per_byte", "train_loss", "noise_scale", "preconditioned"))
    or name in ("point", "group", "status", "reason", "seconds", "flops")
)


class Observations(NamedTuple):
    """Points that a form is fitted to.

    `x` are the inputs by name, [n]; `y` the target in its own units, [n]; `cluster` [n] labels of what is resampled together, since its
    errors are not independent (a run's horizons). `origin` says in a sentence which rows these are and how they were made. `frame` is the
    table behind a figure: all points, with `censored` where one is a bound only.
    """

    x: dict[str, np.ndarray]
    y: np.ndarray
    cluster: np.ndarray
    origin: str
    frame: Any = None


def observations(frame: pandas.DataFrame, inputs: Sequence[str], target: str, cluster: Sequence[str], origin: str) -> Observations:
    """The rows of a frame; `cluster` are the columns whose values together name what is resampled together, each row by itself if none."""
    rows = frame if "censored" not in frame else frame[~frame["censored"].astype(bool)]
    labels = rows.groupby(list(cluster), sort=False, dropna=False).ngroup().to_numpy() if cluster else np.arange(len(rows))
    return Observations({name: rows[name].to_numpy(float) for name in inputs}, rows[target].to_numpy(float), labels, origin, frame)


def checked(table: pandas.DataFrame, need: Sequence[str] = ("loss",)) -> pandas.DataFrame:
    """The finished rows of a results table, each with a positive loss.

    A table without `status` is somebody else's: all its rows are finished. `attrs['left_out']` counts the other rows by their status.

    Raises:
      UserError: a column of `need` is not there; no run is finished; a loss is missing, not finite or not positive; the rows are of
        several corpora or tokenizers; or two rows are the same run and differ in their loss.
    """
    if len(table) == 0:
        raise UserError("the table has no rows")
    left_out: dict[str, int] = {}
    rows = table
    if "status" in table:
        status = table["status"].astype("string").fillna("finished")
        left_out = {str(name): int(count) for name, count in status[status != "finished"].value_counts().items()}
        rows = table[(status == "finished").to_numpy()]
        if len(rows) == 0:
            raise UserError(f"none of the {len(table)} rows is finished: {', '.join(f'{n} {name}' for name, n in left_out.items())}")
    if missing := [name for name in need if name not in rows or rows[name].isna().all()]:
        empty = all(name in rows for name in missing)
        there = "it is empty in all finished rows" if empty else f"it has {', '.join(map(str, table.columns))}"
        raise UserError(f"the table has no {', '.join(missing)}; {there}")
    loss = rows["loss"].astype(float).to_numpy() if "loss" in rows else np.ones(len(rows))
    faulty = np.flatnonzero(~(np.isfinite(loss) & (loss > 0)))
    if len(faulty):
        raise UserError(
            f"row {_label(rows, faulty[0])}: loss is {loss[faulty[0]]}; a finished run has a positive one ({len(faulty)} such rows)"
        )
    rows = _plain(rows)
    for name, least in _LEAST.items():
        if name in rows:
            values = rows[name].to_numpy(float)
            wrong = ~np.isnan(values) & ~(np.isfinite(values) & (values >= 0 if least == 0 else values > 0))
            if len(faulty := np.flatnonzero(wrong)):
                what = "a positive number" if least else "0 or a positive number"
                raise UserError(f"row {_label(rows, faulty[0])}: {name} is {values[faulty[0]]:g}; must be {what}")
    for name in _ONE_VALUE:
        if name in rows and rows[name].nunique(dropna=True) > 1:
            values = ", ".join(map(str, rows[name].dropna().unique()[:4]))
            raise UserError(f"the table has rows of several {name} ({values}): their losses cannot be compared; give one at a time")
    _no_contradiction(rows)
    rows = rows.copy()
    rows.attrs = dict(table.attrs) | {"left_out": left_out}
    return rows


def _label(rows: pandas.DataFrame, position: int) -> str:
    label = rows.index[position]
    return str(label + 1) if isinstance(label, int | np.integer) else repr(label)


def _no_contradiction(rows: pandas.DataFrame) -> None:
    """UserError where two rows are alike in everything that was chosen, and differ in what was measured."""
    chosen = [
        name
        for name in rows.columns
        if name not in _MEASURED and not str(name).startswith(("loss_", "bits_per_byte_")) and (name in results.COLUMNS or _few(rows[name]))
    ]
    if "point" in rows and rows["point"].notna().any():  # a digest of the config and the data
        if rows["point"].isna().any():
            _no_contradiction(rows[rows["point"].isna()].drop(columns="point"))
            rows = rows[rows["point"].notna()]
        chosen = [name for name in ("point", "horizon_tokens", "tokens") if name in rows]
    if not {"params", "tokens", "lr", "point", "flops"} & {*chosen} or "loss" not in rows:
        return
    known = [name for name in chosen if rows[name].notna().any()]
    twice = rows[rows.duplicated(chosen, keep=False) & rows[known].notna().all(axis=1)]  # of what is not known nobody can tell
    if len(twice) == 0:
        return
    run = twice.groupby(chosen, sort=False, dropna=False).ngroup().to_numpy()
    loss = twice["loss"].to_numpy(float)
    for one in np.unique(run):
        mine = np.flatnonzero(run == one)
        low, high = mine[loss[mine].argmin()], mine[loss[mine].argmax()]
        if loss[low] < loss[high]:
            values = ", ".join(f"{name}={twice[name].iloc[low]}" for name in chosen[:6])
            first, second = sorted((low, high))
            raise UserError(
                f"rows {_label(twice, first)} and {_label(twice, second)} are one run ({values}) with losses {loss[first]:g} and "
                f"{loss[second]:g}; one of them is wrong, or a column that tells them apart, such as seed, is missing"
            )


def _few(column: pandas.Series) -> bool:
    """Whether an unknown column looks chosen and not measured: text, whole numbers, or few different values."""
    return column.dtype.kind != "f" or 2 * column.nunique() <= len(column)


def _plain(rows: pandas.DataFrame) -> pandas.DataFrame:
    """With numbers that may be missing as floats: pandas' own kinds of them do not compute with numpy."""
    nullable = [name for name, kind in rows.dtypes.items() if pandas.api.types.is_extension_array_dtype(kind)]
    numbers = {
        name: rows[name].astype(float)
        for name in nullable
        if pandas.api.types.is_numeric_dtype(rows[name].dtype) and rows[name].isna().any()
    }
    return rows.assign(**numbers)


def enough(rows: Any, points: int, what: str) -> None:
    """UserError where there are fewer than so many rows."""
    if len(rows) < points:
        raise UserError(f"{what} needs at least {points} points; there are {len(rows)}")


def different(values: Any, name: str, least: int, what: str) -> None:
    """UserError where a column takes fewer different values than `what` needs."""
    there = np.unique(np.asarray(values, float))
    if len(there) < least:
        listed = ", ".join(f"{value:g}" for value in there[:4])
        raise UserError(
            f"{what} needs at least {least} different {name}; there {'is' if len(there) == 1 else 'are'} {len(there)}: {listed}"
        )
