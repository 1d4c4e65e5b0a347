"""What is packed, bit by bit: padding, damage, windows, and packages that are not there."""

import lzma
import sys

import pytest

from scaling_jax.data import unpack
from scaling_jax.data.documents import DocumentReader
from scaling_jax.errors import UserError


@pytest.mark.parametrize("read", [3, 1 << 18])
def test_xz_streams_may_have_padding_and_nothing_else_between_and_after_them(tmp_path, monkeypatch, read):
    # The .xz format's version 1.2.1, section 2.2: padding is of zeros, a multiple of four.
    monkeypatch.setattr(unpack, "READ", read)
    path = tmp_path / "x.txt.xz"
    one, two = lzma.compress(b"one " * 999), lzma.compress(b"two")
    for content in (one + bytes(512), one + two, one + bytes(4) + two, one + bytes(8) + two + bytes(516)):
        path.write_bytes(content)
        text = "".join(piece for piece, _ in DocumentReader(path))
        assert text == "one " * 999 + "two" * (two in content)
    damaged = bytearray(two)
    damaged[len(two) // 2] ^= 0xFF
    for content in (
        one + bytes(3),
        one + bytes(5) + two,
        one + damaged,
        one + bytes(4) + damaged,
        one + bytes(4) + b"more",
        one + two[:-1],
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.txt\.xz: damaged xz: "):
            read_all = list(DocumentReader(path))
            assert not read_all
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match="format not supported"):
        list(DocumentReader(path))


def test_an_xz_that_unpacks_to_much_is_unpacked_bit_by_bit(tmp_path):
    (tmp_path / "x.txt.xz").write_bytes(lzma.compress(bytes(1 << 26)))
    assert max(len(chunk) for chunk, _ in unpack.read_chunks(tmp_path / "x.txt.xz")) <= unpack.READ


def test_a_zstandard_window_that_is_too_large_is_named(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    header = stream.compress(b"text") + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)  # of unknown length, so that the window counts
    (tmp_path / "x.txt.zst").write_bytes(header)
    with pytest.raises(UserError, match="its window is larger than 128 MB; pack it again"):
        list(DocumentReader(tmp_path / "x.txt.zst"))


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "x.txt.zst").write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.txt\.zst.*zstandard: pip install 'scaling_jax\[data\]'"):
        list(DocumentReader(tmp_path / "x.txt.zst"))
