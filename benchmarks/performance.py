"""Writes docs/performance.md: how fast the train step, the loop around it and the start-up are, from the benchmarks' own figures.

    python benchmarks/performance.py --keep=DIR                 # runs them all, a quarter of an hour on two cores
    python benchmarks/performance.py --from=DIR                 # takes the files that they wrote with --json=DIR/NAME.json
    python benchmarks/performance.py --quick --out=page.md      # runs them all, as short as they go: no figures to believe

Where a file is missing the page says which command makes it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import machine_line
from peer import comparison_line
from reporting import table

ROOT = Path(__file__).parent.parent


class Section(NamedTuple):
    """One benchmark: NAME.json is its file."""

    name: str
    title: str
    script: str
    flags: Sequence[str]
    quick: Sequence[str]  # flags that make it short
    meaning: str  # one sentence

    @property
    def command(self) -> str:
        return " ".join(["python", f"benchmarks/{self.script}", *self.flags])


_SHORT = ("--rounds=1", "--seconds=0.01", "--depth=1", "--context=16", "--sequences=2")
SECTIONS = (
    Section(
        "throughput",
        "The step",
        "throughput.py",
        (),
        ("--widths=32", *_SHORT),
        "Forward, backward and AdamW without measuring noise; `of peak` is model FLOPs a second over what numpy's BLAS reaches in "
        "float32 products of 1024 x 1024 in the same process and the same second, so that bfloat16 may exceed 1 where the machine has "
        "units for it.",
    ),
    Section(
        "scaling",
        "With width and batch",
        "throughput.py",
        ("--scaling",),
        _SHORT,
        "`per token and entry` is the time per token and matrix entry over that of the narrower model at as many sequences, and `ideal` "
        "the same ratio of FLOPs; `per sequence` is the time per sequence over that of the largest batch, and `over line` a step's time "
        "over that of the straight line through all batches, whose start at no sequences is what AdamW takes.",
    ),
    Section(
        "peer",
        "Beside PyTorch",
        "peer.py",
        (),
        ("--width=32", "--modes=eager", *_SHORT),
        "The GPT-2 of Hugging Face transformers with the same shapes on the same cores, in turns with ours; `autocast` keeps float32 "
        "parameters and multiplies in bfloat16, as ours does, and `bfloat16` keeps parameters and AdamW's moments in it too.",
    ),
    Section(
        "against",
        "Beside another version",
        "throughput.py",
        ("--widths=64,256", "--against=DIR"),
        ("--widths=32", *_SHORT),
        "The step of another checkout of this project, in turns with this one's: `tokens ratio` is ours over the other's.",
    ),
    Section(
        "noise_overhead",
        "Measuring the noise scale",
        "noise_overhead.py",
        ("--standard",),
        ("--width=32", "--depth=1", "--context=16", "--sequences=4", "--pairs=1", "--steps=1"),
        "`ratio` is the time of the first step named over the second, in turns on one state; `every` is of how many steps one is measured, "
        "and `plain / plain` says how far the machine lets ratios be trusted.",
    ),
    Section(
        "loop_shares",
        "Around the step",
        "loop_shares.py",
        (),
        ("--tokens=20000",),
        "What a run of the demo spends beside its steps, as a share of its time from the first step's end on.",
    ),
    Section(
        "startup",
        "Start",
        "startup.py",
        (),
        ("--repeats=1",),
        "From the command to the first step's record, with nothing compiled before and with what the first time left in the cache.",
    ),
)


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, of what each section's file holds (`reporting.write_json`); at least one."""
    machine = next(iter(found.values()))["machine"]
    lines = [
        "# How fast it is",
        "",
        "Written by `python benchmarks/performance.py`, from what the commands below measured; `low` and `high` are quartiles, and every "
        "ratio is of things measured in turns.",
        "",
        machine_line(machine),
        "",
    ]
    for section in SECTIONS:
        lines += [f"## {section.title}", "", section.meaning, ""]
        if section.name not in found:
            lines += [f"Not measured here; `{section.command}` does.", ""]
            continue
        file = found[section.name]
        lines += [table(file["rows"]), ""]
        if "comparison" in file:
            lines += [f"**{comparison_line(file['comparison'])}**", ""]
        lines += [f"`{file['command']}`{_circumstances(file, machine)}", ""]
    return "\n".join(lines[:-1]) + "\n"


def _circumstances(file: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    shape = {
        "width": "width {}",
        "depth": "depth {}",
        "context": "context {}",
        "vocab_size": "vocabulary {}",
        "head_dim": "heads of {}",
        "sequences": "{} sequences a step if not said",
    }
    parts = [words.format(file["arguments"][name]) for name, words in shape.items() if name in file["arguments"]]
    text = (f" ({', '.join(parts)})" if parts else "") + f", {file['date']}"
    return text + (f", on another machine: {machine_line(file['machine'])}" if file["machine"] != machine else "")


def run_all(folder: Path, quick: bool, against: Path | None) -> None:
    """Every benchmark one after the other; one that fails leaves no file."""
    for section in SECTIONS:
        if section.name == "against" and against is None:
            continue
        flags = [flag.replace("=DIR", f"={against}") for flag in section.flags] + list(section.quick if quick else ())
        print(f"{section.command}", file=sys.stderr, flush=True)
        json_file = folder / f"{section.name}.json"
        json_file.unlink(missing_ok=True)
        done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / section.script), *flags, f"--json={json_file}"])
        if done.returncode:
            print(f"{section.script} ended with code {done.returncode}: not on the page", file=sys.stderr)


def read_all(folder: Path) -> dict[str, Any]:
    return {s.name: json.loads((folder / f"{s.name}.json").read_text()) for s in SECTIONS if (folder / f"{s.name}.json").exists()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, metavar="DIR", help="run nothing: take the files of this folder")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for the benchmarks' files, for --from")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this project, for a section of its own")
    parser.add_argument("--quick", action="store_true", help="everything as short as it goes; give --out too")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md", help="the page")
    args = parser.parse_args()
    if args.source is not None and not args.source.is_dir():
        parser.error(f"--from={args.source}: no such folder; --keep=DIR makes one")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.source or args.keep or Path(temporary)
        if args.source is None:
            folder.mkdir(parents=True, exist_ok=True)
            run_all(folder, args.quick, args.against)
        found = read_all(folder)
    if not found:
        print(f"performance: {folder}: holds none of {', '.join(f'{section.name}.json' for section in SECTIONS)}", file=sys.stderr)
        return 2
    args.out.write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
