"""The least traffic of a step, by hand, for matrices of which one can count every byte."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from scaling_jax.config import default_config
from scaling_jax.pods.traffic import Least, least_traffic
from scaling_jax.train.step import Trainer

D, F, V, L, DEPTH, SEQUENCES = 64, 256, 512, 32, 3, 16
BLOCK = 4 * D * D + 2 * D * F  # elements


def least(tied=False, **fields) -> Least:
    """bfloat16, so 2 bytes an element and 4 of what is added up in float32."""
    config = default_config()
    config.model.update(width=D, depth=DEPTH, head_dim=16, context=L, vocab_size=V, compute_dtype="bfloat16", tied_embeddings=tied)
    config.train.batch_tokens = SEQUENCES * L
    for name, value in fields.items():
        section, key = name.split("__")
        config[section][key] = value
    return least_traffic(config, Trainer(config).abstract_state.params)


def test_one_device_sends_nothing():
    assert least().total == 0


def test_fsdp_gathers_weights_twice_and_scatters_their_gradients():
    found = least(mesh__fsdp=4)
    matrices = DEPTH * BLOCK + D * V
    assert found.weights == 2 * 3 / 4 * 2 * matrices
    assert found.gradients == 3 / 4 * 2 * matrices  # each device has its columns of the embedding's
    assert found.embedding == 2 * 3 / 4 * 2 * (SEQUENCES / 4 * L * D)
    assert found.replicas == found.tensor == 0
    assert found.total == found.of_weights + found.embedding


def test_a_tied_table_is_gathered_for_the_readout():
    found, untied = least(tied=True, mesh__fsdp=4), least(mesh__fsdp=4)
    assert (found.weights, found.gradients) == (untied.weights, untied.gradients)
    assert least(tied=True, mesh__replica=4).replicas == least(mesh__replica=4).replicas  # in bfloat16 and in float32 both


def test_replicas_add_up_gradients():
    found = least(mesh__replica=4)
    assert found.replicas == 2 * 3 / 4 * (2 * (DEPTH * BLOCK + D * V) + 4 * D * V)
    assert found.total == found.replicas


def test_replicas_of_what_fsdp_and_tensor_have_divided():
    found = least(mesh__replica=2, mesh__fsdp=4, mesh__tensor=2)
    assert found.replicas == (2 * (DEPTH * BLOCK + D * V) + 4 * D * V) / 8
    assert found.weights == 2 * 3 / 4 * 2 * (DEPTH * BLOCK + D * V) / 2
    assert found.embedding == 2 * 3 / 4 * 2 * (SEQUENCES / 8 * L * D) / 2


def test_every_microbatch_moves_weights_anew_and_its_own_activations():
    once, often = least(mesh__fsdp=4, mesh__tensor=2), least(mesh__fsdp=4, mesh__tensor=2, train__accumulation=4)
    assert often.of_weights == 4 * once.of_weights
    assert (often.tensor, often.embedding) == (once.tensor, once.embedding)


@pytest.mark.parametrize("remat, times", [("none", 8), ("dots", 10), ("full", 11)])
def test_tensor_gathers_and_scatters_the_residual_stream(remat, times):
    """A block's two inputs and two outputs, forwards and backwards; some of them again; embedding and readout both ways."""
    found = least(mesh__tensor=4, model__remat=remat)
    tokens = SEQUENCES * L
    stream = 3 / 4 * 2 * tokens * D
    assert found.tensor == pytest.approx(stream * (times * DEPTH + 4) + 3 * 2 * 3 / 4 * 4 * tokens, rel=1e-12)
    assert found.total == found.tensor


def test_a_metric_is_gathered_once():
    plain, metric = least(mesh__fsdp=4), least(mesh__fsdp=4, noise_scale__preconditioned=True)
    assert metric.weights == 1.5 * plain.weights and metric.gradients == plain.gradients


def test_positions_and_vectors_in_float32():
    found, plain = least(mesh__fsdp=4, model__positions="learned"), least(mesh__fsdp=4)
    assert found.weights - plain.weights == found.gradients - plain.gradients == 3 / 4 * 4 * L * D
    gains = least(mesh__fsdp=4, mesh__replica=2, model__norm_gains=True)
    without = least(mesh__fsdp=4, mesh__replica=2)
    vectors = (2 * DEPTH + 1) * D
    assert gains.of_weights - without.of_weights == 2 * 7 / 8 * 4 * vectors  # an all-reduce over all 8


def test_as_collectives():
    found = least(mesh__replica=8, mesh__fsdp=2, mesh__tensor=2)
    shape = {"replica": 8, "fsdp": 2, "tensor": 2, "member": 1}
    in_one = found.collectives(shape)
    assert sum(c.wire_bytes for c in in_one) == pytest.approx(found.total, rel=1e-12)
    assert not any(c.dcn for c in in_one)
    assert {c.axes for c in in_one} == {("replica",), ("fsdp",), ("tensor",)}


def test_between_slices_each_chip_sends_its_own_part():
    """8 replicas in 2 slices: within a slice 4 scatter and gather, and a quarter of the gradient crosses over, twice half of it."""
    found = least(mesh__replica=8)
    gradient = 2 * (DEPTH * BLOCK + D * V) + 4 * D * V
    sent = found.collectives({"replica": 8, "fsdp": 1, "tensor": 1}, slices=2)
    across = sum(c.wire_bytes for c in sent if c.dcn)
    assert across == pytest.approx(2 * 1 / 2 * gradient / 4, rel=1e-12)
    assert sum(c.wire_bytes for c in sent) - across == pytest.approx(2 * 3 / 4 * gradient, rel=1e-12)


def test_parameters_of_any_mesh_will_do():
    config = default_config()
    params = nnx.State({"w": nnx.Param(jax.ShapeDtypeStruct((8, 6), jnp.float32), axes=("embed", "mlp"))})
    config.mesh.fsdp = 2
    assert least_traffic(config, params).weights == 2 * 1 / 2 * 4 * 48
