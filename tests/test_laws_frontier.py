"""Tables reduced: seeds, tuning, early stopping, envelopes, tokens to a loss; each against a table small enough to do by hand."""

import numpy as np
import pandas
import pytest

from scaling_jax.errors import UserError
from scaling_jax.laws import frontier, isoflop


def table(**columns):
    return pandas.DataFrame(columns)


def test_near_groups():
    labels = frontier.near_groups([100.0, 1.0, 1.0005, 101.0, 1.001, 50.0], 0.001)
    assert labels.tolist() == [2, 0, 0, 3, 0, 1]


def test_seeds_are_averaged_before_the_lowest_is_taken():
    rows = frontier.prepared(
        table(
            params=[10.0] * 6, tokens=[64.0] * 6, batch_tokens=[2] * 6, lr=[1.0, 1.0, 2.0, 2.0, 4.0, 4.0], seed=[0, 1, 0, 1, 0, 1],
            loss=[3.0, 3.4, 2.9, 3.5, 3.1, 3.15], point=list("abcdef"),
        ),
        (),
    )  # fmt: skip
    best = frontier.tuned(rows, ("size", "horizon"))
    assert len(best) == 1 and best["loss"][0] == pytest.approx(3.125) and best["lr"][0] == 4.0
    assert best["run"][0] == "e" and best["seeds"][0] == 2 and best.attrs["over"] == ["lr"]
    assert frontier.tuning_said(best) == "lowest loss over lr; means of up to 2 seeds"


def test_prepared_makes_sizes_horizons_and_runs():
    rows = frontier.prepared(
        table(
            params=[1000.0, 1000.5, 2000.0], tokens=[60, 63, 60], horizon_tokens=[64, 64, 64], loss=[3.0, 2.9, 2.8], flops=[1.0, 1.0, 1.0]
        ),
        (),
    )
    assert rows["size"].nunique() == 2 and rows["horizon"].unique().tolist() == [64]
    assert rows["run"].nunique() == 3  # no point: each row by itself
    assert rows["flops"].tolist() == pytest.approx([6 * 1000.0 * 60, 6 * 1000.5 * 63, 6 * 2000.0 * 60])


def test_on_all_data():
    rows = table(data_tokens=[0, 512, 0, 1024], loss=[1.0, 2.0, 3.0, 4.0])
    assert frontier.on_all_data(rows)["loss"].tolist() == [1.0, 3.0]
    assert len(frontier.on_all_data(rows.drop(columns="data_tokens"))) == 4
    with pytest.raises(UserError, match="every row was trained on a subset"):
        frontier.on_all_data(rows[rows["data_tokens"] > 0])


def test_early_stopping_takes_the_lowest_and_says_whether_it_still_fell():
    rows = frontier.prepared(
        table(
            params=[10.0] * 6, data_tokens=[8, 8, 8, 16, 16, 16], tokens=[16.0, 32.0, 64.0] * 2, loss=[3.0, 2.5, 2.7, 3.0, 2.8, 2.1],
            point=list("aaabbb"),
        ),
        (),
    )  # fmt: skip
    stopped = frontier.early_stopped(rows).sort_values("data_tokens")
    assert stopped["loss"].tolist() == [2.5, 2.1]
    assert stopped["falling"].tolist() == pytest.approx([0.0, 1 - 2.1 / 2.8])
    assert np.isnan(frontier.last_fall(np.array([40.0, 64.0]), np.array([3.0, 2.0])))


def crossing():
    """Three sizes whose losses are 2 + N/C' + …: the middle one is best in the middle."""
    rows = []
    for size in (1.0, 4.0, 16.0):
        for tokens in 2.0 ** np.arange(0, 13, 2):
            rows.append({"size": size, "params": size, "flops": 6 * size * tokens, "loss": 2 + 1 / size + 1 / tokens, "run": f"{size}"})
    return pandas.DataFrame(rows)


def test_envelope_is_the_least_of_the_courses():
    rows = crossing()
    budgets = np.geomspace(6, 6 * 16 * 4096, 50)
    found = frontier.envelope(rows, budgets)
    by_hand = []
    for size in (1.0, 4.0, 16.0):
        mine = rows[rows["size"] == size]
        by_hand.append(np.exp(np.interp(np.log(budgets), np.log(mine["flops"]), np.log(mine["loss"]), left=np.nan, right=np.nan)))
    np.testing.assert_allclose(found.loss_K, np.nanmin(by_hand, axis=0), rtol=1e-12)
    enclosed = found.size_K[found.enclosed_K]
    assert len(enclosed) and (enclosed == 4.0).all()  # never the smallest or the largest
    assert not found.enclosed_K[budgets < 6 * 16].any()  # the largest was not measured there


def test_frontier_rows_are_on_the_envelope_and_their_edges_are_censored():
    found = frontier.frontier_rows(crossing())
    every = crossing()
    at = frontier.envelope(every, found["flops"].to_numpy())
    np.testing.assert_allclose(at.loss_K, found["loss"], rtol=1e-12)
    assert found["censored"][found["size"] != 4.0].all() and not found["censored"][found["size"] == 4.0].all()


def test_tokens_to_a_loss():
    reached = frontier.tokens_to(np.array([4.0, 1.0, 2.0, 8.0]), np.array([2.0, 4.0, 3.0, 2.5]), np.array([3.5, 3.0, 2.5, 2.0, 1.9, 4.0]))
    np.testing.assert_allclose(reached[:4], [2**0.5, 2, 2**1.5, 4], rtol=1e-12)
    assert np.isnan(reached[4:]).all()  # never that low; already there at the first horizon
    risen = frontier.tokens_to(2.0 ** np.arange(4), np.array([4.0, 3.0, 3.5, 2.0]), np.array([2.8]))
    assert risen[0] == pytest.approx(4 * 2**0.2)  # of the lowest so far: 3 at 4 tokens, 2 at 8


def test_iso_loss_keeps_to_what_enough_batches_pass():
    rows = []
    for batch in (1, 2, 4, 8, 16):
        for tokens in 2.0 ** np.arange(5, 14):
            steps = tokens / batch
            rows.append({"params": 100.0, "batch_tokens": batch, "tokens": tokens, "lr": 0.1, "loss": 2 + 30 / (steps / (1 + 4 / batch))})
    iso = frontier.iso_loss(frontier.prepared(pandas.DataFrame(rows), ("batch_tokens",)))
    assert 2 <= iso["loss"].nunique() <= 6
    for _, cell in iso.groupby("loss"):
        assert len(cell) >= 4
        least = 30 / (cell["loss"] - 2)
        np.testing.assert_allclose(cell["steps"], least * (1 + 4 / cell["batch_tokens"]), rtol=0.08)  # linear in log tokens between octaves


def parabolas(shift=0.0):
    rows = []
    for flops in (1e12, 4e12, 1.6e13, 6.4e13):
        best = 1e3 * (flops / 1e12) ** 0.6 * np.exp(shift)
        for size in 250 * 2.0 ** np.arange(10):
            loss = 3.0 - 0.05 * np.log(flops / 1e12) + 0.04 * np.log(size / best) ** 2
            rows.append({"size": size, "params": size, "flops": flops, "loss": loss, "run": f"{size}-{flops}"})
    return pandas.DataFrame(rows)


def test_minima_of_exact_parabolas():
    points = isoflop.minima(parabolas())
    np.testing.assert_allclose(points["params"], 1e3 * (points["flops"] / 1e12) ** 0.6, rtol=1e-6)
    np.testing.assert_allclose(points["loss"], 3.0 - 0.05 * np.log(points["flops"] / 1e12), rtol=1e-9)
    assert isoflop.line(points)[0] == pytest.approx(0.6, abs=1e-9)
    draws = isoflop.bootstrapped(parabolas(), resamples=20)
    np.testing.assert_allclose(draws[:, 0], 0.6, atol=1e-6)  # exact measurements: no spread


def test_a_minimum_at_the_edge_is_a_bound():
    points = isoflop.minima(parabolas(shift=-3.0))
    assert points["side"].tolist()[0] == "low" and points["censored"][0]
    assert points["params"][0] == 250
    assert isoflop.minima(parabolas(shift=6.0))["side"].tolist()[-1] == "high"


def test_without_shared_budgets_courses_are_interpolated():
    """L = 1 + 1/N + 1/D at C = 6·N·D is least at N = D."""
    rows = []
    for size in np.geomspace(10, 1000, 6):
        for tokens in np.geomspace(4, 4000, 13) * (1 + 0.2 * np.sin(size)):
            rows.append({"size": size, "params": size, "flops": 6 * size * tokens, "loss": 1 + 1 / size + 1 / tokens, "run": f"{size}"})
    rows = pandas.DataFrame(rows)
    assert isoflop.bins(rows) is None
    points = isoflop.minima(rows)
    inside = points[~points["censored"]]
    assert len(inside) >= 4
    np.testing.assert_allclose(inside["params"], np.sqrt(inside["flops"] / 6), rtol=0.05)
    assert isoflop.line(points)[0] == pytest.approx(0.5, abs=0.01)
    assert isoflop.takeover_line(isoflop.takeovers(rows))[0][0] == pytest.approx(0.5, abs=0.01)
