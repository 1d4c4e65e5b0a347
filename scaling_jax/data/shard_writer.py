"""Writing token directories, from the start or from where an earlier process stopped."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from scaling_jax.data.shards import INDEX_FILE, Shard, TokenIndex, TokenizerRecord, disk_dtype, dtype_name
from scaling_jax.data.staging import refuse_existing, staged_directory
from scaling_jax.data.tokenizers import Tokenizer
from scaling_jax.errors import UserError

SHARD_TOKENS = 1 << 26


class ShardFiles:
    """The shards and the index of one token directory, written in place.

    `state` says where it is, and from a state another process, or the same one, can go on: what was written later is cut off.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS, target: Path | None = None) -> None:
        """Opens nothing yet.

        Args:
          directory: exists and is this object's own.
          tokenizer: gave the tokens; its vocab_size, end_token, name, fingerprint and losslessness are recorded.
          shard_tokens: tokens in each shard but the last.
          target: what errors call the directory.
        """
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens is {shard_tokens}: must be positive")
        self.directory = directory
        self.dtype = disk_dtype(dtype_name(tokenizer.vocab_size))
        self.tokens = self.documents = self.text_bytes = 0
        self._target = target or directory
        self._tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._file_tokens = 0

    def append(self, tokens: np.ndarray, text_bytes: int, documents: int) -> None:
        """Appends tokens of any number of documents or parts of documents.

        Args:
          tokens: integers [tokens], end tokens included.
          text_bytes: UTF-8 bytes of their text.
          documents: how many of them end here.

        Raises:
          UserError: a token is outside of the tokenizer's vocabulary.
        """
        vocab_size = self._tokenizer.vocab_size
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
            raise UserError(
                f"{self._target}: tokens from {tokens.min()} to {tokens.max()}; "
                f"the vocabulary of tokenizer {self._tokenizer.name} ends at {vocab_size - 1}"
            )
        self.tokens += len(tokens)
        self.text_bytes += text_bytes
        self.documents += documents
        tokens = tokens.astype(self.dtype, copy=False)
        while len(tokens):
            if self._file is None:
                self._file, self._hash = open(self._path(len(self._shards)), "wb"), hashlib.sha256()
            part = tokens[: self.shard_tokens - self._file_tokens]
            self._file.write(part.tobytes())
            self._hash.update(part.tobytes())
            self._file_tokens += len(part)
            tokens = tokens[len(part) :]
            if self._file_tokens == self.shard_tokens:
                self._close_shard()

    def finish(self) -> TokenIndex:
        """Closes the last shard and writes the index.

        Raises:
          UserError: there is no text.
        """
        if self.tokens == self.documents:  # end tokens at most
            raise UserError(f"{self._target}: no text to write; the input has {self.documents} documents and 0 tokens")
        if self._file is not None:
            self._close_shard()
        tokenizer = self._tokenizer
        index = TokenIndex(
            dtype=dtype_name(tokenizer.vocab_size),
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self.text_bytes,
            vocab_size=tokenizer.vocab_size,
            tokenizer=TokenizerRecord(tokenizer.name, tokenizer.fingerprint, tokenizer.end_token, tokenizer.lossless),
            shards=tuple(self._shards),
        )
        with open(self.directory / INDEX_FILE, "w", encoding="utf-8") as file:
            json.dump(index.to_json(), file, indent=1)
            file.write("\n")
            flush_to_disk(file)
        return index

    def close(self) -> None:
        """Closes the shard that is being written, as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from, for JSON. It holds once `flush` has returned."""
        counts = {"tokens": self.tokens, "documents": self.documents, "text_bytes": self.text_bytes, "open_tokens": self._file_tokens}
        return counts | {"shards": [dataclasses.asdict(shard) for shard in self._shards]}

    def flush(self) -> None:
        """Sees to it that the disk has all that was appended."""
        if self._file is not None:
            flush_to_disk(self._file)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state of this directory, and cuts off what was written later.

        Raises:
          ValueError: the directory holds less than the state says.
        """
        self.close()
        shards = [Shard(**shard) for shard in state["shards"]]
        lengths = [shard.tokens for shard in shards] + ([state["open_tokens"]] if state["open_tokens"] else [])
        for n, length in enumerate(lengths):
            path = self._path(n)
            if not path.is_file() or path.stat().st_size < length * self.dtype.itemsize:
                raise ValueError(f"{path}: shorter than it was")
        for path in self.directory.iterdir():
            if path not in [self._path(n) for n in range(len(lengths))]:
                path.unlink()
        self.tokens, self.documents, self.text_bytes = state["tokens"], state["documents"], state["text_bytes"]
        self._shards, self._file_tokens = shards, state["open_tokens"]
        if self._file_tokens:
            path = self._path(len(shards))
            os.truncate(path, self._file_tokens * self.dtype.itemsize)
            with open(path, "rb") as file:
                self._hash = hashlib.file_digest(file, "sha256")
            self._file = open(path, "ab")

    def _path(self, n: int) -> Path:
        return self.directory / f"tokens-{n:05d}.bin"

    def _close_shard(self) -> None:
        flush_to_disk(self._file)
        self._file.close()
        self._shards.append(Shard(self._path(len(self._shards)).name, self._file_tokens, self._hash.hexdigest()))
        self._file, self._file_tokens = None, 0


class ShardWriter:
    """Writes one token directory; a context manager.

    Everything goes to a hidden sibling directory, which takes the final name on a clean exit and is deleted on an error.
    After a clean exit `index` describes what was written.
    """

    def __init__(self, directory: str | Path, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS) -> None:
        """Opens nothing yet.

        Args:
          directory: the token directory to be; parents are made as needed.
          tokenizer: gave the tokens; its vocab_size, end_token, name, fingerprint and losslessness are recorded.
          shard_tokens: tokens in each shard but the last.

        Raises:
          UserError: `directory` exists.
        """
        self.directory = Path(directory)
        refuse_existing(self.directory)
        self.index: TokenIndex | None = None
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._in_document = False

    def __enter__(self) -> "ShardWriter":
        self._exit = contextlib.ExitStack()
        staging = self._exit.enter_context(staged_directory(self.directory))
        self._files = ShardFiles(staging, self._tokenizer, self._shard_tokens, self.directory)
        self._exit.callback(self._files.close)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            try:
                if self._in_document:
                    raise ValueError("the last document was not ended")
                self.index = self._files.finish()
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
        self._in_document = True
        self._files.append(np.asarray(tokens), text_bytes, documents=0)

    def end_document(self) -> None:
        """Appends the end token."""
        self._files.append(np.asarray([self._tokenizer.end_token]), text_bytes=0, documents=1)
        self._in_document = False


def flush_to_disk(file: Any) -> None:
    """Flushes a file and waits for the disk: a rename must not reach it before the content does."""
    file.flush()
    os.fsync(file.fileno())
