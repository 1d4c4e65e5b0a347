"""One step against the same step written out in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Trainers, small_config

from scaling_jax.errors import UserError
from scaling_jax.model import KINDS, Transformer, parameter_kind, sequence_losses
from scaling_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compilation")
shared = Trainers()  # compiled once for all tests here


def batch(sequences=8, accumulation=1, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (sequences, 17), 0, 256)
    return tokens.reshape(accumulation, -1, 17)


def brute_force(trainer, params, tokens_BxL):
    """Loss [B] and gradients of every sequence alone, by plain reverse mode."""

    def loss(params, tokens_L):
        model = nnx.merge(trainer.graph, params)
        return sequence_losses(model(tokens_L[None, :-1]), tokens_L[None, 1:])[0]

    return jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(params, tokens_BxL)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_estimates_are_those_of_brute_force(accumulation):
    """Every sequence of every microbatch counts, per kind of layer and per block, before clipping; P is Adam's before the step."""
    config = small_config(
        optimizer__clip_norm=0.01, train__accumulation=accumulation, noise_scale__preconditioned=True, parametrization__base_width=4
    )
    trainer = Trainer(config)
    state, _ = trainer.step(trainer.init(3), batch(accumulation=accumulation, seed=1))
    _, moments, _ = state.opt_state
    tokens = batch(accumulation=accumulation)
    losses, each = brute_force(trainer, state.params, tokens.reshape(-1, 17))
    for metric in ("noise", "preconditioned"):
        small, big = {}, {}
        for (path, grad), (_, nu) in zip(nnx.to_flat_state(each), nnx.to_flat_state(moments.nu), strict=True):
            grad, weight = np.asarray(grad[...], np.float64), 1.0
            if metric == "preconditioned":  # one step of Adam from v = 0 corrects v to g²; μP: hidden lr / 4 and every epsilon / 4
                root = np.sqrt(np.asarray(nu[...], np.float64) / (1 - 0.95))
                weight = np.where(root > 0, (1 / 4 if path[0] == "blocks" else 1) / (root + 1e-8), 0) * 4
            names = [parameter_kind(path)]
            for block in range(2) if path[0] == "blocks" else (None,):
                pick = (lambda x: x) if block is None else (lambda x, block=block: x[..., block, :, :])
                g, w = pick(grad), weight if metric == "noise" else pick(weight)
                for name in [*names, "all", *([block] if block is not None else [])]:
                    small[name] = small.get(name, 0) + (w * g**2).sum() / 8
                    big[name] = big.get(name, 0) + (w * g.mean(0) ** 2).sum()
        order = [*KINDS, 0, 1, "all"]
        small, big = (np.array([d[name] for name in order]) for d in (small, big))
        estimates = (8 * big - small) / 7, (small - big) * 8 / 7
        _, metrics = trainer.step(jax.tree.map(jnp.array, state), tokens)
        np.testing.assert_allclose(metrics.loss, np.mean(losses), rtol=1e-5)
        measured = metrics.noise_step[metric]
        close = 1e-5
        np.testing.assert_allclose(measured.grad_sq, estimates[0][-1], rtol=10 * close, atol=close * small.max())
        np.testing.assert_allclose(measured.grad_trace, estimates[1][-1], rtol=close)
        if metric == "noise":
            np.testing.assert_allclose(metrics.grad_norm, np.sqrt(big[-1]), rtol=1e-5)
        # the second step fills the later half of what was seen by itself
        np.testing.assert_allclose(metrics.noise[metric].grad_sq, estimates[0], rtol=10 * close, atol=close * small.max())
        np.testing.assert_allclose(metrics.noise[metric].grad_trace, estimates[1], rtol=close)


def test_the_first_step_has_no_metric():
    trainer = Trainer(small_config(noise_scale__preconditioned=True))
    state, metrics = trainer.step(trainer.init(0), batch())
    assert np.isnan(metrics.noise_step["preconditioned"].grad_sq) and np.isfinite(metrics.noise_step["noise"].grad_sq)
    assert float(state.noise["preconditioned"].seen_tokens) == 0 and float(state.noise["noise"].seen_tokens) == 128


def test_the_metric_leaves_the_training_alone(full_compilation):
    """The same parameters, bit for bit, whether or not the second metric is measured."""
    finals = []
    for preconditioned in (False, True):
        trainer = Trainer(small_config(noise_scale__preconditioned=preconditioned))
        state = trainer.init(0)
        for i in range(3):
            state, _ = trainer.step(state, batch(seed=i))
        finals.append(jax.tree.leaves(state.params))
    for a, b in zip(*finals, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("sqrt", 2), ("linear", 4)])
def test_lr_follows_the_batch_by_its_rule(rule, factor):
    trainer = Trainer(small_config(batch__lr_rule=rule, schedule__name="constant", optimizer__lr=0.5, train__batch_tokens=32))
    _, metrics = trainer.step(trainer.init(0), batch(), False)  # 8 sequences where the config has 2
    np.testing.assert_allclose(metrics.lr, 0.5 * factor, rtol=1e-6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            lambda probe: {kind: x for kind, x in probe.items() if kind != "unembedding"},
            "no entry 'unembedding', where parameter unembedding",
        ),
        (lambda probe: probe | {"embedding": jnp.zeros((3, 1))}, "parameter embedding .256, 16. belongs to 'embedding'.* has 3 blocks"),
    ],
)
def test_a_probe_that_does_not_fit_its_model_is_refused(entries, message):
    class Own(Transformer):
        def new_probe(self, batch):
            return entries(super().new_probe(batch))

    with pytest.raises(UserError, match=message):
        Trainer(small_config(), model=Own)


def test_a_model_without_a_probe_trains_unmeasured():
    class Own(Transformer):
        new_probe = property()  # hasattr is false

    trainer = Trainer(small_config(), model=Own)
    trainer.step(trainer.init(0), batch(), False)
    with pytest.raises(UserError, match="no new_probe"):
        trainer.step(trainer.init(0), batch())


def test_without_measurement_there_is_no_statistic():
    trainer = Trainer(small_config(noise_scale__every=0))
    state, metrics = trainer.step(trainer.init(0), batch(), False)
    assert state.noise == {} and metrics.noise is None and trainer.read_noise(state) == {}


def test_accumulation_and_measuring_do_not_change_the_training():
    finals = []
    for accumulation, measure in ((1, True), (4, True), (1, False), (4, False)):
        trainer = shared(small_config(train__accumulation=accumulation))
        state = trainer.init(0)
        for i in range(5):
            state, metrics = trainer.step(state, batch(accumulation=accumulation, seed=i), measure)
        assert (metrics.noise is None) == (not measure)
        finals.append(jax.tree.leaves(state.params))
    for other in finals[1:]:
        for a, b in zip(finals[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_counts_and_lr():
    """The lr of a step is the schedule at the middle of its tokens."""
    trainer = Trainer(small_config(schedule__warmup_tokens=640, optimizer__lr=0.5, schedule__name="constant"))
    state = trainer.init(0)
    lrs = []
    for i in range(6):
        state, metrics = trainer.step(state, batch(seed=i), False)
        lrs.append(float(metrics.lr))
    np.testing.assert_allclose(lrs, 0.5 * np.minimum((np.arange(6) + 0.5) * 128 / 640, 1), rtol=1e-6)
    assert int(state.step) == 6 and int(state.sequences) == 48


def test_one_step_moves_each_parameter_by_its_own_lr():
    """Adam's first step is the sign of the gradient: |Δw| is the lr of the table, wherever the gradient is not tiny."""
    config = small_config(optimizer__lr=0.01, schedule__name="constant", optimizer__eps=1e-20, parametrization__base_width=4)
    trainer = Trainer(config)
    state = trainer.init(0)
    before = {path: np.asarray(p[...]) for path, p in nnx.to_flat_state(state.params)}
    state, _ = trainer.step(state, batch(), False)
    for path, p in nnx.to_flat_state(state.params):
        moved = np.abs(np.asarray(p[...]) - before[path])
        expected = 0.01 / 4 if path[0] == "blocks" else 0.01  # μP: hidden matrices lr / 4 at four times the base width
        np.testing.assert_allclose(np.median(moved[moved > 0]), expected, rtol=1e-3)


def test_bfloat16_computes_near_float32_with_float32_parameters():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = shared(small_config(model__compute_dtype=dtype))
        state = trainer.init(0)
        for i in range(5):
            state, metrics = trainer.step(state, batch(seed=i))
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        losses[dtype] = float(metrics.loss), float(metrics.noise["noise"].grad_trace[-1])
    np.testing.assert_allclose(losses["bfloat16"][0], losses["float32"][0], rtol=0.01)
    np.testing.assert_allclose(losses["bfloat16"][1], losses["float32"][1], rtol=0.05)
    assert losses["bfloat16"] != losses["float32"]


def test_default_window_is_an_eighth_of_the_run():
    assert Trainer(small_config()).meter.window_tokens == 20 * 8 * 16 / 8
    assert Trainer(small_config(noise_scale__window_tokens=77)).meter.window_tokens == 77


def test_lowered_step_is_the_step():
    """What is counted and compiled ahead is what runs."""
    trainer = shared(small_config())
    compiled = trainer.lower_step(8).compile()
    _, expected = trainer.step(trainer.init(0), batch())
    _, found = compiled(trainer.init(0), batch())
    np.testing.assert_array_equal(found.loss, expected.loss)
