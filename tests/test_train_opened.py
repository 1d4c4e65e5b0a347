"""A run opened for reading: the very parameters of a checkpoint, on any devices, and nothing of the run touched."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config

from scaling_jax.errors import UserError
from scaling_jax.train import opened, workdir
from scaling_jax.train.checkpoint import Checkpoints
from scaling_jax.train.loop import train
from scaling_jax.train.opened import open_run
from scaling_jax.train.step import Trainer

B = 128
pytestmark = pytest.mark.usefixtures("quick_compilation")


def config_of_run():
    checkpoints = {"checkpoint__every_tokens": 2 * B, "checkpoint__keep_at_tokens": (2 * B,)}
    return small_config(train__tokens=6 * B, noise_scale__every=0, **checkpoints)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of 6 steps, with checkpoints at 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert train(config_of_run(), directory)["status"] == "finished"
    return directory


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def contents(directory):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


def params_of(run, tokens):
    """As a run that continues reads them."""
    with Checkpoints(run, 9) as checkpoints:
        return checkpoints.restore(tokens, Trainer(config_of_run()).abstract_sharded_state).params


def same(a, b):
    return all(bool(jnp.array_equal(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_parameters_are_those_of_the_checkpoint(run, copy):
    before = contents(run)
    newest, first = open_run(run), open_run(str(run), 2 * B)
    assert contents(run) == before
    assert (newest.tokens, first.tokens, first.workdir) == (6 * B, 2 * B, run)
    assert same(newest.params, params_of(copy, 6 * B)) and same(first.params, params_of(copy, 2 * B))
    assert not same(newest.params, first.params)
    assert newest.config.model.width == 16 and newest.identity["model.width"] == 16 and "data.fingerprint" in newest.identity
    tokens = np.arange(17, dtype=np.int32)[None]
    logits = jax.jit(lambda tokens: newest.model(tokens))(tokens[:, :-1])
    losses = -jax.nn.log_softmax(logits)[0, np.arange(16), tokens[0, 1:]]
    np.testing.assert_allclose(newest.trainer.eval(newest.params, tokens)[0], losses, rtol=1e-5)


def test_only_the_parameters_are_read(copy):
    """From a checkpoint whose other parts have the form of another optimizer."""
    params = jax.tree.map(lambda x: x + 1, open_run(copy).params)
    with Checkpoints(copy, 9) as checkpoints:
        checkpoints.save(8 * B, {"params": params, "opt_state": {"other": jnp.zeros(5)}})
    assert same(open_run(copy).params, params)


def test_a_run_that_is_still_training_can_be_opened(copy, monkeypatch):
    lock = workdir._lock(copy)
    try:
        assert open_run(copy).tokens == 6 * B
    finally:
        workdir.release(lock)
    (copy / "checkpoints" / f"{8 * B}.orbax-checkpoint-tmp").mkdir()  # of a save that is not complete
    read = opened.read_params

    def overtaken(directory, tokens, abstract_params):
        if tokens == 6 * B:  # deleted by the run, which has a newer one
            (copy / "checkpoints" / str(6 * B)).rename(copy / "checkpoints" / str(7 * B))
        return read(directory, tokens, abstract_params)

    monkeypatch.setattr(opened, "read_params", overtaken)
    assert open_run(copy).tokens == 7 * B


def refused(match, *args):
    with pytest.raises(UserError, match=match) as error:
        open_run(*args)
    assert "\n" not in str(error.value)


def test_what_cannot_be_opened_is_named(copy, tmp_path):
    refused(r"--run=.*/nowhere: no such directory", tmp_path / "nowhere")
    refused(r"--run=.*config\.json: is a file", copy / "config.json")
    refused(r"--run=.*: must be the work directory of a run; .*config\.json cannot be read: No such file", tmp_path)
    refused(rf"--at_tokens=300: .*no such checkpoint; there are {2 * B}, {4 * B}, {6 * B}\. config\.checkpoint\.keep_at_tokens", copy, 300)
    for path in (copy / "checkpoints" / str(4 * B)).rglob("*"):
        if path.is_file() and "manifest" in path.name:
            path.unlink()
    refused(rf"copy/checkpoints/{4 * B}: cannot be read \(.*\); --at_tokens", copy, 4 * B)
    assert open_run(copy).tokens == 6 * B and open_run(copy, 2 * B).tokens == 2 * B
    stored = (copy / "config.json").read_text()
    (copy / "config.json").write_text(stored.replace('"width": 16', '"width": 32'))
    refused(r"cannot be read \(.*shape.*\)", copy)
    for before, after, fault in (
        ('"width"', '"breadth"', r"config\.model\.breadth: no such field"),
        ('"depth": 2', '"depth": null', r"config\.model\.depth is None: must be of type int"),
        (
            '"head_dim": 8',
            '"head_dim": 5',
            r"config\.model\.width is 16: must be a .*; config\.model\.head_dim is 5: must be even",
        ),
    ):
        (copy / "config.json").write_text(stored.replace(before, after))
        refused(rf"config\.json was changed, or written by another version of scaling_jax: {fault}", copy)
    for broken in ("{", "[]", '{"config": 3}'):
        (copy / "config.json").write_text(broken)
        refused(r"config\.json is not a config that scaling_jax wrote", copy)
    (copy / "config.json").write_text(stored)
    shutil.rmtree(copy / "checkpoints")
    refused(r"--run=.*: has no checkpoint yet", copy)


def test_a_damaged_checkpoint_is_one_line_and_nothing_comes_after_it(copy, monkeypatch):
    """Many arrays are read at once; those that fail after the first have nobody to tell."""
    stragglers = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: stragglers.append(error))
    monkeypatch.setattr(sys, "unraisablehook", stragglers.append)
    for folder in ("ocdbt.process_0/d", "d"):
        for tokens in (2 * B, 6 * B):
            for path in (copy / "checkpoints" / str(tokens) / "default" / folder).iterdir():
                path.write_bytes(bytes(path.stat().st_size))
            refused(rf"copy/checkpoints/{tokens}: cannot be read \(((?!\. ).){{10,101}}\); --at_tokens can", copy, tokens)
    time.sleep(0.1)
    gc.collect()
    assert not stragglers


ELSEWHERE = """
import sys
import numpy as np
import jax
from scaling_jax.train.opened import open_run
run = open_run(sys.argv[1])
mesh = run.config.mesh
tokens = np.arange(12 * 17, dtype=np.int32).reshape(12, 17) % 250
np.save(sys.argv[2], run.trainer.eval(run.params, jax.device_put(tokens, run.trainer.eval_sharding)))
print(len(jax.devices()), mesh.replica, mesh.fsdp, mesh.tensor, len(run.params["embedding"].sharding.device_set))
"""


def test_any_number_of_devices_opens_a_run_of_any_mesh(copy, tmp_path):
    stored = json.loads((copy / "config.json").read_text())
    stored["config"]["mesh"] = {"replica": 2, "fsdp": 2, "tensor": 2, "member": 1}
    (copy / "config.json").write_text(json.dumps(stored))
    here = open_run(copy)
    assert here.config.mesh.to_dict() == {"replica": 1, "fsdp": 1, "tensor": 1, "member": 1}
    tokens = np.arange(12 * 17, dtype=np.int32).reshape(12, 17) % 250
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=6", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ELSEWHERE, str(copy), str(tmp_path / "losses.npy")]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6", "3", "2", "1", "6"]  # a width of 16 goes into halves
    np.testing.assert_allclose(np.load(tmp_path / "losses.npy"), here.trainer.eval(here.params, tokens), rtol=1e-5)
