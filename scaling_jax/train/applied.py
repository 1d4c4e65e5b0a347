"""The parametrization as a run applies it, read back from the built model and the optimizer's state."""

import hashlib
import json
from typing import Any

import jax
from flax import nnx

from scaling_jax.train.step import Trainer, TrainState


def applied_table(trainer: Trainer, state: TrainState) -> dict[str, Any]:
    """What `parametrization.json` holds.

    Returns:
      `parameters`, one dict each: name, shape, role, fan_in, base_fan_in, init_std (of the rule), lr (the peak), weight_decay
      (shrinkage per step is lr·weight_decay), decay_factor (what the rule makes of the config's decay), eps, multiplier (of the layer's
      output, in the forward pass; of a model of somebody's own, the rule's). `name`, the base sizes and `decay_mode`; `attention_scale`,
      of q·k, and `residual_multiplier`, None for a model of somebody's own; `fingerprint`, the same for two runs exactly if all of
      this is.
    """
    roles = jax.device_get(state.opt_state[-1])
    model = nnx.merge(trainer.graph, trainer.abstract_state.params)
    lr, weight_decay, eps = (dict(nnx.to_flat_state(tree)) for tree in (roles.lr, roles.weight_decay, roles.eps))
    forward, blocks = getattr(model, "forward_multiplier", None), getattr(model, "blocks", None)
    parameters = []
    for path, param in nnx.to_flat_state(trainer.abstract_state.params):
        metadata = param.get_metadata()
        parameters.append(
            {
                "name": ".".join(map(str, path)),
                "shape": list(param.shape),
                "role": metadata["role"],
                "fan_in": metadata["fan_in"],
                "base_fan_in": metadata["base_fan_in"],
                "init_std": metadata["rule"].init_std,
                "lr": float(lr[path][...]),
                "weight_decay": float(weight_decay[path][...]),
                "eps": float(eps[path][...]),
                "decay_factor": metadata["rule"].weight_decay,
                "multiplier": forward(path) if forward else metadata["rule"].multiplier,
            }
        )
    p = trainer.config.parametrization
    table = {
        "name": p.name,
        "base_width": p.base_width,
        "base_depth": p.base_depth,
        "base_head_dim": p.base_head_dim,
        "decay_mode": trainer.config.optimizer.decay_mode,
        "attention_scale": getattr(blocks, "attention_scale", None),
        "residual_multiplier": getattr(blocks, "residual_multiplier", None),
        "parameters": parameters,
    }
    return table | {"fingerprint": hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]}
