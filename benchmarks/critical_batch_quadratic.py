"""The critical batch size of a problem where all of it is known: SGD on a quadratic with noise, its moments followed exactly.

    python benchmarks/critical_batch_quadratic.py        # the tables of docs/noise_scale.md, a few seconds

L = ½·Σ h_i·θ_i², the gradient of a batch of B is h·θ plus noise of variance σ_i²/B, independent between coordinates and steps. One step
with learning rate ε takes E θ_i² to (1 − ε·h_i)²·E θ_i² + ε²·σ_i²/B: a recursion without sampling, whose losses are exact means over runs.
The best ε for the next step (McCandlish et al. 2018, eq. 2.6, all moments being means over runs) is ε_max/(1 + B_noise/B) with
ε_max = E|G|²/E GᵀHG and B_noise = tr(HΣ)/E GᵀHG. Here the step is c·ε_opt, c small: at c = 1 it is greedy, a large batch overshoots along
the steep directions, and the runs of different B no longer pass through the same points.

E|G|² is the mean of |G|² over runs, not the square of their mean gradient: near the optimum it is the spread that noise itself has made.
That is what a run has to descend, so ε_opt is made of it; but it depends on B. The noise scale that `tradeoff` is compared with is taken on
the path of the infinite batch, which has no such spread: at small c runs of every batch pass through the same points, the infinite batch
in dS_∞ steps from L to L − dL and a batch of B in dS_∞·(1 + B_noise(L)/B). So S(B) = S_∞ + (1/B)·∫B_noise dS_∞, and E_min/S_min is
the mean of B_noise over the steps of the infinite-batch run. Over steps, not tokens, of which that run has none to count; and at the limit
c → 0, since over a few long steps a sum says as much of the steps as of the problem.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scaling_jax.laws.critical_batch import Tradeoff, tradeoff_fit


class Quadratic(NamedTuple):
    """Curvatures h_i, variances σ_i² of one sample's gradient, and where every run starts, θ_i²; all [dims]."""

    curvature: np.ndarray
    variance: np.ndarray
    start_sq: np.ndarray


class Noise(NamedTuple):
    """Noise scales in samples: tr(HΣ)/GᵀHG, and the simple one, tr Σ/|G|²."""

    hessian: float
    simple: float


def power_spectrum(dims: int = 100, noise: str = "curvature") -> Quadratic:
    """h_i = 1/i, θ_i² = 1; noise with Σ ∝ H ("curvature", as of a likelihood near its optimum) or the same everywhere ("even")."""
    curvature = 1 / np.arange(1, dims + 1)
    variance = curvature if noise == "curvature" else np.full(dims, curvature.mean())
    return Quadratic(curvature, 10 * variance, np.ones(dims))


def descend(problem: Quadratic, batch_B: np.ndarray, target: float, c: float | None = None, lr_B: np.ndarray | None = None) -> np.ndarray:
    """Steps of each batch size, a fraction included, until the mean loss is at `target`; nan where it never is.

    Args:
      problem: what to descend.
      batch_B: batch sizes in samples.
      target: loss.
      c, lr_B: either c·ε_opt of each batch's own moments, or an lr that stays.
    """
    h = problem.curvature
    theta_sq_BxD = np.repeat(problem.start_sq[None], len(batch_B), axis=0)
    steps_B, step, loss_B = np.full(len(batch_B), np.nan), 0, 0.5 * theta_sq_BxD @ h
    while True:
        eps_B = lr_B if c is None else c * best_lr(problem, theta_sq_BxD, batch_B)
        theta_sq_BxD = (1 - eps_B[:, None] * h) ** 2 * theta_sq_BxD + (eps_B**2 / batch_B)[:, None] * problem.variance
        before_B, loss_B = loss_B, 0.5 * theta_sq_BxD @ h
        crossed_B = np.isnan(steps_B) & (loss_B <= target)
        steps_B[crossed_B] = step + np.log(before_B[crossed_B] / target) / np.log(before_B[crossed_B] / loss_B[crossed_B])
        if (~np.isnan(steps_B) | (np.abs(loss_B / before_B - 1) < 1e-6)).all():  # what has settled above the target never gets there
            return steps_B
        step += 1


def best_lr(problem: Quadratic, theta_sq_BxD: np.ndarray, batch_B: np.ndarray) -> np.ndarray:
    """ε_opt(B), at which the mean loss after one step is least."""
    h = problem.curvature
    return theta_sq_BxD @ h**2 / (theta_sq_BxD @ h**3 + np.sum(h * problem.variance) / batch_B)


def path_mean(problem: Quadratic, target: float, c: float = 0.002) -> Noise:
    """Both noise scales on the way to `target`, averaged over the steps of an infinite batch at c·ε_max."""
    h, theta_sq, scales = problem.curvature, problem.start_sq, []
    while 0.5 * theta_sq @ h > target:
        scales.append((np.sum(h * problem.variance) / (theta_sq @ h**3), np.sum(problem.variance) / (theta_sq @ h**2)))
        theta_sq = (1 - c * best_lr(problem, theta_sq, np.inf) * h) ** 2 * theta_sq
    return Noise(*np.mean(scales, axis=0).tolist())


def best_constant_lr(problem: Quadratic, batch_B: np.ndarray, target: float, lrs: int = 100) -> np.ndarray:
    """Steps of each batch size at the one of `lrs` constant lrs, from 2% to 99% of the largest stable one, that takes it fewest."""
    lr_L = np.geomspace(0.02, 0.99, lrs) * 2 / problem.curvature.max()
    steps = descend(problem, np.tile(batch_B, lrs), target, lr_B=np.repeat(lr_L, len(batch_B)))
    return np.fmin.reduce(steps.reshape(lrs, len(batch_B)))


def compare(problem: Quadratic, ratio: float, c: float | None = None, lr: float | None = None) -> tuple[Tradeoff, Noise, np.ndarray, float]:
    """`tradeoff` to `ratio` of the first loss, over batches from 1/16 (with one lr for all 2^-14) to 16 times the path's mean noise scale.

    With c the lr is c·ε_opt(B), with lr the same for all batches, with neither each batch has its own best constant lr.

    Returns:
      The fit, the path's noise, the batches that reached that loss, and the steps of the largest.
    """
    target = ratio * 0.5 * problem.start_sq @ problem.curvature
    noise = path_mean(problem, target)
    batch_B = noise.hessian * 2.0 ** np.arange(-14 if lr else -4, 5)
    if c or lr:
        steps_B = descend(problem, batch_B, target, c, np.full(len(batch_B), lr))
    else:
        steps_B = best_constant_lr(problem, batch_B, target)
    reached = np.isfinite(steps_B)
    table = [{"batch_tokens": b, "steps": s} for b, s in zip(batch_B[reached], steps_B[reached], strict=True)]
    return tradeoff_fit(table), noise, batch_B[reached], steps_B[-1]


def rows(noise: str, ratios: Sequence[float], settings: Sequence[dict[str, float]]) -> None:
    for ratio in ratios:
        for setting in settings:
            fit, path, reached, steps = compare(power_spectrum(noise=noise), ratio, **setting)
            lr = f"{setting['c']:g}·ε_opt(B)" if "c" in setting else f"{setting['lr']:g} for all" if "lr" in setting else "best constant"
            found = "none" if fit.batch_tokens is None else f"{fit.batch_tokens:,.3g}"
            share = "" if fit.batch_tokens is None else f"{fit.batch_tokens / path.hessian:.2g}"
            print(
                f"| {noise} | {ratio} | {lr} | {reached.min():,.3g} | {steps:,.0f} | **{found}** | {path.hessian:,.4g} | {share} | "
                f"{path.simple:,.3g} | {np.abs(fit.residuals).max():.3f} |"
            )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("100 curvatures 1/i; batches in samples, 1/16 (with one lr for all 2^-14) to 16 times the path's mean tr(HΣ)/GᵀHG\n")
    print("| noise | target | lr | least batch | steps of the largest | E_min/S_min | tr(HΣ)/GᵀHG | ratio | tr Σ/\\|G\\|² | residual |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for noise in ("curvature", "even"):
        rows(noise, (0.5, 0.2, 0.1), [*({"c": c} for c in (0.01, 0.05, 0.2, 1.0)), {}])
        rows(noise, (0.2,), [{"lr": lr} for lr in (0.01, 0.03, 0.1, 0.3, 1.0)])


if __name__ == "__main__":
    main()
