"""A Flax module of somebody's own, from its file, tried before anything is measured or written."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.coord_check.measure import activations
from scaling_jax.errors import UserError
from scaling_jax.model import Transformer
from scaling_jax.train.step import Trainer, parametrization, transformer_config


def load_model(spec: str, *configs: ConfigDict) -> Callable[..., nnx.Module]:
    """NAME of `spec` 'FILE.py:NAME', or the Transformer for ''; built and called, abstractly, for each of `configs`.

    Raises:
      UserError: there is none; its code fails (the line is named); it makes no nnx.Module, a parameter without a role, state that is no
        parameter, or no logits [B, L, vocabulary].
    """
    if not spec:
        return Transformer
    path, _, name = spec.partition(":")
    if not Path(path).is_file() or not name:
        raise UserError(f"--model={spec}: must be FILE.py:NAME, NAME a module class or function in that file")
    sys.path.insert(0, str(Path(path).resolve().parent))  # for what it imports from beside it
    try:
        model = runpy.run_path(path, run_name="scaling_jax_model").get(name)
        if not callable(model):
            raise UserError(f"{path} has no class or function {name}")
        for config in configs:
            _try(model, config)
    except UserError as error:
        raise UserError(f"--model={spec}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever the file's own code raises
        raise UserError(f"--model={spec}{config_lib.line_in(path, error)}: {config_lib.reason(error)}") from error
    return model


def _try(model: Callable[..., nnx.Module], config: ConfigDict) -> None:
    made = nnx.eval_shape(lambda: _checked(model(transformer_config(config), parametrization(config), rngs=nnx.Rngs(0))))
    if others := nnx.to_flat_state(nnx.state(made, nnx.Not(nnx.Param))):
        names = ", ".join(".".join(map(str, path)) for path, _ in others)
        raise UserError(f"holds state that is no nnx.Param ({names}): a step keeps parameters only")
    trainer = Trainer(config, model=model)
    shape = (2, config.model.context)
    tokens_BxL = jax.ShapeDtypeStruct(shape, "int32")
    seen = jax.eval_shape(lambda params, x: activations(nnx.merge(trainer.graph, params), x), trainer.abstract_state.params, tokens_BxL)
    wanted, found = (*shape, config.model.vocab_size), getattr(seen["logits"], "shape", type(seen["logits"]).__name__)
    if found != wanted:
        raise UserError(f"maps tokens {shape} to {found}; must be logits {wanted}")


def _checked(made: object) -> nnx.Module:
    if not isinstance(made, nnx.Module):
        raise UserError(f"makes a {type(made).__name__}: must be a flax nnx.Module")
    return made
