"""How a block's parameters act on activations: by themselves, or, of a block that is applied several times, all uses together."""

from typing import TYPE_CHECKING, Protocol

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from scaling_jax.mesh import constrain, constrain_both_ways, on_one_device, shards_of
from scaling_jax.noise_scale import Shards, Uses, bias, dense_many, open_uses, per_sequence, scale, use

if TYPE_CHECKING:
    from scaling_jax.model.block import Block

KINDS = ("embedding", "attention", "mlp", "unembedding")  # of parameters; entries of a probe

PROJECTION = "projection"  # name of what the remat policy `dots` keeps: it does not see the products themselves where there is a probe

Probe = dict[str, Array]  # by kind: [B], or [depth, B] of what every block has; with a metric one more axis, of length 2


def parameter_kind(path: tuple[str, ...], tied: bool = False) -> str:
    """The entry of KINDS that a parameter's path belongs to; a tied embedding stands for the unembedding too."""
    name = str(path[-1])
    if name.startswith("mlp"):
        return "mlp"
    kind = {"position_embedding": "embedding", "final_gain": "unembedding"}.get(name, name)
    if tied and kind == "unembedding":
        return "embedding"
    return kind if kind in KINDS else "attention"


def value_of(module: nnx.Module | None, name: str) -> Array | None:
    return None if module is None else getattr(module, name)[...]


def place_input(x_BxLxD: Array) -> Array:
    """What the products of a block read, gathered along the length that the residual stream is sharded along; its cotangent is not."""
    return constrain_both_ways(x_BxLxD, ("batch", "length", "residual"), ("batch", "sequence", "residual"))


def place_output(y_BxLxO: Array, axis: str) -> Array:
    """What a product yields: heads, MLP and vocabulary along their axis, the residual stream along the length; its cotangent whole."""
    whole = ("batch", "length", axis)
    return constrain_both_ways(y_BxLxO, ("batch", "sequence", "residual"), whole) if axis == "residual" else constrain(y_BxLxO, *whole)


def _shards(block: "Block", name: str) -> Shards:
    return shards_of(*getattr(block, name).get_metadata()["axes"])


class Weights(Protocol):
    """What a block asks for. Names are the block's own; a bias or gain that it has not leaves x as it is."""

    def project(self, names: tuple[str, ...], axis: str, x_BxLxI: Array) -> list[Array]:
        """The projections `names` of one input, with their biases, which lie along the logical `axis`.

        What goes back to the residual stream lies as that does (see `place_output`).
        """
        ...

    def gain(self, name: str, x: Array) -> Array:
        """x [B, …, D] times a gain [D]."""
        ...


class OwnWeights:
    """Those of a block that is applied once: with a probe (of this block, by kind), in a metric, or plainly."""

    def __init__(self, block: "Block", probe: Probe | None = None, metric: "Block | None" = None):
        self.block, self.probe, self.metric = block, probe, metric

    def _probe(self, name: str) -> Array | None:
        return None if self.probe is None else self.probe[parameter_kind((name,))]

    def project(self, names: tuple[str, ...], axis: str, x_BxLxI: Array) -> list[Array]:
        ws_IxO = [value_of(self.block, name) for name in names]
        metrics_IxO = None if self.metric is None else [value_of(self.metric, name) for name in names]
        of_products = {"shards": _shards(self.block, names[0]), "dtype": self.block.config.compute_dtype, "joined": on_one_device()}
        ys_BxLxO = dense_many(x_BxLxI, ws_IxO, self._probe(names[0]), metrics_IxO, **of_products)
        ys_BxLxO = (self._bias(f"{name}_bias", place_output(y_BxLxO, axis)) for name, y_BxLxO in zip(names, ys_BxLxO, strict=True))
        return [checkpoint_name(y_BxLxO, PROJECTION) for y_BxLxO in ys_BxLxO]

    def _bias(self, name: str, x_BxLxO: Array) -> Array:
        if not hasattr(self.block, name):
            return x_BxLxO
        return bias(x_BxLxO, value_of(self.block, name), self._probe(name), value_of(self.metric, name))

    def gain(self, name: str, x: Array) -> Array:
        if not hasattr(self.block, name):
            return x
        x_BxLxD = x.reshape(x.shape[0], -1, x.shape[-1])
        return scale(x_BxLxD, value_of(self.block, name), self._probe(name), value_of(self.metric, name)).reshape(x.shape)


class SharedWeights:
    """Those of one use of a block that is applied several times, with a probe: `uses` and `copies` come from `open_block`."""

    def __init__(self, block: "Block", uses: dict[str, Uses], copies: dict[str, Array]):
        self.block, self.uses, self.copies = block, uses, copies

    def project(self, names: tuple[str, ...], axis: str, x_BxLxI: Array) -> list[Array]:
        given, x_BxLxI = x_BxLxI.dtype, x_BxLxI.astype(self.block.config.compute_dtype)
        ys_BxLxO = (use(x_BxLxI, value_of(self.block, name), self.uses[name], shards=_shards(self.block, name)) for name in names)
        ys_BxLxO = (y_BxLxO.astype(given) for y_BxLxO in ys_BxLxO)
        ys_BxLxO = (self._bias(f"{name}_bias", place_output(y_BxLxO, axis)) for name, y_BxLxO in zip(names, ys_BxLxO, strict=True))
        return [checkpoint_name(y_BxLxO, PROJECTION) for y_BxLxO in ys_BxLxO]

    def _bias(self, name: str, x_BxLxO: Array) -> Array:
        if name not in self.copies:
            return x_BxLxO
        return (x_BxLxO.astype(jnp.float32) + self.copies[name][:, None]).astype(x_BxLxO.dtype)

    def gain(self, name: str, x: Array) -> Array:
        if name not in self.copies:
            return x
        x_BxLxD = x.reshape(x.shape[0], -1, x.shape[-1])
        return (x_BxLxD.astype(jnp.float32) * self.copies[name][:, None]).astype(x.dtype).reshape(x.shape)


def open_block(
    block: "Block", probe: Probe, metric: "Block | None", uses: int, length: int, dtype: jnp.dtype
) -> tuple[dict[str, Uses], dict[str, Array]]:
    """For `SharedWeights`: carriers of each matrix, with a leading axis [uses], and a copy of each vector for every sequence."""
    carriers, copies = {}, {}
    for (name,), param in nnx.to_flat_state(nnx.state(block, nnx.Param)):
        of = param[...], probe[parameter_kind((name,))], value_of(metric, name)
        if param.ndim == 1:
            copies[name] = per_sequence(*of)
        else:
            carriers[name] = open_uses(*of, uses=uses, length=length, dtype=dtype, shards=_shards(block, name))
    return carriers, copies
