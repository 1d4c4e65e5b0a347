"""The key answers of a report: which numbers they are, in which words, and how well the data fix each."""

import re

import pandas
import pytest

from scaling_jax.laws.finding import Finding, Number
from scaling_jax.report.study.answers import key_answers
from scaling_jax.report.study.plot import Source


def answers(name, title, *numbers):
    """Rows of the table, cells as text."""
    finding = Finding(name, title, {}, None, list(numbers), [], pandas.DataFrame(), 5)
    page = key_answers(Source(pandas.DataFrame({"loss": [3.0]}), None, {name: finding}))
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in rows[1:]]


@pytest.mark.parametrize(
    ("name", "title", "number"),
    [
        ("lr_surface", "η*(B, T)", "B_crit ∝ T^p by surge"),
        ("batch_optimum", "B*(T)", "B* ∝ T^m"),
        ("critical_growth", "B_crit by tokens or by loss", "B_crit ∝ N^r at equal loss"),
        ("sensitivity", "Sensitivity", "sensitivity ∝ T^x"),
        ("width_equality", "Equality across widths", "slope of ln η* in ln width under mup"),
        ("kaplan_allocation", "allocation", "p of N ∝ C^p, measured"),
        ("chinchilla_2", "allocation", "a"),
        ("chinchilla_3", "L(N, D)", "D/N at 1e20 FLOP"),
    ],
)
def test_the_number_is_there_under_its_laws_title(name, title, number):
    (row,) = answers(name, title, Number(number, 0.5, 0.4, 0.6, published=1.0), Number("other", 1.0))[:1]
    assert row[0].lower().startswith(title.lower().replace("_", "")[:3]) and (title[0] != "η" or row[0][0] == "η")
    assert row[1:] == ["0.5", "0.4 to 0.6", "1", "identified"]


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (None, None, None, "not identified"),
        (0.5, None, None, "no interval"),
        (0.5, 0.4, None, "interval open"),
        (0.5, 0.01, 25.0, "to a factor of 50 either way"),
        (0.5, -1.0, 2.0, "identified"),
    ],
)
def test_how_well_a_number_is_known(value, low, high, said):
    (row,) = answers("batch_optimum", "B*(T)", Number("B* ∝ T^m", value, low, high))
    assert row[-1] == said and (value is not None or row[1] == "–")
