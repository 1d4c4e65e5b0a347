"""`scaling-jax VERB --flag=value …`, the same as `python -m scaling_jax VERB …`.

Exit codes: 0 done; 1 the run diverged (of branches, that with the run's own batch), a group of a study or the check failed; 2 bad input,
with one message and nothing half-written; 3 another process of the run failed or did not come, and the same command
continues; 128 + n stopped by signal n, saved.
"""

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.process import leave_out_absent_tpu, use_compilation_cache
from scaling_jax.verbs import VERBS

__all__ = ["VERBS", "main", "use_compilation_cache"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name); returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    name, *rest = argv
    if name not in VERBS:
        print(f"scaling-jax: no such verb: {name}{_did_you_mean(name, VERBS)}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    leave_out_absent_tpu()
    try:
        values = _parse(name, rest)
        code = VERBS[name].run(values) if values is not None else 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"scaling-jax {name}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        again = "; the same command continues" if VERBS[name].continues else ""
        print(f"scaling-jax {name}: interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # verbs name the files that they cannot write; this is a table or a text
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"scaling-jax {name}: cannot write: {error.strerror}", file=sys.stderr)
        return 2


def _overview() -> str:
    rows = [f"  {name:<16}{verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(["usage: scaling-jax VERB --flag=value …", "", *rows, "", "scaling-jax VERB --help lists a verb's flags."])


def _parse(name: str, argv: Sequence[str]) -> flags.FlagValues | None:
    """The verb's flags; None if only help was asked for. UserError for any flag that is unknown or wrong."""
    verb = VERBS[name]
    values = flags.FlagValues()
    verb.define(values)
    if any(arg in ("-h", "--help") for arg in argv):
        print("\n".join([verb.summary, "", f"  {verb.example}", "", *_flag_rows(values)]))
        return None
    overrides = {}
    try:
        argv = values.read_flags_from_files(["scaling-jax", *argv], force_gnu=False)
        if "config" in values:
            argv, overrides = _split_overrides(argv)
        extra = values(argv)[1:]
    except flags.Error as error:
        raise UserError(_flag_fault(error, values)) from None
    if extra and verb.positional and not values[verb.positional].present:
        values[verb.positional].value = extra.pop(0)
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}: flags are given as --flag=value")
    if "config" in values and values.config:
        values.config = (verb.load or _load)(values.config, overrides)
    elif overrides and verb.load is None:
        raise UserError(f"--config.{next(iter(overrides))}: --config=FILE is missing, of which that would change a field")
    return values


def _load(spec: str, overrides: Mapping[str, Any]) -> ConfigDict:
    config = config_lib.load(spec)
    for field, value in overrides.items():
        _set(config, field, value)
    return config


def _flag_rows(values: flags.FlagValues) -> list[str]:
    rows = [(f"--{key}", values[key].help, values[key].default) for key in values]
    width = max(20, *(len(flag) + 2 for flag, *_ in rows))
    lines = [f"  {flag:<{width}}{text}{f'; by default {default}' if default else ''}" for flag, text, default in rows]
    if "config" not in values:
        return lines
    fields = [f"  --config.{name:<32}{field.doc}; by default {field.default!r}" for name, field in config_lib.FIELDS.items()]
    return [*lines, "", "fields of the config:", "", *fields]


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _flag_fault(error: flags.Error, values: flags.FlagValues) -> str:
    """absl's message, in the words of the other messages."""
    if isinstance(error, flags.UnrecognizedFlagError):
        hint = _did_you_mean(error.flagname, values, "--") or f"; there are {', '.join(f'--{key}' for key in values)}"
        return f"--{error.flagname}: no such flag{hint}"
    text = (str(error) or type(error).__name__).splitlines()[0]
    given = re.match(r"flag --(\w+)=(.*?): ", text)
    if isinstance(error, flags.IllegalFlagValueError) and given and given[1] in values:
        kind = {"bool": "true or false", "int": "an integer", "float": "a number"}.get(values[given[1]].parser.flag_type())
        return f"--{given[1]}={given[2]}: must be {kind}" if kind else text
    return text


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The other arguments, and the values of all --config.section.key=value; UserError names every wrong one at once."""
    others, overrides, faults = [], {}, []
    left = list(argv)
    while left:
        arg = left.pop(0)
        if arg == "--":
            others += [arg, *left]
            break
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", arg, re.DOTALL)
        if match is None:
            others.append(arg)
            continue
        negated, name, text = match.groups()
        if name not in config_lib.FIELDS:
            faults.append(f"--config.{name}: no such field{config_lib.nearest(name)}")
            continue
        if isinstance(config_lib.FIELDS[name].default, bool) and text is None:
            text = "false" if negated else "true"
        elif text is None and left and not left[0].startswith("--"):
            text = left.pop(0)
        if text is None:
            faults.append(f"{arg}: needs a value, {arg}=…")
            continue
        try:
            overrides[name] = config_lib.parse(name, text)
        except ValueError as error:
            faults.append(f"--config.{name}={text}: {error}")
    if faults:
        raise UserError("\n".join(faults))
    return others, overrides


def _set(config: ConfigDict, name: str, value: Any) -> None:
    section, key = name.split(".")
    if section not in config or key not in config[section]:
        raise UserError(f"config.{name}: missing; build configs from scaling_jax.config.default_config()")
    config[section][key] = value
