"""What a study shows: before it is run, while it is, and at its end."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from scaling_jax.laws.settings import grid_columns
from scaling_jax.sweep.status import DONE, clock, common_fields, group_seconds, group_status

if TYPE_CHECKING:
    import pandas

    from scaling_jax.sweep.opening import Opened

MAX_ROWS = 40
_SHOWN = ("model.width", "model.depth", "train.batch_tokens")  # have columns of their own
_POINT_COLUMNS = ("width", "depth", "head_dim", "context", "batch_tokens", "lr", "weight_decay", "seed", "parametrization", "schedule")
_POINT_COLUMNS += ("warmup_tokens", "data_tokens")
_COLUMNS = ("width x depth", "N", "batch", "points", "trajectories", "groups", "tokens", "FLOPs", "time", "")


class _Row(NamedTuple):
    """What points of one program come to. `seconds` is None where nothing is known of it."""

    params: int
    values: Mapping[str, Any]
    fields: dict[str, Any]
    points: int
    trajectories: int
    groups: int
    tokens: int
    flops: float
    seconds: float | None


def dry_run_text(opened: "Opened", directory: Any, estimates: Mapping[str, float], workers: int) -> str:
    """A study as a table of its classes: what is trained together, how much of everything, about how long.

    Args:
      opened: the study.
      directory: where its results are, or will be; an epath.Path.
      estimates: seconds of all trajectories of a class, by its key, where the plan knows none.
      workers: groups that are done at a time.
    """
    rows = _rows(opened, estimates)
    table = [_COLUMNS, *(_cells(row) for row in rows[:MAX_ROWS])]
    lines = _aligned(table)
    if len(rows) > MAX_ROWS:
        lines.append(f"and {len(rows) - MAX_ROWS} more")
    known = [row.seconds for row in rows if row.seconds is not None]
    total = {name: sum(getattr(row, name) for row in rows) for name in ("trajectories", "groups", "tokens", "flops")}
    at_most = "at least " if opened.undecided else ""
    text = [
        *lines,
        "",
        f"{'points':<24}{len(opened.points):,}, {sum(len(point.horizons) for point in opened.points):,} cells of the table",
        f"{'trajectories':<24}{total['trajectories']:,} in {at_most}{total['groups']:,} groups",
        f"{'tokens':<24}{total['tokens']:,}",
        f"{'FLOPs':<24}{total['flops']:.3g}",
    ]
    if known:
        spared = "" if len(known) == len(rows) else f", without {len(rows) - len(known)} classes that were not measured"
        text.append(f"{'time':<24}about {clock(sum(known) / workers)} with {workers} at a time, besides starting and compiling{spared}")
    if opened.plan is not None:
        text.append(f"{'there already':<24}{_there(opened, directory)}")
    return "\n".join(text)


def _rows(opened: "Opened", estimates: Mapping[str, float]) -> list[_Row]:
    """By class, in the order of points."""
    plan, by_class = opened.provisional, {}
    for trajectory in opened.trajectories:
        by_class.setdefault(trajectory.class_key, []).append(trajectory)
    group_of = {tid: name for name, group in plan.groups.items() for tid, _ in group["trajectories"]}
    rows = []
    for key, found in by_class.items():
        points = list({t.point.id: t.point for t in found}.values())
        groups = list(dict.fromkeys(group_of[t.id] for t in found))
        seconds = [group_seconds(plan, group) for group in groups]
        rows.append(
            _Row(
                plan.classes[key]["params"],
                points[0].values,
                {name: value for name, value in common_fields([point.fields for point in points]).items() if name not in _SHOWN},
                len(points),
                len(found),
                len(groups),
                sum(t.horizons[-1] for t in found),
                sum(t.horizons[-1] for t in found) * plan.classes[key]["flops_per_token"],
                estimates.get(key) if None in seconds else sum(seconds),
            )
        )
    return rows


def _cells(row: _Row) -> tuple[str, ...]:
    width, depth, batch_tokens = (row.values[name] for name in _SHOWN)
    return (
        f"{width} x {depth}",
        f"{row.params:,}",
        f"{batch_tokens:,}",
        f"{row.points:,}",
        f"{row.trajectories:,}",
        f"{row.groups:,}",
        f"{row.tokens:,}",
        f"{row.flops:.3g}",
        "" if row.seconds is None else clock(row.seconds),
        ", ".join(f"{name}={value}" for name, value in row.fields.items()),
    )


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """To the right, but for the last column."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        ("  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}").rstrip() for row in table
    ]


def _there(opened: "Opened", directory: Any) -> str:
    """What the directory has of the groups that the command asks for."""
    wanted = {trajectory.id for trajectory in opened.trajectories}
    groups = [name for name, group in opened.plan.groups.items() if any(tid in wanted for tid, _ in group["trajectories"])]
    done = sum(group_status(directory, opened.provisional, name).state == DONE for name in groups)
    return f"{done:,} groups are done, {len(groups) - done:,} begun or planned"


def outcome_text(table: "pandas.DataFrame", failed: Mapping[str, str], path: Any) -> str:
    """The table of a study in short: cells by status, why groups failed, the best point of each horizon.

    Args:
      table: as `scaling_jax.results.load` gives it.
      failed: groups, and why.
      path: of the file that has it all.
    """
    counts = table["status"].value_counts()
    lines = [f"{'cells':<24}{_counts(counts.to_dict())}"]
    lines += [f"{'failed':<24}group {group}: {reason}" for group, reason in failed.items()]
    finished = table[table["status"] == "finished"]
    varied = [name for name in _POINT_COLUMNS if name in table and table[name].nunique(dropna=False) > 1]
    varied += grid_columns(table)
    for horizon, cells in finished.groupby("horizon_tokens"):
        if cells["loss"].notna().any():
            best = cells.loc[cells["loss"].idxmin()]
            error = "" if best["loss_stderr"] != best["loss_stderr"] else f" ± {best['loss_stderr']:.4f}"
            fields = ", ".join(f"{name}={_short(best[name])}" for name in varied)
            lines.append(f"{f'best at {horizon:,}':<24}{best['loss']:.4f}{error} nats/token{f', {fields}' if fields else ''}")
    return "\n".join([*lines, f"{'table':<24}{path}"])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {status}" for status, count in counts.items() if count) or "none"


def status_text(status: Mapping[str, Any]) -> str:
    """What `sweep.status.study_status` found."""
    share = status["flops_done"] / status["flops"] if status["flops"] else 1.0
    left = f", about {clock(status['seconds_left'])} left" if status["seconds_left"] else ""
    lines = [
        f"{'study':<24}{status['directory']}{', in use' if status['in_use'] else ''}",
        f"{'points':<24}{status['points']:,}",
        f"{'cells':<24}{_counts(status['cells'])}",
        f"{'groups':<24}{_counts(status['groups'])}",
        f"{'FLOPs':<24}{share:.1%} of {status['flops']:.3g}",
        f"{'time':<24}{clock(status['seconds'])} of groups, one after the other{left}",
    ]
    for kind in ("running", "failed"):
        for group in status[kind][:MAX_ROWS]:
            fields = ", ".join(f"{name}={value}" for name, value in group["fields"].items())
            text = f"{group['group']}, {group['members']} members{f', {fields}' if fields else ''}"
            if kind == "failed":
                lines.append(f"{kind:<24}{text}: {group['reason']}")
            else:
                state = kind if status["in_use"] else "stopped"
                lines.append(f"{state:<24}{text}: {group['tokens']:,} of {group['total_tokens']:,} tokens")
        if len(status[kind]) > MAX_ROWS:
            lines.append(f"and {len(status[kind]) - MAX_ROWS} more")
    return "\n".join(lines)


def run_status_text(status: Mapping[str, Any]) -> str:
    """What `sweep.status.run_status` found, in two lines."""
    tokens = status.get("tokens", 0)
    first = f"{status['directory']}: {status['state']}, {tokens:,} of {status['total_tokens']:,} tokens"
    parts = []
    if "loss" in status:
        parts.append("loss not finite" if status["loss"] is None else f"loss {status['loss']:.4f}")
    if "noise_scale_tokens" in status:
        value, low, high = (status.get(f"noise_scale_tokens{end}") for end in ("", "_low", "_high"))
        known = "not known" if value is None else f"{value:,.0f}"
        interval = "" if low is None else f" [{low:,.0f}, {'∞' if high is None else f'{high:,.0f}'}]"
        parts.append(f"noise scale {known}{interval} tokens")
    return f"{first}\n{' · '.join(parts) or 'no records yet'}"
