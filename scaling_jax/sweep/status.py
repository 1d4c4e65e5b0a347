"""How far a study is, or a run, from the files in its directory alone: nothing is locked, nothing written, JAX not imported."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from scaling_jax import storage
from scaling_jax.errors import UserError
from scaling_jax.sweep.claim import RUN_FILE, in_use
from scaling_jax.sweep.plan import FILE as PLAN_FILE
from scaling_jax.sweep.plan import Plan, read_plan

GROUP_FILE = "group.json"
MEND = "delete it: the group is trained again"
DONE, FAILED, RUNNING, PENDING, STOPPED = "done", "failed", "running", "pending", "stopped"


class GroupStatus(NamedTuple):
    """A group of the plan. `state` is as its record says; a group whose driver was stopped is 'running' too."""

    id: str
    state: str  # 'done' | 'failed' | 'running' | 'pending'
    tokens: int  # of one member, over all its legs
    total_tokens: int
    seconds: float
    reason: str | None
    rows: dict[str, dict[str, dict[str, Any]]]  # by trajectory and horizon

    @property
    def fraction(self) -> float:
        return 1.0 if self.state == DONE else min(1.0, self.tokens / self.total_tokens) if self.total_tokens else 0.0


def group_path(directory: epath.Path, group: str) -> epath.Path:
    return directory / "groups" / group / GROUP_FILE


def group_status(directory: epath.Path, plan: Plan, group: str) -> GroupStatus:
    """What a group's record says; one that has not begun, or has horizons that were added since, is pending."""
    horizons = plan.groups[group]["horizons"]
    stored = storage.read_json(group_path(directory, group), mend=MEND)
    if stored is None:
        return GroupStatus(group, PENDING, 0, horizons[-1], 0.0, None, {})
    try:
        state, rows = stored["state"], stored["rows"]
        complete = all(str(h) in rows.get(tid, {}) for tid, _ in plan.groups[group]["trajectories"] for h in horizons)
        if state == DONE and not complete:
            state = PENDING
        total = max(stored["total_tokens"] or 0, horizons[-1])
        return GroupStatus(group, state, stored["tokens"], total, stored["seconds"], stored["reason"], rows)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{group_path(directory, group)}: damaged; {MEND}") from None


def group_seconds(plan: Plan, group: str) -> float | None:
    """What the whole of a group takes by the plan's measurement; None where nothing was measured."""
    members, horizons = len(plan.groups[group]["trajectories"]), plan.groups[group]["horizons"]
    measured = plan.classes[plan.groups[group]["class"]].get("seconds_per_step") or {}
    if not measured:
        return None
    nearest = min(measured, key=lambda count: abs(int(count) - members))
    batch_tokens = (plan.base | plan.execution | plan.points[plan.groups[group]["trajectories"][0][1]]["values"])["train.batch_tokens"]
    return measured[nearest] * members / int(nearest) * horizons[-1] / batch_tokens


def weights(plan: Plan, groups: Iterable[str]) -> dict[str, float]:
    """What each group costs, in proportion: seconds, or FLOPs where not all were measured."""
    groups = list(groups)
    seconds = {group: group_seconds(plan, group) for group in groups}
    return {g: plan.group_flops(g) for g in groups} if None in seconds.values() else {g: s or 0.0 for g, s in seconds.items()}


def study_status(directory: epath.PathLike) -> dict[str, Any]:
    """Of a study: cells by status, its groups, seconds, and about how many are left.

    Raises:
      UserError: there is no plan, or one of its files is damaged.
    """
    directory = epath.Path(directory)
    plan = read_plan(directory)
    if plan is None:
        raise UserError(f"{directory}: holds no study; there is no {PLAN_FILE}")
    groups = [group_status(directory, plan, group) for group in plan.order]
    cells: Counter[str] = Counter()
    for group in groups:
        for tid, _ in plan.groups[group.id]["trajectories"]:
            for horizon in plan.groups[group.id]["horizons"]:
                row = group.rows.get(tid, {}).get(str(horizon))
                cells[row["status"] if row else FAILED if group.state == FAILED else PENDING] += 1
    idle = storage.is_local(directory) and not in_use(directory)
    weight = weights(plan, plan.order)
    began = sum(weight[g.id] * g.fraction for g in groups)
    seconds = sum(g.seconds for g in groups)
    left = sum(weight[g.id] * (1 - g.fraction) for g in groups)
    return {
        "directory": str(directory),
        "in_use": in_use(directory),
        "points": len(plan.points),
        "cells": dict(cells),
        "groups": dict(Counter(STOPPED if g.state == RUNNING and idle else g.state for g in groups)),
        "flops": sum(plan.group_flops(g) for g in plan.order),
        "flops_done": sum(plan.group_flops(g.id) * g.fraction for g in groups),
        "seconds": round(seconds, 1),  # of all groups, one after the other
        "seconds_left": round(left * seconds / began, 1) if began else None,
        "running": [_shown(plan, g) for g in groups if g.state == RUNNING],
        "failed": [_shown(plan, g) for g in groups if g.state == FAILED],
    }


def _shown(plan: Plan, group: GroupStatus) -> dict[str, Any]:
    members = [plan.points[point]["fields"] for _, point in plan.groups[group.id]["trajectories"]]
    return {
        "group": group.id,
        "members": len(members),
        "fields": common_fields(members),
        "tokens": group.tokens,
        "total_tokens": group.total_tokens,
        "reason": group.reason,
    }


def common_fields(assignments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Those that all have, with the same value."""
    first, *others = assignments
    return {name: value for name, value in first.items() if all(name in other and other[name] == value for other in others)}


def run_status(directory: str | Path) -> dict[str, Any]:
    """Of a run's work directory: how far it is, and its last record.

    Raises:
      UserError: its config cannot be read.
    """
    directory = Path(directory)
    try:
        config = json.loads((directory / RUN_FILE).read_text())["config"]
        total = config["train"]["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{directory / 'config.json'}: not a config that scaling_jax wrote") from None
    record = _last_records(directory / "metrics.jsonl")
    summary = storage.read_json(directory / "summary.json", {})
    tokens = record.get("tokens", 0)
    state = summary.get("status") if summary.get("tokens", -1) >= tokens else None
    return {"directory": str(directory), "state": state or ("unfinished" if tokens else "not begun"), "total_tokens": total, **record}


def _last_records(path: Path) -> dict[str, Any]:
    """Tokens, and the newest loss and noise scale, of a file of records that may be growing."""
    keys = ("tokens", "loss", "noise_scale_tokens", "noise_scale_tokens_low", "noise_scale_tokens_high")
    found: dict[str, Any] = {}
    if not path.exists():
        return found
    for line in path.open("rb"):
        try:
            record = json.loads(line)
        except ValueError:
            break
        found |= {key: record[key] for key in keys if key in record}
    return found


def clock(seconds: float) -> str:
    """3723.4 -> '1:02:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
