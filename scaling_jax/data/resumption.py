"""How far tokenizing is: states that another process can go on from, bound to the input that led to them."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_jax.data.shard_writer import ShardFiles, flush_to_disk
from scaling_jax.data.staging import DATA, RESUME


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in the input; Position() is its beginning."""

    file: int = 0  # its number in the sorted list of files
    pieces: int = 0  # of that file, that are done
    documents: int = 0  # before that file
    skipped: int = 0  # bad lines and rows before that file
    first_fault: str = ""  # what was wrong with the first of them


class Checkpoints:
    """The newest two states in RESUME of a folder: the last one, and the last one between two files.

    A state holds while the files up to it, its own file included, have the paths, sizes and times of change that they had. So where
    a file had to be mended, there is still the state before it.
    """

    def __init__(self, folder: Path, key: str, files: Sequence[Path]) -> None:
        """Reads nothing yet.

        Args:
          folder: where RESUME lies, or will.
          key: of everything but the files that the result depends on.
          files: the input, in order.
        """
        self._path = folder / RESUME
        self._key = key
        self._files = files
        self._digest, self._digested = hashlib.sha256(), 0
        self._between: dict[str, Any] | None = None

    def restore(self, writers: Mapping[str, ShardFiles], skip_bad: bool = False) -> tuple[Position, str]:
        """Brings `writers` to the newest state that holds; unless `skip_bad`, to none for which bad lines or rows were left out.

        Returns:
          The state's position, and what to tell the user. Without a state: the beginning, with all that lay in DATA deleted.
        """
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            content, note = {"key": self._key, "states": []}, ""
        except (OSError, ValueError):
            content, note = {}, "cannot be read"
        if content.get("key") != self._key:
            note = content and "was made with another tokenizer or other options" or note
            content = {"states": []}
        elif content["states"]:
            note = "was made from other files, or files that changed since"
        for n, state in enumerate(content["states"]):
            position = Position(**state["position"])
            if state["inputs"] != self._inputs(position):
                continue
            if position.skipped and not skip_bad:
                note = "was made with skip_bad, and left out bad lines or rows"
                continue
            try:
                for split, writer in writers.items():
                    writer.restore(state["splits"][split])
            except (ValueError, KeyError):
                note = "is damaged"
                continue
            states = content["states"][n:]
            self._between = next((other for other in states if not other["position"]["pieces"]), None)
            return position, f"continues after {sum(writer.tokens for writer in writers.values()):,} tokens"
        self._path.unlink(missing_ok=True)
        shutil.rmtree(self._path.parent / DATA)
        for writer in writers.values():
            writer.close()
            writer.directory.mkdir(parents=True)
        return Position(), f"starts again: {self._path.parent} {note}" if note else ""

    def pass_file_end(self, position: Position, writers: Mapping[str, ShardFiles]) -> None:
        """Remembers the state at `position`, between two files; the next `save` writes it."""
        self._between = self._state(position, writers)

    def save(self, position: Position, writers: Mapping[str, ShardFiles]) -> None:
        """Writes the state at `position`, at once and whole."""
        for writer in writers.values():
            writer.flush()
        states = [self._state(position, writers)]
        if self._between is not None and self._between["position"] != states[0]["position"]:
            states.append(self._between)
        draft = self._path.with_suffix(".draft")
        with open(draft, "w", encoding="utf-8") as file:
            json.dump({"key": self._key, "states": states}, file)
            flush_to_disk(file)
        os.replace(draft, self._path)

    def _state(self, position: Position, writers: Mapping[str, ShardFiles]) -> dict[str, Any]:
        return {
            "position": dataclasses.asdict(position),
            "inputs": self._inputs(position),
            "splits": {split: writer.state() for split, writer in writers.items()},
        }

    def _inputs(self, position: Position) -> str | None:
        """A digest of the files that were read up to `position`; None if there are no longer so many."""
        count = position.file + bool(position.pieces)
        if count > len(self._files):
            return None
        if count < self._digested:
            self._digest, self._digested = hashlib.sha256(), 0
        for path in self._files[self._digested : count]:
            status = path.stat()
            self._digest.update(json.dumps([os.path.abspath(path), status.st_size, status.st_mtime_ns]).encode())
        self._digested = count
        return self._digest.hexdigest()
