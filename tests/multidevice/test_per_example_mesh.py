"""Every sequence's squared gradient norm and the gradient, on meshes, equal those of plain models taken one sequence at a time."""

import itertools
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from scaling_jax.config import default_config
from scaling_jax.mesh import make_mesh
from scaling_jax.model import KINDS
from scaling_jax.train.step import Trainer, _loss_and_gradient

SEQUENCES, CONTEXT, VOCAB = 32, 12, 8  # fewer words than positions: every sequence repeats some


class Case(NamedTuple):
    mesh: dict[str, int]
    mlp: str
    remat: str
    tied: bool
    accumulation: int

    def __str__(self) -> str:
        mesh = "x".join(f"{axis}{size}" for axis, size in self.mesh.items())
        return f"{mesh}-{self.mlp}-{self.remat}-{'tied' if self.tied else 'untied'}-{self.accumulation}"


FSDP, TENSOR, MIXED = {"fsdp": 8}, {"replica": 2, "tensor": 4}, {"replica": 2, "fsdp": 2, "tensor": 2}
CASES = [  # any mesh with any MLP, remat, embedding and accumulation; any MLP with any remat; tied and accumulated together too
    Case(FSDP, "gelu", "none", False, 1),
    Case(FSDP, "relu2", "dots", True, 4),
    Case(FSDP, "swiglu", "full", False, 4),
    Case(TENSOR, "gelu", "dots", True, 1),
    Case(TENSOR, "relu2", "full", False, 4),
    Case(TENSOR, "swiglu", "none", True, 4),
    Case(MIXED, "gelu", "full", True, 4),
    Case(MIXED, "relu2", "none", True, 1),
    Case(MIXED, "swiglu", "dots", False, 1),
    Case({"tensor": 4}, "gelu", "none", True, 1),  # on half of the devices
]


def test_the_cases_cover_every_pair_of_mesh_and_option():
    for mesh in (FSDP, TENSOR, MIXED):
        cases = [case for case in CASES if case.mesh == mesh]
        assert {case.mlp for case in cases} == {"gelu", "relu2", "swiglu"}
        assert {case.remat for case in cases} == {"none", "dots", "full"}
        assert {case.tied for case in cases} == {True, False}
        assert {case.accumulation for case in cases} == {1, 4}
    for pair in itertools.product(("gelu", "relu2", "swiglu"), ("none", "dots", "full")):
        assert pair in {(case.mlp, case.remat) for case in CASES}
    assert set(itertools.product((True, False), (1, 4))) == {(case.tied, case.accumulation) for case in CASES}


def trainer_of(mlp: str, tied: bool, mesh: Mesh | None = None, remat: str = "none", accumulation: int = 1) -> Trainer:
    config = default_config()
    config.model.width, config.model.head_dim, config.model.depth = 32, 8, 2
    config.model.context, config.model.vocab_size = CONTEXT, VOCAB
    config.model.mlp, config.model.tied_embeddings, config.model.remat = mlp, tied, remat
    config.model.biases = mlp != "gelu"  # with every mesh, remat, embedding and accumulation, and without
    config.parametrization.name, config.parametrization.base_width = "completep", 16  # every forward multiplier differs from 1
    config.parametrization.base_depth = 1
    config.train.batch_tokens, config.train.accumulation = SEQUENCES * CONTEXT, accumulation
    return Trainer(config, mesh)


@cache
def tokens_BxL() -> np.ndarray:
    """Each sequence has its own length of runs, so that norms differ and a wrong order of sequences shows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (SEQUENCES, CONTEXT + 1))
    return np.asarray([np.repeat(row, 1 + b % 3)[: CONTEXT + 1] for b, row in enumerate(tokens)], np.int32)


class Reference(NamedTuple):
    params: nnx.State  # numpy
    loss: float
    grads: nnx.State  # of the batch-mean loss
    sq_norms_BxG: np.ndarray


@cache
def reference(mlp: str, tied: bool) -> Reference:
    """vmap(grad) of the layers that know no probe, on one device, at parameters away from their initial values."""
    trainer = trainer_of(mlp, tied)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: np.float32(p + 0.3 * (np.std(p) or 1) * rng.standard_normal(p.shape)), trainer.init(0).params)

    def loss(params: nnx.State, tokens_L: jax.Array) -> jax.Array:
        logits_LxV = nnx.merge(trainer.graph, params)(tokens_L[None, :-1])[0]
        return -jnp.mean(jax.nn.log_softmax(logits_LxV)[jnp.arange(CONTEXT), tokens_L[1:]])

    losses_B, grads_B = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(params, tokens_BxL())
    groups = {
        "embedding": 0,
        "query": 1,
        "key": 1,
        "value": 1,
        "attention_out": 1,
        "mlp_in": 2,
        "mlp_gate": 2,
        "mlp_out": 2,
        "unembedding": 3,
    }
    sq_norms_BxG = np.zeros((SEQUENCES, 4))
    for path, grad in nnx.to_flat_state(grads_B):
        sq_norms_BxG[:, groups[path[-1].removesuffix("_bias")]] += np.sum(
            np.square(np.asarray(grad[...], np.float64)).reshape(SEQUENCES, -1), axis=1
        )
    grads = jax.tree.map(lambda g: np.mean(np.asarray(g, np.float64), axis=0), grads_B)
    return Reference(params, float(np.mean(np.asarray(losses_B, np.float64))), grads, sq_norms_BxG)


def on_mesh(case: Case) -> tuple[Any, nnx.State, np.ndarray]:
    """Loss, gradient and squared norms as the train step takes them."""
    count = int(np.prod(list(case.mesh.values())))
    mesh = make_mesh(**case.mesh, devices=jax.devices()[:count])
    trainer = trainer_of(case.mlp, case.tied, mesh, case.remat, case.accumulation)
    params = jax.device_put(reference(case.mlp, case.tied).params, trainer.state_sharding.params)
    tokens_AxBxL = jax.device_put(tokens_BxL().reshape(case.accumulation, -1, CONTEXT + 1), trainer.batch_sharding)
    with jax.set_mesh(mesh):
        return jax.jit(lambda params, tokens: _loss_and_gradient(trainer.graph, params, tokens, True))(params, tokens_AxBxL)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_brute_force(case: Case):
    expected = reference(case.mlp, case.tied)
    loss, grads, sq_norms_BxG = on_mesh(case)
    assert float(loss) == pytest.approx(expected.loss, rel=1e-5)
    np.testing.assert_allclose(sq_norms_BxG, expected.sq_norms_BxG, rtol=1e-5)
    for (path, grad), (_, wanted) in zip(nnx.to_flat_state(grads), nnx.to_flat_state(expected.grads), strict=True):
        off = np.linalg.norm(np.asarray(grad[...], np.float64) - wanted[...])
        assert off <= 1e-5 * np.linalg.norm(wanted[...]), path


@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_tells_sequences_apart(tied: bool):
    """Were any two of them exchanged, the comparison above would fail."""
    norms_BxG = reference("gelu", tied).sq_norms_BxG
    assert norms_BxG.shape == (SEQUENCES, len(KINDS))
    assert (norms_BxG[:, 3] == 0).all() if tied else (norms_BxG > 0).all()
    ratios_BxBxG = norms_BxG[:, None, :3] / norms_BxG[None, :, :3]
    assert np.abs(ratios_BxBxG - 1).max(axis=2)[~np.eye(SEQUENCES, dtype=bool)].min() > 1e-3
