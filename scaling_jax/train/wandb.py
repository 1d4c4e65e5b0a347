"""A run's records at Weights & Biases: uploaded, or with WANDB_MODE=offline kept in the work directory for `wandb sync`.

Its steps are the run's, its x axis tokens. Records that are cut off at a resume and written again are the same numbers, so W&B, whose
steps never go back, keeps those that it has. At every start it is given all that it lacks: the records of metrics.jsonl beyond the last
step that the server names, or, offline, beyond the last step before an orderly end. Whatever fails after the start is said once, and
the training goes on.
"""

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.train.tensorboard import numbers
from scaling_jax.train.workdir import write_json

DIRECTORY, FILE = "wandb", "run.json"
MODES = "online", "offline", "disabled", "shared", "dryrun", "run"
FINISH_SECONDS = 120  # for what is still to be uploaded at the end


def check(project: str) -> None:
    """UserError where W&B is asked for (`project` is not '') but is not installed or, to be used online, not logged in to."""
    if not project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.logging.wandb is {project!r}: the package wandb is not installed; pip install 'scaling_jax[wandb]', or set it to ''"
        )
    import wandb

    if (mode := os.environ.get("WANDB_MODE", MODES[0])) not in MODES:
        raise UserError(f"WANDB_MODE={mode}: must be one of {', '.join(MODES)}; config.logging.wandb='' needs none")
    try:
        wandb.Settings(project=project)  # which refuses some characters
        if wandb.run is not None or wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):  # the caller's own run has started
            return
        logged_in = wandb.login(prompt=False)
    except (wandb.Error, ValueError) as error:
        raise UserError(_not_started(project, error)) from error
    if not logged_in:
        raise UserError(f"config.logging.wandb is {project!r}: not logged in to W&B; `wandb login`, WANDB_MODE=offline, or set it to ''")


def _not_started(project: str, error: Exception) -> str:
    way_out = "WANDB_MODE=offline needs no network, '' turns it off"
    return f"config.logging.wandb is {project!r}: W&B does not start ({_one_line(error).replace(f' {project!r}', '')}); {way_out}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class WandbRun:
    """The one W&B run of a work directory, whose id is kept there; started again it continues."""

    def __init__(self, config: ConfigDict, workdir: Path, say: Callable[[str], None]):
        """UserError where W&B does not start."""
        import wandb

        self._image, self._say, self._exit_code = wandb.Image, say, 1
        project = config.logging.wandb
        self._path = workdir / DIRECTORY / FILE
        self._path.parent.mkdir(exist_ok=True)
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        if known.get("project") != project:
            known = {"project": project, "id": secrets.token_hex(8), "steps": 0}
        self._known = known
        self._store()  # first, so that a start that is killed here makes no second run
        # Its own words and hooks on the console would tear the progress line; a run that the caller has open is another.
        settings = wandb.Settings(
            console="off", silent=True, reinit="create_new", finish_timeout=FINISH_SECONDS, finish_timeout_raises=True
        )
        try:
            self._run = wandb.init(
                project=project,
                id=known["id"],
                resume="allow",
                name=str(workdir),
                dir=workdir,
                config=config_lib.to_json(config),
                allow_val_change=True,
                settings=settings,
            )
        except Exception as error:  # of a service of another process: whatever
            raise UserError(_not_started(project, error)) from error
        if self._run.disabled:  # it keeps nothing: a later start, in another mode, gives it all
            self._run.finish()
            self._run = None
            say("W&B: disabled by WANDB_MODE")
            return
        self._first = known["steps"] + 1 if self._run.offline else self._run.step
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        where = f"offline; `wandb sync {workdir / DIRECTORY}/offline-run-*` uploads it" if self._run.offline else self._run.url
        say(f"W&B: {where}")

    def catch_up(self, records: Iterable[dict[str, Any]]) -> None:
        """Gives those of the run's records until now that W&B lacks."""
        for record in records:
            self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        if self._run is not None and record["step"] >= self._first:
            self._known["steps"] = record["step"]
            self._try(lambda: self._run.log(dict(numbers(record)), step=record["step"]))

    def end(self, summary: dict[str, Any], figures: Sequence[Path]) -> None:
        """Adds the summary, and figures (PNG) as images at the last step."""
        self._exit_code = 0 if summary["status"] in ("finished", "stopped") else 1

        def end():
            images = {f"figures/{path.stem}": self._image(str(path)) for path in figures}
            self._run.log({"tokens": summary["tokens"]} | images, step=max(summary["steps"], self._run.step))
            self._run.summary.update(summary)

        self._try(end)

    def close(self) -> None:
        """Uploads what is left, for two minutes at most."""
        if self._try(lambda: self._run.finish(exit_code=self._exit_code)):
            self._store()

    def _try(self, act: Callable[[], None]) -> bool:
        if self._run is None:
            return False
        try:
            act()
        except Exception as error:
            folder = Path(self._run.dir).parent
            self._say(f"W&B: {_one_line(error)}; on without it. `wandb sync {folder}` uploads what is there")
            self._run = None
            return False
        return True

    def _store(self) -> None:
        write_json(self._path, self._known)
