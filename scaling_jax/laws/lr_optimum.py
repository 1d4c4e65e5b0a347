"""The best learning rate, from a grid of runs: by batch size alone, and by batch size, tokens and whatever else a study varies."""

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.observations import checked
from scaling_jax.laws.settings import cell_columns, confounded, one_setting
from scaling_jax.laws.table import check, known, required

SOURCE = "Filatov et al. 2024, arXiv 2410.05838"
TITLE = "Best learning rate by batch size and tokens"
EACH_SIDE = 2  # grid points on either side of the lowest that a parabola is fitted to
_LEAST_DOF = 10  # of residuals, to know their variance horizon by horizon


def lr_optima(table: list[dict[str, Any]], each_side: int = EACH_SIDE) -> list[dict[str, float]]:
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
    batches = np.unique(batch)
    valleys = [_enclosed(at, lr[batch == at], loss[batch == at], each_side) for at in batches]
    sum_sq, dof = sum(v.residuals @ v.residuals for v in valleys), sum(v.dof for v in valleys)
    se = np.sqrt(sum_sq / dof) if dof else 0.0
    rows = [{"batch_tokens": float(at), "lr": v.lr, "loss": v.loss} for at, v in zip(batches, valleys, strict=True)]
    return [row | ({"lr_se": float(row["lr"] * se * v.unit_se)} if se > 0 else {}) for row, v in zip(rows, valleys, strict=True)]


class Valley(NamedTuple):
    """A parabola in log η (or log B) about the lowest loss of a grid. `used` are the points that it is fitted to, by their place in the
    grid; `powers` [used, 3] times `coefficients` [3] its values there, in x = ln η − `centre`; `residuals` [used] in nats per token."""

    centre: float
    used: np.ndarray
    powers: np.ndarray
    coefficients: np.ndarray
    residuals: np.ndarray

    @property
    def shift(self) -> float:
        curve, slope, _ = self.coefficients
        return -slope / (2 * curve)

    @property
    def lr(self) -> float:
        return float(np.exp(self.centre + self.shift))

    @property
    def loss(self) -> float:
        curve, slope, height = self.coefficients
        return float(height - slope**2 / (4 * curve))

    @property
    def curvature(self) -> float:
        """d²L/d(ln η)²."""
        return float(2 * self.coefficients[0])

    @property
    def dof(self) -> int:
        return len(self.residuals) - 3

    def unit_ses(self) -> np.ndarray:
        """Standard errors of log lr, loss and curvature, for losses whose error is 1."""
        curve, slope, _ = self.coefficients
        gradients_3x3 = np.array(
            [[slope / (2 * curve**2), -1 / (2 * curve), 0.0], [slope**2 / (4 * curve**2), -slope / (2 * curve), 1.0], [2.0, 0.0, 0.0]]
        )
        covariance = np.linalg.inv(self.powers.T @ self.powers)
        return np.sqrt(np.einsum("ij,jk,ik->i", gradients_3x3, covariance, gradients_3x3))

    @property
    def unit_se(self) -> float:
        return float(self.unit_ses()[0])


def enclosed_minimum(lr: np.ndarray, mean: np.ndarray, each_side: int = EACH_SIDE) -> Valley | None:
    """Of ascending lrs (or batch sizes) and finite losses; None where two higher losses do not enclose the lowest."""
    at = int(np.argmin(mean)) if len(mean) else 0
    if len(mean) < 3 or at in (0, len(mean) - 1):
        return None
    log_lr = np.log(lr)
    for reach in (each_side, 1):
        used = np.arange(max(0, at - reach), min(len(lr), at + reach + 1))
        powers = np.vander(log_lr[used] - log_lr[at], 3)
        coefficients = np.linalg.lstsq(powers, mean[used], rcond=None)[0]
        if coefficients[0] > 0 and log_lr[at - 1] < log_lr[at] - coefficients[1] / (2 * coefficients[0]) < log_lr[at + 1]:
            break
    return Valley(float(log_lr[at]), used, powers, coefficients, mean[used] - powers @ coefficients)


def _enclosed(batch: float, lr: np.ndarray, loss: np.ndarray, each_side: int) -> Valley:
    grid = np.unique(lr)
    mean = np.array([loss[lr == at].mean() for at in grid])
    grid, mean = grid[np.isfinite(mean)], mean[np.isfinite(mean)]
    valley = enclosed_minimum(grid, mean, each_side)
    if valley is None:
        found = f"its lowest loss is at lr {grid[np.argmin(mean)]:g}" if len(mean) else "every run diverged"
        tried = ", ".join(f"{value:g}" for value in grid)
        raise UserError(f"at batch_tokens {batch:g} {found}, which two higher losses must enclose; lrs with a loss: {tried or 'none'}")
    return valley


# ------------------------------------------------------------------------------------------------------------------ of a study's table


class Cell(NamedTuple):
    """One size, batch size and horizon. `lr` ascending and `loss` its mean over seeds, of what did not diverge; `diverged` the lrs where a
    run did; `valley` is None where the minimum is censored."""

    key: dict[str, Any]
    lr: np.ndarray
    loss: np.ndarray
    diverged: np.ndarray
    runs: int
    valley: Valley | None


class Optima(NamedTuple):
    """The minima of all cells. `points` is as `lr_points` gives it, a row for each of `cells`. `relative_sd` [cells] is the error of a loss
    of a cell, from the scatter about the parabolas, and `shared` the part of its variance that horizons of one run have in common.
    `incomplete` rows had no batch_tokens, lr or horizon and were left out."""

    points: Any
    cells: list[Cell]
    relative_sd: np.ndarray
    shared: float
    incomplete: int = 0

    def noise(self, resamples: int, seed: int) -> list[np.ndarray]:
        """Draws of what the runs' noise adds to ln of the losses of each cell, [resamples, its lrs]; nan where nothing is known of it.

        It is drawn for each run, and its horizons share `shared` of the variance.
        """
        rng = np.random.default_rng(seed)
        common: dict[tuple, np.ndarray] = {}  # by size, batch and lr
        found = []
        for cell, sd in zip(self.cells, self.relative_sd, strict=True):
            groups = [(*((n, v) for n, v in cell.key.items() if n != "tokens"), lr) for lr in cell.lr]
            for group in groups:
                if group not in common:
                    common[group] = rng.normal(size=resamples)
            shared_Rxn = np.stack([common[group] for group in groups], axis=1) if groups else np.zeros((resamples, 0))
            found.append(sd * (np.sqrt(self.shared) * shared_Rxn + np.sqrt(1 - self.shared) * rng.normal(size=shared_Rxn.shape)))
        return found

    def draws(self, resamples: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
        """What the minima might have been, had the runs' noise been another: `log_lr`, `loss` and `curvature`, each [resamples, cells].

        The noise is that of runs, so that what is computed from several of their horizons gets the right interval. Windows stay; nan
        where a minimum is censored, nothing is known of the noise, or a parabola turns over.
        """
        found = {name: np.full((resamples, len(self.cells)), np.nan) for name in ("log_lr", "loss", "curvature")}
        for i, (cell, noise_Rxn) in enumerate(zip(self.cells, self.noise(resamples, seed), strict=True)):
            if cell.valley is None or not np.isfinite(self.relative_sd[i]):
                continue
            valley = cell.valley
            coefficients = valley.coefficients + valley.loss * noise_Rxn[:, valley.used] @ np.linalg.pinv(valley.powers).T
            curve, slope, height = np.where(coefficients[:, :1] > 0, coefficients, np.nan).T
            reach = np.ptp(valley.powers[:, 1])
            found["log_lr"][:, i] = valley.centre + np.clip(-slope / (2 * curve), -reach, reach)
            found["loss"][:, i] = height - slope**2 / (4 * curve)
            found["curvature"][:, i] = 2 * curve
        return found


def measure(table, each_side: int = EACH_SIDE) -> Optima:
    """The minimum in log η of every cell of a study: of each size, batch size, horizon, and whatever else differs but lr and seed.

    Args:
      table: of `results.load`; `batch_tokens`, `lr`, `loss`, `tokens` (or `horizon_tokens`), and those of `params`, `width`, `status`,
        `seed` and the settings that there are. Rows without one of the first four are left out and counted.
      each_side: as in `lr_optima`.
    """
    import pandas

    need = ("batch_tokens", "lr", "loss", *(() if "horizon_tokens" in table else ("tokens",)))
    finished = checked(table, need)
    keys = cell_columns(table)
    cells = []
    diverged = table[table["status"].eq("diverged")] if "status" in table else table.iloc[:0]
    grid = pandas.concat([finished.assign(_loss=finished["loss"]), diverged.assign(_loss=np.nan)])
    numeric = [name for name in ("params", "width", "batch_tokens", "lr", keys[-1], "_loss") if name in grid]
    grid = grid.assign(**{name: grid[name].astype(float) for name in numeric})  # of nullable columns too
    whole = grid[["batch_tokens", "lr", keys[-1]]].notna().all(axis=1)
    for values, rows in grid[whole].groupby(keys, sort=True, dropna=False):
        key = dict(zip(keys, values, strict=True))
        if "horizon_tokens" in key:
            key["tokens"] = key.pop("horizon_tokens")
        lost = np.unique(rows["lr"][rows["_loss"].isna()].to_numpy(float))
        kept = rows[~rows["lr"].isin(lost)]
        mean = kept.groupby("lr")["_loss"].mean().sort_index()
        lr, loss = mean.index.to_numpy(float), mean.to_numpy(float)
        cells.append(Cell(key, lr, loss, lost, len(rows), enclosed_minimum(lr, loss, each_side)))
    if not cells:
        raise UserError(f"no finished run has batch_tokens, lr, {keys[-1]} and loss; there is no learning rate to choose from")
    sd, shared = _noise(cells)
    rows = [_row(cell, error) for cell, error in zip(cells, sd, strict=True)]
    points = pandas.DataFrame(rows)
    for name in ("params", "width"):
        if name in points:
            continue
        points[name] = float(table[name].dropna().iloc[0]) if name in table and table[name].notna().any() else np.nan
    return Optima(points, cells, sd, shared, int((~whole).sum()))


def lr_points(table, each_side: int = EACH_SIDE):
    """η*(B, T) of every cell of a study, a DataFrame.

    Columns: width, params, batch_tokens, tokens (the horizon), any setting that differs, lr and its relative standard error lr_log_se, loss
    at the minimum and its loss_se (nats per token), curvature d²L/d(ln η)² and curvature_se, runs, `censored`: "" where it is a minimum,
    "low" where the lowest loss is at the lowest lr of the grid, so that the best is there or below, "high" where it is at the highest
    that did not diverge, "too few" with fewer than three lrs; `beside_divergence`, where a higher lr was tried and diverged. Where it is
    censored `lr` is the bound and `loss` that of the bound. Errors are nan where no grid has more points than a parabola needs.
    """
    return measure(table, each_side).points


def _noise(cells: list[Cell]) -> tuple[np.ndarray, float]:
    """Relative standard deviation of each cell's losses, and the part of the variance that a run's horizons share."""
    tokens = np.array([cell.key["tokens"] for cell in cells], float)
    sum_sq = np.array([0.0 if c.valley is None else np.sum((c.valley.residuals / c.valley.loss) ** 2) for c in cells])
    dof = np.array([0 if c.valley is None else c.valley.dof for c in cells])
    variance = np.full(len(cells), sum_sq.sum() / dof.sum() if dof.sum() else np.nan)
    for at in np.unique(tokens):
        if dof[tokens == at].sum() >= _LEAST_DOF:
            variance[tokens == at] = sum_sq[tokens == at].sum() / dof[tokens == at].sum()
    groups: dict[tuple, list[tuple[Cell, float]]] = {}
    for cell, v in zip(cells, variance, strict=True):
        if cell.valley is not None and cell.valley.dof > 0 and v > 0:
            key = tuple((name, value) for name, value in cell.key.items() if name != "tokens")
            groups.setdefault(key, []).append((cell, np.sqrt(v)))
    products = [_common(*pair) for group in groups.values() for pair in combinations(group, 2)]
    found, expected = np.sum(products, axis=0) if products else (0.0, 0.0)
    return np.sqrt(variance), float(np.clip(found / expected, 0.0, 1.0)) if expected > 0 else 0.0


def _common(one: tuple[Cell, float], other: tuple[Cell, float]) -> tuple[float, float]:
    """Σ of the products of two horizons' residuals at the lrs that both parabolas use, in standard deviations, and what is expected of it
    where all noise is shared: a residual is what a parabola leaves of the noise, and the two parabolas leave different parts."""
    lrs = [cell.lr[cell.valley.used] for cell, _ in (one, other)]
    _, *places = np.intersect1d(*lrs, return_indices=True)
    residuals, left = [], []
    for (cell, sd), at in zip((one, other), places, strict=True):
        valley = cell.valley
        residuals.append(valley.residuals[at] / valley.loss / sd)
        left.append((np.eye(len(valley.used)) - valley.powers @ np.linalg.pinv(valley.powers))[np.ix_(at, at)])
    return float(residuals[0] @ residuals[1]), float(np.sum(left[0] * left[1]))


def _row(cell: Cell, relative_sd: float) -> dict[str, Any]:
    if cell.valley is not None:
        valley = cell.valley
        lr_se, loss_se, curvature_se = (float(se) for se in valley.unit_ses() * relative_sd * valley.loss)
        found = {"lr": valley.lr, "lr_log_se": lr_se, "loss": valley.loss, "loss_se": loss_se}
        return (
            cell.key
            | found
            | {"curvature": valley.curvature, "curvature_se": curvature_se, "censored": "", "runs": cell.runs}
            | _beside(cell)
        )
    nothing = dict.fromkeys(("lr_log_se", "loss_se", "curvature", "curvature_se"), np.nan)
    at = int(np.argmin(cell.loss)) if len(cell.loss) else None
    found = {"lr": np.nan, "loss": np.nan} if at is None else {"lr": float(cell.lr[at]), "loss": float(cell.loss[at])}
    censored = "too few" if len(cell.loss) < 3 else "low" if at == 0 else "high"
    return cell.key | found | nothing | {"censored": censored, "runs": cell.runs} | _beside(cell)


def _beside(cell: Cell) -> dict[str, bool]:
    return {"beside_divergence": bool(len(cell.lr) and len(cell.diverged) and cell.diverged.max() > cell.lr.max())}


def count_runs(table) -> int:
    """Runs that a table rests on: its points, or its rows where they have no names."""
    finished = table[table["loss"].notna()]
    return int(finished["point"].nunique()) if "point" in finished else len(finished)


def minima(table, optima: Optima | None = None):
    """The cells whose minimum is none but inside the grid, a DataFrame as of `lr_points`.

    Raises:
      UserError: there is none; or at one size, batch size and horizon there are several, of settings that differ.
    """
    points = (optima or measure(table)).points
    one_setting(points)
    return _inside(points).reset_index(drop=True)


def _inside(points):
    inside = points[points["censored"] == ""]
    if not len(inside):
        counts = censored_counts(points)
        raise UserError(f"none of {len(points)} cells has its lowest loss between two higher ones: {counts}; widen the lr grid")
    return inside


def censored_counts(points, what: str = "lr") -> str:
    """How many minima in `what`, "lr" or "batch size", are bounds only, in words."""
    counts = points["censored"].value_counts()
    said = {
        "low": f"at the lowest {what} of their grid (bounds from above)",
        "high": f"at the highest {what}{' that did not diverge' if what == 'lr' else ' of their grid'} (bounds from below)",
        "too few": f"with fewer than three {what}s{' that did not diverge' if what == 'lr' else ''}",
    }
    parts = [f"{counts[key]} {text}" for key, text in said.items() if counts.get(key, 0)]
    return ", ".join(parts) or "none censored"


def as_points(points):
    """The table behind a figure: `bound` is the side that a censored minimum is at, and `censored` whether it is."""
    return points.assign(bound=points["censored"], censored=points["censored"] != "")


def find(table) -> Finding:
    """The measured points η*(B, T); no law."""
    optima = measure(table)
    points = optima.points
    if (points["censored"] == "too few").all():
        _inside(points)  # raises, saying why: there is not even a bound
    inside = points[points["censored"] == ""]
    known_se = inside["lr_log_se"].dropna()
    numbers = [Number("minima inside their grid", float(len(inside))), Number("censored minima", float(len(points) - len(inside)))]
    if len(known_se):
        numbers.append(Number("median relative error of η*", float(known_se.median())))
    statements = [f"Of {len(points)} cells {len(inside)} have a minimum inside their grid; censored: {censored_counts(points)}."]
    if not len(known_se):
        statements.append("No grid has more points than a parabola needs: the errors of η* are not known.")
    if optima.incomplete:
        statements.append(f"{optima.incomplete} rows have no batch_tokens, lr or horizon, and are left out.")
    statements += confounded(points)
    if beside := int(points["beside_divergence"][points["censored"] == "high"].sum()):
        statements.append(f"{beside} of the bounds from below lie next to divergence: the best lr may be the highest that is stable.")
    return Finding("lr_optimum", TITLE, {}, None, numbers, statements, as_points(points), count_runs(table))


ANALYSES = (Analysis("lr_optimum", TITLE, ("batch_tokens", "tokens", "lr", "loss"), find, SOURCE),)
