"""On 8 devices: sums over a batch for matrices that lie across them, and the loss in pieces, against plain sums and the whole loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.mesh import make_mesh, sharding, shards_of
from scaling_jax.noise_scale import Shards, readout_losses
from scaling_jax.noise_scale.per_example import dense

pytestmark = pytest.mark.usefixtures("quick_compilation")
SEQUENCES, LENGTH, I, O = 16, 5, 16, 24  # noqa: E741
MESHES = [
    {"fsdp": 8},
    {"tensor": 8},
    {"replica": 8},
    {"fsdp": 4, "tensor": 2},
    {"replica": 2, "fsdp": 2, "tensor": 2},
]
AXES = [("embed", "mlp"), ("mlp", "embed"), ("embed", "vocab"), (None, None)]


def named(value) -> str:
    return "-".join(f"{axis}{size}" for axis, size in value.items()) if isinstance(value, dict) else str(value)


def draw(*shapes: tuple[int, ...]):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def products(x, dy, metric):
    """The sum over sequences, and each one's squared norm (also in the metric), of what one device has."""
    each = jnp.einsum("bli,blo->bio", x, dy)
    squares = jnp.sum(each**2, (1, 2))
    return each.sum(0), squares if metric is None else jnp.stack([squares, jnp.sum(each**2 * metric[None], (1, 2))], axis=1)


@pytest.mark.parametrize("axes", AXES, ids=named)
@pytest.mark.parametrize("sizes", MESHES, ids=named)
def test_sums_and_squares_are_those_of_one_device(sizes, axes):
    if "mlp" in axes and sizes.get("tensor", 1) > 1:
        assert "tensor" in str(sharding(make_mesh(**sizes), *axes).spec)  # parts of a matrix's squares are on different devices
    x, dy, metric = draw((SEQUENCES, LENGTH, I), (SEQUENCES, LENGTH, O), (I, O))
    each = np.einsum("bli,blo->bio", np.asarray(x, np.float64), np.asarray(dy, np.float64))
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        shards = shards_of(*axes)
        assert shards.count == sizes.get("replica", 1) * sizes.get("fsdp", 1)
        total, squares = jax.jit(lambda x, dy, metric: shards.run(products, x, dy, metric**2))(x, dy, metric)
        plain, plain_squares = jax.jit(lambda x, dy: shards.run(products, x, dy, None))(x, dy)
    np.testing.assert_allclose(total, each.sum(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(squares[:, 0], (each**2).sum((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(squares[:, 1], (each**2 * np.asarray(metric, np.float64) ** 2).sum((1, 2)), rtol=1e-4)
    np.testing.assert_array_equal((plain, plain_squares)[0], total)
    np.testing.assert_allclose(plain_squares, squares[:, 0], rtol=1e-6)
    assert total.sharding.is_equivalent_to(sharding(mesh, *axes), 2)


@pytest.mark.parametrize("axes", AXES[:2], ids=named)
@pytest.mark.parametrize("sizes", MESHES, ids=named)
def test_total_of_the_shards_own_sums(sizes, axes):
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        shards = shards_of(*axes)
        (parts,) = draw((shards.count, I, O))
        total = jax.jit(shards.total)(parts)
    np.testing.assert_allclose(total, np.asarray(parts, np.float64).sum(0), rtol=1e-4, atol=1e-5)
    assert total.sharding.is_equivalent_to(sharding(mesh, *axes), 2) and total.dtype == parts.dtype


def test_sums_travel_in_the_dtype_of_the_activations():
    x, dy = (a.astype(jnp.bfloat16) for a in draw((SEQUENCES, LENGTH, I), (SEQUENCES, LENGTH, O)))
    with jax.set_mesh(make_mesh(fsdp=8)):
        shards = shards_of("embed", "mlp")
        traced = jax.jit(lambda x, dy: shards.run(products, x, dy, None)).trace(x, dy)
        total, _ = jax.jit(lambda x, dy: shards.run(products, x, dy, None))(x, dy)
    assert total.dtype == jnp.float32
    scattered = [line for line in str(traced.jaxpr).splitlines() if "reduce_scatter" in line]
    assert len(scattered) == 1 and "bf16" in scattered[0]


def test_without_a_mesh_there_is_one_shard():
    shards = shards_of("embed", "mlp")
    assert shards.count == 1 and shards.run is None


def losses_and_gradients(loss, h, w, probe, weights):
    losses, pull = jax.vjp(lambda h, w, probe: loss(h, w, probe), h, w, probe)
    return losses, *pull(weights)


@pytest.mark.parametrize("sizes, chunk", [({"fsdp": 8}, 6), ({"tensor": 8}, 4), ({"replica": 2, "fsdp": 2, "tensor": 2}, 6)], ids=named)
def test_the_loss_in_pieces_is_the_whole_loss(sizes, chunk):
    """Losses, gradients of both, and squared norms, with the vocabulary along tensor; against log-softmax without a mesh."""
    length, vocab = 12, 32
    h, w, weights = draw((SEQUENCES, length, I), (I, vocab), (SEQUENCES, length))
    targets = jax.random.randint(jax.random.key(7), (SEQUENCES, length), 0, vocab)
    probe = jnp.zeros(SEQUENCES)

    def plainly(h, w, probe):
        logp = jax.nn.log_softmax(dense(h, w, probe, shards=Shards()))
        return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]

    expected = jax.jit(lambda *args: losses_and_gradients(plainly, *args))(h, w, probe, weights)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        shards = shards_of("embed", "vocab")

        def in_pieces(h, w, probe):
            return readout_losses(h, w, targets, probe, chunk=chunk, shards=shards)

        placed = jax.device_put(h, sharding(mesh, "batch", "length", "residual")), jax.device_put(w, sharding(mesh, "embed", "vocab"))
        found = jax.jit(lambda *args: losses_and_gradients(in_pieces, *args))(*placed, probe, weights)
    for name, x, y in zip(("losses", "dh", "dw", "squared norms"), found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)
    each = [jax.grad(lambda w, b=b: jnp.vdot(plainly(h, w, probe)[b], weights[b]))(w) for b in range(2)]
    np.testing.assert_allclose(found[3][:2], [jnp.sum(g**2) for g in each], rtol=1e-3)
