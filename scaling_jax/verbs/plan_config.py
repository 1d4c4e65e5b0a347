"""The config that a plan writes: the shape of a base at another size, the budget, batch and lr of the advice, as a Python file."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.fields import FIELDS
from scaling_jax.train.step import transformer_config

# Of the budget they keep their share; loss_chunk_tokens, eval.tokens and data.train_tokens are no parts of it.
_SHARES = (
    "schedule.warmup_tokens", "schedule.decay_tokens", "noise_scale.window_tokens", "noise_scale.decay_tokens", "eval.every_tokens",
    "checkpoint.every_tokens",
)  # fmt: skip
_BEND = 1.25  # times, or over, the base's width / depth: as far as another depth may go so that N is met
_BENT_WEIGHT = 0.05  # of that, in logarithms, against what N misses


def base_config(fields: Mapping[str, Any], path: str) -> ConfigDict:
    """The base of the study that a laws.json was fitted to.

    Raises:
      UserError: it was fitted to somebody else's table, or its fields are not ours.
    """
    if not fields:
        raise UserError(f"{path}: was not fitted to a study, and has no config to start from; give one, --config=FILE")
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise UserError(f"{path}: its study has config.{unknown[0]}, which is no field of this scaling_jax; give a config, --config=FILE")
    config = config_lib.default_config()
    for name, value in fields.items():
        section, key = name.split(".")
        config[section][key] = tuple(value) if isinstance(value, list) else value
    return config


def check_transfer(config: ConfigDict, study: Mapping[str, Any], fields: Mapping[str, Any], path: str) -> None:
    """UserError where an lr of the study is another lr in this config: the parametrization, or the sizes that its lr is of, differ."""
    measured = {name: value for name, value in fields.items() if name.startswith("parametrization.")}
    if study.get("parametrization"):
        measured.setdefault("parametrization.name", study["parametrization"])
    for name, value in measured.items():
        key = name.split(".")[1]
        if config.parametrization[key] != value and not (config.parametrization.name == "standard" and key.startswith("base_")):
            raise UserError(
                f"config.{name} is {config.parametrization[key]!r}: {path} was measured with {value!r}, and its lr is no other's; "
                f"must be {value!r}"
            )


def ready_config(base: ConfigDict, params: float, tokens: float, batch_tokens: float, lr: float, chips: int = 1) -> ConfigDict:
    """The base at another size and budget.

    Args:
      base: a valid config.
      params: N to come near to; see `resize`.
      tokens, batch_tokens, lr: of the run; the batch becomes the nearest multiple of what the mesh needs.
      chips: devices that mesh.fsdp = -1 will take; the batch is rounded for them where that moves it by a tenth at most.

    Raises:
      UserError: the result is no valid config.
    """
    config = base.copy_and_resolve_references()
    resize(config, params)
    share = round(tokens) / config.train.tokens
    for name in _SHARES:
        section, key = name.split(".")
        config[section][key] = round(config[section][key] * share)
    config.checkpoint.keep_at_tokens = tuple(max(1, round(at * share)) for at in config.checkpoint.keep_at_tokens)
    config.train.tokens, config.train.stop_at_tokens = round(tokens), 0
    config.train.batch_tokens = _rounded_batch(config, batch_tokens, chips)
    config.optimizer.lr = float(f"{lr:.4g}")
    config.batch.schedule, config.batch.stages = "constant", ()
    config_lib.validate(config)
    return config


def resize(config: ConfigDict, params: float) -> None:
    """Sets width, depth and kv_heads for N nearest to `params`, in place.

    head_dim, the heads that share a key, and, within a quarter, width / depth stay those of the config.
    """
    model = config.model
    aspect = model.width / model.depth
    group = config_lib.heads(config) // model.kv_heads if model.kv_heads else 1
    unit = model.head_dim * group
    nearest = _width_for(config, params) / unit
    found = []
    for units in range(max(1, math.floor(0.85 * nearest)), math.ceil(1.2 * nearest) + 1):
        model.width, model.depth, model.kv_heads = units * unit, 1, units if model.kv_heads else 0
        depth = model.width / aspect if model.shared_depth else params / config_params(config)
        low, high = (max(1, round(model.width / (aspect * bend))) for bend in (_BEND, 1 / _BEND))
        model.depth = min(max(low, round(depth)), high)
        miss, bent = abs(math.log(config_params(config) / params)), abs(math.log(model.width / model.depth / aspect))
        found.append((miss + _BENT_WEIGHT * bent, model.width, model.depth, model.kv_heads))
    _, model.width, model.depth, model.kv_heads = min(found)


def _width_for(config: ConfigDict, params: float) -> float:
    """The width at which N is `params`, width / depth staying as it is; N goes as its third power, its second where blocks are shared."""
    return config.model.width * (params / config_params(config)) ** (1 / 2 if config.model.shared_depth else 1 / 3)


def config_params(config: ConfigDict) -> int:
    """N, without embeddings."""
    return transformer_config(config).params


def _rounded_batch(config: ConfigDict, batch_tokens: float, chips: int) -> int:
    mesh = config.mesh
    unit = config.model.context * mesh.replica * max(1, mesh.fsdp) * config.train.accumulation
    whole = config.model.context * config.train.accumulation * max(1, chips // mesh.tensor)
    if mesh.fsdp == -1 and abs(whole * max(1, round(batch_tokens / whole)) / batch_tokens - 1) <= 0.1:
        unit = whole
    least = -(-2 * config.model.context // unit) if config.noise_scale.every else 1  # noise is measured between sequences
    return unit * max(least, round(batch_tokens / unit))


def config_text(config: ConfigDict, title: str, command: str, remarks: Sequence[str]) -> str:
    """A Python file with a get_config() that returns this config."""
    values = config_lib.flatten(config)
    changed = {name: values[name] for name, field in FIELDS.items() if values[name] != field.default}
    lines = [f"    config.{name} = {json.dumps(v, ensure_ascii=False) if isinstance(v, str) else repr(v)}" for name, v in changed.items()]
    quoted = "\n".join([title, "", f"    {command}", "", *remarks]).replace("\\", "\\\\").replace('"""', "'''")
    body = "\n".join(["def get_config():", "    config = default_config()", *lines, "    return config"])
    return f'"""{quoted}\n"""\n\nfrom scaling_jax.config import default_config\n\n\n{body}\n'
