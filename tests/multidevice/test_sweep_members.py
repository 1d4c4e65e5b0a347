"""Members sharded over devices: alone, and together with the axes that shard each of them."""

import json

import jax
import numpy as np
import pytest
from helpers import small_config
from sweeps import planned, small_study

from scaling_jax.data.corpus import open_run_data
from scaling_jax.mesh import make_mesh
from scaling_jax.sweep import grid, group
from scaling_jax.sweep.population import Population, stack_values

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIGS = [
    small_config(optimizer__lr=2.0 ** (k - 11), train__seed=k % 2, noise_scale__window_tokens=1 << 40, noise_scale__preconditioned=True)
    for k in range(8)
]


def trained(mesh=None, accumulation=1, steps=3):
    config = CONFIGS[0].copy_and_resolve_references()
    config.train.accumulation = accumulation
    if mesh is not None:
        config.mesh.replica, config.mesh.fsdp, config.mesh.tensor = (mesh.shape[axis] for axis in ("replica", "fsdp", "tensor"))
    population = Population(config, len(CONFIGS), mesh)
    sources = [open_run_data(config).train for config in CONFIGS]
    state, values, seen = population.init(CONFIGS), stack_values(CONFIGS), []
    for step in range(steps):
        tokens = population.place(np.stack([source.batch(8 * step, 8) for source in sources]))
        state, metrics = population.step(state, values, tokens)
        seen.append(jax.device_get((metrics.loss, metrics.grad_norm, metrics.noise_step["noise"])))
    tokens_BxL = sources[0].batch(0, 8)
    if mesh is not None:
        tokens_BxL = jax.device_put(tokens_BxL, population.eval_sharding)
    return seen, np.asarray(population.eval(state.params, tokens_BxL)), state


@pytest.fixture(scope="module")
def on_one_device():
    return trained()


@pytest.mark.parametrize(("shape", "accumulation"), [((1, 1, 1, 8), 1), ((1, 2, 2, 2), 2)])
def test_numbers_do_not_depend_on_the_mesh(on_one_device, shape, accumulation):
    expected, losses, _ = on_one_device
    seen, found, state = trained(make_mesh(*shape), accumulation)
    for (loss, grad_norm, noise), (loss_, grad_norm_, noise_) in zip(seen, expected, strict=True):
        np.testing.assert_allclose(loss, loss_, rtol=1e-6)
        np.testing.assert_allclose(grad_norm, grad_norm_, rtol=1e-5)
        for x, x_ in zip(noise, noise_, strict=True):
            assert (np.abs(x - x_) <= 1e-5 * (noise_.grad_trace + noise_.grad_sq)).all()
    np.testing.assert_allclose(found, losses, atol=1e-4)
    assert all(x.sharding.spec[0] == "member" for x in jax.tree.leaves(state))


def test_a_group_that_does_not_fill_the_devices_is_padded_and_goes_on_on_another_mesh(tmp_path):
    lrs = grid.over("optimizer.lr", [2.0**-8, 2.0**-7, 2.0**-6])
    plan = planned(tmp_path, small_study(lrs, horizons=(640,), noise_scale__every=0))
    asked = iter([False, False])
    assert group.run_group(tmp_path, plan.order[0], lambda: next(asked, True)) == ("stopped", None)
    plan = planned(tmp_path, small_study(lrs, horizons=(640,), noise_scale__every=0, mesh__fsdp=8))  # three members where there were eight
    assert group.run_group(tmp_path, plan.order[0]) == ("done", None)
    rows = json.loads((group.group_directory(tmp_path, plan.order[0]) / "group.json").read_text())["rows"]
    assert rows.keys() == plan.points.keys()
    losses = [row["640"]["loss"] for row in rows.values()]
    assert losses[0] > losses[1] > losses[2]  # in the order of their learning rates, after five steps
