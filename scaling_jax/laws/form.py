"""What a law is before it is fitted: a function, its parameters with units and bounds, the space its residuals live in, and its source."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

TRANSFORMS = ("log", "plain")


class Parameter(NamedTuple):
    """One parameter of a form, in natural units.

    `transform` says what is fitted: "log" its natural logarithm (it is positive), "plain" itself. `low` and `high` are bounds, which a fit
    never leaves; finite where data can run away to them. `starts` are values to start descents from; `published` is the source's value.
    """

    name: str
    unit: str
    meaning: str
    transform: str
    low: float
    high: float
    starts: tuple[float, ...]
    published: float | None = None


class Form(NamedTuple):
    """A law's form.

    `function` takes the parameters and the `constants` by name (natural units, scalars) and the columns `inputs` by name (arrays [n]),
    computes with jax.numpy, and returns the prediction [n] in the residual `space`: the target's logarithm where that is "log", the target
    itself where "plain". It is a function of a module, or a partial of one, so that laws.json can name it. `huber_delta` is the residual
    beyond which the loss grows linearly, in its units. `starts` gives what to start from, [S, P] in natural units, from the inputs
    and the target in that space; without it that is all combinations of the parameters' own. `constants` are numbers that are not
    fitted, such as the scale at which a factor is 1: they come from the data, the function does not.
    """

    name: str
    formula: str
    source: str
    target: str
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    function: Callable[[dict[str, Any], dict[str, Any]], Any]
    space: str = "log"
    huber_delta: float = 1e-3
    starts: Callable[[dict[str, np.ndarray], np.ndarray], ArrayLike] | None = None
    constants: tuple[tuple[str, float], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    def predict(self, values: Mapping[str, float], x: Mapping[str, ArrayLike]) -> np.ndarray:
        """The target at the inputs, [n], in its own units."""
        import jax

        with jax.enable_x64(True):
            fitted = self.function({**values, **dict(self.constants)}, {name: np.asarray(x[name], float) for name in self.inputs})
            fitted = np.asarray(fitted, float)
        return np.exp(fitted) if self.space == "log" else fitted

    def predict_many(self, values_RxP: np.ndarray, x: Mapping[str, ArrayLike]) -> np.ndarray:
        """The same of many sets of parameters (natural units) at once, [R, n]."""
        import jax

        values = {name: np.asarray(values_RxP, float)[:, i, None] for i, name in enumerate(self.names)}
        with jax.enable_x64(True):
            inputs = {name: np.asarray(x[name], float)[None] for name in self.inputs}
            fitted = np.asarray(self.function(values | dict(self.constants), inputs), float)
        return np.exp(fitted) if self.space == "log" else fitted

    def all_starts(self, x: dict[str, np.ndarray], y: np.ndarray) -> np.ndarray:
        """Parameters to start from, [S, P], in natural units."""
        if self.starts is not None:
            return np.atleast_2d(np.asarray(self.starts(x, y), float))
        return np.array(list(itertools.product(*(parameter.starts for parameter in self.parameters))), float)

    def transformed(self, values_SxP: np.ndarray) -> np.ndarray:
        """What is fitted, from natural units; clipped to the bounds."""
        low_P, high_P = np.array([(p.low, p.high) for p in self.parameters], float).T
        values_SxP = np.clip(np.asarray(values_SxP, float), low_P, high_P)
        logs_P = np.array([p.transform == "log" for p in self.parameters])
        return np.where(logs_P, np.log(np.where(logs_P, values_SxP, 1.0)), values_SxP)

    def natural(self, fitted_SxP: np.ndarray) -> np.ndarray:
        """Natural units, from what is fitted."""
        logs_P = np.array([p.transform == "log" for p in self.parameters])
        return np.where(logs_P, np.exp(np.where(logs_P, fitted_SxP, 0.0)), fitted_SxP)
