"""How fast text becomes tokens of a byte-level BPE of 1,024, and how much memory that takes for a large document and many small ones.

python benchmarks/tokenizing.py --megabytes=1000
"""

import argparse
import json
import lzma
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

from scaling_jax.data.corpus import sotu_documents
from scaling_jax.data.documents import split_text
from scaling_jax.data.tokenizers import FileTokenizer
from scaling_jax.data.train_tokenizer import train_tokenizer

SHARED = Path(__file__).parent.parent / os.environ.get("SCALING_JAX_SHARED", "../shared")


def prose() -> tuple[list[str], str]:
    """The texts to measure with, and what they are: shared prose where there is any, else the built-in corpus."""
    files = sorted((SHARED / "corpora" / "prose").glob("*.txt.xz"))
    if files:
        return [lzma.open(file, "rt", encoding="utf-8", newline="").read() for file in files], f"{len(files)} files of English prose"
    return [file.read_text(encoding="utf-8") for file in sotu_documents()], "the built-in corpus"


def encode_rates(tokenizer_file: Path, texts: list[str], repeats: int, plain: bool) -> list[float]:
    """MB of UTF-8 text per second of one core's time, from a tokenizer that has met no word yet."""
    pieces = [piece for text in texts for piece, _ in split_text([text], "")]
    megabytes = sum(len(piece.encode("utf-8")) for piece in pieces) / 1e6
    rates = []
    for _ in range(repeats):
        tokenizer = FileTokenizer(tokenizer_file)
        encode = (
            (lambda piece, inner=tokenizer._tokenizer: inner.encode(piece, add_special_tokens=False).ids) if plain else tokenizer.encode
        )
        started = time.process_time()
        for piece in pieces:
            encode(piece)
        rates.append(megabytes / (time.process_time() - started))
    return rates


def write_large(path: Path, texts: list[str], megabytes: float) -> None:
    """Paragraphs in random order, again and again, each with two words that nobody met before: one .txt, or one document a paragraph."""
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n") if paragraph.strip()]
    rng = np.random.default_rng(0)
    written = 0
    with open(path, "wb") as file:
        while written < megabytes * 1e6:
            order = rng.integers(len(paragraphs), size=1000)
            letters = rng.integers(ord("a"), ord("z") + 1, (1000, 16), dtype=np.uint8)
            for i, word in zip(order, letters, strict=True):
                text = f"{paragraphs[i]} {word[:7].tobytes().decode()} {word[7:].tobytes().decode()}"
                line = json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text + "\n\n"
                written += file.write(line.encode("utf-8"))


def resident_bytes(pid: int) -> int:
    """Memory of a process and its children; what they share counts for each."""
    total = 0
    for process in [pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]:
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # just gone
            pass
    return total


def tokenize(path: Path, tokenizer_file: Path, out: Path, workers: int) -> dict[str, float]:
    """What the command takes: seconds, seconds of cores, and the peak of memory of all its processes in MB."""
    command = [sys.executable, "-m", "scaling_jax", "tokenize", f"--input={path}", f"--tokenizer={tokenizer_file}", "--holdout_every=0"]
    started, cpu_started, peak = time.monotonic(), cpu_seconds(), 0
    process = subprocess.Popen([*command, f"--out={out}", f"--workers={workers}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            peak = max(peak, resident_bytes(process.pid))
        except OSError:  # just ended
            pass
        time.sleep(0.02)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
    return {"seconds": time.monotonic() - started, "cpu_seconds": cpu_seconds() - cpu_started, "peak_megabytes": peak / 1e6}


def cpu_seconds() -> float:
    """Of children that ended, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=1000, help="of each large file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    texts, what = prose()
    cores = len(os.sched_getaffinity(0))
    rows: dict[str, object] = {"text": what, "text_megabytes": sum(len(text.encode("utf-8")) for text in texts) / 1e6}
    print(f"{platform.processor() or platform.machine()}, {cores} cores; {what}, {rows['text_megabytes']:.1f} MB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n, text in enumerate(texts):
            (folder / f"{n:03}.txt").write_bytes(text.encode("utf-8"))
        tokenizer_file = folder / "tokenizer.json"
        started = time.monotonic()
        train_tokenizer([f"{folder}/*.txt"], tokenizer_file, 1024)
        rows["train_seconds"] = time.monotonic() - started
        print(f"training the BPE of 1,024: {rows['train_seconds']:.1f} s")
        rows["encode"] = encode_rates(tokenizer_file, texts, args.repeats, plain=False)
        rows["encode_library"] = encode_rates(tokenizer_file, [text[: len(text) // 8] for text in texts], args.repeats, plain=True)
        for key in ("encode", "encode_library"):
            rates = rows[key]
            print(f"{key:<16}median {statistics.median(rates):5.2f} MB/s a core   (from {min(rates):.2f} to {max(rates):.2f})")
        for suffix in (".txt", ".jsonl"):
            path = folder / f"large{suffix}"
            write_large(path, texts, args.megabytes)
            megabytes = path.stat().st_size / 1e6
            figures = tokenize(path, tokenizer_file, folder / f"out{suffix}", cores)
            rows[f"large {suffix}"] = {"megabytes": megabytes, "workers": cores, **figures}
            rate = f"{megabytes / figures['seconds']:.1f} MB/s, {megabytes / figures['cpu_seconds']:.2f} MB a second of one core"
            print(f"{suffix:<7}{megabytes:5.0f} MB, {cores} workers: {rate}; {figures['peak_megabytes']:.0f} MB of memory")
            path.unlink()
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
