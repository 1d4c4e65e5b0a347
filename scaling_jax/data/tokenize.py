"""Text files to token directories, in bounded memory, by several processes, and continued where it was stopped."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from scaling_jax.data.documents import PIECE, DocumentReader, find_text_files, kind_of
from scaling_jax.data.encode_pool import EncodePool, Part
from scaling_jax.data.resumption import Checkpoints, Position
from scaling_jax.data.shard_writer import SHARD_TOKENS, ShardFiles
from scaling_jax.data.shards import VERSION, TokenIndex
from scaling_jax.data.staging import DATA, RESUME, partial_of, refuse_existing, resumable_directory, staged_directory
from scaling_jax.data.tokenizers import ByteTokenizer, Tokenizer
from scaling_jax.errors import UserError

BATCH = 1 << 19  # characters that are encoded at once, about
BATCH_PARTS = 1 << 13  # and most documents or pieces
CHECKPOINT_TOKENS = 1 << 24
WORKER_BYTES = 1 << 22  # input, as it lies on the disk, that a process is worth starting for


class Progress(NamedTuple):
    """How far it is."""

    files_done: int
    files: int
    read_bytes: int  # of the files, as they lie on the disk
    total_bytes: int
    text_bytes: int  # written, of UTF-8 text, by earlier processes too
    tokens: int  # written


@dataclasses.dataclass(frozen=True)
class _Batch:
    parts: list[Part]
    position: Position  # after them
    read_bytes: int  # until then


def tokenize_files(
    inputs: Sequence[str],
    out: str | Path,
    tokenizer: Tokenizer,
    holdout_every: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    split_documents: str = "",
    *,
    field: str = "text",
    skip_bad: bool = False,
    stretch_characters: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes the tokens of text files under `out`: all of it or, on any error, nothing.

    A document of up to 65,536 characters is encoded whole. A longer one is encoded in pieces of at most so many, each cut before the
    last space in reach (see `documents.split_text`). That keeps memory bounded for files of any size. Bytes, and byte-level BPE that
    splits text as GPT-2's does, come out as those of the whole document, wherever its text has a space or a line end within 65,536
    characters; other tokenizers can give other tokens at the cuts. Blank documents are left out.

    What is written depends on the text, the tokenizer and the options alone, bit for bit: not on `workers`, nor on interruptions.

    Args:
      inputs: files, directories (searched through) and glob patterns of .txt, .jsonl and .parquet files, plain, .gz, .xz or .zst. All
        files together are sorted by path, each is read once. See `documents.DocumentReader` for what is a document in each.
      out: a directory to make. With holdout_every 0 it is a token directory; otherwise it holds two, train/ and heldout/.
      tokenizer: gives the tokens.
      holdout_every: documents n, 2n, …, counted from 1, go to heldout/; 0 holds none out.
      on_progress: called at the beginning, after every batch of documents or pieces, and at the end.
      split_documents: text that separates documents within a .txt, and is dropped; '' makes each .txt one document.
      field: of a .jsonl's lines or a .parquet's rows, that holds the document.
      skip_bad: leave bad lines and rows out, and count them.
      stretch_characters: most characters of a document of a .txt, at most 65,536: longer ones are cut into several, if possible between
        paragraphs, so that what is held out lies all over a long text; 0 cuts none.
      shard_tokens: tokens in each shard but the last.
      workers: processes that encode; 1 encodes in this one. Fewer are started where there is little to encode.
      resume: keep what is finished in a hidden sibling of `out` when stopped, even by a crash, and continue from it: from the last
        16,777,216 tokens, or the last shard. Input, tokenizer and options must be the same; where they are not, it starts again.
      say: is told that it continues or why it does not, and how many bad lines or rows were left out.

    Returns:
      {'train': …, 'heldout': …}, or {'all': …}: for each token directory its 'directory', 'documents', 'tokens',
      'text_bytes', 'shards' (how many) and 'fingerprint'.

    Raises:
      UserError: `out` exists, or another process with `resume` is at it; an input matches nothing, cannot be read or is bad (see
        `documents.DocumentReader`); there is no text; there are too few documents to hold one out; or the disk is full or cannot be
        written.
    """
    out = Path(out)
    refuse_existing(out)
    if holdout_every < 0 or holdout_every == 1:
        raise UserError(f"holdout_every is {holdout_every}: must be 0, or at least 2 to leave something to train on")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens is {shard_tokens}: must be positive")
    files = find_text_files(inputs)
    kinds = {kind_of(file) for file in files}
    if split_documents and ".txt" not in kinds:
        raise UserError(f"split_documents is {split_documents!r}, for .txt files; there are only {' and '.join(sorted(kinds))}")
    if not 0 <= stretch_characters <= PIECE:
        raise UserError(f"stretch_characters is {stretch_characters}: must be from 1 to {PIECE:,}, or 0")
    if stretch_characters and ".txt" not in kinds:
        raise UserError(f"stretch_characters is {stretch_characters}, for .txt files; there are only {' and '.join(sorted(kinds))}")
    if kinds == {".txt"} and not split_documents and not stretch_characters:
        _require_holdout(len(files), holdout_every, inputs)
    say = say or (lambda message: None)
    kept = ""  # what to add to a message where something was kept
    try:
        with contextlib.ExitStack() as stack:
            if resume:
                folder = stack.enter_context(resumable_directory(out)) / DATA
            else:
                folder = stack.enter_context(staged_directory(out))
            splits = {"train": "train", "heldout": "heldout"} if holdout_every else {"all": ""}
            writers = {}
            for split, name in splits.items():
                (folder / name).mkdir(exist_ok=True)
                writers[split] = ShardFiles(folder / name, tokenizer, shard_tokens, out / name)
                stack.callback(writers[split].close)
            start, checkpoints = Position(), None
            if resume:
                options = [VERSION, PIECE, tokenizer.name, tokenizer.fingerprint, holdout_every, split_documents, field, shard_tokens]
                options += [stretch_characters]
                checkpoints = Checkpoints(folder.parent, hashlib.sha256(json.dumps(options).encode()).hexdigest(), files)
                start, note = checkpoints.restore(writers, skip_bad)
                if note:
                    say(note)
                kept = f". {folder.parent} keeps what was done: once that is mended the same command continues; delete it to start again"
            reading = _Reading(files, start, (field, split_documents, skip_bad, stretch_characters), holdout_every)
            workers = 1 if isinstance(tokenizer, ByteTokenizer) else min(workers, max(1, reading.total_bytes // WORKER_BYTES))
            with EncodePool(tokenizer, workers) as pool:
                _write(reading, writers, pool, 2 * workers if workers > 1 else 0, checkpoints, on_progress)
            if not reading.documents:
                raise UserError(f"{', '.join(map(str, inputs))}: no text in {len(files)} files{_left_out(reading)}")
            _require_holdout(reading.documents, holdout_every, inputs)
            indices = {split: writer.finish() for split, writer in writers.items()}
    except OSError as error:  # of writing: reading has its own
        reason = "no space left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written: {error.strerror}"
        raise UserError(f"{out}: {reason}{kept if _is_kept(out) else '; nothing was written'}") from error
    except UserError as error:
        raise UserError(f"{error}{kept if _is_kept(out) else ''}") from error
    if reading.skipped:
        say(_left_out(reading).removeprefix("; "))
    return {split: _summary(out / name, indices[split]) for split, name in splits.items()}


class _Reading:
    """The input as batches of parts, from a position on; counts documents, and bad lines and rows, from the beginning."""

    def __init__(self, files: Sequence[Path], start: Position, options: tuple[str, str, bool, int], holdout_every: int) -> None:
        """`options` are those of DocumentReader after its path."""
        self.files = files
        self.documents, self.skipped = start.documents, start.skipped
        self.first_fault = start.first_fault
        sizes = [file.stat().st_size for file in files]
        self.total_bytes = sum(sizes)
        self._sizes = sizes
        self.start, self.start_bytes = start, sum(sizes[: start.file])
        self._options = options
        self._holdout_every = holdout_every

    def batches(self) -> Iterator[_Batch]:
        parts: list[Part] = []
        held = 0
        read_bytes = self.start_bytes
        for number in range(self.start.file, len(self.files)):
            reader = DocumentReader(self.files[number], *self._options)
            before = Position(number, 0, self.documents, self.skipped, self.first_fault)
            done = self.start.pieces if number == self.start.file else 0
            split = None  # of the document being read
            for pieces, (text, ends) in enumerate(reader, start=1):
                if split is None:
                    self.documents += 1
                    held_out = self._holdout_every and self.documents % self._holdout_every == 0
                    split = "all" if not self._holdout_every else "heldout" if held_out else "train"
                if pieces > done:
                    parts.append(Part(text, split, ends))
                    held += len(text)
                if ends:
                    split = None
                if held >= BATCH or len(parts) >= BATCH_PARTS:
                    yield _Batch(parts, dataclasses.replace(before, pieces=pieces), read_bytes + reader.read_bytes)
                    parts, held = [], 0
            self.skipped += reader.skipped
            self.first_fault = self.first_fault or reader.first_fault
            read_bytes += self._sizes[number]
            if parts and (held >= BATCH // 8 or number == len(self.files) - 1):
                yield _Batch(parts, Position(number + 1, 0, self.documents, self.skipped, self.first_fault), read_bytes)
                parts, held = [], 0


def _write(
    reading: _Reading,
    writers: dict[str, ShardFiles],
    pool: EncodePool,
    ahead: int,
    checkpoints: Checkpoints | None,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Encodes every batch, as many as `ahead` at a time, and appends them in order."""

    def tokens() -> int:
        return sum(writer.tokens for writer in writers.values())

    def show(position: Position, read_bytes: int) -> None:
        if on_progress is not None:
            text_bytes = sum(writer.text_bytes for writer in writers.values())
            on_progress(Progress(position.file, len(reading.files), read_bytes, reading.total_bytes, text_bytes, tokens()))

    saved = tokens()
    interval = min(CHECKPOINT_TOKENS, *(writer.shard_tokens for writer in writers.values()))
    waiting: deque[tuple[_Batch, Future]] = deque()

    def append() -> None:
        nonlocal saved
        batch, encoded = waiting.popleft()
        for split, part in encoded.result().items():
            writers[split].append(*part)
        if checkpoints is not None:
            if not batch.position.pieces:
                checkpoints.pass_file_end(batch.position, writers)
            if tokens() - saved >= interval:
                checkpoints.save(batch.position, writers)
                saved = tokens()
        show(batch.position, batch.read_bytes)

    show(reading.start, reading.start_bytes)
    for batch in reading.batches():
        waiting.append((batch, pool.submit(batch.parts)))
        while len(waiting) > ahead:
            append()
    while waiting:
        append()
    show(Position(len(reading.files)), reading.total_bytes)


def _left_out(reading: _Reading) -> str:
    return f"; {reading.skipped:,} bad lines or rows were left out, the first: {reading.first_fault}" if reading.skipped else ""


def _is_kept(out: Path) -> bool:
    return os.path.exists(partial_of(out) / RESUME)  # false where it cannot be seen, as `out` itself cannot then


def _require_holdout(documents: int, holdout_every: int, inputs: Sequence[str]) -> None:
    if documents < holdout_every:
        raise UserError(
            f"{', '.join(map(str, inputs))}: {documents} documents, so every {holdout_every}th is none to hold out; "
            "hold out more often, split the files into documents, or tokenize held-out files by themselves"
        )


def _summary(directory: Path, index: TokenIndex) -> dict[str, Any]:
    return {
        "directory": str(directory),
        "documents": index.documents,
        "tokens": index.tokens,
        "text_bytes": index.text_bytes,
        "shards": len(index.shards),
        "fingerprint": index.fingerprint,
    }
