"""What summary.json says of a run."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling_jax.train.metrics import read_records
from scaling_jax.train.noise import PRECONDITIONED
from scaling_jax.train.step import Trainer, transformer_config


def summarize(trainer: Trainer, workdir: Path, step: int, tokens: int) -> dict[str, Any]:
    """The run in `workdir`, whose records reach to step `step` and `tokens`: its size, its last losses and noise scales, the software."""
    model = transformer_config(trainer.config)
    records = read_records(workdir)
    training = [r for r in records if "loss" in r and r["tokens"] <= tokens]
    tail = [r["loss"] for r in training[-max(1, len(training) // 20) :] if r["loss"] is not None]
    summary = {
        "tokens": tokens,
        "steps": step,
        "params": model.params,
        "total_params": sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params)),
        "flops_per_token": model.flops_per_token,
        "train_loss": float(np.mean(tail)) if tail else None,  # over the last twentieth of the run
    }
    for name in ("noise_scale_tokens", f"{PRECONDITIONED}_noise_scale_tokens"):
        if measured := [r for r in training if name in r]:
            summary |= {key: measured[-1][key] for key in (name, f"{name}_low", f"{name}_high")}
    evaluations = [r for r in records if any(key.startswith("eval/") for key in r)]
    if evaluations:
        summary |= {key: value for key, value in evaluations[-1].items() if key.startswith("eval/")}
    return summary | {
        "versions": {name: sys.modules[name].__version__ for name in ("jax", "flax", "optax")},
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    }
