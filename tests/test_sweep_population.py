"""Members that train together against runs on their own."""

import functools

import jax
import numpy as np
import pytest
from helpers import small_config

from scaling_jax.data.corpus import open_run_data
from scaling_jax.sweep.population import Population, program, stack_values
from scaling_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, SEQUENCES = 50, 8
OPTIMUM = 5  # a member whose lr is about the best; the last one's is far above
MEMBERS = [  # lr, seed, weight decay, hidden std, embedding std
    (2.0**-11, 0, 0.0, 1.0, 1.0),
    (2.0**-10, 0, 0.0, 1.0, 1.0),
    (2.0**-9, 1, 0.1, 0.5, 1.0),
    (2.0**-8, 1, 0.0, 1.0, 1.0),
    (2.0**-7, 3_000_000_000, 0.3, 1.0, 1.0),
    (2.0**-6, 0, 0.0, 1.0, 1.0),
    (2.0**-5, 0, 0.0, 1.0, 0.5),
    (2.0**-1, 0, 0.0, 1.0, 1.0),
]


def config_of(lr, seed, weight_decay, hidden_std, embedding_std):
    return small_config(
        optimizer__lr=lr,
        train__seed=seed,
        optimizer__weight_decay=weight_decay,
        parametrization__hidden_std=hidden_std,
        parametrization__embedding_std=embedding_std,
        train__tokens=STEPS * SEQUENCES * 16,
        schedule__warmup_tokens=5 * SEQUENCES * 16,
        noise_scale__window_tokens=1 << 40,
        noise_scale__preconditioned=True,
        model__dropout=0.1,
    )


CONFIGS = [config_of(*member) for member in MEMBERS]


def batches(config, steps=STEPS):
    source = open_run_data(config).train
    return [source.batch(SEQUENCES * step, SEQUENCES) for step in range(steps)]


@pytest.fixture(scope="module")
def together():
    """The population, its state at the beginning and the end, and what each step saw."""
    population = Population(CONFIGS[0], len(CONFIGS))
    state = population.init(CONFIGS)
    first, values, seen = jax.device_get(state), stack_values(CONFIGS), []
    for tokens_MxNxL in zip(*(batches(config) for config in CONFIGS), strict=True):
        state, metrics = population.step(state, values, population.place(np.stack(tokens_MxNxL)))
        seen.append(jax.device_get(metrics))
    return population, first, state, seen


def alone(config, state=None, trainer=None):
    trainer = trainer or Trainer(config)
    state = trainer.init(config.train.seed) if state is None else state
    first, seen = jax.device_get(state), []
    for tokens_NxL in batches(config):
        state, metrics = trainer.step(state, tokens_NxL[None])
        seen.append(jax.device_get(metrics))
    return trainer, first, state, seen


@functools.cache
def single(m):
    return alone(CONFIGS[m])


def members(quick, others):
    """Each is a program to compile: some in every run of the suite, the others in the long one."""
    return [*quick, *(pytest.param(m, marks=pytest.mark.slow) for m in others)]


def norms(tree):
    return np.array([np.linalg.norm(x) for x in jax.tree.leaves(jax.device_get(tree))])


@pytest.mark.parametrize("m", members((2, 4, 6), (0, 1, 3, 5, 7)))
def test_members_begin_as_single_runs_do_bit_for_bit(together, m):
    state = jax.device_get(Trainer(CONFIGS[m]).init(CONFIGS[m].train.seed))
    for ours, theirs in zip(jax.tree.leaves(together[1]), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours[m], theirs)


@pytest.mark.parametrize("m", members((2, OPTIMUM), (0, 1, 3, 4, 6)))
def test_members_up_to_the_best_lr_are_single_runs(together, m):
    population, _, state, seen = together
    _, _, end, expected = single(m)
    for ours, theirs in zip(seen, expected, strict=True):
        np.testing.assert_allclose(ours.loss[m], theirs.loss, rtol=1e-5)
        np.testing.assert_allclose(ours.grad_norm[m], theirs.grad_norm, rtol=1e-5)
        np.testing.assert_allclose(ours.lr[m], theirs.lr, rtol=1e-4)  # of a cosine near its end
        mean_square = theirs.noise_step["noise"].grad_trace + theirs.noise_step["noise"].grad_sq
        for metric, tolerance in (("noise", 1e-5), ("preconditioned", 2e-3)):  # v̂ of rare tokens is tiny, and its root in P's denominator
            scale = mean_square if metric == "noise" else abs(theirs.noise_step[metric].grad_trace)
            for name in ("grad_sq", "grad_trace"):
                difference = getattr(ours.noise_step[metric], name)[m] - getattr(theirs.noise_step[metric], name)
                assert abs(difference) <= tolerance * scale or np.isnan(scale), (metric, name)
    own = jax.tree.map(lambda x: x[m], state.params)
    np.testing.assert_allclose(norms(own), norms(end.params), rtol=1e-5)


def test_above_the_best_lr_members_differ_no_more_than_an_ulp_makes_them(together):
    m = len(CONFIGS) - 1
    trainer, first, _, expected = single(m)
    assert expected[-1].loss > single(OPTIMUM)[3][-1].loss
    moved = first._replace(params=jax.tree.map(lambda x: np.nextafter(x, np.inf, dtype=x.dtype), first.params))
    _, _, _, nearby = alone(CONFIGS[m], jax.device_put(moved), trainer)

    def apart(seen):
        return max(abs(float(a) - float(b.loss)) for a, b in zip(seen, expected, strict=True))

    assert apart([metrics.loss[m] for metrics in together[3]]) <= 10 * apart([metrics.loss for metrics in nearby])


def test_a_member_that_breaks_leaves_the_others_alone(together):
    population, start, _, _ = together
    tokens = population.place(np.stack([batches(config, 1)[0] for config in CONFIGS]))

    def stepped(spoilt):
        def spoil(x):
            return np.concatenate([x[:1], np.full_like(x[1:2], np.nan), x[2:]])

        state = start._replace(params=jax.tree.map(spoil, start.params)) if spoilt else start
        return jax.device_get(population.step(jax.device_put(state), stack_values(CONFIGS), tokens))

    (sound, metrics), (spoilt, broken) = stepped(False), stepped(True)
    others = np.arange(len(CONFIGS)) != 1
    assert np.isnan(broken.loss[1]) and np.isfinite(metrics.loss).all()
    np.testing.assert_array_equal(broken.loss[others], metrics.loss[others])
    for a, b in zip(jax.tree.leaves(sound), jax.tree.leaves(spoilt), strict=True):
        np.testing.assert_array_equal(a[others], b[others])


def test_losses_and_noise_are_read_for_each_member(together):
    population, _, state, _ = together
    tokens_BxL = batches(CONFIGS[0], 1)[0]
    losses_MxBxT, readings = np.asarray(population.eval(state.params, tokens_BxL)), population.read_noise(state)
    for m in (2, OPTIMUM):
        trainer, _, end, _ = single(m)
        np.testing.assert_allclose(losses_MxBxT[m], trainer.eval(end.params, tokens_BxL), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(readings[m]["noise"], trainer.read_noise(end)["noise"], rtol=1e-4)


def test_one_member_is_the_single_run_itself():
    config, (_, _, _, seen) = CONFIGS[OPTIMUM], single(OPTIMUM)
    population = Population(config, 1)
    state, values = population.init([config]), stack_values([config])
    for tokens_NxL, expected in list(zip(batches(config), seen, strict=True))[:5]:
        state, metrics = population.step(state, values, population.place(tokens_NxL[None]))
        np.testing.assert_allclose(metrics.loss[0], expected.loss, rtol=1e-6)


def test_a_program_is_that_of_all_values_and_lengths_and_of_no_other_shape():
    key = program(CONFIGS[0])
    assert all(program(config) == key for config in CONFIGS)
    assert program(small_config(**{"train__tokens": 1 << 12})) == program(small_config())
    for change in ({"model__width": 32}, {"train__batch_tokens": 256}, {"optimizer__b2": 0.99}, {"schedule__name": "constant"}):
        assert program(small_config(**change)) != program(small_config())
