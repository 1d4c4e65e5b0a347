"""A small check of a module of one's own, and how it is refused."""

from pathlib import Path

import pytest
from helpers import small_config

from scaling_jax.coord_check.run import Check, coord_check
from scaling_jax.errors import UserError

WIDTHS = (16, 32, 64)
MODULE = """
import jax
import jax.numpy as jnp
from flax import nnx

from scaling_jax.parameters import Parameters


class Tiny(nnx.Module):
    def __init__(self, config, parametrization, *, rngs):
        make = Parameters(parametrization, rngs, width=config.width)
        self.table = make.matrix("embedding", (config.vocab_size, config.width))
        self.inner = make.matrix("hidden", (config.width, config.width))
        self.out = make.matrix("output", (config.width, config.vocab_size))

    def __call__(self, tokens):
        h = jax.nn.relu(self.table[...][tokens] @ self.inner[...])
        return self.out.get_metadata()["rule"].multiplier * h @ self.out[...]


class Twice(Tiny):
    def __call__(self, tokens):
        return 2 * super().__call__(tokens)


class NoMultiplier(Tiny):
    def __call__(self, tokens):
        return jax.nn.relu(self.table[...][tokens] @ self.inner[...]) @ self.out[...]


class Roleless(Tiny):
    def __init__(self, config, parametrization, *, rngs):
        super().__init__(config, parametrization, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(config.width))


class Listed(Tiny):
    def __init__(self, config, parametrization, *, rngs):
        super().__init__(config, parametrization, rngs=rngs)
        self.list = nnx.List([self.inner])
        del self.inner

    def __call__(self, tokens):
        return jax.nn.relu(self.table[...][tokens] @ self.list[0][...]) @ self.out[...]


class FailsToBuild(Tiny):
    def __init__(self, config, parametrization, *, rngs):
        raise ValueError("no such shape")


class FailsInItsCall(Tiny):
    def __call__(self, tokens):
        return self.table[...][tokens] @ jnp.ones((3, 4))


class NoLogits(Tiny):
    def __call__(self, tokens):
        return self.table[...][tokens]


number = 3
"""


def config_of(**fields):
    return small_config(model__depth=1, optimizer__lr=0.02, **fields)


def check_of(module, name="Tiny", **changes):
    return Check(**({"sizes": {"width": WIDTHS}, "seeds": 2, "steps": 3, "batch_tokens": 64, "model": f"{module}:{name}"} | changes))


def snapshot(directory: Path):
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else None


def refused(config, check, out, *words):
    """UserError with all `words`, and `out` as it was."""
    before = snapshot(out)
    with pytest.raises(UserError) as error:
        coord_check(config, check, out)
    for word in words:
        assert word in str(error.value)
    assert snapshot(out) == before
    return str(error.value)
