"""What fitted laws say of a run that was not measured: learning rate, batch, loss, what being wrong costs, and how a budget is best split.

Every number has a 95% interval from the bootstrap's draws. Where one law feeds another, as B* does η*, all draws of the one are taken with
all of the other: laws that were fitted apart are combined as independent. Where rival forms could not be told apart, the value is that of
the one that holds out best and the interval spans them all. A number that the fits do not support is not given; it says why instead.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.laws.fit import LEVEL, LawFit, widened
from scaling_jax.laws.reach import Reach, reaches
from scaling_jax.laws.store import Laws

WIDEST = 10.0  # high over low of an interval, beyond which a number is no advice
WIDEST_LOSS = 2.0
LEAST_SHARE = 1 / 64  # of the run: a batch schedule has no doubling before
LR, BATCH, LOSS = "learning rate", "batch", "loss"  # names of rows that others look up
_INDEPENDENT = "laws fitted apart are combined as independent"
_LOSS_LAWS = ("chinchilla_3", "kaplan_nd")
_TRANSFERRED = ("mup", "completep")


class Question(NamedTuple):
    """The run: `params` N (without embeddings), `tokens` T; a `flops` budget to split instead of 6·N·T, a batch that is decided already."""

    params: float
    tokens: float
    flops: float | None = None
    batch_tokens: float | None = None


class Row(NamedTuple):
    """One quantity. `value` is None where `why` says what is missing, or where `text` has what is no number. `law` is "law: form"."""

    name: str
    unit: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    law: str = ""
    reaches: tuple[Reach, ...] = ()
    notes: tuple[str, ...] = ()
    text: str = ""
    why: str = ""

    @property
    def inside(self) -> bool | None:
        """Whether all inputs lie in the measured range; None where it rests on none."""
        return all(reach.inside for reach in self.reaches) if self.reaches else None


class Advice(NamedTuple):
    question: Question
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def told(self) -> bool:
        """Whether there is what a run cannot do without: its learning rate and batch, or else its loss."""
        return all(self.row(name).value is not None for name in (LR, BATCH)) or self.row(LOSS).value is not None


def advise(laws: Laws, question: Question) -> Advice:
    """All rows for one run.

    Args:
      laws: of a laws.json.
      question: the run.

    Raises:
      UserError: a size, budget or batch is not positive, or the batch is more than the tokens.
    """
    for name, value in question._asdict().items():
        if value is not None and not (np.isfinite(value) and value > 0):
            raise UserError(f"--{name}={value:g}: must be a positive number")
    if question.batch_tokens is not None and question.batch_tokens > question.tokens:
        raise UserError(f"--batch_tokens={question.batch_tokens:g}: not one step in --tokens={question.tokens:g}; must be at most that")
    batch, batch_R = _known(_batch, Row(BATCH, "tokens"), laws, question)
    loss, fits = _known(_loss, Row(LOSS, "nats per token"), laws, question)
    rows = [_known(_lr, Row(LR), laws, question, batch, batch_R)[0], batch]
    if question.batch_tokens is not None:
        rows.append(_known(_regret, Row("cost of this batch", "nats per token"), laws, question, loss)[0])
    rows.append(_known(_stages, Row("batch schedule"), laws, question, batch)[0])
    rows.append(loss)
    rows.append(_known(_lr_cost, Row("cost of a factor 2 in lr", "nats per token"), laws, question)[0])
    rows.append(_known(_batch_cost, Row("cost of a factor 2 in batch", "nats per token"), laws, question, loss)[0])
    return Advice(question, (*rows, *_split(laws, question, loss, fits), *_counts(question, batch, batch_R)))


# -------------------------------------------------------------------------------------------------------------------------- lr and batch


def _batch(laws: Laws, question: Question) -> tuple[Row, np.ndarray]:
    """B*, and its draws [R]; or the batch that was given."""
    if question.batch_tokens is not None:
        given = question.batch_tokens
        return Row(BATCH, "tokens", given, given, given, "as given"), np.array([given])
    fitted = laws.fit("batch_optimum")
    x = _inputs(question.params, question.tokens)
    where = reaches(laws, "batch_optimum", fitted, x)
    value, low, high, notes = _number("batch_optimum", [fitted], lambda predict: predict(x)[..., 0], WIDEST)
    if value > question.tokens:
        raise UserError(f"not supported: batch_optimum gives {value:.4g} tokens, more than the run has")
    if "params" not in fitted.form.inputs:
        notes += (_carried(laws, "B*"),)
    row = Row(BATCH, "tokens", value, low, high, _source("batch_optimum", fitted), where, notes)
    return row, fitted.draw_predictions(x)[:, 0]


def _lr(laws: Laws, question: Question, batch: Row, batch_R) -> tuple[Row, None]:
    """η* at the batch of the row before."""
    rivals = _rivals(laws, "lr_surface")
    if batch.value is None:
        raise UserError(f"needs a batch, --batch_tokens=B or B*: {batch.why}")
    if "params" not in rivals[0].form.inputs and laws.study.get("parametrization") not in _TRANSFERRED:
        size = laws.study.get("params")
        if size is None or abs(np.log(question.params / size)) > 0.01:
            at = "of one size" if size is None else f"of N = {size:.4g} only"
            raise UserError(
                f"not supported: lr_surface has no term of N: it is {at}, and without μP the best lr is not carried over to "
                f"N = {question.params:.4g}"
            )

    where = reaches(laws, "lr_surface", rivals[0], _inputs(question.params, question.tokens, batch.value))

    def at(batch_tokens):
        x = _inputs(question.params, question.tokens, batch_tokens)
        return lambda predict: predict(x)

    value, low, high, notes = _number("lr_surface", rivals, at(batch.value), WIDEST, at(batch_R))
    if len(batch_R) > 1:
        _, *ends, _ = _number("lr_surface", rivals, at(batch.value), WIDEST)
        notes += (f"the interval has that of B* in it; at exactly this batch it is {ends[0]:.4g} to {ends[1]:.4g}; {_INDEPENDENT}",)
    if "params" not in rivals[0].form.inputs:
        notes += (_carried(laws, "η*"),)
    return Row(LR, "", value, low, high, _source("lr_surface", rivals[0]), where, notes), None


def _carried(laws: Laws, what: str) -> str:
    """Why a law without a term of N is used at another N."""
    kind = laws.study.get("parametrization")
    if kind not in _TRANSFERRED:
        return f"{what} has no term of N here: one size was measured, or the fit leaves N out"
    tested = [said for said in laws.statements.get("width_equality", []) if said.startswith(what)]
    lr = "the lr of the base sizes, the same for all" if what == "η*" else "the same for all sizes"
    why = laws.not_fitted.get("width_equality", "width_equality was not fitted")
    return f"{lr} under {kind}; tested: {tested[0]}" if tested else f"{lr} under {kind}, which nothing here has tested: {why}"


def _stages(laws: Laws, question: Question, batch: Row) -> tuple[Row, None]:
    """A batch that grows as B_crit does with the tokens, in as many steps as the constant one takes."""
    if batch.value is None:
        raise UserError(f"needs a batch: {batch.why}")
    growth = _form_of(laws, "critical_growth", "growth_tokens")
    exponent, (low, high) = growth.values["tokens_exponent"], growth.intervals["tokens_exponent"]
    if low is None or high is None or low <= 0 or "tokens_exponent" in growth.unidentified:
        ends = " to ".join("open" if end is None else f"{end:.3g}" for end in (low, high))
        raise UserError(f"not supported: critical_growth (growth_tokens) does not show B_crit to grow with T: its exponent is {ends}")
    first, stages = doublings(question.tokens, batch.value, exponent, int(laws.study.get("context") or 1))
    if not stages:
        raise UserError(f"B_crit grows as T^{exponent:.2g} only: it does not double within the last {1 - LEAST_SHARE:.0%} of the run")
    listed = ",".join(f"{tokens}={batch_tokens}" for tokens, batch_tokens in stages)
    text = f"--config.train.batch_tokens={first} --config.batch.schedule=stages --config.batch.stages={listed}"
    notes = ["a suggestion that nothing here has tested: the batch doubles when B_crit has, and takes as many steps as the constant one"]
    notes.append(f"B_crit ∝ T^{exponent:.3g} ({low:.3g} to {high:.3g}); the lr above is that of the constant batch")
    if laws.best.get("critical_growth") not in ("growth_tokens", None):
        notes.append(f"these data are better described by {laws.best['critical_growth']}, B_crit as a function of the loss")
    where = reaches(laws, "critical_growth", growth, _inputs(question.params, question.tokens))
    return Row("batch schedule", law=_source("critical_growth", growth), reaches=where, notes=tuple(notes), text=text), None


def doublings(tokens: float, batch_tokens: float, exponent: float, context: int = 1) -> tuple[int, list[tuple[int, int]]]:
    """The first batch, and the (tokens, batch) from which it is twice the last one: B ∝ t^exponent, steps as of a constant `batch_tokens`.

    Batches are multiples of `context`.
    """
    count = int(np.floor(-np.log2(LEAST_SHARE) * exponent + 1e-9))
    share = 2.0 ** (-np.arange(count, 0, -1) / exponent)
    lengths = np.diff(np.concatenate([[0.0], share, [1.0]]))
    first = batch_tokens * np.sum(lengths / 2.0 ** np.arange(count + 1))
    first = context * max(1, round(first / context))
    return first, [(round(at * tokens), first << (i + 1)) for i, at in enumerate(share)]


# ------------------------------------------------------------------------------------------------------------------- loss and what it costs


def _loss(laws: Laws, question: Question) -> tuple[Row, list[LawFit]]:
    x, reasons = _inputs(question.params, question.tokens), []
    for law in _LOSS_LAWS:
        try:
            rivals = _rivals(laws, law)
            where = reaches(laws, law, rivals[0], x)
            value, low, high, notes = _number(law, rivals, lambda predict: predict(x)[..., 0], WIDEST_LOSS)
        except UserError as error:
            reasons.append(str(error))
            continue
        notes += (f"of a tuned run in one pass; a single run scatters about the law by {rivals[0].rms:.2%}",)
        row = Row(LOSS, "nats per token", value, low, high, _source(law, rivals[0]), where, notes)
        return row, rivals
    raise UserError("; ".join(reasons))


def _lr_cost(laws: Laws, question: Question) -> tuple[Row, None]:
    """½·d²L/d(ln η)²·ln²2."""
    fitted = _form_of(laws, "sensitivity", "curvature")
    x = _inputs(question.params, question.tokens)
    where = reaches(laws, "sensitivity", fitted, x)
    name = "cost of a factor 2 in lr"
    value, low, high, notes = _number("sensitivity", [fitted], lambda predict: 0.5 * np.log(2) ** 2 * predict(x)[..., 0], WIDEST)
    notes += ("½·curvature·ln²2; a parabola, which far above the best lr says too little",)
    return Row(name, "nats per token", value, low, high, _source("sensitivity", fitted), where, notes), None


def _batch_cost(laws: Laws, question: Question, loss: Row) -> tuple[Row, None]:
    share, least, most = _batch_share(laws)
    scale, unit = (loss.value, "nats per token") if loss.value else (1.0, "of the loss")
    notes = (f"median over sizes and horizons, which have {scale * least:.3g} to {scale * most:.3g}; each batch at its own best lr",)
    where = reaches(laws, "batch_optimum", laws.fit("batch_optimum"), _inputs(question.params, question.tokens))
    return Row("cost of a factor 2 in batch", unit, scale * share, law="batch_optimum", reaches=where, notes=notes), None


def _regret(laws: Laws, question: Question, loss: Row) -> tuple[Row, None]:
    """What the batch that was given loses against B*."""
    best, best_R = _batch(laws, question._replace(batch_tokens=None))
    x = _inputs(question.params, question.tokens)
    where = reaches(laws, "batch_optimum", laws.fit("batch_optimum"), x, question.batch_tokens)
    share, least, most = _batch_share(laws)
    scale, unit = (loss.value, "nats per token") if loss.value else (1.0, "of the loss")
    off, off_R = (np.log2(question.batch_tokens / b) ** 2 for b in (best.value, best_R))
    value, low, high = (scale * share * end for end in (off, *_interval(off_R)))
    notes = (f"B* is {best.value:.4g} tokens ({best.low:.4g} to {best.high:.4g}); by a parabola in ln B, which holds near B* only",)
    notes += (f"the interval is from B*; single sizes and horizons have {least / share:.2g} to {most / share:.2g} of its curvature",)
    return Row("cost of this batch", unit, value, low, high, best.law, where, notes), None


def _batch_share(laws: Laws) -> tuple[float, float, float]:
    """The relative loss of a factor 2 in B: median, least, most."""
    laws.fit("batch_optimum")
    numbers, name = laws.numbers.get("batch_optimum", {}), "loss of a factor 2 in B, relative"
    share, least, most = (numbers.get(f"{name}{end}", {}).get("value") for end in ("", ", least", ", most"))
    if share is None or least is None or most is None:
        raise UserError(f"{laws.path}: batch_optimum does not say what a factor 2 in B costs; fit the laws again")
    return share, least, most


# -------------------------------------------------------------------------------------------------------------------------------- budgets


def _split(laws: Laws, question: Question, loss: Row, fits: list[LawFit] | None) -> list[Row]:
    """The size and tokens of the least loss at a budget, by minimizing L(N, C/6N), and how far from it the run is."""
    own = 6 * question.params * question.tokens
    budget = own if question.flops is None else question.flops
    names = ("best params for the budget", "best tokens for the budget", "excess over the best split of 6·N·T")
    rows = [Row("budget", "FLOP", budget, notes=("6·N·T" if question.flops is None else "as given",))]
    if not fits:
        return [*rows, *(Row(name, why="needs the law of the loss, which is not supported here") for name in names)]
    ratio = np.exp(np.linspace(np.log(1e-3), np.log(1e7), 2301))  # tokens per parameter

    def best(predict, flops: float, what: str):
        params = np.sqrt(flops / 6 / ratio)
        losses = predict(_inputs(params, params * ratio))
        at = losses.argmin(axis=-1)
        inside = (at > 0) & (at < len(ratio) - 1)
        return np.where(inside, losses.min(axis=-1) if what == "loss" else (params if what == "params" else params * ratio)[at], np.nan)

    law = loss.law.partition(":")[0]
    x = _inputs(question.params, question.tokens)
    for name, what in zip(names[:2], ("params", "tokens"), strict=True):
        try:
            value, low, high, notes = _number(law, fits, lambda predict, what=what: best(predict, budget, what), WIDEST, derived=True)
            params = value if what == "params" else budget / 6 / value
            where = reaches(laws, law, fits[0], _inputs(params, budget / 6 / params))
            rows.append(Row(name, what if what == "tokens" else "parameters", value, low, high, loss.law, where, notes))
        except UserError as error:
            rows.append(Row(name, why=str(error)))
    try:
        value, low, high, notes = _number(law, fits, lambda predict: predict(x)[..., 0] - best(predict, own, "loss"), None, derived=True)
        rows.append(Row(names[2], "nats per token", value, max(low, 0.0), high, loss.law, loss.reaches, notes))
    except UserError as error:
        rows.append(Row(names[2], why=str(error)))
    return rows


def _counts(question: Question, batch: Row, batch_R) -> list[Row]:
    rows = [Row("tokens", "tokens", question.tokens, notes=("as given",))]
    rows.append(Row("tokens per parameter", "", question.tokens / question.params))
    if batch.value is None:
        return [*rows, Row("steps", why=f"needs a batch: {batch.why}")]
    low, high = _interval(question.tokens / batch_R)
    return [*rows, Row("steps", "", question.tokens / batch.value, low, high, batch.law, batch.reaches)]


# --------------------------------------------------------------------------------------------------------------------------------- shared


def _known(build: Callable, row: Row, laws: Laws, *arguments) -> tuple[Row, Any]:
    """What `build` returns; where it cannot, the row with the reason."""
    try:
        return build(laws, *arguments)
    except UserError as error:
        return row._replace(why=str(error).replace(f"{laws.path}: ", "")), None


def _inputs(params, tokens, batch_tokens=1.0) -> dict[str, np.ndarray]:
    """The columns that laws take, each [n]; the data of a run in one pass are its tokens."""
    x = {"params": params, "tokens": tokens, "data_tokens": tokens, "batch_tokens": batch_tokens}
    return dict(zip(x, np.broadcast_arrays(*(np.atleast_1d(np.asarray(value, float)) for value in x.values())), strict=True))


def _form_of(laws: Laws, law: str, form: str) -> LawFit:
    if law in laws.not_fitted or form not in laws.fits.get(law, {}):
        laws._replace(best={}).fit(law)  # raises, saying why
    return laws.fits[law][form]


def _rivals(laws: Laws, law: str) -> list[LawFit]:
    """The form that plans use, and after it those that the data cannot tell from the best."""
    fits = laws.fits.get(law, {})
    if law in laws.not_fitted or not fits:
        laws.fit(law)  # raises, saying why
    names = [name for name in laws.tied.get(law, ()) if name in fits]
    if laws.best.get(law) is not None:
        names = [laws.best[law], *(name for name in names if name != laws.best[law])]
    return [fits[name] for name in names or fits]


def _number(
    law: str,
    fits: Sequence[LawFit],
    at: Callable,
    widest: float | None,
    drawn_at: Callable | None = None,
    derived: bool = False,
) -> tuple[float, float, float, tuple[str, ...]]:
    """Value by the first of rival fits, an interval that spans all, and a note that gives each.

    Args:
      law: its name.
      fits: rivals.
      at: the number from a fit's `predict` [1] and, unless `drawn_at` is given, from its `draw_predictions` [R, 1].
      widest: the largest high / low that is worth giving; None for numbers that may be 0.
      drawn_at: the same from `draw_predictions`, any shape.
      derived: the number is no prediction, but follows from many: it is taken of each draw as fitted, and its own deviations are widened.

    Raises:
      UserError: there is no interval, or it is wider than that.
    """
    values = [float(np.ravel(at(fitted.predict))[0]) for fitted in fits]
    if derived:
        drawn = [at(functools.partial(fitted.form.predict_many, fitted.draws_RxP)) for fitted in fits]
        pairs = zip(values, drawn, fits, strict=True)
        drawn = [widened(value, drawn_R, fitted.widen, log=widest is not None) for value, drawn_R, fitted in pairs]
    else:
        drawn = [(drawn_at or at)(fitted.draw_predictions) for fitted in fits]
    ends = [_interval(np.ravel(each)) for each in drawn]
    for fitted, value, (low, high) in zip(fits, values, ends, strict=True):
        found = np.isfinite([value, low, high]).all()
        if not found or (widest is not None and not (low > 0 and high <= widest * low)):
            why = "; ".join(fitted.unidentified.values()) or "its parameters are known, but not well enough for so far away"
            said = f"the interval is {low:.3g} to {high:.3g}" if found else "there is no interval"
            name = law if law == fitted.form.name else f"{law} ({fitted.form.name})"
            raise UserError(f"not supported: {name}: {said}: {why}")
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    if widest is not None and high > widest * low:
        raise UserError(f"not supported: {law}: its rivals, which the data cannot tell apart, give {low:.3g} to {high:.3g}")
    each = (f"{fitted.form.name} {v:.4g} ({a:.4g} to {b:.4g})" for fitted, v, (a, b) in zip(fits, values, ends, strict=True))
    notes = (f"{', '.join(each)}: the data cannot tell them apart, and the interval spans them",) if len(fits) > 1 else ()
    return values[0], low, high, notes


def _interval(draws: np.ndarray) -> tuple[float, float]:
    """95% of the draws; nan where there are none, or too many are not finite."""
    if len(draws) == 0 or np.mean(np.isfinite(draws)) < (1 + LEVEL) / 2:
        return np.nan, np.nan
    low, high = np.quantile(draws[np.isfinite(draws)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _source(law: str, fitted: LawFit) -> str:
    return law if law == fitted.form.name else f"{law}: {fitted.form.name}"
