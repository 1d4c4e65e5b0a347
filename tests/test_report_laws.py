"""Fits as text: values with their intervals, no value for what is not identified, each reason once."""

import pandas
from made_laws import POWER, SURGE, fitted

from scaling_jax.laws.finding import Finding, Number
from scaling_jax.laws.lr_surface import bend_form, power_form
from scaling_jax.report.laws import interval, laws_text, number


def test_a_finding():
    surge, power = bend_form("surge", 1e9, (1e4, 1e6), 0.01), power_form(1e9, 1e5)
    ranges = {"batch_tokens": (1e4, 1e6), "tokens": (1e8, 1e10)}
    fits = {
        "surge": fitted(surge, SURGE, 0.02, ranges, unidentified=("batch_crit", "batch_crit_tokens_exponent")),
        "power": fitted(power, POWER, 0.02, ranges),
    }
    why = fits["surge"].unidentified["batch_crit"]
    numbers = [Number("known", 2.0, 1.0, None, "tokens", published=3.0), Number("other", None, note="why not")]
    text = laws_text(
        {
            "lr_surface": Finding("lr_surface", "η*(B, T)", fits, "power", numbers, [why, "a sentence"], pandas.DataFrame(), 7),
            "kaplan_d": "no data",
        }
    )
    lines = [line.split() for line in text.splitlines()]
    assert ["lr_surface", "η*(B,", "T)", "(7", "runs)"] in lines
    (row,) = [line for line in lines if line[:2] == ["surge", "lr_crit"]]
    assert row[2] == "0.01" and row[4] == "to" and float(row[3]) < 0.01 < float(row[5])
    (row,) = [line for line in lines if line[:2] == ["surge", "batch_crit"]]
    assert "1.000e+05" not in row and row[-2:] == ["not", "identified"]
    assert ["known", "2", "tokens", "1", "to", "∞", "3"] in lines and ["other", "unknown", "why", "not"] in lines
    assert text.count("so it was made") == 1 and "surge: batch_crit, batch_crit_tokens_exponent is not identified" in text
    assert "- a sentence" in text and text.endswith("- kaplan_d: no data")


def test_numbers():
    assert [number(value) for value in (0.0, 0.012345, 12345.6, 1e5, 9.9e-4, None)] == [
        "0",
        "0.01235",
        "1.235e+04",
        "1.000e+05",
        "9.900e-04",
        "∞",
    ]
    assert interval(None, 2.0) == "-∞ to 2" and interval(None, None) == ""
