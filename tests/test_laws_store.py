"""laws.json: what is written comes back, predictions and all, and what is none is refused by file and reason."""

import json

import numpy as np
import pandas
import pytest

from scaling_jax.errors import UserError
from scaling_jax.laws import catalogue, store

N_C, ALPHA = 8.8e13, 0.076


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    params = np.geomspace(1e5, 1e9, 12)
    return pandas.DataFrame({"params": params, "tokens": 1e10, "loss": (N_C / params) ** ALPHA * np.exp(0.01 * rng.normal(size=12))})


@pytest.fixture(scope="module")
def found(table):
    return catalogue.analyse(table, ["kaplan_n", "kaplan_d", "lr_optimum"])


def test_what_is_written_comes_back(table, found, tmp_path):
    path = tmp_path / "laws.json"
    store.write(path, store.record(table, found, "theirs.csv", {"model.width": 64}))
    laws = store.read(path)
    assert laws.data["path"] == "theirs.csv" and laws.data["rows"] == laws.data["finished"] == 12
    assert laws.base == {"model.width": 64} and laws.data["fingerprint"] == store.fingerprint(table)
    finding = found["kaplan_n"]
    assert set(laws.fits["kaplan_n"]) == set(finding.fits) and laws.statements["kaplan_n"] == finding.statements
    for name, fitted in finding.fits.items():
        again, x = laws.fits["kaplan_n"][name], {"params": np.array([1e7, 1e12])}
        np.testing.assert_allclose(again.predict(x), fitted.predict(x), rtol=1e-4)
        np.testing.assert_allclose(again.interval(x), fitted.interval(x), rtol=1e-3)
        assert again.intervals.keys() == fitted.intervals.keys() and again.unidentified == fitted.unidentified
        assert again.form.formula == fitted.form.formula and again.ranges == fitted.ranges
    assert laws.fit("kaplan_n") is laws.fits["kaplan_n"][finding.best]


def test_what_was_not_fitted_is_said_by_name(table, found, tmp_path):
    store.write(tmp_path / "laws.json", store.record(table, found, "theirs.csv", {}))
    laws = store.read(tmp_path / "laws.json")
    with pytest.raises(UserError, match="kaplan_d could not be fitted: .*data_tokens"):
        laws.fit("kaplan_d")
    with pytest.raises(UserError, match="has no chinchilla_3; scaling-jax fit --law=chinchilla_3"):
        laws.fit("chinchilla_3")


def test_the_fingerprint_is_of_the_values(table):
    assert store.fingerprint(table) == store.fingerprint(table.sample(frac=1, random_state=1)[["loss", "tokens", "params"]])
    changed = table.copy()
    changed.loc[3, "loss"] *= 1.0001
    assert store.fingerprint(table) != store.fingerprint(changed)


def test_a_study_keeps_what_all_its_rows_share(table, found):
    content = store.record(table.assign(parametrization="mup", width=[32, 64] * 6, context=64, status="finished"), found, "runs/x", {})
    assert content["study"] == {"parametrization": "mup", "context": 64}
    assert content["data"]["finished"] == 12
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no such file; scaling-jax fit"),
        (lambda c: None, "is no laws.json"),
        (lambda c: [1], "is no laws.json; must be what scaling-jax fit wrote"),
        (lambda c: c | {"format": "laws"}, "is no laws.json"),
        (lambda c: c | {"version": 2}, "is of version 2, this scaling_jax reads version 1; fit the laws again"),
        (lambda c: {key: value for key, value in c.items() if key != "laws"}, "damaged (KeyError: 'laws'); fit the laws again"),
        (lambda c: _with(c, "function", {"name": "os.system", "with": {}}), "damaged (ValueError: no function 'os.system')"),
        (lambda c: c | {"version": True}, "is of version True"),
        (lambda c: c | {"study": None}, "damaged (TypeError: data, study, base and not_fitted must be objects)"),
        (lambda c: c | {"laws": {"kaplan_n": c["laws"]["kaplan_n"] | {"best": "other"}}}, "kaplan_n has no fit 'other'"),
        (lambda c: _with(c, "function", {"name": "fit.np.load", "with": {}}), "damaged (ValueError: no function 'fit.np.load')"),
        (lambda c: _with(c, "function", {"name": "fit.fit", "with": {}}), "damaged (AttributeError: "),
        (lambda c: _with(c, "ranges", {"params": [0, 0]}), "damaged (ValueError: kaplan_n has ranges"),
        (lambda c: _with(c, "draws", ["1 2 3"]), "damaged (ValueError: "),
    ],
)
def test_what_is_no_laws_json_is_refused(table, found, tmp_path, change, message):
    path = tmp_path / "laws.json"
    if change is not None:
        path.write_text(json.dumps(change(store.record(table, found, "theirs.csv", {}))))
    with pytest.raises(UserError) as caught:
        store.read(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def _with(content, key, value):
    content = json.loads(json.dumps(content))
    content["laws"]["kaplan_n"]["fits"]["kaplan_n"][key] = value
    return content
