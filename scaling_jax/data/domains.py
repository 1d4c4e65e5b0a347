"""What a run that is there can be evaluated on: the domains of its own config, or any token directory made with its tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from scaling_jax.data.corpus import BUILT_IN, check_tokenizer, open_domains, prepare, train_directory
from scaling_jax.data.shards import TokenStream, is_token_directory, read_index
from scaling_jax.data.tokenizers import Tokenizer, load_tokenizer
from scaling_jax.errors import UserError


class Domains(NamedTuple):
    """What to evaluate on, and how many bytes of text each token stands for, [V]; None where the tokenizer loses some of the text."""

    streams: dict[str, TokenStream]  # by name
    bytes_V: np.ndarray | None


def held_out_of_run(run: str | Path, config: ConfigDict, fingerprint: str | None) -> Domains:
    """The domains that the run itself is evaluated on.

    Args:
      run: its work directory, for messages.
      config: of the run.
      fingerprint: of its training data. With other data in its place the run may have been trained on what is held out now.

    Raises:
      UserError: they are missing, damaged, other data, or none.
    """
    tokenizer = _tokenizer(run, config)
    folder = prepare(config.data.path, tokenizer, config.data.cache)
    if read_index(train_directory(folder)).fingerprint != fingerprint:
        raise UserError(
            f"--run={run}: config.data.path, {config.data.path!r}, has other training data than the run had; --data=DIR says what to use"
        )
    domains = open_domains(folder, config.data.eval_domains, config.data.verify)
    if not domains:
        raise UserError(f"--run={run}: its data, {folder}, have no held-out domain; --data=DIR names one")
    return _checked(run, domains, tokenizer)


def held_out_named(run: str | Path, config: ConfigDict, entries: Sequence[str]) -> Domains:
    """The domains that --data names.

    Args:
      run: the work directory of the run that is to be evaluated, for messages.
      config: of the run.
      entries: each 'directory' or 'name=directory'; without a name the directory's last part is the name. The directory is one of tokens,
        or a folder with heldout/, of which that is taken; 'sotu' is the built-in corpus.

    Raises:
      UserError: they are missing, damaged, made with another tokenizer than the run's training data, or of one name.
    """
    tokenizer = _tokenizer(run, config)
    domains: dict[str, TokenStream] = {}
    for entry in entries:
        name, named, place = entry.partition("=")
        if not named:
            name, place = Path(entry).resolve().name, entry
        folder = prepare(BUILT_IN, tokenizer, config.data.cache) if place == BUILT_IN else Path(place)
        directory = next((there for there in (folder, folder / "heldout") if is_token_directory(there)), None)
        if not name or not place or directory is None:
            raise UserError(
                f"--data={entry}: must be {BUILT_IN!r}, or a directory of tokens with index.json or heldout/index.json, or NAME=one; "
                "`scaling-jax tokenize` makes one"
            )
        if name in domains:
            raise UserError(f"--data={entry}: there is already a domain {name!r}, {domains[name].directory}; NAME=DIR gives another name")
        domains[name] = TokenStream(directory, config.data.verify)
    return _checked(run, domains, tokenizer)


def _tokenizer(run: str | Path, config: ConfigDict) -> Tokenizer:
    try:
        return load_tokenizer(config.data.tokenizer)
    except UserError as error:
        raise UserError(f"--run={run}: its config.data.tokenizer: {error}") from error


def _checked(run: str | Path, domains: dict[str, TokenStream], tokenizer: Tokenizer) -> Domains:
    for stream in domains.values():
        check_tokenizer(stream, tokenizer.name, tokenizer.fingerprint, f"the training data of --run={run}")
    return Domains(domains, tokenizer.bytes_V)
