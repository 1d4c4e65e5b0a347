"""`scaling-jax sweep`."""

import functools
import os
import sys
from typing import Any

from absl import flags

from scaling_jax import storage
from scaling_jax.console import LiveLine
from scaling_jax.errors import UserError
from scaling_jax.process import has_accelerator
from scaling_jax.sweep.study import Study, load_study
from scaling_jax.verbs.common import Verb
from scaling_jax.verbs.interrupt import ended_by_interrupt

ESTIMATE_SECONDS = 1.5  # that a dry run measures for


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "file with a get_study(); --config.section.key=value changes its base", flag_values=values)
    flags.DEFINE_string("workdir", None, "the study's directory or bucket, the same for all workers; it is continued", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "say what would be done and about how long it takes, and write nothing", flag_values=values)
    flags.DEFINE_string(
        "topology", "", "with --dry_run: compile groups for a slice such as v5e:2x4 instead, without data", flag_values=values
    )
    flags.DEFINE_integer(
        "topology_groups", 0, "groups that are compiled, each the largest of its kind, by FLOPs; 0 is one of every kind", flag_values=values
    )
    flags.DEFINE_string("engine", "local", "where groups are trained: local, processes of this machine; ray, a cluster", flag_values=values)
    flags.DEFINE_integer(
        "workers", None, "local: groups at a time; if not given, what the CPUs suffice for, or 1 with an accelerator", flag_values=values
    )
    flags.DEFINE_string(
        "ray_address",
        "auto",
        "ray: HOST:PORT of the head; auto, this machine's cluster; local, it alone",
        flag_values=values,
    )


def _run(values: flags.FlagValues) -> int:
    study = values.config
    if not study:
        raise UserError("--config=FILE is missing, for example --config=configs/sweeps/time_transfer_cpu.py")
    if not values.workdir and not values.dry_run:
        raise UserError("--workdir=DIR is missing: where the study is kept, and continued if it was stopped")
    if values.topology and not values.dry_run:
        raise UserError(f"--topology={values.topology}: is for --dry_run")
    if values.topology_groups < 0:
        raise UserError(f"--topology_groups={values.topology_groups}: must be 0, for all, or more")
    if values.engine not in ("local", "ray"):
        raise UserError(f"--engine={values.engine}: must be local or ray")
    if values.workers is not None and values.workers < 1:
        raise UserError(f"--workers={values.workers}: must be at least 1")
    if values.workers is not None and values.engine == "ray":
        raise UserError(f"--workers={values.workers}: is for --engine=local; Ray gives each group {study.cpus} CPUs where they are free")
    if values.topology:
        from scaling_jax.verbs.compile_groups import compile_groups

        return compile_groups(study, values.topology, values.topology_groups)
    return _dry_run(study, values) if values.dry_run else _sweep(study, values)


def _workers(values: flags.FlagValues, study: Study) -> int:
    from scaling_jax.sweep.engine import default_workers

    return values.workers or (1 if has_accelerator() else default_workers(study.cpus))


def _dry_run(study: Study, values: flags.FlagValues) -> int:
    os.environ |= {"PJRT_NPROC": str(study.cpus)}  # timed is what one group has
    with ended_by_interrupt("sweep"):
        from scaling_jax.report.sweep import dry_run_text
        from scaling_jax.sweep.measure import estimate
        from scaling_jax.sweep.opening import Data, open_study, work

    directory = storage.directory("--workdir", values.workdir) if values.workdir else None
    opened = open_study(study, directory, Data(verify=False))
    estimates = {} if study.tpus else estimate(work(opened), ESTIMATE_SECONDS)
    workers = _workers(values, study) if values.engine == "local" else 1  # a cluster says how many only once it is asked
    print(dry_run_text(opened, directory, estimates, workers))
    return 0


def _sweep(study: Study, values: flags.FlagValues) -> int:
    with ended_by_interrupt("sweep"):
        from scaling_jax.report.sweep import outcome_text
        from scaling_jax.sweep.run import Stopped, sweep

    directory = storage.directory("--workdir", values.workdir)
    try:
        outcome = sweep(study, directory, functools.partial(_engine, values, study), LiveLine(10))
    except Stopped as stopped:
        saved = "saved" if directory.exists() else "nothing to save yet"
        print(f"interrupted, {saved}; the same command continues", file=sys.stderr)
        return 128 + stopped.args[0]
    print(outcome_text(outcome.table, outcome.failed, directory / "results.parquet"))
    return 1 if outcome.failed else 0


def _engine(values: flags.FlagValues, study: Study, tasks: int) -> Any:
    if values.engine == "ray":
        from scaling_jax.sweep.ray_engine import RayEngine

        return RayEngine(values.ray_address, study.cpus, study.tpus)
    from scaling_jax.sweep.engine import LocalEngine

    return LocalEngine(min(_workers(values, study), tasks), study.cpus)


SWEEP = Verb(
    "run a study: a grid of configs to several horizons, trained together where they can be, one table at the end",
    "scaling-jax sweep --config=configs/sweeps/time_transfer_cpu.py --workdir=runs/time_transfer",
    _define,
    _run,
    continues=True,
    load=load_study,
)
