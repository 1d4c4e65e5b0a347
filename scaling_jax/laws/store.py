"""laws.json: what was fitted, to which data, with which intervals; what plans and reports read.

    {"format": "scaling_jax laws", "version": 1,
     "data": {"path", "fingerprint", "rows", "finished", "derived"}, "ranges": {column: [least, most]},
     "study": {column: its one value}, "base": {field: value},
     "laws": {name: {"title", "source", "runs", "best", "statements", "numbers", "comparison", "fits": {form: …}}},
     "not_fitted": {name: why}}

A fit holds its formula, parameters with units, intervals and published values, the range of its inputs, correlations, and the bootstrap's
draws, from which the interval of any prediction follows. An interval's end that is null is open.
"""

import functools
import hashlib
import importlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas
from etils import epath

from scaling_jax import storage
from scaling_jax.errors import UserError
from scaling_jax.laws.catalogue import ANALYSES
from scaling_jax.laws.finding import Finding
from scaling_jax.laws.fit import LawFit
from scaling_jax.laws.form import Form, Parameter

FORMAT, VERSION = "scaling_jax laws", 1
_PACKAGE = "scaling_jax.laws"
_RANGES = ("params", "tokens", "batch_tokens", "lr")
_DRAWS = 400  # at most so many are kept
_SIZES = ("params", "width", "depth", "head_dim")
_STUDY = ("parametrization", "schedule", "context", "vocab_size", *_SIZES, "warmup_tokens", "weight_decay", "data")


class Laws(NamedTuple):
    """A laws.json that was read. `fits` are by law and form; `ranges` are the least and most of columns of the
    finished rows. `best` is the form of each law that its comparison chose, or its only
    one; `tied` are the forms that it could not tell apart."""

    path: str
    data: dict[str, Any]
    ranges: dict[str, tuple[float, float]]
    study: dict[str, Any]
    base: dict[str, Any]
    fits: dict[str, dict[str, LawFit]]
    best: dict[str, str | None]
    tied: dict[str, list[str]]
    statements: dict[str, list[str]]
    numbers: dict[str, dict[str, dict[str, Any]]]
    not_fitted: dict[str, str]

    def fit(self, law: str) -> LawFit:
        """The best fit of a law; UserError says why there is none."""
        if law in self.not_fitted:
            raise UserError(f"{self.path}: {law} could not be fitted: {self.not_fitted[law]}")
        if law not in self.fits or self.best.get(law) is None:
            raise UserError(f"{self.path}: has no {law}; scaling-jax fit --law={law} or --law=all adds it")
        return self.fits[law][self.best[law]]


def fingerprint(table: pandas.DataFrame) -> str:
    """A digest of a table's columns and values, 16 hex digits; the order of its rows and columns does not matter."""
    rows = table[sorted(map(str, table.columns))].to_csv(index=False).splitlines()
    return hashlib.sha256("\n".join([rows[0], *sorted(rows[1:])]).encode()).hexdigest()[:16]


def record(table: pandas.DataFrame, found: Mapping[str, Finding | str], path: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """What laws.json holds.

    Args:
      table: the results table that was analysed.
      found: what `catalogue.analyse` returned.
      path: where the table came from, as it was given.
      base: fields of the study's base config, empty where the table is no study's.
    """
    finished = int((table["status"] == "finished").sum()) if "status" in table else len(table)
    one = {name: table[name].dropna().unique() for name in _STUDY if name in table}
    return {
        "format": FORMAT,
        "version": VERSION,
        "data": {
            "path": path,
            "fingerprint": fingerprint(table),
            "rows": len(table),
            "finished": finished,
            "derived": table.attrs.get("derived", {}),
        },
        "ranges": {name: _range(table, name) for name in _RANGES if name in table and _range(table, name)},
        "study": {name: _plain(values[0]) for name, values in one.items() if len(values) == 1},
        "base": dict(base),
        "laws": {name: _finding(finding) for name, finding in found.items() if isinstance(finding, Finding)},
        "not_fitted": {name: why for name, why in found.items() if isinstance(why, str)},
    }


def check_writable(path: epath.PathLike) -> None:
    """UserError where laws.json cannot be written there, or is something else: so that it is said before anything is fitted."""
    path = epath.Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a directory; must be a file, for example {path / 'laws.json'}")
    if path.exists():
        try:
            content = storage.read_json(path)
        except UserError:
            content = None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path}: is there already and is no laws.json; nothing is overwritten, give another name")
    storage.check_writable(path)


def write(path: epath.PathLike, content: Mapping[str, Any]) -> None:
    """Writes laws.json, whole or not at all."""
    storage.write_json(path, dict(content))


def _range(table: pandas.DataFrame, name: str) -> list[float]:
    """The smallest and largest of a column in finished rows; [] where none is known."""
    rows = table[(table["status"] == "finished").fillna(False).to_numpy(bool)] if "status" in table else table
    values = rows[name].dropna().to_numpy(float)
    return [float(values.min()), float(values.max())] if len(values) else []


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: float | None) -> float | None:
    """To 7 digits; None where it is open or unknown."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")


def _finding(finding: Finding) -> dict[str, Any]:
    comparison = None
    if finding.comparison is not None:
        comparison = finding.comparison._asdict()
        comparison["rivals"] = [{key: _plain(value) for key, value in rival._asdict().items()} for rival in finding.comparison.rivals]
    return {
        "title": finding.title,
        "source": ANALYSES[finding.name].source,
        "runs": int(finding.runs),
        "best": finding.best,
        "statements": list(finding.statements),
        "numbers": [{key: _plain(value) for key, value in number._asdict().items()} for number in finding.numbers],
        "comparison": comparison,
        "fits": {name: _fit(fitted) for name, fitted in finding.fits.items()},
    }


def _fit(fitted: LawFit) -> dict[str, Any]:
    form_ = fitted.form
    parameters = {
        p.name: {
            "value": _rounded(fitted.values[p.name]),
            "low": _rounded(fitted.intervals[p.name][0]),
            "high": _rounded(fitted.intervals[p.name][1]),
            "unit": p.unit,
            "meaning": p.meaning,
            "transform": p.transform,
            "bounds": [p.low, p.high],
            "published": p.published,
            "not_identified": fitted.unidentified.get(p.name),
        }
        for p in form_.parameters
    }
    return {
        "form": form_.name,
        "formula": form_.formula,
        "source": form_.source,
        "target": form_.target,
        "space": form_.space,
        "function": _function_record(form_.function),
        "huber_delta": form_.huber_delta,
        "constants": dict(form_.constants),
        "parameters": parameters,
        "ranges": {name: list(ends) for name, ends in fitted.ranges.items()},
        "objective": _rounded(fitted.objective),
        "rms": _rounded(fitted.rms),
        "points": fitted.points,
        "clusters": fitted.clusters,
        "origin": fitted.origin,
        "widen": _rounded(fitted.widen),
        "correlations": [[_rounded(value) for value in row] for row in fitted.correlations_PxP.tolist()],
        "draws": [" ".join(f"{value:.6g}" for value in row) for row in fitted.draws_RxP[:_DRAWS].tolist()],
    }


def read(path: epath.PathLike) -> Laws:
    """What a laws.json holds.

    Raises:
      UserError: no such file, no laws.json, one of another version, or a damaged one; names the file and what is wrong.
    """
    content = storage.read_json(path, default=FileNotFoundError, mend="fit the laws again")
    if content is FileNotFoundError:
        raise UserError(f"{path}: no such file; scaling-jax fit --data=… --law=all --out={path} makes one")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: is no laws.json; must be what scaling-jax fit wrote")
    if content.get("version") is not VERSION:
        raise UserError(f"{path}: is of version {content.get('version')!r}, this scaling_jax reads version {VERSION}; fit the laws again")
    try:
        laws = content["laws"]
        for name, law in laws.items():
            if law["best"] is not None and law["best"] not in law["fits"]:
                raise ValueError(f"{name} has no fit {law['best']!r}")
        if not all(isinstance(content[key], dict) for key in ("data", "study", "base", "not_fitted")):
            raise TypeError("data, study, base and not_fitted must be objects")
        return Laws(
            path=str(path),
            data=content["data"],
            ranges={name: (float(low), float(high)) for name, (low, high) in content["ranges"].items()},
            study=content["study"],
            base=content["base"],
            fits={name: {key: _read_fit(entry) for key, entry in law["fits"].items()} for name, law in laws.items()},
            best={name: law["best"] for name, law in laws.items()},
            tied={name: law["comparison"]["tied"] for name, law in laws.items() if law["comparison"]},
            statements={name: law["statements"] for name, law in laws.items()},
            numbers={name: {number["name"]: number for number in law["numbers"]} for name, law in laws.items()},
            not_fitted=content["not_fitted"],
        )
    except Exception as error:  # whatever a form's function makes of what is not its own
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); fit the laws again") from None


def _read_fit(entry: Mapping[str, Any]) -> LawFit:
    parameters = entry["parameters"]
    form_ = Form(
        name=entry["form"],
        formula=entry["formula"],
        source=entry["source"],
        target=entry["target"],
        inputs=tuple(entry["ranges"]),
        parameters=tuple(_parameter(name, stored) for name, stored in parameters.items()),
        function=_function(entry["function"]["name"], json.dumps(entry["function"]["with"])),
        space=entry["space"],
        huber_delta=float(entry["huber_delta"]),
        constants=tuple((name, float(value)) for name, value in entry["constants"].items()),
    )
    draws = np.array([[float(value) for value in row.split()] for row in entry["draws"]]).reshape(-1, len(form_.names))
    nan = float("nan")
    correlations = [[nan if value is None else value for value in row] for row in entry["correlations"]]
    ranges = {name: (float(low), float(high)) for name, (low, high) in entry["ranges"].items()}
    if not all(0 < low <= high < np.inf for low, high in ranges.values()):
        raise ValueError(f"{form_.name} has ranges {ranges}")
    values = {name: float(parameters[name]["value"]) for name in form_.names}
    form_.predict(values, {name: [low] for name, (low, _) in ranges.items()})  # whether the function is one of a law
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = form_.transformed(draws).std(axis=0, ddof=1) if len(draws) > 1 else np.full(len(form_.names), nan)
    return LawFit(
        form=form_,
        values=values,
        intervals={name: (parameters[name]["low"], parameters[name]["high"]) for name in form_.names},
        se=dict(zip(form_.names, spread.tolist(), strict=True)),
        draws_RxP=draws,
        correlations_PxP=np.array(correlations, float),
        objective=float(entry["objective"]),
        rms=float(entry["rms"]),
        residuals=np.zeros(0),
        points=int(entry["points"]),
        clusters=int(entry["clusters"]),
        unidentified={name: parameters[name]["not_identified"] for name in form_.names if parameters[name]["not_identified"]},
        ranges=ranges,
        origin=entry["origin"],
        widen=float("inf") if entry["widen"] is None else float(entry["widen"]),
    )


def _parameter(name: str, stored: Mapping[str, Any]) -> Parameter:
    low, high = (float(end) for end in stored["bounds"])
    return Parameter(
        name, stored["unit"], stored["meaning"], stored["transform"], low, high, (float(stored["value"]),), stored["published"]
    )


def _function_record(function: Callable[..., Any]) -> dict[str, Any]:
    """A form's function by its name below scaling_jax.laws, and the arguments that a partial fixed."""
    fixed = {}
    if isinstance(function, functools.partial):
        fixed, function = dict(function.keywords), function.func
    package, _, module = function.__module__.rpartition(".")
    if package != _PACKAGE or "." in function.__qualname__:
        raise ValueError(f"{function.__module__}.{function.__qualname__} cannot be read back; must be a function of a module of {_PACKAGE}")
    return {"name": f"{module}.{function.__qualname__}", "with": fixed}


@functools.cache  # one object, and so one compiled program, for all laws of this function
def _function(name: str, fixed: str) -> Callable[..., Any]:
    module, _, function = name.partition(".")
    if not module.isidentifier() or not function.isidentifier():
        raise ValueError(f"no function {name!r}")
    try:
        found = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no function {name!r}") from error
    arguments = {key: _tuples(value) for key, value in json.loads(fixed).items()}
    return functools.partial(found, **arguments) if arguments else found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
