"""The noise scale in separate bins of a run, and the power of tokens that it grows with."""

import functools
import math
from collections.abc import Callable

import numpy as np

from scaling_jax.laws.power_law import PowerLaw, power_law
from scaling_jax.laws.table import known

METRICS = {  # which of a step's own estimates of |G|² and tr Σ
    "noise": ("grad_sq_step", "grad_trace_step"),
    "preconditioned": ("preconditioned_grad_sq_step", "preconditioned_grad_trace_step"),
}
TRANSIENT = 0.02  # share of the tokens so far in which initialization and warmup rule the gradient: left out of bins and fits


def noise_bins(
    records: list[dict], bins: int = 10, blocks: int = 16, from_tokens: float | None = None, metric: str = "noise"
) -> list[dict[str, float | None]]:
    """The noise scale in separate bins of a run, equally long in log tokens: unlike the running estimate, with independent errors.

    Args:
      records: the run's records. Used are those with the two keys of the metric (the step's own estimates, unbiased, so sometimes
        negative), `tokens`, `batch_tokens` and `batch_sequences`.
      bins: number of bins. One with fewer than `blocks` steps is joined to the next.
      blocks: consecutive blocks that a bin is cut into, whose scatter gives the interval.
      from_tokens: start of the first bin; by default 2% of the tokens so far, which leaves out the transient after initialization.
      metric: a key of METRICS: the plain gradient, or the gradient as the optimizer's preconditioner scales it.

    Returns:
      For each bin `tokens` (its mean on a log axis), `noise_scale_tokens` (mean tr Σ over mean |G|², times the context), `low` and
      `high` (95% interval). None: |G|² cannot be told from zero, or, for both ends of the interval, there are too few steps.
    """
    keys = ("tokens", *METRICS[metric], "batch_tokens", "batch_sequences")
    rows = np.stack([column(records, key) for key in keys], axis=1)
    rows = rows[np.isfinite(rows).all(axis=1) & (rows[:, 0] > 0)]
    if len(rows) == 0:
        return []
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    last = rows[-1, 0]
    first = TRANSIENT * last if from_tokens is None else max(from_tokens, 1.0)
    rows = rows[rows[:, 0] >= first]
    if len(rows) == 0:
        return []
    stretches = _join(np.searchsorted(rows[:, 0], np.geomspace(first, last, bins + 1)[1:-1], side="right"), len(rows), blocks)
    per_block = np.zeros((3, len(stretches), blocks))  # tokens, |G|², tr Σ; blocks that stay empty have no weight
    for s, (start, end) in enumerate(stretches):
        for k, block in enumerate(np.array_split(rows[start:end], blocks)):
            if len(block):
                per_block[:, s, k] = block[:, 3].sum(), *(np.average(block[:, c], weights=block[:, 3]) for c in (1, 2))
    result = []
    for (start, end), interval in zip(stretches, _ratio_intervals(*per_block), strict=True):
        stretch = rows[start:end]
        context = stretch[:, 3].sum() / stretch[:, 4].sum()
        values = [float(v * context) if math.isfinite(v) else None for v in interval]
        tokens = math.exp(np.average(np.log(stretch[:, 0]), weights=stretch[:, 3]))
        result.append({"tokens": tokens} | dict(zip(("noise_scale_tokens", "low", "high"), values, strict=True)))
    return result


def noise_exponent(records: list[dict]) -> PowerLaw | None:
    """The power of tokens that the noise scale (in tokens) grows with. None with fewer than three bounded bins of the run."""
    return bins_law(bounded_bins(records))


def bounded_bins(records: list[dict], from_tokens: float | None = None, metric: str = "noise") -> list[dict[str, float | None]]:
    """`noise_bins`, as many of them (at most 10) as leave every interval bounded; 10 where no number does.

    A fit can use no point without an upper end, and to leave out just those where |G|² came out small would favour small noise scales.
    """
    for bins in (10, 8, 6, 5, 4, 3):
        found = noise_bins(records, bins, from_tokens=from_tokens, metric=metric)
        if all(b["high"] is not None and b["noise_scale_tokens"] is not None for b in found):
            return found
    return noise_bins(records, from_tokens=from_tokens, metric=metric)


def bins_law(bins: list[dict]) -> PowerLaw | None:
    """The power law through bins; None with fewer than three bounded ones."""
    return power_law(*(column(bins, key) for key in ("tokens", "noise_scale_tokens", "low", "high")))


def _join(cuts: np.ndarray, total: int, least: int) -> list[tuple[int, int]]:
    """Stretches between the cuts, each of at least `least` rows; what is left over at the end goes to the last."""
    starts = [0]
    for cut in cuts:
        if cut - starts[-1] >= least:
            starts.append(int(cut))
    if len(starts) > 1 and total - starts[-1] < least:
        starts.pop()
    return list(zip(starts, [*starts[1:], total], strict=True))


def _ratio_intervals(weights: np.ndarray, grad_sq: np.ndarray, grad_trace: np.ndarray) -> np.ndarray:
    """`estimator.ratio_interval` of each row. [rows, 3]: ratio, low, high in sequences."""
    return np.stack(_compiled_ratio_interval()(*(values.astype(np.float32) for values in (weights, grad_sq, grad_trace))), axis=1)


@functools.cache
def _compiled_ratio_interval() -> Callable:
    import jax  # only here: a figure of a run without noise statistics needs no JAX

    from scaling_jax.noise_scale.estimator import ratio_interval

    return jax.jit(jax.vmap(ratio_interval))


def column(records: list[dict], key: str) -> np.ndarray:
    """A key's values as floats; nan where missing, None or infinite. UserError where one is no number."""
    return known(records, key)
