"""How long a newcomer waits: importing the package, and the command's first step, with and without compiled programs in the cache.

python benchmarks/startup.py
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine, machine_line
from reporting import table, write_json

CONFIG = Path(__file__).parent.parent / "configs" / "cpu_demo.py"


def import_seconds() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "from scaling_jax import Transformer"], check=True)
    return time.monotonic() - started


def first_step_seconds(workdir: Path, cache: Path) -> float:
    """From the command to the first record of metrics.jsonl, which is written once the first step has run."""
    flags = [f"--config={CONFIG}", f"--workdir={workdir}", "--config.logging.every_tokens=0"]
    command = [sys.executable, "-m", "scaling_jax", "train", *flags]
    started = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with code {process.returncode} before its first step")
        time.sleep(0.01)
    seconds = time.monotonic() - started
    process.kill()
    process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    import_seconds()  # warms the file cache
    found = {"import": [import_seconds() for _ in range(args.repeats)], "first step, nothing cached": [], "first step, again": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.repeats):
            cache = Path(folder) / f"cache{i}"
            found["first step, nothing cached"].append(first_step_seconds(Path(folder) / f"cold{i}", cache))
            found["first step, again"].append(first_step_seconds(Path(folder) / f"warm{i}", cache))
    rows = [{"name": name, "median_s": statistics.median(s), "from_s": min(s), "to_s": max(s)} for name, s in found.items()]
    print(f"{machine_line(describe_machine())}; {args.repeats} repeats")
    print(table(rows))
    if args.json:
        write_json(args.json, args, rows)


if __name__ == "__main__":
    main()
