"""Many descents at once: Levenberg and Marquardt's method on Huber's loss, vmapped over starts, resamples and whole data sets, in double
precision. One program a form and size: multi-start, bootstrap, held-out fits and simulated studies all go through it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.laws.form import Form

CHUNK = 256  # problems that go through the program at a time
_MAX_STEP = 4.0  # of a fitted parameter; a logarithm may move by e^4
_LEAST_DAMPING, _MOST_DAMPING = 1e-10, 1e10


class Descent(NamedTuple):
    """`fitted_QxP` are the transformed parameters that each of Q problems ended with, `objective_Q` Σ w·huber(residual) there."""

    fitted_QxP: np.ndarray
    objective_Q: np.ndarray


def descend(
    form: Form,
    x: Mapping[str, np.ndarray],
    y_QxN: np.ndarray,
    weight_QxN: np.ndarray,
    start_QxP: np.ndarray,
    huber_delta: float,
    iterations: int = 200,
    on_chunk: Callable[[int], None] | None = None,
) -> Descent:
    """Minimizes Σ_n w_n·huber_δ(y_n − f(x_n)) of every problem from its own start.

    Args:
      form: whose function is fitted.
      x: inputs by name, [N], of all problems.
      y_QxN: targets in the residual space; [1, N] where all problems share them.
      weight_QxN: weights of the rows, 0 leaves one out; [1, N] where shared.
      start_QxP: transformed parameters; [1, P] where shared. Clipped to the bounds.
      huber_delta: the residual beyond which the loss grows linearly.
      iterations: of a descent at most.
      on_chunk: called with the number of problems done.
    """
    import jax

    problems = max(len(a) for a in (y_QxN, weight_QxN, start_QxP))
    rows = y_QxN.shape[1]
    padded = max(16, 1 << (rows - 1).bit_length())
    x = {name: _widened(np.asarray(x[name], float)[None], padded, "edge")[0] for name in form.inputs}
    y_QxN, weight_QxN = _widened(y_QxN, padded, "edge"), _widened(weight_QxN, padded, "zero")
    low_P, high_P = form.transformed([[p.low for p in form.parameters], [p.high for p in form.parameters]])
    found, objective = [], []
    with jax.enable_x64(True):
        program = _program(form.function, form.names, tuple(p.transform == "log" for p in form.parameters))
        for first in range(0, problems, CHUNK):
            part = [_part(a, first, problems) for a in (y_QxN, weight_QxN, start_QxP)]
            fitted, value = program(x, dict(form.constants), *part, low_P, high_P, float(huber_delta), int(iterations))
            found.append(np.asarray(fitted))
            objective.append(np.asarray(value))
            if on_chunk is not None:
                on_chunk(min(first + CHUNK, problems))
    return Descent(np.concatenate(found)[:problems], np.concatenate(objective)[:problems])


def _widened(a_QxN: np.ndarray, width: int, mode: str) -> np.ndarray:
    missing = ((0, 0), (0, width - a_QxN.shape[1]))
    return np.pad(a_QxN, missing, mode="edge") if mode == "edge" else np.pad(a_QxN, missing)


def _part(a_QxN: np.ndarray, first: int, problems: int) -> np.ndarray:
    """CHUNK rows of it; the last is repeated where it has fewer."""
    if len(a_QxN) == 1:
        return np.broadcast_to(a_QxN, (CHUNK, a_QxN.shape[1]))
    part = a_QxN[first : min(first + CHUNK, problems)]
    return np.concatenate([part, np.repeat(part[-1:], CHUNK - len(part), axis=0)]) if len(part) < CHUNK else part


@functools.lru_cache(maxsize=128)
def _program(function: Callable[..., Any], names: tuple[str, ...], logs: tuple[bool, ...]) -> Callable[..., Any]:
    """The compiled descent of CHUNK problems: (x, constants, y, weight, start, low, high, delta, iterations) -> (fitted, objective)."""
    import jax
    from jax import numpy as jnp

    def predict_N(fitted_P, x, constants):
        values = constants | {name: jnp.exp(v) if log else v for name, log, v in zip(names, logs, fitted_P, strict=True)}
        return function(values, x)

    def one(x, constants, y_N, weight_N, start_P, low_P, high_P, delta, iterations):
        def objective(fitted_P):
            size_N = jnp.abs(y_N - predict_N(fitted_P, x, constants))
            loss_N = jnp.where(size_N <= delta, 0.5 * size_N**2, delta * (size_N - 0.5 * delta))
            value = jnp.sum(jnp.where(weight_N > 0, weight_N * loss_N, 0.0))
            return jnp.where(jnp.isfinite(value), value, jnp.inf)

        def step(state):
            fitted_P, value, damping, _, count = state
            residual_N = y_N - predict_N(fitted_P, x, constants)
            slope_NxP = jax.jacfwd(predict_N)(fitted_P, x, constants)
            size_N = jnp.abs(residual_N)
            pull_N = weight_N * jnp.where(size_N <= delta, 1.0, delta / jnp.maximum(size_N, delta))  # ψ(r)/r
            kept_N = (weight_N > 0)[:, None]
            slope_NxP = jnp.where(kept_N, slope_NxP, 0.0)
            downhill_P = slope_NxP.T @ jnp.where(weight_N > 0, pull_N * residual_N, 0.0)
            free_P = ~(((fitted_P <= low_P) & (downhill_P < 0)) | ((fitted_P >= high_P) & (downhill_P > 0)))
            curve_PxP = (slope_NxP * pull_N[:, None]).T @ slope_NxP
            scale_P = jnp.diag(curve_PxP)
            scale_P = jnp.maximum(scale_P, 1e-12 * jnp.max(scale_P) + 1e-300)
            curve_PxP = curve_PxP + jnp.diag(damping * scale_P)
            curve_PxP = jnp.where(free_P[:, None] & free_P[None, :], curve_PxP, jnp.diag(scale_P))
            move_P = jnp.linalg.solve(curve_PxP, jnp.where(free_P, downhill_P, 0.0))
            move_P = jnp.where(jnp.isfinite(move_P), jnp.clip(move_P, -_MAX_STEP, _MAX_STEP), 0.0)
            trial_P = jnp.clip(fitted_P + move_P, low_P, high_P)
            trial = objective(trial_P)
            better = trial < value
            gained = jnp.where(better, value - trial, 0.0)
            small = gained <= 1e-11 * value + 1e-300
            done = (better & small & (damping < 1e-2)) | (~better & (damping >= _MOST_DAMPING)) | jnp.all(trial_P == fitted_P)
            damping = jnp.clip(jnp.where(better, damping / 5, damping * 4), _LEAST_DAMPING, _MOST_DAMPING)
            return jnp.where(better, trial_P, fitted_P), jnp.where(better, trial, value), damping, done, count + 1

        def going(state):
            return ~state[3] & (state[4] < iterations)

        start_P = jnp.clip(start_P, low_P, high_P)
        first = (start_P, objective(start_P), jnp.asarray(1e-2), jnp.asarray(False), jnp.asarray(0))
        fitted_P, value, *_ = jax.lax.while_loop(going, step, first)
        return fitted_P, value

    return jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0, 0, None, None, None, None)))
