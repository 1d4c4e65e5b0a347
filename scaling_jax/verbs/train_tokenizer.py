"""`scaling-jax train-tokenizer`."""

import signal
import threading
from pathlib import Path

from absl import flags

from scaling_jax.errors import UserError
from scaling_jax.verbs.common import Verb
from scaling_jax.verbs.tokenize import INPUT_HELP


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("input", None, INPUT_HELP, flag_values=values)
    flags.DEFINE_string("out", None, "tokenizer.json to write", flag_values=values)
    flags.DEFINE_integer("vocab_size", 1024, "tokens, 257 (every byte and the end token) to 1,048,576", flag_values=values)
    flags.DEFINE_string("field", "text", "field of a .jsonl's lines or a .parquet's rows that holds the document", flag_values=values)
    flags.DEFINE_string("split_documents", "", "text that separates documents within a .txt", flag_values=values)
    flags.DEFINE_integer(
        "max_bytes", 100_000_000, "most text to learn from; of larger input the beginning of each file", flag_values=values
    )
    flags.DEFINE_bool("skip_bad", False, "leave out bad lines and rows, instead of stopping", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    from scaling_jax.console import LiveLine
    from scaling_jax.data.train_tokenizer import train_tokenizer

    if not values.input:
        raise UserError(f"--input=FILES is missing: {INPUT_HELP}")
    if not values.out:
        raise UserError("--out=FILE is missing: the tokenizer.json to write")
    line = LiveLine(seconds=10, at_once=False)
    handler = signal.getsignal(signal.SIGINT)

    def on_merging(begins: bool) -> None:
        if begins:
            line.say("merging")
        if threading.current_thread() is threading.main_thread():  # whose affair signals are
            signal.signal(signal.SIGINT, signal.SIG_DFL if begins else handler)  # nothing is written meanwhile: Ctrl-C may end it

    try:
        trained = train_tokenizer(
            values.input,
            values.out,
            values.vocab_size,
            max_bytes=values.max_bytes,
            field=values.field,
            split_documents=values.split_documents,
            skip_bad=values.skip_bad,
            on_progress=lambda text_bytes: line.show(f"{text_bytes / 1e6:,.0f} MB of text"),
            on_merging=on_merging,
        )
    finally:
        line.end()
    skipped = f"; {trained.skipped:,} bad lines or rows were left out" if trained.skipped else ""
    print(f"{Path(values.out)}: {trained.vocab_size:,} tokens, from {trained.text_bytes / 1e6:,.1f} MB of text{skipped}")
    return 0


TRAIN_TOKENIZER = Verb(
    "train a byte-level BPE on text files",
    "scaling-jax train-tokenizer --input='books/*.txt.xz' --vocab_size=1024 --out=books.json",
    _define,
    _run,
)
