"""The gradient noise scale from per-sequence squared gradient norms: unbiased, running, with an interval.

For a batch of B sequences with gradients g_b and mean G (McCandlish et al. 2018, App. A, at B_small = 1, B_big = B):

    |G|²  ≈ (B·‖G‖² − mean_b‖g_b‖²) / (B − 1)        tr Σ ≈ (mean_b‖g_b‖² − ‖G‖²)·B / (B − 1)

are unbiased, and tr Σ / |G|² is the simple noise scale in sequences. The ratio of one step is useless and its mean is biased, so
both are averaged over a window of tokens first and divided last. Neither is clamped: |G|² of a step may be negative.

The window is kept as at most `blocks` consecutive blocks of equal length in tokens; while the run is younger than the window,
full blocks are merged in pairs. Blocks that are long against the correlation time are nearly independent, and what is left of the
correlation of neighbours is allowed for. So the spread of their means about a line gives the standard error, and Fieller's theorem
turns it into an interval for the ratio of the window's means. The line is there because a truth that drifts steadily over the
window is not noise: the interval is for the ratio of the true values' means, weighted as the estimates are. It has no upper end
where |G|² cannot be told from zero. docs/noise_scale.md has its coverage in simulated runs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

HIGHEST = jax.lax.Precision.HIGHEST  # products of matrices are rounded to bfloat16 on a TPU otherwise
MIN_BLOCKS = 8  # fewer give no interval: their spread is not known well enough


class NoiseScaleState(NamedTuple):
    """Running sums of the window, oldest block first; K blocks, G groups of parameters. Part of the train state."""

    tokens_K: Array  # weight of each block
    grad_sq_KxG: Array  # Σ tokens·|G|² over the block's steps
    grad_trace_KxG: Array  # Σ tokens·tr Σ
    block_tokens: Array  # a block is full once it holds this much
    seen_tokens: Array  # weight of all steps so far
    open_block: Array  # int32, index of the block being filled


class NoiseScale(NamedTuple):
    """One reading: means over the window, of each sum of groups that was asked for.

    `sequences` is tr Σ / |G|² (nan where |G|² ≤ 0), `low` and `high` its 95% interval: nan while unknown, high inf where open.
    """

    grad_sq: Array
    grad_trace: Array
    sequences: Array
    low: Array
    high: Array


def estimates(sq_norms_BxG: Array, grad_sq_G: Array) -> tuple[Array, Array]:
    """Unbiased |G|² and tr Σ of one step.

    Args:
      sq_norms_BxG: ‖g_b‖² of each sequence's own gradient, per group of parameters.
      grad_sq_G: ‖G‖² of the batch-mean gradient, per group, before clipping.

    Returns:
      |G|²_G and (tr Σ)_G, in squared gradient units; the latter per sequence.
    """
    batch = sq_norms_BxG.shape[0]
    if batch < 2:
        raise ValueError(f"the noise scale needs at least 2 sequences in a batch, not {batch}")
    mean_G = jnp.mean(sq_norms_BxG, axis=0)
    return (batch * grad_sq_G - mean_G) / (batch - 1), (mean_G - grad_sq_G) * (batch / (batch - 1))


def init(groups: int, blocks: int = 64) -> NoiseScaleState:
    """An empty window. `blocks` is even."""
    if blocks < 2 or blocks % 2:
        raise ValueError(f"blocks is {blocks}: must be even and positive, as they are merged in pairs")

    def zeros_KxG():  # an array of its own for each: a state is donated, and no buffer twice
        return jnp.zeros((blocks, groups), jnp.float32)

    return NoiseScaleState(jnp.zeros(blocks, jnp.float32), zeros_KxG(), zeros_KxG(), jnp.float32(0), jnp.float32(0), jnp.int32(0))


def update(state: NoiseScaleState, tokens: Array | float, grad_sq_G: Array, grad_trace_G: Array, window_tokens: float) -> NoiseScaleState:
    """Adds one step's estimates with the weight of its tokens; a step with an estimate that is not finite is left out."""
    blocks = state.tokens_K.shape[0]
    at = state.open_block
    grad_sq_G, grad_trace_G = (jnp.asarray(x_G, jnp.float32) for x_G in (grad_sq_G, grad_trace_G))
    finite = jnp.isfinite(grad_sq_G).all() & jnp.isfinite(grad_trace_G).all()
    grad_sq_G, grad_trace_G = (jnp.where(finite, x_G, 0.0) for x_G in (grad_sq_G, grad_trace_G))
    tokens = jnp.where(finite, jnp.asarray(tokens, jnp.float32), 0.0)
    tokens_K = state.tokens_K.at[at].add(tokens)
    grad_sq_KxG = state.grad_sq_KxG.at[at].add(tokens * grad_sq_G)
    grad_trace_KxG = state.grad_trace_KxG.at[at].add(tokens * grad_trace_G)
    at = at + (tokens_K[at] >= state.block_tokens).astype(jnp.int32)
    state = NoiseScaleState(tokens_K, grad_sq_KxG, grad_trace_KxG, state.block_tokens, state.seen_tokens + tokens, at)

    def merge(state):  # the window is not full yet: half as many blocks, twice as long
        def pairs(x_K):
            merged = x_K.reshape(blocks // 2, 2, *x_K.shape[1:]).sum(1)
            return jnp.concatenate([merged, jnp.zeros_like(merged)])

        block_tokens = 2 * jnp.sum(state.tokens_K) / blocks
        return NoiseScaleState(*map(pairs, state[:3]), block_tokens, state.seen_tokens, jnp.int32(blocks // 2))

    def forget(state):  # the oldest block leaves
        def shift(x_K):
            return jnp.concatenate([x_K[1:], jnp.zeros_like(x_K[:1])])

        return NoiseScaleState(*map(shift, state[:3]), state.block_tokens, state.seen_tokens, jnp.int32(blocks - 1))

    def make_room(state):
        return jax.lax.cond(jnp.sum(state.tokens_K) < window_tokens, merge, forget, state)

    return jax.lax.cond(at == blocks, make_room, lambda state: state, state)


def read(
    state: NoiseScaleState, window_tokens: float, sums_RxG: np.ndarray | None = None, *, decay_tokens: float | None = None
) -> NoiseScale:
    """Means over the window, their ratio in sequences and its 95% interval.

    The window is the newest `window_tokens`, to a whole block, and never more than the later half of what was seen: the large
    gradients of a run's start would otherwise rule its mean long after.

    Args:
      state: what `update` returned last.
      window_tokens: as it was given to `update`.
      sums_RxG: zeros and ones, the groups that each reading adds up; by default each group, and last all together.
      decay_tokens: weights fall by a factor e over so many tokens, an exponential moving average, to a whole block; None weighs
        all of the window alike. A window of 5 times as much leaves out next to nothing; one of more than 8 times as much may hold
        too few blocks of some weight for an interval.

    Returns:
      Arrays [R]; nan before the first step.
    """
    if sums_RxG is None:
        groups = state.grad_sq_KxG.shape[1]
        sums_RxG = np.concatenate([np.eye(groups), np.ones((1, groups))])
    newer_K = jnp.cumsum(state.tokens_K[::-1])[::-1] - state.tokens_K
    weights_K = jnp.where(newer_K < jnp.minimum(window_tokens, state.seen_tokens / 2), state.tokens_K, 0.0)
    if decay_tokens is not None:
        age_K = newer_K + state.tokens_K / 2
        youngest = jnp.min(jnp.where(weights_K > 0, age_K, jnp.inf))  # from its age on, so that not all weights can underflow
        weights_K = jnp.where(weights_K > 0, weights_K * jnp.exp((youngest - age_K) / decay_tokens), 0.0)

    def means(x_KxG):  # sums of products, not matrix products: those are rounded to bfloat16 on a TPU
        x_KxR = jnp.sum(x_KxG[:, None, :] * sums_RxG.astype(np.float32)[None], axis=2)
        return x_KxR / jnp.where(state.tokens_K > 0, state.tokens_K, 1.0)[:, None]

    grad_sq_KxR, grad_trace_KxR = means(state.grad_sq_KxG), means(state.grad_trace_KxG)
    intervals = jax.vmap(ratio_interval, in_axes=(None, 1, 1))(weights_K, grad_sq_KxR, grad_trace_KxR)
    total = weights_K.sum()  # 0 before the first step: means are then unknown, nan
    grad_sq, grad_trace = (jnp.sum(weights_K[:, None] * x_KxR, axis=0) / total for x_KxR in (grad_sq_KxR, grad_trace_KxR))
    return NoiseScale(grad_sq, grad_trace, *intervals)


def ratio_interval(weights_K: Array, grad_sq_K: Array, grad_trace_K: Array) -> tuple[Array, Array, Array]:
    """Weighted mean of tr Σ over weighted mean of |G|², with Fieller's 95% interval.

    Args:
      weights_K: weight of each block (its tokens); blocks of weight 0 do not count.
      grad_sq_K, grad_trace_K: the blocks' means.

    Returns:
      ratio, low, high. The ratio is nan where the mean |G|² is not positive; low and high are nan with fewer than MIN_BLOCKS
      blocks; high is inf where |G|² cannot be told from zero.
    """
    # In units of their own size: the discriminant below is of fourth order and leaves float32 otherwise.
    sq_unit, trace_unit = (jnp.maximum(jnp.max(jnp.abs(jnp.where(weights_K > 0, x_K, 0.0))), 1e-37) for x_K in (grad_sq_K, grad_trace_K))
    grad_sq_K, grad_trace_K, unit = grad_sq_K / sq_unit, grad_trace_K / trace_unit, trace_unit / sq_unit
    w_K = weights_K / jnp.maximum(jnp.sum(weights_K), 1e-30)
    a, b = jnp.sum(w_K * grad_sq_K), jnp.sum(w_K * grad_trace_K)
    deviations_DxK, dof = _deviations(w_K)
    # Less the mean first: it may be large against the spread.
    off_a_D, off_b_D = (jnp.matmul(deviations_DxK, x_K, precision=HIGHEST) for x_K in (grad_sq_K - a, grad_trace_K - b))
    t_sq = _t_quantile(jnp.maximum(dof, 3.0)) ** 2  # times the covariance of the two weighted means
    t_sq_aa, t_sq_ab, t_sq_bb = (t_sq * jnp.sum(p_D * q_D) for p_D, q_D in ((off_a_D,) * 2, (off_a_D, off_b_D), (off_b_D,) * 2))
    # (b − r·a)² ≤ t²·(V_bb − 2r·V_ab + r²·V_aa), a quadratic in r: A·r² − 2B·r + C ≤ 0.
    A, B, C = a**2 - t_sq_aa, a * b - t_sq_ab, b**2 - t_sq_bb
    root = jnp.sqrt(jnp.maximum(B**2 - A * C, 0.0))
    closed = (A > 0) & (a > 0)
    safe_A = jnp.where(A == 0, 1e-30, A)
    # Where A ≤ 0 the set is all but the stretch between the roots. It is told by its smallest ratio that can be, none below 0.
    roots = (B + root) / safe_A, (B - root) / safe_A  # the smaller first, since A < 0
    open_low = jnp.where((B**2 - A * C > 0) & (roots[0] < 0), roots[1], 0.0)
    ratio = jnp.where(a > 0, b / jnp.where(a > 0, a, 1.0), jnp.nan)
    low = jnp.maximum(jnp.where(closed, (B - root) / safe_A, jnp.where(A > 0, jnp.nan, open_low)), 0.0)
    low = jnp.where(low > ratio, ratio, low)  # rounding, or a negative tr Σ
    high = jnp.where(closed, (B + root) / safe_A, jnp.where(A > 0, jnp.nan, jnp.inf))
    known = (jnp.sum(w_K) > 0) & (jnp.sum(w_K**2) <= 1 / (MIN_BLOCKS - 0.5))  # the inverse is the number of blocks, were they equal
    return unit * ratio, jnp.where(known, unit * low, jnp.nan), jnp.where(known, unit * high, jnp.nan)


def _deviations(w_K: Array) -> tuple[Array, Array]:
    """The standard error of a weighted mean of blocks in time, as D = K + 1 numbers whose squares sum to its variance.

    They are the weighted blocks less mean and linear trend, each added to the one before it, so that the correlation of neighbours
    counts (half of it: the Bartlett window of Newey & West 1987, which cannot make a variance negative). They are scaled to be
    unbiased for independent blocks of equal variance.

    Args:
      w_K: weights that sum to 1.

    Returns:
      the matrix [D, K] that takes blocks to these numbers, and the degrees of freedom of the sum of their squares by its first two
      moments (Satterthwaite 1946).
    """
    blocks = w_K.shape[0]
    time_K = jnp.arange(blocks) / blocks
    time_K = time_K - jnp.sum(w_K * time_K)
    slope_K = w_K * time_K / jnp.maximum(jnp.sum(w_K * time_K**2), 1e-30)  # of a least-squares line, Σ slope·x
    residual_KxK = jnp.eye(blocks) - w_K[None] - time_K[:, None] * slope_K[None]
    padded = jnp.pad(w_K[:, None] * residual_KxK, ((1, 1), (0, 0)))
    pairs_DxK = padded[1:] + padded[:-1]
    total = jnp.maximum(jnp.sum(pairs_DxK**2), 1e-30)
    products_DxD = jnp.matmul(pairs_DxK, pairs_DxK.T, precision=HIGHEST)
    dof = total**2 / jnp.maximum(jnp.sum(products_DxD**2), 1e-30)
    return pairs_DxK * jnp.sqrt(jnp.sum(w_K**2) / total), dof


def _t_quantile(dof: Array) -> Array:
    """Student's t at 0.975 by the Cornish-Fisher series (Abramowitz & Stegun 26.7.5); 0.1% off at 3 degrees of freedom."""
    z = 1.959963985
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / dof + g2 / dof**2 + g3 / dof**3 + g4 / dof**4
