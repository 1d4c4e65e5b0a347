"""What measuring costs where one block is applied several times: FLOPs and memory of the step, beside those of blocks of their own.

    python benchmarks/shared_depth.py                   # a minute; nothing is run

Every use keeps the x and dy of every matrix until the backward pass is through. FLOPs are those of products in the compiled program.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from scaling_jax.config import default_config
from scaling_jax.pods.flops import dot_flops
from scaling_jax.train.step import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="FLOPs and memory of measuring a shared block.")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=16)
    args = parser.parse_args()
    print("| | FLOPs, measured over plain | temporaries, plain | measured |\n|---|---|---|---|")
    for shared, remat in ((True, "none"), (True, "full"), (False, "none"), (False, "full")):
        config = default_config()
        config.model.width, config.model.depth, config.model.context = args.width, args.depth, args.context
        config.model.shared_depth, config.model.remat = shared, remat
        config.train.batch_tokens = args.sequences * args.context
        plain, measured = (Trainer(config).lower_step(args.sequences, measure).compile() for measure in (False, True))
        flops = dot_flops(measured.as_text()) / dot_flops(plain.as_text())
        memory = [f"{program.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB" for program in (plain, measured)]
        print(f"| {'one block' if shared else 'blocks of their own'}, remat {remat} | {flops:.3f} | {' | '.join(memory)} |", flush=True)


if __name__ == "__main__":
    main()
