"""Memory and time of a training step with a large vocabulary, with all logits and with those of some tokens at a time.

    python benchmarks/loss_memory.py                    # GPT-2's vocabulary on this machine, two minutes

Every row is a process of its own, so that its peak resident memory is its own; the temporaries are the compiler's figure for the step.
Times are of rows one after another, not alternated: an orientation only. `benchmarks/noise_pods.py --vocab_size=50304
--loss_chunk_tokens=0,1024` has the same for TPU pods.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of the loss at a large vocabulary.")
    parser.add_argument("--vocab_size", type=int, default=50_304)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--chunks", default="0,512,64", help="tokens whose logits are held; 0 is all")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # chunk:measure, in a process of its own
    args = parser.parse_args()
    if args.row:
        chunk, measure = (int(part) for part in args.row.split(":"))
        print(json.dumps(row(args, chunk, bool(measure))))
        return
    tokens = args.sequences * args.context
    print(f"{tokens:,} tokens a step, V = {args.vocab_size:,}: all logits are {tokens * args.vocab_size * 4 / 1e9:.2f} GB\n")
    print("| logits held at a time | noise measured | temporaries of the step, GB | peak resident memory, GB | s a step |")
    print("|---|---|---|---|---|")
    for measure in (0, 1):
        for chunk in map(int, args.chunks.split(",")):
            command = [sys.executable, __file__, *sys.argv[1:], f"--row={chunk}:{measure}"]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            held = f"of {chunk:,} tokens" if chunk else "all"
            figures = f"{found['temp_bytes'] / 1e9:.2f} | {found['peak_bytes'] / 1e9:.2f} | {found['seconds']:.1f}"
            print(f"| {held} | {'yes' if measure else 'no'} | {figures} |", flush=True)


def row(args: argparse.Namespace, chunk: int, measure: bool) -> dict[str, float]:
    import jax
    import numpy as np

    from scaling_jax.config import default_config
    from scaling_jax.train.step import Trainer

    config = default_config()
    config.model.width, config.model.depth, config.model.context = args.width, args.depth, args.context
    config.model.vocab_size, config.model.loss_chunk_tokens = args.vocab_size, chunk
    config.train.batch_tokens = args.sequences * args.context
    trainer = Trainer(config)
    memory = trainer.lower_step(args.sequences, measure).compile().memory_analysis()
    state = trainer.init(0)
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, (1, args.sequences, args.context + 1), dtype=np.int32)
    seconds = []
    for _ in range(args.steps + 1):
        started = time.perf_counter()
        state, metrics = trainer.step(state, tokens, measure)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"temp_bytes": memory.temp_size_in_bytes, "peak_bytes": peak, "seconds": statistics.median(seconds[1:])}


if __name__ == "__main__":
    main()
