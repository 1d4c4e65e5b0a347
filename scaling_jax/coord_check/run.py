"""A coordinate check from its config to its coordinates on disk: checked before it starts, continued where it was stopped."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import scaling_jax
from scaling_jax import config as config_lib
from scaling_jax.console import LiveLine
from scaling_jax.coord_check.measure import PROBED, Coordinate, check_config, coordinates
from scaling_jax.coord_check.own_model import load_model
from scaling_jax.coord_check.verdict import Expected
from scaling_jax.data.corpus import open_run_data
from scaling_jax.errors import UserError

LEAST_STEPS = 3  # behind zero queries and a zero readout, keys move at the third
CONDITIONS_FILE, COORDINATES_FILE, SLOPES_FILE, VERDICT_FILE = "conditions.json", "coordinates.jsonl", "slopes.csv", "verdict.json"


def figure_file(axis: str) -> str:
    return f"coord_check_{axis}.png"


class Check(NamedTuple):
    """What to measure: see `scaling_jax.coord_check.measure.check_config` for what else holds.

    `sizes` is {'width': […], 'depth': […]}, or one of them; `batch_tokens` that of the one batch; `heads` as in `check_config`; `model` a
    'FILE.py:NAME' to check instead of this package's Transformer.
    """

    sizes: dict[str, Sequence[int]]
    seeds: int = 4
    steps: int = 10
    lr: float | None = None
    batch_tokens: int = 1024
    heads: int = 0
    model: str = ""


def expected(config: ConfigDict, check: Check) -> Expected:
    """What the config's parametrization claims, and what the check can see of it."""
    p = config.parametrization
    alpha = p.depth_exponent if p.name == "completep" else 1.0
    return Expected(alpha, config.optimizer.decay_mode == "coupled", config.model.tied_embeddings, bool(check.heads))


def coord_check(config: ConfigDict, check: Check, out: str | Path, overwrite: bool = False) -> list[Coordinate]:
    """Measures what `check` asks for and `out` does not have yet; returns all of it.

    Raises:
      UserError: sizes, config, data or model do not allow it, or `out` holds a check under other conditions. Nothing is written then.
    """
    out = Path(out)
    configs = _configs(config, check)
    model = load_model(check.model, *configs.values())
    sequences = max(1, check.batch_tokens // config.model.context)
    read = config.copy_and_resolve_references()
    read.batch.schedule, read.batch.stages = "constant", ()
    read.train.tokens = sequences * config.model.context  # of all that the run would read
    data = open_run_data(read, verify=config.data.verify)
    tokens_BxL = data.train.batch(0, sequences)
    conditions = _conditions(config, check, sequences, data.fingerprint)
    done = _claim(out, conditions, overwrite)
    wanted = {(*key, seed) for key in configs for seed in range(check.seeds)}
    found = [c for key, values in done.items() if key in wanted for c in values]
    line = LiveLine(seconds=10, at_once=False)
    if kept := wanted & done.keys():
        line.say(f"{out}: has {len(kept)} of {len(wanted)} measurements; --overwrite takes them again")
    try:
        for (axis, size), sized in configs.items():
            todo = [seed for seed in range(check.seeds) if (axis, size, seed) not in done]
            if not todo:
                continue
            line.show(f"{axis} {size} · compiling")
            for seed, values in zip(todo, coordinates(sized, axis, size, todo, check.steps, tokens_BxL, model), strict=True):
                if any(key[:2] == (axis, size) for key in done):  # the optimizer's own, which are no seed's, are there
                    values = [c for c in values if c.quantity not in PROBED]
                _append(out, axis, size, seed, values)
                found += values
                line.show(f"{axis} {size} · seed {seed + 1}/{check.seeds}")
    finally:
        line.end()
    return found


def _configs(config: ConfigDict, check: Check) -> dict[tuple[str, int], ConfigDict]:
    """The config at every size; UserError that names every fault of the check."""
    faults = []
    for name, value, least in (("seeds", check.seeds, 1), ("steps", check.steps, LEAST_STEPS), ("batch_tokens", check.batch_tokens, 1)):
        if value < least:
            faults.append(f"--{name}={value}: must be at least {least}")
    if check.lr is not None and not (check.lr > 0 and math.isfinite(check.lr)):
        faults.append(f"--lr={check.lr}: must be positive")
    if check.heads < 0:
        faults.append(f"--heads={check.heads}: must be positive, or 0 for heads of config.model.head_dim")
    if not check.sizes:
        faults.append("--widths=… or --depths=… is missing, for example --widths=64,128,256,512,1024")
    for axis, sizes in check.sizes.items():
        shown = ",".join(map(str, sizes))
        if len(set(sizes)) < 3:
            faults.append(f"--{axis}s={shown}: must be at least 3 different {axis}s, for a slope with its error")
        if any(size < 1 for size in sizes):
            faults.append(f"--{axis}s={shown}: must be positive")
    if faults:
        raise UserError("\n".join(faults))
    faults = _width_faults(config, check)
    if faults:
        raise UserError("\n".join(faults))
    configs = {}
    for axis, sizes in check.sizes.items():
        for size in sorted(set(sizes)):
            configs[axis, size] = check_config(config, axis, size, check.lr, check.heads)
            config_lib.validate(configs[axis, size])
    return configs


def _width_faults(config: ConfigDict, check: Check) -> list[str]:
    unit = config.model.head_dim
    what = f"config.model.head_dim, {unit}"
    if check.heads:
        unit = 2 * check.heads
        what = f"{unit}, twice --heads, so that head_dim is even"
    wrong = [str(width) for width in check.sizes.get("width", ()) if width % unit]
    faults = [f"--widths has {', '.join(wrong)}: must be multiples of {what}"] if wrong else []
    if check.heads and "depth" in check.sizes and config.model.width % unit:
        faults.append(f"config.model.width is {config.model.width}: must be a multiple of {what}")
    return faults


def _conditions(config: ConfigDict, check: Check, sequences: int, data_fingerprint: str) -> dict[str, Any]:
    """All that makes two coordinates comparable: everything but the sizes and seeds."""
    identity = config_lib.identity(config)
    own = ("train.tokens", "train.batch_tokens", "batch.", "schedule.", "noise_scale.", "eval.")
    own += ("optimizer.lr", "optimizer.weight_decay", "parametrization.output_init")
    conditions = {name: value for name, value in identity.items() if not name.startswith(own)}
    path = check.model.partition(":")[0]
    conditions |= {
        "data.fingerprint": data_fingerprint,
        "check.lr": check.lr or config.optimizer.lr,
        "check.batch_tokens": sequences * config.model.context,
        "check.steps": check.steps,
        "check.heads": check.heads,
        "check.model": check.model,
        "check.model_sha256": _sha256([Path(path)]) if path else "",
        "scaling_jax.sha256": _sha256(sorted(Path(scaling_jax.__file__).parent.rglob("*.py"))),  # an old verdict is none on new code
    }
    return json.loads(json.dumps(conditions))


def _sha256(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _claim(out: Path, conditions: dict[str, Any], overwrite: bool) -> dict[tuple[str, int, int], list[Coordinate]]:
    """Makes `out` this check's, and reads what it has; UserError where it is another's."""
    path = out / CONDITIONS_FILE
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out={out}: is a file, must be a directory")
        before = json.loads(path.read_text()) if path.exists() and not overwrite else None
        if not isinstance(before, dict | None):
            raise ValueError
        if before not in (None, conditions):
            keys = sorted(key for key in {*before, *conditions} if before.get(key) != conditions.get(key))
            changed = ", ".join(f"{key} {before.get(key)!r} -> {conditions.get(key)!r}" for key in keys[:4])
            raise UserError(f"--out={out}: holds a check under other conditions ({changed}); give another directory, or --overwrite")
        out.mkdir(parents=True, exist_ok=True)
        for result in (VERDICT_FILE, SLOPES_FILE, *(figure_file(axis) for axis in ("width", "depth"))):
            (out / result).unlink(missing_ok=True)  # of what was there before; made again at the end
        if before is None:
            (out / COORDINATES_FILE).unlink(missing_ok=True)
            path.write_text(json.dumps(conditions, indent=1) + "\n")
        return dict(_read(out))
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        files = f"{CONDITIONS_FILE} or {COORDINATES_FILE}"
        raise UserError(f"--out={out}: {files} is damaged; give another directory, or --overwrite") from error


def _read(out: Path) -> Iterator[tuple[tuple[str, int, int], list[Coordinate]]]:
    """What was measured; a last line that was cut off in writing is taken away."""
    path = out / COORDINATES_FILE
    if not path.exists():
        return
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    path.write_bytes(whole)
    for line in whole.splitlines():
        record = json.loads(line)
        axis, size, seed = record["axis"], record["size"], record["seed"]
        values = [
            Coordinate(axis, size, s, step, *of, math.nan if value is None else value) for s, step, *of, value in record["coordinates"]
        ]
        yield (axis, size, seed), values


def _append(out: Path, axis: str, size: int, seed: int, values: list[Coordinate]) -> None:
    rows = [[*c[2:-1], c.value if math.isfinite(c.value) else None] for c in values]
    with (out / COORDINATES_FILE).open("a") as file:
        file.write(json.dumps({"axis": axis, "size": size, "seed": seed, "coordinates": rows}) + "\n")
