"""Text to token ids and back: plain bytes, or a Hugging Face tokenizer.json."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from scaling_jax.errors import UserError

# The names under which common tokenizers keep the token that ends a document, in order of preference.
END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    name: str
    vocab_size: int  # every token id is below it
    end_token: int  # follows each document
    fingerprint: str  # sha256 hex; equal exactly when two tokenizers give the same tokens for every text

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [tokens], without any special tokens."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; end tokens vanish."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte. The end token is 255: the byte 0xFF never occurs in UTF-8."""

    name = "bytes"
    vocab_size = 256
    end_token = 255
    fingerprint = hashlib.sha256(b"scaling_jax tokenizer: UTF-8 bytes, end token 255").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text`, int32 [bytes]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`. End tokens vanish; what is not UTF-8, as a model may write, becomes U+FFFD."""
        return bytes(int(token) for token in tokens if int(token) != self.end_token).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json, read with the `tokenizers` package.

    Text stays text: a document that spells out "<|endoftext|>" is encoded as those characters, not as the end token. The
    file's own truncation and padding are switched off, since they would cut documents short without a word.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads `path`.

        Raises:
          UserError: no such file, not a tokenizer.json, or no end token known in it.
        """
        import tokenizers  # slow to import, and byte-level runs never need it

        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read as a tokenizer: {error.strerror}; give 'bytes' or a tokenizer.json") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"{path}: not a Hugging Face tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        end = next((token for token in END_TOKENS if token in ids), None)
        if end is None:
            raise UserError(f"{path}: has no end-of-document token; one of {', '.join(END_TOKENS)} must be in its vocabulary")
        self.name = path.name
        self.vocab_size = max(ids.values()) + 1  # ids may have gaps: their number is not a bound
        self.end_token = ids[end]
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [tokens], without special tokens."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; end tokens and special tokens vanish."""
        ids = [int(token) for token in tokens if int(token) != self.end_token]  # a file need not mark its end token as special
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that config.data.tokenizer names: 'bytes', or the path of a tokenizer.json.

    Raises:
      UserError: the file is missing, is no tokenizer.json, or has no end token.
    """
    return ByteTokenizer() if spec == "bytes" else FileTokenizer(spec)
