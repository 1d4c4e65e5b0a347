"""The engine: against scipy's minimizers, closed forms, published fits, and laws that were planted."""

import os
from pathlib import Path

import numpy as np
import pytest
from jax import numpy as jnp

from scaling_jax.errors import UserError
from scaling_jax.laws.descent import descend
from scaling_jax.laws.fit import fit
from scaling_jax.laws.form import Form, Parameter
from scaling_jax.laws.observations import Observations

SHARED = Path(__file__).parents[1] / os.environ.get("SCALING_JAX_SHARED", "../shared")

LINE = Form(
    "line",
    "ln y = ln c + p·ln t",
    "test",
    "y",
    ("t",),
    (Parameter("c", "", "scale", "log", 1e-9, 1e9, (1.0,)), Parameter("p", "", "exponent", "plain", -5, 5, (0.0,))),
    lambda v, x: jnp.log(v["c"]) + v["p"] * jnp.log(x["t"]),
    huber_delta=1e3,
)
BEND = Form(
    "bend",
    "c·t / (t + k)",
    "test",
    "y",
    ("t",),
    (Parameter("c", "", "plateau", "log", 1e-9, 1e9, (1.0, 1e3)), Parameter("k", "", "bend", "log", 1e-6, 1e6, (1.0, 1e3))),
    lambda v, x: jnp.log(v["c"]) + jnp.log(x["t"] / (x["t"] + v["k"])),
    huber_delta=1e-3,
)


def planted(form, truth, t, sd, rng, clusters=None):
    y = form.predict(truth, {"t": t}) * np.exp(sd * rng.normal(size=len(t)))
    return Observations({"t": t}, y, np.arange(len(t)) if clusters is None else clusters, "planted")


def test_a_straight_line_is_least_squares_and_its_interval_students():
    stats = pytest.importorskip("scipy.stats")
    t = np.geomspace(1, 1000, 12)
    found, known, widths = [], [], []
    for seed in range(60):
        data = planted(LINE, {"c": 3.0, "p": 0.5}, t, 0.1, np.random.default_rng(seed))
        fitted, line = fit(LINE, data, seed=seed), stats.linregress(np.log(t), np.log(data.y))
        found.append((np.log(fitted.values["c"]), fitted.values["p"]))
        known.append((line.intercept, line.slope))
        low, high = fitted.intervals["p"]
        widths.append((high - low) / (2 * stats.t.ppf(0.975, 10) * line.stderr))
        assert fitted.rms == pytest.approx(np.sqrt(np.mean((np.log(data.y) - line.intercept - line.slope * np.log(t)) ** 2)))
    np.testing.assert_allclose(found, known, atol=1e-6)
    assert np.mean(widths) == pytest.approx(1.0, abs=0.12)


def test_the_huber_objective_is_minimized_as_scipy_does():
    minimize = pytest.importorskip("scipy.optimize").minimize
    t, rng = np.geomspace(0.01, 100, 25), np.random.default_rng(1)
    data = planted(BEND, {"c": 5.0, "k": 2.0}, t, 0.05, rng)
    data.y[3] *= 3  # an outlier

    def objective(fitted, delta):
        size = np.abs(np.log(data.y) - fitted[0] - np.log(t / (t + np.exp(fitted[1]))))
        return np.sum(np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)))

    for delta in (1e-3, 0.05, 10.0):
        fitted = fit(BEND, data, huber_delta=delta, resamples=0)
        least = min(
            minimize(objective, start, delta, "Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}).fun for start in [(1, 1), (2, 0)]
        )
        assert fitted.objective == pytest.approx(least, rel=1e-6)
        assert objective(np.log([fitted.values["c"], fitted.values["k"]]), delta) == pytest.approx(fitted.objective, rel=1e-9)
    assert fitted.intervals == {"c": (None, None), "k": (None, None)} and fitted.identified  # without resamples nothing is judged


def test_an_outlier_moves_hubers_fit_little():
    data = planted(LINE, {"c": 3.0, "p": 0.5}, np.geomspace(1, 1000, 20), 0.01, np.random.default_rng(2))
    data.y[-1] *= 5
    assert abs(fit(LINE, data, huber_delta=1e-2).values["p"] - 0.5) < 0.005 < abs(fit(LINE, data).values["p"] - 0.5) / 3


def test_runs_are_resampled_whole():
    """Eight runs of ten points each share their error: an interval from points would be √10 too narrow."""
    rng, t = np.random.default_rng(3), np.tile(np.geomspace(1, 10, 10), 8)
    runs = np.repeat(np.arange(8), 10)
    covered, middle = {"runs": 0, "points": 0}, {"t": np.array([np.exp(np.log(t).mean())])}
    for seed in range(100):
        data = planted(LINE, {"c": 3.0, "p": 0.5}, t, 0.02, rng)
        data = data._replace(y=data.y * np.exp(0.2 * rng.normal(size=8))[runs])
        for name, clusters in (("runs", runs), ("points", np.arange(80))):
            low, high = fit(LINE, data._replace(cluster=clusters), seed=seed, resamples=200).interval(middle)
            covered[name] += low[0] < 3.0 * middle["t"][0] ** 0.5 < high[0]
    assert covered["runs"] >= 89 and covered["points"] <= 60


def test_what_the_data_do_not_fix_is_said():
    t = np.geomspace(1e-4, 1e-2, 20)  # far below the bend, the form is c/k·t: only the ratio shows
    fitted = fit(BEND, planted(BEND, {"c": 5.0, "k": 2.0}, t, 0.02, np.random.default_rng(4)))
    assert "k" in fitted.unidentified and fitted.intervals["k"][1] is None
    assert "k is not identified" in fitted.unidentified["k"]
    low, high = fitted.interval({"t": np.array([1e-3])})  # what is predicted within the range is known all the same
    assert high[0] / low[0] < 1.05 and low[0] < 5 / 2 * 1e-3 < high[0]
    assert abs(fitted.correlations_PxP[0, 1]) > 0.99
    wide = fit(BEND, planted(BEND, {"c": 5.0, "k": 2.0}, np.geomspace(1e-2, 1e2, 20), 0.02, np.random.default_rng(5)))
    assert wide.identified and wide.intervals["k"][0] < 2.0 < wide.intervals["k"][1]
    assert wide.inside({"t": 1.0}) and not wide.inside({"t": 200.0})


def test_few_runs_have_no_interval_or_a_wide_one():
    rng, t = np.random.default_rng(6), np.geomspace(1, 100, 12)
    data = planted(BEND, {"c": 5.0, "k": 9.0}, t, 0.02, rng, clusters=np.arange(12) % 3)
    assert fit(BEND, data).intervals["k"][0] is not None
    three = Form(**(BEND._asdict() | {"parameters": (*BEND.parameters, Parameter("idle", "", "", "plain", -1, 1, (0.0,)))}))
    fitted = fit(three, data)
    assert fitted.intervals["k"] == (None, None) and "3 independent runs, and 3 parameters need at least 4" in fitted.unidentified["k"]
    assert np.isnan(fitted.interval({"t": t})[0]).all()


def test_planted_bend_is_found_from_bad_starts_at_once():
    """Every start of a grid is descended in one call, those that fail cost nothing."""
    t = np.geomspace(1e-2, 1e2, 30)
    data = planted(BEND, {"c": 5.0, "k": 2.0}, t, 0.0, np.random.default_rng(7))
    starts = np.array([(c, k) for c in (1e-8, 1e-2, 1e8) for k in (1e-5, 1e5)])
    assert fit(BEND, data, starts=starts, resamples=0).values == pytest.approx({"c": 5.0, "k": 2.0}, rel=1e-5)
    done = []
    descend(BEND, {"t": t}, np.log(data.y)[None], np.ones((1, 30)), BEND.transformed(np.tile(starts, (50, 1))), 1e-3, 5, done.append)
    assert done == [256, 300]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d._replace(x={"t": d.x["t"][:2]}, y=d.y[:2], cluster=d.cluster[:2]),
            "2 points cannot fix 2 parameters (c, p); at least 3",
        ),
        (lambda d: d._replace(cluster=np.arange(10) % 2), "its 10 points come from 2 independent runs; at least 3"),
        (lambda d: d._replace(y=np.where(np.arange(10) == 4, -1.0, d.y)), "y is -1 in point 5; must be a positive number"),
        (lambda d: d._replace(x={"t": np.where(np.arange(10) == 2, np.nan, d.x["t"])}), "t is nan in point 3; must be a positive number"),
    ],
)
def test_faulty_observations(change, message):
    data = planted(LINE, {"c": 3.0, "p": 0.5}, np.geomspace(1, 100, 10), 0.1, np.random.default_rng(8))
    with pytest.raises(UserError) as caught:
        fit(LINE, change(data))
    assert message in str(caught.value)


def test_plain_residuals():
    plain = LINE._replace(space="plain", function=lambda v, x: v["c"] + v["p"] * x["t"], huber_delta=1e3)
    t = np.linspace(-1, 1, 15)
    data = Observations({"t": t + 2}, -4 + 2.5 * (t + 2), np.arange(15), "planted")
    fitted = fit(plain._replace(parameters=(plain.parameters[0]._replace(transform="plain", low=-1e3), plain.parameters[1])), data)
    assert fitted.values == pytest.approx({"c": -4.0, "p": 2.5}, abs=1e-6)
    np.testing.assert_allclose(fitted.predict({"t": t + 2}), data.y, atol=1e-6)


def test_constants_are_no_part_of_the_function():
    scaled = LINE._replace(function=_scaled, constants=(("t_0", 30.0),))
    data = planted(LINE, {"c": 3.0, "p": 0.5}, np.geomspace(1, 100, 10), 0.05, np.random.default_rng(9))
    fitted, plain = fit(scaled, data), fit(LINE, data)
    assert fitted.values["p"] == pytest.approx(plain.values["p"], rel=1e-6)
    assert fitted.values["c"] == pytest.approx(plain.values["c"] * 30 ** plain.values["p"], rel=1e-6)
    np.testing.assert_allclose(fitted.predict({"t": [200.0]}), plain.predict({"t": [200.0]}), rtol=1e-6)
    np.testing.assert_allclose(fitted.interval({"t": [200.0]}), plain.interval({"t": [200.0]}), rtol=1e-3)


def _scaled(v, x):
    return jnp.log(v["c"]) + v["p"] * jnp.log(x["t"] / v["t_0"])


TWO = Form(
    "two",
    "c·t^p·u^q",
    "test",
    "y",
    ("t", "u"),
    (*LINE.parameters, Parameter("q", "", "", "plain", -5, 5, (0.0,))),
    lambda v, x: jnp.log(v["c"]) + v["p"] * jnp.log(x["t"]) + v["q"] * jnp.log(x["u"]),
    huber_delta=1e3,
)


def test_powers_of_inputs_that_rise_together_are_not_told_apart():
    rng, t = np.random.default_rng(10), np.geomspace(1, 1000, 15)
    for scatter, told in ((0.0, False), (0.02, True)):
        u = 20 * t * np.exp(scatter * rng.normal(size=15))
        data = Observations({"t": t, "u": u}, 3 * t**0.8 * u**-0.3 * np.exp(1e-4 * rng.normal(size=15)), np.arange(15), "planted")
        fitted = fit(TWO, data)
        assert fitted.identified == told
        low, high = fitted.interval({"t": np.array([30.0, 30.0]), "u": np.array([600.0, 6000.0])})
        assert high[0] / low[0] < 1.001  # on the line the law is known
        if told:
            assert fitted.intervals["q"][0] < -0.3 < fitted.intervals["q"][1]
        else:
            assert set(fitted.unidentified) == {"c", "p", "q"} and fitted.intervals["p"] == (None, None)
            assert "only together with" in fitted.unidentified["p"] and high[1] / low[1] > 1e3  # off it nothing is


def test_what_nothing_depends_on_is_not_identified():
    idle = TWO._replace(function=lambda v, x: jnp.log(v["c"]) + v["p"] * jnp.log(x["t"]) + 0 * v["q"])
    t = np.geomspace(1, 1000, 15)
    fitted = fit(idle, Observations({"t": t, "u": t}, 3 * t**0.8, np.arange(15), "planted"))
    assert fitted.unidentified == {"q": "q is not identified: nothing in the data depends on it"}


def test_predictions_in_range_stay_known_along_a_curved_valley():
    """Over a factor 4 of t, E + A·t^-α is known but E, A and α are not: parameters range widely, predictions do not."""
    curved = Form(
        "curved", "E + A/t^α", "test", "y", ("t",),
        (Parameter("E", "", "", "log", 1e-6, 1e3, (0.5, 1.5)), Parameter("A", "", "", "log", 1e-6, 1e9, (1.0, 100.0)),
         Parameter("alpha", "", "", "plain", -1, 3, (0.1, 0.5))),
        lambda v, x: jnp.log(v["E"] + v["A"] * x["t"] ** -v["alpha"]), huber_delta=1e3,
    )  # fmt: skip
    t = np.geomspace(100, 400, 9)
    widths, inside = [], 0
    for seed in range(20):
        fitted = fit(curved, planted(curved, {"E": 1.5, "A": 20.0, "alpha": 0.5}, t, 0.003, np.random.default_rng(seed)), seed=seed)
        low, high = fitted.interval({"t": np.array([200.0])})
        truth = 1.5 + 20 / np.sqrt(200)
        widths.append(np.log(high[0] / low[0]))
        inside += low[0] < truth < high[0]
    assert inside >= 17 and np.median(widths) < 0.01  # 2·2.45·0.003/√9 is 0.005, of a line


def test_along_a_curved_valley_predictions_are_known_in_range_and_open_beyond():
    """Two sizes leave A and α of E + A/N^α + B/T^β free together: known where measured, unknown at another size."""
    from scaling_jax.laws.chinchilla_form import QUICK

    sizes, tokens = (a.ravel() for a in np.meshgrid([1e6, 4e6], np.geomspace(1e7, 1e9, 8)))
    truth = {"A": 400.0, "B": 400.0, "E": 1.7, "alpha": 0.34, "beta": 0.28}
    x = {"params": sizes, "tokens": tokens}
    rng = np.random.default_rng(11)
    fitted = fit(QUICK, Observations(x, QUICK.predict(truth, x) * np.exp(1e-3 * rng.normal(size=16)), np.arange(16), "planted"))
    assert {"A", "alpha"} <= set(fitted.unidentified)
    asked = {"params": np.array([4e6, 4e8]), "tokens": np.array([3e8, 3e8])}
    low, high = fitted.interval(asked)
    inside, beyond = QUICK.predict(truth, asked)
    assert low[0] < inside < high[0] and high[0] / low[0] < 1.01
    assert low[1] < beyond < high[1] and high[1] / low[1] > 1.03
