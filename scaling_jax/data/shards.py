"""Flat token shards on disk: documents one after another, each followed by the end token, with no notion of a context.

A token directory holds index.json and tokens-00000.bin, tokens-00001.bin, …: little-endian uint16 where the vocabulary
allows it, uint32 otherwise.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from scaling_jax.data.staging import refuse_existing, staged_directory
from scaling_jax.data.tokenizers import Tokenizer
from scaling_jax.errors import UserError

FORMAT = "scaling_jax tokens"
VERSION = 1
INDEX_FILE = "index.json"


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
    """What a token directory remembers of its tokenizer."""

    name: str
    fingerprint: str
    end_token: int


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
    if content.get("version") != VERSION:
        raise UserError(f"{path}: version {content.get('version')}, this program reads version {VERSION}; tokenize the text again")
    try:
        fields = {field.name: content[field.name] for field in dataclasses.fields(TokenIndex)}
        fields["tokenizer"] = TokenizerRecord(**content["tokenizer"])
        fields["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        index = TokenIndex(**fields)
        sound = (
            index.dtype == _dtype_name(index.vocab_size)
            and index.tokens == sum(shard.tokens for shard in index.shards) > 0
            and index.fingerprint == content["fingerprint"]
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}; tokenize the text again") from error
    if not sound:
        raise UserError(f"{path}: damaged: its counts and its fingerprint contradict each other; tokenize the text again")
    return index


class ShardWriter:
    """Writes one token directory; a context manager.

    Everything goes to a hidden sibling directory, which takes the final name on a clean exit and is deleted on an error.
    After a clean exit `index` describes what was written.
    """

    def __init__(self, directory: str | Path, tokenizer: Tokenizer, shard_tokens: int = 1 << 26) -> None:
        """Opens nothing yet.

        Args:
          directory: the token directory to be; parents are made as needed.
          tokenizer: gave the tokens; its vocab_size, end_token, name and fingerprint are recorded.
          shard_tokens: tokens in each shard but the last.

        Raises:
          UserError: `directory` exists.
        """
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens is {shard_tokens}: must be positive")
        self.directory = Path(directory)
        refuse_existing(self.directory)
        self.index: TokenIndex | None = None
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = _disk_dtype(_dtype_name(tokenizer.vocab_size))
        self.tokens = self.documents = self.text_bytes = 0
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._file_tokens = 0
        self._in_document = False

    def __enter__(self) -> "ShardWriter":
        self._exit = contextlib.ExitStack()
        self._staging = self._exit.enter_context(staged_directory(self.directory))
        self._exit.callback(self._abandon)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            try:
                self.index = self._finish()
            except BaseException:
                self._exit.__exit__(*sys.exc_info())  # deletes instead of renaming
                raise
        self._exit.__exit__(kind, error, trace)

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Appends a whole document, integers [tokens], and the end token.

        Args:
          tokens: the document, without an end token.
          text_bytes: UTF-8 bytes of its text.

        Raises:
          UserError: a token is outside of the tokenizer's vocabulary.
        """
        self.extend(tokens, text_bytes)
        self.end_document()

    def extend(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Appends a part of a document; `end_document` completes it. Arguments and errors are those of `add`."""
        tokens = np.asarray(tokens)
        vocab_size = self._tokenizer.vocab_size
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
            raise UserError(
                f"{self.directory}: tokens from {tokens.min()} to {tokens.max()}; "
                f"the vocabulary of tokenizer {self._tokenizer.name} ends at {vocab_size - 1}"
            )
        self._in_document = True
        self.text_bytes += text_bytes
        self._append(tokens.astype(self._dtype))

    def end_document(self) -> None:
        """Appends the end token."""
        self._append(np.asarray([self._tokenizer.end_token], self._dtype))
        self.documents += 1
        self._in_document = False

    def _append(self, tokens: np.ndarray) -> None:
        self.tokens += len(tokens)
        while len(tokens):
            if self._file is None:
                self._file = open(self._staging / f"tokens-{len(self._shards):05d}.bin", "wb")
                self._hash = hashlib.sha256()
            part = tokens[: self._shard_tokens - self._file_tokens].tobytes()
            self._file.write(part)
            self._hash.update(part)
            written = len(part) // self._dtype.itemsize
            self._file_tokens += written
            tokens = tokens[written:]
            if self._file_tokens == self._shard_tokens:
                self._close_shard()

    def _close_shard(self) -> None:
        _flush_to_disk(self._file)
        self._file.close()
        self._shards.append(Shard(f"tokens-{len(self._shards):05d}.bin", self._file_tokens, self._hash.hexdigest()))
        self._file, self._file_tokens = None, 0

    def _finish(self) -> TokenIndex:
        if self._in_document:
            raise ValueError("the last document was not ended")
        if self.tokens == self.documents:  # end tokens at most
            raise UserError(f"{self.directory}: no text to write; the input has {self.documents} documents and 0 tokens")
        if self._file is not None:
            self._close_shard()
        index = TokenIndex(
            dtype=_dtype_name(self._tokenizer.vocab_size),
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self.text_bytes,
            vocab_size=self._tokenizer.vocab_size,
            tokenizer=TokenizerRecord(self._tokenizer.name, self._tokenizer.fingerprint, self._tokenizer.end_token),
            shards=tuple(self._shards),
        )
        with open(self._staging / INDEX_FILE, "w", encoding="utf-8") as file:
            json.dump(index.to_json(), file, indent=1)
            file.write("\n")
            _flush_to_disk(file)
        return index

    def _abandon(self) -> None:
        if self._file is not None:
            self._file.close()


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
        dtype = _disk_dtype(self.index.dtype)
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


def _dtype_name(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _disk_dtype(name: str) -> np.dtype:
    return np.dtype(name).newbyteorder("<")


def _flush_to_disk(file: Any) -> None:
    # The rename must not reach the disk before the content does.
    file.flush()
    os.fsync(file.fileno())
