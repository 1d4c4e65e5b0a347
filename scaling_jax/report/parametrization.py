"""The parametrization of a config as text."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from scaling_jax.model import Transformer
from scaling_jax.parametrization import TABLE
from scaling_jax.train.applied import applied_table
from scaling_jax.train.step import Trainer

_COLUMNS = ("name", "shape", "role", "fan_in", "base_fan_in", "init_std", "measured_std", "lr", "weight_decay", "decay_factor", "eps")
_COLUMNS += ("multiplier",)


def measured_table(config: ConfigDict, model: Callable[..., nnx.Module] = Transformer) -> dict[str, Any]:
    """`applied_table` of a config, with the std of each initial parameter, as drawn, in `measured_std`."""
    trainer = Trainer(config, model=model)
    state = trainer.init(config.train.seed)
    table = applied_table(trainer, state)
    for row, (_, value) in zip(table["parameters"], nnx.to_flat_state(state.params), strict=True):
        row["measured_std"] = float(np.std(np.asarray(value[...], np.float64)))
    return table


def parametrization_table(config: ConfigDict, model: Callable[..., nnx.Module] = Transformer) -> str:
    """The rows as text, with what concerns no single parameter and the source of every row below."""
    table = measured_table(config, model)
    rows = [{key: _text(row[key]) for key in _COLUMNS} for row in table["parameters"]]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in _COLUMNS}
    lines = ["  ".join(f"{row[key]:<{widths[key]}}" for key in widths).rstrip() for row in ({key: key for key in widths}, *rows)]
    roles = [*dict.fromkeys(row["role"] for row in table["parameters"]), "attention_logits", "residual_branch"]
    return "\n".join(
        [
            *lines,
            "",
            f"parametrization {table['name']}, base width {table['base_width']}, base depth {table['base_depth'] or 'not given'}, "
            f"base head_dim {table['base_head_dim']}; decay {table['decay_mode']}; shrinkage per step is lr x weight_decay",
            f"attention logits q·k x {_text(table['attention_scale'])} at head_dim {config.model.head_dim}; "
            f"residual branches x {_text(table['residual_multiplier'])} at depth {config.model.depth}",
            f"fingerprint {table['fingerprint']}",
            "",
            *(f"{role:<16}  {TABLE[table['name']][role].source}" for role in roles),
        ]
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if value is None:
        return "(the model's own)"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
