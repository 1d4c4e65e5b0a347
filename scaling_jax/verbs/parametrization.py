"""`scaling-jax parametrization`."""

from absl import flags

from scaling_jax import config as config_lib
from scaling_jax.verbs.common import Verb, config_of, define_config, define_model


def _define(values: flags.FlagValues) -> None:
    define_config(values)
    define_model(values)


def _run(values: flags.FlagValues) -> int:
    config = config_of(values)
    config_lib.settle_compute_dtype(config, "float32")  # no part of the table
    from scaling_jax.coord_check.own_model import load_model
    from scaling_jax.report.parametrization import parametrization_table

    print(parametrization_table(config, load_model(values.model, config)))
    return 0


PARAMETRIZATION = Verb(
    "print init, lr, weight decay and multiplier of every parameter as a config applies them",
    "scaling-jax parametrization --config=configs/cpu_demo.py",
    _define,
    _run,
)
