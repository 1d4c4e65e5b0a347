"""What the command line samples from and exports: the model and the tokenizer of a run."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from scaling_jax.data.corpus import BUILT_IN, train_directory
from scaling_jax.data.shards import read_index
from scaling_jax.data.tokenizers import Tokenizer, load_tokenizer
from scaling_jax.errors import UserError
from scaling_jax.interop.weights_file import params_from_file, save_safetensors
from scaling_jax.model import Transformer
from scaling_jax.train import checkpoint
from scaling_jax.train.opened import OpenedRun, open_run, read_config, trainer_here


def open_model(run: str | Path, at_tokens: int | None = None, params: str | Path | None = None) -> Transformer:
    """The model of a run, with the parameters of a checkpoint, or of a safetensors file; float32 throughout.

    With a cache logits are those of the whole pass to 1e-5 in float32, but to 2e-2 only in bfloat16.

    Raises:
      UserError: as `open_run` and `params_from_file`; or the parameters are not finite.
    """
    if params is None:
        return _finite(open_run(run, at_tokens, "float32")).model
    config, _ = read_config(Path(run))
    config.model.compute_dtype = "float32"
    trainer = trainer_here(config)
    graph, like = trainer.graph, trainer.abstract_sharded_state.params
    return nnx.merge(graph, params_from_file(nnx.merge(graph, like), params))


def _finite(opened: OpenedRun) -> OpenedRun:
    spoilt = [".".join(path) for path, param in nnx.to_flat_state(opened.params) if not jnp.isfinite(param.get_value()).all()]
    if spoilt:
        where = opened.workdir / checkpoint.DIRECTORY / str(opened.tokens)
        raise UserError(f"{where}: not finite: {', '.join(spoilt)}; the parameters are spoilt, --at_tokens can name another checkpoint")
    return opened


def open_tokenizer(run: str | Path, given: str | None = None) -> Tokenizer:
    """The tokenizer of a run's config, or the `given` one in its place.

    Raises:
      UserError: there is no such tokenizer; it has more tokens than the model; or the run's data, where they still are, were made
        with another one.
    """
    config, identity = read_config(Path(run))
    whose = f"--run={run}: its config.data.tokenizer" if given is None else "--tokenizer"
    instead = "; --tokenizer=FILE says where it is now" if given is None else ""
    try:
        tokenizer = load_tokenizer(config.data.tokenizer if given is None else given)
    except UserError as error:
        raise UserError(f"{whose}: {error}{instead}") from error
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(f"{whose}: {tokenizer.name} has {tokenizer.vocab_size} tokens, the run's model {config.model.vocab_size}{instead}")
    made_with = _made_with(config, identity.get("data.fingerprint"))
    if made_with not in (None, tokenizer.fingerprint):
        found = f"{tokenizer.name} ({tokenizer.fingerprint[:12]})"
        raise UserError(f"{whose}: {found} is not what the run's data were made with ({made_with[:12]}){instead}")
    return tokenizer


def _made_with(config: ConfigDict, data_fingerprint: str | None) -> str | None:
    """The fingerprint of the tokenizer of the run's data; None where they are no longer there."""
    if config.data.path == BUILT_IN:  # made anew with any tokenizer
        return None
    try:
        index = read_index(train_directory(Path(config.data.path)))
    except UserError:
        return None
    return index.tokenizer.fingerprint if index.fingerprint == data_fingerprint else None


def export(
    run: str | Path, out: str | Path, at_tokens: int | None = None, fold_multipliers: bool = False
) -> tuple[dict[str, np.ndarray], int]:
    """Writes a checkpoint's parameters to a safetensors file; returns them as written, and the checkpoint's token count.

    Raises:
      UserError: as `open_run` and `save_safetensors`; or the parameters are not finite.
    """
    opened = _finite(open_run(run, at_tokens))
    config = opened.config
    of_run = {
        "parametrization": json.dumps(config.parametrization.to_dict()),
        "tokenizer": config.data.tokenizer,
        "tokens": str(opened.tokens),
    }
    return save_safetensors(opened.model, out, of_run, fold_multipliers), opened.tokens
