"""The parametric loss of Hoffmann et al. 2022 (arXiv 2203.15556, approach 3), and the allocation that follows from its constants."""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from scaling_jax.laws.form import Form, Parameter

SOURCE = "Hoffmann et al. 2022"
ROUNDED = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
UNROUNDED = {
    "A": float(np.exp(6.0073404)),
    "B": float(np.exp(6.0179186)),
    "E": float(np.exp(0.5267228)),
    "alpha": 0.33917084,
    "beta": 0.2849083,
}
BESIROGLU = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}  # arXiv 2404.10102, of the paper's own figure
BESIROGLU_SE = {"A": 124.5, "B": 1293.0, "E": 0.03, "alpha": 0.015, "beta": 0.021}
GOPHER_FLOPS = 5.76e23


def _loss(values, x):
    of_size = jnp.log(values["A"]) - values["alpha"] * jnp.log(x["params"])
    of_data = jnp.log(values["B"]) - values["beta"] * jnp.log(x["tokens"])
    return jnp.logaddexp(jnp.logaddexp(of_size, of_data), jnp.log(values["E"]))


_FACTORS = tuple(float(np.exp(a)) for a in (0, 5, 10, 15, 20, 25))
_EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
_FLOORS = tuple(float(np.exp(e)) for e in (-1, -0.5, 0, 0.5, 1))

CHINCHILLA = Form(  # its 4,500 starts are the source's
    "chinchilla_3",
    "L = E + A/N^α + B/D^β",
    f"{SOURCE}, eq. 2 and app. D.3",
    "loss",
    ("params", "tokens"),
    (
        Parameter("A", "nats per token", "of the term of size", "log", 1e-6, 1e20, _FACTORS, ROUNDED["A"]),
        Parameter("B", "nats per token", "of the term of data", "log", 1e-6, 1e20, _FACTORS, ROUNDED["B"]),
        Parameter("E", "nats per token", "loss of unlimited size and data", "log", 1e-3, 50.0, _FLOORS, ROUNDED["E"]),
        Parameter("alpha", "", "power of size that its term falls with", "plain", -0.5, 4.0, _EXPONENTS, ROUNDED["alpha"]),
        Parameter("beta", "", "power of data that its term falls with", "plain", -0.5, 4.0, _EXPONENTS, ROUNDED["beta"]),
    ),
    _loss,
)


def _few_starts(x, y):
    log_n, log_d, loss, starts = np.log(x["params"]).mean(), np.log(x["tokens"]).mean(), np.exp(y), []
    for share, alpha, beta in itertools.product((0.2, 0.6, 0.9), (0.15, 0.4, 1.0), (0.15, 0.4, 1.0)):
        floor = share * loss.min()
        half = np.log((loss - floor).mean() / 2)
        starts.append((np.exp(half + alpha * log_n), np.exp(half + beta * log_d), floor, alpha, beta))
    return starts


QUICK = CHINCHILLA._replace(starts=_few_starts)  # the same form from 27 starts near the measurements, where it is fitted over and over


class Allocation(NamedTuple):
    """N_opt = G·(C/6)^a and D_opt = (C/6)^b/G at C FLOP = 6·N·D."""

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray

    def params(self, flops: ArrayLike) -> np.ndarray:
        return self.scale * (np.asarray(flops, float) / 6) ** self.a

    def tokens(self, flops: ArrayLike) -> np.ndarray:
        return (np.asarray(flops, float) / 6) ** self.b / self.scale


def allocation(A: ArrayLike, B: ArrayLike, E: ArrayLike, alpha: ArrayLike, beta: ArrayLike) -> Allocation:
    """The sizes and data of the least loss for their compute (eq. 4): a = β/(α+β), b = α/(α+β), G = (αA/βB)^(1/(α+β)). E plays no part."""
    A, B, alpha, beta = (np.asarray(value, float) for value in (A, B, alpha, beta))
    with np.errstate(invalid="ignore", divide="ignore"):
        return Allocation(beta / (alpha + beta), alpha / (alpha + beta), (alpha * A / (beta * B)) ** (1 / (alpha + beta)))
