"""What measuring the noise scale adds to a step compiled for a TPU pod: FLOPs, with the trip counts of loops, and peak memory.

    pip install libtpu && python benchmarks/noise_pods.py                       # v5p 4x4x4 and v5e 4x4, a few minutes

Nothing runs on a TPU: XLA's TPU compiler works on any x86 machine. The plain step, the measured one, and the one that measures in
AdamW's metric too are compiled for one mesh and compared. FLOPs are those of the products in the compiled program. With
--loss_chunk_tokens=0,1024 all three are compiled again with a loss that makes the logits of so many tokens at a time. Peak memory is the
compiler's own figure; arguments + temporaries is what certainly suffices.
"""

import argparse
import importlib.util
import itertools
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
from jax.experimental import topologies

from scaling_jax.config import default_config
from scaling_jax.mesh import make_mesh
from scaling_jax.pods.flops import dot_flops
from scaling_jax.train.step import Trainer

TOPOLOGIES = ("v5p:4x4x4", "v5e:4x4")


def main() -> None:
    args = _arguments()
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("libtpu, which holds XLA's TPU compiler, is not installed: pip install libtpu")
    results = []
    for name in args.topologies.split(","):
        plain = None
        programs = (("plain", False, False), ("measured", False, True), ("preconditioned", True, True))
        for chunk, (program, preconditioned, measure) in itertools.product(map(int, args.loss_chunk_tokens.split(",")), programs):
            program += f", {chunk:,}" if chunk else ""
            found = {"topology": name, "program": program} | compiled(name, args, chunk, preconditioned, measure)
            plain = plain or found
            ratios = {f"{key}_ratio": found[key] / plain[key] for key in ("flops", "peak_bytes", "safe_bytes")}
            results.append(found | ratios)
            print(
                f"{name:<10} {program:<21} {found['flops']:.4e} FLOPs a device ({ratios['flops_ratio']:.4f}), "
                f"peak {found['peak_bytes'] / 1e9:.2f} GB ({ratios['peak_bytes_ratio']:.3f}), "
                f"arguments + temporaries {found['safe_bytes'] / 1e9:.2f} GB ({ratios['safe_bytes_ratio']:.3f})",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps({"jax": jax.__version__, "arguments": vars(args), "results": results}, indent=2) + "\n")


def compiled(topology: str, args: argparse.Namespace, chunk: int, preconditioned: bool, measure: bool) -> dict[str, Any]:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim = args.width, args.depth, 128
    config.model.context, config.model.vocab_size = args.context, args.vocab_size
    config.model.mlp, config.model.mlp_ratio = "swiglu", 8 / 3
    config.model.loss_chunk_tokens = chunk
    config.model.compute_dtype, config.model.remat = "bfloat16", "full"
    config.mesh.fsdp = len(devices) // args.tensor
    config.mesh.tensor = args.tensor
    sequences = args.sequences * config.mesh.fsdp
    config.train.batch_tokens = sequences * args.context
    config.noise_scale.preconditioned = preconditioned
    trainer = Trainer(config, make_mesh(fsdp=config.mesh.fsdp, tensor=args.tensor, devices=list(devices)))
    program = trainer.lower_step(sequences, measure).compile()
    memory = program.memory_analysis()
    return {
        "flops": dot_flops(program.as_text()),
        "peak_bytes": memory.peak_memory_in_bytes,
        "safe_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="FLOPs and memory of measuring the noise scale, compiled for TPU pods.")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES), help="comma-separated")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--sequences", type=int, default=2, help="per device along fsdp")
    parser.add_argument("--tensor", type=int, default=1, help="devices along the tensor axis")
    parser.add_argument("--loss_chunk_tokens", default="0", help="comma-separated: tokens whose logits are held at a time; 0 is all")
    parser.add_argument("--json", help="file to write the numbers to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
