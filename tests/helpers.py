"""A config small enough for a test, on the built-in corpus."""

from ml_collections import ConfigDict

from scaling_jax.config import default_config


def small_config(**fields) -> ConfigDict:
    """Width 16, depth 2, context 16, 20 steps of 8 sequences; `fields` as section__key=value."""
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim, config.model.context = 16, 2, 8, 16
    config.parametrization.base_width, config.parametrization.base_depth, config.parametrization.base_head_dim = 16, 2, 8
    config.train.batch_tokens, config.train.tokens = 8 * 16, 20 * 8 * 16
    config.eval.tokens = 512
    config.logging.tensorboard = False
    for name, value in fields.items():
        section, key = name.split("__")
        config[section][key] = value
    return config
