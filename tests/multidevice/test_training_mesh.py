"""A run's values do not depend on the mesh: initial parameters, the course of 20 steps, checkpoints, a run resumed elsewhere."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from scaling_jax import cli
from scaling_jax.config import default_config
from scaling_jax.mesh import make_mesh
from scaling_jax.train.checkpoint import Checkpoints
from scaling_jax.train.step import Trainer, TrainState

# Initial parameters are compared bit for bit as a run's own compiler makes them; all else is compared between two quick ones.
quickly = pytest.mark.usefixtures("quick_compilation")
SEQUENCES, CONTEXT, VOCAB, STEPS = 32, 16, 32, 20
MESHES = {
    "fsdp8": {"fsdp": 8},
    "replica8": {"replica": 8},
    "tensor4-fsdp2": {"tensor": 4, "fsdp": 2},
    "2x2x2": {"replica": 2, "fsdp": 2, "tensor": 2},
    "2x1x4-accumulation4": {"replica": 2, "tensor": 4, "accumulation": 4},
}


# Those that the mixed meshes have in them are slow: half a minute each.
COURSES = ["one", *(pytest.param(name, marks=pytest.mark.slow) if name in ("replica8", "tensor4-fsdp2") else name for name in MESHES)]


@cache
def trainer_of(name: str | None) -> Trainer:
    """Compiled once. On a mesh of MESHES, on the mesh of one device for 'one', without a mesh for None."""
    sizes = dict(MESHES.get(name, {}))
    config = default_config()
    config.model.width, config.model.head_dim, config.model.depth = 32, 8, 2
    config.model.context, config.model.vocab_size, config.model.mlp = CONTEXT, VOCAB, "swiglu"
    config.parametrization.base_width = 16
    config.optimizer.lr, config.optimizer.weight_decay = 2.0**-9, 0.1
    config.train.batch_tokens, config.train.tokens = SEQUENCES * CONTEXT, STEPS * SEQUENCES * CONTEXT
    config.train.accumulation = sizes.pop("accumulation", 1)
    config.noise_scale.preconditioned = True
    if name is None:
        return Trainer(config)
    return Trainer(config, make_mesh(**sizes, devices=None if sizes else jax.devices()[:1]))


@cache
def tokens_SxBxL() -> np.ndarray:
    """Words that mostly follow from the word before, so that there is something to learn."""
    rng = np.random.default_rng(0)
    next_word = rng.permutation(VOCAB)
    tokens = rng.integers(0, VOCAB, (STEPS, SEQUENCES, CONTEXT + 1))
    for at in range(1, CONTEXT + 1):
        follows = rng.random((STEPS, SEQUENCES)) < 0.7
        tokens[:, :, at] = np.where(follows, next_word[tokens[:, :, at - 1]], tokens[:, :, at])
    return tokens.astype(np.int32)


def step_tokens(trainer: Trainer, step: int) -> jax.Array | np.ndarray:
    tokens_AxBxL = tokens_SxBxL()[step].reshape(trainer.config.train.accumulation, -1, CONTEXT + 1)
    return tokens_AxBxL if trainer.mesh is None else jax.device_put(tokens_AxBxL, trainer.batch_sharding)


class Course(NamedTuple):
    """What was seen at each step."""

    losses: np.ndarray
    param_norms: np.ndarray  # [step, tensor]
    grad_sq: np.ndarray  # the step's |G|²
    mean_sq_norm: np.ndarray  # of single sequences
    window_grad_sq: np.ndarray
    window_grad_trace: np.ndarray
    mean_sq_norm_in_metric: np.ndarray


@cache
def course(name: str | None) -> Course:
    trainer = trainer_of(name)
    state, rows = trainer.init(0), []
    for step in range(STEPS):
        state, metrics = trainer.step(state, step_tokens(trainer, step))
        metrics = jax.device_get(metrics)
        norms = [np.linalg.norm(np.asarray(p, np.float64)) for p in jax.tree.leaves(jax.device_get(state.params))]
        # |G|² + tr Σ is the mean over sequences of the squared norm.
        (grad_sq, grad_trace), window = metrics.noise_step["noise"], metrics.noise["noise"]
        in_metric = sum(metrics.noise_step["preconditioned"])
        rows.append((metrics.loss, norms, grad_sq, grad_sq + grad_trace, window.grad_sq, window.grad_trace, in_metric))
    return Course(*(np.asarray(column, np.float64) for column in zip(*rows, strict=True)))


def assert_same_bits(a: Any, b: Any) -> None:
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype, jax.tree_util.keystr(path)
        assert x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["one", *MESHES])
def test_initial_state_is_bit_identical(name: str):
    trainer = trainer_of(name)
    state = trainer.init(3)
    assert_same_bits(state, trainer_of(None).init(3))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.state_sharding), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)


def test_parameters_are_divided_among_the_devices():
    """Or the comparisons here would compare copies."""
    for name, parts in {"fsdp8": 8, "replica8": 1, "tensor4-fsdp2": 8, "2x2x2": 4}.items():
        for path, param in nnx.to_flat_state(trainer_of(name).init(0).params):
            value = param[...]
            assert value.addressable_shards[0].data.size == value.size // parts, path


@quickly
def test_the_course_without_a_mesh_learns():
    losses = course(None).losses
    assert losses[-1] < losses[0] - 0.1


@quickly
@pytest.mark.parametrize("name", COURSES)
def test_the_course_is_that_of_one_device(name: str):
    wanted, seen = course(None), course(name)
    np.testing.assert_allclose(seen.losses, wanted.losses, rtol=1e-5)
    np.testing.assert_allclose(seen.param_norms, wanted.param_norms, rtol=1e-5)


@quickly
@pytest.mark.parametrize("name", COURSES)
def test_the_noise_scale_is_that_of_one_device(name: str):
    """|G|² is a difference of larger terms: its error is measured by these."""
    wanted, seen = course(None), course(name)
    np.testing.assert_allclose(seen.mean_sq_norm, wanted.mean_sq_norm, rtol=1e-5)
    assert (np.abs(seen.grad_sq - wanted.grad_sq) <= 1e-5 * wanted.mean_sq_norm).all()
    scale = (wanted.window_grad_sq + wanted.window_grad_trace)[:, -1:]
    assert (np.abs(seen.window_grad_sq - wanted.window_grad_sq) <= 1e-5 * scale).all()
    assert (np.abs(seen.window_grad_trace - wanted.window_grad_trace) <= 1e-5 * scale).all()
    # Of the second step Adam's metric comes from one gradient, and is largest where that is all but rounding.
    np.testing.assert_allclose(seen.mean_sq_norm_in_metric[1], wanted.mean_sq_norm_in_metric[1], rtol=0.05)
    np.testing.assert_allclose(seen.mean_sq_norm_in_metric[2:], wanted.mean_sq_norm_in_metric[2:], rtol=1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> tuple[Path, TrainState]:
    """A checkpoint after two steps on 2x2x2, and its state on the host."""
    workdir = tmp_path_factory.mktemp("saved")
    trainer = trainer_of("2x2x2")
    state = trainer.init(0)
    for step in range(2):
        state, _ = trainer.step(state, step_tokens(trainer, step))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(2 * SEQUENCES * CONTEXT, state)
        checkpoints.wait()
    return workdir, jax.device_get(state)


@quickly
@pytest.mark.parametrize("name", [None, "one", *MESHES])
def test_restoring_to_another_mesh_is_bit_exact(saved: tuple[Path, TrainState], name: str | None):
    workdir, state = saved
    trainer = trainer_of(name)
    with Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(checkpoints.tokens()[-1], trainer.abstract_sharded_state)
    assert_same_bits(restored, state)
    assert int(restored.sequences) == 2 * SEQUENCES
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(trainer.abstract_sharded_state), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


@pytest.fixture
def tokens_dir(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = np.asarray(["the", "state", "of", "our", "union", "is", "strong"])
    for document in range(20):
        (tmp_path / f"{document:02}.txt").write_text(" ".join(rng.choice(words, 400)))
    assert cli.main(["tokenize", f"--input={tmp_path}", f"--out={tmp_path / 'tokens'}"]) == 0
    return tmp_path / "tokens"


@quickly
def test_a_run_moves_to_another_mesh(tokens_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Half a run on one mesh and the rest on another, by the command line, is the run that never moved."""
    batch_tokens, steps = SEQUENCES * CONTEXT, 12
    fields = {
        "model.width": 32,
        "model.head_dim": 8,
        "model.depth": 1,
        "model.context": CONTEXT,
        "train.batch_tokens": batch_tokens,
        "train.tokens": steps * batch_tokens,
        "schedule.warmup_tokens": 2 * batch_tokens,
        "checkpoint.every_tokens": steps // 2 * batch_tokens,
        "eval.tokens": 1024,
        "eval.every_tokens": 0,
        "optimizer.lr": 2.0**-9,
        "data.path": tokens_dir,
        "logging.tensorboard": False,
    }

    def train(workdir: Path, **execution: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        overrides = fields | {name.replace("__", "."): value for name, value in execution.items()}
        config = Path(__file__).parents[2] / "configs" / "cpu_demo.py"
        flags = [f"--config.{name}={value}" for name, value in overrides.items()]
        assert cli.main(["train", f"--config={config}", f"--workdir={workdir}", *flags]) == 0
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return json.loads((workdir / "summary.json").read_text()), records

    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    whole, whole_records = train(stayed, mesh__fsdp=8)
    assert whole["checkpoints"] == [steps // 2 * batch_tokens, steps * batch_tokens]

    shutil.copytree(stayed, moved)
    shutil.rmtree(moved / "checkpoints" / str(steps * batch_tokens))  # as if it had been stopped half-way
    capsys.readouterr()
    resumed, records = train(moved, mesh__fsdp=4, mesh__tensor=2, train__accumulation=2, model__remat="full")
    assert f"continuing from the checkpoint at {steps // 2 * batch_tokens:,} tokens" in capsys.readouterr().err

    heldout = [name for name in whole if name.startswith("eval/") and name.endswith("loss")]
    assert heldout and resumed["tokens"] == whole["tokens"] == steps * batch_tokens
    for name in ("train_loss", *heldout):
        assert resumed[name] == pytest.approx(whole[name], rel=1e-5)
    losses, whole_losses = ([(r["step"], r["loss"]) for r in rows if "loss" in r] for rows in (records, whole_records))
    assert [step for step, _ in losses] == list(range(1, steps + 1))
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-5)
    assert records[: steps // 2] == whole_records[: steps // 2]


@quickly
@pytest.mark.parametrize("name", ["fsdp8", "tensor4-fsdp2"])
def test_measuring_gathers_no_gradient(name: str):
    """Squares of a gradient are summed where they lie: what is gathered for a step is gathered without measuring too."""

    def gathered(measure: bool) -> set[str]:
        text = trainer_of(name).lower_step(SEQUENCES, measure).compile().as_text()
        return {match[1] for match in re.finditer(r"= (\S+) all-gather\(.*of_gradient|= (\S+) all-gather\(.*pure_step\)/reshape", text)}

    assert gathered(True) <= gathered(False)
