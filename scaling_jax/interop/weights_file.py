"""Parameters of the Transformer out to a safetensors file, and in from one: docs/interop.md has the names.

Matrices are [out, in], as torch.nn.Linear has them and safetensors files usually do; here they are [in, out]. The stacked axis of the
blocks is taken apart. The header says what the forward pass needs to know beside the tensors: the shape of the model and its multipliers.
"""

import dataclasses
import errno
import json
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from flax import nnx

from scaling_jax.errors import UserError
from scaling_jax.interop.multipliers import Multipliers, folded
from scaling_jax.model import Transformer, TransformerConfig

VERSION = "1"
DTYPES = ("F32", "BF16", "F16")  # that can be read
_UNTOLD = ("depth", "head_dim", "mlp", "positions", "rope_theta", "qk_norm")  # what names and shapes do not tell, and logits depend on


class Tensor(NamedTuple):
    """Which part of which parameter a tensor of the file is."""

    path: tuple[str, ...]  # of the parameter
    block: int | None  # its entry along the leading axis; None where there is no such axis
    transposed: bool
    shape: tuple[int, ...]  # in the file


def name_map(model: Transformer) -> dict[str, Tensor]:
    """The tensors of a model's file by name. The model may be abstract."""
    names = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        stacked = path[0] == "blocks"
        shape = param.shape[1:] if stacked else param.shape
        transposed = len(shape) == 2 and param.get_metadata()["role"] not in ("embedding", "tied")
        shape = shape[::-1] if transposed else shape
        for block in range(param.shape[0]) if stacked else (None,):
            prefix = "" if block is None else f"blocks.{block}."
            names[prefix + _file_name(path[-1])] = Tensor(path, block, transposed, tuple(shape))
    return names


def _file_name(name: str) -> str:
    if name.endswith("_bias"):
        return name.removesuffix("_bias") + ".bias"
    return name.removesuffix("_gain") + ("_norm.weight" if name.endswith("_gain") else ".weight")


def save_safetensors(
    model: Transformer, path: str | Path, metadata: Mapping[str, str] | None = None, fold_multipliers: bool = False
) -> dict[str, np.ndarray]:
    """Writes the model's parameters, float32, whole or not at all; returns the tensors as written.

    Args:
      model: what to write.
      path: the file; one that is there is replaced.
      metadata: more entries for the header, text to text.
      fold_multipliers: multiply weights with what the forward pass multiplies with, so that a model of the `standard` parametrization gives
        the same logits. A tied embedding whose logits have a multiplier is written twice.

    Raises:
      UserError: the file cannot be written, or there is no weight to fold a multiplier into.
    """
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    values = {of: np.asarray(jax.device_get(param.get_value()), np.float32) for of, param in params.items()}
    tensors = {}
    for name, tensor in name_map(model).items():
        value = values[tensor.path] if tensor.block is None else values[tensor.path][tensor.block]
        tensors[name] = value.T if tensor.transposed else value
    config, multipliers = model.config, Multipliers.of(model)
    if fold_multipliers:
        config, multipliers, tensors = folded(config, multipliers, tensors)
    header = {
        "scaling_jax": VERSION,
        "config": json.dumps({name: value for name, value in dataclasses.asdict(config).items() if name != "for_cpu"}),
        "multipliers": json.dumps(multipliers._asdict()),
    }
    _write(Path(path), tensors, dict(metadata or {}) | header)
    return tensors


def _pieces(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The format: length of the header, header, tensors. By hand, since the package's writer orders the metadata by chance."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    yield len(text).to_bytes(8, "little") + text
    yield from (tensor.astype("<f4", copy=False).tobytes() for tensor in tensors.values())


def _write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    if path.exists() and not path.is_file():  # a directory; a device, in whose place renaming would put a file
        raise UserError(f"{path}: is no file; must be the name of a .safetensors file")
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(_pieces(tensors, metadata))
        temporary.replace(path)
    except OSError as error:
        megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = f"no space left on the disk, {megabytes:.1f} MB needed" if full else f"cannot be written: {error.strerror}"
        raise UserError(f"{path}: {why}") from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:  # the reason is on its way
            pass


def load_safetensors(model: Transformer, path: str | Path) -> None:
    """Gives the model the parameters in a file, if all of them fit; as `params_from_file`, which says when not."""
    nnx.update(model, params_from_file(model, path))


def params_from_file(model: Transformer, path: str | Path) -> nnx.State:
    """The parameters in a file, float32, laid out as those of the model are, which stays as it is and may be abstract.

    Raises:
      UserError: there is no such file, it is no safetensors file or cut short; a tensor is missing, unexpected, or of another shape or
        dtype, or has values that are not finite; or its header says that its model gave other logits with the same tensors.
    """
    params, names = nnx.state(model, nnx.Param), name_map(model)
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # of a pipe the first byte would be waited for
            what = "is a directory" if Path(path).is_dir() else "is no regular file"
            raise UserError(f"{path}: cannot be read: {what}; must be a safetensors file")
        with safetensors.safe_open(path, framework="numpy") as file:
            faults = _tensor_faults(file, names) or _header_faults(file.metadata() or {}, model)
            if faults:
                more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
                raise UserError(f"{path}: {'; '.join(faults[:4])}{more}")
            parts: dict[tuple[str, ...], list[np.ndarray]] = {}
            for name, tensor in names.items():  # blocks in their order
                value = np.asarray(file.get_tensor(name), np.float32)
                if not np.isfinite(value).all():
                    raise UserError(f"{path}: tensor {name} has values that are not finite; the parameters are spoilt")
                parts.setdefault(tensor.path, []).append(value.T if tensor.transposed else value)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise UserError(f"{path}: cannot be read: {reason}; must be a safetensors file") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or not a whole one: {error}") from error

    def laid_out(of: tuple[str, ...], param: nnx.Variable) -> nnx.Variable:
        value = np.stack(parts[of]) if of[0] == "blocks" else parts[of][0]
        return param.replace(jax.device_put(value, getattr(param.get_value(), "sharding", None)))

    return nnx.map_state(laid_out, params)


def _tensor_faults(file: Any, names: Mapping[str, Tensor]) -> list[str]:
    there, faults = set(file.keys()), []
    for name, tensor in names.items():
        if name not in there:
            faults.append(f"has no tensor {name}, which must be {list(tensor.shape)}")
            continue
        found = file.get_slice(name)
        if found.get_shape() != list(tensor.shape):
            faults.append(f"tensor {name} is {found.get_shape()}: must be {list(tensor.shape)}")
        elif found.get_dtype() not in DTYPES:
            faults.append(f"tensor {name} is of dtype {found.get_dtype()}: must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return faults + [f"has a tensor {name}, which this model has not" for name in sorted(there - set(names))]


def _header_faults(metadata: Mapping[str, str], model: Transformer) -> list[str]:
    """A file of somebody else's has no such header and passes."""
    if "scaling_jax" not in metadata:
        return []
    if metadata["scaling_jax"] != VERSION:
        return [f"is of version {metadata['scaling_jax']!r} of scaling_jax's names: must be {VERSION!r}"]
    try:
        config = TransformerConfig(**json.loads(metadata["config"]))
        multipliers = Multipliers(**json.loads(metadata["multipliers"]))
    except (ValueError, KeyError, TypeError, UserError) as error:
        return [f"its header has no config and multipliers that scaling_jax wrote ({error})"]
    if odd := [name for name, value in multipliers._asdict().items() if type(value) not in (int, float) or not math.isfinite(value)]:
        values = ", ".join(f"{name} is {getattr(multipliers, name)!r}" for name in odd)
        return [f"its header has no multipliers that scaling_jax wrote ({values}: must be numbers)"]
    faults = [
        f"is of a model whose {name} is {getattr(config, name)!r}: must be {getattr(model.config, name)!r}"
        for name in _UNTOLD
        if getattr(config, name) != getattr(model.config, name) and not (name == "rope_theta" and config.positions == "learned")
    ]
    return faults + [
        f"is of a model whose {name} is {there:g}: must be {here:g}; a file made with fold_multipliers is of 'standard'"
        for name, there, here in zip(Multipliers._fields, multipliers, Multipliers.of(model), strict=True)
        if not math.isclose(there, here, rel_tol=1e-6)
    ]
