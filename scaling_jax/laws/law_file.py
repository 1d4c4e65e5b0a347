"""A law of the critical batch size as a JSON file: what a fit found, for a batch schedule to follow.

    {"definition": "branch", "exponent": 0.48, "log_scale": 3.1, "exponent_se": 0.05, "points": 8, "centre": 16.1, "centre_se": 0.07}

says batch_tokens = exp(log_scale) · tokens^exponent, both in tokens, log natural, and which of the definitions it holds for. The last
four are those of `PowerLaw`; where they are left out the law has no interval.
"""

import json
import math
from pathlib import Path

from scaling_jax.errors import UserError
from scaling_jax.laws.critical_batch import DEFINITIONS
from scaling_jax.laws.power_law import PowerLaw
from scaling_jax.laws.table import check

_NEEDED, _ERRORS = ("exponent", "log_scale"), ("exponent_se", "centre", "centre_se")


def write_law(path: str | Path, definition: str, law: PowerLaw) -> None:
    """Writes the law. `definition` is one of `critical_batch.DEFINITIONS`."""
    if definition not in DEFINITIONS:
        raise ValueError(f"definition is {definition!r}; it must be one of {', '.join(DEFINITIONS)}")
    numbers = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in law._asdict().items()}
    Path(path).write_text(json.dumps({"definition": definition} | numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_law(path: str | Path) -> tuple[str, PowerLaw]:
    """The definition and the law of a file.

    Raises:
      UserError: no such file, no JSON object, or a key that is missing, unknown or holds the wrong thing; names file and key.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it must be a law file") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); it must be a law file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; a law file holds an object")
    for key in content:
        if key not in ("definition", "points", *_NEEDED, *_ERRORS):
            raise UserError(f"{path}: {key} is no key of a law file; those are definition, points, {', '.join(_NEEDED + _ERRORS)}")
    for key in ("definition", *_NEEDED):
        if content.get(key) is None:
            raise UserError(f"{path}: {key} is missing")
    if content["definition"] not in DEFINITIONS:
        raise UserError(f"{path}: definition is {content['definition']!r}; it must be one of {', '.join(DEFINITIONS)}")
    numbers = {key: math.nan if content.get(key) is None else content[key] for key in _NEEDED + _ERRORS}
    for key, value in numbers.items():
        if content.get(key) is not None:
            check(f"{path}: {key}", value, lambda _: True, "a finite number")
        if key.endswith("_se") and value < 0:
            raise UserError(f"{path}: {key} is {value!r}; a standard error is not negative")
    points = content.get("points") or 0
    if isinstance(points, bool) or not isinstance(points, int) or points < 0:
        raise UserError(f"{path}: points is {points!r}; it must be a number of measurements")
    return content["definition"], PowerLaw(points=points, **{key: float(value) for key, value in numbers.items()})
