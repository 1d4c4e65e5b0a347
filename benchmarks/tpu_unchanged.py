"""Whether a change of the code left the TPU's programs as they were: every config of configs/pods, lowered by this code and another's.

    python benchmarks/tpu_unchanged.py --against=DIR             # a minute or two; pip install '.[tpu]', no TPU
    python benchmarks/tpu_unchanged.py --against=DIR --compile   # programs that differ are compiled: FLOPs, memory, what is sent

Each config is lowered for the first topology that it has a mesh for, and one of them for a single chip, with the noise measured and
without. What is compared is StableHLO, which has no source locations in it and whose functions are named by the order of their first
use. Both codes read this checkout's configs. Exit code 1 if programs differ; with --compile if FLOPs, peak memory or the bytes sent do
by more than 1%.
"""

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pods import ROOT, rows
from reporting import Row, table, write_json

STEPS = {"plain": False, "measured": True}
FIGURES = ("product_flops", "peak_bytes", "sent_bytes")
TOLERANCE = 0.01
ONE_CHIP, CHIPS = "v5e:1x1", 8  # and how many of them share the batch of the config that is lowered for one


def programs() -> list[tuple[str, str]]:
    """(config, topology), such as ('dense.py:7b,v5p:8x8x8', 'v5p:8x8x8')."""
    first = {}
    for row in rows():
        path, _, argument = row.partition(":")
        name, _, topology = argument.rpartition(",")
        first.setdefault((path, name), (row, topology))
    return [*first.values(), ("time_transfer.py:32m", ONE_CHIP)]


def lower(config_path: str, topology_name: str, measure: bool, compile_too: bool) -> dict[str, Any]:
    """The step's text by the code that is installed, and if wanted figures of the compiled program."""
    from scaling_jax import config as config_lib
    from scaling_jax.mesh import make_mesh
    from scaling_jax.pods.chips import parse_topology
    from scaling_jax.pods.compile import compile_step, prepare, resolved, topology_devices
    from scaling_jax.train.step import Trainer

    prepare()
    topology = parse_topology(topology_name, 1)
    devices = topology_devices(topology)
    config = config_lib.load(f"{ROOT}/configs/pods/{config_path}")
    if len(devices) == 1:
        config.train.batch_tokens //= CHIPS  # as much as one of them has
    config = resolved(config, topology, len(devices))
    if compile_too:
        step = compile_step(config, topology, measure)
        return dict(zip(FIGURES, (step.product_flops, step.memory.peak, step.wire_bytes), strict=True))
    trainer = Trainer(config, make_mesh(*(config.mesh[axis] for axis in ("replica", "fsdp", "tensor", "member")), devices=devices))
    return {"text": trainer.lower_step(config_lib.sequences_per_batch(config), measure).as_text()}


def answers(checkout: Path, tasks: list[tuple[str, str, str]], compile_too: bool = False) -> list[dict[str, Any]]:
    """`lower` of each (config, topology, step), by the code of a checkout in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.json"
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        env["PYTHONPATH"] = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
        task = json.dumps({"checkout": str(checkout), "tasks": tasks, "compile": compile_too, "out": str(out)})
        done = subprocess.run([sys.executable, __file__, f"--task={task}"], env=env, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{checkout}: {(done.stderr.strip().splitlines() or [f'code {done.returncode}'])[-1]}")
        return json.loads(out.read_text())


def perform(task: dict[str, Any]) -> None:
    from scaling_jax import config

    home = Path(config.__file__).resolve().parents[1]
    if home != Path(task["checkout"]).resolve():
        raise SystemExit(f"is no checkout of this project; the code that would run is that of {home}")
    found = [lower(path, topology, STEPS[step], task["compile"]) for path, topology, step in task["tasks"]]
    Path(task["out"]).write_text(json.dumps(found))


def lines_of(text: str) -> list[str]:
    """A module's functions from the entry on in the order of first use, named by it: names that count up differ for no reason."""
    functions, name = {}, ""
    for line in text.splitlines():
        if found := re.match(r"\s*func\.func (?:public|private) @([\w.]+|\"[^\"]+\")", line):
            name = found[1]
        functions.setdefault(name, []).append(line)
    order = ["main"]
    for called in order:
        for line in functions[called][1:]:
            order += [found for found in re.findall(r"@([\w.]+)", line) if found in functions and found not in order]
    names = {name: f"@f{i}" for i, name in enumerate(order)}
    lines = [line for name in order for line in functions[name]]
    return [re.sub(r"@([\w.]+)", lambda found: names.get(found[1], found[0]), line) for line in lines]


def differing(ours: str, theirs: str) -> list[str]:
    """Lines that only one of two modules has."""
    return [
        line for line in difflib.unified_diff(lines_of(theirs), lines_of(ours), lineterm="", n=0) if line[:3] not in ("---", "+++", "@@ ")
    ]


def compared(args: argparse.Namespace) -> Iterator[Row]:
    tasks = [(path, topology, step) for path, topology in programs() for step in STEPS if args.only in path]
    both = [answers(checkout, tasks) for checkout in (ROOT, args.against)]
    differ = []
    for task, ours, theirs in zip(tasks, *both, strict=True):
        lines = differing(ours["text"], theirs["text"])
        if lines and args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            (args.keep / f"{re.sub('[^0-9a-z]+', '_', ' '.join(task))}.diff").write_text("\n".join(lines) + "\n")
        if lines:
            differ.append((task, len(lines)))
        if not lines or not args.compile:
            yield {**named(task), "program": f"{len(lines)} lines differ" if lines else "identical", "unchanged": not lines}
    if differ and args.compile:
        both = [answers(checkout, [task for task, _ in differ], compile_too=True) for checkout in (ROOT, args.against)]
        for (task, lines), ours, theirs in zip(differ, *both, strict=True):
            ratios = {name: ours[name] / theirs[name] if theirs[name] else 1.0 + ours[name] for name in FIGURES}
            unchanged = all(abs(ratio - 1) <= TOLERANCE for ratio in ratios.values())
            yield {**named(task), "program": f"{lines} lines differ", "unchanged": unchanged, **ratios}


def named(task: tuple[str, str, str]) -> Row:
    return dict(zip(("config", "topology", "step"), task, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the TPU's programs of every config of configs/pods with another code's.")
    parser.add_argument("--against", type=Path, help="the other code: a checkout")
    parser.add_argument("--compile", action="store_true", help="compile programs that differ, and compare their figures")
    parser.add_argument("--only", default="", help="configs whose name contains this")
    parser.add_argument("--keep", type=Path, help="directory for the lines that differ")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        return perform(json.loads(args.task))
    if args.against is None:
        parser.error("--against=DIR is missing: a checkout of the code to compare with")
    found = list(compared(args))
    print(table(found))
    if args.json:
        write_json(args.json, args, found)
    raise SystemExit(0 if all(row["unchanged"] for row in found) else 1)


if __name__ == "__main__":
    main()
