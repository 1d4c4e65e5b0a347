"""Parameters that carry their rule: made here for this package's model, and for anybody's Flax NNX module."""

import jax
import jax.numpy as jnp
from flax import nnx

from scaling_jax.errors import UserError
from scaling_jax.parametrization import Parametrization


class Parameters:
    """Makes `nnx.Param`s by the rules of a parametrization.

    The metadata of each has its role, fan_in, base_fan_in and rule (which `scaling_jax.optimizer.adamw` applies), and `axes`, the
    logical axes of its dimensions.

    Args:
      parametrization: the table and the base sizes.
      rngs: seeds; the stream `params` is read.
      width, depth: of the model; its depth matters to completep only.
    """

    def __init__(self, parametrization: Parametrization, rngs: nnx.Rngs, *, width: int, depth: int = 1):
        self.parametrization, self.rngs, self.width, self.depth = parametrization, rngs, width, depth

    def matrix(
        self, role: str, shape: tuple[int, int], axes: tuple[str | None, str | None] = (None, None), *, base_fan_in: int | None = None
    ) -> nnx.Param:
        """A normal matrix [fan_in, fan_out].

        Args:
          role: of the table; embeddings are [vocabulary, width].
          shape: rows, the fan-in, and columns.
          axes: logical axes (`scaling_jax.mesh`), for sharding.
          base_fan_in: rows that the matrix has in the base model. By default the base width for a hidden, query or output matrix, whose
            fan-in is then the model's width, and its own rows for an embedding.

        Raises:
          UserError: the table has no such role, or at the base width base_fan_in is not the number of rows.
        """
        if base_fan_in is None:
            base_fan_in = shape[0] if role in ("embedding", "tied") else self.parametrization.base_width
        if self.width == self.parametrization.base_width and shape[0] != base_fan_in:
            raise UserError(
                f"a {role} matrix {shape} at the base width has base_fan_in {base_fan_in}: must be its own rows, {shape[0]}; "
                "give base_fan_in, the rows that it has in the base model"
            )
        rule = self.parametrization.rule(role, fan_in=shape[0], base_fan_in=base_fan_in, width=self.width, depth=self.depth)
        value = rule.init_std * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        return nnx.Param(value, role=role, axes=axes, fan_in=shape[0], base_fan_in=base_fan_in, rule=rule)

    def vector(self, size: int, axis: str | None = None, *, value: float = 0.0, role: str = "vector") -> nnx.Param:
        """A bias (value 0) or gain (value 1); role `final_vector` outside the residual branches."""
        rule = self.parametrization.rule(role, fan_in=1, base_fan_in=1, width=self.width, depth=self.depth)
        return nnx.Param(jnp.full(size, value, jnp.float32), role=role, axes=(axis,), fan_in=1, base_fan_in=1, rule=rule)
