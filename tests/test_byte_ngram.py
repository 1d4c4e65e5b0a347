"""The vectorized n-gram model against dictionaries, on texts small enough to count by hand."""

import importlib.util
import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

_SPEC = importlib.util.spec_from_file_location("byte_ngram", Path(__file__).parents[1] / "benchmarks" / "byte_ngram.py")
byte_ngram = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(byte_ngram)

TRAIN = b"the cat sat on the mat\xffa rat ate the \xc3\xa9clair\xff"
HELD_OUT = b"that cat ate a hat\xffzz the\xff"


def brute_force(train: bytes, stream: bytes, available: list[int], preceding: int) -> list[float]:
    """The definition, recursively, one byte at a time."""
    following: dict[bytes, Counter] = defaultdict(Counter)
    for k in range(preceding + 1):
        for i in range(k, len(train)):
            following[train[i - k : i]][train[i]] += 1

    def probability(byte: int, history: bytes) -> float:
        shorter = probability(byte, history[1:]) if history else 1 / 256
        seen = following.get(history)
        if seen is None:
            return shorter
        weight = seen.total() / (seen.total() + len(seen))
        return weight * seen[byte] / seen.total() + (1 - weight) * shorter

    return [probability(stream[i], stream[i - min(preceding, available[i]) : i]) for i in range(len(stream))]


@pytest.mark.parametrize("context", [None, 1, 4])
def test_equals_the_brute_force_model(context):
    train, stream = (np.frombuffer(text, np.uint8) for text in (TRAIN, HELD_OUT))
    available = byte_ngram.available_bytes(len(stream), context)
    got = byte_ngram.probabilities(train, stream, {"read": available}, 5)["read"]
    for k in range(6):
        np.testing.assert_allclose(got[k], brute_force(TRAIN, HELD_OUT, list(available), k), rtol=1e-12)


def test_probabilities_of_all_bytes_sum_to_one():
    train = np.frombuffer(TRAIN, np.uint8)
    for history in (b"th", b"q!", b"e "):
        total = 0.0
        for byte in range(256):
            stream = np.frombuffer(history + bytes([byte]), np.uint8)
            total += byte_ngram.probabilities(train, stream, {"all": byte_ngram.available_bytes(3)}, 2)["all"][2, -1]
        assert total == pytest.approx(1, rel=1e-12)


def test_context_is_cut_where_a_block_begins():
    # Blocks of 4 read tokens 0-3, 4-7, ...: token 4 is predicted from four tokens, token 5 from token 4 alone.
    np.testing.assert_array_equal(byte_ngram.available_bytes(10, 4), [0, 1, 2, 3, 4, 1, 2, 3, 4, 1])
    np.testing.assert_array_equal(byte_ngram.available_bytes(4), [0, 1, 2, 3])


def test_packing_keeps_the_order_of_bytes():
    packed = byte_ngram.pack(np.array([1, 2, 3, 255], np.uint8), 3)
    assert [hex(p) for p in packed] == ["0x10203", "0x203ff"]
    assert len(byte_ngram.pack(np.array([1], np.uint8), 3)) == 0


def test_end_bytes_cost_bits_but_are_not_text():
    stream = np.frombuffer(b"ab\xff", np.uint8)
    assert byte_ngram.bits_per_byte(np.array([0.5, 0.25, 0.125]), stream) == (1 + 2 + 3) / 2


def test_corpus_split_and_json(tmp_path):
    train, heldout = byte_ngram.load_streams()
    assert (np.count_nonzero(train == 0xFF), np.count_nonzero(heldout == 0xFF)) == (225, 24)
    byte_ngram.main(["--max_preceding=1", "--context=64", f"--json={tmp_path / 'n.json'}"])
    written = json.loads((tmp_path / "n.json").read_text())
    assert written["heldout_bytes"] + 24 == len(heldout)
    assert [row["ngram_length"] for row in written["rows"]] == [1, 2]
    # One byte of context is never cut, and a model of single bytes cannot be better than their entropy.
    assert written["rows"][1]["bits_per_byte_all"] == written["rows"][1]["bits_per_byte_block"]
    share = np.bincount(heldout, minlength=256) / len(heldout)
    entropy = -sum(p * math.log2(p) for p in share if p)
    assert entropy * len(heldout) / written["heldout_bytes"] <= written["rows"][0]["bits_per_byte_all"] + 5e-5  # it is rounded
