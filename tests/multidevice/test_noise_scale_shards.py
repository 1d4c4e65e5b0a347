"""On 8 devices: the estimate from the devices' own gradients against the exact one, and any model's norms of a sharded batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from scaling_jax import noise_scale
from scaling_jax.noise_scale import estimator
from scaling_jax.noise_scale.any_model import group_sq_norms, per_example_sq_norms
from scaling_jax.noise_scale.two_batches import microbatch_estimates, shard_estimates

pytestmark = pytest.mark.usefixtures("quick_compilation")
DEVICES, B = 8, 32


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]) ** 2)


def problem(examples):
    keys = jax.random.split(jax.random.key(0), 4)
    batch = {"x": jax.random.normal(keys[0], (examples, 1, 6)), "y": jax.random.normal(keys[1], (examples, 1, 3))}
    return {"w": jax.random.normal(keys[2], (6, 8)), "v": 0.3 * jax.random.normal(keys[3], (8, 3))}, batch


def a_mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])


def on_shards(params, batch, given_mean=False):
    @partial(jax.shard_map, mesh=a_mesh(), in_specs=(P(), P("data")), out_specs=P())
    def measure(params, batch):
        grads = jax.grad(loss_fn)(jax.lax.pcast(params, "data", to="varying"), batch)
        mean_grads = jax.lax.pmean(grads, "data") if given_mean else None
        return shard_estimates(grads, "data", B // DEVICES, mean_grads=mean_grads)

    return jax.jit(measure)(params, batch)


def test_shards_are_microbatches():
    params, batch = problem(B)
    grad = jax.jit(jax.grad(loss_fn))
    pieces = [grad(params, jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch)) for i in range(DEVICES)]
    flat_DxP = np.stack([np.concatenate([np.ravel(g) for g in jax.tree.leaves(piece)]) for piece in pieces]).astype(np.float64)
    sq_norms_DxG, grad_sq_G = jnp.asarray((flat_DxP**2).sum(1)[:, None]), jnp.asarray([(flat_DxP.mean(0) ** 2).sum()])
    expected = microbatch_estimates(sq_norms_DxG, 4, grad_sq_G)
    np.testing.assert_allclose(on_shards(params, batch), expected, rtol=1e-4)
    np.testing.assert_allclose(on_shards(params, batch, given_mean=True), expected, rtol=1e-4)
    with jax.numpy_dtype_promotion("standard"):
        pmapped = jax.pmap(
            lambda params, batch: shard_estimates(jax.grad(loss_fn)(params, batch), "data", 4),
            axis_name="data", in_axes=(None, 0), devices=jax.devices()[:DEVICES],
        )(params, jax.tree.map(lambda x: x.reshape(DEVICES, 4, *x.shape[1:]), batch))  # fmt: skip
    np.testing.assert_allclose([x[0] for x in pmapped], expected, rtol=1e-4)


def test_gradients_that_shard_map_has_summed_are_refused():
    """Of parameters that all devices share shard_map sums the gradients: tr Σ would be 0."""
    params, batch = problem(B)
    with pytest.raises(ValueError, match="local_grads are already summed over axis 'data'"):
        jax.shard_map(
            lambda params, batch: shard_estimates(jax.grad(loss_fn)(params, batch), "data", 4),
            mesh=a_mesh(), in_specs=(P(), P("data")), out_specs=P(),
        )(params, batch)  # fmt: skip


def test_shards_and_exact_estimates_agree_within_their_intervals():
    """200 batches of 32 out of 4,096 examples at fixed parameters, whose noise scale is known."""
    params, population = problem(4096)
    whole = jax.jit(lambda batch: per_example_sq_norms(loss_fn, params, batch, chunk=512))(population)
    grad_sq, trace = (float(x[0]) for x in noise_scale.estimates(whole.sq_norms_BxG, whole.grad_sq_G))

    @jax.jit
    def step(states, picks_B):
        batch = jax.tree.map(lambda x: x[picks_B], population)
        exact = per_example_sq_norms(loss_fn, params, batch, chunk=B)
        estimates = noise_scale.estimates(exact.sq_norms_BxG, exact.grad_sq_G), on_shards(params, batch)
        return [estimator.update(state, 1.0 * B, *e, 1e9) for state, e in zip(states, estimates, strict=True)]

    states = [estimator.init(1)] * 2
    for picks_B in jax.random.randint(jax.random.key(5), (200, B), 0, 4096):
        states = step(states, picks_B)
    readings = [estimator.read(state, 1e9) for state in states]
    for reading in readings:
        assert reading.low[0] < trace / grad_sq < reading.high[0] < 3 * reading.low[0]


@pytest.mark.parametrize("chunk", [8, 16])
def test_any_model_on_a_sharded_batch(chunk):
    """Each device takes the gradients of its own examples: of the batch nothing is moved."""
    params, batch = problem(B)
    mesh = a_mesh()
    sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    measure = jax.jit(lambda params, batch: per_example_sq_norms(loss_fn, params, batch, chunk=chunk))
    result, expected = measure(params, sharded), per_example_sq_norms(loss_fn, *problem(B))
    np.testing.assert_allclose(result.sq_norms_BxG, expected.sq_norms_BxG, rtol=1e-5)
    np.testing.assert_allclose(result.grad_sq_G, expected.grad_sq_G, rtol=1e-5)
    text = measure.lower(params, sharded).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text


def test_any_model_inside_shard_map():
    """Each device measures its own examples, with parameters that are its own; shared ones would have their gradients summed."""
    params, batch = problem(B)
    expected = per_example_sq_norms(loss_fn, params, batch)

    def measure(params, batch, local):
        params = jax.lax.pcast(params, "data", to="varying") if local else params
        result = per_example_sq_norms(loss_fn, params, batch, chunk=2)
        return result.sq_norms_BxG, jax.lax.pmean(result.grads, "data")

    shard = partial(jax.shard_map, mesh=a_mesh(), in_specs=(P(), P("data")), out_specs=(P("data"), P()))
    sq_norms_BxG, grads = shard(partial(measure, local=True))(params, batch)
    np.testing.assert_allclose(sq_norms_BxG, expected.sq_norms_BxG, rtol=1e-5)
    np.testing.assert_allclose(group_sq_norms(grads), expected.grad_sq_G, rtol=1e-5)
    with pytest.raises(ValueError, match=r"the batch is sharded over \['data'\] and the parameters are not"):
        shard(partial(measure, local=False))(params, batch)
