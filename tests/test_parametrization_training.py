"""What the tables promise of a trained model: the same bits at the base sizes, published formulations alike, wider never worse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import small_config

from scaling_jax.coord_check.measure import check_config, coordinates
from scaling_jax.coord_check.verdict import widest_ratio
from scaling_jax.data.corpus import open_run_data
from scaling_jax.model import Transformer, TransformerConfig
from scaling_jax.parametrization import Parametrization
from scaling_jax.train.applied import applied_table
from scaling_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compilation")


def batches(steps, sequences=8, context=16, vocab=256):
    return jax.random.randint(jax.random.key(5), (steps, 1, sequences, context + 1), 0, vocab)


def trained(config, tokens, model=Transformer):
    """Parameters after a step on each batch."""
    trainer = Trainer(config, model=model)
    state = trainer.init(config.train.seed)
    for tokens_AxBxL in tokens:
        state, _ = trainer.step(state, tokens_AxBxL, False)
    return trainer, state


@pytest.mark.parametrize("name", ["mup", "completep"])
@pytest.mark.parametrize("tied", [False, True])
def test_at_the_base_sizes_20_steps_are_those_of_standard_bit_for_bit(name, tied, full_compilation):
    """AdamW with decay, biases, and head_dim 24, whose root is not a round number."""

    def parameters(name):
        config = small_config(model__width=48, model__head_dim=24, model__biases=True, model__tied_embeddings=tied)
        p = config.parametrization
        p.name, p.base_width, p.base_depth, p.base_head_dim = name, 48, 2, 24
        config.optimizer.weight_decay = 0.1
        return trained(config, batches(20))[1].params

    for ours, standard in zip(jax.tree.leaves(parameters(name)), jax.tree.leaves(parameters("standard")), strict=True):
        np.testing.assert_array_equal(ours, standard)


def test_ratios_as_applied_to_a_model_and_its_optimizer():
    """Base 64 to 256 to 1024, read from the built parameters and AdamW's state."""

    def read(width):
        config = small_config(model__width=width, model__head_dim=64, model__depth=1, model__biases=True)
        p, o = config.parametrization, config.optimizer
        p.name, p.base_width, p.base_head_dim, o.lr, o.weight_decay, o.eps = "mup", 64, 64, 0.01, 0.1, 1e-8
        trainer = Trainer(config)
        state = trainer.init(0)
        std = {".".join(map(str, path)): float(jnp.std(value[...])) for path, value in nnx.to_flat_state(state.params)}
        return {row["name"]: row | {"std": std[row["name"]]} for row in applied_table(trainer, state)["parameters"]}

    base = read(64)
    for width, m in ((256, 4), (1024, 16)):
        wide = read(width)
        for name, row in wide.items():
            hidden, readout = row["role"] in ("hidden", "query"), row["role"] == "output"
            np.testing.assert_allclose(row["lr"] / base[name]["lr"], 1 / m if hidden else 1, rtol=1e-6)
            np.testing.assert_allclose(row["multiplier"] / base[name]["multiplier"], 1 / m if readout else 1, rtol=1e-6)
            np.testing.assert_allclose(row["eps"] / base[name]["eps"], 1 / m, rtol=1e-6)
            np.testing.assert_allclose(row["lr"] * row["weight_decay"], 0 if row["role"] == "vector" else 0.01 * 0.1, rtol=1e-6)
            if row["role"] != "vector":
                np.testing.assert_allclose(row["std"] / base[name]["std"], m**-0.5 if hidden else 1, rtol=0.03)


class _Table3(Parametrization):
    """Tensor Programs V, Table 3: the readout's variance is 1/fan_in² and its lr 1/fan_in, without a multiplier."""

    def rule(self, role, **sizes):
        rule = super().rule(role, **sizes)
        if role != "output":
            return rule
        m = sizes["fan_in"] / sizes["base_fan_in"]
        return rule._replace(init_std=rule.init_std / m, lr=1 / m, multiplier=1.0, eps=1.0)


def test_the_two_published_formulations_train_alike():
    """Tables 3 and 8, over 10 steps of Adam. Epsilon 1e-30: with 0, rows of the embedding without a gradient are 0/0."""
    config = small_config(model__width=64, optimizer__eps=1e-30, optimizer__lr=4e-3, optimizer__clip_norm=0.0)
    config.parametrization.name, config.parametrization.base_width = "mup", 16

    def table3(shape, parametrization, rngs):
        return Transformer(shape, _Table3(**dataclasses.asdict(parametrization)), rngs=rngs)

    tokens = batches(10)

    def logits(model, steps):
        trainer, state = trained(config, tokens[:steps], model)
        return nnx.merge(trainer.graph, state.params)(tokens[0, 0, :, :-1])

    assert float(jnp.max(jnp.abs(logits(Transformer, 10) - logits(Transformer, 0)))) > 1  # it has trained
    for steps in (0, 1, 10):
        np.testing.assert_allclose(logits(table3, steps), logits(Transformer, steps), atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # half a minute; test_microsoft_mups_criterion is the same question at one lr
def test_wider_is_never_worse():
    """Training loss on the built-in corpus at three points of a run: width 64 > 128 > 256, at one lr, mean over seeds."""
    steps, points = 100, ((20, 40), (50, 70), (80, 100))

    def losses(width, seed):
        config = small_config(model__width=width, model__head_dim=32, model__context=32, optimizer__lr=4e-3, train__seed=seed)
        config.parametrization.name, config.parametrization.base_width, config.parametrization.base_head_dim = "mup", 64, 32
        config.train.batch_tokens, config.train.tokens = 16 * 32, steps * 16 * 32
        config.schedule.name = "constant"
        trainer, data = Trainer(config), open_run_data(config)
        state, found = trainer.init(seed), []
        for step in range(steps):
            state, metrics = trainer.step(state, data.train.batch(16 * step, 16)[None], False)
            found.append(metrics.loss)
        return np.array([np.mean(found[start:end]) for start, end in points])

    narrow, middle, wide = (np.mean([losses(width, seed) for seed in range(2)], axis=0) for width in (64, 128, 256))
    assert np.all(narrow > middle) and np.all(middle > wide), (narrow, middle, wide)


def test_microsoft_mups_criterion():
    """Their test's settings: 4 times the width, Adam with lr 1e-3, one seed, one batch, steps 1 to 3, ratios of mean |x| within 1.2."""
    config = small_config(model__head_dim=32, model__context=32, optimizer__lr=1e-3)
    config.parametrization.base_width = 64
    tokens_BxL = open_run_data(config).train.batch(0, 16)

    def ratio(name):
        config.parametrization.name = name
        found = []
        for width in (128, 512):
            for values in coordinates(check_config(config, "width", width), "width", width, [0], 3, tokens_BxL):
                found += values
        logits = [c.value for c in found if c.kind == "logits" and c.quantity == "activation" and c.step == 1]
        assert logits == [0, 0]  # theirs: the output is 0 behind a zero readout
        return widest_ratio(found, 128, 512)

    worst, kind = ratio("mup")
    assert 1 / 1.2 < worst < 1.2, (worst, kind)
    worst, kind = ratio("standard")
    assert not 1 / 1.2 < worst < 1.2, (worst, kind)


def tied_model(width, name="mup"):
    shape = TransformerConfig(vocab_size=256, width=width, depth=2, head_dim=16, context=32, tied_embeddings=True)
    return Transformer(shape, Parametrization(name, base_width=64, base_head_dim=16), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["mup", "standard"])
def test_a_tied_embedding_starts_near_log_vocabulary_at_any_width(name):
    """Its std is base_width^-1/2; with that of an untied embedding, 1, a token's own logit is base_width and the loss starts at 86."""
    tokens = batches(1, sequences=16, context=32)[0, 0]
    for width in (32, 64, 512):
        log_probs = jax.nn.log_softmax(tied_model(width, name)(tokens[:, :-1]))
        loss = -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=2))
        assert abs(loss - np.log(256)) < 1.5, (width, loss)


def test_a_tied_embedding_keeps_its_scale_and_its_logits_do_not_grow():
    stds = [float(jnp.std(tied_model(width).embedding[...])) for width in (64, 512)]
    np.testing.assert_allclose(stds, 64**-0.5, rtol=0.02)
    tokens = batches(1, context=32)[0, 0, :, :-1]
    narrow, wide = (float(jnp.std(tied_model(width)(tokens))) for width in (64, 512))
    np.testing.assert_allclose(wide / narrow, 8**-0.5, rtol=0.2)  # a sum over the width of random terms, over the width


@pytest.mark.parametrize("axis", [pytest.param("width", marks=pytest.mark.slow), "depth"])
def test_epsilon_follows_the_gradients_entries(axis):
    """Mean |gradient| of every parameter over its epsilon, 8 times larger in width or depth: the same, within 2.

    Measured once the readout has moved, behind which hidden matrices have no gradient at first.
    """

    def gradients(size):
        config = small_config(model__width=64, model__head_dim=16, model__biases=True, optimizer__lr=4e-3, optimizer__clip_norm=0.0)
        config.model[axis] = size
        p = config.parametrization
        p.name, p.base_width, p.base_depth, p.output_init = "completep", 64, 2, "zero"
        trainer, state = trained(config, batches(1, sequences=32))
        eps = state.opt_state[-1].eps
        model = nnx.merge(trainer.graph, state.params)
        tokens = batches(1, sequences=32)[0, 0]

        def loss(model):
            log_probs = jax.nn.log_softmax(model(tokens[:, :-1]))
            return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=2))

        found = dict(nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model)))
        scale = dict(nnx.to_flat_state(eps))
        return {path: float(jnp.mean(jnp.abs(g[...])) / scale[path][...]) for path, g in found.items()}

    small, large = (gradients(size) for size in ((64, 512) if axis == "width" else (2, 16)))
    for path in small:
        assert 1 / 2 < large[path] / small[path] < 2, (path, large[path] / small[path])
