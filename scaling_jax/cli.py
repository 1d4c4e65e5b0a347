"""`scaling-jax VERB --flag=value …`, the same as `python -m scaling_jax VERB …`.

Exit codes: 0 done; 1 the run diverged; 2 bad input, with one message and nothing half-written; 128 + n stopped by signal n, saved.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError


class Verb(NamedTuple):
    summary: str
    example: str
    define: Callable[[flags.FlagValues, Sequence[str]], None]
    run: Callable[[flags.FlagValues], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name); returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    name, *rest = argv
    try:
        if name not in VERBS:
            raise UserError(f"no such verb: {name}; there are {', '.join(VERBS)}")
        values = _parse(name, rest)
        return VERBS[name].run(values) if values is not None else 0
    except UserError as error:
        print(f"scaling-jax {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"scaling-jax {name}: interrupted", file=sys.stderr)
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
    verb.define(values, ["scaling-jax", *argv])
    if any(arg in ("-h", "--help") for arg in argv):
        rows = _flag_rows(values)
        print("\n".join([verb.summary, "", f"  {verb.example}", "", *rows]))
        return None
    _check_overrides(argv)
    try:
        extra = values(["scaling-jax", *argv])[1:]
    except flags.Error as error:
        raise UserError(_first_line(error)) from None
    except FileNotFoundError as error:
        raise UserError(f"--config={error.filename}: no such file") from None
    except Exception as error:  # whatever the config file's own code raises
        where = next((arg for arg in argv if arg.startswith("--config=")), "--config")
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"{where}: {type(error).__name__}: {_first_line(error)} ({line.filename}, line {line.lineno})") from None
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}: flags are given as --flag=value")
    return values


def _flag_rows(values: flags.FlagValues) -> list[str]:
    return [f"  --{key}  {values[key].help}" for key in values if "." not in key]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_overrides(argv: Sequence[str]) -> None:
    """Names every --config.section.key that is no field, and every value of a wrong type, before anything is read."""
    faults = []
    for arg in argv:
        flag, has_value, value = arg.partition("=")
        if not flag.startswith("--config."):
            continue
        name = flag.removeprefix("--config.")
        if name not in config_lib.FIELDS:
            faults.append(f"--config.{name}: no such field{config_lib.nearest(name)}")
        elif not has_value:
            faults.append(f"{flag}: needs a value, {flag}=…")
        elif type_fault := _type_fault(value, config_lib.FIELDS[name].default):
            faults.append(f"{arg}: {type_fault}")
    if faults:
        raise UserError("\n".join(faults))


def _type_fault(value: str, default: object) -> str | None:
    if isinstance(default, bool):
        return None if value.lower() in ("true", "false") else "must be true or false"
    if isinstance(default, int | float):
        try:
            type(default)(value)
        except ValueError:
            return "must be an integer" if isinstance(default, int) else "must be a number"
    return None


def _define_config(values: flags.FlagValues, argv: Sequence[str]) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "config file; --config.section.key=value changes a field of it", flag_values=values, sys_argv=list(argv)
    )


def _config(values: flags.FlagValues):
    if values.config is None:
        raise UserError("--config=FILE is missing, for example --config=configs/cpu_demo.py")
    config_lib.validate(values.config)
    return values.config


def _workdir(values: flags.FlagValues) -> str:
    if not values.workdir:
        raise UserError("--workdir=DIR is missing: where the run is kept, and continued if it was stopped")
    return values.workdir


def _define_train(values: flags.FlagValues, argv: Sequence[str]) -> None:
    _define_config(values, argv)
    flags.DEFINE_string("workdir", None, "directory of the run; an unfinished run there is continued", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "delete the run that is in workdir, and start again", flag_values=values)


def _train(values: flags.FlagValues) -> int:
    config, workdir = _config(values), _workdir(values)
    use_compilation_cache()
    from scaling_jax.report.run import report_run
    from scaling_jax.train.loop import train

    summary = train(config, workdir, overwrite=values.overwrite)
    if summary["status"] == "interrupted":
        saved = f"saved at {summary['tokens']:,} tokens" if summary["tokens"] else "nothing to save yet"
        print(f"interrupted, {saved}; the same command continues", file=sys.stderr)
        return 128 + summary["signal"]
    print(report_run(workdir, summary))
    return 1 if summary["status"] == "diverged" else 0


def _define_tokenize(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_list("input", None, "text files (.txt, .txt.xz), globs or directories, comma-separated", flag_values=values)
    flags.DEFINE_string("out", None, "directory to make", flag_values=values)
    flags.DEFINE_string("tokenizer", "bytes", "'bytes', or the path of a Hugging Face tokenizer.json", flag_values=values)
    flags.DEFINE_integer("holdout_every", 10, "hold out every n-th document; 0 holds out none", flag_values=values)
    flags.DEFINE_string("split_documents", "", "text that separates documents within a file", flag_values=values)


def _tokenize(values: flags.FlagValues) -> int:
    from scaling_jax.data.tokenize import tokenize_files
    from scaling_jax.data.tokenizers import load_tokenizer

    if not values.input:
        raise UserError("--input=FILES is missing: .txt or .txt.xz files, globs or directories, comma-separated")
    if not values.out:
        raise UserError("--out=DIR is missing: the directory to make")
    if values.holdout_every < 0 or values.holdout_every == 1:
        raise UserError(f"--holdout_every={values.holdout_every}: must be 0 (none) or at least 2")
    tokenizer = load_tokenizer(values.tokenizer)
    summary = tokenize_files(values.input, values.out, tokenizer, values.holdout_every, split_documents=values.split_documents)
    print(summary)
    return 0


def _parametrization(values: flags.FlagValues) -> int:
    config = _config(values)
    from scaling_jax.report.parametrization import parametrization_table

    print(parametrization_table(config))
    return 0


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, so that a second start is quick."""
    import hashlib
    import platform
    from pathlib import Path

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
        _define_config,
        _parametrization,
    ),
}
