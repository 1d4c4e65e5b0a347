"""Figures of laws, from findings that were made: what is drawn is what they say."""

import io
import re

import numpy as np
import pandas
import pytest
from made_laws import BATCHES, PARAMS, POWER, SURGE, T0, TOKENS, fitted

from scaling_jax.errors import UserError
from scaling_jax.laws import kaplan_forms
from scaling_jax.laws.chinchilla_form import BESIROGLU, CHINCHILLA
from scaling_jax.laws.finding import Finding, Number
from scaling_jax.laws.lr_surface import bend_form, power_form
from scaling_jax.laws.powers import Power, product_form
from scaling_jax.report.study import batch, compute, curves, lr, scaling, width
from scaling_jax.report.study.answers import what_was_run
from scaling_jax.report.study.plot import Source

ND = {"n_c": 6.4e13, "alpha_n": 0.076, "d_c": 1.8e13, "alpha_d": 0.103}
NS = {"n_c": 6.5e13, "alpha_n": 0.077, "s_c": 2.1e3, "alpha_s": 0.76}


def drawn(plot):
    """The matplotlib figure of a plot, drawn once."""
    import matplotlib.figure

    kept = []
    init = matplotlib.figure.Figure.__init__

    def remember(self, *args, **options):
        init(self, *args, **options)
        kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "__init__", remember)
        plot.save({"png": io.BytesIO()})
    return kept[0]


def lines(axes):
    return {line.get_label(): np.asarray(line.get_xydata(), float) for line in axes.lines}


def finding(name, points, fits=None, best=None, numbers=(), statements=("Said.",), comparison=None):
    return Finding(name, name, fits or {}, best, list(numbers), list(statements), pandas.DataFrame(points), 12, comparison)


def source(rows, **findings):
    rows = pandas.DataFrame(rows)
    return Source(rows, rows, findings)


def grid_rows(**more):
    n, t = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e8, 4), np.geomspace(1e8, 1e10, 5), indexing="ij"))
    loss = CHINCHILLA.predict(BESIROGLU, {"params": n, "tokens": t})
    return {"params": n, "tokens": t, "loss": loss} | more


def test_sizes_collapse_onto_the_curve_of_their_law():
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e9, 4), np.geomspace(1e8, 1e11, 5)))
    loss = ((ND["n_c"] / n) ** (ND["alpha_n"] / ND["alpha_d"]) + ND["d_c"] / d) ** ND["alpha_d"]
    law = fitted(kaplan_forms.ND, ND, 0.01, {"params": PARAMS, "data_tokens": TOKENS})
    points = {"params": n, "data_tokens": d, "loss": loss, "censored": np.arange(20) == 3}
    plot = scaling.collapse(source(grid_rows(), kaplan_nd=finding("kaplan_nd", points, {"kaplan_nd": law}, "kaplan_nd")))
    assert np.allclose(plot.data["ratio"], (1 + plot.data["shortage"]) ** ND["alpha_d"], rtol=1e-9)
    assert "20 tuned losses, 1 of them (hollow) not fitted of 4 sizes" in plot.caption and "alpha_n = 0.076" in plot.caption
    axes = drawn(plot).axes[0]
    assert np.allclose(lines(axes)["N = 1M"], plot.data[plot.data["params"] == 1e6][["shortage", "ratio"]])
    unknown = fitted(kaplan_forms.ND, ND, 0.01, {}, unidentified=("n_c",))
    with pytest.raises(UserError, match="not identified: n_c"):
        scaling.collapse(source(grid_rows(), kaplan_nd=finding("kaplan_nd", points, {"kaplan_nd": unknown})))


def test_learning_curves_follow_their_law():
    n, s = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e9, 3), np.geomspace(1e2, 1e5, 6)))
    loss = (NS["n_c"] / n) ** NS["alpha_n"] + (NS["s_c"] / s) ** NS["alpha_s"]
    law = fitted(kaplan_forms.NS, NS, 0.01, {})
    plot = scaling.of_steps(
        source(grid_rows(), kaplan_ns=finding("kaplan_ns", {"params": n, "min_steps": s, "loss": loss}, {"kaplan_ns": law}, "kaplan_ns"))
    )
    of = plot.data[plot.data["what"] == "fit"]
    expected = (NS["n_c"] / of["params"]) ** NS["alpha_n"] + (NS["s_c"] / of["min_steps"]) ** NS["alpha_s"]
    assert set(of["params"]) == set(n) and np.allclose(of["loss"], expected, rtol=1e-9)
    assert "18 tuned losses of 3 sizes" in plot.caption


@pytest.mark.parametrize(("make", "law", "x"), [(scaling.of_size, "kaplan_n", "params"), (scaling.of_data, "kaplan_d", "data_tokens")])
def test_a_law_of_one_variable_with_its_rival(make, law, x):
    forms = (kaplan_forms.N, kaplan_forms.N_FLOOR) if x == "params" else (kaplan_forms.D, kaplan_forms.D_FLOOR)
    values = dict(zip(forms[1].names, (1e13, 0.1, 1.5), strict=True))
    fits = {
        form.name: fitted(
            form, {n: values[n] for n in form.names}, 0.01, {}, unidentified=forms[1].names[2:] if "floor" in form.name else ()
        )
        for form in forms
    }
    at = np.geomspace(1e6, 1e9, 5)
    points = {x: at, "loss": (1e13 / at) ** 0.1, "censored": [True, *[False] * 4]}
    plot = make(source(grid_rows(), **{law: finding(law, points, fits, law)}))
    of = plot.data[(plot.data["what"] == "fit") & (plot.data["form"] == law)]
    assert np.allclose(of["loss"], (1e13 / of[x]) ** 0.1) and (of["low"] < of["high"]).all()
    marks = lines(drawn(plot).axes[0])
    assert len(marks["measured"]) == 4 and len(marks["not fitted"]) == 1 and f"{law}_floor (not identified)" in marks
    with pytest.raises(UserError, match="one subset"):
        make(source(grid_rows(), **{law: "it has one subset"}))


def test_the_frontier_is_drawn_and_missing_laws_say_why():
    points = {"flops": [1e15, 1e16, 1e17], "params": [1e6] * 3, "loss": [4.0, 3.0, 2.5], "censored": [True, False, False]}
    law = fitted(kaplan_forms.C, {"c_c": 1e7, "alpha_c": 0.05}, 0.01, {})
    plot = scaling.of_compute(source(grid_rows(), kaplan_c=finding("kaplan_c", points, {"kaplan_c": law}, "kaplan_c")))
    lowest = plot.data[plot.data["what"] == "lowest"]
    assert np.allclose(lowest["flops"], 6 * np.repeat(np.geomspace(1e6, 1e8, 4), 5) * np.tile(np.geomspace(1e8, 1e10, 5), 4))
    marks = lines(drawn(plot).axes[0])
    assert marks["frontier, fitted"].tolist() == [[1e16, 3.0], [1e17, 2.5]] and "3 points, 1 of them" in plot.caption
    plain = scaling.of_compute(source(grid_rows(), kaplan_c="needs 3 sizes"))
    assert "No law of the frontier is fitted: needs 3 sizes." in plain.caption


def test_allocation_by_closed_form_has_the_least_loss():
    law = fitted(CHINCHILLA, BESIROGLU, 0.002, {"params": PARAMS, "tokens": TOKENS})
    points = {"params": [1e6, 1e8], "tokens": [1e8, 1e10], "flops": [6e14, 6e18], "loss": [4.0, 2.5], "censored": False}
    a = Number("a", 0.51, 0.49, 0.53)
    measured = {"flops": [1e15, 1e16], "params": [1e6, 3e6], "tokens": [1.7e8, 5.6e8], "censored": [False, True]}
    found = {
        "chinchilla_3": finding("chinchilla_3", points, {"chinchilla_3": law}, "chinchilla_3", [a]),
        "chinchilla_2": finding("chinchilla_2", measured),
    }
    plot = compute.allocation(source(grid_rows(), kaplan_allocation="needs sizes", **found))
    of = plot.data[plot.data["way"] == "chinchilla_3"]
    assert np.allclose(6 * of["params"] * of["tokens"], of["flops"])

    def loss(n, flops):
        return CHINCHILLA.predict(BESIROGLU, {"params": n, "tokens": flops / (6 * n)})

    best = loss(of["params"], of["flops"])
    assert all((best <= loss(of["params"] * factor, of["flops"]) + 1e-12).all() for factor in (0.8, 0.98, 1.02, 1.25))
    assert "N_opt ∝ C^0.51 (95%: 0.49 to 0.53)" in plot.caption and "Chinchilla 2, equal compute: 1 budgets, 1 bounds" in plot.caption
    with pytest.raises(UserError, match="kaplan_allocation: needs sizes; chinchilla_1: was not analysed"):
        compute.allocation(source(grid_rows(), kaplan_allocation="needs sizes"))


def test_domains_stand_beside_the_same_loss():
    rows = grid_rows()
    rows |= {"loss_news": rows["loss"] + 0.25, "loss_news_stderr": 0.1, "loss_code": np.nan}
    plot = compute.transfer_offset(source(rows))
    assert set(plot.data["domain"]) == {"news"} and np.allclose(plot.data["domain_loss"] - plot.data["loss"], 0.25)
    assert "news 0.25" in plot.caption
    with pytest.raises(UserError, match="no losses on further domains"):
        compute.transfer_offset(source(grid_rows()))


@pytest.mark.parametrize("name", ["surge", "plateau"])
def test_the_bend_of_a_form_is_its_critical_batch(name):
    law = fitted(bend_form(name, T0, BATCHES, 0.01), SURGE, 0.02, {"batch_tokens": BATCHES, "tokens": TOKENS})
    tokens = np.geomspace(1e8, 1e10, 7)
    truth = SURGE["batch_crit"] * (tokens / T0) ** SURGE["batch_crit_tokens_exponent"]
    assert np.allclose(batch.bend(law.predict, name, tokens, np.nan), truth, rtol=1e-6)
    at = law.form.names.index("batch_crit"), law.form.names.index("batch_crit_tokens_exponent")
    drawn_truth = law.draws_RxP[:, at[0], None] * (tokens / T0) ** law.draws_RxP[:, at[1], None]
    assert np.allclose(batch.bend(law.draw_predictions, name, tokens, np.nan), drawn_truth, rtol=1e-6)


def noise_rows(power=0.5):
    n, t = (a.ravel() for a in np.meshgrid([1e6, 4e6], np.geomspace(1e8, 1e10, 4), indexing="ij"))
    rows = pandas.DataFrame({"params": n, "tokens": t, "loss": 5 - 0.1 * np.log(t), "batch_tokens": 1e5, "lr": 0.01})
    value = 1e5 * (t / 1e9) ** power
    rows = rows.assign(noise_scale_tokens=value, noise_scale_tokens_low=value / 2, noise_scale_tokens_high=value * 2)
    worse = rows.assign(loss=rows["loss"] + 1, noise_scale_tokens=value * 50)  # of a run that was not the best
    return pandas.concat([rows, worse], ignore_index=True)


def test_the_critical_batch_is_that_of_the_best_runs():
    plot = batch.critical_batch(source(noise_rows()))
    of = plot.data[plot.data["definition"] == "noise"]
    assert len(of) == 8 and np.allclose(of["batch_tokens"], 1e5 * (of["tokens"] / 1e9) ** 0.5) and np.allclose(of["high"] / of["low"], 4)
    assert "noise T^0.50" in plot.caption and "by 1 definition" in plot.caption
    with pytest.raises(UserError, match="no noise scale, and no form"):
        batch.critical_batch(source(grid_rows()))


def test_the_noise_scale_grows_with_the_power_of_its_medians():
    rows = noise_rows(0.7)
    rows = rows[rows.index < 8]
    assert "tr Σ / |G|²: T^0.70 ± 0.00" in curves.noise_scale(source(rows)).caption
    preconditioned = rows.assign(preconditioned_noise_scale_tokens=1e4)
    figure = drawn(curves.noise_scale(source(preconditioned)))
    assert [axes.get_title("left") for axes in figure.axes] == ["tr Σ / |G|²", "preconditioned"]
    with pytest.raises(UserError, match="no noise_scale_tokens"):
        curves.noise_scale(source(grid_rows()))


BEST = {
    "params": [1e6] * 3,
    "tokens": [1e8, 1e9, 1e10],
    "batch_tokens": [1e4, 3e4, 5e4],
    "batch_log_se": [0.1, np.nan, np.nan],
    "bound": ["", "", "high"],
}


def test_best_batches_with_their_bounds():
    at = Power("tokens", "tokens_exponent", "T", T0)
    law = fitted(
        product_form("batch_optimum", "batch_tokens", "B*", "tokens", [at], "made", 0.2, scale="batch"),
        {"batch": 3e4, "tokens_exponent": 0.4},
        0.05,
        {},
    )
    rows = grid_rows(batch_tokens=1e4)
    plot = batch.best_batch(
        source(rows, batch_optimum=finding("b", BEST, {"batch_optimum": law}, "batch_optimum", [Number("B* ∝ T^m", 0.4, 0.3, 0.5)]))
    )
    assert "2 minima" in plot.caption and "1 bounds" in plot.caption and "T^0.40 (95%: 0.30 to 0.50)" in plot.caption
    line = plot.data[plot.data["what"] == "fit"]
    assert np.allclose(line["batch_tokens"], 3e4 * (line["tokens"] / T0) ** 0.4)
    open_marks = [line for line in drawn(plot).axes[0].lines if line.get_markerfacecolor() == "none"]
    assert [line.get_xydata().tolist() for line in open_marks] == [[[1e10, 5e4]]] and open_marks[0].get_marker() == "^"
    nothing = batch.best_batch(source(rows, batch_optimum=finding("b", BEST | {"bound": ["low"] * 3}, {"batch_optimum": law})))
    assert "No power law is identified" in nothing.caption and "0 minima" in nothing.caption


def test_the_regret_of_a_batch():
    points = pandas.DataFrame(
        {
            "params": 1e6,
            "batch_tokens": [1e4, 1e5] * 2,
            "tokens": [1e8, 1e8, 1e9, 1e9],
            "regret": [0.01, 0.2, 0.03, 0.1],
            "low": 0.0,
            "high": 0.3,
            "censored": False,
        }
    )
    plot = batch.regret(source(grid_rows(), batch_regret=finding("r", points)))
    assert "0.03 nats at B = 10k and 0.1 nats at B = 100k" in plot.caption
    assert plot.caption.endswith("if the best batch grows, small batches lose more as T grows, and large ones less.")
    assert np.allclose(lines(drawn(plot).axes[0])["B = 100k"], [[1e8, 0.2], [1e9, 0.1]])
    with pytest.raises(UserError, match="fewer than two horizons"):
        batch.regret(source(grid_rows(), batch_regret=finding("r", points.assign(censored=points["tokens"] > 1e8))))


def test_sensitivity_by_size():
    points = pandas.DataFrame(
        {
            "params": [1e6, 1e6, 4e6, 4e6],
            "tokens": [1e8, 1e9] * 2,
            "curvature": [0.4, 0.2, 0.4, 0.2],
            "sensitivity": [0.1, np.nan] * 2,
            "range_of_lr": 8.0,
        }
    )
    plot = width.sensitivity(source(grid_rows(), sensitivity=finding("s", points)))
    figure = drawn(plot)
    assert len(figure.axes) == 2 and "within a factor 8 about η*" in plot.caption
    assert lines(figure.axes[1])["N = 1M"].tolist() == [[1e8, 0.4], [1e9, 0.2]]
    bare = width.sensitivity(source(grid_rows(), sensitivity=finding("s", points.drop(columns="sensitivity"))))
    assert len(drawn(bare).axes) == 1


def test_growth_by_tokens_and_by_loss():
    rows = noise_rows()
    points = rows.iloc[:8][["params", "tokens", "loss"]].assign(
        batch_crit_tokens=rows["noise_scale_tokens"], censored=[True, *[False] * 7], definition="noise"
    )
    form = product_form(
        "growth_tokens",
        "batch_crit_tokens",
        "B_crit",
        "tokens",
        [Power("tokens", "tokens_exponent", "T", T0)],
        "made",
        0.1,
        scale="batch_crit",
    )
    law = fitted(form, {"batch_crit": 1e5, "tokens_exponent": 0.5}, 0.02, {})
    figure = drawn(
        plot := width.growth(source(rows, critical_growth=finding("g", points, {"growth_tokens": law}, statements=["Tokens collapse."])))
    )
    assert len(plot.data) == 7 and "Tokens collapse." in plot.caption
    line = lines(figure.axes[0])["one law for all sizes"]
    assert np.allclose(line[:, 1], 1e5 * (line[:, 0] / T0) ** 0.5) and figure.axes[1].xaxis_inverted()


def transfer_rows(ways):
    parts = []
    for way, move in ways.items():
        for w in (32, 64, 128):
            lr_ = np.geomspace(1e-3, 1e-1, 9)
            best = 1e-2 * (w / 64) ** move
            parts.append(
                pandas.DataFrame(
                    {
                        "parametrization": way,
                        "width": w,
                        "params": 1e3 * w**2,
                        "batch_tokens": 1e4,
                        "tokens": 1e8,
                        "lr": lr_,
                        "loss": 3 + 0.1 * np.log(lr_ / best) ** 2 - w / 1e3,
                    }
                )
            )
    return pandas.concat(parts, ignore_index=True)


def test_transfer_has_a_panel_for_each_parametrization():
    rows = transfer_rows({"mup": 0.0, "standard": -1.0})
    rows = pandas.concat([rows, rows.assign(loss=rows["loss"] + 0.2)], ignore_index=True)  # another seed
    plot = width.transfer(source(rows))
    figure = drawn(plot)
    assert [axes.get_title("left") for axes in figure.axes] == [
        "mup, B = 10k, T = 100M",
        "standard, B = 10k, T = 100M",
    ]
    means = plot.data[plot.data["what"] == "mean loss"]
    assert means["loss"].min() == pytest.approx(3 + 0.1 - 0.128) and (means["runs"] == 2).all()
    assert "Diamonds are lowest losses" in plot.caption
    lowest = plot.data[plot.data["what"] == "lowest"]  # without the analysis only lowest losses are known
    moves = lowest.groupby("panel")["lr"].agg(lambda of: of.iloc[0] / of.iloc[-1])
    assert moves.iloc[0] == pytest.approx(1.0) and 2 < moves.iloc[1] < 6
    optima = rows.drop_duplicates(["parametrization", "width"]).assign(lr=[1e-2] * 3 + [2e-2, 1e-2, 5e-3], loss=2.9, bound="")
    plot = width.transfer(source(rows, lr_optimum=finding("lr_optimum", optima)))
    joined = [[line.get_xdata().tolist() for line in axes.lines if line.get_linestyle() == "--"] for axes in drawn(plot).axes]
    assert joined == [[[1e-2] * 3], [[2e-2, 1e-2, 5e-3]]]
    assert "At standard, B = 10k, T = 100M the minimum goes from η = 0.02 at width 32 to 0.005 at width 128." in plot.caption
    assert "Diamonds" not in plot.caption
    few = optima.assign(bound=np.where(optima["width"] == 32, "too few", ""))
    marks = width.transfer(source(rows, lr_optimum=finding("lr_optimum", few))).data.query("what != 'mean loss'")
    assert (marks["what"] == np.where(marks["width"] == 32, "lowest", "minimum")).all() and len(marks) == 6
    with pytest.raises(UserError, match="one width"):
        width.transfer(source(rows[rows["width"] == 32]))


def test_rivals_of_other_forms_are_dashed_and_unfitted_surfaces_say_why():
    cells = pandas.DataFrame(
        {
            "params": 1e6,
            "batch_tokens": [1e4, 1e5, 1e6],
            "tokens": 1e9,
            "lr": [0.004, 0.01, 0.006],
            "lr_log_se": [0.1, 0.1, np.nan],
            "loss": 3.0,
            "bound": ["", "", "low"],
            "runs": 5,
        }
    )
    reach = {"batch_tokens": BATCHES, "tokens": TOKENS}
    fits = {
        "surge": fitted(bend_form("surge", T0, BATCHES, 0.01), SURGE, 0.02, reach),
        "power": fitted(power_form(T0, 1e5), POWER, 0.02, reach),
    }
    plot = lr.lr_against_batch(source(grid_rows(), lr_optimum=finding("o", cells), lr_surface=finding("s", cells, fits, "surge")))
    styles = {line.get_label(): line.get_linestyle() for line in drawn(plot).axes[0].lines}
    assert styles["surge"] == "-" and styles["power"] == "--" and "2 minima with 95% intervals and 1 bounds" in plot.caption
    plain = lr.lr_against_batch(source(grid_rows(), lr_optimum=finding("o", cells), lr_surface="too few batch sizes"))
    assert "No form is fitted: too few batch sizes." in plain.caption
    with pytest.raises(UserError, match="one batch size"):
        lr.lr_against_batch(source(grid_rows(), lr_optimum=finding("o", cells[:1])))


def test_sizes_that_differ_by_less_than_a_thousandth_are_one():
    rows = pandas.DataFrame(grid_rows())
    rows["params"] *= 1 + 3e-4 * (np.arange(20) % 2)
    assert rows["params"].nunique() == 8
    plot = scaling.of_compute(source(rows))
    assert "4 sizes" in plot.caption and "N = 1M" in lines(drawn(plot).axes[0])
    assert np.allclose(np.sort(plot.data["flops"]), np.sort(6 * rows["params"] * rows["tokens"]), rtol=1e-12)
    points = {"params": rows["params"], "data_tokens": rows["tokens"], "loss": rows["loss"], "censored": False}
    law = fitted(kaplan_forms.ND, ND, 0.01, {"params": PARAMS, "data_tokens": TOKENS})
    plot = scaling.collapse(source(rows, kaplan_nd=finding("kaplan_nd", points, {"kaplan_nd": law}, "kaplan_nd")))
    assert "20 tuned losses of 4 sizes" in plot.caption
    assert [name for name in lines(drawn(plot).axes[0]) if name.startswith("N =")] == ["N = 1M", "N = 4.64M", "N = 21.5M", "N = 100M"]
    assert curves.loss_curves(source(rows)).data["params"].nunique() == 4
    text = what_was_run(source(rows.assign(params=rows["params"].where(rows.index > 0))))
    assert re.search(r"N, parameters</th><td>1M, 4\.64M, 21\.5M, 100M</td><td[^>]*>4<", text)
