"""A byte-level BPE of one's own text files."""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scaling_jax.data.bpe import check_vocab_size, train_bpe
from scaling_jax.data.documents import DocumentReader, find_text_files, kind_of
from scaling_jax.data.shard_writer import flush_to_disk
from scaling_jax.data.staging import refuse_existing
from scaling_jax.errors import UserError


class Trained(NamedTuple):
    """What `train_tokenizer` did."""

    vocab_size: int
    text_bytes: int  # learned from
    skipped: int  # bad lines and rows


def train_tokenizer(
    inputs: Sequence[str],
    out: str | Path,
    vocab_size: int,
    *,
    max_bytes: int = 100_000_000,
    field: str = "text",
    split_documents: str = "",
    skip_bad: bool = False,
    on_progress: Callable[[int], None] | None = None,
    on_merging: Callable[[bool], None] | None = None,
) -> Trained:
    """Writes a tokenizer.json (see `bpe.train_bpe`) of the text in `inputs`; the same text gives the same file.

    Args:
      inputs, field, split_documents, skip_bad: as in `tokenize.tokenize_files`.
      out: the file to make; it appears whole or not at all.
      vocab_size: tokens, 257 to 1,048,576.
      max_bytes: most text to learn from, in UTF-8. Each file gives its beginning, in proportion to its size on the disk.
      on_progress: called with the bytes of text until now.
      on_merging: called with True when all text is read and merging begins, which takes long and runs no Python, so that a handler
        of signals waits for its end; with False when it is over, before anything is written.

    Raises:
      UserError: `out` exists or cannot be written, vocab_size or max_bytes is out of range, or an input is bad.
    """
    out = Path(out)
    refuse_existing(out)
    check_vocab_size(vocab_size)  # before a long read
    if max_bytes < 1:
        raise UserError(f"max_bytes is {max_bytes}: must be positive")
    files = find_text_files(inputs)
    if split_documents and ".txt" not in {kind_of(file) for file in files}:
        raise UserError(f"split_documents is {split_documents!r}, for .txt files; there is none")
    total = max(sum(file.stat().st_size for file in files), 1)
    text_bytes = skipped = 0

    def pieces() -> Iterator[str]:
        nonlocal text_bytes, skipped
        for file in files:
            left = max_bytes * file.stat().st_size // total
            reader = DocumentReader(file, field, split_documents, skip_bad)
            for piece, _ in reader:
                encoded = piece.encode("utf-8")
                piece = piece if len(encoded) <= left else encoded[:left].decode("utf-8", errors="ignore")
                left -= len(encoded)
                text_bytes += min(len(encoded), len(encoded) + left)
                yield piece
                if on_progress is not None:
                    on_progress(text_bytes)
                if left <= 0:
                    break
            skipped += reader.skipped
        if on_merging is not None:
            on_merging(True)

    try:
        content = train_bpe(pieces(), vocab_size)
    finally:
        if on_merging is not None:
            on_merging(False)
    draft = out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "w", encoding="utf-8") as file:
            file.write(content)
            flush_to_disk(file)
        refuse_existing(out)
        os.replace(draft, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be looked into has no draft either
            draft.unlink()
    return Trained(vocab_size, text_bytes, skipped)
