"""A small group compiled for a slice of 8 chips, one member on each: what can be counted by hand.

Skipped, saying so, where libtpu is not installed (pip install -e '.[tpu]'); no TPU is needed.
"""

import importlib.util
from functools import cache

import pytest

from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.pods.chips import parse_topology
from scaling_jax.pods.collectives import Collective
from scaling_jax.pods.compile import CompiledStep, prepare
from scaling_jax.pods.faults import faults
from scaling_jax.pods.population import compile_group
from scaling_jax.pods.traffic import Least
from scaling_jax.report.pods import pod_json, pod_table
from scaling_jax.sweep import grid
from scaling_jax.sweep.population import Population
from scaling_jax.sweep.study import Study
from scaling_jax.verbs.compile_groups import compile_groups

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, XLA's compiler for TPUs, is not installed")
SEQUENCES, CONTEXT, WIDTH, DEPTH, VOCAB = 4, 256, 128, 2, 512


def small(**mesh):
    config = default_config()
    config.model.update(width=WIDTH, depth=DEPTH, head_dim=128, context=CONTEXT, vocab_size=VOCAB, compute_dtype="bfloat16")
    config.parametrization.base_width = config.parametrization.base_head_dim = 128
    config.train.batch_tokens, config.train.tokens = SEQUENCES * CONTEXT, 100 * SEQUENCES * CONTEXT
    config.mesh.update(mesh)
    return config


@cache
def compiled(members: int, **mesh) -> CompiledStep:
    prepare()
    return compile_group(small(**mesh), members, parse_topology("v5e:2x4"), Population)


@needs_libtpu
def test_members_on_chips_of_their_own_send_nothing():
    step = compiled(8)
    assert dict(step.mesh.shape) == {"replica": 1, "fsdp": 1, "tensor": 1, "member": 8} and step.members == 8
    assert step.collectives == [] and step.wire_bytes == 0 and step.faults == []


@needs_libtpu
def test_each_chip_has_the_state_and_the_products_of_one_member():
    step = compiled(8)
    blocks, readout = DEPTH * 12 * WIDTH**2, WIDTH * VOCAB
    assert step.total_params == blocks + 2 * readout
    state = 12 * step.total_params + 4 * SEQUENCES * (CONTEXT + 1)
    assert state <= step.memory.arguments < 1.05 * state + 10_000  # padding, and the noise scale's few numbers
    # The embedding's squared norms compare all pairs of a sequence's tokens.
    by_hand = (6 * (blocks + readout) + 2 * CONTEXT * WIDTH) * SEQUENCES * CONTEXT
    assert step.product_flops == pytest.approx(by_hand, rel=0.02) and step.product_flops == pytest.approx(step.traced_flops, rel=0.01)
    # Forwards 2 products of [L, L], backwards 4 and 3; one head, one block of the kernel.
    assert step.kernel_flops == DEPTH * 9 * 2 * CONTEXT**2 * 128 * SEQUENCES


@needs_libtpu
def test_what_it_takes_is_of_all_members_together():
    step = compiled(8)
    assert step.tokens_per_second == pytest.approx(8 * SEQUENCES * CONTEXT / step.roofline.step_s)
    assert step.seconds == pytest.approx(100 * step.roofline.step_s)
    assert "member 8" in pod_table(step) and pod_json(step)["members"] == 8


@needs_libtpu
def test_a_study_is_compiled_by_its_classes(capsys, monkeypatch):
    """Its own data are not there. Five learning rates, four at a time, are filled up to the slice's eight chips."""
    config = small()
    config.schedule.name = "constant"
    config.data.path = "nowhere"
    points = grid.product(grid.over("train.batch_tokens", (2048, 1024)), grid.over("optimizer.lr", [2.0**-k for k in range(5)]))
    study = Study(config, points, horizons=(8192, 16384), tpus=8, max_members=4)
    given = []
    monkeypatch.setattr("scaling_jax.pods.population.compile_group", lambda *args: given.append(args) or compiled(8))
    assert compile_groups(study, "v5e:2x4") == 0
    assert [(config.train.batch_tokens, members) for config, members, *_ in given] == [(2048, 3), (1024, 3)]
    said = capsys.readouterr().out
    assert "train.batch_tokens=2048: 5 to train, 3 at a time" in said and said.count("member 8") == 2
    assert compile_groups(study, "v5e:2x4", most=1) == 0 and len(given) == 3
    with pytest.raises(UserError, match="--topology=v5e:2x2: has 4 chips; must have the study's tpus, 8"):
        compile_groups(study, "v5e:2x2")


@needs_libtpu
def test_a_mesh_that_does_not_divide_the_slice_is_refused():
    prepare()
    with pytest.raises(UserError, match="config.mesh is replica 3 .* = 3 devices for each member: must divide the 8 of one slice"):
        compile_group(small(replica=3), 2, parse_topology("v5e:2x4"), Population)


@needs_libtpu
@pytest.mark.slow
def test_members_of_several_chips_exchange_their_own_gradients_only():
    """Two members on each pair of chips: each adds up its gradients along replica, and no more than one run alone would."""
    step = compiled(8, replica=2)
    assert step.mesh.shape["member"] == 4 and {c.axes for c in step.collectives} == {("replica",)}
    assert 0.9 < step.wire_bytes / step.least.total < 1.3 and step.faults == []


def test_a_collective_between_members_is_a_fault():
    sent = Collective("all-reduce", ("member",), 8, 1, 1e6, "grads", (), "f32", False, "all-reduce.1")
    assert any("between members" in fault for fault in faults([sent], Least(1e7, 0, 0, 0, 0), depth=2))
    own = sent._replace(axes=("replica",))
    assert faults([own], Least(1e7, 0, 0, 0, 0), depth=2) == []
