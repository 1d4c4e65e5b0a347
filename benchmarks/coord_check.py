"""The coordinate check calibrated: what the right parametrization reaches over many sets of seeds, and what every mutant does.

    python benchmarks/coord_check.py                      about 25 minutes on two cores
    python benchmarks/coord_check.py --figures=docs/images   the figures of docs/parametrization.md instead, about 5 minutes

At the demo's settings (lr 0.004, batches of 1024 tokens of the built-in corpus, swiglu), 4 seeds a set, steps 1 to 10: widths 64 to 512
at depth 2, depths 2 to 32 at width 64. Mutants, of tests/mutants.py, at widths 64 to 256. Printed is the slope at the worst step, less
what it should be.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from scaling_jax import config as config_lib
from scaling_jax.cli import use_compilation_cache
from scaling_jax.console import LiveLine
from scaling_jax.coord_check.measure import PROBED, Coordinate, check_config, coordinates
from scaling_jax.coord_check.verdict import Expected, passed, slopes, worst
from scaling_jax.data.corpus import open_run_data
from scaling_jax.model import Transformer
from scaling_jax.report.coord_check import coord_figure

ROOT = Path(__file__).parent.parent
SEEDS, STEPS, SEQUENCES = 4, 10, 16
LINE = LiveLine(seconds=30)


def demo(name: str = "mup", **fields):
    config = config_lib.load(str(ROOT / "configs/cpu_demo.py"))
    config.model.depth, config.model.width = 2, 64
    config.parametrization.name, config.parametrization.base_depth = name, 2
    for key, value in fields.items():
        section, field = key.split("__")
        config[section][field] = value
    return config


def measured(config, axis, sizes, seeds=SEEDS, heads=0, model=Transformer) -> list[Coordinate]:
    tokens_BxL = open_run_data(config, verify=False).train.batch(0, SEQUENCES)
    found = []
    for size in sizes:
        sized = check_config(config, axis, size, heads=heads)
        for values in coordinates(sized, axis, size, range(seeds), STEPS, tokens_BxL, model):
            found += values
            LINE.show(f"{config.parametrization.name} · {axis} {size} · seed {values[-1].seed + 1}/{seeds}")
    LINE.end()
    return found


def calibrate(name: str, axis: str, sizes: tuple[int, ...], sets: int) -> None:
    everything = measured(demo(name), axis, sizes, seeds=sets * SEEDS)
    off, flagged = defaultdict(list), 0
    for first in range(0, sets * SEEDS, SEEDS):
        rows = slopes([c for c in everything if first <= c.seed < first + SEEDS or c.quantity in PROBED], Expected())
        flagged += not passed(rows)
        for row in worst(rows):
            off[row.quantity, row.kind].append(row.slope - row.expected)
    print(f"\n{name} over {axis} {', '.join(map(str, sizes))}: {flagged} of {sets} sets of {SEEDS} seeds flagged")
    for (quantity, kind), values in off.items():
        print(f"  {quantity:<11}{kind:<24}{min(values):+.3f} to {max(values):+.3f}")


def mutants() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from mutants import MUTANTS

    print("\nmutants: the kind that is furthest off")
    for name, (model, fields, varied) in MUTANTS.items():
        axis, heads = ("depth" if varied == "depth" else "width"), (4 if varied == "heads" else 0)
        sizes = (2, 4, 8, 16) if varied == "depth" else (64, 128, 256)
        expected = Expected(tied_embeddings="model__tied_embeddings" in fields, growing_heads=bool(heads))
        fields = {"parametrization__base_width": 64} | fields
        rows = slopes(measured(demo(**fields), axis, sizes, heads=heads, model=model), expected)
        far = max(worst(rows), key=lambda row: row.off)
        slope = "none" if far.slope is None else f"{far.slope:+.2f}"
        kind = f"{far.quantity} {far.kind}"
        verdict = "MISSED" if passed(rows) else "caught"
        print(f"  {name:<42}{verdict}  {kind:<36}{slope}, wanted {far.expected:+.2g} ± {far.tolerance:.2g}", flush=True)


def figures(folder: Path) -> None:
    for name, axis, sizes in (
        ("standard", "width", (64, 128, 256, 512, 1024)),
        ("mup", "width", (64, 128, 256, 512, 1024)),
        ("completep", "depth", (2, 4, 8, 16, 32)),
    ):
        found = measured(demo(name), axis, sizes)
        rows = slopes(found, Expected())
        path = folder / f"coord_check_{name}_{axis}.png"
        coord_figure(found, rows, path)
        print(f"{path}: {'pass' if passed(rows) else 'fail'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=20, help="sets of seeds")
    parser.add_argument("--figures", type=Path, help="draw the documentation's figures to this folder instead")
    arguments = parser.parse_args()
    use_compilation_cache()
    if arguments.figures:
        figures(arguments.figures)
        return
    mutants()
    calibrate("mup", "width", (64, 128, 256, 512), arguments.sets)
    calibrate("completep", "depth", (2, 4, 8, 16, 32), arguments.sets)


if __name__ == "__main__":
    main()
