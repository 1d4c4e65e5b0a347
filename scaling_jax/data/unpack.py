"""The bytes of plain, gzip, xz and Zstandard files, unpacked as they are read, in bounded memory."""

import gzip
import importlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from scaling_jax.errors import UserError

PACKINGS = (".gz", ".xz", ".zst")
READ = 1 << 18  # bytes that are read at once
_READ_ZSTD = 1 << 12  # of a packed file: at its strongest Zstandard unpacks them to 128 MB


def require(package: str, what: str) -> ModuleType:
    """Imports a package that only some inputs need.

    Raises:
      UserError: it is not installed; names the extra to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise UserError(f"{what}: reading it takes the package {name}: pip install 'scaling_jax[data]', or pip install {name}") from error


def packing_of(path: Path) -> str:
    """The one of PACKINGS that a file's name ends in, in any case, or ''."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKINGS else ""


def read_chunks(path: Path) -> Iterator[tuple[bytes, int]]:
    """The content of `path`, unpacked as its suffix says.

    Yields (bytes, how much of the file as it lies on the disk was read for all bytes until now).

    Raises:
      UserError: it cannot be read, is damaged or cut short, or is .zst and the package zstandard is not installed.
    """
    packing = packing_of(path)
    zstandard = require("zstandard", str(path)) if packing == ".zst" else None
    damage = (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) + ((zstandard.ZstdError,) if zstandard else ())
    try:
        with open(path, "rb") as raw:
            if packing and not raw.peek(1):  # even no text at all takes some bytes when it is packed
                raise EOFError("it is empty")
            if zstandard:
                yield from _read_zstd(raw, zstandard)
            elif packing == ".xz":
                yield from _read_xz(raw)
            else:
                unpacked = gzip.GzipFile(fileobj=raw) if packing == ".gz" else raw
                while chunk := unpacked.read(READ):
                    yield chunk, raw.tell()
    except damage as error:
        raise UserError(f"{path}: damaged {packing[1:]}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _read_xz(raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    # lzma.LZMAFile takes what follows padding, and a later stream that is damaged, for the end of the file.
    stream: lzma.LZMADecompressor | None = lzma.LZMADecompressor()
    padding = 0  # bytes since the last stream
    while packed := raw.read(READ):
        while packed:
            if stream is None:
                rest = packed.lstrip(b"\0")
                padding += len(packed) - len(rest)
                packed = rest
                if not packed:
                    break
                if packed[:1] != b"\xfd" or padding % 4:
                    raise lzma.LZMAError(f"what follows a stream, before byte {raw.tell()}, is neither padding nor another stream")
                stream, padding = lzma.LZMADecompressor(lzma.FORMAT_XZ), 0
            chunk = stream.decompress(packed, READ)
            while chunk:
                yield chunk, raw.tell()
                chunk = b"" if stream.eof or stream.needs_input else stream.decompress(b"", READ)
            packed = b""
            if stream.eof:
                packed, stream = stream.unused_data, None
    if stream is not None:
        raise EOFError("it ends within a stream")
    if padding % 4:
        raise lzma.LZMAError(f"it ends with {padding} bytes of padding, not a multiple of four")
    yield b"", raw.tell()  # after the last text the end of the file was read


def _read_zstd(raw: BinaryIO, zstandard: ModuleType) -> Iterator[tuple[bytes, int]]:
    # zstandard's own stream reader takes the end of a file that was cut short for the end of the text.
    frame = None
    while packed := raw.read(_READ_ZSTD):
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                chunk = frame.decompress(packed)
            except zstandard.ZstdError as error:
                if "too much memory" in str(error):
                    raise zstandard.ZstdError(
                        "its window is larger than 128 MB; pack it again, without --long or with --long=27"
                    ) from error
                raise
            packed = b""
            if frame.eof:
                packed, frame = frame.unused_data, None
            if chunk:
                yield chunk, raw.tell()
    if frame is not None:
        raise EOFError("it ends within a frame")
