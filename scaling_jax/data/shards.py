"""Flat token shards on disk: documents one after another, each followed by the end token, with no notion of a context.

A token directory holds index.json and tokens-00000.bin, tokens-00001.bin, …: little-endian uint16 where the vocabulary
allows it, uint32 otherwise.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.data.tokenizers import ByteTokenizer
from scaling_jax.errors import UserError

FORMAT = "scaling_jax tokens"
VERSION = 2
_READABLE = (1, VERSION)  # version 1 did not say whether its tokenizer is lossless
INDEX_FILE = "index.json"


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
    """What a token directory remembers of its tokenizer."""

    name: str
    fingerprint: str
    end_token: int
    lossless: bool  # the tokens give back the text, so bits per byte of text are meaningful; False where it is not known


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class TokenIndex:
    """The content of index.json."""

    dtype: str  # 'uint16' or 'uint32', little-endian on disk
    tokens: int  # end tokens included
    documents: int
    text_bytes: int  # UTF-8 bytes of the text that was encoded
    vocab_size: int
    tokenizer: TokenizerRecord
    shards: tuple[Shard, ...]

    @property
    def fingerprint(self) -> str:
        """sha256 hex that identifies the content, wherever it lies."""
        content = [self.tokenizer.fingerprint, self.dtype, self.tokens, self.documents, self.text_bytes, self.vocab_size]
        content += [[shard.tokens, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self), "fingerprint": self.fingerprint}


def is_token_directory(directory: str | Path) -> bool:
    """Whether there is an index.json; nothing is checked."""
    return (Path(directory) / INDEX_FILE).is_file()


def read_index(directory: str | Path) -> TokenIndex:
    """Reads index.json, without a look at the shards.

    Raises:
      UserError: it is missing, not JSON, of another format or version, or contradicts itself.
    """
    path = Path(directory) / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a directory of tokens is made with `scaling-jax tokenize`") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not an index of tokens; its format must be {FORMAT!r}")
    if content.get("version") not in _READABLE:
        readable = " and ".join(map(str, _READABLE))
        raise UserError(f"{path}: version {content.get('version')}, this program reads versions {readable}; tokenize the text again")
    try:
        fields = {field.name: content[field.name] for field in dataclasses.fields(TokenIndex)}
        if content["version"] == 1:
            content["tokenizer"]["lossless"] = content["tokenizer"]["fingerprint"] == ByteTokenizer.fingerprint
        fields["tokenizer"] = TokenizerRecord(**content["tokenizer"])
        fields["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        index = TokenIndex(**fields)
        sound = (
            index.dtype == dtype_name(index.vocab_size)
            and index.tokens == sum(shard.tokens for shard in index.shards) > 0
            and index.fingerprint == content["fingerprint"]
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}; tokenize the text again") from error
    if not sound:
        raise UserError(f"{path}: damaged: its counts and its fingerprint contradict each other; tokenize the text again")
    return index


class TokenStream:
    """The shards of a token directory as one long sequence, memory-mapped. `len()` is its tokens; `index` describes it."""

    def __init__(self, directory: str | Path, verify: bool = False) -> None:
        """Opens `directory`.

        Args:
          directory: a token directory.
          verify: also compare every shard with its checksum, which reads it all.

        Raises:
          UserError: the index is missing or damaged (see `read_index`), or a shard is missing, has another size than the
            index says or, with `verify`, another content.
        """
        self.directory = Path(directory)
        self.index = read_index(directory)
        dtype = disk_dtype(self.index.dtype)
        for shard in self.index.shards:
            _check_shard(self.directory / shard.file, shard, dtype.itemsize, verify)
        self._shards = [np.memmap(self.directory / shard.file, dtype, mode="r") for shard in self.index.shards]
        self._ends = np.cumsum([shard.tokens for shard in self.index.shards])

    def __len__(self) -> int:
        return self.index.tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start, …, start + count - 1, int32 [count], across shard borders.

        Raises:
          IndexError: they are not all there.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"{self.directory}: tokens {start} to {start + count} asked for, there are {len(self)}")
        tokens = np.empty(count, np.int32)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < count:
            offset = start + done - int(self._ends[shard]) + len(self._shards[shard])
            part = self._shards[shard][offset : offset + count - done]
            tokens[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return tokens


def _check_shard(path: Path, shard: Shard, itemsize: int, verify: bool) -> None:
    expected = shard.tokens * itemsize
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the index names this shard, of {expected} bytes") from error
    if actual != expected:
        raise UserError(f"{path}: {actual} bytes; the index says {expected}. Copy it again, or tokenize the text again")
    if verify:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard.sha256:
            raise UserError(f"{path}: sha256 {digest}; the index says {shard.sha256}. Copy it again, or tokenize the text again")


def dtype_name(vocab_size: int) -> str:
    """'uint16' or 'uint32', whichever holds every token id below vocab_size."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def disk_dtype(name: str) -> np.dtype:
    """How tokens of such a dtype lie in shards."""
    return np.dtype(name).newbyteorder("<")
