"""`scaling-jax VERB --flag=value …`, the same as `python -m scaling_jax VERB …`.

Exit codes: 0 done; 1 the run diverged, or the check failed; 2 bad input, with one message and nothing half-written; 128 + n stopped by
signal n, saved.
"""

import ctypes
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
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
    try:
        values = _parse(name, rest)
        return VERBS[name].run(values) if values is not None else 0
    except UserError as error:
        print(f"scaling-jax {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the same command continues" if name == "coord-check" else ""
        print(f"scaling-jax {name}: interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


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
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}: flags are given as --flag=value")
    if "config" in values and values.config:
        config = config_lib.load(values.config)
        for field, value in overrides.items():
            _set(config, field, value)
        values.config = config
    return values


def _flag_rows(values: flags.FlagValues) -> list[str]:
    rows = [(f"--{key}", values[key].help, values[key].default) for key in values]
    lines = [f"  {flag:<20}{text}{f'; by default {default}' if default else ''}" for flag, text, default in rows]
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


def _define_config(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "file with a get_config(); --config.section.key=value changes a field", flag_values=values)


def _config(values: flags.FlagValues) -> ConfigDict:
    if not values.config:
        raise UserError("--config=FILE is missing, for example --config=configs/cpu_demo.py")
    config_lib.validate(values.config)
    return values.config


def _workdir(values: flags.FlagValues) -> str:
    if not values.workdir:
        raise UserError("--workdir=DIR is missing: where the run is kept, and continued if it was stopped")
    if "://" in values.workdir:
        raise UserError(f"--workdir={values.workdir}: must be a directory of a file system; mount the bucket")
    return values.workdir


def _define_train(values: flags.FlagValues) -> None:
    _define_config(values)
    flags.DEFINE_string("workdir", None, "directory of the run; an unfinished run there is continued", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "delete the run that is in workdir, and start again", flag_values=values)


def _train(values: flags.FlagValues) -> int:
    config, workdir = _config(values), _workdir(values)
    use_compilation_cache()
    _keep_freed_memory()
    from scaling_jax.report.run import report_run
    from scaling_jax.train.loop import train

    summary = train(config, workdir, overwrite=values.overwrite)
    if summary["status"] == "interrupted":
        saved = f"saved at {summary['tokens']:,} tokens" if summary["tokens"] else "nothing to save yet"
        print(f"interrupted, {saved}; the same command continues", file=sys.stderr)
        return 128 + summary["signal"]
    print(report_run(workdir, summary))
    return 1 if summary["status"] == "diverged" else 0


def _define_tokenize(values: flags.FlagValues) -> None:
    flags.DEFINE_list("input", None, "text files (.txt, .txt.xz), globs or directories, comma-separated", flag_values=values)
    flags.DEFINE_string("out", None, "directory to make", flag_values=values)
    flags.DEFINE_string("tokenizer", "bytes", "'bytes', or the path of a Hugging Face tokenizer.json", flag_values=values)
    flags.DEFINE_integer("holdout_every", 10, "hold out every n-th document; 0 holds out none", flag_values=values)
    flags.DEFINE_string("split_documents", "", "text that separates documents within a file", flag_values=values)


def _tokenize(values: flags.FlagValues) -> int:
    from scaling_jax.console import LiveLine
    from scaling_jax.data.tokenize import tokenize_files
    from scaling_jax.data.tokenizers import load_tokenizer

    if not values.input:
        raise UserError("--input=FILES is missing: .txt or .txt.xz files, globs or directories, comma-separated")
    if not values.out:
        raise UserError("--out=DIR is missing: the directory to make")
    if values.holdout_every < 0 or values.holdout_every == 1:
        raise UserError(f"--holdout_every={values.holdout_every}: must be 0 (none) or at least 2")
    tokenizer = load_tokenizer(values.tokenizer)
    line = LiveLine(seconds=10, at_once=False)

    def on_progress(done: int, files: int, tokens: int) -> None:
        line.show(f"{done:,}/{files:,} files · {tokens:,} tokens")

    try:
        summary = tokenize_files(values.input, values.out, tokenizer, values.holdout_every, on_progress, values.split_documents)
    finally:
        line.end()
    print(_token_table(summary))
    return 0


def _token_table(summary: dict[str, dict[str, Any]]) -> str:
    rows = [("split", "documents", "tokens", "bytes", "shards", "directory")]
    for split, part in summary.items():
        counts = (f"{part[key]:,}" for key in ("documents", "tokens", "text_bytes", "shards"))
        rows.append((split, *counts, str(Path(part["directory"]))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)), row[-1]])
        for row in rows
    )


def _define_parametrization(values: flags.FlagValues) -> None:
    _define_config(values)
    _define_model(values)


def _define_model(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model", "", "FILE.py:NAME of a Flax module of your own, instead of the Transformer", flag_values=values)


def _parametrization(values: flags.FlagValues) -> int:
    config = _config(values)
    from scaling_jax.coord_check.own_model import load_model
    from scaling_jax.report.parametrization import parametrization_table

    print(parametrization_table(config, load_model(values.model, config)))
    return 0


def _define_coord_check(values: flags.FlagValues) -> None:
    _define_config(values)
    flags.DEFINE_string("widths", None, "widths to compare at config.model.depth, comma-separated, at least 3", flag_values=values)
    flags.DEFINE_string("depths", None, "depths to compare at config.model.width, comma-separated, at least 3", flag_values=values)
    flags.DEFINE_string("out", None, "directory of the result; a check that was stopped there is continued", flag_values=values)
    flags.DEFINE_integer("seeds", 4, "initial parameters to average over", flag_values=values)
    flags.DEFINE_integer("steps", 10, "optimizer steps on the one batch", flag_values=values)
    flags.DEFINE_float(
        "lr", None, "learning rate, large but no more than 4 times the best; config.optimizer.lr if not given", flag_values=values
    )
    flags.DEFINE_integer("batch_tokens", 1024, "tokens of the one batch", flag_values=values)
    flags.DEFINE_integer(
        "heads", 0, "keep so many heads and let head_dim grow with width; 0 keeps config.model.head_dim", flag_values=values
    )
    _define_model(values)
    flags.DEFINE_bool("overwrite", False, "delete the check that is in out, and start again", flag_values=values)


def _coord_check(values: flags.FlagValues) -> int:
    config = _config(values)
    sizes = {axis: _sizes(f"{axis}s", text) for axis, text in (("width", values.widths), ("depth", values.depths)) if text}
    if not values.out:
        raise UserError("--out=DIR is missing: where the table, the figures and the verdict go")
    if "://" in values.out:
        raise UserError(f"--out={values.out}: must be a directory of a file system; mount the bucket")
    use_compilation_cache()
    from scaling_jax.coord_check.run import Check, coord_check, expected
    from scaling_jax.report.coord_check import report_check

    check = Check(sizes, values.seeds, values.steps, values.lr, values.batch_tokens, values.heads, values.model)
    text, passed = report_check(coord_check(config, check, values.out, values.overwrite), expected(config, check), values.out)
    print(text)
    return 0 if passed else 1


def _sizes(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{flag}={text}: must be integers, comma-separated, for example 64,128,256") from None


def _keep_freed_memory() -> None:
    """Tells glibc not to return freed memory to the kernel.

    XLA's CPU backend frees its temporaries after each step; mapping them again costs up to a third of a small model's step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 1 << 28)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, so that a second start is quick."""
    import hashlib
    import platform

    import jax

    # CPU programs are compiled for the very processor; another machine with the same home directory gets its own.
    cpu = platform.machine() + platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        cpu += next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaling_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(root / hashlib.sha256(cpu.encode()).hexdigest()[:12]))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


VERBS: dict[str, Verb] = {
    "train": Verb(
        "train a model, measure its gradient noise scale, continue where it was stopped",
        "scaling-jax train --config=configs/cpu_demo.py --workdir=runs/demo --config.optimizer.lr=0.002",
        _define_train,
        _train,
    ),
    "tokenize": Verb(
        "turn text files into token shards",
        "scaling-jax tokenize --input='books/*.txt.xz' --out=data/books --tokenizer=bytes --holdout_every=10",
        _define_tokenize,
        _tokenize,
    ),
    "parametrization": Verb(
        "print init, lr, weight decay and multiplier of every parameter as a config applies them",
        "scaling-jax parametrization --config=configs/cpu_demo.py",
        _define_parametrization,
        _parametrization,
    ),
    "coord-check": Verb(
        "measure whether activations, updates and weight decay keep their sizes across width or depth",
        "scaling-jax coord-check --config=configs/cpu_demo.py --widths=64,128,256,512,1024 --config.model.depth=2 --out=runs/widths",
        _define_coord_check,
        _coord_check,
    ),
}
