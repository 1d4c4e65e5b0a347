"""A run opened for reading: its config, and the parameters of one of its checkpoints, laid out on the devices that there are.

Nothing is written and no lock is taken, so the run may still be training. The optimizer's moments are not read.
"""

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.mesh import make_mesh
from scaling_jax.train import checkpoint
from scaling_jax.train.step import Trainer
from scaling_jax.train.workdir import CONFIG_FILE


class OpenedRun(NamedTuple):
    """What there is to work with. `config` is the run's own but for its mesh, which is this machine's."""

    workdir: Path
    config: ConfigDict
    identity: dict[str, Any]  # of config.json
    tokens: int  # that the run had seen at this checkpoint
    trainer: Trainer
    params: nnx.State

    @property
    def model(self) -> nnx.Module:
        """The module with these parameters."""
        return nnx.merge(self.trainer.graph, self.params)


def open_run(run: str | Path, at_tokens: int | None = None, compute_dtype: str | None = None) -> OpenedRun:
    """Opens the run in a work directory at one of its checkpoints.

    Args:
      run: the work directory; of a run that ended, was interrupted, or is still training, on whatever devices.
      at_tokens: the checkpoint at exactly so many tokens; None is the newest.
      compute_dtype: in the place of the run's own.

    Raises:
      UserError: there is no run, no such checkpoint, or it cannot be read.
    """
    workdir = Path(run)
    config, identity = read_config(workdir)
    config.model.compute_dtype = compute_dtype or config.model.compute_dtype
    tokens = checkpoint_tokens(workdir, at_tokens)
    trainer = trainer_here(config)
    abstract_params = trainer.abstract_sharded_state.params
    while True:
        try:
            params = read_params(workdir, tokens, abstract_params)
        except UserError:
            newest = checkpoint_tokens(workdir, at_tokens)
            if newest == tokens:
                raise
            tokens = newest  # the run, still training, deleted that one meanwhile
        else:
            return OpenedRun(workdir, config, identity, tokens, trainer, params)


def read_config(workdir: Path) -> tuple[ConfigDict, dict[str, Any]]:
    """Config and identity of the run in `workdir`, as its config.json has them; UserError where there is no run."""
    path = workdir / CONFIG_FILE
    if not workdir.is_dir():
        raise UserError(f"--run={workdir}: {'is a file' if workdir.exists() else 'no such directory'}; must be the work directory of a run")
    try:
        stored = json.loads(path.read_text())
        config, identity = config_lib.from_json(stored["config"]), dict(stored["identity"])
        config_lib.validate(config)
    except OSError as error:
        raise UserError(f"--run={workdir}: must be the work directory of a run; {path} cannot be read: {error.strerror}") from error
    except UserError as error:
        faults = "; ".join(str(error).splitlines())
        raise UserError(f"--run={workdir}: {path} was changed, or written by another version of scaling_jax: {faults}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--run={workdir}: {path} is not a config that scaling_jax wrote") from error
    return config, identity


def checkpoint_tokens(workdir: Path, at_tokens: int | None = None) -> int:
    """The token count of the checkpoint to read: `at_tokens`, or the newest; UserError that lists those there are."""
    there = saved_tokens(workdir)
    if not there:
        raise UserError(f"--run={workdir}: has no checkpoint yet; a run saves one every config.checkpoint.every_tokens, and at its end")
    if at_tokens is not None and at_tokens not in there:
        raise UserError(
            f"--at_tokens={at_tokens}: {workdir} has no such checkpoint; there are {', '.join(map(str, there))}. "
            "config.checkpoint.keep_at_tokens names those that a run keeps for good"
        )
    return there[-1] if at_tokens is None else at_tokens


def saved_tokens(workdir: Path) -> list[int]:
    """Token counts of the complete checkpoints, oldest first. Opens none: the run may still be training."""
    # Those that are not complete have other names.
    return sorted(int(path.name) for path in (workdir / checkpoint.DIRECTORY).glob("*") if path.name.isdecimal())


def trainer_here(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Trainer:
    """The Trainer of a run's config on this machine, whose mesh it writes into `config`.

    The run's own mesh is kept where it fits. Otherwise every device holds a shard of the parameters if the width allows, for they may
    not fit on one; the batch of training plays no part.
    """
    devices = jax.devices() if devices is None else devices
    mesh = config.mesh
    if mesh.replica * mesh.fsdp * mesh.tensor * mesh.member != len(devices):
        mesh.fsdp = math.gcd(len(devices), config.model.width)
        mesh.replica, mesh.tensor, mesh.member = len(devices) // mesh.fsdp, 1, 1
    several = len(devices) > 1
    return Trainer(config, make_mesh(mesh.replica, mesh.fsdp, mesh.tensor, mesh.member, list(devices)) if several else None)


def read_params(workdir: Path, tokens: int, abstract_params: nnx.State) -> nnx.State:
    """The parameters of the checkpoint at `tokens`, laid out as `abstract_params` says; UserError, naming it, where it cannot be read."""
    for name in ("absl", "asyncio"):  # Orbax reports its ordinary course as warnings, and errors twice
        logging.getLogger(name).setLevel(logging.CRITICAL)
    directory = (workdir / checkpoint.DIRECTORY).absolute()
    item = {"params": abstract_params}
    restore = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )  # of the state: the optimizer's part of it is twice as large
    options = ocp.CheckpointManagerOptions(read_only=True)
    try:
        with (
            _reads_that_end(),
            ocp.CheckpointManager(directory, options=options, item_handlers=ocp.PyTreeCheckpointHandler()) as manager,
        ):
            return manager.restore(tokens, args=restore)["params"]
    except Exception as error:  # whatever a damaged file makes the reader raise
        sentence = " ".join(str(error).split()).partition(". ")[0]  # TensorStore's whole state comes after it
        reason = sentence if len(sentence) < 100 else sentence[:100] + "…"
        raise UserError(f"{directory / str(tokens)}: cannot be read ({reason}); --at_tokens can name another checkpoint") from error


class _LoopThatEnds(asyncio.SelectorEventLoop):
    def close(self) -> None:
        if not self.is_closed() and (left := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.wait(left, timeout=60))
        super().close()


class _LoopsThatEnd(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _LoopThatEnds()


@contextlib.contextmanager
def _reads_that_end() -> Iterator[None]:
    """Orbax reads many arrays at once, and at the first that fails closes its event loop. Those that come later would find it closed, and
    say so on stderr from threads of their own: so a loop waits for them."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_LoopsThatEnd())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)
