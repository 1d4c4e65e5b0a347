"""The best batch size at a budget of tokens, each batch size at its own best learning rate, and what a fixed one loses."""

from typing import Any, NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import fit
from scaling_jax.laws.lr_optimum import (
    EACH_SIDE,
    Optima,
    Valley,
    as_points,
    censored_counts,
    count_runs,
    enclosed_minimum,
    measure,
    minima,
)
from scaling_jax.laws.observations import Observations, different, enough
from scaling_jax.laws.powers import Power, product_form, reference, with_run_noise
from scaling_jax.laws.settings import confounded, runs_shared

SOURCE = "Filatov et al. 2024, arXiv 2410.05838; published exponent: Filatov et al. 2025, arXiv 2510.03871 (Scion)"
HUBER_DELTA = 0.2  # of ln B*: a parabola through batches two apart is good to about 0.1, and a step of the grid is 0.7
TITLE = "B*(T)"


class BatchOptima(NamedTuple):
    """`points` has a row for each size and horizon: width, params, tokens, batch_tokens (B*), its relative error batch_log_se, loss at the
    minimum, curvature d²L/d(ln B)², runs, `censored` as of `lr_points`, and `batches`, how many had their best lr inside the grid.
    `valleys` are the parabolas in ln B (None where censored), `members` the rows of `optima` that each is of, ascending in B."""

    points: Any
    valleys: list[Valley | None]
    members: list[np.ndarray]
    optima: Optima

    def draws(self, resamples: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
        """`log_batch` and `loss` [resamples, points] and `losses` [resamples, cells], as the runs' noise moves them together."""
        losses_RxC = self.optima.draws(resamples, seed)["loss"]
        log_batch, lowest = (np.full((resamples, len(self.valleys)), np.nan) for _ in range(2))
        for i, (valley, members) in enumerate(zip(self.valleys, self.members, strict=True)):
            if valley is None:
                continue
            used = losses_RxC[:, members[valley.used]]
            curve, slope, height = (used @ np.linalg.pinv(valley.powers).T).T
            curve = np.where(curve > 0, curve, np.nan)
            reach = np.ptp(valley.powers[:, 1])
            log_batch[:, i] = valley.centre + np.clip(-slope / (2 * curve), -reach, reach)
            lowest[:, i] = height - slope**2 / (4 * curve)
        return {"log_batch": log_batch, "loss": lowest, "losses": losses_RxC}


def measure_batches(table, optima: Optima | None = None, each_side: int = EACH_SIDE, resamples: int = 400) -> BatchOptima:
    """The minimum in ln B, of the loss at each batch size's own best learning rate, at every size and horizon."""
    import pandas

    optima = optima or measure(table)
    minima(table, optima)  # one setting, and something inside
    rows, valleys, members = [], [], []
    whole = optima.points.reset_index(drop=True)
    for (params, width, tokens), cells in whole.groupby(["params", "width", "tokens"], dropna=False):
        cells = cells[cells["censored"] == ""].sort_values("batch_tokens")
        batch, loss = cells["batch_tokens"].to_numpy(float), cells["loss"].to_numpy(float)
        valley = enclosed_minimum(batch, loss, each_side)
        row = {"params": params, "width": width, "tokens": tokens, "batches": len(cells), "runs": int(cells["runs"].sum())}
        if valley is not None:
            row |= {"batch_tokens": valley.lr, "loss": valley.loss, "curvature": valley.curvature, "censored": ""}
        else:
            at = int(np.argmin(loss)) if len(loss) else None
            row |= {"batch_tokens": np.nan if at is None else batch[at], "loss": np.nan if at is None else loss[at], "curvature": np.nan}
            row["censored"] = "too few" if len(loss) < 3 else "low" if at == 0 else "high"
        rows.append(row)
        valleys.append(valley)
        members.append(cells.index.to_numpy())
    found = BatchOptima(pandas.DataFrame(rows), valleys, members, optima)
    log_batch = found.draws(resamples)["log_batch"]
    known = np.isfinite(log_batch).any(axis=0)
    se = np.full(len(rows), np.nan)
    se[known] = np.nanstd(log_batch[:, known], axis=0)
    found.points["batch_log_se"] = se
    return found


def find(table) -> Finding:
    """B*(T[, N]), a power law through the measured minima."""
    batches = measure_batches(table)
    different(batches.optima.points["batch_tokens"], "batch_tokens", 3, "a law of the best batch size")
    data = observations(table, batches)
    form = batch_form(data)
    inside = (batches.points["censored"] == "").to_numpy()
    fitted = with_run_noise(fit(form, data), data, batches.draws()["log_batch"][:, inside], runs_shared(table))
    exponent = Number("B* ∝ T^m", fitted.values["tokens_exponent"], *fitted.intervals["tokens_exponent"], published=0.45, source=SOURCE)
    return Finding(
        "batch_optimum", TITLE, {form.name: fitted}, form.name if fitted.identified else None, [exponent, *_tolerance(batches)],
        [_found(batches), *_of_sizes(data), *confounded(batches.optima.points)], data.frame, count_runs(table),
    )  # fmt: skip


def observations(table, batches: BatchOptima) -> Observations:
    """B*(T[, N]) as data of a fit, each minimum a cluster of its own; `with_run_noise` allows for their being of the same runs."""
    from scaling_jax.laws.lr_surface import depends_on_size

    points = batches.points[batches.points["censored"] == ""]
    if not len(points):
        counts = censored_counts(batches.points, "batch size")
        raise UserError(
            f"at none of {len(batches.points)} sizes and horizons is the best batch size inside the grid: {counts}; try more batch sizes"
        )
    different(points["tokens"], "tokens", 2, "a law of the best batch size")
    enough(points, 3, "a law of the best batch size")
    names = ("tokens", *(("params",) if depends_on_size(table) and points["params"].nunique() > 1 else ()))
    origin = f"minima in ln B, each batch at its own best lr, of {len(points)} of {len(batches.points)} sizes and horizons"
    x = {name: points[name].to_numpy(float) for name in names}
    return Observations(x, points["batch_tokens"].to_numpy(float), np.arange(len(points)), origin, as_points(batches.points))


def batch_form(data: Observations):
    """B* = b·(T/T0)^m[·(N/N0)^n]."""
    powers = [Power("tokens", "tokens_exponent", "T", reference(data.x["tokens"]), 0.45)]
    if "params" in data.x:
        powers.append(Power("params", "params_exponent", "N", reference(data.x["params"])))
    return product_form("batch_optimum", "batch_tokens", "B*", "tokens", powers, SOURCE, HUBER_DELTA, scale="batch")


def _found(batches: BatchOptima) -> str:
    inside = int((batches.points["censored"] == "").sum())
    counts = censored_counts(batches.points, "batch size")
    return f"Of {len(batches.points)} sizes and horizons {inside} have their best batch size inside the grid; censored: {counts}."


def _of_sizes(data: Observations) -> list[str]:
    if "params" in data.x or data.frame["params"].nunique() < 2:
        return []
    return ["Sizes are fitted together, since μP is to make them alike; width_equality tests whether they are."]


def _tolerance(batches: BatchOptima) -> list[Number]:
    """What a factor 2 in B costs, from the parabolas, relative to the loss: a median over sizes and horizons, and its range."""
    points = batches.points[batches.points["censored"] == ""]
    share = 0.5 * points["curvature"] * np.log(2) ** 2 / points["loss"]
    note = "median over sizes and horizons, each batch at its own best lr"
    name = "loss of a factor 2 in B, relative"
    return [
        Number(name, float(share.median()), note=note),
        Number(f"{name}, least", float(share.min())),
        Number(f"{name}, most", float(share.max())),
    ]


# -------------------------------------------------------------------------------------------------------------- what a fixed batch loses


def find_regret(table, resamples: int = 1000, seed: int = 0) -> Finding:
    """The loss of a fixed batch size, at its own best lr, over that of the best one, against the horizon."""
    batches = measure_batches(table)
    different(batches.points["tokens"], "tokens", 2, "the regret of a fixed batch size")
    different(batches.optima.points["batch_tokens"], "batch_tokens", 3, "the regret of a fixed batch size")
    drawn = batches.draws(resamples, seed)
    rows = []
    for i, members in enumerate(batches.members):
        point = batches.points.iloc[i]
        for cell in members:
            at = batches.optima.points.iloc[cell]
            differences = drawn["losses"][:, cell] - drawn["loss"][:, i]
            low, high = np.nanpercentile(differences, [2.5, 97.5]) if np.isfinite(differences).any() else (np.nan, np.nan)
            row = {"params": point["params"], "width": point["width"], "batch_tokens": at["batch_tokens"], "tokens": point["tokens"]}
            row |= {"regret": at["loss"] - point["loss"], "low": low, "high": high}
            rows.append(row | {"best_batch_tokens": point["batch_tokens"], "censored": point["censored"] != ""})
    import pandas

    frame = pandas.DataFrame(rows)
    inside = frame[~frame["censored"]]
    if not len(inside):
        counts = censored_counts(batches.points, "batch size")
        raise UserError(f"the best batch size is inside the grid nowhere ({counts}): a regret has nothing to refer to")
    numbers, statements = [], [_found(batches)]
    for batch, of_batch in inside.groupby("batch_tokens"):
        ends = [of_batch[of_batch["tokens"] == at] for at in (of_batch["tokens"].min(), of_batch["tokens"].max())]
        last = ends[1]
        low, high = (None if last[end].isna().any() else float(last[end].mean()) for end in ("low", "high"))
        note = f"mean over {len(last)} sizes; the interval is the mean of theirs" if len(last) > 1 else "of one size"
        numbers.append(
            Number(
                f"regret of B = {batch:.4g} at T = {last['tokens'].iloc[0]:.3g}",
                float(last["regret"].mean()),
                low,
                high,
                "nats per token",
                note=note,
            )
        )
        first, final = (f"{end['regret'].mean():.3g} at T = {end['tokens'].iloc[0]:.3g}" for end in ends)
        if len(of_batch["tokens"].unique()) > 1:
            statements.append(f"B = {batch:.4g} loses {first} and {final} nats per token.")
    return Finding("batch_regret", "Loss of a fixed batch size", {}, None, numbers, statements, frame, count_runs(table))


ANALYSES = (
    Analysis("batch_optimum", TITLE, ("batch_tokens", "tokens", "lr", "loss"), find, SOURCE),
    Analysis("batch_regret", "Loss of a fixed batch size", ("batch_tokens", "tokens", "lr", "loss"), find_regret, SOURCE),
)
