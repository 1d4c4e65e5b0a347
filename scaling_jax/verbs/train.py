"""`scaling-jax train`."""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.process import keep_freed_memory, use_compilation_cache
from scaling_jax.train import joining
from scaling_jax.train.hosts import Hosts
from scaling_jax.verbs.common import Verb, config_of, define_config, integers


def workdir_of(values: flags.FlagValues) -> str:
    if not values.workdir:
        raise UserError("--workdir=DIR is missing: where the run is kept, and continued if it was stopped")
    if "://" in values.workdir:
        raise UserError(f"--workdir={values.workdir}: must be a directory of a file system; mount the bucket")
    return values.workdir


def _define(values: flags.FlagValues) -> None:
    define_config(values)
    flags.DEFINE_string("workdir", None, "directory of the run; an unfinished run there is continued", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "delete the run that is in workdir, and start again", flag_values=values)
    flags.DEFINE_string(
        "profile_at_tokens", "", "trace three steps after so many tokens, for XProf; several, comma-separated", flag_values=values
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, where the processes of several hosts meet; what a TPU pod, GKE or Slurm says if not given",
        flag_values=values,
    )
    flags.DEFINE_integer("processes", None, "how many processes train together; 1 is this host alone", flag_values=values)
    flags.DEFINE_integer("process", None, "which of them this is, from 0; give all the same command but for this", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    place = joining.place_of_flags(values.coordinator, values.processes, values.process)
    if place is None:
        config_of(values), workdir_of(values)  # their faults at once, before JAX is imported
        place = joining.place_of_environment()
    facts = {f"config.{name}": value for name, value in config_lib.flatten(values.config).items()} if values.config else {}
    facts |= {f"--{name}": values[name].value for name in ("overwrite", "profile_at_tokens")}
    with joining.joined(place, facts) as hosts:
        hosts.code = _train(values, hosts)
        return hosts.code


def _train(values: flags.FlagValues, hosts: Hosts) -> int:
    config, workdir = config_of(values), workdir_of(values)
    profile_at_tokens = integers("profile_at_tokens", values.profile_at_tokens, "1000000,2000000") if values.profile_at_tokens else []
    use_compilation_cache()
    keep_freed_memory()
    from scaling_jax.report.run import report_run
    from scaling_jax.train.loop import train
    from scaling_jax.train.profile import DIRECTORY

    tables = []

    def report(summary: dict[str, Any]) -> list[Path]:
        table, figures = report_run(workdir, summary)
        tables.append(table)
        return figures

    summary = train(config, workdir, overwrite=values.overwrite, profile_at_tokens=profile_at_tokens, report=report, hosts=hosts)
    if summary["status"] == "interrupted":
        saved = f"saved at {summary['tokens']:,} tokens" if summary["tokens"] else "nothing to save yet"
        where = "" if hosts.count == 1 else " on all hosts"
        print(f"interrupted, {saved}; the same command{where} continues", file=sys.stderr)
        return 128 + summary["signal"]
    if not hosts.first:
        return 1 if summary["status"] == "diverged" else 0
    print(*tables, sep="\n")
    for traced in sorted({Path(workdir) / DIRECTORY / str(tokens) for tokens in profile_at_tokens}):
        if traced.exists():
            print(f"{'profile':<24}{traced}")
    return 1 if summary["status"] == "diverged" else 0


TRAIN = Verb(
    "train a model, measure its gradient noise scale, continue where it was stopped",
    "scaling-jax train --config=configs/cpu_demo.py --workdir=runs/demo --config.optimizer.lr=0.002",
    _define,
    _run,
)
