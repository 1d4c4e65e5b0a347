"""`scaling-jax tokenize`."""

from pathlib import Path
from typing import Any

from absl import flags

from scaling_jax.errors import UserError
from scaling_jax.verbs.common import Verb


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("input", None, "text files (.txt, .txt.xz), globs or directories, comma-separated", flag_values=values)
    flags.DEFINE_string("out", None, "directory to make", flag_values=values)
    flags.DEFINE_string("tokenizer", "bytes", "'bytes', or the path of a Hugging Face tokenizer.json", flag_values=values)
    flags.DEFINE_integer("holdout_every", 10, "hold out every n-th document; 0 holds out none", flag_values=values)
    flags.DEFINE_string("split_documents", "", "text that separates documents within a file", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    from scaling_jax.console import LiveLine
    from scaling_jax.data.tokenize import tokenize_files
    from scaling_jax.data.tokenizers import load_tokenizer

    if not values.input:
        raise UserError("--input=FILES is missing: .txt or .txt.xz files, globs or directories, comma-separated")
    if not values.out:
        raise UserError("--out=DIR is missing: the directory to make")
    if values.holdout_every < 0 or values.holdout_every == 1:
        raise UserError(f"--holdout_every={values.holdout_every}: must be 0 (none) or at least 2")
    tokenizer = load_tokenizer(values.tokenizer)
    line = LiveLine(seconds=10, at_once=False)

    def on_progress(done: int, files: int, tokens: int) -> None:
        line.show(f"{done:,}/{files:,} files · {tokens:,} tokens")

    try:
        summary = tokenize_files(values.input, values.out, tokenizer, values.holdout_every, on_progress, values.split_documents)
    finally:
        line.end()
    print(_token_table(summary))
    return 0


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
)
