"""The table that a run records is the one it applies, and its fingerprint tells tables apart."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import small_config

from scaling_jax.model import Transformer
from scaling_jax.parametrization import Parametrization
from scaling_jax.train.applied import applied_table
from scaling_jax.train.loop import train
from scaling_jax.train.step import Trainer


def table(config, model=Transformer, seed=0):
    trainer = Trainer(config, model=model)
    return applied_table(trainer, trainer.init(seed))


def test_rows_are_those_of_the_optimizers_state_not_of_the_rules():
    """A state that was tampered with shows."""
    trainer = Trainer(small_config(optimizer__weight_decay=0.1))
    state = trainer.init(0)
    before = applied_table(trainer, state)
    roles = state.opt_state[-1]
    doubled = roles._replace(lr=jax.tree.map(lambda lr: 2 * lr, roles.lr))
    after = applied_table(trainer, state._replace(opt_state=(*state.opt_state[:-1], doubled)))
    for one, two in zip(before["parameters"], after["parameters"], strict=True):
        np.testing.assert_allclose(two["lr"], 2 * one["lr"])
    assert before["fingerprint"] != after["fingerprint"]


class _Twice(Parametrization):
    def rule(self, role, **sizes):
        rule = super().rule(role, **sizes)
        return rule._replace(multiplier=2.0) if role == "output" else rule


@pytest.mark.parametrize(
    "fields",
    [
        {"parametrization__base_width": 8},
        {"optimizer__decay_mode": "coupled"},
        {"optimizer__lr": 1e-2},
        {"model__biases": True},
        {"parametrization__query_init": "zero"},
        {"parametrization__name": "completep", "parametrization__base_depth": 1},
        {"parametrization__base_head_dim": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_any_other_table_has_another_fingerprint(fields):
    base = small_config(optimizer__weight_decay=0.1)
    assert table(small_config(optimizer__weight_decay=0.1, **fields))["fingerprint"] != table(base)["fingerprint"]


def test_a_change_in_the_tables_own_code_shows():
    def wrong(shape, parametrization, rngs):
        return Transformer(shape, _Twice(**dataclasses.asdict(parametrization)), rngs=rngs)

    assert table(small_config(), wrong)["fingerprint"] != table(small_config())["fingerprint"]


def test_the_fingerprint_knows_neither_seed_nor_mesh_nor_length():
    base = table(small_config())["fingerprint"]
    assert table(small_config(), seed=3)["fingerprint"] == base
    assert table(small_config(train__tokens=10_000, noise_scale__every=2))["fingerprint"] == base


def test_a_run_records_it(tmp_path):
    config = small_config()
    summary = train(config, tmp_path)
    recorded = json.loads((tmp_path / "parametrization.json").read_text())
    assert recorded == json.loads(json.dumps(table(config)))
    assert summary["parametrization_fingerprint"] == recorded["fingerprint"]
    assert json.loads((tmp_path / "summary.json").read_text())["parametrization_fingerprint"] == recorded["fingerprint"]
