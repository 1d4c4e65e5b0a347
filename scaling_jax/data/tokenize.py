"""Text files to token directories, in bounded memory."""

import codecs
import contextlib
import errno
import glob
import itertools
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling_jax.data.shards import ShardWriter, TokenIndex
from scaling_jax.data.staging import refuse_existing, staged_directory
from scaling_jax.data.tokenizers import Tokenizer
from scaling_jax.errors import UserError

SUFFIXES = (".txt", ".txt.xz")

PIECE = 1 << 16  # most characters that are encoded at once
_READ = 1 << 18  # bytes that are read at once

Progress = Callable[[int, int, int], None]


def tokenize_files(
    inputs: Sequence[str],
    out: str | Path,
    tokenizer: Tokenizer,
    holdout_every: int = 0,
    on_progress: Progress | None = None,
    split_documents: str = "",
) -> dict[str, dict[str, Any]]:
    """Writes the tokens of text files under `out`: all of it or, on any error, nothing.

    A document of up to 65,536 characters is encoded whole. A longer one is encoded in pieces of at most so many, each cut
    after the last blank line in reach, failing that after a line, before a space, or anywhere. That keeps memory bounded for
    files of any size. Bytes come out the same however they are cut; the tokens of a FileTokenizer can differ from those of
    the whole document at the cuts, the only places where a merge could have crossed. Blank documents are left out.

    Args:
      inputs: files, directories (searched through) and glob patterns of .txt and .txt.xz files, in UTF-8. All files together
        are sorted by path, each is read once.
      out: a directory to make. With holdout_every 0 it is a token directory; otherwise it holds two, train/ and heldout/.
      tokenizer: gives the tokens.
      holdout_every: documents n, 2n, …, counted from 1, go to heldout/; 0 holds none out.
      on_progress: called with (files done, files, tokens written) after every piece and at the end.
      split_documents: text that separates documents within a file, and is dropped; '' makes each file one document.

    Returns:
      {'train': …, 'heldout': …}, or {'all': …}: for each token directory its 'directory', 'documents', 'tokens',
      'text_bytes', 'shards' (how many) and 'fingerprint'.

    Raises:
      UserError: `out` exists; an input matches nothing, is not UTF-8 (names the byte, of the unpacked text), or is damaged xz;
        there is no text; there are too few documents to hold one out; or the disk is full or cannot be written.
    """
    out = Path(out)
    refuse_existing(out)
    if holdout_every < 0 or holdout_every == 1:
        raise UserError(f"holdout_every is {holdout_every}: must be 0, or at least 2 to leave something to train on")
    files = find_text_files(inputs)
    if not split_documents:
        _require_holdout(len(files), holdout_every, inputs)
    try:
        with contextlib.ExitStack() as stack:
            if holdout_every:
                staging = stack.enter_context(staged_directory(out))
                splits = {"train": staging / "train", "heldout": staging / "heldout"}
            else:
                splits = {"all": out}
            writers = {split: stack.enter_context(ShardWriter(directory, tokenizer)) for split, directory in splits.items()}
            documents = _write(files, writers, tokenizer, holdout_every, split_documents, on_progress)
            if not documents:
                raise UserError(f"{', '.join(map(str, inputs))}: no text in {len(files)} files")
            _require_holdout(documents, holdout_every, inputs)
    except OSError as error:  # of writing: read_text has its own
        reason = "no space left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written: {error.strerror}"
        raise UserError(f"{out}: {reason}; nothing was written") from error
    return {split: _summary(out / split if holdout_every else out, writer.index) for split, writer in writers.items()}


def find_text_files(inputs: Sequence[str]) -> list[Path]:
    """The .txt and .txt.xz files that `inputs` (files, directories, glob patterns) name, sorted, each once.

    Raises:
      UserError: an input names none.
    """
    if not inputs:
        raise UserError(f"no input: name files, directories or patterns of {' or '.join(SUFFIXES)} files")
    files: set[Path] = set()
    for name in map(str, inputs):
        path = Path(name)
        if path.is_dir():
            found = [file for file in path.rglob("*") if _is_text(file)]
        elif path.exists():
            found = [path] if _is_text(path) else []
        else:
            found = [Path(file) for file in glob.glob(name, recursive=True) if _is_text(Path(file))]
        if not found:
            raise UserError(f"{name}: no {' or '.join(SUFFIXES)} file there")
        files.update(found)
    return sorted(files)


def _is_text(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and path.is_file()


def _require_holdout(documents: int, holdout_every: int, inputs: Sequence[str]) -> None:
    if documents < holdout_every:
        raise UserError(
            f"{', '.join(map(str, inputs))}: {documents} documents, so every {holdout_every}th is none to hold out; "
            "hold out more often, split the files into documents, or tokenize held-out files by themselves"
        )


def _write(
    files: Sequence[Path],
    writers: dict[str, ShardWriter],
    tokenizer: Tokenizer,
    holdout_every: int,
    separator: str,
    on_progress: Progress | None,
) -> int:
    """Feeds every document to its writer; returns how many there were."""
    documents = 0
    for done, path in enumerate(files):
        writer = None  # of the document being read; its end closes every file
        for text, ends in split_text(read_text(path), separator):
            if writer is None:
                if ends and not text.strip():
                    continue
                documents += 1
                held_out = holdout_every and documents % holdout_every == 0
                writer = writers["all" if not holdout_every else "heldout" if held_out else "train"]
            writer.extend(tokenizer.encode(text), len(text.encode("utf-8")))
            if ends:
                writer.end_document()
                writer = None
            if on_progress is not None:
                on_progress(done, len(files), sum(split.tokens for split in writers.values()))
    if on_progress is not None:
        on_progress(len(files), len(files), sum(split.tokens for split in writers.values()))
    return documents


def read_text(path: Path) -> Iterator[str]:
    """The text of a .txt or .txt.xz file, chunk by chunk, line ends as they are.

    Raises:
      UserError: it cannot be read, is not UTF-8, or is damaged xz.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the next chunk
    try:
        with lzma.open(path, "rb") if path.name.endswith(".xz") else open(path, "rb") as file:
            while True:
                chunk = file.read(_READ)
                held_back = len(decoder.getstate()[0])  # bytes of a character that the last chunk began
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}: not UTF-8 at byte {offset - held_back + error.start}: {error.reason}") from error
                if text:
                    yield text
                if not chunk:
                    return
                offset += len(chunk)
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path}: damaged xz: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def split_text(chunks: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """Splits text into documents at `separator`, and documents into pieces of at most PIECE characters.

    Yields (piece, whether it ends its document); joined, they are the text without separators. Where it cuts does not depend
    on how the text came in chunks.
    """
    lookahead = PIECE + max(1, len(separator))  # enough to see that a piece neither ends a document nor cuts a separator
    buffer, start = "", 0
    for chunk in itertools.chain(chunks, [None]):
        buffer, start = buffer[start:] + (chunk or ""), 0
        while len(buffer) - start >= lookahead or (chunk is None and start < len(buffer)):
            end = buffer.find(separator, start, start + lookahead) if separator else -1
            if end >= 0:
                yield buffer[start:end], True
                start = end + len(separator)
            elif len(buffer) - start <= PIECE:
                yield buffer[start:], True
                start = len(buffer)
            else:
                cut = _last_cut(buffer, start, start + PIECE)
                yield buffer[start:cut], False
                start = cut


def _last_cut(text: str, start: int, limit: int) -> int:
    """Where to end a piece that begins at `start` and must end by `limit`."""
    for mark, kept in (("\n\n", 2), ("\n", 1), (" ", 0)):  # a word keeps the space before it, as its token does
        cut = text.rfind(mark, start + 1, limit) + kept
        if cut > start + kept:
            return cut
    return limit


def _summary(directory: Path, index: TokenIndex) -> dict[str, Any]:
    return {
        "directory": str(directory),
        "documents": index.documents,
        "tokens": index.tokens,
        "text_bytes": index.text_bytes,
        "shards": len(index.shards),
        "fingerprint": index.fingerprint,
    }
