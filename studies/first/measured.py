"""The numbers that the first study measured, each by a name: those of every laws.json, and those that join two results.

A number's name is (study, law, number), (study, law, form, parameter), (study, law, "rivals", form) for the mean squared error of a form on
what was held out, less that of the best, or (study, name) for a joined one.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas

from scaling_jax import results
from scaling_jax.laws.batch_optimum import measure_batches

HERE = Path(__file__).parent
NOISE = ("noise_scale_tokens", "noise_scale_tokens_low", "noise_scale_tokens_high")
BRANCHED = {"width": 64, "batch_tokens": 512, "lr": 2**-7}  # of branch.py
Name = tuple[str, ...]


class Figure(NamedTuple):
    """A number with its 95% interval; ends that are None are open, a value that is None was not identified."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "not identified"
        if self.low is None and self.high is None:
            return digits(self.value)
        return (
            f"{digits(self.value)} ({'−∞' if self.low is None else digits(self.low)} to {'∞' if self.high is None else digits(self.high)})"
        )

    @property
    def positive(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def negative(self) -> bool:
        return self.high is not None and self.high < 0

    def over(self, other: "Figure") -> "Figure":
        """The ratio of two independent positive numbers, their relative errors added in squares."""
        if self.value is None or other.value is None:
            return Figure(None)
        ends = []
        for mine, others in ((self.low, other.high), (self.high, other.low)):
            known = mine is not None and others is not None and mine > 0 and others > 0
            ends.append(math.hypot(math.log(mine / self.value), math.log(others / other.value)) if known else math.inf)
        ratio = self.value / other.value
        return Figure(ratio, *(None if math.isinf(end) else ratio * math.exp(way * end) for way, end in zip((-1, 1), ends, strict=True)))


def digits(value: float) -> str:
    """Two or three digits, as text that suits the size."""
    if value == 0:
        return "0"
    if 1e6 <= abs(value) < 1e9:
        return f"{value / 1e6:.3g} million".replace("-", "−")
    if abs(value) >= 1e9 or abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    if abs(value) >= 1e4:
        return f"{float(f'{value:.3g}'):,.0f}".replace("-", "−")
    if abs(value) < 0.1:
        return f"{value:.{3 if abs(value) >= 0.01 else 2}g}".replace("-", "−")
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{places}f}".replace("-", "−")


class Laws:
    """The laws of every study, read back from studies/first/*/laws.json, and `joined`, the numbers that join two results."""

    def __init__(self, folder: Path = HERE) -> None:
        self.studies = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/laws.json"))}
        self.joined: dict[Name, Figure] = {}
        for join in (_cost, _shape, _branch, _held_back):
            self.joined.update(join(folder))

    def has(self, name: Name) -> bool:
        """Whether the part that the number is of has been run."""
        return name[0] in self.studies if len(name) > 2 else name in self.joined

    def said(self, study: str, law: str, pattern: str) -> str:
        """What the one group of a pattern has in the law's one sentence that matches it, or in why it was not fitted. ValueError if not one
        does."""
        of_study = self.studies[study]
        sentences = of_study["laws"][law]["statements"] if law in of_study["laws"] else [of_study["not_fitted"][law]]
        found = [match[1] for sentence in sentences if (match := re.search(pattern, sentence))]
        if len(found) != 1:
            raise ValueError(f"{study}: {len(found)} sentences of {law} have {pattern!r}: {sentences}")
        return found[0]

    def figure(self, name: Name) -> Figure:
        """The number of a name, or a constant of a form; one whose law could not be fitted is not identified.

        KeyError where the study's laws know no such number or parameter.
        """
        if len(name) < 3:
            if name not in self.joined:
                raise KeyError(f"no number {name!r}, only {[*self.joined]}")
            return self.joined[name]
        study, law, *names = name
        found = self.studies[study]["laws"].get(law)
        if found is None:
            if law not in self.studies[study]["not_fitted"]:
                raise KeyError(f"{study} has no law {law!r}")
            return Figure(None)
        if len(names) == 1:
            one: dict[str, Any] = next((number for number in found["numbers"] if number["name"] == names[0]), {})
            if not one:
                raise KeyError(f"{study}: {law} has no number {names[0]!r}, only {[number['name'] for number in found['numbers']]}")
        elif names[0] == "rivals":
            rivals = {rival["form"]: rival for rival in found["comparison"]["rivals"]}
            one = rivals[names[1]]
            return Figure(one["held_out"] ** 2 - rivals[found["comparison"]["best"]]["held_out"] ** 2, one["low"], one["high"])
        elif names[1] in (constants := found["fits"][names[0]]["constants"]):
            return Figure(constants[names[1]])
        else:
            one = found["fits"][names[0]]["parameters"][names[1]]
            if one["not_identified"]:
                return Figure(None)
        return Figure(one["value"], one["low"], one["high"])


def _cost(folder: Path) -> Iterator[tuple[Name, Figure]]:
    """Runs and core-hours of each study that has a table, and of all: the seconds of each run's last horizon, on one core."""
    total = [0.0, 0.0]
    for study in sorted({path.parent for path in folder.glob("*/*.parquet")}):
        if not (own := [path for path in study.glob("*.parquet") if not path.is_symlink()]):
            continue
        rows = pandas.concat([results.load(path) for path in own])
        last = rows.sort_values("horizon_tokens").groupby("point").last()
        of_study = (float(len(last)), float(last["seconds"].sum()) / 3600)
        total = [a + b for a, b in zip(total, of_study, strict=True)]
        yield from zip(((study.name, "runs"), (study.name, "core hours")), map(Figure, of_study), strict=True)
    yield from zip((("all", "runs"), ("all", "core hours")), map(Figure, total), strict=True)


def _shape(folder: Path) -> Iterator[tuple[Name, Figure]]:
    """What the worst of the shapes with two blocks or more, and an aspect within a factor 40 of the widest of them, costs over the best, in
    percent, with the error that the spread between seeds makes."""
    path = folder / "kaplan_shape/all.parquet"
    if not path.exists():
        return
    rows = results.load(path)
    rows = rows[(rows["depth"] >= 2) & (rows["model.mlp_ratio"] == 4) & (rows["head_dim"] == 16)]
    rows = rows.assign(aspect=rows["width"] / rows["depth"], log=rows["loss"].map(math.log))
    shapes = rows[rows["aspect"] * 40 >= rows["aspect"].max()].groupby("aspect")["log"].agg(["mean", "var", "count"])
    error = math.sqrt(float(shapes["var"].mean()) * 2 / float(shapes["count"].min()))
    excess = float(shapes["mean"].max() - shapes["mean"].min())
    ends = (100 * math.expm1(excess + way * 1.96 * error) for way in (0, -1, 1))
    yield ("kaplan_shape", "worst of two blocks or more, aspects within a factor 40, %"), Figure(*ends)


def _branch(folder: Path) -> Iterator[tuple[Name, Figure]]:
    """The largest batch that loses nothing, the noise scale at the same checkpoints, of the run of the study that the branched one is,
    and the growth of the former from the first to the last: the widest interval that their ends allow."""
    path = folder / "branch/critical_batch.json"
    if not path.exists():
        return
    found = {
        int(point["tokens"]): Figure(*(point[k] for k in ("batch_tokens", "low", "high")))
        for point in json.loads(path.read_text())["points"]
    }
    rows = results.load(folder / "time_transfer")
    same = rows[(rows["width"] == BRANCHED["width"]) & (rows["batch_tokens"] == BRANCHED["batch_tokens"]) & (rows["lr"] == BRANCHED["lr"])]
    for tokens, figure in found.items():
        row = same[same["horizon_tokens"] == tokens].iloc[0]
        by_noise = Figure(*(None if pandas.isna(row[k]) else float(row[k]) for k in NOISE))
        yield ("branch", f"by branches at T = {tokens}"), figure
        yield ("branch", f"by noise at T = {tokens}"), by_noise
        yield ("branch", f"branches over noise at T = {tokens}"), figure.over(by_noise)
    first, last = min(found), max(found)
    yield ("branch", "growth by branches"), _growth(found[first], found[last], last / first)


def _growth(first: Figure, last: Figure, times: float) -> Figure:
    """p of a number that grows as T^p, by two of its values; outer ends."""

    def power(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else math.log(b / a) / math.log(times)

    return Figure(power(first.value, last.value), power(first.high, last.low), power(first.low, last.high))


def _held_back(folder: Path) -> Iterator[tuple[Name, Figure]]:
    """What `plan` said of the condition that was held back, what came, and the one over the other."""
    said = folder / "held_back/prediction.json"
    if not said.exists():
        return
    rows = {row["name"]: row for row in json.loads(said.read_text())["rows"]}
    predicted = {
        what: Figure(*(rows[row][k] for k in ("value", "low", "high")))
        for what, row in (("η*", "learning rate"), ("B*", "batch"), ("L", "loss"))
    }
    for what, figure in predicted.items():
        yield ("held_back", f"{what} predicted"), figure
    tables = sorted((folder / "held_back").glob("*.parquet"))
    if not tables:
        return
    table = results.load(tables[0])
    found = truth(table, predicted["B*"].value or 0.0)
    for what, figure in found.items():
        yield ("held_back", f"{what} measured"), figure
        yield ("held_back", f"{what} measured over predicted"), figure.over(predicted[what])
    last = table[table["horizon_tokens"] == table["horizon_tokens"].max()]
    off = sum((last[name] / predicted[what].value).map(math.log) ** 2 for name, what in (("batch_tokens", "B*"), ("lr", "η*")))
    loss, best = float(last.loc[off.idxmin(), "loss"]), found["L"]
    ends = (None if end is None else loss - end for end in (best.high, best.low))
    yield ("held_back", "excess of the run at the predicted lr and batch"), Figure(loss - (best.value or 0.0), *ends)


def truth(table: pandas.DataFrame, batch: float) -> dict[str, Figure]:
    """η* at the batch size nearest to the one given, B*, and the loss at it, of the longest horizon."""
    batches = measure_batches(table)
    points = batches.optima.points
    at = points[points["tokens"] == points["tokens"].max()]
    at = at.iloc[(at["batch_tokens"] / batch).map(math.log).abs().argmin()]
    last = int((batches.points["tokens"] == batches.points["tokens"].max()).to_numpy().argmax())
    best, drawn = batches.points.iloc[last], batches.draws()["loss"][:, last]
    spread = 1.96 * float(np.nanstd(drawn)) if not best["censored"] else 0.0
    return {
        "η*": _with_error(at["lr"], at["lr_log_se"], at["censored"]),
        "B*": _with_error(best["batch_tokens"], best["batch_log_se"], best["censored"]),
        "L": Figure(best["loss"], None, best["loss"])
        if best["censored"]
        else Figure(best["loss"], best["loss"] - spread, best["loss"] + spread),
    }


def _with_error(value: float, log_se: float, censored: str) -> Figure:
    """A minimum in the logarithm; one at the edge of its grid has that edge for an end, and no other."""
    if censored:
        return Figure(value, None, value) if censored == "low" else Figure(value, value, None) if censored == "high" else Figure(None)
    return Figure(value, value * math.exp(-1.96 * log_se), value * math.exp(1.96 * log_se))


if __name__ == "__main__":
    for name, figure in Laws().joined.items():
        sys.stdout.write(f"{' | '.join(name)}: {figure}\n")
