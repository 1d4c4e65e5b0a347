"""How often the noise scale's 95% interval covers the truth: simulated runs with planted |G|² and tr Σ.

    python benchmarks/noise_coverage.py                            # about a minute on two cores
    python benchmarks/noise_coverage.py --runs=4000 --seed=1 --json=coverage.json

Every run goes through `estimator.init`, `update` (in a scan) and `read`, as in training. What a step measures is drawn from the exact
law of squared norms of Gaussian gradients in so many dimensions (`draw`): skewed as chi-squares are, |G|² often negative. The
autocorrelation is that of the steps' |G|² and tr Σ, ρᵏ at lag k, exactly.

The interval's estimand is the ratio of the window-weighted means of the true tr Σ and the true |G|². Where these are the same at all steps
it is their ratio; where they drift it is read off the same window: one more run is fed the true values instead of estimates.

An interval with an open upper end counts as covering what lies above its lower end.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax import noise_scale
from scaling_jax.noise_scale import estimator
from scaling_jax.noise_scale.two_batches import microbatch_estimates

RATIOS = (0.3, 3.0, 30.0)  # B_noise / B
SEQUENCES = 8  # of a step, each with its own norm
MICROBATCHES, MICROBATCH_SEQUENCES = 4, 16


class Draws(NamedTuple):
    """Parts of the squared norms, in units of a batch mean's variance in one dimension. N steps, R runs."""

    along_NxR: np.ndarray  # component along the true gradient
    square_NxR: np.ndarray  # ‖G − E G‖²
    scatter_NxR: np.ndarray  # Σ_b ‖g_b − G‖² / B, over the B sequences (or microbatches) of a step


Estimates = dict[tuple[str, float], tuple[np.ndarray, np.ndarray]]  # of a setting and B_noise / B: |G|² and tr Σ, [N, R + 1]


class Result(NamedTuple):
    """Of all runs, for each of G settings, flat window first, then exponential weights."""

    covered_2xG: np.ndarray
    open_2xG: np.ndarray  # share of intervals without an upper end
    blocks: float  # in the window


def draw(rng: np.random.Generator, runs: int, dims: int, parts_N: np.ndarray, rho: float) -> Draws:
    """Gradients of `parts` sequences a step, isotropic Gaussian, whose deviations from the true gradient are autoregressive in time.

    For components z of autocorrelation √ρ, z² has autocorrelation ρ, and the sum of squares of many is a chi-square that moves by
    non-central ones (a square-root diffusion at whole times), so that no component need be kept. The true gradient is one and the
    same up to its sign, which flips as in a valley that is walked down in zigzag, with autocorrelation √ρ too: so its product with z
    has ρ as well.

    Args:
      parts_N: sequences or microbatches of each step; never fewer than before.
    """
    phi = np.sqrt(rho)

    def move(chi_square_R: np.ndarray, dof: int) -> np.ndarray:
        return (1 - rho) * rng.noncentral_chisquare(dof, rho / (1 - rho) * chi_square_R)

    draws = Draws(*(np.empty((len(parts_N), runs), np.float32) for _ in Draws._fields))
    z_R, rest_R, scatter_R = rng.standard_normal(runs), rng.chisquare(dims - 1, runs), rng.chisquare(dims * (parts_N[0] - 1), runs)
    sign_R = rng.choice([-1.0, 1.0], runs)
    for n, parts in enumerate(parts_N):
        if n:
            z_R = phi * z_R + np.sqrt(1 - rho) * rng.standard_normal(runs)
            sign_R = np.where(rng.random(runs) < (1 - phi) / 2, -sign_R, sign_R)
            rest_R, scatter_R = move(rest_R, dims - 1), move(scatter_R, dims * (parts_N[n - 1] - 1))
            if parts > parts_N[n - 1]:
                scatter_R = scatter_R + rng.chisquare(dims * (parts - parts_N[n - 1]), runs)
        draws.along_NxR[n], draws.square_NxR[n], draws.scatter_NxR[n] = sign_R * z_R, z_R**2 + rest_R, scatter_R
    return draws


def squared_norms(draws: Draws, dims: int, grad_sq_N: np.ndarray, batch_variance_N: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """‖G‖² and the mean of ‖g_b‖² over sequences (or microbatches), both [N, R], float32.

    Args:
      grad_sq_N: true |G|² at each step.
      batch_variance_N: tr Σ / B of the whole batch's mean.
    """
    grad_sq_Nx1, variance_Nx1 = (jnp.asarray(x_N, jnp.float32)[:, None] for x_N in (grad_sq_N, batch_variance_N / dims))  # in one dimension
    big_sq_NxR = grad_sq_Nx1 + 2 * jnp.sqrt(grad_sq_Nx1 * variance_Nx1) * draws.along_NxR + variance_Nx1 * draws.square_NxR
    return big_sq_NxR, big_sq_NxR + variance_Nx1 * draws.scatter_NxR


def estimated(
    estimate: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    draws: Draws,
    dims: int,
    parts_N: np.ndarray,
    *truth_N: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The package's estimates of |G|² and tr Σ at every step of every run; one more run is the truth. Both [N, R + 1].

    Args:
      estimate: of (squared norms [parts, runs], ‖G‖² [runs]), a function of the package.
      truth_N: |G|², tr Σ and the sequences of the batch, at every step.
    """
    runs = draws.along_NxR.shape[1]
    both_NxR = [np.repeat(truth[:, None].astype(np.float32), runs + 1, axis=1) for truth in truth_N[:2]]
    for parts in np.unique(parts_N):
        these = slice(*np.searchsorted(parts_N, [parts, parts + 1]))
        found = _estimate(estimate, int(parts), dims, Draws(*(x_NxR[these] for x_NxR in draws)), *(x_N[these] for x_N in truth_N))
        for x_NxR, found_NxR in zip(both_NxR, found, strict=True):
            x_NxR[these, :-1] = found_NxR
    return tuple(both_NxR)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _estimate(estimate, parts, dims, draws, grad_sq_N, grad_trace_N, batch_N):
    """The mean is all that matters of the norms in a step, so all are given that one; steps and runs stand in the place of groups."""
    big_sq_NxR, small_sq_NxR = squared_norms(draws, dims, grad_sq_N, grad_trace_N / batch_N.astype(jnp.float32))
    small_sq_BxG = jnp.broadcast_to(small_sq_NxR.reshape(1, -1), (parts, small_sq_NxR.size))
    return tuple(x_G.reshape(small_sq_NxR.shape) for x_G in estimate(small_sq_BxG, big_sq_NxR.reshape(-1)))


def by_microbatches(sq_norms_MxG: jax.Array, grad_sq_G: jax.Array) -> tuple[jax.Array, jax.Array]:
    return microbatch_estimates(sq_norms_MxG, MICROBATCH_SEQUENCES, grad_sq_G)


@jax.jit
@partial(jax.vmap, in_axes=(None, 1, None, None))
def readings(
    tokens_N: jax.Array, estimates_G: list[tuple[jax.Array, jax.Array]], window_tokens: jax.Array, decay_tokens: jax.Array
) -> tuple[noise_scale.NoiseScale, noise_scale.NoiseScale, jax.Array]:
    """A run's last reading by either averaging, and the blocks that were in use; for all runs along the estimates' second axis."""

    def step(state, x):
        tokens, estimates_G = x
        return estimator.update(state, tokens, *map(jnp.stack, zip(*estimates_G, strict=True)), window_tokens), None

    groups = len(estimates_G)
    state = jax.lax.scan(step, estimator.init(groups), (tokens_N, estimates_G))[0]
    flat = estimator.read(state, window_tokens, np.eye(groups))
    decayed = estimator.read(state, window_tokens, np.eye(groups), decay_tokens=decay_tokens)
    return flat, decayed, jnp.minimum(window_tokens, state.seen_tokens / 2) / state.block_tokens


def coverage(tokens_N: np.ndarray, estimates_G: list[tuple[np.ndarray, np.ndarray]], window_tokens: float, decay_tokens: float) -> Result:
    """Over the runs of each of G pairs of estimates, |G|² and tr Σ [N, R + 1], of which the last run is the truth."""
    *both, blocks = readings(tokens_N.astype(np.float32), estimates_G, np.float32(window_tokens), np.float32(decay_tokens))
    low, high = (np.stack([np.asarray(getattr(reading, end)) for reading in both])[:, :-1] for end in ("low", "high"))
    truth_2x1xG = np.stack([np.asarray(reading.sequences) for reading in both])[:, -1:]
    covered = (low <= truth_2x1xG) & (truth_2x1xG <= high)
    return Result(covered.mean(1), np.isinf(high).mean(1), float(blocks[0]))


def equal_batches(rng: np.random.Generator, runs: int, dims: int, steps: int, rho: float) -> Estimates:
    """From either estimator where nothing changes; and from sequences where over the run |G|² falls by 4 and tr Σ rises by 2."""
    ones_N, passed_N, found = np.ones(steps), np.arange(steps) / steps, {}
    for name, parts, batch, estimate in (
        ("sequences", SEQUENCES, SEQUENCES, noise_scale.estimates),
        ("microbatches", MICROBATCHES, MICROBATCHES * MICROBATCH_SEQUENCES, by_microbatches),
    ):
        parts_N = np.full(steps, parts)
        simulate = partial(estimated, estimate, draw(rng, runs, dims, parts_N, rho), dims, parts_N)
        for ratio in RATIOS:
            found[name, ratio] = simulate(ones_N, ratio * batch * ones_N, batch * ones_N)
        if name == "sequences":
            for ratio in RATIOS:
                found["drifting truth", ratio] = simulate(4.0**-passed_N, ratio * batch * 2.0**passed_N, batch * ones_N)
    return found


def doubling_batch(rng: np.random.Generator, runs: int, dims: int, steps: int, rho: float) -> tuple[np.ndarray, Estimates]:
    """Sequences of each step, twice as many in the last fifth of the run (a third of its later half's tokens come before); estimates."""
    batch_N, ones_N = np.where(np.arange(steps) < 0.8 * steps, SEQUENCES, 2 * SEQUENCES), np.ones(steps)
    draws = draw(rng, runs, dims, batch_N, rho)
    return batch_N, {
        ("doubling batch", ratio): estimated(noise_scale.estimates, draws, dims, batch_N, ones_N, ratio * SEQUENCES * ones_N, batch_N)
        for ratio in RATIOS
    }


def main() -> None:
    args = _arguments()
    started, rows = time.perf_counter(), []
    print(f"{args.runs} runs each, seed {args.seed}, {args.dims} dimensions; binomial standard error at 95%: {_binomial(args.runs):.1%}")
    averagings = ("flat", "exponential")
    columns = [f"{averaging}, {ratio:g}" for averaging in averagings for ratio in RATIOS]
    columns += [f"open, {averaging}, {RATIOS[-1]:g}" for averaging in averagings]
    print(f"\n| autocorrelation | steps | | {' | '.join(columns)} |\n|---|---|---|{'---|' * len(columns)}")
    for rho, steps in ((0.0, 400), (0.9, 10_000)):
        rng = np.random.default_rng([args.seed, steps])
        equal = np.full(steps, SEQUENCES), equal_batches(rng, args.runs, args.dims, steps, rho)
        for tokens_N, settings in (equal, doubling_batch(rng, args.runs, args.dims, steps, rho)):
            result = coverage(tokens_N, list(settings.values()), tokens_N.sum() / 2, tokens_N.sum() / 10)
            for name in dict.fromkeys(name for name, _ in settings):
                these = [g for g, setting in enumerate(settings) if setting[0] == name]
                cells = [f"{share:.1%}" for share in (*result.covered_2xG[:, these].ravel(), *result.open_2xG[:, these[-1]])]
                print(f"| {rho} | {steps:,} | {name} | {' | '.join(cells)} |", flush=True)
                rows.append({"autocorrelation": rho, "steps": steps, "setting": name} | dict(zip(columns, cells, strict=True)))
    print("\n| steps in the window | blocks | flat | exponential | flat, independent steps | exponential |")
    print("|---|---|---|---|---|---|")
    for window in args.windows:
        shares = []
        for rho in (0.9, 0.0):
            rng, ones_N = np.random.default_rng([args.seed, window, int(10 * rho)]), np.ones(2 * window)
            parts_N = np.full(2 * window, SEQUENCES)
            draws = draw(rng, args.runs, args.dims, parts_N, rho)
            estimates = estimated(
                noise_scale.estimates, draws, args.dims, parts_N, ones_N, args.ratio * SEQUENCES * ones_N, SEQUENCES * ones_N
            )
            result = coverage(ones_N, [estimates], window, window / 5)
            shares += [f"{share:.1%}" for share in result.covered_2xG[:, 0]]
        print(f"| {window:,} | {result.blocks:.0f} | {' | '.join(shares)} |", flush=True)
        rows.append({"window": window, "blocks": result.blocks, "shares": shares})
    print(f"\n{time.perf_counter() - started:.0f} s")
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=2) + "\n")


def _binomial(runs: int) -> float:
    return (0.95 * 0.05 / runs) ** 0.5


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Coverage of the noise scale's 95% interval in simulated runs.")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dims", type=int, default=16, help="of the simulated gradient: fewer are more skewed")
    parser.add_argument("--ratio", type=float, default=3.0, help="B_noise / B of the table by window")
    parser.add_argument("--windows", type=int, nargs="*", default=[100, 300, 1000, 3000, 5000, 10_000], help="in steps")
    parser.add_argument("--json", help="file to write the numbers to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
