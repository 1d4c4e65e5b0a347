"""Every config is valid, has the size it claims, and trains when it is made small."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.optimizer import schedule
from scaling_jax.pods.chips import parse_topology
from scaling_jax.train.loop import train
from scaling_jax.train.step import Trainer, transformer_config

FOLDER = Path(__file__).parent.parent / "configs"
KAPLAN = ("768x12", "1600x48", "768x12,dropout", "cpu", "cpu,dropout")
TIME_TRANSFER = ("32m", "101m", "354m", "cpu")
ALL = [("cpu_demo", ()), *(("kaplan", (size,)) for size in KAPLAN), *(("time_transfer", (size,)) for size in TIME_TRANSFER)]


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_files_are_covered():
    assert {name for name, _ in ALL} == {path.stem for path in FOLDER.glob("*.py")}


@pytest.mark.parametrize(("name", "args"), ALL)
def test_is_valid_and_says_how_it_is_run(name, args):
    module = load(name)
    config = module.get_config(*args)
    config_lib.resolve_mesh(config, 8)
    config_lib.validate(config)
    assert f"--config=configs/{name}.py" in module.__doc__
    assert "Cost:" in module.__doc__ and ("Expect" in module.__doc__ or "not known" in module.__doc__)


@pytest.mark.parametrize(("size", "millions"), [("32m", 31.8), ("101m", 101.4), ("354m", 353.8)])
def test_time_transfer_sizes_are_the_published_ones(size, millions):
    """In all, tied embeddings counted once; 47 rows of padding and, of each norm, LayerNorm's bias are what differs."""
    trainer = Trainer(load("time_transfer").get_config(size))
    assert sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params)) / 1e6 == pytest.approx(millions, rel=0.004)


def test_kaplan_recipe():
    """Section 2 and Table 6: N of GPT-2 XL's shape 1.5e9, batch 2^19 tokens, lr 3.5e-4 at 1e9 parameters, 3000 steps of warmup."""
    module = load("kaplan")
    config = module.get_config("1600x48")
    assert transformer_config(config).params == pytest.approx(1.5e9, rel=0.02)
    assert module.learning_rate(10**9) == pytest.approx(3.5e-4, rel=0.02)
    assert config.train.batch_tokens == 2**19
    fraction = schedule(config)
    np.testing.assert_allclose(fraction(1500 * 2**19), 0.5, rtol=1e-5)
    np.testing.assert_allclose(fraction(3000 * 2**19), 1.0, rtol=1e-5)
    np.testing.assert_allclose(fraction(250_000 * 2**19), 0.0, atol=1e-5)


def test_kaplan_model_is_gpt2s():
    """GPT-2 small has 124.4M parameters, its embedding as readout too; here the readout is apart, norms have no biases, rows are padded."""
    trainer = Trainer(load("kaplan").get_config("768x12,dropout"))
    published = 124_439_808 + 50_257 * 768
    assert sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params)) == pytest.approx(published, rel=1e-3)
    assert trainer.config.model.dropout == 0.1 and load("kaplan").get_config("768x12").model.dropout == 0


# The README's commands train Kaplan's copy too.
CPU_COPIES = [pytest.param("kaplan", "cpu,dropout", "64x2", marks=pytest.mark.slow), ("time_transfer", "cpu", "101m")]


@pytest.mark.parametrize(("name", "argument", "large"), CPU_COPIES)
def test_cpu_sized_copy_is_the_recipe_and_trains(name, argument, large, tmp_path):
    config, recipe = load(name).get_config(argument), load(name).get_config(large)
    sizes = {"width", "depth", "head_dim", "context", "vocab_size", "base_width", "base_depth", "base_head_dim", "path", "dropout", "lr"}
    for field, value in config_lib.flatten(recipe).items():
        key = field.split(".")[1]
        if key not in sizes and "tokens" not in key:
            assert config_lib.flatten(config)[field] == value, field
        elif key in ("warmup_tokens", "window_tokens"):
            share = value / recipe.train.tokens
            assert config_lib.flatten(config)[field] == pytest.approx(share * config.train.tokens, abs=1), field
    config.logging.tensorboard = False
    summary = train(config, tmp_path / "run")
    assert summary["status"] == "finished" and summary["eval/heldout/loss"] < np.log(256) - 2


UNKNOWN = [("kaplan", "768"), ("kaplan", "0x3"), ("kaplan", "64x2,drop"), ("kaplan", "4288x60"), ("time_transfer", "1b")]


def pod_rows():
    """(file, argument, chips) of every layout in configs/pods."""
    for path in sorted((FOLDER / "pods").glob("*.py")):
        layouts = load(f"pods/{path.stem}").LAYOUTS
        nested = {size: of for size, of in layouts.items() if ":" not in size} or {"": layouts}
        for size, of in nested.items():
            yield from ((path.stem, f"{size},{topology}".strip(","), topology) for topology in of)


@pytest.mark.parametrize(("name", "argument", "topology"), list(pod_rows()))
def test_pod_config_is_valid_on_its_topology(name, argument, topology):
    slices, shape = (int(topology[0]), topology[2:]) if topology[0].isdigit() else (1, topology)
    config = config_lib.load(str(FOLDER / "pods" / f"{name}.py") + f":{argument}")
    config_lib.validate(config, parse_topology(shape, slices).devices)
    assert config.mesh.replica % slices == 0
    assert f"--config=configs/pods/{name}.py" in load(f"pods/{name}").__doc__


def test_every_pod_size_has_two_topologies():
    sizes = [(name, argument.rpartition(",")[0]) for name, argument, _ in pod_rows()]
    assert set(sizes) == {("time_transfer", s) for s in ("32m", "101m", "354m")} | {("kaplan", ""), ("dense", "7b"), ("dense", "70b")}
    assert min(map(sizes.count, sizes)) >= 2
    assert ("dense", "70b,v5p:16x16x16") in [(name, argument) for name, argument, _ in pod_rows()]


@pytest.mark.parametrize(("size", "billions"), [("7b", 6.74), ("70b", 70.55)])
def test_dense_sizes_are_the_published_ones(size, billions):
    """Llama's, whose 6.74e9 and, with the newer vocabulary, 70.55e9 parameters count gains too."""
    trainer = Trainer(config_lib.load(str(FOLDER / "pods" / "dense.py") + f":{size}"))
    assert sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params)) / 1e9 == pytest.approx(billions, rel=0.001)


@pytest.mark.parametrize(
    ("name", "argument"), [("dense", "13b"), ("dense", "7b,v5p:4x4x8"), ("kaplan", "v4:2x2x1"), ("time_transfer", "1b")]
)
def test_unknown_pod_layout_is_refused_with_those_that_there_are(name, argument):
    with pytest.raises(UserError, match="(must be one of|there is a layout for) "):
        config_lib.load(str(FOLDER / "pods" / f"{name}.py") + f":{argument}")


@pytest.mark.parametrize(("name", "size"), UNKNOWN)
def test_unknown_size_is_refused(name, size):
    with pytest.raises(UserError, match=size):
        load(name).get_config(size)
