"""A law that was written is read back, and anything else in its place is refused by file and key."""

import json
import math

import numpy as np
import pytest

from scaling_jax.errors import UserError
from scaling_jax.laws.law_file import read_law, write_law
from scaling_jax.laws.power_law import PowerLaw, power_law

GOOD = {"definition": "branch", "exponent": 0.5, "log_scale": 2.0}


def test_what_was_written_is_read_back(tmp_path):
    x = np.geomspace(1e6, 1e9, 6)
    law = power_law(x, 5 * x**0.4 * [1.1, 0.9, 1.05, 1.0, 0.9, 1.1])
    write_law(tmp_path / "law.json", "preconditioned", law)
    assert read_law(tmp_path / "law.json") == ("preconditioned", law)
    assert json.loads((tmp_path / "law.json").read_text())["exponent"] == law.exponent
    with pytest.raises(ValueError, match="definition is 'loss'"):
        write_law(tmp_path / "law.json", "loss", law)


def test_a_law_without_errors_has_no_interval(tmp_path):
    (tmp_path / "law.json").write_text(json.dumps(GOOD))
    definition, law = read_law(tmp_path / "law.json")
    assert definition == "branch" and law.points == 0
    assert law(1e6) == pytest.approx(math.exp(2.0) * 1e3)
    assert np.isnan(law.interval(1e6)).all()
    write_law(tmp_path / "again.json", definition, law)
    assert read_law(tmp_path / "again.json")[1]._replace(exponent_se=0, centre=0, centre_se=0) == PowerLaw(0.5, 0, 2.0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds a JSON list; a law file holds an object"),
        ({"definition": "branch", "exponent": 0.5}, "log_scale is missing"),
        ({"exponent": 0.5, "log_scale": 1.0}, "definition is missing"),
        (GOOD | {"exponent": None}, "exponent is missing"),
        (GOOD | {"definition": "critical"}, "definition is 'critical'; it must be one of noise, preconditioned, tradeoff"),
        (GOOD | {"definition": ["branch"]}, "definition is ['branch']"),
        (GOOD | {"exponent": "0.5"}, "exponent is '0.5'; it must be a finite number"),
        (GOOD | {"exponent": True}, "exponent is True"),
        (GOOD | {"log_scale": 10**400}, "; it must be a finite number"),
        (GOOD | {"log_scale": math.inf}, "log_scale is inf"),
        (GOOD | {"centre_se": -1.0}, "centre_se is -1.0; a standard error is not negative"),
        (GOOD | {"points": 2.5}, "points is 2.5; it must be a number of measurements"),
        (GOOD | {"scale": 1.0}, "scale is no key of a law file"),
    ],
)
def test_bad_content(tmp_path, content, message):
    path = tmp_path / "law.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_law(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_absent(tmp_path):
    with pytest.raises(UserError, match="none.json cannot be read .No such file"):
        read_law(tmp_path / "none.json")
