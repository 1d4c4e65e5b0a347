"""What the first study says of each claim of the papers: the claim, what was measured, the figure, the verdict and the parts that repeat
it, from the committed laws alone.

    python studies/first/claims.py

A verdict follows from a 95% interval by a rule (rules.py) that stands in `CLAIMS` beside the claim, and not from a look at the figure.
Laws in which the size or the width is a variable are of all six widths (`frontier/`), those of batch size and horizon of the full grid
(`time_transfer/`).
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from measured import Laws, Name
from rules import IN_PART, SEEN, UNDECIDED, Rule, about, below, sign


class Claim(NamedTuple):
    """A claim of a paper and what answers it: figures by their symbol and name (measured.py), and the rule that makes a verdict of each.
    Where they have different verdicts the claim is seen in part, or undecided if one is. `given` is what must hold for the figures to
    answer it: in words, a number and a rule; unless that is seen the claim is undecided."""

    paper: str
    text: str
    measured: str
    figures: Mapping[str, Name]
    rule: Rule
    parts: str  # of studies/first/run, which repeat it
    given: tuple[str, Name, Rule] | None = None

    @property
    def names(self) -> list[Name]:
        return [*self.figures.values(), *([self.given[1]] if self.given else [])]


def verdict(claim: Claim, laws: Laws) -> str:
    if claim.given and claim.given[2].judge(laws.figure(claim.given[1])) != SEEN:
        return UNDECIDED
    found = {claim.rule.judge(laws.figure(name)) for name in claim.figures.values()}
    return found.pop() if len(found) == 1 else UNDECIDED if UNDECIDED in found else IN_PART


def _of(*where: str) -> Name:
    return ("time_transfer", *where)


def _slope(what: str, kind: str = "mup", study: str = "frontier") -> Name:
    return (study, "width_equality", f"slope of ln {what} in ln width under {kind}")


def _moves(batch: int, study: str = "time_transfer") -> Name:
    return (study, "lr_regimes", f"η* ∝ T^x at B = {batch}")


TT1, TT, MUP, KAPLAN = "Time Transfer, first version", "Time Transfer", "Tensor Programs V", "Kaplan et al."
WIDTHS, SIZES, FRONTIER = "time_transfer_16 time_transfer_32 time_transfer_64", "kaplan_transfer", "frontier"
SMALL_B, LARGE_B = 256, 8192
DOMAINS = ("licenses_legal", "linux_doc", "code")
SQRT, WIDTH, SIZE = about(0.5, 0.15), about(0.0, 0.15), about(0.0, 0.075)  # tolerances; that of N is that of the width, whose square it is
FORMS = {f"p by {form}": _of("lr_surface", f"B_crit ∝ T^p by {form}") for form in ("surge", "plateau")}
A_BEND = ("a bend is told from a power", _of("lr_surface", "rivals", "power"), sign(1))
BEYOND = (f"B_crit by surge is below {LARGE_B:,}", _of("lr_surface", "surge", "batch_crit"), below(LARGE_B))
BY_LOSS = (FRONTIER, "critical_growth", "rivals", "growth_tokens")
ALL_WIDTHS = f"{WIDTHS} frontier held_back"
ABOVE = "frontier above converged by, where sizes take over"
A_THIRD = "rms error, one law of all sizes over the loss stays"
CLAIMS = (
    Claim(TT1, "η* falls as 1/√T at small batches", "η* ∝ T^x at B = 256", {"x": _moves(SMALL_B)}, about(-0.5, 0.15), WIDTHS),
    Claim(
        TT1,
        "η* falls as 1/√T at small batches, lr decayed to zero at each T",
        "η* ∝ T^x at B = 512",
        {"x": _moves(512, "decay")},
        about(-0.5, 0.15),
        "decay",
    ),
    Claim(TT1, "η* rises as √T at large batches", "η* ∝ T^x at B = 8,192", {"x": _moves(LARGE_B)}, SQRT, WIDTHS, BEYOND),
    Claim(TT, "B_crit, where η*(B) bends, grows as T", "∝ T^p, rival forms of η*(B, T)", FORMS, about(1.0, 0.25), WIDTHS, A_BEND),
    Claim(
        TT,
        "B_crit grows as T",
        "noise scale near η* at equal B, ∝ T^p",
        {"p": _of("critical_growth", "B_crit ∝ T^p at equal batch size")},
        about(1.0, 0.25),
        WIDTHS,
    ),
    Claim(TT, "B_crit grows with T", "by branches of one run, ∝ T^p", {"p": ("branch", "growth by branches")}, sign(1), "branch"),
    Claim(TT, "B_crit is a law of T, not of the loss", "error of T on larger N, less that of L", {"excess": BY_LOSS}, sign(-1), ALL_WIDTHS),
    Claim(TT1, "B* grows as √T", "each B at its own η*, ∝ T^m", {"m": _of("batch_optimum", "B* ∝ T^m")}, SQRT, WIDTHS),
    Claim(TT, "B* grows with T", "each B at its own η*, ∝ T^m", {"m": _of("batch_optimum", "B* ∝ T^m")}, sign(1), WIDTHS),
    Claim(
        TT,
        "B* goes with B_crit",
        "correlation of B* and the noise scale",
        {"r": _of("batch_critical", "correlation of ln B* and ln B_crit (noise)")},
        sign(1),
        WIDTHS,
    ),
    Claim(
        TT, "B* stays below B_crit", "B* over the noise scale", {"ratio": _of("batch_critical", "B*/B_crit (noise)")}, below(1.0), WIDTHS
    ),
    Claim(
        TT,
        "a wrong η costs less as T grows",
        "mean excess from η*/2 to 2η*, ∝ T^x",
        {"x": _of("sensitivity", "sensitivity ∝ T^x")},
        sign(-1),
        WIDTHS,
    ),
    Claim(
        TT,
        "a wrong η costs as much at all widths under μP",
        "that, ∝ N^x",
        {"x": (FRONTIER, "sensitivity", "sensitivity ∝ N^x")},
        SIZE,
        ALL_WIDTHS,
    ),
    Claim(TT, "η* is the same at all widths under μP", "slope in width, 16 to 128", {"slope": _slope("η*")}, WIDTH, ALL_WIDTHS),
    Claim(TT, "B* is the same at all widths under μP", "slope in width, 16 to 128", {"slope": _slope("B*")}, WIDTH, ALL_WIDTHS),
    Claim(
        TT,
        "B_crit is the same at all widths at equal T",
        "noise scale, ∝ N^r",
        {"r": (FRONTIER, "critical_growth", "B_crit ∝ N^r at equal tokens")},
        SIZE,
        ALL_WIDTHS,
    ),
    Claim(
        MUP,
        "η* is the same at all widths under μP",
        "slope in width, 32 to 256",
        {"slope": _slope("η*", "mup", "mup_transfer")},
        WIDTH,
        "mup_transfer",
    ),
    Claim(
        MUP,
        "η* falls with the width under standard",
        "slope in width, 32 to 256",
        {"slope": _slope("η*", "standard", "mup_transfer")},
        sign(-1),
        "mup_transfer",
    ),
    Claim(
        KAPLAN,
        "L(N) ∝ N^−0.076",
        "at 4.2M tokens, unconverged",
        {"α_N": (SIZES, "kaplan_n", "kaplan_n", "alpha_n")},
        about(0.076, 0.02),
        SIZES,
    ),
    Claim(
        KAPLAN,
        "L(D) ∝ D^−0.095, stopped early",
        "subsets of the text, repeated",
        {"α_D": ("kaplan_nd", "kaplan_d", "kaplan_d", "alpha_d")},
        about(0.095, 0.02),
        "kaplan_nd",
    ),
    Claim(
        KAPLAN,
        "data must grow as N^0.74",
        "L(N, D), α_N/α_D",
        {"γ": ("kaplan_nd", "kaplan_overfitting", "γ by L(N, D)")},
        about(0.74, 0.15),
        "kaplan_nd",
    ),
    Claim(
        KAPLAN,
        "L(N, S): at convergence it falls as N^−0.077",
        "six widths, S_min by the noise scale",
        {"α_N": (FRONTIER, "kaplan_ns", "kaplan_ns", "alpha_n")},
        about(0.077, 0.02),
        ALL_WIDTHS,
    ),
    Claim(
        KAPLAN,
        "L(N, S): what is left falls as S^−0.76",
        "six widths, S_min by the noise scale",
        {"α_S": (FRONTIER, "kaplan_ns", "kaplan_ns", "alpha_s")},
        about(0.76, 0.15),
        ALL_WIDTHS,
    ),
    Claim(
        KAPLAN,
        "a curve's first part foretells the rest",
        "error of one L(N, S) over that of no change, last third",
        {"ratio": (SIZES, "kaplan_extrapolation", A_THIRD)},
        below(0.5),
        SIZES,
    ),
    Claim(
        KAPLAN,
        "curves have the same parameters at all sizes",
        "largest exponent over the smallest",
        {"ratio": (SIZES, "kaplan_extrapolation", "largest exponent over the smallest")},
        below(1.5),
        SIZES,
    ),
    Claim(
        KAPLAN,
        "the shape hardly matters over a factor 40 in aspect",
        "worst over best of two blocks or more, %",
        {"excess": ("kaplan_shape", "worst of two blocks or more, aspects within a factor 40, %")},
        below(3.0),
        "kaplan_shape",
    ),
    Claim(
        KAPLAN,
        "another domain's loss goes along, at a constant offset",
        "nats there for a nat here",
        {domain: (SIZES, "kaplan_transfer", f"slope of {domain}, L' = s·L + c") for domain in DOMAINS},
        about(1.0, 0.15),
        SIZES,
    ),
    Claim(
        KAPLAN,
        "larger models need fewer tokens to a loss",
        "tokens ∝ N^p at equal loss",
        {"p": (FRONTIER, "kaplan_efficiency", "p of tokens (and steps) to a loss ∝ N^p")},
        sign(-1),
        ALL_WIDTHS,
    ),
    Claim(
        KAPLAN,
        "L(C) ∝ C^−0.057",
        "lower envelope of the sizes, C = 6·N·T",
        {"α_C": (FRONTIER, "kaplan_c", "kaplan_c", "alpha_c")},
        about(0.057, 0.015),
        ALL_WIDTHS,
    ),
    Claim(
        KAPLAN,
        "L(C_min) ∝ C_min^−0.050",
        "lower envelope of sizes and batches, B_crit by the noise scale",
        {"α_C^min": (FRONTIER, "kaplan_cmin", "kaplan_cmin", "alpha_c_min")},
        about(0.05, 0.015),
        ALL_WIDTHS,
    ),
    Claim(
        KAPLAN,
        "the best N grows as C^0.73",
        "N ∝ C_min^p",
        {"p": (FRONTIER, "kaplan_allocation", "p of N ∝ C_min^p, measured")},
        about(0.73, 0.15),
        ALL_WIDTHS,
    ),
    Claim(
        KAPLAN,
        "the frontier stops 10% above convergence",
        "share above L(N, ∞)",
        {"share": (FRONTIER, "kaplan_allocation", ABOVE)},
        about(0.1, 0.05),
        ALL_WIDTHS,
    ),
    Claim(
        KAPLAN,
        "0.6 to 2.2 times the best N costs 20% more compute at most",
        "by L(N, S)",
        {f"{size} times": (FRONTIER, "kaplan_ns", f"compute for {size} times the efficient size") for size in ("0.6", "2.2")},
        below(1.2),
        ALL_WIDTHS,
    ),
    Claim(
        KAPLAN,
        "B_crit ∝ L^−4.8",
        "noise scale near η* at equal B, ∝ L^x, above and below the median loss",
        {f"x {side}": (FRONTIER, "critical_growth", f"B_crit ∝ L^x {side} the median loss") for side in ("above", "below")},
        about(-1 / 0.21, 1.5),
        ALL_WIDTHS,
    ),
    Claim(
        KAPLAN, "B_crit is a law of the loss, not of T", "error of T on larger N, less that of L", {"excess": BY_LOSS}, sign(1), ALL_WIDTHS
    ),
    Claim(
        KAPLAN,
        "B_crit is the same at all sizes at equal loss",
        "noise scale, ∝ N^r",
        {"r": (FRONTIER, "critical_growth", "B_crit ∝ N^r at equal loss")},
        SIZE,
        ALL_WIDTHS,
    ),
)


def table(claims: Iterable[Claim], laws: Laws) -> str:
    """Markdown; claims of parts that have not been run are left out."""
    lines = ["| claim | measured | figure (95%) | seen if | verdict | `studies/first/run` |", "|---|---|---|---|---|---|"]
    for claim in claims:
        if not all(map(laws.has, claim.names)):
            continue
        shown = "; ".join(f"{symbol}: {laws.figure(where)}" for symbol, where in claim.figures.items())
        wanted = f"{claim.rule.wanted}, given that {claim.given[0]}" if claim.given else claim.rule.wanted
        said = f"{claim.text} ({claim.paper}) | {claim.measured} | {shown} | {wanted} | {verdict(claim, laws)}"
        lines.append(f"| {said} | `{claim.parts} fit` |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(CLAIMS, Laws()))
