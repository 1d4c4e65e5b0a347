"""Where the best learning rate bends with the batch size, one size and one token budget at a time, without a law in T or N.

At each (N, T) the minima ln η* at several batch sizes are taken for independent, since they are of different runs. Their exponent in B is
compared between the smaller and the larger half of the batch sizes, and two slopes are fitted with a bend between them, once as two
straight lines and once with the rounded corner that surge and plateau (see `lr_surface`) both have. An interval is that of the minima's
own errors, or that of the scatter about the lines by Student's t, whichever is wider.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.finding import Analysis, Finding, Number
from scaling_jax.laws.lr_optimum import count_runs, measure, minima
from scaling_jax.laws.settings import confounded, runs_shared

SOURCE = "Filatov et al. 2024, arXiv 2410.05838"
TITLE = "Where η*(B) bends, T by T"
LEAST = 4  # batch sizes with a minimum, for two halves; two slopes and where they meet are four numbers, and a test of them needs one more
SURGE = -0.5  # exponent far above the bend; that of a plateau is 0
_Z = 1.96
_PLACES = 401  # where a bend is sought, equally far apart in ln B
RISES_ON, BENDS, STEEPENS, UNDECIDED = "rises on", "bends", "steepens", "undecided"


class Range(NamedTuple):
    """A value with its 95% interval; nan where not known."""

    value: float
    low: float = np.nan
    high: float = np.nan


class Halves(NamedTuple):
    """Exponents of η* in B over the `lower` and the `upper` half of the batch sizes and over the `whole`; `change` is upper less lower."""

    lower: Range
    upper: Range
    whole: Range
    change: Range


class Corner(NamedTuple):
    """Two slopes fitted with a bend between. `batch` in tokens, nan where it is not identified, then `why` says so; `p` of the F test
    against one slope, nan where there are fewer than five minima. `widening` is by what the minima's own errors were taken to be larger."""

    batch: Range
    p: float
    why: str
    widening: float = 1.0


def _errors(log_se) -> tuple[np.ndarray, bool]:
    """What to weight by, and whether it is an error that is known."""
    se = np.asarray(log_se, float)
    known = bool(np.all(np.isfinite(se) & (se > 0)))
    return (se if known else np.ones_like(se)), known


def _reach(chi_sq: float, dof: int, known: bool) -> float:
    """Standard errors to either side of an estimate: 1.96, or by the scatter and Student's t if that is more; nan where not known."""
    from scipy.stats import t  # only here: slow to import

    scatter = float(t.ppf(0.975, dof) * np.sqrt(chi_sq / dof)) if dof else np.nan
    return float(np.fmax(_Z, scatter)) if known else scatter


def _slope(x: np.ndarray, se: np.ndarray) -> np.ndarray:
    """The weights of the minima in the slope of a line through them, [n]."""
    w = se**-2.0
    off = x - w @ x / w.sum()
    return w * off / (w @ off**2)


def _misfit(x: np.ndarray, y: np.ndarray, se: np.ndarray) -> float:
    w = se**-2.0
    centre = w @ x / w.sum(), w @ y / w.sum()
    return float(np.sum(((y - centre[1] - _slope(x, se) @ y * (x - centre[0])) / se) ** 2))


def halves(log_batch: np.ndarray, log_lr: np.ndarray, log_se: np.ndarray) -> Halves:
    """Exponents of η* in B over both halves of the batch sizes, which share the middle one where their number is odd.

    Args:
      log_batch, log_lr, log_se: ln B ascending, ln η* and its standard error (nan: not known), each [n], n ≥ 4. Errors are independent.
    """
    se, known = _errors(log_se)
    count, half = len(log_batch), (len(log_batch) + 1) // 2
    parts = {"lower": slice(half), "upper": slice(count - half, count), "whole": slice(count)}
    weights = {name: np.zeros(count) for name in parts}
    for name, part in parts.items():
        weights[name][part] = _slope(log_batch[part], se[part])
    weights["change"] = weights["upper"] - weights["lower"]  # of all minima, so that a shared middle one counts as it should
    misfit = {name: _misfit(log_batch[part], log_lr[part], se[part]) for name, part in parts.items()}
    reach = dict.fromkeys(weights, _reach(misfit["lower"] + misfit["upper"], 2 * half - 4, known))
    reach["whole"] = _reach(misfit["whole"], count - 2, known)
    found = {}
    for name, of_minima in weights.items():
        value, error = float(of_minima @ log_lr), float(np.sqrt(np.sum((of_minima * se) ** 2)))
        found[name] = Range(value, value - reach[name] * error, value + reach[name] * error)
    return Halves(**found)


def verdict(found: Halves) -> str:
    """In words: "rises on", "bends" and what follows, "steepens", or "undecided" and why."""
    lower, upper, change = found.lower, found.upper, found.change
    if np.isnan(change.low):
        return f"{UNDECIDED} (errors not known)"
    if change.high < 0:
        return f"{BENDS} {_above(lower, upper)}"
    if change.low > 0:
        return STEEPENS
    return RISES_ON if upper.low > 0 else f"{UNDECIDED} (neither a bend nor a rise of the upper half is shown)"


def _above(lower: Range, upper: Range) -> str:
    """Level is what is nearer to 0 than to the surge's fall and to the rise below: a plateau does rise a little at any B."""
    if upper.high < 0:
        return "and turns down"
    if upper.low > SURGE / 2 and upper.high < lower.value / 2:
        return "and levels off"
    return "and still rises" if upper.low > 0 else "(undecided above)"


def _designs(log_batch: np.ndarray, se: np.ndarray, rounded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where the bend may be, ln B [places], and the weighted columns of each, [places, n, 3]: level, slope, and the change of it."""
    places = np.linspace(log_batch[1], log_batch[-2], _PLACES)
    off = log_batch[None, :] - places[:, None]
    change = np.logaddexp(0.0, off) if rounded else np.maximum(off, 0.0)
    columns = np.stack([np.ones_like(off), np.broadcast_to(log_batch, off.shape), change], axis=2)
    return places, columns / se[None, :, None]


def _profile(designs: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """χ² with the bend at each place, [rows, places], of `scaled` minima in standard errors, [rows, n]."""
    bases, _ = np.linalg.qr(designs)
    along = np.einsum("kni,rn->rki", bases, scaled)
    return np.sum(scaled**2, axis=1)[:, None] - np.sum(along**2, axis=2)


def corner(log_batch: np.ndarray, log_lr: np.ndarray, log_se: np.ndarray, rounded: bool = False) -> Corner:
    """The batch size at which two slopes meet, both free, with its profile interval.

    With the corner sharp ln η* = a + b·ln B + c·max(0, ln B/B_bend); with it rounded, a + b·ln B + c·ln(1 + B/B_bend), which is a surge at
    b = ½, c = −1 and a plateau at b = ½, c = −½, and B_bend then their B_crit. It is sought from the second batch size to the last but one:
    beyond, one point alone would have a slope of its own. Not identified where the F test of two slopes against one leaves more than 5%,
    where the interval reaches either end, or where the upper slope is the steeper one. Arguments as of `halves`.
    """
    from scipy.stats import chi2, f  # only here: slow to import

    nothing = Range(np.nan)
    count = len(log_batch)
    if count <= LEAST:
        return Corner(nothing, np.nan, f"{count} minima are too few for two slopes and their test")
    se, known = _errors(log_se)
    places, designs = _designs(log_batch, se, rounded)
    chi_sq = np.maximum(_profile(designs, (log_lr / se)[None, :])[0], 0.0)
    at, dof = int(np.argmin(chi_sq)), count - LEAST
    gain, left = _misfit(log_batch, log_lr, se) - chi_sq[at], chi_sq[at]
    p = float(f.sf(gain / 2 / (left / dof), 2, dof)) if left > 0 else 0.0
    p = max(p, float(chi2.sf(gain, 2))) if known else p  # where few points lie on two lines by chance, their own errors have the word
    reach = _reach(left, dof, known)
    allowed = np.flatnonzero(chi_sq - left <= reach**2)
    low, high = max(allowed[0] - 1, 0), min(allowed[-1] + 1, _PLACES - 1)  # the ends lie between places
    widening = reach / _Z
    if p > 0.05:
        return Corner(nothing, p, f"two slopes are not better than one (F test, p {p:.2g})", widening)
    if np.linalg.lstsq(designs[at], log_lr / se, rcond=None)[0][2] >= 0:
        return Corner(nothing, p, "the upper slope is the steeper one", widening)
    if low == 0 or high == _PLACES - 1:
        ends = " and ".join(word for word, is_at in (("lower", low == 0), ("upper", high == _PLACES - 1)) if is_at)
        return Corner(nothing, p, f"its interval reaches the {ends} end of the batches", widening)
    return Corner(Range(*(float(np.exp(places[i])) for i in (at, low, high))), p, "", widening)


# ------------------------------------------------------------------------------------------------------------------ of a study's table


class _Case(NamedTuple):
    """One size and horizon. `cells` are the places of its minima among all cells, by batch size; `corners` the sharp and the rounded."""

    size: str
    tokens: float
    cells: np.ndarray
    log_batch: np.ndarray
    log_lr: np.ndarray
    se: np.ndarray
    halves: Halves
    corners: tuple[Corner, Corner]

    @property
    def split(self) -> tuple[float, float]:
        """The largest batch of the lower half and the smallest of the upper."""
        half = (len(self.log_batch) + 1) // 2
        return tuple(float(np.exp(self.log_batch[i])) for i in (half - 1, len(self.log_batch) - half))


_CORNERS = ("bend", "rounded_bend")


def find(table, resamples: int = 400, seed: int = 0) -> Finding:
    """The exponents of η* in B below and above, and the bend, at each size and horizon with four minima or more."""
    optima = measure(table)
    minima(table, optima)  # for what it refuses
    points = optima.points.reset_index(drop=True)
    cases, rows, few = [], [], []
    names = _size_names(points)
    for (params, width, tokens), cells in points.groupby(["params", "width", "tokens"], dropna=False, sort=True):
        cells = cells.sort_values("batch_tokens")
        inside = cells[cells["censored"] == ""]
        size = names(params, width)
        if len(inside) < LEAST:
            few.append((len(inside), f"T = {tokens:.4g}{', ' if size else ''}{size}"))
            continue
        log_batch, log_lr = (np.log(inside[name].to_numpy(float)) for name in ("batch_tokens", "lr"))
        se = inside["lr_log_se"].to_numpy(float)
        corners = tuple(corner(log_batch, log_lr, se, rounded) for rounded in (False, True))
        case = _Case(size, float(tokens), inside.index.to_numpy(), log_batch, log_lr, se, halves(log_batch, log_lr, se), corners)
        cases.append(case)
        rows.append({"params": params, "width": width, "tokens": tokens, "batches": len(inside)} | _row(case, cells))
    if not cases:
        most = max(few, key=lambda case: case[0])
        raise UserError(
            f"no size and horizon has a minimum inside the lr grid at {LEAST} batch sizes or more, which a bend of η*(B) needs; "
            f"the most is {most[0]}, at {most[1]}"
        )
    draws_RxC = optima.draws(resamples, seed)["log_lr"]
    import pandas

    frame = pandas.DataFrame(rows)
    numbers = _numbers(cases, draws_RxC)
    statements = _verdicts(cases, runs_shared(table)) + _edges(cases, frame, few) + _caveats(cases) + confounded(points)
    return Finding("lr_bend", TITLE, {}, None, numbers, statements, frame, count_runs(table))


def _size_names(points) -> Callable[[float, float], str]:
    """What a size is called: by N, by width where sizes of one N differ in it, or not at all where there is one size."""
    sizes = points[["params", "width"]].drop_duplicates()
    by_params, by_width = sizes["params"].nunique() > 1, sizes.duplicated("params").any()
    known = set(sizes["params"].dropna())
    digits = next(n for n in (4, 6, 17) if len({f"{value:.{n}g}" for value in known}) == len(known))

    def name(params: float, width: float) -> str:
        return ", ".join([f"N = {params:.{digits}g}"] * bool(by_params and np.isfinite(params)) + [f"width {width:g}"] * bool(by_width))

    return name


def _row(case: _Case, cells) -> dict[str, Any]:
    """Of the table; `cells` are all batch sizes of the case, in order."""
    row: dict[str, Any] = {}
    for name, found in zip(Halves._fields, case.halves, strict=True):
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    row["verdict"] = verdict(case.halves)
    for name, found in zip(_CORNERS, case.corners, strict=True):
        batch = found.batch
        row |= {f"{name}_batch_tokens": batch.value, f"{name}_low": batch.low, f"{name}_high": batch.high, f"{name}_p": found.p}
        row[f"{name}_not_identified"] = found.why
    lost = (cells["censored"] != "").to_numpy()
    kept = np.flatnonzero(~lost)
    above = cells["censored"].to_numpy()[kept[-1] + 1 :]
    ends = {"left_out_smallest": int(kept[0]), "left_out_largest": len(above), "left_out_largest_from_below": int((above == "high").sum())}
    return row | {"left_out": int(lost.sum())} | ends


def _ends(found: Range) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(v) else v for v in found)


def _numbers(cases: list[_Case], draws_RxC: np.ndarray) -> list[Number]:
    numbers = []
    sizes = list(dict.fromkeys(case.size for case in cases))
    of_size = [[case for case in cases if case.size == size] for size in sizes]
    for own in of_size:
        last, below = own[-1], f", {own[0].size}" if own[0].size else ""
        split, at = last.split, f"T = {last.tokens:.4g}{below}"
        note = f"batches of {split[1]:.4g} tokens and more; far above a bend surge has −0.5, plateau 0, a power the same as below"
        numbers.append(Number(f"η* ∝ B^x, upper half, at {at}", *_ends(last.halves.upper), note=note))
        numbers.append(Number(f"η* ∝ B^x, lower half, at {at}", *_ends(last.halves.lower), note=f"batches of up to {split[0]:.4g} tokens"))
    for own in of_size:
        for case in own:
            sharp, rounded = case.corners
            note = f"not identified: {sharp.why}" if sharp.why else ""
            if not rounded.why:
                said = "{:.4g} ({:.3g} to {:.3g})".format(*rounded.batch)
                note = f"{note}{'; ' if note else ''}with a rounded corner {said}"
            name = f"bend of η*(B) at T = {case.tokens:.4g}{', ' if case.size else ''}{case.size}"
            numbers.append(Number(name, *_ends(sharp.batch), unit="tokens", note=note))
    for own in of_size:
        for which, kind in enumerate(("two lines", "rounded corner")):
            numbers += _growth(own, which, kind, draws_RxC)
    return numbers


def _growth(own: list[_Case], which: int, kind: str, draws_RxC: np.ndarray) -> list[Number]:
    """The exponent of the bend in T at one size, where three horizons have one; horizons share runs, so its interval is of joint draws."""
    own = [case for case in own if not case.corners[which].why]
    if len(own) < 3:
        return []
    x = np.log([case.tokens for case in own])
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    value = float(weights @ np.log([case.corners[which].batch.value for case in own]))
    drawn = []
    for case in own:
        se, _ = _errors(case.se)
        places, designs = _designs(case.log_batch, se, bool(which))
        noise_Rxn = (draws_RxC[:, case.cells] - case.log_lr) * case.corners[which].widening
        sound = np.isfinite(noise_Rxn).all(axis=1)
        chi_sq = _profile(designs, (case.log_lr + np.where(sound[:, None], noise_Rxn, 0.0)) / se)
        drawn.append(np.where(sound, places[np.argmin(chi_sq, axis=1)], np.nan))
    exponents = weights @ np.array(drawn)
    exponents = exponents[np.isfinite(exponents)]
    low, high = np.percentile(exponents, [2.5, 97.5]) if len(exponents) >= 100 else (None, None)
    note = f"{len(own)} horizons" + ("" if which else "; too near to 0 where the corner is rounded")
    name = f"bend ∝ T^p by {kind}{', ' if own[0].size else ''}{own[0].size}"
    published = {"published": 1.0, "source": "Filatov et al. 2024"} if which else {}
    return [Number(name, value, *(None if v is None else float(v) for v in (low, high)), **published, note=note)]


def _verdicts(cases: list[_Case], shared: bool) -> list[str]:
    """A sentence for each size: what is seen at which horizons."""
    said = []
    for size in dict.fromkeys(case.size for case in cases):
        horizons: dict[str, list[str]] = {}
        for case in cases:
            if case.size == size:
                horizons.setdefault(verdict(case.halves), []).append(f"{case.tokens:.4g}")
        parts = [f"{word} at T = {', '.join(at)}" for word, at in horizons.items()]
        said.append(f"With the batch size{f', at {size},' if size else ''} the best lr: {'; '.join(parts)}.")
    bends = sum(verdict(case.halves).startswith(BENDS) for case in cases)
    if bends:
        dependent = " Horizons of the same runs are not independent witnesses." if shared else ""
        said.append(
            f"A bend is seen in {bends} of {len(cases)} cases of one size and horizon; where η* is a power of B, chance would show it in "
            f"about one of 40, or three of 40 with {LEAST} batch sizes.{dependent}"
        )
    elif all(verdict(case.halves) == RISES_ON for case in cases):
        largest = max(np.exp(case.log_batch[-1]) for case in cases)
        said.append(f"No bend is shown, which excludes none beyond the largest batches, {largest:.4g} tokens.")
    return said


def _edges(cases: list[_Case], frame, few: list[tuple[int, str]]) -> list[str]:
    said = []
    if count := frame["left_out"].sum():
        text = f"{count} minima that are no more than bounds are left out of {len(frame)} cases of one size and horizon"
        ends = {"smallest": frame["left_out_smallest"].sum(), "largest": frame["left_out_largest"].sum()}
        parts = [f"{count} at the {end} batch sizes tried" for end, count in ends.items() if count]
        below = frame["left_out_largest_from_below"].sum()
        if below:
            parts[-1] += f" ({below} of them bounds from below: the best lr may rise on there)"
        said.append(f"{text}{': ' if parts else ''}{', '.join(parts)}{'; of these ends nothing is said' if parts else ''}.")
    if few:
        said.append(f"Fewer than {LEAST} minima, and nothing said, at {'; '.join(f'{where} ({count})' for count, where in few)}.")
    if any(np.isnan(case.se).any() for case in cases):
        said.append("The errors of the minima are not known: intervals are by the scatter about the lines alone.")
    elif any(len(case.log_batch) == LEAST for case in cases):
        said.append(
            f"Where there are {LEAST} minima there is no scatter about the halves: their intervals are of the minima's own errors alone."
        )
    return said


def _caveats(cases: list[_Case]) -> list[str]:
    said = []
    if any(not case.corners[0].why for case in cases):
        said.append(
            "Where two straight lines meet is no B_crit: surge and plateau bend over a factor of ten and more in B, and two lines place a "
            "bend that is off the middle of the batches too near to it. The rounded corner is the B_crit of either, if it is one of them."
        )
    if any(verdict(case.halves).endswith("levels off") for case in cases):
        said.append("A surge is level about its top too: that η* levels off within these batches does not exclude a fall beyond them.")
    return said


ANALYSES = (Analysis("lr_bend", TITLE, ("batch_tokens", "tokens", "lr", "loss"), find, SOURCE),)
