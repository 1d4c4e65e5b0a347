"""A config small enough for a test, on the built-in corpus; and runs that share what is compiled."""

import json

from ml_collections import ConfigDict

from scaling_jax import batch_schedule
from scaling_jax.config import default_config, flatten
from scaling_jax.fields import FIELDS
from scaling_jax.train.step import Trainer


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


class Trainers:
    """In the place of Trainer: one for all runs that compile to one program, however they are carried out and their batch changes."""

    def __init__(self):
        self.made: dict[str, Trainer] = {}

    def __call__(self, config, mesh=None):
        def compiled(name):
            if name == "train.seed":
                return config.model.dropout > 0
            if name.startswith("batch."):
                return name == "batch.lr_rule"
            return name.startswith("model.") or name == "train.accumulation" or not FIELDS[name].execution

        fields = {name: value for name, value in flatten(config).items() if compiled(name)}
        key = json.dumps([fields, batch_schedule.lr_end_tokens(config)])
        if key not in self.made:
            self.made[key] = self.make(config, mesh)
        return self.made[key]

    def make(self, config, mesh):
        return Trainer(config, mesh)
