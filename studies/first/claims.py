"""What the first study says of each claim of the papers: the claim, what was measured, the figure, the verdict and the parts that repeat
it, from the committed laws alone.

    python studies/first/claims.py

A verdict follows from a 95% interval by a rule (rules.py) that stands in `CLAIMS` beside the claim, and not from a look at the figure.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from measured import Laws, Name
from rules import UNDECIDED, Rule, about, below, sign


class Claim(NamedTuple):
    """A claim of a paper and what answers it: figures by their symbol, each as (study, law, number) or (study, law, form, parameter), and
    the rule that makes a verdict of one. Where figures have different verdicts the claim is undecided."""

    paper: str
    text: str
    measured: str
    figures: Mapping[str, Name]
    rule: Rule
    parts: str  # of studies/first/run, which repeat it


def verdict(claim: Claim, laws: Laws) -> str:
    found = {claim.rule.judge(laws.figure(where)) for where in claim.figures.values()}
    return found.pop() if len(found) == 1 else UNDECIDED


def _of(*where: str) -> Name:
    return ("time_transfer", *where)


def _slope(what: str, kind: str = "mup", study: str = "time_transfer") -> Name:
    return (study, "width_equality", f"slope of ln {what} in ln width under {kind}")


def _moves(batch: int, study: str = "time_transfer") -> Name:
    return (study, "lr_regimes", f"η* ∝ T^x at B = {batch}")


TT1, TT, MUP, KAPLAN = "Time Transfer, first version", "Time Transfer", "Tensor Programs V", "Kaplan et al."
WIDTHS, SIZES = "time_transfer_16 time_transfer_32 time_transfer_64", "kaplan_transfer"
SMALL_B, LARGE_B, DECAYED = 256, 8192, (512, 2048, 8192)
DOMAINS = ("licenses_legal", "linux_doc", "code")
FORMS = {f"p by {form}": _of("lr_surface", f"B_crit ∝ T^p by {form}") for form in ("surge", "plateau")}
FRONTIER = "frontier above converged by, where sizes take over"
A_THIRD = "rms error, one law of all sizes over the loss stays"
CLAIMS = (
    Claim(TT1, "η* falls as 1/√T at small batches", "η* ∝ T^x at B = 256", {"x": _moves(SMALL_B)}, about(-0.5, 0.15), WIDTHS),
    Claim(TT1, "η* rises as √T at large batches", "η* ∝ T^x at B = 8,192", {"x": _moves(LARGE_B)}, sign(1), WIDTHS),
    Claim(TT, "B_crit, where η*(B) bends, grows as T", "∝ T^p, rival forms of η*(B, T)", FORMS, about(1.0, 0.25), WIDTHS),
    Claim(
        TT,
        "B_crit grows as T",
        "noise scale near η*, ∝ T^p",
        {"p": _of("critical_growth", "growth_tokens", "tokens_exponent")},
        about(1.0, 0.25),
        WIDTHS,
    ),
    Claim(TT, "B_crit grows with T", "by branches of one run, ∝ T^p", {"p": ("branch", "growth by branches")}, sign(1), "branch"),
    Claim(TT, "B* grows with T", "each B at its own η*, ∝ T^m", {"m": _of("batch_optimum", "B* ∝ T^m")}, sign(1), WIDTHS),
    Claim(
        TT,
        "B* goes with B_crit",
        "correlation with the noise scale beyond the trend of each in T",
        {"r": _of("batch_critical", "the same beyond the trends in T (noise)")},
        sign(1),
        WIDTHS,
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
        "that over the loss, slope in width",
        {"slope": _slope("sensitivity/L")},
        about(0.0, 0.15),
        WIDTHS,
    ),
    Claim(TT, "η* is the same at all widths under μP", "slope in width", {"slope": _slope("η*")}, about(0.0, 0.15), WIDTHS),
    Claim(TT, "B* is the same at all widths under μP", "slope in width", {"slope": _slope("B*")}, about(0.0, 0.15), WIDTHS),
    Claim(
        TT,
        "B_crit depends on T, not on N",
        "noise scale at equal T, ∝ N^r",
        {"r": _of("critical_growth", "B_crit ∝ N^r at equal tokens")},
        about(0.0, 0.15),
        WIDTHS,
    ),
    Claim(
        TT,
        "η* falls with T where lr decays to zero at each T",
        "∝ T^x at three batches",
        {f"B = {batch:,}": _moves(batch, "decay") for batch in DECAYED},
        sign(-1),
        "decay",
    ),
    Claim(
        MUP,
        "η* is the same at all widths under μP",
        "slope, widths 32 to 256",
        {"slope": _slope("η*", "mup", "mup_transfer")},
        about(0.0, 0.15),
        "mup_transfer",
    ),
    Claim(
        MUP,
        "η* falls as 1/width under standard",
        "slope, widths 32 to 256",
        {"slope": _slope("η*", "standard", "mup_transfer")},
        about(-1.0, 0.25),
        "mup_transfer",
    ),
    Claim(
        KAPLAN,
        "L(N) ∝ N^−0.076",
        "N from 6,144 to 786,432",
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
        "L(N, S): what is left falls as S^−0.76",
        "curves of five sizes",
        {"α_S": (SIZES, "kaplan_ns", "kaplan_ns", "alpha_s")},
        about(0.76, 0.15),
        SIZES,
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
        "the shape hardly matters",
        "worst of aspects 0.5 to 90 over the best, %",
        {"excess": ("kaplan_shape", "kaplan_shape", "largest excess over the best shape")},
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
        {"p": (SIZES, "kaplan_efficiency", "p of tokens (and steps) to a loss ∝ N^p")},
        sign(-1),
        SIZES,
    ),
    Claim(
        KAPLAN,
        "the best N grows as C^0.73",
        "N ∝ C^p",
        {"p": (SIZES, "kaplan_allocation", "p of N ∝ C^p, measured")},
        about(0.73, 0.15),
        SIZES,
    ),
    Claim(
        KAPLAN,
        "the frontier stops 10% above convergence",
        "share above L(N, ∞)",
        {"share": (SIZES, "kaplan_allocation", FRONTIER)},
        about(0.1, 0.05),
        SIZES,
    ),
    Claim(
        KAPLAN,
        "B_crit ∝ L^−4.8",
        "noise scale near η*, ∝ L^x",
        {"x": _of("critical_growth", "growth_loss", "loss_exponent")},
        about(-1 / 0.21, 1.5),
        WIDTHS,
    ),
    Claim(
        KAPLAN,
        "B_crit depends on the loss, not on N",
        "noise scale at equal loss, ∝ N^r",
        {"r": _of("critical_growth", "B_crit ∝ N^r at equal loss")},
        about(0.0, 0.15),
        WIDTHS,
    ),
)


def table(claims: Iterable[Claim], laws: Laws) -> str:
    """Markdown; claims of parts that have not been run are left out."""
    lines = ["| claim | measured | figure (95%) | seen if | verdict | `studies/first/run` |", "|---|---|---|---|---|---|"]
    for claim in claims:
        if not all(map(laws.has, claim.figures.values())):
            continue
        shown = "; ".join(f"{symbol}: {laws.figure(where)}" for symbol, where in claim.figures.items())
        said = f"{claim.text} ({claim.paper}) | {claim.measured} | {shown} | {claim.rule.wanted} | {verdict(claim, laws)}"
        lines.append(f"| {said} | `{claim.parts} fit` |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(CLAIMS, Laws()))
