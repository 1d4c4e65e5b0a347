"""What the first study says of each claim of the two papers: the claim, what was measured, the figure, the verdict and the command that
repeats it, from the committed laws alone.

    python studies/first/claims.py            # prints the table
    python studies/first/claims.py --write    # writes docs/first_study.md from studies/first/story.md
    python studies/first/claims.py --check    # exit code 1 where the two disagree

A verdict follows from a 95% interval by a rule that stands in `CLAIMS` beside the claim, not from a look at the figure.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
STORY, PAGE = HERE / "story.md", HERE.parents[1] / "docs/first_study.md"
SEEN, NOT_SEEN, UNDECIDED = "seen", "not seen", "undecided at this scale"


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

    def holds(self, value: float) -> bool:
        """Whether the interval is closed and has this value in it."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high


def digits(value: float) -> str:
    """Two digits of small numbers, three of others, as text that suits the size."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:.{places}f}".replace("-", "−")


class Laws:
    """The laws of every study, read back from studies/first/*/laws.json."""

    def __init__(self, folder: Path = HERE) -> None:
        self.parts = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/laws.json"))}

    def law(self, part: str, law: str) -> dict[str, Any]:
        """KeyError where there is none, with the reason."""
        laws = self.parts[part]
        if law not in laws["laws"]:
            raise KeyError(f"{part}: {law}: {laws['not_fitted'].get(law, 'was not asked for')}")
        return laws["laws"][law]

    def number(self, part: str, law: str, name: str) -> Figure:
        """A number of a law, by its name."""
        for number in self.law(part, law)["numbers"]:
            if number["name"] == name:
                return Figure(number["value"], number["low"], number["high"])
        raise KeyError(f"{part}: {law} has no number {name!r}; it has {[number['name'] for number in self.law(part, law)['numbers']]}")

    def numbers(self, part: str, law: str, pattern: str) -> dict[str, Figure]:
        """All numbers of a law whose name matches, by what the pattern's group caught."""
        found = {}
        for number in self.law(part, law)["numbers"]:
            if match := re.fullmatch(pattern, number["name"]):
                found[match[1]] = Figure(number["value"], number["low"], number["high"])
        return found

    def parameter(self, part: str, law: str, form: str, name: str) -> Figure:
        """A parameter of one form of a law."""
        parameter = self.law(part, law)["fits"][form]["parameters"][name]
        if parameter["not_identified"]:
            return Figure(None)
        return Figure(parameter["value"], parameter["low"], parameter["high"])


class Claim(NamedTuple):
    """A claim of a paper, and how the study answers it. `figure` and `verdict` are made from the laws."""

    paper: str
    text: str
    measured: str
    figure: Callable[[Laws], str]
    verdict: Callable[[Laws], str]
    repeat: str  # the command, after `studies/first/run PART`


TT, TT_V1, MUP, KAPLAN = "Time Transfer", "Time Transfer, first version", "Tensor Programs V", "Kaplan et al."


def sign(figure: Figure, wanted: int) -> str:
    """Whether the interval lies on the wanted side of 0 (seen), on the other or within 0.1 of it (not seen)."""
    if figure.value is None or (figure.low is None and figure.high is None):
        return UNDECIDED
    if (figure.positive, figure.negative)[wanted < 0]:
        return SEEN
    small = figure.low is not None and figure.high is not None and max(abs(figure.low), abs(figure.high)) < 0.1
    return NOT_SEEN if small or (figure.negative, figure.positive)[wanted < 0] else UNDECIDED


def agrees(figure: Figure, value: float) -> str:
    """Whether a value lies in the interval: seen if it does and the interval is shorter than 1, else undecided, or not seen."""
    if figure.value is None or figure.low is None or figure.high is None:
        return UNDECIDED
    if not figure.holds(value):
        return NOT_SEEN
    return SEEN if figure.high - figure.low < 1 else UNDECIDED


def regimes(laws: Laws) -> dict[int, Figure]:
    return {int(float(batch)): figure for batch, figure in laws.numbers("time_transfer", "lr_regimes", r"η\* ∝ T\^x at B = (\S+)").items()}


def at_ends(figures: dict[int, Figure]) -> str:
    first, last = min(figures), max(figures)
    return f"x = {figures[first]} at B = {first}; {figures[last]} at B = {last}"


def rises_somewhere(laws: Laws) -> str:
    found = regimes(laws).values()
    return SEEN if any(figure.positive for figure in found) else NOT_SEEN if all(figure.negative for figure in found) else UNDECIDED


def forms(laws: Laws, name: str) -> str:
    return "; ".join(f"{form} {laws.parameter('time_transfer', 'lr_surface', form, name)}" for form in ("surge", "plateau"))


def all_forms(laws: Laws, name: str, value: float) -> str:
    found = {agrees(laws.parameter("time_transfer", "lr_surface", form, name), value) for form in ("surge", "plateau")}
    return found.pop() if len(found) == 1 else UNDECIDED


def table(claims: list[Claim], laws: Laws) -> str:
    """Markdown."""
    lines = ["| claim | measured | figure | verdict | part |", "|---|---|---|---|---|"]
    for claim in claims:
        cells = [f"{claim.text} ({claim.paper})", claim.measured, claim.figure(laws), claim.verdict(laws), f"`{claim.repeat}`"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
