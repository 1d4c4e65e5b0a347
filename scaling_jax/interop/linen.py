"""The Transformer as a Flax Linen module, through NNX's bridge."""

from collections.abc import Mapping
from typing import Any

from flax import linen, nnx
from flax.core import unfreeze

from scaling_jax.errors import UserError
from scaling_jax.model import Transformer, TransformerConfig
from scaling_jax.parametrization import Parametrization


def linen_transformer(config: TransformerConfig, parametrization: Parametrization | None = None) -> linen.Module:
    """The Transformer as a Linen module.

    `init(key, tokens_BxL)` gives {'params': …}, plain arrays [depth, in, out] or [in, out] under the Transformer's own names;
    `apply(variables, tokens_BxL)` the logits [B, L, V], and takes the Transformer's other arguments too. Other methods go by name:
    `apply(variables, tokens_BxL, cache, nnx_method="extend")`. Call `apply` under jit: outside it every call makes initial parameters
    and throws them away.

    Plain arrays carry no rules, so an optimizer gives them all one learning rate; `nnx_params` gives their rules back.
    """
    return nnx.bridge.to_linen(Transformer, config, parametrization, metadata_fn=None)


def linen_variables(model: Transformer) -> dict[str, Any]:
    """A Transformer's parameters as the variables of `linen_transformer` of its config: the same arrays, not copies."""
    return {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}


def nnx_params(model: Transformer, variables: Mapping[str, Any]) -> nnx.State:
    """Parameters or gradients {'params': …} as the state of a Transformer, with the rules that `scaling_jax.optimizer.adamw` applies.

    Args:
      model: of the same config and parametrization; it stays as it is and may be abstract. `nnx.update(model, …)` gives it the result.
      variables: of `linen_transformer`.

    Raises:
      UserError: an array is missing, unexpected or of another shape.
    """
    like = nnx.state(model, nnx.Param)
    given = dict(nnx.traversals.flatten_mapping(unfreeze(variables["params"])))
    wanted = {path: tuple(param.shape) for path, param in nnx.to_flat_state(like)}
    shapes = {path: tuple(value.shape) for path, value in given.items()}
    for path in wanted | shapes:
        if wanted.get(path) != shapes.get(path):
            there, here = ("absent" if path not in of else str(list(of[path])) for of in (shapes, wanted))
            raise UserError(f"variables['params'], {'.'.join(path)} is {there}: must be {here}")
    return nnx.map_state(lambda path, param: param.replace(given[path]), like)
