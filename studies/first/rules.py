"""Rules that make a verdict of a number and its 95% interval."""

from collections.abc import Callable
from typing import NamedTuple

from measured import Figure, digits

SEEN, NOT_SEEN, IN_PART, UNDECIDED = "seen", "not seen", "seen in part", "undecided at this scale"


class Rule(NamedTuple):
    """`wanted` says what is seen if the whole interval has it; `judge` makes the verdict."""

    wanted: str
    judge: Callable[[Figure], str]


def sign(wanted: int, small: float = 0.1) -> Rule:
    """Seen if the interval lies on the wanted side of 0; not seen if on the other, or within `small` of 0; else undecided."""

    def judge(figure: Figure) -> str:
        if figure.positive or figure.negative:
            return SEEN if figure.positive == (wanted > 0) else NOT_SEEN
        near = figure.low is not None and figure.high is not None and max(-figure.low, figure.high) < small
        return NOT_SEEN if near else UNDECIDED

    return Rule("above 0" if wanted > 0 else "below 0", judge)


def about(value: float, within: float) -> Rule:
    """Of a claim of a value: seen if the whole interval lies within so much of it, not seen if none of it does, else undecided."""

    def judge(figure: Figure) -> str:
        low, high = value - within, value + within
        if figure.low is not None and figure.high is not None and low <= figure.low and figure.high <= high:
            return SEEN
        beyond = (figure.low is not None and figure.low > high) or (figure.high is not None and figure.high < low)
        return NOT_SEEN if beyond else UNDECIDED

    return Rule(f"within {digits(within)} of {digits(value)}", judge)


def below(limit: float) -> Rule:
    """Of a claim that something is small: seen if the interval, or a number without one, is below, not seen if above, else undecided."""

    def judge(figure: Figure) -> str:
        if figure.value is None:
            return UNDECIDED
        low, high = (figure.value, figure.value) if figure.low is None and figure.high is None else (figure.low, figure.high)
        if high is not None and high < limit:
            return SEEN
        return NOT_SEEN if low is not None and low > limit else UNDECIDED

    return Rule(f"below {digits(limit)}", judge)
