"""The key answers of a report: which numbers they are, in which words, and how well the data fix each; and which fits it says are used."""

import re

import numpy as np
import pandas
import pytest
from made_laws import findings
from worlds import World

from scaling_jax.laws import batch_optimum, chinchilla, critical_growth, lr_optimum, sensitivity
from scaling_jax.laws.finding import Finding, Number
from scaling_jax.report.study.answers import key_answers
from scaling_jax.report.study.fits import all_fits
from scaling_jax.report.study.plot import Source


def page_of(**found):
    return key_answers(Source(pandas.DataFrame({"loss": [3.0]}), None, found))


def rows_of(page):
    """Rows of the table, cells as text."""
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in rows[1:]]


def made(name, title, *numbers, statements=(), points=None):
    return Finding(name, title, {}, None, list(numbers), list(statements), pandas.DataFrame() if points is None else points, 5)


def answers(name, title, *numbers):
    return rows_of(page_of(**{name: made(name, title, *numbers)}))


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


def test_a_numbers_note_and_what_few_rows_do_to_it_stand_with_it():
    number = Number("D/N far out", 6.8, 5.0, 9.0, note="10 times the largest budget measured")
    rows = pandas.DataFrame({"params": 1e6, "tokens": 1e9, "flops": 6e15, "loss": np.linspace(2.0, 3.0, 48), "run": np.arange(48)})
    law = findings()["chinchilla_3"].fits["chinchilla_3"]._replace(residuals=np.linspace(0.01, 0.02, 48))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chinchilla, "fit", lambda *_, **__: law)
        said = chinchilla._outliers(rows, law)
    page = page_of(chinchilla_3=made("chinchilla_3", "L(N, D)", number, statements=["Of all.", *said]))
    assert rows_of(page)[0][0].endswith("D/N far out10 times the largest budget measured") and rows_of(page)[0][-1] == "identified"
    few = page.partition("What few rows decide")[2]
    assert "Without the 5 highest of 48 losses" in few and "D/N at" in few and "Of all" not in page


def lr_points(**more):
    points = pandas.DataFrame(
        {"params": 1e6, "batch_tokens": [1e4, 1e5], "tokens": 1e9, "lr": [0.01, 0.02], "loss": [3.0, 2.9], "lr_log_se": 0.1}
    )
    return made("lr_optimum", "η*", points=points.assign(**more))


def test_too_few_rates_are_no_answer():
    question, value, ends, known = rows_of(page_of(lr_optimum=lr_points(bound=["", "too few"])))[0]
    question, at, note = question.partition("B = 10k")
    assert at and (value, known) == ("0.01", "measured")
    assert ends == "0.00822 to 0.01217"  # 0.01·exp(±1.96·0.1)
    assert note == "1 other cell there with fewer than three rates that did not diverge"
    assert "fix none of the numbers" in page_of(lr_optimum=lr_points(bound="too few"))
    assert rows_of(page_of(lr_optimum=lr_points(bound=["", "high"])))[0][1:] == ["at least 0.02", "a bound: edge of the grid"]


def test_the_answers_of_a_planted_world_are_its_truth():
    world = World(seeds=1)
    table = world.table(0)
    analyses = [each for module in (lr_optimum, batch_optimum, critical_growth, sensitivity) for each in module.ANALYSES]
    found = {each.name: each.run(table) for each in analyses}
    rows = rows_of(key_answers(Source(table, table, found)))
    at = {row[0]: row for row in rows}
    t = np.asarray(world.horizons)
    (curvature,) = np.polyfit(np.log(t), np.log(world.curvature(t) * world.least_loss(t, world.params(45))), 1)[:1]
    truths = {
        r"B\* ∝ Tm": world.best_tokens_exponent,
        "tokens_exponent": world.noise_exponent,
        "∝ Nr at equal tokens": 0.0,
        "curvature ∝ Tx": curvature,
    }
    for pattern, truth in truths.items():
        (row,) = [row for name, row in at.items() if re.search(pattern, name)]
        low, high = (float(end.replace("−", "-")) for end in row[2].split(" to "))
        assert low - 0.02 < truth < high + 0.02 and high - low < 0.2 and row[4] == "identified", row
    for params in (world.params(32), world.params(64)):
        (row,) = [row for name, row in at.items() if f"T = 4.19M, N = {params / 1e3:.1f}k" in name]
        batch = float(row[0].rpartition(" = ")[2].replace(",", ""))
        assert abs(np.log(float(row[1]) / world.best_lr(batch, 2.0**22))) < 0.2
        assert abs(np.log2(batch / world.best_batch(2.0**22))) <= 1


def test_an_exponent_that_is_not_identified_is_no_answer():
    law = findings()["critical_growth"].fits["growth_tokens"]
    law = law._replace(unidentified={"tokens_exponent": "so it was made"})
    (row,) = rows_of(page_of(critical_growth=findings()["critical_growth"]._replace(fits={"growth_tokens": law})))
    assert row[1] == "–" and row[-1] == "not identified"


def test_fits_say_which_predicts_best_and_which_plans_use():
    surface = findings()["lr_surface"]

    def said(name, best="surge", fits=surface.fits, tied=()):
        found = surface._replace(name=name, best=best, fits=fits, comparison=surface.comparison._replace(best=best, tied=[best, *tied]))
        return dict(re.findall(r"<strong>(\w+)</strong>(?: – ([\w, ]+))?", all_fits({name: found})))

    assert said("lr_surface") == {"surge": "predicts best, used by plans", "power": ""}
    assert said("kaplan_n") == {"surge": "predicts best", "power": ""}
    assert said("lr_surface", tied=("power",)) == {"surge": "used by plans", "power": ""}
    growth = {"growth_tokens": surface.fits["surge"], "growth_loss": surface.fits["power"]}
    assert said("critical_growth", "growth_loss", growth) == {"growth_tokens": "used by plans", "growth_loss": "predicts best"}
