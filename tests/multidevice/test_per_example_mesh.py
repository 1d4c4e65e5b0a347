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
from scaling_jax.train.step import Trainer, _dropout_keys, _loss_and_gradient

SEQUENCES, CONTEXT, VOCAB = 32, 12, 8  # fewer words than positions: every sequence repeats some


class Case(NamedTuple):
    mesh: dict[str, int]
    mlp: str
    remat: str
    tied: bool
    accumulation: int
    options: tuple[tuple[str, Any], ...] = ()  # further fields of the model

    def __str__(self) -> str:
        mesh = "x".join(f"{axis}{size}" for axis, size in self.mesh.items())
        return "-".join([mesh, self.mlp, self.remat, "tied" if self.tied else "untied", str(self.accumulation), *dict(self.options)])


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
GROUPED = ("kv_heads", 2), ("qk_norm", True), ("norm_gains", True), ("positions", "learned")
OPTION_CASES = [
    Case(FSDP, "gelu", "none", False, 4, (*GROUPED, ("dropout", 0.2), ("loss_chunk_tokens", 4))),
    Case({"fsdp": 4, "tensor": 2}, "swiglu", "none", True, 1, (*GROUPED, ("dropout", 0.2), ("loss_chunk_tokens", 12))),
    Case({"replica": 2, "fsdp": 2, "tensor": 2}, "swiglu", "dots", False, 1, (*GROUPED, ("shared_depth", True), ("dropout", 0.2))),
    Case({"replica": 4, "fsdp": 2}, "gelu", "none", True, 4, (("shared_depth", True), ("loss_chunk_tokens", 6))),
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


def trainer_of(mlp: str, tied: bool, options: tuple = (), mesh: Mesh | None = None, remat: str = "none", accumulation: int = 1) -> Trainer:
    config = default_config()
    config.model.width, config.model.head_dim, config.model.depth = 32, 8, 2
    config.model.context, config.model.vocab_size = CONTEXT, VOCAB
    config.model.mlp, config.model.tied_embeddings, config.model.remat = mlp, tied, remat
    config.model.biases = mlp != "gelu"  # with every mesh, remat, embedding and accumulation, and without
    config.parametrization.name, config.parametrization.base_width = "completep", 16  # every forward multiplier differs from 1
    config.parametrization.base_depth = 1
    for name, value in options:
        config.model[name] = value
    if config.model.shared_depth:
        config.parametrization.name = "mup"
    config.train.batch_tokens, config.train.accumulation = SEQUENCES * CONTEXT, accumulation
    config.noise_scale.preconditioned = True
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
    metric: nnx.State  # any weights
    sq_norms_BxM: dict[tuple[str, int | None], np.ndarray]  # of each kind, in each block: without and with the metric


@cache
def reference(mlp: str, tied: bool, options: tuple = ()) -> Reference:
    """vmap(grad) of the layers that know no probe, on one device, at parameters away from their initial values."""
    trainer = trainer_of(mlp, tied, options)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: np.float32(p + 0.3 * (np.std(p) or 1) * rng.standard_normal(p.shape)), trainer.init(0).params)

    keys_B = _dropout_keys(trainer.config, 0, SEQUENCES)

    def loss(params: nnx.State, tokens_L: jax.Array, key: jax.Array | None) -> jax.Array:
        keys_1 = None if key is None else key[None]
        logits_LxV = nnx.merge(trainer.graph, params)(tokens_L[None, :-1], dropout_keys_B=keys_1)[0]
        return -jnp.mean(jax.nn.log_softmax(logits_LxV)[jnp.arange(CONTEXT), tokens_L[1:]])

    metric = jax.tree.map(lambda p: np.float32(rng.exponential(size=p.shape)), params)
    losses_B, grads_B = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0)))(params, tokens_BxL(), keys_B)
    attention = dict.fromkeys(("query", "key", "value", "attention_out"), "attention")
    kinds = attention | dict.fromkeys(("mlp_in", "mlp_gate", "mlp_out"), "mlp") | {"embedding": "embedding", "unembedding": "unembedding"}
    kinds |= {"query_gain": "attention", "key_gain": "attention", "attention_gain": "attention", "mlp_gain": "mlp"}
    kinds |= {"position_embedding": "embedding", "final_gain": "embedding" if tied else "unembedding"}
    sq_norms_BxM: dict = {}
    for path, grad in nnx.to_flat_state(grads_B):
        square, weight = np.square(np.asarray(grad[...], np.float64)), np.asarray(dict(nnx.to_flat_state(metric))[path][...], np.float64)
        for block in range(trainer.meter.depth) if path[0] == "blocks" else (None,):
            part, of = (square, weight) if block is None else (square[:, block], weight[block])
            both_BxM = np.stack([(w * part).reshape(SEQUENCES, -1).sum(1) for w in (np.ones_like(of), of)], axis=1)
            key = kinds[path[-1].removesuffix("_bias")], block
            sq_norms_BxM[key] = sq_norms_BxM.get(key, 0) + both_BxM
    grads = jax.tree.map(lambda g: np.mean(np.asarray(g, np.float64), axis=0), grads_B)
    return Reference(params, float(np.mean(np.asarray(losses_B, np.float64))), grads, metric, sq_norms_BxM)


def on_mesh(case: Case) -> tuple[Any, nnx.State, dict[tuple[str, int | None], np.ndarray]]:
    """Loss, gradient and squared norms of each group as the train step takes them."""
    count = int(np.prod(list(case.mesh.values())))
    mesh = make_mesh(**case.mesh, devices=jax.devices()[:count])
    trainer = trainer_of(case.mlp, case.tied, case.options, mesh, case.remat, case.accumulation)
    expected = reference(case.mlp, case.tied, case.options)
    params, metric = (jax.device_put(x, trainer.state_sharding.params) for x in (expected.params, expected.metric))
    tokens_AxBxL = jax.device_put(tokens_BxL().reshape(case.accumulation, -1, CONTEXT + 1), trainer.batch_sharding)
    with jax.set_mesh(mesh):
        loss_and_gradient = jax.jit(lambda *args: _loss_and_gradient(trainer, *args, True))
        loss, grads, sq_norms_BxGxM = loss_and_gradient(params, metric, tokens_AxBxL)
    return loss, grads, {group: np.asarray(sq_norms_BxGxM[:, g]) for g, group in enumerate(trainer.meter.groups)}


QUICK = (
    CASES[0],
    CASES[5],
    CASES[6],
    CASES[9],
    OPTION_CASES[1],
    OPTION_CASES[2],
)  # every axis, MLP, way to use the table; the others, 5 s each


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES + OPTION_CASES], ids=str
)
def test_equals_brute_force(case: Case):
    expected = reference(case.mlp, case.tied, case.options)
    loss, grads, sq_norms_BxM = on_mesh(case)
    assert float(loss) == pytest.approx(expected.loss, rel=1e-5)
    assert sq_norms_BxM.keys() == expected.sq_norms_BxM.keys()
    for group, found in sq_norms_BxM.items():
        np.testing.assert_allclose(found, expected.sq_norms_BxM[group], rtol=1e-5, err_msg=str(group))
    for (path, grad), (_, wanted) in zip(nnx.to_flat_state(grads), nnx.to_flat_state(expected.grads), strict=True):
        off = np.linalg.norm(np.asarray(grad[...], np.float64) - wanted[...])
        assert off <= 1e-5 * np.linalg.norm(wanted[...]), path


@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_tells_sequences_apart(tied: bool):
    """Were any two of them exchanged, the comparison above would fail."""
    norms_BxG = np.concatenate(list(reference("gelu", tied).sq_norms_BxM.values()), axis=1)
    assert norms_BxG.shape == (SEQUENCES, 2 * (5 if tied else 6)) and (norms_BxG > 0).all()
    ratios_BxBxG = norms_BxG[:, None] / norms_BxG[None]
    assert np.abs(ratios_BxBxG - 1).max(axis=2)[~np.eye(SEQUENCES, dtype=bool)].min() > 1e-3
