"""The critical batch size by five definitions, each under its own name. They are different quantities, up to orders of magnitude apart.

| name | what is measured | source |
|---|---|---|
| noise, preconditioned | tr Σ / \\|G\\|² inside a run, of the gradient or of what the optimizer makes of it | McCandlish et al. 2018 |
| tradeoff | E_min / S_min from the steps to one loss at several batch sizes | McCandlish et al. 2018; Kaplan et al. 2020, eq. 5.1 |
| overhead | the batch that takes 20% more steps than linear scaling from a small one | Zhang et al. 2024, arXiv 2410.21676 |
| branch | the largest batch that loses no loss when a run is continued with it | Merrill et al. 2025, arXiv 2505.23971 |
| kink_surge, kink_plateau | where the best learning rate bends as a function of batch size | Li et al. 2024, arXiv 2405.14578; 2410.05838 |

All take tidy tables: lists of dict rows, one measurement a row. A faulty table raises UserError with column, row and value.
"""

import math
import reprlib
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.likelihood import Likeliest, aicc, least_squares
from scaling_jax.laws.noise_bins import METRICS, bounded_bins, noise_bins
from scaling_jax.laws.power_law import PowerLaw, power_law
from scaling_jax.laws.table import at_least, check, only_value, optional, required

DEFINITIONS = ("noise", "preconditioned", "tradeoff", "overhead", "branch", "kink_surge", "kink_plateau")
Table = list[dict[str, Any]]

_BEYOND = 1e3  # a bend this many times outside the batches that were tried moves no point by more than 0.1%
_Z = 1.959963985


class CriticalBatch(NamedTuple):
    """One value of one definition. Tokens throughout.

    `definition` is one of DEFINITIONS; `tokens` the training tokens seen where it holds, None where that is not known; `batch_tokens` the
    critical batch size, None where the measurements show none; `low` and `high` its 95% interval. `low` None: unknown, or no lower end.
    `high` None: no upper end, or, with `low` None too, nothing known of either.
    """

    definition: str
    tokens: float | None
    batch_tokens: float | None
    low: float | None
    high: float | None


def law(points: list[CriticalBatch]) -> PowerLaw | None:
    """batch_tokens = exp(log_scale) · tokens^exponent through points of one definition, weighted by their intervals.

    Where no point has an interval all weigh the same. None with fewer than three usable points: `power_law` says which those are.
    """
    if len({point.definition for point in points}) > 1:
        raise ValueError(f"one law of several definitions: {sorted({point.definition for point in points})}")
    tokens, batch, low, high = np.array([[np.nan if v is None else v for v in point[1:]] for point in points], float).reshape(-1, 4).T
    if np.isnan(low).all() and np.isnan(high).all():
        return power_law(tokens, batch)
    return power_law(tokens, batch, low, high)


# -------------------------------------------------------------------------------------------------------------------- noise of the gradient


def noise(records: Table, metric: str = "noise", bins: int | None = None, from_tokens: float | None = None) -> list[CriticalBatch]:
    """tr Σ / |G|² in separate bins of a run (McCandlish et al. 2018, eq. 2.9, "B_simple").

    Args:
      records: lines of metrics.jsonl. Used are those with `tokens`, `batch_tokens` (tokens), `batch_sequences` and the metric's two keys.
      metric: "noise" (keys `grad_sq_step`, `grad_trace_step`) or "preconditioned" (the same after `preconditioned_`).
      bins: number of bins; by default as many, at most 10, as leave every interval bounded.
      from_tokens: start of the first; by default 2% of the tokens so far.

    Returns:
      One point a bin, none where no record has the keys. `batch_tokens` is None where |G|² came out below zero.
    """
    if metric not in tuple(METRICS):
        raise UserError(f"metric is {metric!r}; it must be one of {', '.join(METRICS)}")
    if bins is not None:
        check("bins", bins, lambda n: isinstance(n, int) and n >= 1, "an integer, 1 or more, or None")
    if from_tokens is not None:
        check("from_tokens", from_tokens, lambda n: n >= 0, "a number of tokens, 0 or more, or None")
    if bins is None:
        found = bounded_bins(records, from_tokens, metric)
    else:
        found = noise_bins(records, bins, from_tokens=from_tokens, metric=metric)
    return [CriticalBatch(metric, b["tokens"], b["noise_scale_tokens"], b["low"], b["high"]) for b in found]


# ------------------------------------------------------------------------------------------------------------- steps and tokens to one loss


class Tradeoff(NamedTuple):
    """S = min_steps · (1 + batch_tokens / B), fitted. `batch_tokens` is E_min/S_min, None where the steps show no bend; low, high: its 95%
    interval, None where open. `residuals` are of log S, [rows]. `min_tokens` = E_min is known even where the bend is not: it is the
    tokens that small batches need, and so min_steps where only large ones were tried."""

    min_steps: float | None
    min_tokens: float | None
    batch_tokens: float | None
    low: float | None
    high: float | None
    residuals: np.ndarray


def tradeoff_fit(table: Table) -> Tradeoff:
    """S = S_min(1 + B_crit/B) by least squares on log S (McCandlish et al. 2018, eq. 2.11; Kaplan et al. 2020, eq. 5.1 and 5.2).

    Args:
      table: rows of `batch_tokens` (tokens) and `steps` to one and the same loss, each at a learning rate tuned for its batch: with one
        learning rate for all, E_min/S_min is that learning rate's and not the noise's. Three rows or more at two batch sizes or more.
    """
    at_least(table, 3, "a trade-off between steps and tokens")
    batch, steps = required(table, "batch_tokens"), required(table, "steps")
    _different(batch, "batch_tokens")

    def log_steps(log_min_steps, log_batch):
        return log_min_steps + np.log1p(np.exp(log_batch) / batch)

    starts = [(np.log(steps.min()), b) for b in np.log(np.quantile(batch, (0.1, 0.5, 0.9)))]
    fit = least_squares(log_steps, np.log(steps), {"min_steps": (-np.inf, np.inf), "batch": _reach(batch)}, starts, intervals_of=["batch"])
    value, low, high = _bend(fit, batch)
    min_steps = float(np.exp(fit.values["min_steps"]))
    min_tokens = min_steps * float(np.exp(fit.values["batch"]))
    above, below = (fit.values["batch"] > np.log(batch.max()), fit.values["batch"] < np.log(batch.min()))
    known = value is not None
    return Tradeoff(min_steps if known or below else None, min_tokens if known or above else None, value, low, high, fit.residuals)


def tradeoff(table: Table) -> CriticalBatch:
    """E_min/S_min of `tradeoff_fit`: the batch at which a loss takes twice the least steps and twice the least tokens.

    `tokens` is E_min, what a small batch needs to that loss; None where it cannot be told.
    """
    fit = tradeoff_fit(table)
    return CriticalBatch("tradeoff", fit.min_tokens, fit.batch_tokens, fit.low, fit.high)


def overhead(table: Table, reference_batch_tokens: float, overhead: float = 0.2) -> CriticalBatch:
    """The batch whose steps exceed linear scaling from a reference batch by 20% (Zhang et al. 2024, sec. 2).

    With S = a + b/B fitted as in `tradeoff_fit`, a + b/B = (1 + overhead)·(a + b/B_ref)·B_ref/B at

        B = overhead·b/a + (1 + overhead)·B_ref.

    Args:
      table: as for `tradeoff_fit`.
      reference_batch_tokens: tokens; a batch known to be efficient, at or below the critical one.
      overhead: of the steps, 0.2 for 20%.

    Returns:
      `tokens` is what the fit says that the reference batch needs to the loss. Never below (1 + overhead)·B_ref, by definition.
    """
    for name, value in (("reference_batch_tokens", reference_batch_tokens), ("overhead", overhead)):
        check(name, value, lambda number: number > 0, "a positive number")
    fit = tradeoff_fit(table)
    at = [None if b is None else overhead * b + (1 + overhead) * reference_batch_tokens for b in (fit.batch_tokens, fit.low, fit.high)]
    tokens = None if fit.batch_tokens is None else fit.min_steps * (reference_batch_tokens + fit.batch_tokens)
    return CriticalBatch("overhead", tokens, *at)


# --------------------------------------------------------------------------------------------------------------- branches of one checkpoint


def branch(table: Table, tolerance: float = 0.01) -> list[CriticalBatch]:
    """The largest tested factor k* on the batch with L_k* ≤ L_k + tolerance for all k < k* (Merrill et al. 2025, sec. 3).

    Args:
      table: rows of `tokens` (at the checkpoint), `factor` k, `batch_tokens` (of the branch, k times the checkpoint's), `loss` (held
        out, at the branch's end, nats per token; None: it diverged) and, optionally, `losses`: the held-out loss of each sequence, the
        same sequences in the same order for every branch of a checkpoint.
      tolerance: nats per token.

    Returns:
      One point for each value of `tokens`. The interval comes from the standard errors of the paired differences of `losses`: `low` is
      the largest factor that passes even with each excess 1.96 standard errors higher, `high` the first one beyond k* that fails
      even with them that much lower; so it holds the stretch from k* to the next factor tested, which the grid cannot resolve.
      `high` is None where none fails so. `low` is None where none but the smallest factor passes so, which passes untested. Without
      `losses` both are None. The errors are those of the held-out sequences; that of the branches' training is not in them.
    """
    check("tolerance", tolerance, lambda nats: nats >= 0, "a number of nats per token, 0 or more")
    tokens = required(table, "tokens")
    for name in ("factor", "batch_tokens"):
        required(table, name)
    required([row for row in table if "loss" not in row or row["loss"] is not None], "loss", positive=False)
    groups = {at: [row for row in table if row["tokens"] == at] for at in sorted(set(tokens.tolist()))}
    return [_branch(at, sorted(rows, key=lambda row: row["factor"]), tolerance) for at, rows in groups.items()]


def _branch(tokens: float, rows: Table, tolerance: float) -> CriticalBatch:
    if len(rows) < 2:
        raise UserError(f"the table has one factor, {rows[0]['factor']:g}, at tokens {tokens:g}; branches of two or more are compared")
    for first, second in pairwise(rows):
        if first["factor"] == second["factor"]:
            raise UserError(f"the table has factor {first['factor']:g} twice at tokens {tokens:g}; one branch a factor")
    if rows[0]["loss"] is None:
        raise UserError(f"factor {rows[0]['factor']:g}, the smallest at tokens {tokens:g}, diverged: there is no loss to compare with")
    loss = [np.inf if row["loss"] is None else float(row["loss"]) for row in rows]
    excess = [[mine - other - tolerance for other in loss[:k]] for k, mine in enumerate(loss)]
    best = max(k for k in range(len(rows)) if all(e <= 0 for e in excess[k]))
    batch = [float(row["batch_tokens"]) for row in rows]
    half = _half_intervals(tokens, rows)
    if half is None:
        return CriticalBatch("branch", tokens, batch[best], None, None)
    low = max(k for k in range(len(rows)) if all(e + h <= 0 for e, h in zip(excess[k], half[k], strict=True)))
    fails = [k for k in range(best + 1, len(rows)) if any(e - h > 0 for e, h in zip(excess[k], half[k], strict=True))]
    return CriticalBatch("branch", tokens, batch[best], batch[low] if low else None, batch[fails[0]] if fails else None)


def _half_intervals(tokens: float, rows: Table) -> list[list[float]] | None:
    """1.96 standard errors of each row's mean difference to each row before; None where no row has `losses`."""
    losses = [None if row["loss"] is None or row.get("losses") is None else _losses(tokens, row) for row in rows]
    lengths = [0 if values is None else len(values) for row, values in zip(rows, losses, strict=True) if row["loss"] is not None]
    if not any(lengths):
        return None
    if min(lengths) < 2 or len(set(lengths)) > 1:
        raise UserError(f"losses at tokens {tokens:g} hold {lengths} sequences by factor; all need the same ones, two or more")

    def half(mine, other):  # what diverged is worse beyond doubt
        return 0.0 if mine is None or other is None else float(_Z * np.std(mine - other, ddof=1) / np.sqrt(len(mine)))

    return [[half(mine, other) for other in losses[:k]] for k, mine in enumerate(losses)]


def _losses(tokens: float, row: dict[str, Any]) -> np.ndarray:
    name = f"losses at tokens {tokens:g}, factor {row['factor']:g}"
    try:
        values = np.asarray(row["losses"])
    except (ValueError, TypeError):  # rows of several lengths
        values = np.asarray(None)
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "fiu"):
        raise UserError(f"{name} are {reprlib.repr(row['losses'])}; they must be a list of numbers, one a sequence")
    if not np.isfinite(values).all():
        raise UserError(f"{name} are not all finite")
    if len(values) and not math.isclose(values.mean(dtype=float), row["loss"], rel_tol=1e-4, abs_tol=1e-6):
        raise UserError(f"{name} have the mean {values.mean():g}, and loss is {row['loss']:g}; it must be their mean")
    return values.astype(float)


# ----------------------------------------------------------------------------------------------------------- bend of the best learning rate


class Kink(NamedTuple):
    """A form of η*(B), fitted. `lr` is its η_max (for "power" η at 1 token); `batch_tokens` B_c, None where the form has none or the table
    shows none; low, high: its 95% interval, None where open; `exponent` the slope of "power", else None; `residuals` of log η, [rows]."""

    form: str
    lr: float
    batch_tokens: float | None
    low: float | None
    high: float | None
    exponent: float | None
    residuals: np.ndarray

    @property
    def rms(self) -> float:
        """Root mean square of the residuals of log η. Forms whose values are close cannot be told apart."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def aicc(self) -> float:
        """Of normal residuals of log η; to be compared between forms of one table."""
        return aicc(self.residuals, 2)


KINK_FORMS = {  # log η as a function of log B and log B_c
    "surge": lambda log_b, log_c: -np.log(np.cosh((log_b - log_c) / 2)),  # 1 / [½(√(B/B_c) + √(B_c/B))]
    "plateau": lambda log_b, log_c: -0.5 * np.log1p(np.exp(log_c - log_b)),  # 1 / √(1 + B_c/B)
    "power": None,
}


def kink_fit(table: Table, form: str) -> Kink:
    """One form of the best learning rate as a function of batch size, by least squares on log η.

    Args:
      table: rows of `batch_tokens` (tokens), `lr` (the best one at that batch; `lr_optimum.lr_optima` finds it), optionally `lr_se` (its
        standard error, in units of the lr; a weight) and `tokens` (the same in all rows). Four rows or more at three batch sizes or more.
      form: "surge": η_max / [½(√(B/B_c) + √(B_c/B))] (Li et al. 2024, for Adam); "plateau": η_max / √(1 + B_c/B); "power": c·B^p,
        which has no bend and is what the other two have to beat.
    """
    if form not in tuple(KINK_FORMS):
        raise UserError(f"form is {form!r}; it must be one of {', '.join(KINK_FORMS)}")
    at_least(table, 4, "a bend of the learning rate")
    batch, lr, se = required(table, "batch_tokens"), required(table, "lr"), optional(table, "lr_se")
    _different(batch, "batch_tokens", 3)
    log_b, log_lr = np.log(batch), np.log(lr)
    sd = None if se is None else se / lr
    everywhere = (-np.inf, np.inf)
    if form == "power":
        bounds = {"lr": everywhere, "exponent": everywhere}
        fit = least_squares(lambda log_c, p: log_c + p * log_b, log_lr, bounds, [(log_lr.mean(), 0.0)], sd=sd, intervals_of=[])
        return Kink(form, float(np.exp(fit.values["lr"])), None, None, None, fit.values["exponent"], fit.residuals)
    shape = KINK_FORMS[form]
    starts = [(log_lr.max(), b) for b in np.quantile(log_b, (0.0, 0.5, 1.0))]
    bounds = {"lr": everywhere, "batch": _reach(batch)}
    fit = least_squares(lambda log_max, log_c: log_max + shape(log_b, log_c), log_lr, bounds, starts, sd=sd, intervals_of=["batch"])
    return Kink(form, float(np.exp(fit.values["lr"])), *_bend(fit, batch), None, fit.residuals)


def kink(table: Table, form: str) -> CriticalBatch:
    """B_c of `kink_fit`, under the name kink_surge or kink_plateau: the two are different numbers of one table, and so are their laws."""
    if form not in ("surge", "plateau"):
        raise UserError(f"form is {form!r}; it must be surge or plateau, which have a bend")
    fit = kink_fit(table, form)
    return CriticalBatch(f"kink_{form}", only_value(table, "tokens"), fit.batch_tokens, fit.low, fit.high)


# ----------------------------------------------------------------------------------------------------------------------------------- shared


def _different(batch: np.ndarray, name: str, least: int = 2) -> None:
    if len(np.unique(batch)) < least:
        raise UserError(f"{name} takes {len(np.unique(batch))} different values in the table; at least {least} are needed")


def _reach(batch: np.ndarray) -> tuple[float, float]:
    return float(np.log(batch.min() / _BEYOND)), float(np.log(batch.max() * _BEYOND))


def _bend(fit: Likeliest, batch: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """The parameter "batch" out of the log, with its interval; None where the best fit lies at the edge of what can be told."""
    value, (low, high), reach = fit.values["batch"], fit.intervals["batch"], _reach(batch)
    inside = reach[0] + 1 < value < reach[1] - 1
    low, high = (float(np.exp(end)) if np.isfinite(end) else None for end in (low, high))
    return float(np.exp(value)) if inside else None, low, high
