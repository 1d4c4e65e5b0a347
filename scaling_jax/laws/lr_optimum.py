"""The best learning rate at each batch size, from a grid of runs."""

from typing import Any

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.table import check, known, required


def lr_optima(table: list[dict[str, Any]], each_side: int = 2) -> list[dict[str, float]]:
    """η*(B) as the minimum of a parabola in log η around the lowest loss of each batch size.

    Args:
      table: rows of `batch_tokens` (tokens), `lr` and `loss` (nats per token; None or not finite: the run diverged). Rows that share batch
        and lr, as seeds do, are averaged; the lr counts as diverged where one of them did.
      each_side: grid points on either side of the lowest that the parabola is fitted to; one where it opens downwards or its minimum lies
        beyond the neighbours.

    Returns:
      A row for each batch size, in order: `batch_tokens`, `lr`, `loss` (of the parabola there), and `lr_se`, the standard error of lr, from
      the scatter about all the parabolas together; it is left out where there is none.

    Raises:
      UserError: the lowest loss of a batch size is at an edge of what did not diverge, so that the minimum may be anywhere beyond.
    """
    check("each_side", each_side, lambda n: isinstance(n, int) and n >= 1, "an integer, 1 or more")
    batch, lr = required(table, "batch_tokens"), required(table, "lr")
    loss = known(table, "loss")
    minima = [_minimum(at, lr[batch == at], loss[batch == at], each_side) for at in np.unique(batch)]
    sum_sq, dof = sum(m[3] for m in minima), sum(m[4] for m in minima)
    se = np.sqrt(sum_sq / dof) if dof else 0.0
    rows = [{"batch_tokens": float(at), "lr": m[0], "loss": m[1]} for at, m in zip(np.unique(batch), minima, strict=True)]
    return [row | ({"lr_se": float(row["lr"] * se * m[2])} if se > 0 else {}) for row, m in zip(rows, minima, strict=True)]


def _minimum(batch: float, lr: np.ndarray, loss: np.ndarray, each_side: int) -> tuple[float, float, float, float, int]:
    """lr and loss of the minimum, standard error of log lr for losses with error 1, squared residuals, degrees of freedom."""
    grid = np.unique(lr)
    mean = np.array([loss[lr == at].mean() for at in grid])
    grid, mean = grid[np.isfinite(mean)], mean[np.isfinite(mean)]
    at = int(np.argmin(mean)) if len(mean) else 0
    if len(mean) < 3 or at in (0, len(mean) - 1):
        found = f"its lowest loss is at lr {grid[at]:g}" if len(mean) else "every run diverged"
        tried = ", ".join(f"{value:g}" for value in grid)
        raise UserError(f"at batch_tokens {batch:g} {found}, which two higher losses must enclose; lrs with a loss: {tried or 'none'}")
    log_lr = np.log(grid)
    for reach in (each_side, 1):
        near = slice(max(0, at - reach), at + reach + 1)
        x, y = log_lr[near] - log_lr[at], mean[near]
        powers = np.vander(x, 3)
        curve, slope, height = np.linalg.lstsq(powers, y, rcond=None)[0]
        if curve > 0 and log_lr[at - 1] < log_lr[at] - slope / (2 * curve) < log_lr[at + 1]:
            break
    shift = -slope / (2 * curve)
    gradient = np.array([slope / (2 * curve**2), -1 / (2 * curve), 0.0])
    shift_se = np.sqrt(gradient @ np.linalg.inv(powers.T @ powers) @ gradient)
    residuals = y - powers @ [curve, slope, height]
    lowest = height - slope**2 / (4 * curve)
    return float(np.exp(log_lr[at] + shift)), float(lowest), float(shift_se), float(residuals @ residuals), len(x) - 3
