"""The size of least loss for a budget of compute, measured: the envelope over courses of training, and parabolas at equal budgets.

Hoffmann et al. 2022 (arXiv 2203.15556), approaches 1 and 2. Both end in N_opt = k·C^a, a straight line through the logarithms of what is
measured at several budgets. Data follow from C = 6·N·D.
"""

import numpy as np
import pandas

from scaling_jax.laws.frontier import envelope, interpolated, near_groups

BIN = 0.05  # neighbouring budgets within this are one
SPREAD = 0.25  # and all of a bin together within this
LEAST_SIZES, LEAST_BINS = 5, 3  # that make bins of a table; it is interpolated otherwise
REACH = 16.0  # sizes up to this factor from the best one measured are in a parabola
ENVELOPE_BUDGETS = 1500


def bins(rows: pandas.DataFrame, budget: str = "flops") -> pandas.Series | None:
    """A label for each row of a budget that five sizes or more share, -1 for the rest; None where fewer than three are so shared."""
    label = pandas.Series(near_groups(rows[budget], BIN), index=rows.index)
    grouped = rows.groupby(label)
    good = (grouped["size"].nunique() >= LEAST_SIZES) & (grouped[budget].max() <= (1 + SPREAD) * grouped[budget].min())
    return label.where(label.map(good), -1) if good.sum() >= LEAST_BINS else None


def minima(rows: pandas.DataFrame, budget: str = "flops", weights: np.ndarray | None = None, count: int = 12) -> pandas.DataFrame:
    """The minimum of a parabola in log N at each budget.

    Args:
      rows: tuned, of several sizes; columns size, loss, and the budget (FLOP).
      budget: its column.
      weights: of the rows, [n]; all alike by default.
      count: of budgets, where the table has none that sizes share and courses are interpolated.

    Returns:
      Columns flops (of the budget), params and loss (of the minimum), tokens = flops/(6·params), sizes (in the parabola), `censored`, and
      `side`: "" or "low" (the best size is at most `params`, the smallest measured), "high" (at least, the largest), "too few" sizes.
    """
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights, float)
    label = bins(rows, budget)
    found = []
    if label is not None:
        for at in sorted(set(label) - {-1}):
            mine = (label == at).to_numpy()
            mean = float(np.exp(np.log(rows[budget][mine]).mean()))
            found.append((mean, *_parabola(rows["size"][mine].to_numpy(), rows["loss"][mine].to_numpy(), weights[mine])))
    else:
        budgets = np.geomspace(rows[budget].min(), rows[budget].max(), count + 2)[1:-1]
        loss_SxK, sizes = interpolated(rows, budgets, budget)
        of_size = pandas.Series(weights).groupby(rows["size"].to_numpy()).mean().reindex(sizes).to_numpy()
        for k, at in enumerate(budgets):
            there = np.isfinite(loss_SxK[:, k])
            found.append((float(at), *_parabola(sizes[there].astype(float), loss_SxK[there, k], of_size[there])))
    table = pandas.DataFrame(found, columns=["flops", "params", "loss", "sizes", "side"])
    return table.assign(tokens=table["flops"] / (6 * table["params"]), censored=table["side"] != "")


def _parabola(size: np.ndarray, loss: np.ndarray, weight: np.ndarray) -> tuple[float, float, int, str]:
    """Size and loss of the minimum, sizes, and on which side it is censored."""
    if len(np.unique(size)) < 3:
        return np.nan, np.nan, len(np.unique(size)), "too few"
    best = int(loss.argmin())
    if size[best] in (size.min(), size.max()):
        return float(size[best]), float(loss[best]), len(size), "low" if size[best] == size.min() else "high"
    near = _balanced(size, size[best])
    u, root = np.log(size[near] / size[best]), np.sqrt(weight[near])
    curve, slope, height = np.linalg.lstsq(np.vander(u, 3) * root[:, None], loss[near] * root, rcond=None)[0]
    shift = -slope / (2 * curve) if curve > 0 else np.inf * -slope
    if not u.min() < shift < u.max():
        edge = size.min() if shift < 0 else size.max()
        return float(edge), float(loss[size == edge].min()), int(near.sum()), "low" if shift < 0 else "high"
    return float(size[best] * np.exp(shift)), float(height - slope**2 / (4 * curve)), int(near.sum()), ""


def _balanced(size: np.ndarray, best: float) -> np.ndarray:
    """Which rows, [n], are of the best size or of the sizes next to it, as many above as below: one side more would pull the minimum."""
    sizes = np.unique(size)
    reached = np.abs(np.log(sizes / best)) <= np.log(REACH) * (1 + 1e-9)
    sides = [np.sort(sizes[reached & side]) for side in (sizes < best, sizes > best)]
    each = max(1, min(len(side) for side in sides))
    below, above = sizes[sizes < best][-each:], sizes[sizes > best][:each]
    return np.isin(size, np.concatenate([below, [best], above]))


def line(points: pandas.DataFrame, weights: np.ndarray | None = None) -> np.ndarray:
    """Exponent and log scale of params = scale·flops^exponent through the points that are not censored; nan with fewer than three.

    `weights` are of all the points, [n].
    """
    inside = ~points["censored"].to_numpy()
    if inside.sum() < 3 or points["flops"][inside].nunique() < 2:
        return np.array([np.nan, np.nan])
    root = None if weights is None else np.sqrt(weights[inside])
    return np.polyfit(np.log(points["flops"][inside]), np.log(points["params"][inside]), 1, w=root)


def bootstrapped(rows: pandas.DataFrame, budget: str = "flops", resamples: int = 400, seed: int = 0) -> np.ndarray:
    """`line` of `minima` under weights of the runs and of the budgets drawn from the exponential distribution, [R, 2].

    The weights of budgets bring in what a parabola misses, by the scatter of the minima about the line. Deviations are widened for few
    budgets as those of `fit.fit` are for few clusters; of more budgets than there are sizes no more are counted.
    """
    from scipy.special import stdtrit  # only here: slow to import

    runs, run = np.unique(rows["run"], return_inverse=True)
    rng, found = np.random.default_rng(seed), []
    points = minima(rows, budget)
    centre, spare = line(points), min(int((~points["censored"]).sum()), rows["size"].nunique()) - 2
    if spare < 1:
        return np.full((resamples, 2), np.nan)
    for _ in range(resamples):
        drawn = minima(rows, budget, rng.exponential(size=len(runs))[run])
        found.append(line(drawn, rng.exponential(size=len(drawn))))
    return centre + np.sqrt((spare + 2) / spare) * stdtrit(spare, 0.975) / 1.959963985 * (np.array(found) - centre)


def enveloped(rows: pandas.DataFrame, budget: str = "flops", count: int = ENVELOPE_BUDGETS) -> pandas.DataFrame:
    """The size with the lowest interpolated loss at log-spaced budgets, as `minima` has it; `censored` where no smaller, or no larger size
    was measured at that budget."""
    budgets = np.geomspace(rows[budget].min(), rows[budget].max(), count)
    found = envelope(rows, budgets, budget)
    there = np.isfinite(found.loss_K)
    table = pandas.DataFrame({"flops": found.budget_K, "params": found.size_K, "loss": found.loss_K, "censored": ~found.enclosed_K})[there]
    return table.assign(tokens=table["flops"] / (6 * table["params"])).reset_index(drop=True)


def takeovers(rows: pandas.DataFrame, budget: str = "flops", count: int = ENVELOPE_BUDGETS) -> pandas.DataFrame:
    """Where along the lower envelope a larger size takes over from a smaller one: columns flops, and params, the geometric mean of the two,
    which is the best size where both have the same loss.

    A size is the best for a range of budgets, which may be cut by what was measured; where two courses cross is not.
    Changes where one of the two courses begins or ends are left out. Where noise makes courses cross to and fro, a takeover is at the mean.
    """
    budgets = np.geomspace(rows[budget].min(), rows[budget].max(), count)
    loss_SxK, sizes = interpolated(rows, budgets, budget)
    passed_K = np.isfinite(loss_SxK).any(axis=0)
    loss_SxK, log_c = loss_SxK[:, passed_K], np.log(budgets[passed_K])
    there_SxK = np.isfinite(loss_SxK)
    best_K = np.where(there_SxK, loss_SxK, np.inf).argmin(axis=0)
    ever, found = np.unique(best_K), []
    for below, above in zip(ever[:-1], ever[1:], strict=True):
        change = np.diff((best_K >= above).astype(int))
        at = np.flatnonzero(change)
        both = there_SxK[best_K[at], at + 1] & there_SxK[best_K[at + 1], at]
        if change.sum() == 1 and both.all():
            log_at = np.sum(change[at] * (log_c[at] + log_c[at + 1]) / 2)
            found.append((np.exp(log_at), np.sqrt(float(sizes[below]) * float(sizes[above]))))
    return pandas.DataFrame(found, columns=["flops", "params"])


def takeover_line(points: pandas.DataFrame, resamples: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Exponent and log scale of params = scale·flops^exponent through `takeovers`, [2], and draws of them, [R, 2]; nan with fewer than 3.

    The sizes are chosen and the budgets measured, so the line is fitted to ln C by ln N, and turned round. Draws are Student's, by the
    scatter of the takeovers about the line.
    """
    spare = len(points) - 2
    if spare < 1:
        return np.full(2, np.nan), np.full((resamples, 2), np.nan)
    log_n, log_c = np.log(points["params"].to_numpy()), np.log(points["flops"].to_numpy())
    from_mean = log_n - log_n.mean()
    slope, middle = np.polyfit(from_mean, log_c, 1)
    rng = np.random.default_rng(seed)
    deviation = np.sqrt(np.sum((log_c - middle - slope * from_mean) ** 2) / rng.chisquare(spare, size=(resamples, 1)))
    error_Rx2 = deviation * rng.normal(size=(resamples, 2)) / np.sqrt([np.sum(from_mean**2), len(points)])
    slope_Q, middle_Q = np.concatenate([[[slope, middle]], [slope, middle] + error_Rx2]).T
    exponent_Q = 1 / np.where(slope_Q > 0, slope_Q, np.nan)
    lines_Qx2 = np.stack([exponent_Q, log_n.mean() - exponent_Q * middle_Q], axis=1)
    return lines_Qx2[0], lines_Qx2[1:]
