"""How fast the train step is: time, tokens and FLOPs a second, and the share of the machine's float32 matrix-multiply peak.

    python benchmarks/throughput.py                             # two minutes on two cores
    python benchmarks/throughput.py --widths=64 --dtypes=float32 --measure
    python benchmarks/throughput.py --scaling                   # what a token costs as width grows, and a step as the batch does
    python benchmarks/throughput.py --widths=64 --against=DIR   # the code of another checkout, in turns with this one's

Every program is a process of its own. In each turn it measures the peak (numpy's BLAS, 1024 x 1024, all threads) and then some steps:
forward, backward, AdamW. "of peak" is the median over turns of what the steps reach over the peak beside it. Model FLOPs are, for each
token, 6 for each entry of a matrix, the readout's among them and the embedding table's not, and 12 * depth * context * width of attention.
Causality saves nothing in that count, and AdamW, norms and activations cost nothing.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from alternate import Failed, Quartiles, Turns, quartiles, started, take_turns
from machine import describe_machine, machine_line
from reporting import Row, table, write_json

from scaling_jax.config import mlp_width

SCALING_WIDTHS = (256, 1024)
SCALING_SEQUENCES = (4, 8, 16, 32, 64)  # of the first of these widths


def matrix_parameters(fields: dict[str, Any]) -> int:
    """Entries of all matrices of a program's model, the readout's among them, the embedding table's not; a GELU's MLP of 4 * width."""
    width = fields["model.width"]
    return fields["model.depth"] * width * (4 * width + 2 * mlp_width(width, 4.0)) + width * fields["model.vocab_size"]


def flops_per_token(fields: dict[str, Any]) -> int:
    """Forward and backward."""
    return 6 * matrix_parameters(fields) + 12 * fields["model.depth"] * fields["model.context"] * fields["model.width"]


def step_program(args: argparse.Namespace, width: int, dtype: str, sequences: int) -> dict[str, Any]:
    """What worker.py builds of this package."""
    model = {"width": width, "depth": args.depth, "context": args.context, "vocab_size": args.vocab_size, "head_dim": args.head_dim}
    fields = {f"model.{name}": value for name, value in model.items()} | {"model.compute_dtype": dtype}
    return {"program": "ours", "fields": fields, "sequences": sequences, "measure": getattr(args, "measure", False)}


def figures(program: dict[str, Any], seconds_R: np.ndarray, peaks_R: np.ndarray) -> dict[str, float]:
    """One program's row, of the seconds per step and the peaks of its turns."""
    tokens = program["sequences"] * program["fields"]["model.context"]
    flops = tokens * flops_per_token(program["fields"])
    seconds = float(np.median(seconds_R))
    return {
        "ms_per_step": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,
        "model_gflop_per_s": flops / seconds / 1e9,
        "peak_gflop_per_s": float(np.median(peaks_R)) / 1e9,
        "of_peak": float(np.median(flops / seconds_R / peaks_R)),
    }


def throughput_rows(args: argparse.Namespace) -> Iterator[Row]:
    for width in args.widths:
        for dtype in args.dtypes:
            program = step_program(args, width, dtype, args.sequences)
            with started([(program, None)]) as workers:
                turns = take_turns(workers, args.rounds, args.seconds)
            yield {**_said(program), **figures(program, turns.seconds_RxP[:, 0], turns.peaks_RxP[:, 0])}


def against_rows(args: argparse.Namespace) -> Iterator[Row]:
    """`tokens_ratio`: tokens a second of this code over the other's, paired by turn."""
    for width in args.widths:
        for dtype in args.dtypes:
            program = step_program(args, width, dtype, args.sequences)
            with started([(program, None), (program, args.against)]) as workers:
                turns = take_turns(workers, args.rounds, args.seconds)
            ms, other_ms = (1e3 * float(x) for x in np.median(turns.seconds_RxP, axis=0))
            ratio = quartiles(turns.seconds_RxP[:, 1] / turns.seconds_RxP[:, 0])
            yield {**_said(program), "ms_per_step": ms, "other_ms_per_step": other_ms, **ratio_columns("tokens_ratio", ratio)}


def scaling_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Time per token and matrix entry at the wider width over that at the narrower, beside the same ratio of FLOPs (attention's part
    falls with width); time per sequence over that of the largest batch, and a step's time over the line that fits all batches best."""
    narrow, wide = SCALING_WIDTHS
    sizes = [(narrow, n) for n in SCALING_SEQUENCES] + [(wide, args.sequences)]
    sizes = list(dict.fromkeys([*sizes, (narrow, args.sequences)]))
    for dtype in args.dtypes:
        programs = [step_program(args, width, dtype, sequences) for width, sequences in sizes]
        with started([(program, None) for program in programs]) as workers:
            turns = take_turns(workers, args.rounds, args.seconds)
        yield from scaled(programs, turns)


def scaled(programs: list[dict[str, Any]], turns: Turns) -> list[Row]:
    """Rows of programs of two widths, the wider with one number of sequences, the narrower with that and others."""
    widths = [program["fields"]["model.width"] for program in programs]
    sequences_P = np.array([program["sequences"] for program in programs])
    of_batches = [p for p, width in enumerate(widths) if width == min(widths)]
    wide = widths.index(max(widths))
    narrow = next(p for p in of_batches if sequences_P[p] == sequences_P[wide])
    per_sequence_RxP = turns.seconds_RxP / sequences_P
    largest = max(of_batches, key=lambda p: sequences_P[p])
    off_line = dict(
        zip(of_batches, off_the_line(sequences_P[of_batches], np.median(turns.seconds_RxP[:, of_batches], axis=0)), strict=True)
    )
    entries_P = np.array([matrix_parameters(program["fields"]) for program in programs])
    flops_P = np.array([flops_per_token(program["fields"]) for program in programs])
    rows = []
    for p, program in enumerate(programs):
        row = {**_said(program), "sequences": program["sequences"], **figures(program, turns.seconds_RxP[:, p], turns.peaks_RxP[:, p])}
        if p == wide:
            per_entry_RxP = per_sequence_RxP / entries_P
            row["per_token_and_entry"] = float(np.median(per_entry_RxP[:, p] / per_entry_RxP[:, narrow]))
            row["ideal"] = float(flops_P[p] / entries_P[p] * entries_P[narrow] / flops_P[narrow])
            row["over_ideal"] = row["per_token_and_entry"] / row["ideal"]
        else:
            row["per_sequence"] = float(np.median(per_sequence_RxP[:, p] / per_sequence_RxP[:, largest]))
            row["over_line"] = float(off_line[p])
        rows.append(row)
    return rows


def off_the_line(sequences_P: np.ndarray, seconds_P: np.ndarray) -> np.ndarray:
    """Times over those of the line a + b * sequences with the least squares of relative deviations."""
    design_Px2 = np.stack([np.ones(len(sequences_P)), sequences_P], axis=1) / seconds_P[:, None]
    line = np.linalg.lstsq(design_Px2, np.ones(len(sequences_P)), rcond=None)[0]
    return 1 / (design_Px2 @ line)


def ratio_columns(name: str, ratio: Quartiles) -> dict[str, float]:
    return {name: ratio.median, "low": ratio.low, "high": ratio.high}


def _said(program: dict[str, Any]) -> dict[str, Any]:
    return {"width": program["fields"]["model.width"], "dtype": program["fields"]["model.compute_dtype"]}


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def dtypes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - {"float32", "bfloat16"}:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: must be float32 or bfloat16, or both")
    return names


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The flags of a shape, and of how long to measure."""
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=16, help="per step")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each program")
    parser.add_argument("--seconds", type=float, default=0.5, help="of steps in a turn, about; a step at least")
    parser.add_argument("--json", help="file to write the figures to")


def shape_line(args: argparse.Namespace) -> str:
    vocabulary = f"vocabulary {args.vocab_size}, heads of {args.head_dim}"
    return f"depth {args.depth}, context {args.context}, {vocabulary}, {args.sequences} sequences a step if not said"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=integers, default=[64, 256, 1024], help="comma-separated")
    parser.add_argument("--dtypes", type=dtypes, help="comma-separated; float32,bfloat16 by default, with --scaling float32")
    parser.add_argument("--measure", action="store_true", help="the gradient noise at every step too")
    parser.add_argument(
        "--scaling", action="store_true", help=f"widths {SCALING_WIDTHS} and {SCALING_SEQUENCES} sequences instead of --widths"
    )
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="another checkout of this project, whose step is timed in turns with this one's"
    )
    add_shape(parser)
    args = parser.parse_args()
    if args.against and not (args.against / "scaling_jax" / "__init__.py").is_file():
        parser.error(f"--against={args.against}: must be a checkout of this project, with a package scaling_jax")
    if args.against and args.scaling:
        parser.error("--against and --scaling: one at a time")
    args.dtypes = args.dtypes or (["float32"] if args.scaling else ["float32", "bfloat16"])
    print(machine_line(describe_machine()))
    print(shape_line(args) + "\n")
    rows = []
    try:
        for row in scaling_rows(args) if args.scaling else against_rows(args) if args.against else throughput_rows(args):
            rows.append(row)
            print(f"{row['width']} {row['dtype']}: {row['ms_per_step']:.1f} ms a step", file=sys.stderr)
    except Failed as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.json:
        write_json(args.json, args, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
