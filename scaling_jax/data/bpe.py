"""Byte-level byte pair encoding: quick encoding, vocabularies as OpenAI published GPT-2's, and training."""

import array
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.errors import UserError

END_TOKEN = "<|endoftext|>"
SMALLEST, LARGEST = 257, 1 << 20  # vocabularies to train: every byte, and the end token; no use is known for more
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

# What a ByteLevel pre-tokenizer takes for space: Unicode's White_Space. (Python's own \s has U+001C to U+001F besides.)
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_WORDS = re.compile(rf"[{_SPACE}]*+(?:[A-Za-z]++(?![^\x00-\x7f])|[^{_SPACE}]++|\Z)")
CACHE_BYTES = 1 << 26
_ENTRY_BYTES = 256  # of memory, about, for a short word and its tokens


class WordEncoder:
    """Encodes text as a byte-level BPE does, word by word, with a memory for words that came before.

    A word is a run of spaces and then English letters, where no other letter can follow, or else everything up to the next space.
    ByteLevel's regular expression (GPT-2's) never matches across the beginning of a word, and what it matches before does not depend on
    what follows: so the tokens are those of the text as a whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a `tokenizers.Tokenizer` for which `splits_into_words` holds."""
        self._tokenizer = tokenizer
        self._cache: dict[str, bytes] = {}
        self._held_bytes = 0
        self.cache_bytes = CACHE_BYTES  # of memory, about; when words take more, they are forgotten

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [tokens]."""
        words = _WORDS.findall(text)
        missing = set(words).difference(self._cache)
        if missing:
            if self._held_bytes > self.cache_bytes:
                self._cache, self._held_bytes, missing = {}, 0, set(words)
            new = list(missing)
            encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
            self._cache.update((word, array.array("i", encoding.ids).tobytes()) for word, encoding in zip(new, encodings, strict=True))
            self._held_bytes += sum(max(_ENTRY_BYTES, 16 * len(word)) for word in new)
        return np.frombuffer(b"".join(map(self._cache.__getitem__, words)), np.int32)


def splits_into_words(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json (parsed) is of the kind that `WordEncoder` is exact for."""
    pre_tokenizer = content.get("pre_tokenizer") or {}
    return (
        _is_plain_bpe(content)
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space", True)
    )


def is_lossless(content: Mapping[str, Any]) -> bool:
    """Whether decoding what a tokenizer.json (parsed) encoded gives back every text, from its structure.

    True for byte-level BPE with all 256 bytes, no normalizer, no space put before the text and no token that is taken out of it.
    """
    pre_tokenizer = content.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", []) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not steps or not _is_plain_bpe(content):
        return False
    *before, last = steps
    return (
        last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space", True)
        and all(step.get("type") == "Split" and step.get("behavior") != "Removed" for step in before)
        and (content.get("decoder") or {}).get("type") == "ByteLevel"
        and byte_symbols() <= content["model"]["vocab"].keys()
    )


def _is_plain_bpe(content: Mapping[str, Any]) -> bool:
    model = content["model"]
    affixes = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and not any(affixes)
        and content.get("normalizer") is None
        and all(token["special"] for token in content.get("added_tokens") or [])
    )


def byte_symbols() -> set[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies."""
    import tokenizers

    return set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError if no tokenizer of so many tokens can be trained."""
    if not SMALLEST <= vocab_size <= LARGEST:
        raise UserError(
            f"vocab_size is {vocab_size}: must be at least {SMALLEST}, a token for every byte and {END_TOKEN}, and at most {LARGEST:,}"
        )


def train_bpe(pieces: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) of the text in `pieces`, as a tokenizer.json.

    Lossless: every byte has a token. Token 0 is <|endoftext|>. The same pieces give the same file.

    Args:
      pieces: text; merges do not cross from one piece to the next. Memory grows with the number of different words.
      vocab_size: tokens, 257 to 1,048,576.

    Raises:
      UserError: vocab_size is none of these, or the text does not have so many pairs to merge.
    """
    import tokenizers

    check_vocab_size(vocab_size)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_TOKEN], initial_alphabet=sorted(byte_symbols()), show_progress=False
    )
    tokenizer.train_from_iterator(pieces, trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(f"vocab_size is {vocab_size}: the text has pairs for {found} tokens only; give more text, or ask for so many")
    return tokenizer.to_str(pretty=True) + "\n"


def read_vocabulary(vocab_path: Path, merges_path: Path) -> str:
    """A vocabulary and its merges, in the files that OpenAI published GPT-2 in, as a tokenizer.json.

    Args:
      vocab_path: a JSON object, from token to id: encoder.json, vocab.json.
      merges_path: two symbols a line, the first merge first: vocab.bpe, merges.txt.

    Raises:
      UserError: a file cannot be read or has another form; a byte, a part or the result of a merge, or <|endoftext|> is not in the
        vocabulary; or the vocabulary has a token that is none of these. Names the file, and the line or token.
    """
    vocab = _read_vocab(vocab_path)
    merges = _read_merges(merges_path, vocab, vocab_path)
    if missing := sorted(byte_symbols() - vocab.keys()):
        raise UserError(f"{vocab_path}: not a byte-level vocabulary: has no token {missing[0]!r}, which stands for a byte")
    if END_TOKEN not in vocab:
        raise UserError(f"{vocab_path}: has no end-of-document token, {END_TOKEN}")
    known = byte_symbols() | {left + right for left, right in merges} | {END_TOKEN}
    if strangers := sorted(vocab.keys() - known, key=vocab.__getitem__):
        raise UserError(
            f"{vocab_path}: token {strangers[0]!r} is neither a byte nor the result of a merge in {merges_path}; "
            f"{len(vocab):,} tokens and {len(merges):,} merges do not belong together, {len(strangers):,} tokens are like that"
        )
    end = {"id": vocab[END_TOKEN], "content": END_TOKEN, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
        "pre_tokenizer": _PRE_TOKENIZER,
        "decoder": _PRE_TOKENIZER,
        "model": {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges},
    }
    return json.dumps(content)


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise UserError(f"{path}: not a vocabulary, a JSON object from token to id")
    tokens = {}
    for token, i in vocab.items():
        if not 0 <= i < len(vocab):
            raise UserError(f"{path}: token {token!r} has id {i}: ids of {len(vocab):,} tokens must be 0 to {len(vocab) - 1}")
        if i in tokens:
            raise UserError(f"{path}: tokens {tokens[i]!r} and {token!r} both have id {i}")
        tokens[i] = token
    return vocab


def _read_merges(path: Path, vocab: Mapping[str, int], vocab_path: Path) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(_read(path).split("\n"), start=1):  # not splitlines: U+0085 stands for a byte
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"{path}, line {number}: {line!r} is not a merge, two symbols with a space between")
        for token in (*parts, "".join(parts)):
            if token not in vocab:
                raise UserError(f"{path}, line {number}: {token!r} is not in the vocabulary {vocab_path}; they do not belong together")
        merges.append((parts[0], parts[1]))
    return merges


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: {error.reason}") from error
