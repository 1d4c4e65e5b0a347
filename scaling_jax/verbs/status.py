"""`scaling-jax status`."""

import json

from absl import flags

from scaling_jax import storage
from scaling_jax.errors import UserError
from scaling_jax.verbs.common import Verb


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of a study or of a run; the flag's name may be left out", flag_values=values)
    flags.DEFINE_bool("json", False, "print it as JSON", flag_values=values)


def _run(values: flags.FlagValues) -> int:
    from scaling_jax.report.sweep import run_status_text, status_text
    from scaling_jax.sweep.claim import RUN_FILE
    from scaling_jax.sweep.plan import FILE as PLAN_FILE
    from scaling_jax.sweep.status import run_status, study_status

    if not values.workdir:
        raise UserError("DIR is missing: scaling-jax status DIR, the work directory of a study or a run")
    directory = storage.directory("--workdir", values.workdir)
    if (directory / PLAN_FILE).exists():
        status, text = study_status(directory), status_text
    elif (directory / RUN_FILE).exists():
        status, text = run_status(directory), run_status_text
    else:
        what = "no such directory" if not directory.exists() else f"holds neither a study, {PLAN_FILE}, nor a run, {RUN_FILE}"
        raise UserError(f"{values.workdir}: {what}")
    print(json.dumps(status, indent=1) if values.json else text(status))
    return 0


STATUS = Verb(
    "show how far a study, or a run, is",
    "scaling-jax status runs/time_transfer",
    _define,
    _run,
    positional="workdir",
)
