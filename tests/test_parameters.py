"""Parameters by their rules, in a module of somebody's own, and trained by the package's optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling_jax import optimizer
from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.parameters import Parameters
from scaling_jax.parametrization import Parametrization

MUP = Parametrization("mup", base_width=16)


class Net(nnx.Module):
    def __init__(self, width, rngs):
        make = Parameters(MUP, rngs, width=width)
        self.table = make.matrix("embedding", (10, width))
        self.wide = make.matrix("hidden", (width, 4 * width))
        self.back = make.matrix("hidden", (4 * width, width), base_fan_in=64)
        self.gain = make.vector(width, value=1.0, role="final_vector")
        self.out = make.matrix("output", (width, 10))


def test_fan_in_and_its_base_are_what_the_shape_and_the_role_say():
    net = Net(64, nnx.Rngs(0))
    found = {path[-1]: (p.get_metadata()["fan_in"], p.get_metadata()["base_fan_in"]) for path, p in nnx.to_flat_state(nnx.state(net))}
    assert found == {"table": (10, 10), "wide": (64, 16), "back": (256, 64), "gain": (1, 1), "out": (64, 16)}


def test_at_the_base_width_a_fan_in_that_is_not_the_bases_is_refused():
    """To forget base_fan_in is wrong by a constant, which no comparison of widths can see."""
    make = Parameters(MUP, nnx.Rngs(0), width=16)
    with pytest.raises(UserError, match=r"hidden matrix \(64, 16\) at the base width has base_fan_in 16: must be its own rows, 64"):
        make.matrix("hidden", (64, 16))


def test_values_have_the_rules_std():
    net = Net(256, nnx.Rngs(0))
    for param, std in ((net.table, 1), (net.wide, 256**-0.5), (net.back, 1024**-0.5), (net.out, 16**-0.5)):
        np.testing.assert_allclose(jnp.std(param[...]), std, rtol=0.05)
    np.testing.assert_array_equal(net.gain[...], np.ones(256))


def test_the_optimizer_moves_each_by_its_own_lr():
    """Adam's first step is lr times the gradient's sign."""
    config = default_config()
    config.optimizer.lr, config.optimizer.eps, config.optimizer.clip_norm = 0.1, 1e-30, 0.0
    params = nnx.state(Net(64, nnx.Rngs(0)), nnx.Param)
    chain = optimizer.adamw(config)
    updates, _ = chain.update(jax.tree.map(jnp.ones_like, params), chain.init(params), params, lr_fraction=jnp.float32(1))
    found = {path[-1]: float(jnp.mean(update[...])) for path, update in nnx.to_flat_state(updates)}
    wanted = {"table": -0.1, "wide": -0.025, "back": -0.025, "gain": -0.1, "out": -0.1}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_logical_axes_are_carried_for_sharding():
    make = Parameters(MUP, nnx.Rngs(0), width=32)
    assert make.matrix("hidden", (32, 32), ("embed", "mlp")).get_metadata()["axes"] == ("embed", "mlp")
    assert make.vector(32, "mlp").get_metadata()["axes"] == ("mlp",)
