"""Our train step against the GPT-2 of Hugging Face transformers in PyTorch, on the same shapes and cores, in turns.

    python benchmarks/peer.py                           # some minutes on two cores; needs `pip install 'scaling_jax[bench]'`

Forward, backward and AdamW. PyTorch runs eagerly and compiled (which needs a C++ compiler), in float32, with bfloat16 products by
autocast, and in bfloat16 altogether; in each with the faster of two attentions and of two AdamWs. Ours runs in float32, and with bfloat16
products. All are processes of their own that take turns; the last line is the best of ours over the best of theirs, in tokens a second,
paired by turn. Model FLOPs are counted alike for all, as benchmarks/throughput.py counts them.
"""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from alternate import Failed, Worker, quartiles, take_turns
from machine import describe_machine, machine_line
from reporting import Row, table, write_json
from throughput import add_shape, figures, ratio_columns, shape_line, step_program

PRECISIONS = ("float32", "autocast", "bfloat16")
MODES = ("eager", "compiled")


def programs(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what worker.py builds), ours first."""
    for dtype in ("float32", "bfloat16"):
        program = step_program(args, args.width, dtype, args.sequences)
        program["fields"]["model.tied_embeddings"] = args.tied_embeddings
        yield f"scaling_jax, {dtype}", program
    for mode, precision in itertools.product(args.modes, PRECISIONS):
        yield f"PyTorch GPT-2, {mode}, {precision}", {**program, "program": "gpt2", "mode": mode, "precision": precision}


def measure(args: argparse.Namespace) -> tuple[list[Row], Row]:
    """Rows of all programs, with a note where one could not be built; and the comparison of the best two."""
    rows, running = [], []
    with ExitStack() as stack:
        for name, program in programs(args):
            print(f"building {name}", file=sys.stderr)
            try:
                worker = Worker(program)
            except Failed as error:
                if program["program"] == "ours":
                    raise
                rows.append({"program": name, "note": f"not run: {error}"})
                continue
            stack.callback(worker.close)
            running.append((name, program, worker))
        turns = take_turns([worker for *_, worker in running], args.rounds, args.seconds)
    found = []
    for p, (name, program, worker) in enumerate(running):
        row = {"program": name, **figures(program, turns.seconds_RxP[:, p], turns.peaks_RxP[:, p])}
        found.append(row | {"note": worker.built.get("form", "")})
    sides = [[p for p, (_, program, _) in enumerate(running) if (program["program"] == "ours") == ours] for ours in (True, False)]
    if not sides[1]:
        raise Failed(f"{rows[0]['program']} and all others: {rows[0]['note']}")
    ours, theirs = (max(side, key=lambda p: found[p]["tokens_per_s"]) for side in sides)
    ratio = quartiles(turns.seconds_RxP[:, theirs] / turns.seconds_RxP[:, ours])
    return found + rows, {"ours": found[ours]["program"], "peer": found[theirs]["program"], **ratio_columns("tokens_ratio", ratio)}


def modes(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(MODES):
        raise argparse.ArgumentTypeError(f"{text}: must be {' or '.join(MODES)}, or both")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tied_embeddings", action="store_true")
    parser.add_argument("--modes", type=modes, default=list(MODES), help="of PyTorch, comma-separated")
    add_shape(parser)
    args = parser.parse_args()
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"peer: no {' and no '.join(missing)} here: pip install 'scaling_jax[bench]'", file=sys.stderr)
        return 2
    print(machine_line(describe_machine()))
    print(f"width {args.width}, {shape_line(args)}\n")
    try:
        rows, best = measure(args)
    except Failed as error:
        print(f"peer: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    print(f"\n{comparison_line(best)}")
    if args.json:
        write_json(args.json, args, rows, comparison=best)
    return 0


def comparison_line(best: Row) -> str:
    """The last line."""
    ratio = f"{best['tokens_ratio']:.2f} times the tokens a second (quartiles {best['low']:.2f} to {best['high']:.2f})"
    return f"{best['ours']}, over {best['peer']}: {ratio}"


if __name__ == "__main__":
    sys.exit(main())
