"""What the first study says of each claim of the two papers: the claim, what was measured, the figure, the verdict and the parts that
repeat it, from the committed laws alone.

    python studies/first/claims.py

A verdict follows from a 95% interval by a rule that stands in `CLAIMS` beside the claim, and not from a look at the figure.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
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

    def within(self, small: float) -> bool:
        """Whether a closed interval lies that near to 0."""
        return self.low is not None and self.high is not None and max(abs(self.low), abs(self.high)) < small


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
        self.studies = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/laws.json"))}

    def figure(self, where: tuple[str, ...]) -> Figure:
        """A number by (study, law, name), or a parameter by (study, law, form, name); one that could not be fitted is not identified.

        KeyError where the study's laws know no such number or parameter.
        """
        study, law, *names = where
        found = self.studies[study]["laws"].get(law)
        if found is None:
            assert law in self.studies[study]["not_fitted"], law
            return Figure(None)
        if len(names) == 1:
            one: dict[str, Any] = next((number for number in found["numbers"] if number["name"] == names[0]), {})
            if not one:
                raise KeyError(f"{study}: {law} has no number {names[0]!r}, only {[number['name'] for number in found['numbers']]}")
        else:
            one = found["fits"][names[0]]["parameters"][names[1]]
            if one["not_identified"]:
                return Figure(None)
        return Figure(one["value"], one["low"], one["high"])


Rule = Callable[[Figure], str]


class Claim(NamedTuple):
    """A claim of a paper and what answers it: figures by their symbol, each as (study, law, number) or (study, law, form, parameter), and
    the rule that makes a verdict of one. Where figures have different verdicts the claim is undecided."""

    paper: str
    text: str
    measured: str
    figures: Mapping[str, tuple[str, ...]]
    rule: Rule
    parts: str  # of studies/first/run, which repeat it


def sign(wanted: int, small: float = 0.1) -> Rule:
    """Seen if the interval lies on the wanted side of 0; not seen if on the other, or within `small` of 0; else undecided."""

    def rule(figure: Figure) -> str:
        if figure.positive or figure.negative:
            return SEEN if figure.positive == (wanted > 0) else NOT_SEEN
        return NOT_SEEN if figure.within(small) else UNDECIDED

    return rule


def unchanged(small: float) -> Rule:
    """Of a claim that nothing moves: seen if the interval lies within `small` of 0, not seen if it lies outside of that, else undecided."""

    def rule(figure: Figure) -> str:
        if figure.within(small):
            return SEEN
        beyond = (figure.low is not None and figure.low > small) or (figure.high is not None and figure.high < -small)
        return NOT_SEEN if beyond else UNDECIDED

    return rule


def is_about(value: float, width: float) -> Rule:
    """Of a claim of a value: not seen if a closed interval lacks it, seen if it has it and is no wider than `width`, else undecided."""

    def rule(figure: Figure) -> str:
        if figure.value is None or figure.low is None or figure.high is None:
            return UNDECIDED
        if not figure.low <= value <= figure.high:
            return NOT_SEEN
        return SEEN if figure.high - figure.low <= width else UNDECIDED

    return rule


def verdict(claim: Claim, laws: Laws) -> str:
    found = {claim.rule(laws.figure(where)) for where in claim.figures.values()}
    return found.pop() if len(found) == 1 else UNDECIDED


def _of(*where: str) -> tuple[str, ...]:
    return ("time_transfer", *where)


def _slope(what: str, kind: str = "mup", study: str = "time_transfer") -> tuple[str, ...]:
    return (study, "width_equality", f"slope of ln {what} in ln width under {kind}")


TT1, TT, MUP, KAPLAN = "Time Transfer, first version", "Time Transfer", "Tensor Programs V", "Kaplan et al."
WIDTHS = "time_transfer_16 time_transfer_32 time_transfer_64"
NOISE_IN_T = _of("critical_growth", "growth_tokens", "tokens_exponent")
AT_EQUAL_T, AT_EQUAL_L = (_of("critical_growth", f"B_crit ∝ N^r at equal {what}") for what in ("tokens", "loss"))
DETRENDED = _of("batch_critical", "the same beyond the trends in T (noise)")
SMALL_B, LARGE_B = ({f"x at B = {batch:,}": _of("lr_regimes", f"η* ∝ T^x at B = {batch}")} for batch in (256, 8192))
FORMS = {f"p by {form}": _of("lr_surface", f"B_crit ∝ T^p by {form}") for form in ("surge", "plateau")}
CLAIMS = (
    Claim(TT1, "η* falls as 1/√T at small batches", "exponent at the smallest B", SMALL_B, is_about(-0.5, 0.3), WIDTHS),
    Claim(TT1, "η* rises as √T at large batches", "exponent at a large B", LARGE_B, sign(1), WIDTHS),
    Claim(TT, "B_crit, where η*(B) bends, grows as T", "rival forms of η*(B, T)", FORMS, is_about(1.0, 0.5), WIDTHS),
    Claim(TT, "B_crit grows as T", "noise scale near the best η", {"exponent": NOISE_IN_T}, is_about(1.0, 0.5), WIDTHS),
    Claim(TT, "B* grows with T", "best B, each at its own best η", {"exponent": _of("batch_optimum", "B* ∝ T^m")}, sign(1), WIDTHS),
    Claim(TT, "B* goes with B_crit", "correlation beyond the trend of each in T", {"r": DETRENDED}, sign(1), WIDTHS),
    Claim(
        TT,
        "a wrong η costs less as T grows",
        "excess loss about η*",
        {"exponent": _of("sensitivity", "sensitivity ∝ T^x")},
        sign(-1),
        WIDTHS,
    ),
    Claim(
        TT,
        "… and as much at all widths under μP",
        "excess over the loss",
        {"slope in width": _slope("sensitivity/L")},
        unchanged(0.15),
        WIDTHS,
    ),
    Claim(TT, "η* is the same at all widths under μP", "η* at equal B and T", {"slope in width": _slope("η*")}, unchanged(0.15), WIDTHS),
    Claim(TT, "B* is the same at all widths under μP", "B* at equal T", {"slope in width": _slope("B*")}, unchanged(0.15), WIDTHS),
    Claim(TT, "B_crit depends on T, not on N", "what N adds at equal T", {"power of N": AT_EQUAL_T}, unchanged(0.15), WIDTHS),
    Claim(KAPLAN, "B_crit depends on the loss, not on N", "what N adds at equal loss", {"power of N": AT_EQUAL_L}, unchanged(0.15), WIDTHS),
)


def table(claims: Iterable[Claim], laws: Laws) -> str:
    """Markdown; claims whose study has no laws yet are left out."""
    lines = ["| claim | measured | figure (95%) | verdict | parts |", "|---|---|---|---|---|"]
    for claim in claims:
        if not {where[0] for where in claim.figures.values()} <= {*laws.studies}:
            continue
        shown = "; ".join(f"{symbol}: {laws.figure(where)}" for symbol, where in claim.figures.items())
        lines.append(f"| {claim.text} ({claim.paper}) | {claim.measured} | {shown} | {verdict(claim, laws)} | `{claim.parts}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(CLAIMS, Laws()))
