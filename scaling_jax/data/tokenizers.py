"""Text to token ids and back: plain bytes, a Hugging Face tokenizer.json, or a vocabulary and its merges as GPT-2 has them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from scaling_jax.data import bpe
from scaling_jax.errors import UserError

# The names under which common tokenizers keep the token that ends a document, in order of preference.
END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "[SEP]")
# Under which names a folder may hold a vocabulary and its merges: Hugging Face's, OpenAI's.
VOCABULARY_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_CHOICES = "'bytes', a tokenizer.json, a vocabulary and its merges as vocab.json,merges.txt, or a folder that holds such files"


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    name: str
    vocab_size: int  # every token id is below it
    end_token: int  # follows each document
    fingerprint: str  # sha256 hex; equal exactly when two tokenizers give the same tokens for every text
    lossless: bool  # decode(encode(text)) is text, for every text; only then are bits per byte those of the text
    bytes_V: np.ndarray | None  # UTF-8 bytes of text that each token stands for, float64 [vocab_size]; None unless lossless

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
    lossless = True
    bytes_V = (np.arange(vocab_size) != end_token).astype(np.float64)
    fingerprint = hashlib.sha256(b"scaling_jax tokenizer: UTF-8 bytes, end token 255").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text`, int32 [bytes]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`. End tokens vanish; what is not UTF-8, as a model may write, becomes U+FFFD."""
        return bytes(int(token) for token in tokens if int(token) != self.end_token).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json, read with the `tokenizers` package, or what is made into one.

    Text stays text: a document that spells out "<|endoftext|>" is encoded as those characters, not as the end token. The
    file's own truncation and padding are switched off, since they would cut documents short without a word.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads a tokenizer.json.

        Raises:
          UserError: no such file, not a tokenizer.json, or no end token known in it.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read as a tokenizer: {error.strerror}; give {_CHOICES}") from error
        self._set_up(content, path.name, str(path))

    @classmethod
    def from_vocabulary(cls, vocab_path: Path, merges_path: Path) -> "FileTokenizer":
        """The byte-level BPE of a vocabulary and its merges; the errors are those of `bpe.read_vocabulary`."""
        self = cls.__new__(cls)
        self._set_up(bpe.read_vocabulary(vocab_path, merges_path).encode("utf-8"), f"{vocab_path.name},{merges_path.name}", str(vocab_path))
        return self

    def _set_up(self, content: bytes, name: str, where: str) -> None:
        import tokenizers  # slow to import, and byte-level runs never need it

        self._content, self._where = content, where
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"{where}: not a Hugging Face tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        end = next((token for token in END_TOKENS if token in ids), None)
        if end is None:
            raise UserError(f"{where}: has no end-of-document token; one of {', '.join(END_TOKENS)} must be in its vocabulary")
        self.name = name
        self.vocab_size = max(ids.values()) + 1  # ids may have gaps: their number is not a bound
        self.end_token = ids[end]
        self.fingerprint = hashlib.sha256(content).hexdigest()
        parsed = json.loads(content)
        self._words = bpe.WordEncoder(self._tokenizer) if bpe.splits_into_words(parsed) else None
        special = [end, *(token["content"] for token in parsed.get("added_tokens") or [])]
        self.lossless = bpe.is_lossless(parsed) and not any(ids[token] in self.encode(token) for token in special)
        self.bytes_V = self._count_bytes() if self.lossless else None

    def _count_bytes(self) -> np.ndarray:
        bytes_V, symbols = np.zeros(self.vocab_size), bpe.byte_symbols()  # added tokens are never those of a text, and stand for none
        for text, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if i != self.end_token and symbols.issuperset(text):
                bytes_V[i] = len(text)  # one symbol a byte
        return bytes_V

    def __getstate__(self) -> tuple[bytes, str, str]:  # what was read, for other processes; not the words that were met
        return self._content, self.name, self._where

    def __setstate__(self, state: tuple[bytes, str, str]) -> None:
        self._set_up(*state)

    def limit_cache(self, cache_bytes: int) -> None:
        """Bounds the memory for words that were met, about, in bytes; the tokens do not depend on it."""
        if self._words is not None:
            self._words.cache_bytes = cache_bytes

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [tokens], without special tokens."""
        if self._words is not None:
            return self._words.encode(text)
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; end tokens and special tokens vanish."""
        ids = [int(token) for token in tokens if int(token) != self.end_token]  # a file need not mark its end token as special
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that config.data.tokenizer names.

    Args:
      spec: 'bytes'; the path of a tokenizer.json; 'VOCABULARY,MERGES', the paths of a vocabulary and its merges (see
        `bpe.read_vocabulary`); or a folder that holds tokenizer.json, vocab.json and merges.txt, or encoder.json and vocab.bpe.

    Raises:
      UserError: a file is missing, is none of these, or has no end token; vocabulary and merges do not belong together.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return FileTokenizer(path / "tokenizer.json")
        pair = next((names for names in VOCABULARY_FILES if all((path / name).exists() for name in names)), None)
        if pair is None:
            names = ", ".join(" and ".join(names) for names in VOCABULARY_FILES)
            raise UserError(f"{path}: no tokenizer in this folder; it must hold tokenizer.json, or one of the pairs {names}")
        return FileTokenizer.from_vocabulary(*(path / name for name in pair))
    if "," in spec and not path.exists():
        parts = spec.split(",")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"{spec}: cannot be read as a tokenizer: must be two files, the vocabulary and its merges")
        return FileTokenizer.from_vocabulary(Path(parts[0]), Path(parts[1]))
    return FileTokenizer(path)
