"""Documents in .txt, .jsonl and .parquet files, each as a stream of pieces, so that memory does not grow with its length."""

import codecs
import contextlib
import glob
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from scaling_jax.data.unpack import PACKINGS, packing_of, read_chunks
from scaling_jax.errors import UserError

KINDS = (".txt", ".jsonl", ".parquet")
SUFFIXES = tuple(kind + packing for kind in KINDS for packing in ("", *PACKINGS))

PIECE = 1 << 16  # most characters of a piece
LINE = 1 << 24  # most bytes of a line of .jsonl: lists of lists take 27 times as much memory
_PARQUET_READ = 1 << 23  # bytes of text, about, that are taken from a .parquet at once
_PARQUET_ROWS = 16  # most rows of them: rows can be far larger than their column's size tells, where they repeat
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_NAMES = 10  # most names of fields that a message lists
_DECODER = json.JSONDecoder(parse_int=float)  # Python's own integers end at 4,300 digits


def find_text_files(inputs: Sequence[str]) -> list[Path]:
    """The files of SUFFIXES, in upper or lower case, that `inputs` (files, directories, glob patterns) name, sorted.

    Directories, those that a pattern matches too, are searched through; links are followed. Where several names lead to one file,
    it stands there once, under the first of them.

    Raises:
      UserError: an input is empty, names no such file, or leads to a directory that cannot be read.
    """
    kinds = f"{', '.join(KINDS)} file, plain or {', '.join(PACKINGS)}"
    if not inputs:
        raise UserError(f"no input: name a {kinds}, a directory or a pattern")
    files: set[Path] = set()
    for name in map(str, inputs):
        if not name.strip():
            raise UserError(f"input {','.join(map(str, inputs))!r}: a name in it is empty; name a {kinds}, a directory or a pattern")
        try:
            found = _find(name)
        except OSError as error:
            raise UserError(f"{error.filename or name}: cannot be read: {error.strerror}") from error
        if not found:
            raise UserError(f"{name}: no {kinds} there")
        files.update(found)
    first: dict[str, Path] = {}
    for file in sorted(files):
        first.setdefault(os.path.realpath(file), file)
    return list(first.values())


def _find(name: str) -> list[Path]:
    matches = [name] if os.path.exists(name) else _match(name)
    if not matches and not glob.has_magic(name):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(name)  # says why it cannot be looked for
    found: list[Path] = []
    visited: set[str] = set()
    for path in map(Path, matches):
        under = [Path(folder, name) for folder, names in _walk(path, visited) for name in names] if path.is_dir() else [path]
        found.extend(filter(_is_text, under))
    return found


def _match(pattern: str) -> list[str]:
    """What glob.glob gives, but each folder that ** stands for once: glob goes round and round where links lead upwards."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    at = parts.index("**")
    visited: set[str] = set()
    folders = [folder for base in (_match(str(Path(*parts[:at]))) if at else ["."]) for folder, _ in _walk(Path(base), visited)]
    if at == len(parts) - 1:
        return folders
    return [match for folder in folders for match in _match(str(Path(glob.escape(folder), *parts[at + 1 :])))]


def _walk(path: Path, visited: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Each folder under `path`, itself included, and the names of its files; those whose real path is in `visited` are passed over."""

    def fail(error: OSError) -> NoReturn:
        raise error

    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True) if path.is_dir() else ():
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        yield folder, names


def kind_of(path: Path) -> str:
    """'.txt', '.jsonl' or '.parquet'."""
    return (Path(path.stem) if packing_of(path) else path).suffix.lower()


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


class DocumentReader:
    """The documents of one file, in order; iterable once.

    Iteration yields (piece of at most PIECE characters, whether it ends its document); joined, the pieces are the text, line ends
    as they are. Where a document is cut depends on its text alone. Blank documents are left out.

    A .txt is one document, or, with a separator or in stretches, several. A line of a .jsonl, and a row of a .parquet, is one document
    each: the string in its field. Blank lines of a .jsonl are passed over. Memory stays bounded for a .txt of any length and for a
    .jsonl or .parquet of any number of documents; a single document of theirs has to fit.

    Attributes, as of the last piece:
      read_bytes: how much of the file, as it lies on the disk.
      skipped: bad lines or rows that were left out.
      first_fault: what was wrong with the first of them, '' if there was none.

    Raises, while iterating:
      UserError: the file cannot be read or is damaged, a .txt is not UTF-8, a .parquet has no such column of strings; or, unless
        skip_bad, a line is not UTF-8, not a JSON object, longer than LINE, without the field, or with something else in it than a
        string; or such a row. The message names the file, and the byte, line or row, counted from 0, 1 and 1.
    """

    def __init__(self, path: Path, field: str = "text", separator: str = "", skip_bad: bool = False, stretch_characters: int = 0) -> None:
        """Opens nothing yet.

        Args:
          path: a file with a suffix of SUFFIXES.
          field: of a .jsonl's lines or a .parquet's rows, that holds the document.
          separator: text that separates documents within a .txt, and is dropped; '' makes the file one document.
          skip_bad: leave bad lines and rows out, and count them.
          stretch_characters: most characters of a document of a .txt, at most PIECE: longer ones are cut, if possible between
            paragraphs; 0 cuts none.
        """
        self.stretch_characters = stretch_characters
        self.path, self.field, self.separator, self.skip_bad = path, field, separator, skip_bad
        self.read_bytes = self.skipped = 0
        self.first_fault = ""

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        kind = kind_of(self.path)
        if kind == ".txt":
            pieces: Iterable[tuple[str, bool]] = split_text(self._text(), self.separator, self.stretch_characters)
        else:
            documents = self._lines() if kind == ".jsonl" else self._rows()
            pieces = itertools.chain.from_iterable(split_text([document], "") for document in documents)
        starts = True
        for piece, ends in pieces:
            if starts and ends and not piece.strip():
                continue
            yield piece, ends
            starts = ends

    def _bytes(self) -> Iterator[bytes]:
        for chunk, read_bytes in read_chunks(self.path):
            self.read_bytes = read_bytes
            yield chunk

    def _fault(self, message: str) -> None:
        if not self.skip_bad:
            raise UserError(f"{message}; mend it, or leave such documents out with --skip_bad")
        self.skipped += 1
        self.first_fault = self.first_fault or message

    def _text(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = 0  # of the next chunk
        for chunk in itertools.chain(self._bytes(), [b""]):
            held_back = len(decoder.getstate()[0])  # bytes of a character that the last chunk began
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path}: not UTF-8 at byte {offset - held_back + error.start}: {error.reason}") from error
            offset += len(chunk)
            yield text

    def _lines(self) -> Iterator[str]:
        for number, line in enumerate(split_lines(self._bytes()), start=1):
            if line is None:
                self._fault(f"{self.path}, line {number}: longer than {LINE:,} bytes")
            elif line.strip():
                try:
                    document = parse_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, self.field)
                except ValueError as error:
                    self._fault(f"{self.path}, line {number}: {error}")
                else:
                    yield document

    def _rows(self) -> Iterator[str]:
        import pyarrow
        from pyarrow import parquet

        file_bytes = self.path.stat().st_size
        row = 0
        try:
            with _unpacked(self.path) as raw, parquet.ParquetFile(raw, buffer_size=1 << 20) as file:
                column = self._column(pyarrow, file.schema_arrow)
                rows = max(file.metadata.num_rows, 1)
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(_batch_rows(file, group, column), [group], [self.field], use_threads=False):
                        for value in batch.column(0):
                            row += 1
                            self.read_bytes = file_bytes * row // rows
                            try:
                                document = _string(value.as_py())
                            except UnicodeDecodeError as error:
                                self._fault(
                                    f"{self.path}, row {row}: field {self.field!r} is not UTF-8 at byte {error.start}: {error.reason}"
                                )
                            except ValueError as error:
                                self._fault(f"{self.path}, row {row}: field {self.field!r} {error}")
                            else:
                                yield document
        except (pyarrow.ArrowException, OSError) as error:  # an Arrow error can be an OSError without a number
            if isinstance(error, OSError) and error.strerror:
                raise UserError(f"{self.path}: cannot be read: {error.strerror}") from error
            raise UserError(f"{self.path}: damaged parquet: {str(error).splitlines()[0]}") from error

    def _column(self, pyarrow: Any, schema: Any) -> int:
        """The index, among the file's columns, of the field."""
        if self.field not in schema.names:
            raise UserError(f"{self.path}: no field {self.field!r}; --field must be one of {_listed(schema.names)}")
        if (count := schema.names.count(self.field)) > 1:
            raise UserError(f"{self.path}: {count} columns are called {self.field!r}; the one with the text must have a name of its own")
        types = pyarrow.types
        kind = schema.field(self.field).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
        if not any(getattr(types, f"is_{test}")(value) for test in tests):
            raise UserError(f"{self.path}: field {self.field!r} holds {kind}, must hold strings")
        before = schema.names[: schema.names.index(self.field)]
        return sum(_leaves(schema.field(name).type) for name in before)


def _leaves(kind: Any) -> int:
    """Columns of a .parquet that a field of this type takes."""
    return sum(_leaves(kind.field(i).type) for i in range(kind.num_fields)) if kind.num_fields else 1


def _batch_rows(file: Any, group: int, column: int) -> int:
    """Rows of a row group that hold about _PARQUET_READ bytes."""
    group_metadata = file.metadata.row_group(group)
    stored = max(group_metadata.column(column).total_uncompressed_size, 1)
    return max(1, min(_PARQUET_ROWS, _PARQUET_READ * group_metadata.num_rows // stored))


def _unpacked(path: Path) -> BinaryIO:
    """A .parquet, which is read from its end: what is packed around it is taken off on the disk first."""
    if not packing_of(path):
        return open(path, "rb")
    file = tempfile.TemporaryFile()
    try:
        for chunk, _ in read_chunks(path):
            file.write(chunk)
        file.seek(0)
    except OSError as error:
        file.close()
        raise UserError(f"{path}: cannot be unpacked in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a larger disk") from error
    except BaseException:
        file.close()
        raise
    return file


def _listed(names: Sequence[str]) -> str:
    """Some names of fields, for a message."""
    shown = [repr(name if len(name) <= 60 else name[:60] + "…") for name in names[:_NAMES]]
    return ", ".join(shown) + (f" and {len(names) - _NAMES:,} others" if len(names) > _NAMES else "")


def _string(value: Any) -> str:
    """`value` as text; ValueError where it is none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if not isinstance(value, str):
        kind = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
        raise ValueError(f"is {kind.get(type(value), type(value).__name__)}, must be a string")
    return value


def parse_line(line: bytes, field: str) -> str:
    """The document in one line of a .jsonl.

    Raises:
      ValueError: the line is not UTF-8, not a JSON object, lacks the field, or has something else there than text.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line: {error.reason}") from error
    try:
        record = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object, {…}")
    if field not in record:
        raise ValueError(f"no field {field!r}; it has {_listed(list(record)) or 'none'}")
    try:
        document = _string(record[field])
    except ValueError as error:
        raise ValueError(f"field {field!r} {error}") from error
    if "\\u" in text:  # only an escape can stand for half of a surrogate pair, which no encoding of text has
        try:
            document.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"field {field!r} has half of a surrogate pair at character {error.start}") from error
    return document


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines of a file, without their ends; None for one that is longer than LINE, which is read but not kept."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            yield b"".join([*parts, line]) if size + len(line) <= LINE else None
            parts, size = [], 0
        size += len(rest)
        if size <= LINE:
            parts.append(rest)
        else:
            parts = []
    if size:
        yield b"".join(parts) if size <= LINE else None


def split_text(chunks: Iterable[str], separator: str, stretch: int = 0) -> Iterator[tuple[str, bool]]:
    """Splits text into documents at `separator`, and documents into pieces of at most PIECE characters.

    Yields (piece, whether it ends its document); joined, they are the text without separators. Where it cuts does not depend
    on how the text came in chunks: before the last space in reach that follows a character that is none, failing that before such a
    line end, failing that anywhere. With a stretch, of 1 to PIECE characters, no document is longer: each piece is one, and ends, where
    it can, after the last blank line within the stretch's later half.
    """
    most = stretch or PIECE
    lookahead = most + max(1, len(separator))  # enough to see that a piece neither ends a document nor cuts a separator
    buffer, start = "", 0
    for chunk in itertools.chain(chunks, [None]):
        buffer, start = buffer[start:] + (chunk or ""), 0
        while len(buffer) - start >= lookahead or (chunk is None and start < len(buffer)):
            end = buffer.find(separator, start, start + lookahead) if separator else -1
            if end >= 0:
                yield buffer[start:end], True
                start = end + len(separator)
            elif len(buffer) - start <= most:
                yield buffer[start:], True
                start = len(buffer)
            else:
                cut = (_after_paragraph(buffer, start + most // 2, start + most) if stretch else 0) or _last_cut(
                    buffer, start, start + most
                )
                yield buffer[start:cut], bool(stretch)
                start = cut


def _after_paragraph(text: str, start: int, limit: int) -> int:
    """Where the line after the last blank one begins that ends by `limit`; 0 if there is none after `start`."""
    found = 0
    for match in _BLANK_LINE.finditer(text, start, limit):
        found = match.end()
    return found


def _last_cut(text: str, start: int, limit: int) -> int:
    """Where to end a piece that begins at `start` and must end by `limit`."""
    # Tokenizers take a run of spaces apart by what follows it, but none joins a word with the space after it.
    for mark in (" ", "\n"):
        cut = text.rfind(mark, start + 1, limit)
        while cut > start:
            if not text[cut - 1].isspace():
                return cut
            cut = text.rfind(mark, start + 1, cut)
    return limit
