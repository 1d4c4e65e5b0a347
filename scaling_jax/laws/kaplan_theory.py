"""What Kaplan et al. 2020 (arXiv 2001.08361) publish: their constants, and the closed forms that follow from such constants.

Their conventions: loss L in nats per token; N in parameters without embeddings; data D, batch B in tokens; steps S; compute C = 6·N·B·S in
PF-days of 8.64e19 FLOP. Functions take numbers or arrays, and the constants of any fit, not only the published ones.

The published constants disagree with each other in places, and the functions do not hide it: equation 6.4 states α_C^min = 0.054, its own
constants give 0.052, and Table 6 has 0.050 fitted; Appendix B gives N ∝ C^0.68 and S ∝ C^0.07 where Table 6 has N ∝ C^0.73 and S ∝ C^0.03;
equation 6.7 uses D = 4e10·C^0.26 where Table 6 has 2e10·C^0.27.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

PF_DAY = 8.64e19  # FLOP
SOURCE = "Kaplan et al. 2020"

TABLE_2 = {"alpha_n": 0.076, "alpha_d": 0.103, "n_c": 6.4e13, "d_c": 1.8e13}  # L(N, D)
TABLE_3 = {"alpha_n": 0.077, "alpha_s": 0.76, "n_c": 6.5e13, "s_c": 2.1e3}  # L(N, S_min)
TABLE_5 = {  # the laws in one variable; compute in PF-days
    "alpha_n": 0.076, "n_c": 8.8e13, "alpha_d": 0.095, "d_c": 5.4e13, "alpha_c": 0.057, "c_c": 1.6e7,
    "alpha_c_min": 0.050, "c_c_min": 3.1e8, "alpha_b": 0.21, "b_star": 2.1e8, "alpha_s": 0.76, "s_c": 2.1e3,
}  # fmt: skip
TABLE_6 = {  # (value at one PF-day, exponent) of C_min, fitted
    "params": (1.3e9, 0.73), "batch_tokens": (2.0e6, 0.24), "min_steps": (5.4e3, 0.03), "tokens": (2e10, 0.27),
}  # fmt: skip
DATA_OF_COMPUTE = (4e10, 0.26)  # eq. 6.7: tokens at one PF-day, exponent
DATA_RULE = (5e3, 0.74, 0.02)  # eq. 4.4: D = 5e3·N^0.74 keeps the loss within 0.02 of what N allows


def critical_batch(loss: ArrayLike, b_star: float, alpha_b: float) -> np.ndarray:
    """B_crit(L) = B*/L^(1/α_B), tokens (eq. 5.3)."""
    return b_star / np.asarray(loss, float) ** (1 / alpha_b)


def min_steps(steps: ArrayLike, batch_tokens: ArrayLike, critical_batch_tokens: ArrayLike) -> np.ndarray:
    """S_min = S/(1 + B_crit/B): steps to the same loss at batches far above the critical one (eq. 5.4)."""
    return np.asarray(steps, float) / (1 + np.asarray(critical_batch_tokens, float) / np.asarray(batch_tokens, float))


def min_compute(compute: ArrayLike, batch_tokens: ArrayLike, critical_batch_tokens: ArrayLike) -> np.ndarray:
    """C_min = C/(1 + B/B_crit), in the units of `compute`: to the same loss at batches far below the critical one (eq. 5.5)."""
    return np.asarray(compute, float) / (1 + np.asarray(batch_tokens, float) / np.asarray(critical_batch_tokens, float))


# ------------------------------------------------------------------------------------------------------------------------------ overfitting


def overfitting(params: ArrayLike, data_tokens: ArrayLike, alpha_n: float, n_c: float, alpha_d: float, d_c: float) -> np.ndarray:
    """δL = L(N, D)/L(N, ∞) − 1 of L(N, D) = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D (eq. 4.3)."""
    share = (np.asarray(params, float) / n_c) ** (alpha_n / alpha_d) * d_c / np.asarray(data_tokens, float)
    return np.expm1(alpha_d * np.log1p(share))


def tokens_for(params: ArrayLike, excess: float, alpha_n: float, n_c: float, alpha_d: float, d_c: float) -> np.ndarray:
    """The data at which δL is `excess`, tokens: ∝ N^(α_N/α_D) (eq. 4.4, solved exactly)."""
    return d_c * (np.asarray(params, float) / n_c) ** (alpha_n / alpha_d) / np.expm1(np.log1p(excess) / alpha_d)


def least_stop(loss: ArrayLike, loss_of_all_data: ArrayLike, alpha_s: float, s_c: float) -> np.ndarray:
    """S_stop ≥ S_c/[L(N, D) − L(N, ∞)]^(1/α_S): steps before which early stopping cannot be due (eq. 5.7)."""
    return s_c / (np.asarray(loss, float) - np.asarray(loss_of_all_data, float)) ** (1 / alpha_s)


# ------------------------------------------------------------------------------------------------------------------ Appendix B: closed form


class Training(NamedTuple):
    """Constants of L = (N_c/N)^α_N + (S_c/S_min)^α_S and of B_crit(L) = B*/L^(1/α_B)."""

    alpha_n: float
    n_c: float
    alpha_s: float
    s_c: float
    alpha_b: float
    b_star: float


class Efficient(NamedTuple):
    """The least compute to a loss: `params`, steps S_min, batch B_crit(L) in tokens, E_min = S_min·B_crit in tokens, and the loss."""

    params: np.ndarray
    min_steps: np.ndarray
    batch_tokens: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray


PUBLISHED = Training(TABLE_3["alpha_n"], TABLE_3["n_c"], TABLE_3["alpha_s"], TABLE_3["s_c"], TABLE_5["alpha_b"], TABLE_5["b_star"])


def compute_exponent(k: Training) -> float:
    """α_C^min = 1/(1/α_S + 1/α_B + 1/α_N) (eq. 6.4)."""
    return 1 / (1 / k.alpha_s + 1 / k.alpha_b + 1 / k.alpha_n)


def compute_scale(k: Training) -> float:
    """C_c of L = (C_c/C_min)^α_C^min, PF-days (eq. B.9)."""
    ratio = k.alpha_n / k.alpha_s
    flops = 6 * k.n_c * k.b_star * k.s_c * (1 + ratio) ** (1 / k.alpha_s + 1 / k.alpha_n) * ratio ** (-1 / k.alpha_s)
    return flops / PF_DAY


def efficient(pf_days: ArrayLike, k: Training) -> Efficient:
    """What minimizes C_min = 6·N·S_min·B_crit(L) at a fixed loss, for each C_min in PF-days (App. B, eq. B.6 to B.10)."""
    share = np.asarray(pf_days, float) / compute_scale(k)
    exponent, ratio = compute_exponent(k), k.alpha_n / k.alpha_s
    params = k.n_c * share ** (exponent / k.alpha_n) * (1 + ratio) ** (1 / k.alpha_n)
    steps = compute_scale(k) * PF_DAY / (6 * k.n_c * k.b_star) * (1 + ratio) ** (-1 / k.alpha_n) * share ** (exponent / k.alpha_s)
    batch = k.b_star * share ** (exponent / k.alpha_b)
    return Efficient(params, steps, batch, steps * batch, share**-exponent)


def stop_above_converged(k: Training) -> float:
    """Efficient training stops at (1 + this)·L(N, ∞): α_N/α_S (eq. B.5)."""
    return k.alpha_n / k.alpha_s


def other_stop(stop: float, other: float, k: Training) -> tuple[float, float, float]:
    """Training that stops `stop` above converged against one that stops `other` above it, to the same loss: ratios of params, steps and
    compute (eq. B.13 to B.16)."""
    params = ((1 + stop) / (1 + other)) ** (1 / k.alpha_n)
    steps = ((1 + 1 / stop) / (1 + 1 / other)) ** (1 / k.alpha_s)
    return params, steps, params * steps


def other_size(ratio: ArrayLike, k: Training) -> tuple[np.ndarray, np.ndarray]:
    """Models of `ratio` times the efficient size, to the same loss: ratios of steps and of compute (eq. B.17 and B.18); inf where so small
    a model never reaches it."""
    ratio = np.asarray(ratio, float)
    left = 1 + k.alpha_s / k.alpha_n * -np.expm1(-k.alpha_n * np.log(ratio))
    with np.errstate(divide="ignore"):
        steps = np.where(left > 0, np.maximum(left, 0.0) ** (-1 / k.alpha_s), np.inf)
    return steps, ratio * steps


def intersection(
    alpha_c: float, c_c: float, alpha_d: float, d_c: float, tokens_at_one: float, tokens_exponent: float
) -> tuple[float, float, float]:
    """Where L(C_min) = (C_c/C)^α_C falls below L(D) = (D_c/D)^α_D of the data that efficient training uses, D = D_1·C^p (section 6.3).

    Beyond it the two laws contradict each other: so little data cannot give so low a loss.

    Returns:
      C_min in PF-days, D in tokens and the loss there; nan where the lines never cross at more compute.
    """
    slope = alpha_c - alpha_d * tokens_exponent  # L(C_min) falls faster than L(D(C)) by this power of C
    if slope <= 0:
        return np.nan, np.nan, np.nan
    log_c = (alpha_c * np.log(c_c) - alpha_d * (np.log(d_c) - np.log(tokens_at_one))) / slope
    return float(np.exp(log_c)), float(tokens_at_one * np.exp(tokens_exponent * log_c)), float(np.exp(alpha_c * (np.log(c_c) - log_c)))
