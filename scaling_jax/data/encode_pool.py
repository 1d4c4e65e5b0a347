"""Encoding in several processes, in order.

The processes are started afresh, import nothing of JAX, and stop by themselves when the process that started them is gone, however it
went: their input ends.
"""

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_jax.data.bpe import CACHE_BYTES
from scaling_jax.data.shards import disk_dtype, dtype_name
from scaling_jax.data.tokenizers import FileTokenizer, Tokenizer
from scaling_jax.errors import UserError

_ALL_CACHES_BYTES = 1 << 27
_PACKAGES = Path(__file__).resolve().parents[2]  # where this package lies


class Part(NamedTuple):
    """A document, or a piece of one, to encode."""

    text: str
    split: str  # where it goes
    ends: bool  # its document: the end token follows


class Encoded(NamedTuple):
    """What the parts of a batch for one split came to, in order."""

    tokens: np.ndarray  # [tokens], dtype of the shards, end tokens included
    text_bytes: int
    documents: int  # that end here


def encode_parts(tokenizer: Tokenizer, parts: Sequence[Part]) -> dict[str, Encoded]:
    """The tokens of `parts`, by split."""
    dtype = disk_dtype(dtype_name(tokenizer.vocab_size))
    end = np.asarray([tokenizer.end_token], dtype)
    encoded = {}
    for split in dict.fromkeys(part.split for part in parts):
        mine = [part for part in parts if part.split == split]
        arrays = []
        for part in mine:
            arrays.append(tokenizer.encode(part.text).astype(dtype))
            if part.ends:
                arrays.append(end)
        text_bytes = sum(len(part.text.encode("utf-8")) for part in mine)
        encoded[split] = Encoded(np.concatenate(arrays), text_bytes, sum(part.ends for part in mine))
    return encoded


class EncodePool:
    """Encodes batches of parts, in this process or in others; a context manager that leaves no process behind."""

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        """`workers`: processes to start; with 1 batches are encoded in this process, at once."""
        self._tokenizer = tokenizer
        self._workers = workers
        self._processes: list[subprocess.Popen] = []
        self._free: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()

    def __enter__(self) -> "EncodePool":
        if self._workers > 1:
            # The current directory is not searched for modules: a file of the user's there can be called queue.py.
            path = [*filter(None, sys.path), str(_PACKAGES)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false"}
            command = [sys.executable, "-P", "-c", "from scaling_jax.data.encode_pool import serve; serve()"]
            try:
                for _ in range(self._workers):
                    # In a session of its own Ctrl-C at the terminal is this process's affair.
                    self._processes.append(
                        subprocess.Popen(
                            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True, bufsize=-1
                        )
                    )
                for process in self._processes:
                    _send(process.stdin, (self._tokenizer, min(CACHE_BYTES, _ALL_CACHES_BYTES // self._workers)))
                    self._free.put(process)
            except BaseException:
                self._stop()
                raise
            self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="encode")
        return self

    def __exit__(self, *error: object) -> None:
        if self._workers > 1:
            self._stop()  # first: a thread that waits for a process would wait on
            self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, parts: Sequence[Part]) -> Future:
        """Will hold `encode_parts(tokenizer, parts)`."""
        if self._workers > 1:
            return self._threads.submit(self._ask, parts)
        done: Future = Future()
        done.set_result(encode_parts(self._tokenizer, parts))
        return done

    def _ask(self, parts: Sequence[Part]) -> dict[str, Encoded]:
        process = self._free.get()
        try:
            _send(process.stdin, parts)
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            process.kill()
            code = process.wait()
            advice = "; if memory is short, give fewer --workers" if code < 0 else ""  # it was killed
            raise UserError(f"an encoding process ended with code {code}{advice}") from error
        finally:
            self._free.put(process)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            process.stdout.close()
            try:
                process.stdin.close()
            except OSError:  # what was not sent
                pass


def _send(stream: object, value: object) -> None:
    pickle.dump(value, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()


def serve() -> None:
    """What an encoding process does: answers the batches on its input until that ends."""
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        tokenizer, cache_bytes = pickle.load(source)
        if isinstance(tokenizer, FileTokenizer):
            tokenizer.limit_cache(cache_bytes)
        while True:
            parts = pickle.load(source)
            try:
                answer = encode_parts(tokenizer, parts)
            except Exception as error:
                answer = error
            _send(answers, answer)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        os._exit(0)  # without flushing what nobody reads
