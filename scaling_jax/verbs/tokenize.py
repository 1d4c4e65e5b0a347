"""`scaling-jax tokenize`."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from scaling_jax.errors import UserError
from scaling_jax.verbs.common import Verb

INPUT_HELP = ".txt, .jsonl or .parquet files (plain, .gz, .xz, .zst), globs or directories, comma-separated"


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("input", None, INPUT_HELP, flag_values=values)
    flags.DEFINE_string("out", None, "directory to make", flag_values=values)
    tokenizer = "'bytes', a tokenizer.json, vocab.json,merges.txt (GPT-2's files), or a folder that holds such"
    flags.DEFINE_string("tokenizer", "bytes", tokenizer, flag_values=values)
    flags.DEFINE_integer("holdout_every", 10, "hold out every n-th document; 0 holds out none", flag_values=values)
    flags.DEFINE_string("split_documents", "", "text that separates documents within a .txt", flag_values=values)
    stretch = "most characters of a document of a .txt, cut between paragraphs if possible; 0 cuts none"
    flags.DEFINE_integer("stretch_characters", 0, stretch, flag_values=values)
    flags.DEFINE_string("field", "text", "field of a .jsonl's lines or a .parquet's rows that holds the document", flag_values=values)
    flags.DEFINE_bool("skip_bad", False, "leave out bad lines and rows, and count them, instead of stopping", flag_values=values)
    flags.DEFINE_integer("shard_tokens", 1 << 26, "tokens in each file of the result but the last", flag_values=values)
    flags.DEFINE_integer("workers", 0, "processes that encode; 0: one a core, at most 8", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    from scaling_jax.data.tokenize import tokenize_files
    from scaling_jax.data.tokenizers import load_tokenizer

    if not values.input:
        raise UserError(f"--input=FILES is missing: {INPUT_HELP}")
    if not values.out:
        raise UserError("--out=DIR is missing: the directory to make")
    if values.holdout_every < 0 or values.holdout_every == 1:
        raise UserError(f"--holdout_every={values.holdout_every}: must be 0 (none) or at least 2")
    if not 0 <= values.stretch_characters <= 1 << 16:
        raise UserError(f"--stretch_characters={values.stretch_characters}: must be from 1 to 65,536, or 0, which cuts none")
    if values.shard_tokens < 1:
        raise UserError(f"--shard_tokens={values.shard_tokens}: must be at least 1")
    if values.workers < 0:
        raise UserError(f"--workers={values.workers}: must be 0 (one a core, at most 8) or more")
    tokenizer = load_tokenizer(values.tokenizer)
    progress = _ProgressLine()
    try:
        with _termination_raises():
            summary = tokenize_files(
                values.input,
                values.out,
                tokenizer,
                values.holdout_every,
                progress.show,
                values.split_documents,
                field=values.field,
                skip_bad=values.skip_bad,
                stretch_characters=values.stretch_characters,
                shard_tokens=values.shard_tokens,
                workers=values.workers or min(cores(), 8),  # more wait for the one that reads
                resume=True,
                say=progress.line.say,
            )
    except Terminated:
        progress.line.end()
        print("scaling-jax tokenize: terminated; the same command continues", file=sys.stderr)
        return 128 + signal.SIGTERM
    finally:
        progress.line.end()
    print(_token_table(summary))
    return 0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Terminated(BaseException):
    """SIGTERM, as an exception: what was begun is cleared away as after Ctrl-C."""


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    def terminate(number: int, frame: Any) -> NoReturn:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not in the main thread, whose affair signals are
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _ProgressLine:
    def __init__(self) -> None:
        from scaling_jax.console import LiveLine

        self.line = LiveLine(seconds=10, at_once=False)
        self._began = time.monotonic()
        self._first: Any = None  # what an earlier process had done

    def show(self, progress: Any) -> None:
        if self._first is None:
            self._first, self._began = progress, time.monotonic()
        if not self.line.due():
            return
        seconds = time.monotonic() - self._began
        share = progress.read_bytes / max(progress.total_bytes, 1)
        parts = [
            f"{share:4.0%}",
            f"{progress.files_done:,}/{progress.files:,} files",
            f"{progress.read_bytes / 1e6:,.1f}/{progress.total_bytes / 1e6:,.1f} MB read",
            f"{progress.tokens:,} tokens",
            f"{(progress.text_bytes - self._first.text_bytes) / 1e6 / max(seconds, 1e-9):.1f} MB/s of text",
        ]
        read = progress.read_bytes - self._first.read_bytes
        if read > 0:
            left = (progress.total_bytes - progress.read_bytes) / read * seconds
            parts.append(f"{left // 60:.0f}:{left % 60:02.0f} left")
        self.line.show(" · ".join(parts))


def _token_table(summary: dict[str, dict[str, Any]]) -> str:
    rows = [("split", "documents", "tokens", "bytes", "shards", "directory")]
    for split, part in summary.items():
        counts = (f"{part[key]:,}" for key in ("documents", "tokens", "text_bytes", "shards"))
        rows.append((split, *counts, str(Path(part["directory"]))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)), row[-1]])
        for row in rows
    )


TOKENIZE = Verb(
    "turn text files into token shards",
    "scaling-jax tokenize --input='books/*.txt.xz' --out=data/books --tokenizer=bytes --holdout_every=10",
    _define,
    _run,
    continues=True,
)
