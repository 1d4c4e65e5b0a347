"""What a coordinate check shows: planted exponents come back in the table, the verdict and the text, and the figures are drawn."""

import csv
import json
import math

import numpy as np
import pytest

from scaling_jax.coord_check.measure import ACTIVATION, CHANGE, DECAY, UPDATE, Coordinate
from scaling_jax.coord_check.verdict import Expected
from scaling_jax.report.coord_check import report_check

SIZES = {"width": (16, 32, 64), "depth": (2, 4, 8)}
# The right exponents in width; in depth, at α = 1, all are 0.
RIGHT = {
    (ACTIVATION, "embedding", ""): 0.0,
    (ACTIVATION, "attention logits", ""): 0.0,
    (CHANGE, "residual 4/4", ""): 0.0,
    (CHANGE, "logits", ""): 0.0,
    (UPDATE, "blocks.key", "hidden"): -1.0,
    (UPDATE, "unembedding", "output"): 0.0,
    (DECAY, "blocks.key", "hidden"): 0.0,
}
LOGITS, KEYS = (CHANGE, "logits", ""), (UPDATE, "blocks.key", "hidden")


def planted(axis="width", steps=3, **wrong):
    """A check of two seeds; `wrong` are exponents to add, by kind, with _ for a blank."""
    coordinates = []
    for (quantity, kind, role), exponent in RIGHT.items():
        slope = (exponent if axis == "width" else 0.0) + wrong.get(kind.replace(" ", "_"), 0.0)
        for size in SIZES[axis]:
            if quantity == DECAY:
                coordinates.append(Coordinate(axis, size, 0, 0, quantity, kind, role, size**slope))
                continue
            for seed in range(2):
                for step in range(1, steps + 1):
                    value = 0.1 * step * size**slope * (1 + 0.01 * seed)
                    coordinates.append(Coordinate(axis, size, seed, step, quantity, kind, role, value))
    return coordinates


def table(out):
    with (out / "slopes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def verdict(out):
    """As any JSON reader takes it: without NaN."""
    return json.loads((out / "verdict.json").read_text(), parse_constant=pytest.fail)


def ink(path):
    """Share of pixels that are not white."""
    import matplotlib.image

    return float((matplotlib.image.imread(path)[..., :3] < 0.99).any(-1).mean())


@pytest.fixture(scope="module")
def both_axes(tmp_path_factory):
    """Width is wrong in two kinds, depth is right."""
    out = tmp_path_factory.mktemp("check")
    text, ok = report_check([*planted(logits=0.5, embedding=-0.4), *planted("depth")], Expected(), out)
    return out, text, ok


def test_the_slopes_on_disk_are_the_planted_ones(both_axes):
    rows = table(both_axes[0])
    assert len(rows) == 2 * (6 * 3 + 1)
    for row in rows:
        right = RIGHT[row["quantity"], row["kind"], row["role"]] if row["axis"] == "width" else 0.0
        off = {"logits": 0.5, "embedding": -0.4}.get(row["kind"], 0.0) if row["axis"] == "width" else 0.0
        assert float(row["slope"]) == pytest.approx(right + off, abs=1e-6) and 0 <= float(row["se"]) < 0.02
        if row["step"] == "1":
            assert row["expected"] == row["tolerance"] == row["ok"] == ""
        else:
            assert float(row["expected"]) == right and row["ok"] == str(off == 0)


def test_the_verdict_on_disk_is_by_axis_with_the_worst_of_each_kind(both_axes):
    out, _, ok = both_axes
    found = verdict(out)
    assert ok is False and found["passed"] is False and found["axes"] == {"width": False, "depth": True}
    assert len(found["worst"]) == 2 * len(RIGHT)
    failed = {(row["axis"], row["kind"]) for row in found["worst"] if not row["ok"]}
    assert failed == {("width", "logits"), ("width", "embedding")}


def test_the_text_names_what_failed_and_passes_what_is_right(both_axes):
    out, text, _ = both_axes
    lines = [line.split() for line in text.splitlines()]
    assert ["width", "FAIL:", "embedding,", "logits"] in lines
    assert ["depth", "pass"] in lines
    assert [path for start, *path in filter(None, lines) if start == "figure"] == [
        [str(out / "coord_check_width.png")],
        [str(out / "coord_check_depth.png")],
    ]


def test_the_text_shows_each_kind_at_its_worst_with_what_is_wanted(both_axes):
    rows = [line.split() for line in both_axes[1].splitlines()]
    (logits,) = [row for row in rows if row[:3] == ["width", "change", "logits"]]
    assert logits[4] == "+0.500" and logits[6:] == ["0", "±", "0.25", "FAIL"]
    (keys,) = [row for row in rows if row[:3] == ["width", "update", "blocks.key"]]
    assert keys[4] == "-1.000" and keys[6:] == ["-1", "±", "0.15"]
    (decay,) = [row for row in rows if row[:3] == ["depth", "decay", "blocks.key"]]
    assert decay[3:] in ([f"{sign}0.000", "0.000", "0", "±", "0.01"] for sign in "+-")  # of no step


def test_rows_are_in_the_order_of_the_forward_pass_then_updates_then_decay(both_axes):
    body = [line for line in both_axes[1].splitlines() if line.startswith("width ")][:-1]
    order = ["embedding", "attention logits", "residual 4/4", "logits", "blocks.key", "unembedding", "blocks.key"]
    assert len(body) == len(order)
    assert all(f"  {kind}  " in line for kind, line in zip(order, body, strict=True))
    assert [line.split()[1] for line in body[4:]] == ["update", "update", "decay"]


def test_there_is_a_figure_for_each_axis_and_neither_is_blank(both_axes):
    for axis in ("width", "depth"):
        assert 0.01 < ink(both_axes[0] / f"coord_check_{axis}.png") < 0.9


def test_a_figure_is_red_where_a_slope_is_too_far_off_and_nowhere_else(both_axes):
    """#D55E00 is no colour of the curves."""
    import matplotlib.image

    red = np.array([0xD5, 0x5E, 0x00]) / 255
    share = {}
    for axis in ("width", "depth"):
        pixels = matplotlib.image.imread(both_axes[0] / f"coord_check_{axis}.png")[..., :3]
        share[axis] = (np.abs(pixels - red) < 0.02).all(-1).sum()
    assert share["width"] > 100 and share["depth"] == 0


def test_what_is_right_passes_and_makes_no_figure_of_another_axis(tmp_path):
    text, ok = report_check(planted(), Expected(), tmp_path)
    assert ok is True and verdict(tmp_path)["passed"] is True
    assert "FAIL" not in text and ["width", "pass"] in map(str.split, text.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coord_check_width.png", "slopes.csv", "verdict.json"]


def test_each_axis_names_its_own_failures(tmp_path):
    text, ok = report_check([*planted(logits=0.5), *planted("depth", embedding=1.0)], Expected(), tmp_path)
    lines = text.splitlines()
    assert not ok and {"width   FAIL: logits", "depth   FAIL: embedding"} <= set(lines)
    assert any("head_dim" in line for line in lines)  # which nothing here varied
    growing, _ = report_check(planted(), Expected(growing_heads=True), tmp_path)
    assert "head_dim" not in growing


def test_what_has_no_slope_is_said_and_drawn_as_a_gap(tmp_path):
    """Logits that overflow at one size, and keys that never move."""
    coordinates = [
        c._replace(value=math.nan) if c[4:7] == LOGITS and c.size == 64 else c._replace(value=0.0) if c[4:7] == KEYS else c
        for c in planted()
    ]
    text, ok = report_check(coordinates, Expected(), tmp_path)
    assert ok is False
    assert "width   FAIL: logits, blocks.key" in text.splitlines()
    (row,) = [line.split() for line in text.splitlines() if line.startswith("width  change") and " logits " in line]
    assert row[4] == "none" and row[-1] == "FAIL"
    rows = [row for row in table(tmp_path) if row["kind"] == "logits"]
    assert {row["slope"] for row in rows} == {""} and [row["ok"] for row in rows] == ["", "False", "False"]
    assert {row["slope"] for row in verdict(tmp_path)["worst"] if not row["ok"]} == {None}
    assert ink(tmp_path / "coord_check_width.png") > 0.01


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_panel_without_a_curve_is_drawn_without_a_warning(tmp_path, value):
    """A warning of the figure's own would stand beside the verdict in the user's terminal."""
    report_check([c._replace(value=value) if c[4:7] == KEYS else c for c in planted()], Expected(), tmp_path)


def test_a_report_replaces_the_one_before(tmp_path):
    report_check(planted(logits=0.5), Expected(), tmp_path)
    report_check(planted(), Expected(), tmp_path)
    assert verdict(tmp_path)["passed"] is True and len(table(tmp_path)) == 6 * 3 + 1
