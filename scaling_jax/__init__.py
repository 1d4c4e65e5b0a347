"""What learning rate and batch size does a large language model need, and how do they move with model size and token budget?

`from scaling_jax import Transformer, TransformerConfig, Parametrization` is the model for anybody's loop;
`scaling_jax.noise_scale` the measurement; `scaling-jax` the command line.
"""

from typing import Any

_HOME = {
    "Transformer": "scaling_jax.model",
    "TransformerConfig": "scaling_jax.model",
    "sequence_losses": "scaling_jax.model",
    "Parametrization": "scaling_jax.parametrization",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:  # on demand: the command line answers a wrong flag before flax is imported
    if name not in _HOME:
        raise AttributeError(f"module 'scaling_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
