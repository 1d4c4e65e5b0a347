"""Studies with a known law, for every form of the Kaplan and Chinchilla families: (form, truth, make), `make(rng)` being one study.

Sizes, horizons and noise are those of small studies: 0.5% of the loss, half of its variance a run's own.
"""

import numpy as np

from scaling_jax.laws import kaplan_forms as kaplan
from scaling_jax.laws.chinchilla_form import BESIROGLU, QUICK
from scaling_jax.laws.observations import Observations

NOISE = 0.005  # of ln L
SIZES = np.geomspace(1e4, 1e8, 12)


def study(form, truth, x, run, sd=NOISE):
    """`make` of a form at inputs [n]; `run` [n] says which rows share half of the noise's variance."""

    def make(rng):
        own, shared = rng.normal(size=len(run)), rng.normal(size=run.max() + 1)[run]
        noise = sd * (own + shared) / np.sqrt(2)
        clean = form.predict(truth, x)
        y = clean * np.exp(noise) if form.space == "log" else clean + noise
        return Observations(x, y, run, "planted")

    return form, truth, make


def grid(a, b):
    """All pairs [a·b], and the index of a."""
    first, second = (values.ravel() for values in np.meshgrid(a, b, indexing="ij"))
    return first, second, np.repeat(np.arange(len(a)), len(b))


def planted():
    one, long = np.arange(len(SIZES)), np.geomspace(1e3, 1e10, 29)
    params, tokens, run = grid(SIZES, np.geomspace(1e6, 1e9, 8))
    stopped = {"params": params, "data_tokens": tokens}
    every = np.arange(len(params))  # early stopping picks one row of each run: none shares its noise
    steps = {"params": params, "min_steps": np.tile(np.geomspace(200, 5e4, 8), len(SIZES))}
    flops, wide = np.geomspace(1e13, 1e19, 15), np.geomspace(1e11, 1e19, 30)
    losses = {"loss": np.tile(np.geomspace(4.5, 2.5, 6), 5)}
    course, courses = {"loss": np.linspace(5.0, 2.5, 60)}, np.arange(60) // 5
    aspect, _, _ = grid(np.geomspace(2, 200, 8), np.arange(3))
    offset, ratio, straight = kaplan.transfer("code")
    of_size, of_data, _ = grid(np.geomspace(1e7, 1e10, 10), np.geomspace(2e8, 2e11, 10))
    both = {"n_c": 6.4e13, "alpha_n": 0.076, "d_c": 1.8e13, "alpha_d": 0.103}
    floor = {"alpha_c_min": 0.15, "floor": 1.2}
    return [
        study(kaplan.N, {"n_c": 8.8e13, "alpha_n": 0.076}, {"params": SIZES}, one),
        study(kaplan.N_FLOOR, {"n_c": 2e8, "alpha_n": 0.15, "floor": 1.2}, {"params": long}, np.arange(29)),
        study(kaplan.D, {"d_c": 5.4e13, "alpha_d": 0.095}, {"data_tokens": SIZES}, one),
        study(kaplan.D_FLOOR, {"d_c": 2e8, "alpha_d": 0.2, "floor": 1.2}, {"data_tokens": long}, np.arange(29)),
        study(kaplan.C, {"c_c": 1.6e7, "alpha_c": 0.057}, {"flops": flops}, np.arange(15) // 3),  # three of the frontier from a run
        study(kaplan.C_FLOOR, {"c_c": 1e-2, "alpha_c": 0.15, "floor": 1.2}, {"flops": wide}, np.arange(30) // 3),
        study(kaplan.C_MIN, {"c_c_min": 3.1e8, "alpha_c_min": 0.05}, {"min_flops": flops}, np.arange(15) // 3),
        study(kaplan.C_MIN_FLOOR, {"c_c_min": 1e-2} | floor, {"min_flops": wide}, np.arange(30) // 3),
        study(kaplan.ND, both, stopped, every),
        study(kaplan.NS, {"n_c": 6.5e13, "alpha_n": 0.077, "s_c": 2.1e3, "alpha_s": 0.76}, steps, run),
        study(kaplan.BCRIT, {"b_star": 2.1e8, "alpha_b": 0.21}, losses, np.repeat(np.arange(5), 6), sd=0.2),
        study(kaplan.DATA, {"d_1": 5e3, "gamma": 0.74}, {"params": SIZES}, one, sd=0.15),
        study(kaplan.SHAPE, {"floor": 1.0, "curvature": 0.01, "best_aspect": 30.0}, {"aspect": aspect}, np.arange(24)),
        study(offset, {"offset": 0.4}, course, courses, sd=0.02),
        study(ratio, {"slope": 1.15}, course, courses, sd=0.02),
        study(straight, {"slope": 1.1, "offset": 0.3}, course, courses, sd=0.02),
        study(QUICK, BESIROGLU, {"params": of_size, "tokens": of_data}, np.arange(100)),
    ]


PLANTED = {entry[0].name: entry for entry in planted()}
