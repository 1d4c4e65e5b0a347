"""Configs: made from the fields of `scaling_jax.fields`, loaded, changed, checked; every fault of one is named at once."""

import ast
import difflib
import json
import re
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scaling_jax import batch_schedule
from scaling_jax.errors import UserError
from scaling_jax.fields import FIELDS

FASTEST = "fastest"  # model.compute_dtype that a run is yet to find


def default_config() -> ConfigDict:
    """A ConfigDict with every field at its default. Unknown fields are refused on assignment."""
    config = ConfigDict()
    for name, field in FIELDS.items():
        section, key = name.split(".")
        if section not in config:
            config[section] = ConfigDict()
        config[section][key] = field.default
    return config.lock()


def cpu_sized(config: ConfigDict) -> ConfigDict:
    """The recipe of a large run at a size for two CPU cores: 100 steps of 32 sequences of 64 bytes of the built-in corpus.

    Whatever is counted in tokens keeps its share of the budget, but for ten evaluations and checkpoints. Width, depth, heads and lr are
    left to the caller; `config` is changed.
    """
    tokens = config.train.tokens
    config.model.context, config.model.vocab_size = 64, 256
    config.train.batch_tokens = 32 * 64
    config.train.tokens = 100 * config.train.batch_tokens
    for name, value in flatten(config).items():
        if isinstance(value, int) and name.endswith("_tokens") and name not in ("train.batch_tokens", "model.loss_chunk_tokens"):
            section, key = name.split(".")
            config[section][key] = value * config.train.tokens // tokens
    config.checkpoint.keep_at_tokens = tuple(max(1, at * config.train.tokens // tokens) for at in config.checkpoint.keep_at_tokens)
    config.model.loss_chunk_tokens = min(config.model.loss_chunk_tokens, config.model.context)
    config.data.path, config.data.tokenizer = "sotu", "bytes"
    config.eval.every_tokens = config.checkpoint.every_tokens = config.train.tokens // 10
    config.eval.tokens = 4096
    return config


def load(spec: str) -> ConfigDict:
    """What get_config() of a Python file returns; 'FILE:text' calls get_config('text').

    Raises:
      UserError: there is no such file, its code fails (the line is named), or it returns no ConfigDict.
    """
    path, argument = file_of(spec)
    try:
        names = runpy.run_path(path, run_name="scaling_jax_config")
        get_config = names.get("get_config")
        if not callable(get_config) and callable(names.get("get_study")):
            raise UserError(f"--config={path}: is a study, get_study(), a grid of runs; `scaling-jax sweep` trains it")
        if not callable(get_config):
            raise UserError(
                f"--config={path}: defines no function get_config(); it must return a changed scaling_jax.config.default_config()"
            )
        config = get_config(*argument)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file's own code raises
        raise UserError(f"--config={path}{line_in(path, error)}: {reason(error, fields=True)}") from error
    if type(config) is not ConfigDict:
        kind = type(config).__name__
        raise UserError(f"--config={path}: get_config() returned {kind}; must return a changed scaling_jax.config.default_config()")
    return config


def file_of(spec: str) -> tuple[str, list[str]]:
    """The file of 'FILE' or 'FILE:text', and the text if there is one; UserError where there is no such file."""
    path, *argument = spec.split(":", 1)
    if not Path(path).is_file():
        seen_from = "" if Path(path).is_absolute() else f", seen from {Path.cwd()}"
        raise UserError(f"--config={path}: {'is a directory' if Path(path).is_dir() else 'no such file'}{seen_from}")
    return path, argument


def line_in(path: str, error: BaseException) -> str:
    """', line 5' of the file; '' where the error does not touch it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def reason(error: BaseException, fields: bool = False) -> str:
    """In one line, what an error of somebody's Python file says; with `fields` a missing attribute is a field of the config."""
    text = str(error)
    unknown = re.match(r"""[\\'"]*(?:Key [\\'"]*)?(\w+)""", text) if fields and isinstance(error, AttributeError | KeyError) else None
    if unknown:  # ConfigDict lists every other field at length
        return f"no such field: {unknown[1]}{nearest(unknown[1])}"
    wrong = re.search(
        r"field '(\w+)'.*?\. (.*) is of original type <class '.*?'> and cannot be casted to type <class '(.*?)'>", text, re.DOTALL
    )
    if wrong:
        return f"{wrong[1]} is {wrong[2]}: must be of type {wrong[3].split('.')[-1]}"
    if isinstance(error, SyntaxError):
        return f"syntax error: {error.msg}"
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def parse(name: str, text: str) -> Any:
    """The value of field `name` that `text` spells; ValueError, saying what would be right, if it spells none."""
    kind = type(FIELDS[name].default)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("must be true or false")
        return text.lower() == "true"
    if kind is tuple:
        return _parse_tuple(text)
    try:
        return kind(text)
    except ValueError:
        raise ValueError("must be an integer" if kind is int else "must be a number") from None


def _parse_tuple(text: str) -> tuple[Any, ...]:
    """'5' is (5,), 'a,b' is ('a', 'b'), and "('a', 'b')" is what Python makes of it."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        if text.startswith(("(", "[")):
            raise ValueError("must be a tuple, for example \"('a', 'b')\" or (1, 2)") from None
        return tuple(part for part in text.split(",") if part)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{'model.width': 128, …}, in the order of the config."""

    def walk(prefix: str, node: ConfigDict) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, ConfigDict):
                yield from walk(f"{prefix}{key}.", value)
            else:
                yield prefix + key, value

    return dict(walk("", config))


def identity(config: ConfigDict) -> dict[str, Any]:
    """The fields that make this run another run than its neighbour."""
    return {name: value for name, value in flatten(config).items() if not FIELDS[name].execution}


def nearest(name: str) -> str:
    """' (did you mean …?)' for an unknown field name, or ''."""
    keys = {known.split(".")[-1]: known for known in reversed(FIELDS)}
    key = name.split(".")[-1]
    close = [keys[key]] if key in keys else difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
    if not close:  # a slip in a key without its section
        close = [keys[near] for near in difflib.get_close_matches(key, keys, n=1)]
    return f" (did you mean config.{close[0]}?)" if close else ""


def heads(config: ConfigDict) -> int:
    return config.model.width // config.model.head_dim


def sequences_per_batch(config: ConfigDict) -> int:
    return config.train.batch_tokens // config.model.context


def resolve_mesh(config: ConfigDict, device_count: int) -> None:
    """Replaces mesh.fsdp = -1 by what the other axes leave of `device_count`, in place."""
    mesh = config.mesh
    if mesh.fsdp == -1:
        others = mesh.replica * mesh.tensor * mesh.member
        mesh.fsdp = max(1, device_count // others)


def settle_compute_dtype(config: ConfigDict, dtype: str) -> None:
    """Replaces model.compute_dtype = 'fastest' by `dtype`, in place: where no run begins, nothing is measured."""
    if config.model.compute_dtype == FASTEST:
        config.model.compute_dtype = dtype


def validate(config: ConfigDict, device_count: int | None = None) -> None:
    """Raises one UserError that names every fault of the config at once.

    Args:
      config: as `default_config()` lays it out; mesh.fsdp already resolved if `device_count` is given.
      device_count: devices that the mesh must match; None leaves that out.
    """
    faults = field_faults(config)
    if not faults:  # relations mean something only between sound values
        faults = relation_faults(config, device_count)
    if faults:
        raise UserError("\n".join(faults))


def field_faults(config: ConfigDict) -> list[str]:
    """Messages for every field that is unknown, missing, of another type or out of its range."""
    values = flatten(config)
    faults = [f"config.{name}: no such field{nearest(name)}" for name in values if name not in FIELDS]
    missing = [f"config.{name}" for name in FIELDS if name not in values]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        faults.append(f"{', '.join(missing[:3])}{more}: missing; build configs from scaling_jax.config.default_config()")
    for name, field in FIELDS.items():
        if name not in values:
            continue
        value = values[name]
        if type(value) is not type(field.default):
            faults.append(f"config.{name} is {value!r}: must be of type {type(field.default).__name__}")
        elif field.choices and value not in field.choices:
            faults.append(f"config.{name} is {value!r}: must be one of {', '.join(field.choices)}")
        elif field.minimum is not None and not value >= field.minimum:
            faults.append(f"config.{name} is {value}: must be at least {field.minimum}")
        elif field.above is not None and not value > field.above:
            faults.append(f"config.{name} is {value}: must be greater than {field.above}")
        elif field.below is not None and not value < field.below:
            faults.append(f"config.{name} is {value}: must be less than {field.below}")
        elif isinstance(value, float) and value == float("inf"):
            faults.append(f"config.{name} is {value}: must be finite")
    return faults


def relation_faults(config: ConfigDict, device_count: int | None) -> list[str]:
    """Messages for every relation between fields, each sound by itself, that does not hold."""
    model, mesh, train, schedule = config.model, config.mesh, config.train, config.schedule
    faults = []
    if model.width % model.head_dim:
        faults.append(f"config.model.width is {model.width}: must be a multiple of config.model.head_dim, {model.head_dim}")
    elif model.kv_heads and heads(config) % model.kv_heads:
        faults.append(
            f"config.model.kv_heads is {model.kv_heads}: must divide the {heads(config)} heads, width / head_dim; 0 is one for each"
        )
    chunk = min(model.loss_chunk_tokens, model.context)
    piece = next((n for n in range(chunk, 0, -1) if model.context % n == 0), 0)
    if chunk and 2 * piece <= chunk:  # pieces so small are slow, without a word
        faults.append(
            f"config.model.loss_chunk_tokens is {model.loss_chunk_tokens}: must be 0 or near a divisor of config.model.context, "
            f"{model.context}, into which a sequence is cut; the next is {piece}"
        )
    if model.attention == "splash" and (model.context % 128 or model.dropout):
        faults.append(
            f"config.model.attention is splash: needs config.model.context ({model.context}) to be a multiple of 128, and "
            f"config.model.dropout ({model.dropout}) to be 0"
        )
    if model.positions == "rotary" and model.head_dim % 2:
        faults.append(f"config.model.head_dim is {model.head_dim}: must be even, for rotary positions")
    if config.parametrization.name == "completep" and model.shared_depth:
        faults.append("config.model.shared_depth is True: completep is a rule for blocks of their own; must be standard or mup")
    if config.parametrization.name == "completep" and not config.parametrization.base_depth:
        faults.append("config.parametrization.base_depth is 0: completep needs the depth at which every multiplier is 1, at least 1")
    if mesh.fsdp == 0:
        faults.append("config.mesh.fsdp is 0: must be positive, or -1 for all devices that are left")
    elif mesh.fsdp > 0:
        faults += _mesh_faults(config, device_count)
    shards = mesh.replica * max(1, mesh.fsdp)
    unit = model.context * shards * train.accumulation
    if train.batch_tokens % unit and mesh.fsdp >= 0:  # -1 is not resolved yet
        faults.append(
            f"config.train.batch_tokens is {train.batch_tokens}: must be a multiple of {unit} "
            f"(context {model.context} x replica·fsdp {shards} x accumulation {train.accumulation})"
        )
    elif config.noise_scale.every and sequences_per_batch(config) < 2:
        faults.append(
            f"config.train.batch_tokens is {train.batch_tokens}: one sequence of context {model.context}, but noise is measured between "
            f"sequences; must be at least {2 * model.context}, or config.noise_scale.every=0"
        )
    batch_faults = batch_schedule.faults(config, max(1, shards))
    faults += batch_faults
    if not batch_faults and batch_schedule.end_tokens(config) // model.context >= 1 << 31:
        faults.append(f"config.train.tokens is {train.tokens}: at context {model.context} at most {((1 << 31) - 1) * model.context}")
    if schedule.warmup_tokens > train.tokens:
        faults.append(f"config.schedule.warmup_tokens is {schedule.warmup_tokens}: longer than the run, config.train.tokens {train.tokens}")
    elif schedule.name == "wsd" and schedule.decay_tokens == 0:
        faults.append("config.schedule.decay_tokens is 0: must be positive for wsd, or config.schedule.name=constant")
    elif schedule.name == "wsd" and schedule.warmup_tokens + schedule.decay_tokens > train.tokens:
        faults.append(
            f"config.schedule.decay_tokens is {schedule.decay_tokens}: with {schedule.warmup_tokens} tokens of warmup "
            f"longer than the run, config.train.tokens {train.tokens}"
        )
    if schedule.final_lr_fraction > 1:
        faults.append(f"config.schedule.final_lr_fraction is {schedule.final_lr_fraction}: must be at most 1")
    for value in config.checkpoint.keep_at_tokens:
        if type(value) is not int or not 0 < value <= train.tokens:
            faults.append(f"config.checkpoint.keep_at_tokens has {value!r}: must be integers from 1 to config.train.tokens, {train.tokens}")
    for entry in config.data.eval_domains:
        if not isinstance(entry, str) or not all(entry.partition("=")):
            faults.append(f"config.data.eval_domains has {entry!r}: must be 'name=directory'")
    return faults


def _mesh_faults(config: ConfigDict, device_count: int | None) -> list[str]:
    model, mesh = config.model, config.mesh
    faults = []
    if mesh.member != 1:
        faults.append(f"config.mesh.member is {mesh.member}: a single run has one member")
    devices = mesh.replica * mesh.fsdp * mesh.tensor * mesh.member
    if device_count is not None and devices != device_count:
        faults.append(
            f"config.mesh is replica {mesh.replica} x fsdp {mesh.fsdp} x tensor {mesh.tensor} x member {mesh.member} "
            f"= {devices} devices: must equal the {device_count} that there are; config.mesh.fsdp=-1 takes all that are left"
        )
    for size, axis, what in (
        (heads(config), "tensor", f"heads ({heads(config)}, width / head_dim)"),
        (model.kv_heads, "tensor", f"config.model.kv_heads ({model.kv_heads})"),
        (mlp_width(model.width, model.mlp_ratio), "tensor", f"MLP width ({mlp_width(model.width, model.mlp_ratio)})"),
        (model.vocab_size, "tensor", f"config.model.vocab_size ({model.vocab_size})"),
        (model.context, "tensor", f"config.model.context ({model.context})"),
        (model.width, "fsdp", f"config.model.width ({model.width})"),
    ):
        if size % mesh[axis]:
            faults.append(f"config.mesh.{axis} is {mesh[axis]}: must divide the {what}")
    return faults


def mlp_width(width: int, mlp_ratio: float) -> int:
    """Hidden width of the MLP: mlp_ratio x width, rounded to a multiple of 8."""
    return max(8, round(width * mlp_ratio / 8) * 8)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Nested plain values (tuples as lists), the form that config.json holds."""
    return json.loads(json.dumps(config.to_dict()))


def from_json(values: dict[str, Any]) -> ConfigDict:
    """The inverse of `to_json`. A field that `values` lacks has its default; one that there is not is a UserError."""
    config = default_config()
    for section, fields in values.items():
        for key, value in fields.items():
            name = f"{section}.{key}"
            if name not in FIELDS:
                raise UserError(f"config.{name}: no such field{nearest(name)}")
            config[section][key] = tuple(value) if isinstance(value, list) else value
    return config
