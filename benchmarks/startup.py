"""How long a newcomer waits: importing the package, and the command's first step, with and without compiled programs in the cache.

python benchmarks/startup.py
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "configs" / "cpu_demo.py"


def import_seconds() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "from scaling_jax import Transformer"], check=True)
    return time.monotonic() - started


def first_step_seconds(workdir: Path, cache: Path) -> float:
    """From the command to the first record of metrics.jsonl, which is written once the first step has run."""
    command = [sys.executable, "-m", "scaling_jax", "train", f"--config={CONFIG}", f"--workdir={workdir}"]
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
    rows = {"import": [import_seconds() for _ in range(args.repeats)], "first step, nothing cached": [], "first step, again": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.repeats):
            cache = Path(folder) / f"cache{i}"
            rows["first step, nothing cached"].append(first_step_seconds(Path(folder) / f"cold{i}", cache))
            rows["first step, again"].append(first_step_seconds(Path(folder) / f"warm{i}", cache))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.repeats} repeats")
    for name, seconds in rows.items():
        print(f"{name:<28}median {statistics.median(seconds):5.1f} s   (from {min(seconds):.1f} to {max(seconds):.1f})")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
