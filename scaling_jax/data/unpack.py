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


def read_chunks(path: Path) -> Iterator[tuple[bytes, int]]:
    """The content of `path`, unpacked as its suffix says.

    Yields (bytes, how much of the file as it lies on the disk was read for all bytes until now).

    Raises:
      UserError: it cannot be read, is damaged or cut short, or is .zst and the package zstandard is not installed.
    """
    packing = path.suffix if path.suffix in PACKINGS else ""
    zstandard = require("zstandard", str(path)) if packing == ".zst" else None
    damage = (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) + ((zstandard.ZstdError,) if zstandard else ())
    try:
        with open(path, "rb") as raw:
            if zstandard:
                yield from _read_zstd(raw, zstandard)
            else:
                unpacked = gzip.GzipFile(fileobj=raw) if packing == ".gz" else lzma.LZMAFile(raw) if packing == ".xz" else raw
                while chunk := unpacked.read(READ):
                    yield chunk, raw.tell()
    except damage as error:
        raise UserError(f"{path}: damaged {packing[1:]}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _read_zstd(raw: BinaryIO, zstandard: ModuleType) -> Iterator[tuple[bytes, int]]:
    # zstandard's own stream reader takes the end of a file that was cut short for the end of the text.
    frame = None
    while packed := raw.read(_READ_ZSTD):
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            chunk = frame.decompress(packed)
            packed = b""
            if frame.eof:
                packed, frame = frame.unused_data, None
            if chunk:
                yield chunk, raw.tell()
    if frame is not None:
        raise EOFError("it ends within a frame")
