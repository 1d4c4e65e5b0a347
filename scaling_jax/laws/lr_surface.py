"""The best learning rate as a surface over batch size and tokens: surge, √B then plateau, and a power without a bend.

The three are rivals. Surge and plateau have a critical batch size, B_crit(T), where η*(B) bends; the value and the growth of it belong to
the form, and the data seldom tell the forms apart: what would is the slope of ln η* in ln B far above the bend, −½ for surge, 0 for
plateau. So all are fitted side by side, and what is held out, the longest horizons, decides or leaves it open.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.compare import Comparison, compare
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import LawFit, fit
from scaling_jax.laws.form import Form, Parameter
from scaling_jax.laws.lr_optimum import Optima, as_points, censored_counts, count_runs, measure, minima
from scaling_jax.laws.observations import Observations, different
from scaling_jax.laws.powers import Power, product_form, reference
from scaling_jax.laws.settings import confounded, runs_shared

SURGE = "Li et al. 2024, arXiv 2405.14578; B_crit(T) as in Filatov et al. 2024, arXiv 2410.05838"
PLATEAU = "rival of the surge, without its fall above B_crit"
POWER = "Filatov et al. 2025, arXiv 2510.03871, where no bend is seen"
# Of residuals of ln η*. A minimum of a parabola is known to a few hundredths, and one that noise threw off is off by a step of the grid,
# √2 or 0.35 in the logarithm: between the two a residual stops to count by its square.
HUBER_DELTA = 0.1
WHAT = "a surface of the best learning rate"
_BENDLESS = "the power, which has no bend, predicts best: these data show no B_crit"
_BEYOND = 30.0  # a bend this many times outside the batches that were tried moves no point by more than 3%, less than a minimum's error


def _powers(symbol: str, tokens: float, params: float | None) -> str:
    of_params = "" if params is None else f"·(N/{params:g})^{'r' if symbol == 'p' else 's'}"
    return f"·(T/{tokens:g})^{symbol}{of_params}"


def _levels(p, x):
    """ln η_crit (or η_max) and ln B / B_crit(T)."""
    import jax.numpy as jnp

    log_t = jnp.log(x["tokens"] / p["tokens0"])
    log_crit = jnp.log(p["batch_crit"]) + p["batch_crit_tokens_exponent"] * log_t
    log_lr = jnp.log(p["lr_crit"]) + p["lr_crit_tokens_exponent"] * log_t
    if "params0" in p:
        log_n = jnp.log(x["params"] / p["params0"])
        log_crit = log_crit + p["batch_crit_params_exponent"] * log_n
        log_lr = log_lr + p["lr_crit_params_exponent"] * log_n
    return log_lr, jnp.log(x["batch_tokens"]) - log_crit


def surge(p, x):
    """ln η* of the parameters, `tokens0` (and `params0`) and the columns."""
    import jax.numpy as jnp

    log_lr, off = _levels(p, x)
    return log_lr - jnp.logaddexp(off / 2, -off / 2) + np.log(2)


def plateau(p, x):
    """As `surge`."""
    import jax.numpy as jnp

    log_lr, off = _levels(p, x)
    return log_lr - 0.5 * jnp.logaddexp(0.0, -off)


def bend_form(name: str, tokens: float, batch_range: tuple[float, float], lr: float, params: float | None = None) -> Form:
    """η*(B, T[, N]) with a bend at B_crit.

    Args:
      name: "surge", η_crit / ½(√(B/B_crit) + √(B_crit/B)); or "plateau", η_max / √(1 + B_crit/B).
      tokens, params: T0 and N0, where B_crit = c·(T/T0)^p·(N/N0)^r and η_crit = h·(T/T0)^q·(N/N0)^s. Without `params` there are no r and s.
      batch_range: lowest and highest batch size of the data, tokens; B_crit at T0 is sought up to 30 times outside of it.
      lr: a learning rate of the data, to start from.
    """
    low, high = batch_range
    middle = float(np.sqrt(low * high))
    parameters = [
        Parameter("lr_crit", "", "η_crit at T0" if name == "surge" else "η_max at T0", "log", 1e-12, 1e6, (lr,)),
        Parameter("lr_crit_tokens_exponent", "", "q, of η_crit in T", "plain", -3.0, 3.0, (-0.3, 0.3)),
        Parameter(
            "batch_crit", "tokens", "c, B_crit at T0", "log", low / _BEYOND, high * _BEYOND, (low / 2, middle / 2, middle * 2, high * 2)
        ),
        Parameter("batch_crit_tokens_exponent", "", "p, of B_crit in T", "plain", -5.0, 5.0, (0.0, 0.5, 1.0), 1.0),
    ]
    if params is not None:
        parameters += [
            Parameter("lr_crit_params_exponent", "", "s, of η_crit in N", "plain", -3.0, 3.0, (-0.5, 0.0)),
            Parameter("batch_crit_params_exponent", "", "r, of B_crit in N", "plain", -5.0, 5.0, (-0.7, 0.0)),
        ]
    shape = "½(√(B/B_crit) + √(B_crit/B))" if name == "surge" else "√(1 + B_crit/B)"
    formula = f"η* = h{_powers('q', tokens, params)} / {shape}, B_crit = c{_powers('p', tokens, params)}"
    inputs = ("batch_tokens", "tokens", *(() if params is None else ("params",)))
    constants = (("tokens0", tokens), *(() if params is None else (("params0", params),)))
    source = SURGE if name == "surge" else PLATEAU
    return Form(
        name,
        formula,
        source,
        "lr",
        inputs,
        tuple(parameters),
        surge if name == "surge" else plateau,
        huber_delta=HUBER_DELTA,
        constants=constants,
    )


def power_form(tokens: float, batch: float, params: float | None = None) -> Form:
    """η* = h·(B/B0)^a·(T/T0)^b[·(N/N0)^s], B0 being `batch`: no bend."""
    powers = [Power("batch_tokens", "batch_exponent", "B", batch), Power("tokens", "tokens_exponent", "T", tokens)]
    powers += [] if params is None else [Power("params", "params_exponent", "N", params)]
    return product_form("power", "lr", "η*", "", powers, POWER, HUBER_DELTA, scale="lr")


def forms(data: Observations) -> list[Form]:
    """Surge, plateau and power about the data's own scales; with powers of N where the data have `params`."""
    x = data.x
    tokens, batch, lr = reference(x["tokens"]), reference(x["batch_tokens"]), reference(data.y)
    params = reference(x["params"]) if "params" in x else None
    batch_range = float(x["batch_tokens"].min()), float(x["batch_tokens"].max())
    return [*(bend_form(name, tokens, batch_range, lr, params) for name in ("surge", "plateau")), power_form(tokens, batch, params)]


def depends_on_size(table) -> bool:
    """Whether a law of the best lr needs powers of N: there are several N, and nothing says that μP took them out."""
    if "params" not in table or table["params"].nunique() < 2:
        return False
    transferred = "width" in table and "parametrization" in table and table["parametrization"].isin(("mup", "completep")).all()
    return not transferred


def clusters(table, points, by: Sequence[str] | None = None) -> np.ndarray:
    """Labels of what is resampled together, [points]: the points of one size and batch size, where its horizons are of the same runs."""
    if by is None:
        by = ("params", "width", "batch_tokens", *(() if runs_shared(table) else ("tokens",)))
    return points.groupby(list(by), dropna=False, sort=False).ngroup().to_numpy()


def observations(table, optima: Optima | None = None, cluster_by: Sequence[str] | None = None) -> Observations:
    """η*(B, T[, N]) as data of a fit, censored minima left out; `cluster_by` are columns to resample by, as ("params", "tokens")."""
    optima = optima or measure(table)
    points = minima(table, optima)
    different(points["batch_tokens"], "batch_tokens", 3, WHAT)
    different(points["tokens"], "tokens", 2, WHAT)
    names = ("batch_tokens", "tokens", *(("params",) if depends_on_size(table) else ()))
    x = {name: points[name].to_numpy(float) for name in names}
    origin = f"minima in ln η of {len(points)} of {len(optima.points)} cells; {censored_counts(optima.points)}"
    return Observations(x, points["lr"].to_numpy(float), clusters(table, points, cluster_by), origin, as_points(optima.points))


def upper_slope(data: Observations, resamples: int = 400, seed: int = 0) -> Number:
    """The slope of ln η* in ln B over the upper half of the batch sizes, each T (and N) with a level of its own."""
    log_b = np.log(data.x["batch_tokens"])
    tried = np.unique(log_b)
    upper = log_b >= tried[len(tried) // 2]
    log_b, log_lr, cluster = log_b[upper], np.log(data.y[upper]), data.cluster[upper]
    level = [tuple(row) for row in np.stack([data.x[name][upper] for name in data.x if name != "batch_tokens"], axis=1)]
    level = np.unique(level, axis=0, return_inverse=True)[1].ravel()

    def slope(rows):
        counts = np.maximum(np.bincount(level[rows], minlength=level.max() + 1), 1)
        x, y = (v[rows] - (np.bincount(level[rows], v[rows], level.max() + 1) / counts)[level[rows]] for v in (log_b, log_lr))
        return x @ y / (x @ x) if x @ x > 1e-12 else np.nan

    members = [np.flatnonzero(cluster == label) for label in np.unique(cluster)]
    rng = np.random.default_rng(seed)
    drawn = [slope(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])) for _ in range(resamples)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if len(members) >= 4 and np.isfinite(drawn).any() else (None, None)
    least = float(np.exp(tried[len(tried) // 2]))
    note = f"batches of {least:.3g} tokens and more; far above the bend surge has −0.5, plateau 0, the power its a"
    return Number(
        "slope of ln η* in ln B, upper half",
        *(None if v is None else float(v) for v in (slope(np.arange(len(log_b))), low, high)),
        note=note,
    )


def surface(data: Observations, resamples: int = 400, seed: int = 0) -> tuple[dict[str, LawFit], list[Comparison], list[str]]:
    """The rivals fitted, their comparisons by the longest T (and the largest N), and what could not be compared and why."""
    rivals = forms(data)
    fits = {form.name: fit(form, data, resamples=resamples, seed=seed) for form in rivals}
    comparisons, said = [], []
    for by in [name for name in ("tokens", "params") if name in data.x]:
        try:
            comparisons.append(compare(rivals, data, by=by))
        except UserError as error:
            said.append(f"The rivals could not be compared on held-out {by}: {error}.")
    return fits, comparisons, said


def best_of(fits: dict[str, LawFit], comparison: Comparison | None) -> str | None:
    """The form that holds out best of those whose parameters the data fix; None where there is none."""
    sound = [name for name, fitted in fits.items() if fitted.identified]
    if not sound or comparison is None:
        return min(sound, key=lambda name: fits[name].rms) if sound else None
    rows = {rival.form: rival.held_out for rival in comparison.rivals}
    return min(sound, key=lambda name: rows[name])


def find(table, cluster_by: Sequence[str] | None = None) -> Finding:
    """The rivals of η*(B, T[, N]), fitted and compared."""
    optima = measure(table)
    data = observations(table, optima, cluster_by)
    fits, comparisons, statements = surface(data)
    comparison = comparisons[0] if comparisons else None
    bendless = _BENDLESS if comparison is not None and comparison.tied == ["power"] else ""
    numbers = [upper_slope(data)]
    for name in ("surge", "plateau"):
        numbers += _exponents(name, fits[name], bendless)
    statements = [f"{comparison.statement}." for comparison in comparisons] + statements + _statements(fits, comparisons, data, bendless)
    statements += confounded(optima.points)
    runs = count_runs(table)
    return Finding("lr_surface", "η*(B, T)", fits, best_of(fits, comparison), numbers, statements, data.frame, runs, comparison)


def _exponents(name: str, fitted: LawFit, bendless: str) -> list[Number]:
    of = {
        "batch_crit_tokens_exponent": "B_crit ∝ T^p",
        "batch_crit_params_exponent": "B_crit ∝ N^r",
        "lr_crit_tokens_exponent": "η_crit ∝ T^q",
    }
    found = []
    for parameter, law in of.items():
        if parameter not in fitted.values:
            continue
        note = (
            fitted.unidentified.get(parameter) or fitted.unidentified.get("batch_crit") or bendless
        )  # nothing scales a bend that is not there
        published = 1.0 if parameter == "batch_crit_tokens_exponent" else None
        low, high = (None, None) if bendless else fitted.intervals[parameter]
        value = None if note else fitted.values[parameter]
        source = "Filatov et al. 2024" if published else ""
        found.append(Number(f"{law} by {name}", value, low, high, published=published, source=source, note=note))
    return found


def _statements(fits: dict[str, LawFit], comparisons: Sequence[Comparison], data: Observations, bendless: str) -> list[str]:
    said = []
    for name in ("surge", "plateau"):
        if fits[name].unidentified:
            batches = data.x["batch_tokens"]
            names = ", ".join(fits[name].unidentified)
            said.append(
                f"{name}: {names} not identified with batches of {batches.min():.3g} to {batches.max():.3g} tokens; "
                "a bend needs batches well below and well above it, up to eight times."
            )
    tied = bool(comparisons) and all({"surge", "plateau"} <= {comparison.best, *comparison.tied} for comparison in comparisons)
    if tied:
        said.append("Surge and plateau cannot be told apart by these data: neither predicts what is held out better than the other.")
    if bendless:
        said.append(f"{bendless[0].upper()}{bendless[1:]}.")
    elif all(fits[name].identified for name in ("surge", "plateau")):
        p = {name: fits[name].values["batch_crit_tokens_exponent"] for name in ("surge", "plateau")}
        c = {name: fits[name].values["batch_crit"] for name in ("surge", "plateau")}
        said.append(
            f"B_crit belongs to the form: at T0 {c['surge']:.3g} tokens by surge and {c['plateau']:.3g} by plateau, growing as "
            f"T^{p['surge']:.2f} and T^{p['plateau']:.2f}."
        )
    return said


def find_regimes(table, resamples: int = 1000, seed: int = 0) -> Finding:
    """The exponent of η* in T at each batch size, from the horizons of the same cells; intervals from the runs' noise."""
    optima = measure(table)
    points = minima(table, optima)
    different(points["tokens"], "tokens", 3, "the exponent of the best learning rate in T")
    everything = optima.points
    draws_RxC = optima.draws(resamples, seed)["log_lr"]
    bends = _bends(table, optima)
    numbers: list[Number] = []
    rows: list[dict[str, Any]] = []
    for batch in np.unique(points["batch_tokens"]):
        inside = ((everything["batch_tokens"] == batch) & (everything["censored"] == "")).to_numpy()
        cells = everything[inside]
        log_t = np.log(cells["tokens"].to_numpy(float))
        log_t = log_t - cells.assign(t=log_t).groupby(["params", "width"], dropna=False)["t"].transform("mean").to_numpy()
        if cells["tokens"].nunique() < 3:
            continue
        weights = log_t / (log_t @ log_t)
        value = float(weights @ np.log(cells["lr"]))
        drawn = draws_RxC[:, inside] @ weights
        low, high = np.nanpercentile(drawn, [2.5, 97.5]) if np.isfinite(drawn).any() else (None, None)
        where = _where(batch, cells["tokens"], bends)
        numbers.append(Number(f"η* ∝ T^x at B = {batch:.4g}", value, *(None if e is None else float(e) for e in (low, high)), note=where))
        rows.append({"batch_tokens": float(batch), "exponent": value, "low": low, "high": high, "horizons": cells["tokens"].nunique()})
    if not numbers:
        raise UserError("no batch size has minima inside the grid at three horizons or more; an exponent of η* in T needs them")
    import pandas

    statements = _regimes(numbers) + confounded(everything)
    return Finding("lr_regimes", "η* in T at fixed B", {}, None, numbers, statements, pandas.DataFrame(rows), count_runs(table))


def _bends(table, optima: Optima) -> Callable | None:
    """The surge's B_crit(T), where the data fix it and it is one for all sizes."""
    try:
        data = observations(table, optima)
        fitted = fit(forms(data)[0], data, resamples=100)
    except UserError:
        return None
    if not fitted.identified or "params" in data.x:
        return None
    tokens0 = reference(data.x["tokens"])
    return lambda tokens: fitted.values["batch_crit"] * (tokens / tokens0) ** fitted.values["batch_crit_tokens_exponent"]


def _where(batch: float, tokens, bends: Callable | None) -> str:
    if bends is None:
        return ""
    ratio = batch / bends(np.asarray(tokens, float))
    side = "B ≪ B_crit" if ratio.max() < 0.5 else "B ≫ B_crit" if ratio.min() > 2 else "B near B_crit"
    return f"{side} of the surge: B/B_crit {ratio.max():.2g} to {ratio.min():.2g}"


def _regimes(numbers: Sequence[Number]) -> list[str]:
    rises = [n.name.partition(" at ")[2] for n in numbers if n.low is not None and n.low > 0]
    falls = [n.name.partition(" at ")[2] for n in numbers if n.high is not None and n.high < 0]
    open_ = [n.name.partition(" at ")[2] for n in numbers if n.low is not None and n.low <= 0 <= n.high]
    said = [
        f"With the horizon the best lr {verb} at {', '.join(names)}."
        for verb, names in (("falls", falls), ("rises", rises), ("shows no trend beyond its error", open_))
        if names
    ]
    if falls and not rises:
        said.append("No batch size shows a best lr that rises with T: of the three regimes √T, 1 and 1/√T the first is not seen here.")
    return said


ANALYSES = (
    Analysis("lr_surface", "η*(B, T)", ("batch_tokens", "tokens", "lr", "loss"), find, SURGE),
    Analysis(
        "lr_regimes", "η* in T at fixed B", ("batch_tokens", "tokens", "lr", "loss"), find_regimes, "Filatov et al. 2024, arXiv 2410.05838"
    ),
)
