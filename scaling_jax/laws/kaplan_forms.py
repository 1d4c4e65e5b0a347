"""The forms of Kaplan et al. 2020 (arXiv 2001.08361), with their rivals. Published constants are those of the paper's own data and units.

Starts come from the measurements: for some exponents, the scales with which the law goes through their geometric mean.
"""

import itertools
from functools import partial

import jax.numpy as jnp
import numpy as np

from scaling_jax.laws.form import Form, Parameter
from scaling_jax.laws.kaplan_theory import DATA_RULE, PF_DAY, SOURCE, TABLE_2, TABLE_3, TABLE_5

_SCALE, _EXPONENT = (1e-20, 1e40), (0.01, 5.0)  # bounds: a loss of 2.5 nats with the least exponent has its scale near the largest
_HUBER = 1e-2  # of ln L: about what seeds differ by. 1e-3 would make a median of it, and its intervals too narrow; of 3 nats it is 0.03


def _scale(name: str, unit: str, meaning: str, published: float | None = None) -> Parameter:
    return Parameter(name, unit, meaning, "log", *_SCALE, (), published)


def _exponent(name: str, meaning: str, published: float | None = None) -> Parameter:
    return Parameter(name, "", meaning, "log", *_EXPONENT, (), published)


# ----------------------------------------------------------------------------------------------------- one variable, without and with floor


def _power(values, x, column, scale, exponent, unit):
    return values[exponent] * (jnp.log(values[scale] * unit) - jnp.log(x[column]))


def _power_starts(x, y, column, unit):
    log_x = np.log(x[column] / unit).mean()
    return [(np.exp(log_x + y.mean() / alpha), alpha) for alpha in (0.03, 0.08, 0.2, 0.6)]


def _floored(values, x, column, scale, exponent, unit):
    return jnp.logaddexp(jnp.log(values["floor"]), _power(values, x, column, scale, exponent, unit))


def _floored_starts(x, y, column, unit):
    log_x, loss, starts = np.log(x[column] / unit).mean(), np.exp(y), []
    for share, alpha in itertools.product((0.1, 0.5, 0.8, 0.95), (0.1, 0.3, 0.8)):
        floor = share * loss.min()
        starts.append((np.exp(log_x + np.log(loss - floor).mean() / alpha), alpha, floor))
    return starts


def _pair(name, letter, column, scale, unit_name, exponent, meaning, published, where, unit=1.0) -> tuple[Form, Form]:
    """(X_c/X)^α, and the same above a floor that no X gets below."""
    parameters = (
        _scale(scale, unit_name, f"{meaning} at which the law has a loss of 1 nat", published[0]),
        _exponent(exponent, f"power of {meaning} that the loss falls with", published[1]),
    )
    floor = Parameter("floor", "nats per token", "loss that is left without limits of this kind", "log", 1e-3, 50.0, ())
    common = {"column": column, "scale": scale, "exponent": exponent, "unit": unit}
    starts = {"column": column, "unit": unit}
    above = tuple(p._replace(published=None) for p in parameters)
    return (
        Form(name, f"L = ({letter}_c/{letter})^α", f"{SOURCE}, {where}", "loss", (column,), parameters, partial(_power, **common),
             huber_delta=_HUBER, starts=partial(_power_starts, **starts)),
        Form(f"{name}_floor", f"L = E + ({letter}_c/{letter})^α", f"rival of {SOURCE}, {where}", "loss", (column,), (*above, floor),
             partial(_floored, **common), huber_delta=_HUBER, starts=partial(_floored_starts, **starts)),
    )  # fmt: skip


_T = TABLE_5
N, N_FLOOR = _pair("kaplan_n", "N", "params", "n_c", "parameters", "alpha_n", "size", (_T["n_c"], _T["alpha_n"]), "eq. 1.1")
D, D_FLOOR = _pair("kaplan_d", "D", "data_tokens", "d_c", "tokens", "alpha_d", "data", (_T["d_c"], _T["alpha_d"]), "eq. 1.2")
C, C_FLOOR = _pair("kaplan_c", "C", "flops", "c_c", "PF-days", "alpha_c", "compute", (_T["c_c"], _T["alpha_c"]), "Table 5", PF_DAY)
C_MIN, C_MIN_FLOOR = _pair(
    "kaplan_cmin",
    "C_min",
    "min_flops",
    "c_c_min",
    "PF-days",
    "alpha_c_min",
    "compute",
    (_T["c_c_min"], _T["alpha_c_min"]),
    "eq. 1.3",
    PF_DAY,
)

# ---------------------------------------------------------------------------------------------------------------------------- two variables


def _nd(values, x):
    size = values["alpha_n"] / values["alpha_d"] * (jnp.log(values["n_c"]) - jnp.log(x["params"]))
    return values["alpha_d"] * jnp.logaddexp(size, jnp.log(values["d_c"]) - jnp.log(x["data_tokens"]))


def _nd_starts(x, y):
    log_n, log_d, log_y = np.log(x["params"]).mean(), np.log(x["data_tokens"]).mean(), y.mean()
    starts = []
    for alpha_n, alpha_d, share in itertools.product((0.04, 0.1, 0.3), (0.05, 0.12, 0.35), (0.2, 0.5, 0.8)):
        n_c = np.exp(log_n + (alpha_d * np.log(share) + log_y) / alpha_n)
        starts.append((n_c, alpha_n, np.exp(log_d + np.log1p(-share) + log_y / alpha_d), alpha_d))
    return starts


ND = Form(
    "kaplan_nd",
    "L = [(N_c/N)^(α_N/α_D) + D_c/D]^α_D",
    f"{SOURCE}, eq. 1.5, Table 2",
    "loss",
    ("params", "data_tokens"),
    (
        _scale("n_c", "parameters", "size at which unlimited data give a loss of 1 nat", TABLE_2["n_c"]),
        _exponent("alpha_n", "power of size that the loss falls with", TABLE_2["alpha_n"]),
        _scale("d_c", "tokens", "data at which an unlimited model has a loss of 1 nat", TABLE_2["d_c"]),
        _exponent("alpha_d", "power of data that the loss falls with", TABLE_2["alpha_d"]),
    ),
    _nd,
    huber_delta=_HUBER,
    starts=_nd_starts,
)


def _ns(values, x):
    size = values["alpha_n"] * (jnp.log(values["n_c"]) - jnp.log(x["params"]))
    return jnp.logaddexp(size, values["alpha_s"] * (jnp.log(values["s_c"]) - jnp.log(x["min_steps"])))


def _ns_starts(x, y):
    log_n, log_s, loss, starts = np.log(x["params"]).mean(), np.log(x["min_steps"]).mean(), np.exp(y), []
    for alpha_n, alpha_s, share in itertools.product((0.04, 0.12, 0.4), (0.25, 0.6, 1.2), (0.4, 0.75, 0.95)):
        of_size = share * loss.min()
        s_c = np.exp(log_s + np.log(loss - of_size).mean() / alpha_s)
        starts.append((np.exp(log_n + np.log(of_size) / alpha_n), alpha_n, s_c, alpha_s))
    return starts


NS = Form(
    "kaplan_ns",
    "L = (N_c/N)^α_N + (S_c/S_min)^α_S",
    f"{SOURCE}, eq. 1.6, Table 3",
    "loss",
    ("params", "min_steps"),
    (
        _scale("n_c", "parameters", "size at which endless training gives a loss of 1 nat", TABLE_3["n_c"]),
        _exponent("alpha_n", "power of size that the loss falls with", TABLE_3["alpha_n"]),
        _scale("s_c", "steps", "steps at which the term of training is 1 nat", TABLE_3["s_c"]),
        _exponent("alpha_s", "power of steps that the term of training falls with", TABLE_3["alpha_s"]),
    ),
    _ns,
    huber_delta=_HUBER,
    starts=_ns_starts,
)

# ------------------------------------------------------------------------------------------------------- critical batch size; the data rule


def _bcrit(values, x):
    return jnp.log(values["b_star"]) - jnp.log(x["loss"]) / values["alpha_b"]


def _bcrit_starts(x, y):
    return [(np.exp(y.mean() + np.log(x["loss"]).mean() / alpha), alpha) for alpha in (0.1, 0.2, 0.5, 1.5)]


BCRIT = Form(
    "kaplan_bcrit",
    "B_crit = B*/L^(1/α_B)",
    f"{SOURCE}, eq. 5.3",
    "critical_batch_tokens",
    ("loss",),
    (
        _scale("b_star", "tokens", "critical batch size at a loss of 1 nat", TABLE_5["b_star"]),
        _exponent("alpha_b", "inverse power of the loss that the critical batch size falls with", TABLE_5["alpha_b"]),
    ),
    _bcrit,
    huber_delta=0.1,  # of ln B_crit, which steps to a loss tell to some tenths: 1e-3 would make it a median
    starts=_bcrit_starts,
)


def _data_rule(values, x):
    return jnp.log(values["d_1"]) + values["gamma"] * jnp.log(x["params"])


def _data_rule_starts(x, y):
    return [(np.exp(y.mean() - gamma * np.log(x["params"]).mean()), gamma) for gamma in (0.3, 0.7, 1.2)]


DATA = Form(
    "kaplan_data_rule",
    "D = D_1·N^γ",
    f"{SOURCE}, eq. 4.4",
    "data_tokens",
    ("params",),
    (
        _scale("d_1", "tokens", "data of a model of one parameter"),
        _exponent("gamma", "power of size that the data grow with", DATA_RULE[1]),
    ),
    _data_rule,
    huber_delta=0.05,  # of ln D, read off between subsets of the data
    starts=_data_rule_starts,
)

# ------------------------------------------------------------------------------------------------------------------------- shape; transfer


def _shape(values, x):
    return jnp.log(values["floor"]) + values["curvature"] * (jnp.log(x["aspect"]) - jnp.log(values["best_aspect"])) ** 2


def _shape_starts(x, y):
    return [(1.0, curvature, best) for curvature in (0.003, 0.03) for best in np.quantile(x["aspect"], (0.2, 0.5, 0.8))]


SHAPE = Form(
    "kaplan_shape",
    "L/L_best = r·exp(k·ln²(aspect/aspect*))",
    f"{SOURCE}, sec. 3.1, Fig. 5 (the parabola is ours)",
    "loss_ratio",
    ("aspect",),
    (
        Parameter("floor", "", "loss at the best aspect over the best one measured", "log", 0.5, 2.0, ()),
        Parameter("curvature", "", "of ln L in ln aspect, halved", "plain", -1.0, 1.0, ()),
        Parameter("best_aspect", "", "width over depth with the lowest loss", "log", 1e-3, 1e5, ()),
    ),
    _shape,
    huber_delta=_HUBER,
    starts=_shape_starts,
)


def _offset(values, x):
    return x["loss"] + values["offset"]


def _ratio(values, x):
    return values["slope"] * x["loss"]


def _line(values, x):
    return values["slope"] * x["loss"] + values["offset"]


def transfer(domain: str) -> tuple[Form, Form, Form]:
    """Loss on another domain by that on the training's: the paper's constant offset, a constant ratio, and a line."""
    offset = Parameter("offset", "nats per token", "what the domain's loss exceeds the other by", "plain", -20.0, 20.0, (0.0,))
    slope = Parameter("slope", "", "nats on the domain for a nat on the training's", "plain", -5.0, 5.0, (1.0,))
    common = {"target": f"loss_{domain}", "inputs": ("loss",), "space": "plain", "huber_delta": 3 * _HUBER}
    rivals = (
        ("offset", "L' = L + c", (offset,), _offset),
        ("ratio", "L' = s·L", (slope,), _ratio),
        ("line", "L' = s·L + c", (slope, offset), _line),
    )
    return tuple(
        Form(
            f"kaplan_transfer_{name}_{domain}",
            formula,
            f"{SOURCE}, sec. 3.2.2" if name == "offset" else "rival",
            parameters=p,
            function=f,
            **common,
        )
        for name, formula, p, f in rivals
    )
