"""A function applied block after block, as a loop in the program or written out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Block = Callable[[Array, Any], tuple[Array, Any]]

MOST_WRITTEN_OUT = 16  # blocks; more would take a minute to compile


def loop(block: Block, x_BxLxD: Array, layers: Any) -> tuple[Array, Any]:
    """`block(x, layer)` for each layer in turn: one block's program, whatever the depth.

    Args:
      block: (x, layer) -> (x, what it yields).
      x_BxLxD: residual stream.
      layers: a pytree of arrays with a leading axis, the depth.

    Returns:
      x, and what the blocks yield with a leading axis.
    """
    return jax.lax.scan(block, x_BxLxD, layers)


def written_out(block: Block, x_BxLxD: Array, layers: Any) -> tuple[Array, Any]:
    """The same, with a program for each block.

    What a loop keeps for its backward pass it copies into stacks, which XLA's CPU backend first fills with zeros: a quarter of a small
    model's step. Compiling takes as many times longer as there are blocks.
    """
    leaves, tree = jax.tree.flatten(layers)
    # Split and not indexed: the gradient is then put together once, and not added up from as many zero-padded arrays.
    split = [[piece.reshape(piece.shape[1:]) for piece in jax.lax.split(leaf, [1] * leaf.shape[0])] for leaf in leaves]
    yielded = []
    for layer in zip(*split, strict=True):
        x_BxLxD, more = block(x_BxLxD, jax.tree.unflatten(tree, layer))
        yielded.append(more)
    return x_BxLxD, jax.tree.map(lambda *of_blocks: jnp.stack(of_blocks), *yielded)
