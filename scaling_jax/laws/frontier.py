"""Results tables reduced to what laws of loss are fitted to: tuned rows, courses along training, lower envelopes, tokens to a loss.

A *run* is what shares one training: the column `point` of a study, else each row by itself. A *size* is N: values of `params` within 0.1%
of each other are one. *Tuned* is the lowest loss over everything else that was varied, after seeds have been averaged: the least of several
noisy losses is a little too low, the more so the more were tried.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws.observations import checked, different
from scaling_jax.laws.settings import grid_columns

LEAST_REACH = 2.0  # factor that sizes span at least, where a law is about them: those of a study of shapes are one
SAME_SIZE = 1e-3  # relative difference of `params` within which sizes are one: others' are often read off figures
_SETTINGS = (
    "params", "width", "depth", "head_dim", "context", "batch_tokens", "lr", "weight_decay", "parametrization", "schedule", "warmup_tokens",
    "data_tokens",
)  # fmt: skip


def near_groups(values: Sequence[float], tolerance: float) -> np.ndarray:
    """A label for each value, [n]: neighbours in order that differ by a factor below 1 + tolerance share one; labels rise with values."""
    logs = np.log(np.asarray(values, float))
    order = np.argsort(logs, kind="stable")
    labels = np.empty(len(logs), int)
    labels[order] = np.concatenate([[0], np.cumsum(np.diff(logs[order]) > np.log1p(tolerance))])[: len(logs)]
    return labels


def prepared(table: pandas.DataFrame, need: Sequence[str]) -> pandas.DataFrame:
    """The usable rows with the columns that the reductions go by.

    Columns: those of the table; `size` (N, one value for those within 0.1%), `horizon` (tokens asked for, else seen), `run`, and `flops` =
    6·params·tokens, Kaplan's and Hoffmann's count whatever the table has.

    Raises:
      UserError: as `observations.checked`.
    """
    rows = checked(table, ("params", "tokens", "loss", *need)).reset_index(drop=True)
    numbers = [name for name in ("params", "tokens", "loss", *need) if name != "point"]
    rows = rows[rows[numbers].notna().all(axis=1)].reset_index(drop=True)
    for name in numbers:
        rows[name] = rows[name].astype(float)
    group = near_groups(rows["params"], SAME_SIZE)
    rows["size"] = np.exp(np.log(rows["params"]).groupby(group).transform("mean"))
    asked = rows["horizon_tokens"].astype(float) if "horizon_tokens" in rows else rows["tokens"]
    rows["horizon"] = asked.where(asked.notna() & (asked > 0), rows["tokens"])
    rows["run"] = rows["point"].astype(str) if "point" in rows and rows["point"].notna().all() else np.arange(len(rows)).astype(str)
    rows["flops"] = 6 * rows["params"] * rows["tokens"]
    return rows


def different_sizes(sizes: pandas.Series, least: int, what: str) -> None:
    """UserError where there are fewer than so many sizes, or they differ by less than a factor of 2."""
    different(sizes, "params", least, what)
    if sizes.max() < LEAST_REACH * sizes.min():
        raise UserError(
            f"{what} needs sizes that differ by a factor of {LEAST_REACH:g} or more; params are {sizes.min():.4g} to {sizes.max():.4g}"
        )


def on_all_data(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The rows that were not trained on a subset of the data; all where the table does not say."""
    if "data_tokens" not in rows or not (rows["data_tokens"] > 0).any():
        return rows
    if not (whole := (rows["data_tokens"].isna() | (rows["data_tokens"] == 0))).any():
        raise UserError("every row was trained on a subset of the data (data_tokens); this law needs rows on all of them (data_tokens 0)")
    return rows[whole].reset_index(drop=True)


def tuned(rows: pandas.DataFrame, by: Sequence[str]) -> pandas.DataFrame:
    """One row for each combination of `by`: seeds averaged, then the lowest loss over all other settings.

    Args:
      rows: of `prepared`.
      by: columns that are held equal, as ("size", "horizon").

    Returns:
      In the order of `by`. Of a mean over seeds `run` is that of one of them, and `seeds` their number. `attrs["over"]` names the
      settings that were tuned over.
    """
    settings = [*(name for name in rows.columns if name in _SETTINGS), *grid_columns(rows)]
    keys = list(dict.fromkeys([*by, *settings]))
    grouped = rows.groupby(keys, sort=False, dropna=False)
    mean = rows.loc[grouped["loss"].idxmin()].set_index(keys)
    mean["loss"] = grouped["loss"].mean()
    mean["seeds"] = grouped.size() if "seed" in rows and rows["seed"].nunique() > 1 else 1
    mean = mean.reset_index()
    best = mean.loc[mean.groupby(list(by), dropna=False)["loss"].idxmin()].sort_values(list(by)).reset_index(drop=True)
    inside = mean.groupby(list(by), dropna=False)
    best.attrs = dict(rows.attrs) | {
        "over": [name for name in settings if name not in by and (inside[name].nunique(dropna=False) > 1).any()]
    }
    return best


def tuning_said(rows: pandas.DataFrame) -> str:
    """In words, what a table of `tuned` was tuned over."""
    over = [name for name in rows.attrs.get("over", []) if name != "params"]
    seeds = int(rows["seeds"].max()) if "seeds" in rows and len(rows) else 1
    parts = [f"lowest loss over {', '.join(over)}"] if over else ["nothing was varied to tune"]
    return "; ".join(parts + ([f"means of up to {seeds} seeds"] if seeds > 1 else []))


# -------------------------------------------------------------------------------------------------------------------------------- envelopes


class Envelope(NamedTuple):
    """The lowest loss at each of K budgets over courses of several sizes, interpolated between horizons. `enclosed`: a smaller and a larger
    size than the best were measured at that budget too, both higher; elsewhere the best size lies at the edge of what was tried."""

    budget_K: np.ndarray
    loss_K: np.ndarray  # nan where no course passes
    size_K: np.ndarray
    enclosed_K: np.ndarray


def interpolated(rows: pandas.DataFrame, budgets: np.ndarray, budget: str = "flops", course: str = "size") -> tuple[np.ndarray, np.ndarray]:
    """Losses of all courses at the budgets, [S, K], linear in the logarithms, nan beyond a course's ends; and the courses' names, [S]."""
    names = np.unique(rows[course])
    loss_SxK = np.full((len(names), len(budgets)), np.nan)
    at, values, loss = (rows[name].to_numpy() for name in (course, budget, "loss"))
    for s, name in enumerate(names):
        mine = np.flatnonzero(at == name)
        mine = mine[np.argsort(values[mine], kind="stable")]
        log_x, log_y = np.log(values[mine]), np.log(loss[mine])
        loss_SxK[s] = np.exp(np.interp(np.log(budgets), log_x, log_y, left=np.nan, right=np.nan))
    return loss_SxK, names


def envelope(rows: pandas.DataFrame, budgets: np.ndarray, budget: str = "flops") -> Envelope:
    """The lower envelope at the budgets, of tuned rows of several sizes."""
    loss_SxK, sizes = interpolated(rows, budgets, budget)
    there_SxK = np.isfinite(loss_SxK)
    filled_SxK = np.where(there_SxK, loss_SxK, np.inf)
    best_K = filled_SxK.argmin(axis=0)
    index_S = np.arange(len(sizes))[:, None]
    enclosed_K = (there_SxK & (index_S < best_K)).any(axis=0) & (there_SxK & (index_S > best_K)).any(axis=0)
    loss_K = np.where(there_SxK.any(axis=0), filled_SxK.min(axis=0), np.nan)
    return Envelope(np.asarray(budgets, float), loss_K, sizes[best_K].astype(float), enclosed_K & np.isfinite(loss_K))


def frontier_rows(rows: pandas.DataFrame, budget: str = "flops", course: str = "size") -> pandas.DataFrame:
    """The measured rows that lie on the lower envelope, with `censored`: no smaller, or no larger size was measured at that budget, so that
    one not tried may be better there. Of `course`s of one size any counts as neither smaller nor larger."""
    kept = []
    names, size, values, loss = (rows[name].to_numpy() for name in (course, "size", budget, "loss"))
    loss_SxN, courses = interpolated(rows, values, budget, course)
    size_S = np.array([size[names == name][0] for name in courses])
    for i in range(len(rows)):
        others_S = np.isfinite(loss_SxN[:, i]) & (courses != names[i])
        if (loss_SxN[others_S, i] < loss[i]).any():
            continue
        smaller, larger = (others_S & (size_S < size[i])).any(), (others_S & (size_S > size[i])).any()
        kept.append({"index": i, "censored": not (smaller and larger)})
    found = rows.iloc[[entry["index"] for entry in kept]].copy()
    found["censored"] = [entry["censored"] for entry in kept]
    return found.sort_values(budget).reset_index(drop=True)


# ------------------------------------------------------------------------------------------------------------------------- tokens to a loss


def tokens_to(tokens: np.ndarray, loss: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Tokens at which a course first has each of the losses, [targets], linear in log tokens between horizons; nan where it is already
    below at its first horizon, or never gets there. What rises again on the way does not count."""
    order = np.argsort(tokens)
    log_t, lowest = np.log(np.asarray(tokens, float)[order]), np.minimum.accumulate(np.asarray(loss, float)[order])
    found = np.full(len(targets), np.nan)
    for i, target in enumerate(targets):
        after = int(np.argmax(lowest <= target)) if (lowest <= target).any() else 0
        if after > 0:
            share = (lowest[after - 1] - target) / (lowest[after - 1] - lowest[after])
            found[i] = np.exp(log_t[after - 1] + share * (log_t[after] - log_t[after - 1]))
    return found


def iso_loss(rows: pandas.DataFrame, least_batches: int = 4, most_targets: int = 6) -> pandas.DataFrame:
    """Steps and tokens to the same losses at several batch sizes, for each size.

    The losses are equally spaced in log over the range that at least `least_batches` of a size's batches pass, and no more of them than
    horizons that they lie between, so that each rests on measurements of its own.

    Args:
      rows: of `prepared`, with `batch_tokens`; each (size, batch, horizon) is tuned here.

    Returns:
      Columns size, loss, batch_tokens, tokens, steps; empty where no size has such a range.
    """
    best = tuned(rows, ("size", "batch_tokens", "horizon"))
    found = []
    for size, of_size in best.groupby("size"):
        courses = {batch: course for batch, course in of_size.groupby("batch_tokens") if len(course) > 1}
        if len(courses) < least_batches:
            continue
        top = np.sort([course.sort_values("tokens")["loss"].iloc[0] for course in courses.values()])[::-1][least_batches - 1]
        bottom = np.sort([course["loss"].min() for course in courses.values()])[least_batches - 1]
        if bottom >= top:
            continue
        between = min(int(course["loss"].between(bottom, top).sum()) for course in courses.values())
        count = int(np.clip(between, 2, most_targets))
        targets = np.geomspace(top, bottom, count + 2)[1:-1]
        for batch, course in courses.items():
            reached = tokens_to(course["tokens"].to_numpy(), course["loss"].to_numpy(), targets)
            found += [
                {"size": size, "loss": target, "batch_tokens": batch, "tokens": tokens, "steps": tokens / batch}
                for target, tokens in zip(targets, reached, strict=True)
                if np.isfinite(tokens)
            ]
    table = pandas.DataFrame(found, columns=["size", "loss", "batch_tokens", "tokens", "steps"])
    return table.sort_values(["size", "loss", "batch_tokens"], ascending=[True, False, True]).reset_index(drop=True)


# --------------------------------------------------------------------------------------------------------------------------- early stopping


def early_stopped(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Of each run its row of least loss, with `falling`: by which share the loss fell over the last doubling of tokens, where that row is
    the run's last; 0 where the loss rose after it, nan where the run is shorter. Rows of a run are alike in all settings and the seed."""
    keys = [*(name for name in rows.columns if name in _SETTINGS or name == "seed"), *grid_columns(rows)]
    found = []
    for _, run in rows.sort_values("tokens").groupby(keys, sort=False, dropna=False):
        tokens, loss = run["tokens"].to_numpy(), run["loss"].to_numpy()
        best = int(loss.argmin())
        found.append(run.iloc[best].to_dict() | {"falling": 0.0 if best < len(run) - 1 else last_fall(tokens, loss)})
    return pandas.DataFrame(found)


def last_fall(tokens: np.ndarray, loss: np.ndarray) -> float:
    """The share by which the loss fell over the last doubling of tokens, interpolated; nan where the course is shorter."""
    half = tokens.max() / 2
    order = np.argsort(tokens)
    if tokens.min() > half * (1 + 1e-6):
        return np.nan
    before = np.interp(np.log(half), np.log(tokens[order]), np.log(loss[order]))
    return float(-np.expm1(np.log(loss[order][-1]) - before))
