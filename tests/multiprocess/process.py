"""One process of a run of several, as `scaling-jax` with less patience: process.py NOTES ARGUMENTS…

Into the folder NOTES it writes what it read of each batch and put on its devices, and its shards of the states that it saved and
restored. NOTES/break, if there is one, names what is to fail, and the process: 'open 1', of the data, 'write 0', of records, 'save 1', of a
checkpoint's files, 'leave 1', killed as it leaves the others at the end. Batches are not noted then.
"""

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from scaling_jax.cli import main
from scaling_jax.data.source import TokenSource
from scaling_jax.train import batches, checkpoint, hosts, loop, meeting, metrics, workdir

hosts.LOST_SECONDS, hosts.BEAT_SECONDS, meeting.JOIN_SECONDS = 8.0, 0.5, 60.0
workdir.SEEN_SECONDS = checkpoint.SEEN_SECONDS = 1.0

notes = Path(sys.argv[1])
process = next((arg.removeprefix("--process=") for arg in sys.argv if arg.startswith("--process=")), "0")


def note_batch(self, first, count, rows=None):
    tokens_NxL = read_batch(self, first, count, rows)
    with (notes / f"batches-{process}.jsonl").open("a") as file:
        whose = list(range(count)) if rows is None else rows.tolist()
        file.write(json.dumps({"first": first, "count": count, "rows": whose, "tokens": tokens_NxL.tolist()}) + "\n")
    return tokens_NxL


def note_placed(self, tokens_NxL, count):
    tokens_AxBxL = place(self, tokens_NxL, count)
    shards = [
        [[part.indices(size)[:2] for part, size in zip(shard.index, tokens_AxBxL.shape, strict=True)], np.asarray(shard.data).tolist()]
        for shard in tokens_AxBxL.addressable_shards
    ]
    with (notes / f"placed-{process}.jsonl").open("a") as file:
        file.write(json.dumps({"shape": tokens_AxBxL.shape, "shards": shards}) + "\n")
    return tokens_AxBxL


def note_shards(name, state):
    shards = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        for shard in leaf.addressable_shards:
            bounds = [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)]
            shards[json.dumps([jax.tree_util.keystr(path), leaf.shape, bounds])] = np.asarray(shard.data)
    np.savez(notes / f"{name}-{process}.npz", **shards)


def note_saved(self, tokens, state, **options):
    note_shards(f"saved-{tokens}", state)
    if fails("save"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))  # bytes of a file
    save(self, tokens, state, **options)


def note_restored(self, *args):
    found = restore_latest(self, *args)
    if found is not None:
        note_shards(f"restored-{found[0]}", found[1])
    return found


def fails(what):
    return (notes / "break").exists() and (notes / "break").read_text() == f"{what} {process}"


def open_or_fail(*args, **options):
    if fails("open"):
        raise RuntimeError("no such luck")
    return open_run_data(*args, **options)


def write_or_fail(self, record):
    if fails("write"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(self, record)


if not (notes / "break").exists():
    read_batch, TokenSource.batch = TokenSource.batch, note_batch
    place, batches.Batches.place = batches.Batches.place, note_placed
if fails("leave"):
    jax.distributed.shutdown = lambda: os.kill(os.getpid(), signal.SIGKILL)
save, checkpoint.Checkpoints.save = checkpoint.Checkpoints.save, note_saved
restore_latest, checkpoint.Checkpoints.restore_latest = checkpoint.Checkpoints.restore_latest, note_restored
open_run_data, loop.open_run_data = loop.open_run_data, open_or_fail
write, metrics.MetricsWriter.write = metrics.MetricsWriter.write, write_or_fail

sys.exit(main(sys.argv[2:]))
