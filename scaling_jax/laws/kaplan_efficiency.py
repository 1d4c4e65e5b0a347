"""Kaplan et al. 2020 (arXiv 2001.08361) on sample efficiency (section 1.1, Fig. 2): larger models reach the same loss with fewer tokens."""

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.frontier import different_sizes, tokens_to, tuned, tuning_said
from scaling_jax.laws.kaplan_curves import after_warmup, student
from scaling_jax.laws.kaplan_theory import SOURCE

LEVELS = 6  # losses that sizes are compared at


def equal_losses(rows: pandas.DataFrame, least_sizes: int = 3) -> pandas.DataFrame:
    """Tokens to the same losses for several sizes at one batch size, tuned at each horizon and interpolated in log tokens between them.

    Returns:
      Columns params, batch_tokens, loss, tokens, steps, level (a number for each batch size and loss): losses equally spaced in log over
      the range that at least so many sizes pass, sizes that pass them. Empty where there is none.
    """
    best = tuned(rows, ("size", "batch_tokens", "horizon"))
    found: list[dict] = []
    level = 0
    for batch, of_batch in best.groupby("batch_tokens"):
        courses = {size: (c["tokens"].to_numpy(float), c["loss"].to_numpy(float)) for size, c in of_batch.groupby("size") if len(c) > 1}
        if len(courses) < least_sizes:
            continue
        tried = np.geomspace(of_batch["loss"].max(), of_batch["loss"].min(), 400)
        passed_K = np.isfinite([tokens_to(*course, tried) for course in courses.values()]).sum(axis=0) >= least_sizes
        if not passed_K.any():
            continue
        for loss in np.geomspace(tried[passed_K].max(), tried[passed_K].min(), LEVELS):
            reached = {size: float(tokens_to(*course, np.array([loss]))[0]) for size, course in courses.items()}
            reached = {size: tokens for size, tokens in reached.items() if np.isfinite(tokens)}
            if len(reached) >= least_sizes:
                level += 1
                found += [
                    {"params": n, "batch_tokens": batch, "loss": loss, "tokens": t, "steps": t / batch, "level": level}
                    for n, t in reached.items()
                ]
    return pandas.DataFrame(found, columns=["params", "batch_tokens", "loss", "tokens", "steps", "level"])


def common_slope(points: pandas.DataFrame) -> tuple[float, float, np.ndarray]:
    """The slope of ln tokens in ln params, with an intercept for each level.

    Args:
      points: of `equal_losses`; three sizes or more at each level.

    Returns:
      The slope; its standard error, leaving out one size at a time, whose run's noise is in all levels; and the mean residual of each size
    """
    value, residual = _within(points)
    sizes = np.unique(points["params"])
    without = np.array([_within(points[points["params"] != size])[0] for size in sizes])
    error = np.sqrt((len(sizes) - 1) / len(sizes) * np.sum((without - value) ** 2))
    return value, float(error), pandas.Series(residual).groupby(points["params"].to_numpy()).mean().to_numpy()


def _within(points: pandas.DataFrame) -> tuple[float, np.ndarray]:
    level = np.unique(points["level"], return_inverse=True)[1]
    logs = (np.log(points[name].to_numpy(float)) for name in ("params", "tokens"))
    x, y = (values - (np.bincount(level, values) / np.bincount(level))[level] for values in logs)
    slope = float(np.sum(x * y) / np.sum(x**2))
    return slope, y - slope * x


def efficiency(table: pandas.DataFrame) -> Finding:
    """The power of size that the tokens to a loss fall with, at equal batch size and so in steps too."""
    what = "sample efficiency"
    rows = after_warmup(table)
    different_sizes(rows["size"], 3, what)
    points = equal_losses(rows)
    if len(points) == 0:
        raise UserError(
            f"{what} needs a loss that 3 sizes or more pass between their first and last horizons, at one batch size; there is none: "
            "more horizons, or sizes nearer to each other"
        )
    different_sizes(points["params"], 3, what)
    slope, error, off_G = common_slope(points)
    freedom = len(off_G) - 2
    ends = (slope - student(freedom) * error, slope + student(freedom) * error)
    numbers = [Number("p of tokens (and steps) to a loss ∝ N^p", slope, *ends)]
    span, smallest, largest = _widest(points)
    scatter = float(np.exp(student(freedom) * np.sqrt(2 * np.sum(off_G**2) / freedom)))
    times = float(smallest["tokens"] / largest["tokens"])
    numbers.append(
        Number(
            f"tokens of N = {smallest['params']:.3g} over those of N = {largest['params']:.3g}",
            times,
            times / scatter,
            times * scatter,
            note=f"at {smallest['loss']:.4g} nats, batches of {smallest['batch_tokens']:.4g} tokens",
        )
    )
    said = _said(points, ends, span, times) + [tuning_said(tuned(rows, ("size", "batch_tokens", "horizon")))]
    return Finding("kaplan_efficiency", what, {}, None, numbers, said, points, int(rows["run"].nunique()))


def _widest(points: pandas.DataFrame) -> tuple[float, pandas.Series, pandas.Series]:
    """Factor of size, smallest and largest row, of the level whose sizes lie furthest apart; of several the lowest loss."""
    found = []
    for _, level in points.groupby("level"):
        smallest, largest = level.loc[level["params"].idxmin()], level.loc[level["params"].idxmax()]
        found.append((float(largest["params"] / smallest["params"]), -float(smallest["loss"]), smallest, largest))
    span, _, smallest, largest = max(found, key=lambda entry: (round(np.log(entry[0]), 6), entry[1]))
    return span, smallest, largest


def _said(points: pandas.DataFrame, ends: tuple[float, float], span: float, times: float) -> list[str]:
    steps = points.sort_values(["level", "params"])
    change = np.log(steps["tokens"]).groupby(steps["level"]).diff().dropna()
    if ends[0] <= 0 <= ends[1]:
        verdict = f"whether larger models need fewer tokens to the same loss cannot be told from {points['params'].nunique()} sizes"
    else:
        verdict = f"larger models need {'fewer' if ends[1] < 0 else 'more'} tokens to the same loss"
    said = [
        f"{verdict}: over a factor {span:.3g} in size the smallest took {times:.3g} times the tokens of the largest; from one size to the "
        f"next the larger took fewer {int((change < 0).sum())} of {len(change)} times; {SOURCE} have larger models take fewer",
        "at equal batch size the steps are in the same proportion as the tokens; the intervals are over sizes, the slope's by leaving out "
        "one at a time, since horizons and losses of a run share its noise",
    ]
    batch = points["batch_tokens"].mode().iloc[0]
    mine = points[points["batch_tokens"] == batch]
    slopes = {loss: _within(level)[0] for loss, level in mine.groupby("loss")}
    if len(slopes) > 1:
        low, high = min(slopes), max(slopes)
        said.append(
            f"the slope moves with the loss, from {slopes[high]:.3g} at {high:.4g} nats to {slopes[low]:.3g} at {low:.4g} nats, at batches "
            f"of {batch:.4g} tokens: one power is a mean over these"
        )
    sizes = points.groupby("batch_tokens")["params"].nunique()  # that have that batch size
    level = points.groupby("level")
    missing = level["batch_tokens"].first().map(sizes) - level["params"].nunique()
    if (missing > 0).any():
        said.append(
            f"at {int((missing > 0).sum())} of {len(missing)} levels some sizes are missing, which never got so low or were lower from the "
            "first horizon on: they would have needed more, or fewer, tokens than were measured"
        )
    return said


ANALYSES = (
    Analysis(
        "kaplan_efficiency", "sample efficiency", ("params", "tokens", "loss", "batch_tokens"), efficiency, f"{SOURCE}, sec. 1.1, Fig. 2"
    ),
)
