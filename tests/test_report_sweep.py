"""What is said of a study before, while and after it is run, against counts by hand."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from etils import epath
from helpers import small_config

from scaling_jax.report.sweep import MAX_ROWS, dry_run_text, outcome_text, run_status_text, status_text
from scaling_jax.sweep import grid
from scaling_jax.sweep.opening import Data, Opened, open_study, work
from scaling_jax.sweep.plan import extend, read_plan, write_plan
from scaling_jax.sweep.record import GroupRecord
from scaling_jax.sweep.status import clock, study_status
from scaling_jax.sweep.study import Study

LRS = (0.001, 0.002, 0.004)


def opened(directory: Path | None = None, batches: tuple[int, ...] = (64, 128), schedule: str = "constant") -> Opened:
    points = grid.product(grid.over("train.batch_tokens", batches), grid.over("optimizer.lr", LRS), grid.over("model.mlp", ("gelu",)))
    study = Study(small_config(schedule__name=schedule), points, horizons=(1024, 2048), max_members=2)
    return open_study(study, directory and epath.Path(directory), Data(verify=False))


def planned(directory: Path) -> Opened:
    """A study whose first group is done, whose second is half done, whose third failed, and whose fourth has not begun."""
    o = opened(directory)
    decided = {"members": 2, "seconds_per_step": {"2": 0.6, "8": 1.0}, "why": ""}
    plan = extend(None, o.study, o.points, o.trajectories, dict.fromkeys(o.undecided, decided))
    write_plan(directory, plan)
    for state, group in zip(("done", "running", "failed"), plan.order, strict=False):
        record = GroupRecord(epath.Path(directory) / "groups" / group, tids := [tid for tid, _ in plan.groups[group]["trajectories"]])
        record.values["total_tokens"], record.values["tokens"] = 2048, 2048 if state == "done" else 1024
        for horizon in (1024, 2048) if state == "done" else (1024,):
            for tid in tids:
                record.rows.setdefault(tid, {})[str(horizon)] = {"status": "finished", "tokens": horizon, "reason": None, "seconds": 1.0}
        record.values["legs"] = {"trunk": record.values["tokens"]}
        record.write(state, "out of memory" if state == "failed" else None)
    return opened(directory)


def row(text: str, name: str) -> str:
    found = re.findall(rf"^{re.escape(name)} +(.*)$", text, re.MULTILINE)
    assert len(found) == 1, text
    return found[0]


def test_a_dry_run_counts_what_is_to_be_trained():
    o = opened()
    first, second = work(o)
    text = dry_run_text(o, None, {first: 40.0, second: 20.0}, workers=2)
    lines = text.splitlines()
    assert lines[0].split()[:6] == ["width", "x", "depth", "N", "batch", "points"]
    n = 12 * 2 * 16 * 16  # 12·depth·width²
    flops = 6 * n + 6 * 2 * 16 * 16  # and the attention's products with a context of 16, half of it masked or not
    assert re.fullmatch(rf" +16 x 2 +{n:,} +64 +3 +3 +2 +6,144 +\S+ +0:00:40  model.mlp=gelu", lines[1]), lines[1]
    assert re.fullmatch(rf" +16 x 2 +{n:,} +128 +3 +3 +2 +6,144 +\S+ +0:00:20  model.mlp=gelu", lines[2])
    assert row(text, "points") == "6, 12 cells of the table"
    assert row(text, "trajectories") == "6 in at least 4 groups"
    assert row(text, "tokens") == "12,288"
    assert float(row(text, "FLOPs")) >= 12_288 * 6 * n and float(row(text, "FLOPs")) <= 12_288 * 2 * flops
    assert row(text, "time") == "about 0:00:30 with 2 at a time, besides starting and compiling"
    assert "there already" not in text


def test_with_cosine_every_horizon_is_a_trajectory():
    o = opened(schedule="cosine")
    text = dry_run_text(o, None, {}, workers=1)
    assert row(text, "points") == "6, 12 cells of the table"
    assert row(text, "trajectories") == "12 in at least 8 groups"
    assert row(text, "tokens") == f"{6 * (1024 + 2048):,}"
    assert "time" not in text.split("\n\n")[1]


def test_a_long_table_is_cut():
    o = opened(batches=tuple(32 * n for n in range(1, MAX_ROWS + 4)))
    lines = dry_run_text(o, None, {}, workers=1).splitlines()
    assert lines[MAX_ROWS + 1] == "and 3 more" and lines[MAX_ROWS].split()[4] == str(32 * MAX_ROWS).replace("1280", "1,280")


def test_what_is_there_already_is_said_and_its_time_is_the_plans(tmp_path: Path):
    text = dry_run_text(planned(tmp_path), epath.Path(tmp_path), {}, workers=2)
    assert row(text, "there already") == "1 groups are done, 3 begun or planned"
    assert row(text, "trajectories") == "6 in 4 groups"
    # Of each batch a group of one and one of two members, a step of which takes half of 0.6 s, and 0.6 s.
    seconds = (2048 / 64 + 2048 / 128) * (0.3 + 0.6)
    assert row(text, "time") == f"about {clock(seconds / 2)} with 2 at a time, besides starting and compiling"


def test_status_counts_cells_and_names_what_failed(tmp_path: Path):
    planned(tmp_path)
    status = study_status(tmp_path)
    plan = read_plan(tmp_path)
    sizes = [len(plan.groups[group]["trajectories"]) for group in plan.order]
    assert sizes == [2, 2, 1, 1]
    assert status["cells"] == {"finished": 2 * 2 + 2 + 1, "pending": 2 + 2, "failed": 1}
    assert status["groups"] == {"done": 1, "stopped": 1, "failed": 1, "pending": 1}
    assert status["flops_done"] / status["flops"] == pytest.approx((2 + 2 / 2 + 1 / 2) / 6)
    assert not status["in_use"]
    text = status_text(status)
    assert row(text, "cells") == "7 finished, 4 pending, 1 failed"
    assert row(text, "stopped") == f"{plan.order[1]}, 2 members, {fields(status['running'][0])}: 1,024 of 2,048 tokens"
    assert row(text, "failed").endswith(": out of memory") and plan.order[2] in row(text, "failed")
    assert "running" in status_text(status | {"in_use": True})


def fields(group: dict[str, Any]) -> str:
    assert "model.mlp" in group["fields"] and "train.batch_tokens" in group["fields"]
    return ", ".join(f"{name}={value}" for name, value in group["fields"].items())


def test_the_time_left_follows_from_what_groups_took(tmp_path: Path):
    planned(tmp_path)
    plan, expected, done = read_plan(tmp_path), [], 0.0
    for group, share in zip(plan.order, (1, 0.5, 0.5, 0), strict=True):
        (_, point), *others = plan.groups[group]["trajectories"]
        expected.append(2048 / plan.config(point).train.batch_tokens * (0.6 if others else 0.3))
        done += share * expected[-1]
        if share:
            path = tmp_path / "groups" / group / "group.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 30.0}))
    status = study_status(tmp_path)
    assert status["seconds"] == 90
    assert status["seconds_left"] == pytest.approx((sum(expected) - done) * 90 / done, abs=0.1)
    assert row(status_text(status), "time") == f"0:01:30 of groups, one after the other, about {clock(status['seconds_left'])} left"


def table(**columns: Any) -> pd.DataFrame:
    base = {"status": ["finished"] * 3, "horizon_tokens": [100, 100, 200], "loss": [3.0, 2.5, 2.0], "loss_stderr": [0.1, 0.2, float("nan")]}
    return pd.DataFrame(base | {"lr": [0.01, 0.02, 0.02], "width": [16, 16, 16], "model.mlp_ratio": [1.0, 2.0, 2.0]} | columns)


def test_an_outcome_names_the_best_point_of_each_horizon():
    text = outcome_text(table(), {}, "out/results.parquet")
    assert row(text, "cells") == "3 finished" and row(text, "table") == "out/results.parquet"
    assert row(text, "best at 100") == "2.5000 ± 0.2000 nats/token, lr=0.02, model.mlp_ratio=2"
    assert row(text, "best at 200") == "2.0000 nats/token, lr=0.02, model.mlp_ratio=2"


def test_an_outcome_counts_what_did_not_finish_and_says_why():
    nan = float("nan")
    text = outcome_text(table(status=["finished", "diverged", "failed"], loss=[3.0, nan, nan]), {"abc": "out of memory"}, "x")
    assert row(text, "cells") == "1 finished, 1 diverged, 1 failed"
    assert row(text, "failed") == "group abc: out of memory"
    assert row(text, "best at 100").startswith("3.0000 ± 0.1000 nats/token, lr=0.01")
    assert "best at 200" not in text


def test_a_run_whose_loss_is_not_finite_says_so():
    text = run_status_text({"directory": "d", "state": "diverged", "total_tokens": 2000, "tokens": 1000, "loss": None})
    assert text == "d: diverged, 1,000 of 2,000 tokens\nloss not finite"


def test_clock():
    assert [clock(seconds) for seconds in (0.4, 59.6, 3723.4, 360_000)] == ["0:00:00", "0:01:00", "1:02:03", "100:00:00"]
