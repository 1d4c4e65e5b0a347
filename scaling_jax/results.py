"""The tidy table of a study: one row for each point and horizon. What sweeps write and laws read; other people's tables load the same way.

    results.load("runs/study")                                                       # or its results.parquet
    results.load("theirs.csv", columns={"params": "Model Size", "flops": "Training FLOP"}, required=("params", "tokens", "loss"))

`COLUMNS` has the columns of a study in their order, with units. After them comes, under its dotted name ('model.mlp_ratio'), every field
that the study's grid sets and that has no column there. What is not known yet is missing (NA, nan).
"""

import difflib
import io
import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas
from etils import epath

from scaling_jax import storage
from scaling_jax.curves import read as read_curves
from scaling_jax.errors import UserError
from scaling_jax.fields import FIELDS

FILE, PLAN = "results.parquet", "plan.json"
_READERS = 16  # files that are read at a time: a bucket takes long for each

COLUMNS: dict[str, tuple[str, str]] = {
    "point": ("", "name of the point: a digest of its config and data"),
    "group": ("", "name of the group that it trains in"),
    "status": ("", "pending, finished, diverged, stopped_early (its held-out loss rose) or failed"),
    "reason": ("", "why it is none of pending and finished"),
    "horizon_tokens": ("tokens", "horizon that was asked for"),
    "tokens": ("tokens", "T, seen when the loss was measured: whole batches"),
    "params": ("parameters", "N, without embeddings"),
    "total_params": ("parameters", "all of them"),
    "width": ("", "of the residual stream"),
    "depth": ("blocks", "of the model"),
    "head_dim": ("", "width of an attention head"),
    "context": ("tokens", "in a sequence"),
    "vocab_size": ("tokens", "rows of the embedding"),
    "batch_tokens": ("tokens", "B, in an optimizer step; the first where batch.schedule is stages"),
    "lr": ("", "peak learning rate at the base sizes"),
    "weight_decay": ("", "shrinkage per step over lr, at the base sizes"),
    "seed": ("", "of the initial parameters and the data order"),
    "parametrization": ("", "standard, mup or completep"),
    "schedule": ("", "course of the lr: constant, linear, cosine or wsd"),
    "warmup_tokens": ("tokens", "of linear warmup"),
    "data_tokens": ("tokens", "of the data that it trains on, 0 for all: data.train_tokens"),
    "data": ("", "fingerprint of the training data"),
    "loss": ("nats per token", "held-out, after `tokens`; the same tokens for every point"),
    "loss_stderr": ("nats per token", "its standard error, over documents"),
    "bits_per_byte": ("bits", "the same loss for a byte of text"),
    "bits_per_byte_stderr": ("bits", "its standard error"),
    "train_loss": ("nats per token", "mean over the last twentieth of the training"),
    "loss_<domain>": ("nats per token", "on each further domain, data.eval_domains"),
    "loss_<domain>_stderr": ("nats per token", "its standard error"),
    "bits_per_byte_<domain>": ("bits", "the same for a byte of its text"),
    "bits_per_byte_<domain>_stderr": ("bits", "its standard error"),
    "noise_scale_tokens": ("tokens", "tr Σ / |G|², over the later half of what was seen"),
    "noise_scale_tokens_low": ("tokens", "lower end of its 95% interval"),
    "noise_scale_tokens_high": ("tokens", "upper end; inf where it is open"),
    "preconditioned_noise_scale_tokens": ("tokens", "the same in AdamW's metric, tr(PΣ) / GᵀPG; only where a point has it"),
    "preconditioned_noise_scale_tokens_low": ("tokens", "lower end of its 95% interval"),
    "preconditioned_noise_scale_tokens_high": ("tokens", "upper end; inf where it is open"),
    "flops": ("FLOPs", "forward and backward of `tokens`: 6·N and attention, for each token"),
    "seconds": ("s", "that its group had trained for by then, divided by its members"),
}
# Columns that are a field of the config, by the field's name.
_FIELD_COLUMNS = {
    "model.width": "width",
    "model.depth": "depth",
    "model.head_dim": "head_dim",
    "model.context": "context",
    "model.vocab_size": "vocab_size",
    "train.batch_tokens": "batch_tokens",
    "optimizer.lr": "lr",
    "optimizer.weight_decay": "weight_decay",
    "train.seed": "seed",
    "parametrization.name": "parametrization",
    "schedule.name": "schedule",
    "schedule.warmup_tokens": "warmup_tokens",
    "data.train_tokens": "data_tokens",
}
_TABLES = (".csv", ".parquet")
_TEXTS = ("point", "group", "status", "reason", "parametrization", "schedule", "data")
_COUNTS = ("tokens", "params", "total_params")  # integers that may be missing
_INTEGERS = ("horizon_tokens", *(column for name, column in _FIELD_COLUMNS.items() if type(FIELDS[name].default) is int))
_SCALES = ("noise_scale_tokens", "preconditioned_noise_scale_tokens")
_OPTIONAL = tuple(name for name in COLUMNS if name.startswith("preconditioned_"))


def load(path: epath.PathLike, columns: Mapping[str, str] | None = None, required: Iterable[str] = ()) -> pandas.DataFrame:
    """The table of a study's directory, or of a .csv or .parquet file, whoever wrote it, or of all such files in a directory together.

    Args:
      path: local, or of a bucket. Files of a directory that is no study's are parts of one table: a column that one of them lacks is
        empty there, and a run at a horizon that several have with the same loss stands there once.
      columns: for each name of ours the one that it has there, {'params': 'Model Size'}, or a multiple, {'batch_tokens': 'bs*2048'}; the
        other columns keep their names, but for those that go by a name of ours which is mapped to another.
      required: columns that the caller cannot do without; params, tokens and loss where a file has none of ours at all.

    Returns:
      A row for each point and horizon, or for each row of the file. Where a file has `params` and `flops` but no `tokens`, these are
      flops / (6·params), and `attrs['derived']` says so. `attrs['study']` is the path of a study.

    Raises:
      UserError: there is no such file or study, or it is damaged; a column is not there; or a column of numbers holds something else.
    """
    path = epath.Path(path)
    if path.is_dir() and (files := table_files(path)):
        return _together([load(file, columns, required) for file in files])
    if path.is_dir():
        table = _study_table(path)
    elif path.suffix in _TABLES:
        table = _read_file(path, columns or {})
    elif not path.exists():
        raise UserError(
            f"{path}: no such file or directory; must be a study's directory, a .csv or .parquet file, or a directory of such files"
        )
    else:
        raise UserError(f"{path}: must be a study's directory, a .csv or .parquet file, or a directory of such files")
    attrs = table.attrs
    table = _renamed(table, path, columns or {})
    for name in [name for name in table.columns if name in COLUMNS and name not in _TEXTS]:
        table[name] = _numbers(table[name], (columns or {}).get(name, name), path)
    if "tokens" not in table and {"params", "flops"} <= {*table.columns}:
        table["tokens"] = table["flops"] / (6 * table["params"])
        attrs = attrs | {"derived": {"tokens": "flops / (6 params)"}}
    required = list(dict.fromkeys(required))
    if not any(name in COLUMNS for name in table.columns):  # of no use to anybody who knows our names
        required = required or ["params", "tokens", "loss"]
    if missing := [name for name in required if name not in table]:
        mapping = ", ".join(f"{name}=NAME" for name in missing)
        raise UserError(f"{path}: has no {', '.join(missing)}; columns must say {mapping}, with the names there: {_names(table.columns)}")
    table.attrs = attrs
    return table


def table_files(directory: epath.PathLike) -> list[epath.Path]:
    """The .csv and .parquet files of a directory that is no study's, sorted; none of a study's."""
    directory = epath.Path(directory)
    if (directory / PLAN).exists():
        return []
    return sorted((file for file in directory.iterdir() if file.suffix in _TABLES and not file.is_dir()), key=str)


def _together(tables: list[pandas.DataFrame]) -> pandas.DataFrame:
    derived = {}
    of_studies = any("horizon_tokens" in table for table in tables)
    for table in tables:
        derived |= table.attrs.get("derived", {})
        table.attrs = {}
        if of_studies and "horizon_tokens" not in table and "tokens" in table:
            table["horizon_tokens"] = table["tokens"]
    whole = pandas.concat(tables, ignore_index=True)
    same = ["point", "horizon_tokens", "loss"]
    if {*same} <= {*whole.columns}:
        again = whole.duplicated(same) & whole[same].notna().all(axis=1)
        whole = whole[~again].reset_index(drop=True)
    whole.attrs = {"derived": derived} if derived else {}
    return whole


def write_table(directory: epath.PathLike) -> pandas.DataFrame:
    """Writes results.parquet of a study, whole or not at all, and returns the table."""
    table = load(directory)
    plain, buffer = table.copy(), io.BytesIO()
    plain.attrs = {}  # where it lies is no part of it
    plain.to_parquet(buffer, index=False)
    storage.write_bytes(epath.Path(directory) / FILE, buffer.getvalue())
    return table


def early_stopped(table: pandas.DataFrame) -> pandas.DataFrame:
    """Of each point the row of its lowest finished held-out loss: L(N, D) with early stopping (Kaplan et al. 2020)."""
    finished = table[(table["status"] == "finished") & table["loss"].notna()]
    return table.loc[finished.groupby("point", sort=False)["loss"].idxmin()]


def curves(directory: epath.PathLike) -> pandas.DataFrame:
    """The courses of a study's trajectories, a row for each step.

    Columns: point; trajectory, the point's name and, with a linear or cosine schedule, its horizon; leg, 'trunk' or 'decay-<horizon>' of
    warmup-stable-decay; step; tokens; loss, of the training batch in nats per token; grad_norm; noise_scale_tokens, _low and _high as in
    `COLUMNS`, at some of the steps.
    """
    directory = epath.Path(directory)
    parts = []
    for name, group in _read_plan(directory)["groups"].items():
        point_of = dict(group["trajectories"])
        folder = directory / "groups" / name
        for leg in sorted(leg.name for leg in folder.iterdir() if leg.is_dir()) if folder.exists() else []:
            for piece in read_curves(folder / leg / "curves"):
                parts += [_course(point_of[str(t)], str(t), leg, piece, m) for m, t in enumerate(piece["trajectories"])]
    if not parts:
        empty = {"step_S": np.zeros(0, np.int64), "tokens_S": np.zeros(0, np.int64), "noise_tokens_K": np.zeros(0, np.int64)}
        floats = {"loss_SxM": np.zeros((0, 1)), "grad_norm_SxM": np.zeros((0, 1)), "noise_KxMx3": np.zeros((0, 1, 3))}
        parts = [_course("", "", "", empty | floats, 0)]
    table = pandas.concat(parts, ignore_index=True)
    order = {trajectory: i for i, trajectory in enumerate(table["trajectory"].unique())}
    table = table.sort_values(["trajectory", "leg", "tokens"], key=lambda c: c.map(order) if c.name == "trajectory" else c, kind="stable")
    table.attrs["study"] = str(directory)
    return table.reset_index(drop=True)


def _course(point: str, trajectory: str, leg: str, piece: Mapping[str, np.ndarray], member: int) -> pandas.DataFrame:
    tokens_S = piece["tokens_S"]
    noise_Sx3 = np.full((len(tokens_S), 3), np.nan)
    noise_Sx3[np.searchsorted(tokens_S, piece["noise_tokens_K"])] = piece["noise_KxMx3"][:, member]
    numbers = {"loss": piece["loss_SxM"][:, member], "grad_norm": piece["grad_norm_SxM"][:, member]}
    numbers |= {f"noise_scale_tokens{end}": noise_Sx3[:, i] for i, end in enumerate(("", "_low", "_high"))}
    texts = {"point": point, "trajectory": trajectory, "leg": leg}
    names = {name: pandas.array([text] * len(tokens_S), dtype="string") for name, text in texts.items()}
    counts = {"step": piece["step_S"], "tokens": tokens_S}
    return pandas.DataFrame(names | counts | {name: values.astype(np.float64) for name, values in numbers.items()})


def _read_plan(directory: epath.Path) -> dict[str, Any]:
    plan = storage.read_json(directory / PLAN)
    if plan is None:
        raise UserError(f"{directory}: holds no study, there is no {PLAN}; must be the --workdir of `scaling-jax sweep`")
    if not isinstance(plan, dict) or not all(isinstance(plan.get(name), dict) for name in ("base", "classes", "points", "groups")):
        raise UserError(f"{directory / PLAN}: damaged: not a plan that scaling_jax wrote; restore it")
    return plan


def _read_all(files: Iterable[epath.Path]) -> list[Any]:
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda file: storage.read_json(file, {}), files))


def _study_table(directory: epath.Path) -> pandas.DataFrame:
    plan = _read_plan(directory)
    states = dict(zip(plan["groups"], _read_all(directory / "groups" / name / "group.json" for name in plan["groups"]), strict=True))
    for name, state in states.items():
        if not isinstance(state, dict):
            raise UserError(f"{directory / 'groups' / name / 'group.json'}: damaged: not the record that scaling_jax wrote; restore it")
    cells: dict[str, dict[int, dict[str, Any]]] = {point: {} for point in plan["points"]}
    for name, group in plan["groups"].items():
        sizes = plan["classes"].get(group["class"], {})
        for trajectory, point in group["trajectories"]:
            rows = states[name].get("rows", {}).get(trajectory, {})
            for horizon in group["horizons"]:
                cells[point][horizon] = _cell(name, states[name], rows.get(str(horizon)), sizes)
    more = {name: None for entry in plan["points"].values() for name in entry["fields"] if name not in (*_FIELD_COLUMNS, "train.tokens")}
    rows = []
    for point, entry in plan["points"].items():
        values = plan["base"] | plan.get("execution", {}) | entry["values"]
        own = {column: values[name] for name, column in _FIELD_COLUMNS.items()} | {name: values[name] for name in more}
        own |= {"point": point, "data": entry["data"]}
        rows += [own | {"horizon_tokens": horizon} | cell for horizon, cell in sorted(cells[point].items())]
    names = [*_study_columns(rows), *more]
    table = pandas.DataFrame({name: _typed(name, [row.get(name) for row in rows]) for name in names})
    for name in _SCALES:
        if name in table:
            table[f"{name}_high"] = _opened(table, name)
    table.attrs["study"] = str(directory)
    return table


def _cell(group: str, state: Mapping[str, Any], row: Mapping[str, Any] | None, sizes: Mapping[str, Any]) -> dict[str, Any]:
    cell = {"group": group, "params": sizes.get("params"), "total_params": sizes.get("total_params")}
    if row is None:
        failed = state.get("state") == "failed"
        return cell | {"status": "failed" if failed else "pending", "reason": state.get("reason") if failed else None}
    flops_per_token, tokens = sizes.get("flops_per_token"), row.get("tokens")
    flops = flops_per_token * tokens if flops_per_token is not None and tokens is not None else None
    return cell | dict(row) | {"flops": flops}


def _study_columns(rows: list[dict[str, Any]]) -> list[str]:
    """COLUMNS in their order, with a pair for each domain, and without those that may be absent and are."""
    there = dict.fromkeys(name for row in rows for name in row)
    domains = [name.removeprefix("loss_") for name in there if name.startswith("loss_") and not name.endswith("_stderr")]
    names: dict[str, None] = {}
    for name in COLUMNS:
        if "<domain>" in name:
            names |= dict.fromkeys(name.replace("<domain>", domain) for domain in domains)
        elif name not in _OPTIONAL or name in there:
            names[name] = None
    return list(names)


def _typed(name: str, values: list[Any]) -> Any:
    kind = type(FIELDS[name].default) if name in FIELDS else None
    if name in _TEXTS or kind in (str, tuple):
        return pandas.array([str(value) if value is not None else None for value in values], dtype="string")
    if name in _COUNTS:
        return pandas.array(values, dtype="Int64")
    if name in _INTEGERS or kind is int:
        return pandas.array(values, dtype="int64")
    return pandas.array([math.nan if value is None else value for value in values], dtype="bool" if kind is bool else "float64")


def _opened(table: pandas.DataFrame, name: str) -> pandas.Series:
    """The upper ends of its intervals: where there is a lower one and none above, the interval is open."""
    high, low = table[f"{name}_high"], table[f"{name}_low"]
    return high.mask(high.isna() & low.notna(), math.inf)


def _read_file(path: epath.Path, columns: Mapping[str, str]) -> pandas.DataFrame:
    try:
        data = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        if path.suffix == ".parquet":
            return pandas.read_parquet(data)
        return pandas.read_csv(data, dtype={columns.get(name, name): "string" for name in _TEXTS})  # a name of digits is no number
    except Exception as error:  # pandas and pyarrow have many kinds
        raise UserError(f"{path}: damaged, or no {path.suffix} file: {str(error).splitlines()[0]}") from error


def _renamed(table: pandas.DataFrame, path: epath.Path, columns: Mapping[str, str]) -> pandas.DataFrame:
    columns, factors = dict(columns), {}
    for ours, theirs in columns.items():
        product = re.fullmatch(r"(.+?)\s*\*\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)", theirs)
        if theirs not in table and product and product[1] in table:
            columns[ours], factors[ours] = product[1], float(product[2])
            continue
        if theirs not in table:
            close = difflib.get_close_matches(str(theirs), list(map(str, table.columns)), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UserError(f"{path}: columns {ours}={theirs}: no such column there{hint}; there are {_names(table.columns)}")
    taken = {**{theirs: None for theirs in columns.values()}, **{ours: None for ours in columns}}
    kept = [name for name in table.columns if name not in taken]
    mapped = {ours: table[theirs] for ours, theirs in columns.items()}
    mapped |= {ours: _numbers(mapped[ours], columns[ours], path) * factor for ours, factor in factors.items()}
    return pandas.DataFrame(mapped | {name: table[name] for name in kept})


def _numbers(column: pandas.Series, name: str, path: epath.Path) -> pandas.Series:
    if pandas.api.types.is_numeric_dtype(column):
        return column
    numbers = pandas.to_numeric(column, errors="coerce")
    wrong = column[numbers.isna() & column.notna()]
    if len(wrong):
        raise UserError(f"{path}: row {wrong.index[0] + 1}: {name} is {wrong.iloc[0]!r}: must be a number, or empty where it is unknown")
    return numbers


def _names(columns: Iterable[Any]) -> str:
    return ", ".join(repr(str(name)) for name in columns) or "none"
