"""The parametrization as a run applies it, read back from the built model and the optimizer's state."""

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from scaling_jax.train.step import Trainer


def parametrization_rows(config: ConfigDict) -> tuple[list[dict[str, object]], float]:
    """The rows, one dict a parameter, and what q·k is multiplied with.

    A row has name, shape, role, fan_in, init_std (of the values), lr, weight_decay, eps and multiplier.

    `lr` is the peak; shrinkage per step is lr·weight_decay; `multiplier` is what the forward pass puts on the layer's output.
    """
    trainer = Trainer(config)
    state = trainer.init(config.train.seed)
    roles = state.opt_state[-1]
    model = nnx.merge(trainer.graph, state.params)
    rows = []
    columns = (dict(nnx.to_flat_state(tree)) for tree in (state.params, roles.lr, roles.weight_decay, roles.eps))
    values, lr, weight_decay, eps = columns
    for path, param in values.items():
        metadata = param.get_metadata()
        rows.append(
            {
                "name": ".".join(map(str, path)),
                "shape": " x ".join(map(str, param.shape)),
                "role": metadata["role"],
                "fan_in": metadata["fan_in"],
                "init_std": float(np.std(np.asarray(param[...], np.float64))),
                "lr": float(lr[path][...]),
                "weight_decay": float(weight_decay[path][...]),
                "eps": float(eps[path][...]),
                "multiplier": model.forward_multiplier(path),
            }
        )
    return rows, model.blocks.attention_scale


def parametrization_table(config: ConfigDict) -> str:
    """The rows as text, with what concerns no single parameter below."""
    rows, attention_scale = parametrization_rows(config)
    text = [{key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(row[key]) for row in text)) for key in text[0]}
    lines = ["  ".join(f"{row[key]:<{widths[key]}}" for key in widths).rstrip() for row in ({key: key for key in widths}, *text)]
    p, m = config.parametrization, config.model
    return "\n".join(
        [
            *lines,
            "",
            f"parametrization {p.name}, base width {p.base_width}, base depth {p.base_depth}, base head_dim {p.base_head_dim}; "
            f"decay {config.optimizer.decay_mode}",
            f"attention logits q·k x {attention_scale:.4g} at head_dim {m.head_dim}",
        ]
    )
