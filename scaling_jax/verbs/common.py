"""What a verb is, and the flags that several share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError


class Verb(NamedTuple):
    summary: str
    example: str
    define: Callable[[flags.FlagValues], None]
    run: Callable[[flags.FlagValues], int]
    continues: bool = False  # after Ctrl-C, when given again
    load: Callable[[str, Mapping[str, Any]], Any] | None = None  # what --config names, with fields changed; a run's config if not given
    positional: str = ""  # flag whose value may be given without its name


def define_config(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "file with a get_config(); --config.section.key=value changes a field", flag_values=values)


def config_of(values: flags.FlagValues) -> ConfigDict:
    if not values.config:
        raise UserError("--config=FILE is missing, for example --config=configs/cpu_demo.py")
    config_lib.validate(values.config)
    return values.config


def define_model(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model", "", "FILE.py:NAME of a Flax module of your own, instead of the Transformer", flag_values=values)


def integers(flag: str, text: str, example: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{flag}={text}: must be integers, comma-separated, for example {example}") from None
