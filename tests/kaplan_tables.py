"""Results tables of simulated studies that follow the laws of Kaplan and Hoffmann, with noise: columns as `results.COLUMNS` has them."""

import itertools

import numpy as np
import pandas

from scaling_jax.laws.chinchilla_form import CHINCHILLA
from scaling_jax.laws.kaplan_theory import Training, critical_batch, min_steps

TRAINING = Training(alpha_n=0.1, n_c=3e9, alpha_s=0.7, s_c=300.0, alpha_b=0.25, b_star=1e6)
SUBSETS = {"alpha_n": 0.12, "n_c": 1e9, "alpha_d": 0.16, "d_c": 3e9}
PARAMETRIC = {"A": 60.0, "B": 300.0, "E": 1.4, "alpha": 0.33, "beta": 0.37}


def frame(points, loss, rng, noise, own=0.5):
    """Rows (dicts) with their clean losses, under noise of which a run, by `point`, shares the fraction `own` of the variance."""
    table = pandas.DataFrame(points)
    run = table.groupby("point", sort=False).ngroup().to_numpy()
    shared, each = rng.normal(size=run.max() + 1)[run], rng.normal(size=len(run))
    table["loss"] = loss * np.exp(noise * (np.sqrt(own) * shared + np.sqrt(1 - own) * each))
    table["status"] = "finished"
    table["horizon_tokens"] = table["tokens"]
    return table


def loss_of_steps(params, steps, batch_tokens, k=TRAINING):
    """L with L = (N_c/N)^α_N + (S_c/S_min)^α_S and S_min = S/(1 + B_crit(L)/B), by bisection."""
    low, high = np.full(np.shape(steps), 0.1), np.full(np.shape(steps), 1e4)
    for _ in range(200):
        middle = np.sqrt(low * high)
        least = min_steps(steps, batch_tokens, critical_batch(middle, k.b_star, k.alpha_b))
        above = (k.n_c / params) ** k.alpha_n + (k.s_c / least) ** k.alpha_s > middle
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.sqrt(low * high)


def steps(
    rng, sizes=(1e4, 4e4, 1.6e5, 6.4e5, 2.56e6), batches=(2**9, 2**11, 2**12, 2**13, 2**15), noise=0.002, lrs=(0.5, 1.0, 2.0), seeds=1
):
    """Sizes × batches × learning rates, each a run through 21 horizons; the lr costs 2% of the loss at a factor of 2 from the best."""
    horizons = np.round(np.geomspace(2**16, 2**26, 21)).astype(int)
    points = [
        {
            "point": f"{n:g}-{b}-{lr}-{s}",
            "params": n,
            "batch_tokens": b,
            "lr": lr,
            "seed": s,
            "warmup_tokens": 2**12,
            "tokens": t,
            "data_tokens": 0,
        }
        for n, b, lr, s, t in itertools.product(sizes, batches, lrs, range(seeds), horizons)
        if t >= 16 * b
    ]
    p = pandas.DataFrame(points)
    clean = loss_of_steps(p["params"].to_numpy(), (p["tokens"] / p["batch_tokens"]).to_numpy(), p["batch_tokens"].to_numpy())
    return frame(points, clean * (1 + 0.02 * np.log2(p["lr"].to_numpy()) ** 2), rng, noise)


def subsets(rng, sizes=(1e4, 5e4, 2.5e5, 1.25e6), data=tuple(2**k for k in range(14, 23)), noise=0.003):
    """Sizes × subsets of the data, through horizons past the lowest loss, which is L(N, D)."""
    points, clean = [], []
    for n, d in itertools.product(sizes, data):
        least = ((SUBSETS["n_c"] / n) ** (SUBSETS["alpha_n"] / SUBSETS["alpha_d"]) + SUBSETS["d_c"] / d) ** SUBSETS["alpha_d"]
        for epochs in 2.0 ** np.arange(0, 7):
            points.append(
                {"point": f"{n:g}-{d}", "params": n, "data_tokens": d, "tokens": epochs * d, "batch_tokens": 1024, "lr": 0.01, "seed": 0}
            )
            clean.append(least * (1 + 0.02 * (np.log2(epochs) - 4) ** 2))
    return frame(points, np.array(clean), rng, noise)


def parametric(rng, noise=0.003):
    """Hoffmann's loss over sizes and horizons, every row a run of its own; D/N from 1 to 1,000."""
    sizes, horizons = np.geomspace(1e5, 1e8, 8), np.geomspace(2e6, 2e10, 11)
    pairs = [(n, d) for n, d in itertools.product(sizes, horizons) if 1 < d / n < 1e3]
    points = [{"point": f"{n:g}-{d:g}", "params": n, "tokens": d, "lr": 0.01, "seed": 0} for n, d in pairs]
    x = {"params": np.array([n for n, _ in pairs]), "tokens": np.array([d for _, d in pairs])}
    return frame(points, CHINCHILLA.predict(PARAMETRIC, x), rng, noise)


# ------------------------------------------------------------------------------------------------------------------- what was found


def holds(law, truth):
    """Every interval, widened by a fifth for the one in twenty that misses, holds the truth."""
    for name, value in truth.items():
        low, high = law.intervals[name]
        slack = 0.1 * np.log(high / low)
        assert np.log(low) - slack <= np.log(value) <= np.log(high) + slack, (name, low, value, high)


def said(finding, words):
    assert any(words in sentence for sentence in finding.statements), finding.statements


def number(finding, name):
    return next(number for number in finding.numbers if number.name.startswith(name))


def only(table, **values):
    kept = np.logical_and.reduce([table[name].isin(value) for name, value in values.items()])
    return table[kept].reset_index(drop=True)
