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
FURTHEST_OFF = 1.5  # times more or less than was asked for that N and batch of a config may be
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


def check_transfer(config: ConfigDict, study: Mapping[str, Any], fields: Mapping[str, Any], path: str) -> str:
    """What is not known of whether an lr of the study is the same lr in this config, a sentence; "" where it is known to be.

    Args:
      config: that the lr is for.
      study: columns of the study's table that have one value.
      fields: of the study's base config; empty for somebody else's table.
      path: of the laws.json.

    Raises:
      UserError: it is another one: the parametrization, or the sizes that its lr is of, differ.
    """
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
    kind = config.parametrization.name
    if not measured:
        return f"{path} does not say under which parametrization its lr was measured: it is written as one of {kind}."
    sizes = [name for name in config.parametrization if name.startswith("base_") and f"parametrization.{name}" not in measured]
    if kind == "standard" or not sizes:
        return ""
    taken = ", ".join(f"{name} {config.parametrization[name]}" for name in sizes)
    return f"The base sizes of the table behind {path} are not known: its lr is written as that of this config's, {taken}."


def ready_config(base: ConfigDict, params: float, tokens: float, batch_tokens: float, lr: float, chips: int = 1) -> ConfigDict:
    """The base at another size and budget.

    Args:
      base: a valid config.
      params: N to come near to; see `resize`.
      tokens, batch_tokens, lr: of the run; the batch becomes the nearest multiple of what the mesh needs.
      chips: devices that mesh.fsdp = -1 will take; the batch is rounded for them where that moves it by a tenth at most.

    Raises:
      UserError: N or the batch would be more than `FURTHEST_OFF` times off, there is not one step, or the result is no valid config.
    """
    config = base.copy_and_resolve_references()
    resize(config, params)
    _near("N", config_params(config), params, "a base with a smaller head_dim, fewer heads to a key, or another width / depth")
    config.train.batch_tokens = batch_near(config, batch_tokens, tokens, chips)
    share = round(tokens) / config.train.tokens
    for name in _SHARES:
        section, key = name.split(".")
        config[section][key] = round(config[section][key] * share)
    config.checkpoint.keep_at_tokens = tuple(max(1, round(at * share)) for at in config.checkpoint.keep_at_tokens)
    config.train.tokens, config.train.stop_at_tokens = round(tokens), 0
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


def batch_near(config: ConfigDict, batch_tokens: float, tokens: float, chips: int = 1) -> int:
    """The batch next to one that a step of the config can take, tokens.

    Raises:
      UserError: it is more than `FURTHEST_OFF` times off, or more than the run's tokens.
    """
    batch = _rounded_batch(config, batch_tokens, chips)
    _near("the batch", batch, batch_tokens, "a smaller config.model.context, mesh or config.train.accumulation, or another --batch_tokens")
    if batch > tokens:
        raise UserError(f"no config can be made: a batch of {batch} tokens is not one step in --tokens={tokens:g}")
    return batch


def _near(what: str, reached: float, asked: float, mend: str) -> None:
    if abs(math.log(reached / asked)) > math.log(FURTHEST_OFF):
        raise UserError(
            f"no config can be made: {what} next to {asked:.4g} that its base can have is {reached:.4g}, which must be within a factor "
            f"{FURTHEST_OFF:g}; give {mend}"
        )


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
