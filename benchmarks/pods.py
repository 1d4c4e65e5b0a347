"""Every config of configs/pods, compiled for every topology that it has a mesh for: the table of docs/pods.md.

    pip install '.[tpu]' && python benchmarks/pods.py --results=pods.json --write=docs/pods.md      # about half an hour on two cores

Nothing runs on a TPU. Each step is compiled twice, measuring the noise scale and not, in a process of its own. Rows that --results holds
already are not compiled again, so that it can be stopped and continued; delete the file after a change of the code. Exit code 1 if a row
does not hold to what is said in `failures`.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("time_transfer", "kaplan", "dense")
BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"


def rows() -> list[str]:
    """'dense.py:7b,v5p:8x8x8', … of every layout."""
    found = []
    for name in CONFIGS:
        layouts = runpy.run_path(str(ROOT / "configs" / "pods" / f"{name}.py"))["LAYOUTS"]
        for key, value in layouts.items():
            nested = all(isinstance(v, dict) for v in value.values())
            found += [f"{name}.py:{key},{topology}" for topology in value] if nested else [f"{name}.py:{key}"]
    return found


def compiled(row: str) -> dict[str, Any]:
    """Both steps of one row, as plain values."""
    from scaling_jax.config import load
    from scaling_jax.pods.chips import parse_topology
    from scaling_jax.pods.compile import compile_step, prepare

    prepare()
    from scaling_jax.report.pods import pod_json

    topology = row.partition(":")[2].rpartition(",")[2]  # 'v5p:8x8x8', or '2xv5p:8x16x16' for two slices
    slices, shape = (int(topology[0]), topology[2:]) if topology[0].isdigit() else (1, topology)
    config = load(f"{ROOT}/configs/pods/{row}")
    measured, plain = (pod_json(compile_step(config, parse_topology(shape, slices), measure)) for measure in (True, False))
    measured["context"] = config.model.context
    return measured | {"plain_flops": plain["product_flops"], "plain_peak": plain["memory"]["peak"], "plain_compile_s": plain["compile_s"]}


def depths(text: str) -> None:
    """Time to compile the 7B at several depths, in CPU seconds, which other work on the machine disturbs less than the clock."""
    for depth in map(int, text.split(",")):
        code = f"""
import time
from scaling_jax.config import load
from scaling_jax.pods.chips import parse_topology
from scaling_jax.pods.compile import compile_step, prepare
prepare()
config = load({str(ROOT / "configs/pods/dense.py")!r} + ":7b,v5p:8x8x8")
config.model.depth = {depth}
started = time.process_time()
step = compile_step(config, parse_topology("v5p:8x8x8"))
print(f"depth {depth}: {{step.compile_s:.0f}} s, {{time.process_time() - started:.0f}} s of CPU, {{len(step.collectives)}} collectives")
"""
        subprocess.run([sys.executable, "-c", code], check=True)


def failures(row: str, found: dict[str, Any]) -> list[str]:
    """What the row does not hold to."""
    flops, traced = found["product_flops"], found["traced_flops"]
    wanted = {
        "peak above 90% of the memory": found["memory_share"] <= 0.9,
        "FLOPs are not the traced program's": abs(flops / traced - 1) <= 0.01,
        "measuring adds more than 3% FLOPs": flops <= 1.03 * found["plain_flops"],
        "measuring adds more than 10% peak memory": found["memory"]["peak"] <= 1.1 * found["plain_peak"],
        "utilisation bound too low": found["mfu_bound"] >= (0.6 if row.startswith("dense") else 0.4 if "354m" in row else 0),
    }
    return found["faults"] + [name for name, holds in wanted.items() if not holds]


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| config | chips | replica x fsdp x tensor | sequences a device | peak memory | sent by a device; of the least | "
        "compute; links; network | utilisation at most | T takes at least | measuring: FLOPs; peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, r in results.items():
        m, t = r["mesh"], r["times_s"]
        sequences = r["batch_tokens"] / r["context"] / r["devices"]
        cells = [
            f"`{row}`",
            f"{r['chips']:,}",
            f"{m['replica']} x {m['fsdp']} x {m['tensor']}",
            f"{sequences:g}",
            f"{(r['memory']['peak'] + r['memory']['code']) / 1e9:.1f} GB, {r['memory_share']:.0%}",
            f"{r['wire_bytes'] / 1e9:.3g} GB; {r['wire_bytes'] / r['least_bytes']['total']:.2f}",
            "; ".join(f"{t[name] * 1e3:.3g}" for name in ("compute", "interconnect", "network")) + " ms",
            f"{r['mfu_bound']:.0%}",
            f"{r['days_bound']:.2g} days, {r['chip_hours_bound']:,.0f} chip-hours",
            f"{r['product_flops'] / r['plain_flops']:.4f}; {r['memory']['peak'] / r['plain_peak']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles every config of configs/pods for every topology that it has a mesh for.")
    parser.add_argument("--results", default="pods.json", help="file of the figures, row by row")
    parser.add_argument("--write", help="document whose table is replaced")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--depths", help="compile the 7B at these depths instead, and tell how long it takes: 8,64")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.depths:
        depths(args.depths)
        return
    if args.row:
        print(json.dumps(compiled(args.row)))
        return
    path = Path(args.results)
    results = json.loads(path.read_text()) if path.exists() else {}
    failed = False
    for row in [row for row in rows() if args.only in row]:
        if row not in results:
            command = [sys.executable, __file__, f"--row={row}"]
            done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{row}: {done.stderr[-2000:]}")
            results[row] = json.loads(done.stdout.splitlines()[-1])
            path.write_text(json.dumps(results, indent=1) + "\n")
        faults = failures(row, results[row])
        failed |= bool(faults)
        print(f"{row}: compiled in {results[row]['compile_s']} s; {'; '.join(faults) or 'holds'}", flush=True)
    ordered = {row: results[row] for row in rows() if row in results}
    print(table(ordered))
    if args.write:
        document = Path(args.write)
        text = document.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        document.write_text(f"{before}{BEGIN}\n{table(ordered)}\n{END}{after}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
