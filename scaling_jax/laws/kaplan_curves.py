"""Kaplan et al. 2020 (arXiv 2001.08361) on training curves: whether their early part predicts the late one (section 1.1, "universality of
training": power laws whose parameters are roughly independent of the size)."""

import numpy as np
import pandas

from scaling_jax.errors import UserError
from scaling_jax.laws import kaplan_forms as forms
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.fit import LEVEL, LawFit, bootstrap_weights, fit, widened
from scaling_jax.laws.frontier import different_sizes, on_all_data, prepared, tuned, tuning_said
from scaling_jax.laws.kaplan_steps import known_critical
from scaling_jax.laws.kaplan_theory import SOURCE, min_steps
from scaling_jax.laws.observations import Observations
from scaling_jax.laws.power_law import PowerLaw, power_law
from scaling_jax.laws.rivals import from_draws

EARLY, LATE = 1 / 3, 2 / 3  # of the longest horizon: fitted up to, predicted beyond
LEAST_EARLY = 4  # horizons: a floored power has three parameters
LEAST_SIZES = 4  # that an interval over sizes is given for
_Z = 1.959963985
_OWN, _JOINT, _SAME = "a power law of each size", "one law of all sizes", "the loss stays"
_PREDICTED = {_OWN: "loss_by_own", _JOINT: "loss_by_joint", _SAME: "loss_at_a_third"}


def after_warmup(table: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of `prepared` on all data, with `batch_tokens`, beyond their warmup."""
    rows = on_all_data(prepared(table, ("batch_tokens",)))
    if "warmup_tokens" in rows:
        rows = rows[rows["tokens"] > rows["warmup_tokens"].fillna(0)].reset_index(drop=True)
    return rows


def student(freedom: int) -> float:
    """Half the width of a 95% interval, in standard errors that have so many degrees of freedom."""
    from scipy.special import stdtrit  # only here: slow to import

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def curves(rows: pandas.DataFrame) -> tuple[pandas.DataFrame, bool]:
    """One training curve for each size: all horizons of the settings that are best at its longest one; seeds averaged.

    Args:
      rows: of `prepared`, with `batch_tokens`.

    Returns:
      Rows as of `tuned`, sorted by size and tokens; and whether all are of one batch size: the best one, on average over sizes, of those
      that every size has at its longest horizon. Where there is none, each size has its own best.
    """
    best = tuned(rows, ("size", "batch_tokens", "horizon"))
    last = best[best["horizon"] == best.groupby("size")["horizon"].transform("max")]
    of_batch = np.log(last["loss"]).groupby(last["batch_tokens"])
    shared = of_batch.mean()[of_batch.size() == last["size"].nunique()]
    if one_batch := len(shared) > 0:
        last = last[last["batch_tokens"] == shared.idxmin()]
    last = last.loc[last.groupby("size")["loss"].idxmin()]
    same = ["size", "batch_tokens", *(name for name in best.attrs["over"] if name not in ("size", "batch_tokens"))]
    kept = np.zeros(len(rows), bool)
    for _, settings in last.iterrows():
        alike = [rows[name].isna() if pandas.isna(settings[name]) else rows[name] == settings[name] for name in same]
        kept |= np.logical_and.reduce(alike)
    found = tuned(rows[kept], ("size", "horizon"))
    found.attrs = dict(best.attrs)
    return found.sort_values(["size", "tokens"]).reset_index(drop=True), bool(one_batch)


def extrapolation(table: pandas.DataFrame) -> Finding:
    """The last third of each size's curve, predicted from its first third: by E + (D_c/D)^α of each size, by L(N, S) of all sizes together,
    and, to judge these by, as the loss at the last horizon of the first third."""
    what = "extrapolation of training curves"
    rows = after_warmup(table)
    found, one_batch = curves(rows)
    longest = found.groupby("size")["tokens"].transform("max")
    found["part"] = np.where(found["tokens"] <= EARLY * longest, "fitted", np.where(found["tokens"] > LATE * longest, "predicted", ""))
    early = (found["part"] == "fitted").groupby(found["size"]).transform("sum")
    points = found[early >= LEAST_EARLY].reset_index(drop=True)
    if len(points) == 0:
        raise UserError(
            f"{what} needs a size with {LEAST_EARLY} horizons or more in the first third of its longest one, after warmup, of one run or "
            f"one setting; the most that a size has is {int(early.max()) if len(early) else 0}"
        )
    sizes, fitted = np.unique(points["size"]), (points["part"] == "fitted").to_numpy()
    laws = {size: _own(points[fitted & (points["size"] == size).to_numpy()]) for size in sizes}
    points["loss_by_own"] = np.nan
    points["loss_at_a_third"] = np.nan
    for size, law in laws.items():
        mine = (points["size"] == size).to_numpy()
        points.loc[mine, "loss_by_own"] = law.predict({"data_tokens": points["tokens"][mine].to_numpy(float)})
        points.loc[mine, "loss_at_a_third"] = points["loss"][mine & fitted].iloc[-1]  # sorted by tokens
    critical = _critical_before(rows)
    joint, said_joint = _joint(points[fitted], critical, one_batch)
    if joint is not None:
        points["loss_by_joint"] = _predicted(joint, points, critical)
    late = points[points["part"] == "predicted"]
    numbers, said = _errors(late)
    alike, said_alike = _exponents(laws)
    numbers += alike + ([] if joint is None else _of_joint(joint))
    said += [*said_alike, *said_joint, *_reservations(points, found, one_batch)]
    columns = ["size", "batch_tokens", "tokens", "loss", "part", *(name for name in _PREDICTED.values() if name in points)]
    tidy = points[columns].rename(columns={"size": "params"})
    return Finding("kaplan_extrapolation", what, {}, None, numbers, said, tidy, int(points["run"].nunique()))


def _own(early: pandas.DataFrame) -> LawFit:
    """E + (D_c/D)^α of one curve. At one batch size D is B times the steps: the exponent is that of either."""
    data = Observations({"data_tokens": early["tokens"].to_numpy(float)}, early["loss"].to_numpy(), np.arange(len(early)), "a curve")
    return fit(forms.D_FLOOR, data)


def _critical_before(rows: pandas.DataFrame) -> PowerLaw | None:
    """B_crit(L) by the first thirds alone, of all batch sizes: what is to be predicted must not be in it."""
    early = rows[rows["tokens"] <= EARLY * rows.groupby("size")["tokens"].transform("max")]
    critical = known_critical(early) if len(early) else None
    if critical is None or critical.law is not None:
        return None if critical is None else critical.law
    return power_law(early["loss"], critical.of(early))  # the noise scale of each row


def _joint(early: pandas.DataFrame, critical: PowerLaw | None, one_batch: bool) -> tuple[LawFit | None, list[str]]:
    """L(N, S) of all sizes, by S_min where B_crit is known."""
    what, steps, batch = forms.NS.formula, early["tokens"] / early["batch_tokens"], early["batch_tokens"].iloc[0]
    if critical is None:
        said = f"{what}: B_crit is not known from the first thirds: S is plain steps, at batches of {batch:.4g} tokens"
    else:
        steps = min_steps(steps, early["batch_tokens"], critical(early["loss"].to_numpy()))
        said = f"{what}: B_crit(L) is by the first thirds alone, L^{critical.exponent:.3g}; its error is in no interval here"
    try:
        if critical is None and not one_batch:
            raise UserError("no batch size was tried at every size, and B_crit is not known from the first thirds")
        different_sizes(early["size"], 3, what)
        x = {"params": early["size"].to_numpy(float), "min_steps": np.asarray(steps, float)}
        return fit(forms.NS, Observations(x, early["loss"].to_numpy(), early["size"].to_numpy(), "the first thirds of all curves")), [said]
    except UserError as error:
        return None, [f"{what} is not fitted: {error}"]


def _predicted(law: LawFit, points: pandas.DataFrame, critical: PowerLaw | None) -> np.ndarray:
    """L(N, S_min), where S_min = S/(1 + B_crit(L)/B) depends on the predicted loss itself: by bisection, [n]."""
    size, batch = points["size"].to_numpy(float), points["batch_tokens"].to_numpy(float)
    steps = points["tokens"].to_numpy(float) / batch
    if critical is None:
        return law.predict({"params": size, "min_steps": steps})
    low, high = np.full(len(size), 1e-3), np.full(len(size), 1e3)
    for _ in range(60):  # the law falls with the loss that it is given, since B_crit does
        middle = np.sqrt(low * high)
        above = law.predict({"params": size, "min_steps": min_steps(steps, batch, critical(middle))}) > middle
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.sqrt(low * high)


def _errors(late: pandas.DataFrame) -> tuple[list[Number], list[str]]:
    """Errors of ln L in the last third: overall, set beside each other with intervals over sizes, and of each size."""
    ways = {way: np.log(late[column] / late["loss"]) for way, column in _PREDICTED.items() if column in late}
    rms = {way: float(np.sqrt(np.mean(error**2))) for way, error in ways.items()}
    most = {way: float(error.abs().max()) for way, error in ways.items()}
    squares = {way: (error**2).groupby(late["size"]).mean() for way, error in ways.items()}
    names = {way: f"rms error of ln L, {way}" for way in ways}
    numbers = [Number(names[way], rms[way], note=f"largest {most[way]:.2g}") for way in ways]
    pairs = [(way, _SAME) for way in ways if way != _SAME] + [(_JOINT, _OWN)] * (_JOINT in ways)
    ratios = {pair: _ratio(f"rms error, {pair[0]} over {pair[1]}", *(squares[way] for way in pair)) for pair in pairs}
    numbers += ratios.values()
    count, said = len(squares[_SAME]), []
    for way in ways:
        largest = (ways[way].abs()).groupby(late["size"]).max()
        numbers += [
            Number(f"{names[way]}, N = {size:.3g}", float(np.sqrt(square)), note=f"largest {largest[size]:.2g}")
            for size, square in squares[way].items()
        ]
        if way != _SAME:
            closer = int((squares[way] < squares[_SAME]).sum())
            mean = float(ways[way].mean())
            said.append(
                f"extrapolated by {way}, the last third is off by {rms[way]:.2g} of ln L (root mean square; {most[way]:.2g} at most, "
                f"{abs(mean):.2g} too {'high' if mean > 0 else 'low'} on average), against {rms[_SAME]:.2g} if the loss stayed what it was "
                f"at one third; it is closer than that at {closer} of {count} sizes"
            )
    if (_JOINT, _OWN) in ratios:
        said.append(_told(ratios[_JOINT, _OWN], count))
    return numbers, said


def _ratio(name: str, above: pandas.Series, below: pandas.Series) -> Number:
    """Of root mean square errors, from mean squares by size; sizes are resampled."""
    count = len(above)
    value = float(np.sqrt(above.mean() / below.mean()))
    if count < LEAST_SIZES:
        return Number(name, value, note=f"{count} sizes are too few for an interval")
    weight_RxG = bootstrap_weights(np.arange(count), 400, 0)
    draws = np.sqrt((weight_RxG @ above.to_numpy()) / (weight_RxG @ below.to_numpy()))
    return from_draws(name, value, widened(value, draws, np.sqrt((count + 1) / count) * student(count - 1) / _Z))


def _told(ratio: Number, sizes: int) -> str:
    if ratio.low is None or ratio.low <= 1 <= ratio.high:
        return f"{_OWN} and {_JOINT} cannot be told apart by these errors, of {sizes} sizes"
    better, other = (_JOINT, _OWN) if ratio.high < 1 else (_OWN, _JOINT)
    return f"{better} predicts better than {other}"


def _exponents(laws: dict[float, LawFit]) -> tuple[list[Number], list[str]]:
    """The exponent of each size's own curve, and whether they are alike."""
    from scipy.special import chdtrc  # only here: slow to import

    numbers, logs, errors = [], [], []
    for size, law in laws.items():
        name, value, ends = f"exponent of the curve, N = {size:.3g}", law.values["alpha_d"], law.intervals["alpha_d"]
        if "alpha_d" in law.unidentified:
            numbers.append(Number(name, None, note=law.unidentified["alpha_d"].removeprefix("alpha_d is ").replace("d_c", "D_c")))
            continue
        numbers.append(Number(name, value, *ends))
        logs.append(np.log(value))
        errors.append(law.se["alpha_d"])
    if len(logs) < 2:
        return numbers, [f"how alike the exponents are cannot be told: {len(logs)} of {len(laws)} curves identify theirs from a third"]
    weight = np.array(errors) ** -2.0
    mean = np.average(logs, weights=weight)
    chance = float(chdtrc(len(logs) - 1, np.sum(weight * (logs - mean) ** 2)))
    numbers.append(Number("largest exponent over the smallest", float(np.exp(np.ptp(logs)))))
    verdict = "no more than their errors allow" if chance > 1 - LEVEL else "by more than their errors: they are not the same at all sizes"
    chance_said = f"χ², p {'< 0.001' if chance < 1e-3 else f'= {chance:.2g}'}"
    said = [
        f"the exponents of {len(logs)} of {len(laws)} curves are {np.exp(min(logs)):.3g} to {np.exp(max(logs)):.3g}, which differ "
        f"{verdict} ({chance_said}); {SOURCE} have parameters that are roughly independent of the size",
        "an exponent's interval takes each horizon of a curve as a measurement of its own, and may be too narrow",
    ]
    return numbers, said


def _of_joint(law: LawFit) -> list[Number]:
    numbers = []
    for parameter in (p for p in law.form.parameters if p.name in ("alpha_n", "alpha_s")):
        more = {"published": parameter.published, "source": f"{SOURCE}, Table 3"}
        name = f"{parameter.name} of {_JOINT}, from the first thirds"
        if parameter.name not in law.unidentified:
            numbers.append(Number(name, law.values[parameter.name], *law.intervals[parameter.name], **more))
        else:
            numbers.append(Number(name, None, note=law.unidentified[parameter.name].removeprefix(f"{parameter.name} "), **more))
    return numbers


def _reservations(points: pandas.DataFrame, found: pandas.DataFrame, one_batch: bool) -> list[str]:
    part = points.groupby("part")["tokens"]
    said = [
        f"fitted to horizons after warmup up to a third of each size's longest ({part.min()['fitted']:.3g} to {part.max()['fitted']:.3g} "
        f"tokens), judged beyond two thirds of it; settings: those of the lowest loss there ({tuning_said(found)}), held along the curve"
    ]
    if not one_batch:
        said.append("each size is at its own best batch size")
    if left := found["size"].nunique() - points["size"].nunique():
        said.append(f"sizes left out for having fewer than {LEAST_EARLY} horizons in the first third: {left}")
    if "schedule" not in points:
        said.append("the table does not say the schedule: its horizons may be ends of runs of their own, and no points of one curve")
    elif decayed := sorted(set(points["schedule"].dropna().astype(str)) - {"constant"}):
        said.append(f"with the schedule {', '.join(decayed)} a horizon may be the end of a run of its own, and no point of one curve")
    return said


ANALYSES = (
    Analysis(
        "kaplan_extrapolation",
        "extrapolation of training curves",
        ("params", "tokens", "loss", "batch_tokens"),
        extrapolation,
        f"{SOURCE}, sec. 1.1 and 5.3",
    ),
)
