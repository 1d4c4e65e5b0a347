"""The tables against the published rules, and against what the built model and optimizer hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling_jax.config import default_config
from scaling_jax.errors import UserError
from scaling_jax.model import Transformer, TransformerConfig
from scaling_jax.optimizer import with_rules
from scaling_jax.parametrization import ROLES, TABLE, Parametrization
from scaling_jax.report.parametrization import measured_table, parametrization_table

BASE = Parametrization("mup", base_width=64, base_depth=2, base_head_dim=16, output_init="normal")


def rule(parametrization, role, width, depth=2):
    base, fan_in = (64, width) if role in ("hidden", "query", "output") else (256, 256)
    return parametrization.rule(role, fan_in=fan_in, base_fan_in=base, width=width, depth=depth)


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_mup_ratios(width):
    """Tensor Programs V, Table 8, with the readout of microsoft/mup: constant variance, multiplier 1/m."""
    m = width / 64
    hidden, at_base = rule(BASE, "hidden", width), rule(BASE, "hidden", 64)
    assert hidden.lr == 1 / m
    assert hidden.init_std / at_base.init_std == m**-0.5
    assert hidden.lr * hidden.weight_decay == 1  # shrinkage per step does not depend on width
    output = rule(BASE, "output", width)
    assert (output.lr, output.multiplier, output.init_std) == (1, 1 / m, rule(BASE, "output", 64).init_std)
    for role in ("embedding", "vector"):
        assert rule(BASE, role, width).lr == 1
    assert rule(BASE, "embedding", width).init_std == rule(BASE, "embedding", 64).init_std
    assert BASE.attention_scale(64) == 4 / 64 and BASE.attention_scale(16) == 16**-0.5


def test_standard_moves_only_the_init():
    standard = Parametrization("standard", base_width=64, output_init="normal")
    for role in ROLES:
        r = rule(standard, role, 1024)
        assert (r.lr, r.eps, r.multiplier) == (1, 1, 1)
        assert r.weight_decay == (0 if "vector" in role else 1)
    assert rule(standard, "hidden", 1024).init_std == 1024**-0.5
    assert standard.attention_scale(64) == 1 / 8


def test_completep_depth_factors():
    """nanoGPT-mup, branch completep: residual branch 1/k^α, hidden lr k^(α−1)/m, decay m, epsilon k^−α/m; norms and biases no decay."""
    for alpha in (0.5, 1.0):
        p = Parametrization("completep", base_width=64, base_depth=2, depth_exponent=alpha)
        hidden = rule(p, "hidden", 256, depth=8)
        np.testing.assert_allclose((hidden.lr, hidden.weight_decay, hidden.eps), (4 ** (alpha - 1) / 4, 4, 4**-alpha / 4))
        vector = rule(p, "vector", 256, depth=8)
        np.testing.assert_allclose((vector.lr, vector.weight_decay, vector.eps), (4 ** (alpha - 1), 0, 4**-alpha / 4))
        assert rule(p, "query", 256, depth=8) == hidden
        assert p.residual_multiplier(8) == 4**-alpha
        for role in ("embedding", "tied", "output", "final_vector"):
            outside = rule(p, role, 256, depth=8)
            assert (outside.lr, outside.eps) == (1, 1 / 4)
    assert BASE.residual_multiplier(8) == 1


@pytest.mark.parametrize("name", ["mup", "completep"])
def test_at_the_base_sizes_all_tables_agree(name):
    for role in ROLES:
        ours = rule(Parametrization(name, base_width=64, base_depth=2), role, 64)
        assert ours == rule(Parametrization("standard", base_width=64, base_depth=2), role, 64)
    for head_dim in (8, 24, 32, 80):  # to the bit, whether or not its root is a round number
        ours = Parametrization(name, base_head_dim=head_dim, base_depth=2)
        assert ours.attention_scale(head_dim) == Parametrization("standard").attention_scale(head_dim)


def test_a_width_below_the_base_turns_every_factor_round():
    hidden, output = rule(BASE, "hidden", 16), rule(BASE, "output", 16)
    assert (hidden.lr, hidden.weight_decay, hidden.eps, output.multiplier) == (4, 1 / 4, 4, 4)


def test_every_row_names_its_source():
    assert set(TABLE) == {"standard", "mup", "completep"}
    for rows in TABLE.values():
        assert set(rows) == {*ROLES, "attention_logits", "residual_branch"}
        assert all(row.source for row in rows.values())


def test_zero_inits_are_of_their_role_only():
    zero = Parametrization("mup", base_width=64, output_init="zero", query_init="zero")
    assert {role for role in ROLES if rule(zero, role, 64).init_std == 0} == {"output", "query", "vector", "final_vector"}
    assert {role for role in ROLES if rule(BASE, role, 64).init_std == 0} == {"vector", "final_vector"}


def test_completep_without_a_base_depth_is_refused():
    with pytest.raises(UserError, match="base_depth is 0: completep"):
        Parametrization("completep")


def test_coupled_decay_follows_the_lr():
    coupled = Parametrization("mup", base_width=64, decay_mode="coupled")
    for width in (16, 64, 256):
        assert rule(coupled, "hidden", width).weight_decay == 1
        assert rule(coupled, "vector", width).weight_decay == 0


def test_unknown_role_and_name_are_refused():
    with pytest.raises(UserError, match="role 'gain'"):
        rule(BASE, "gain", 64)
    with pytest.raises(UserError, match="parametrization 'ntk'"):
        Parametrization("ntk")


def test_parameter_without_a_role_is_an_error():
    """A user's own layer that forgot its role must not be trained with a guessed lr."""

    class Mine(nnx.Module):
        def __init__(self):
            self.gain = nnx.Param(jnp.ones(3))

    with pytest.raises(UserError, match="parameter gain has no role"):
        with_rules(nnx.state(Mine()), lambda rule: rule.lr)


def wide_config(width=128):
    config = default_config()
    config.model.width, config.model.depth, config.model.head_dim, config.model.context = width, 2, 16, 16
    config.parametrization.base_width, config.parametrization.base_head_dim = 32, 16
    config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.eps = 0.01, 0.1, 1e-8
    return config


def test_table_is_read_back_from_model_and_optimizer_state():
    config = wide_config()
    table = measured_table(config)
    by_name = {row["name"]: row for row in table["parameters"]}
    assert len(by_name) == 8 and table["attention_scale"] == 0.25 and table["residual_multiplier"] == 1
    hidden, output = by_name["blocks.mlp_out"], by_name["unembedding"]
    np.testing.assert_allclose((hidden["init_std"], hidden["measured_std"]), 512**-0.5, rtol=0.02)
    np.testing.assert_allclose((hidden["lr"], hidden["weight_decay"], hidden["eps"]), (0.0025, 0.4, 2.5e-9), rtol=1e-5)
    np.testing.assert_allclose((output["init_std"], output["measured_std"]), 32**-0.5, rtol=0.02)
    assert output["multiplier"] == 0.25 and output["lr"] == pytest.approx(0.01)
    text = parametrization_table(config)
    assert all(name in text for name in by_name)
    assert table["fingerprint"] in text and "Tensor Programs V" in text


def test_output_multiplier_reaches_the_logits():
    """The table's multiplier against the forward pass: logits over the same product taken by hand."""
    shape = TransformerConfig(vocab_size=16, width=128, depth=1, head_dim=16, context=8)
    model = Transformer(shape, Parametrization("mup", base_width=32, base_head_dim=16), rngs=nnx.Rngs(0))
    tokens = jnp.arange(8)[None] % 16
    logits = model(tokens)
    doubled = Transformer(shape, Parametrization("mup", base_width=64, base_head_dim=16), rngs=nnx.Rngs(0))
    nnx.update(doubled, nnx.state(model, nnx.Param))  # the same weights; only multipliers may differ
    np.testing.assert_allclose(doubled(tokens), 2 * logits, rtol=1e-5, atol=1e-6)
    standard = Transformer(shape, Parametrization("standard", base_head_dim=16), rngs=nnx.Rngs(0))
    nnx.update(standard, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(standard(tokens), 4 * logits, rtol=1e-5, atol=1e-6)


def test_residual_multiplier_reaches_the_forward_pass():
    """With branches switched off by a huge depth exponent the logits are those of the embedding alone."""
    shape = TransformerConfig(vocab_size=16, width=32, depth=4, head_dim=16, context=8)
    model = Transformer(shape, Parametrization("completep", base_width=32, base_depth=1, depth_exponent=30.0), rngs=nnx.Rngs(0))
    tokens = jnp.arange(8)[None] % 16
    x = model.embedding[...][tokens]
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(model(tokens), jnp.einsum("bld,dv->blv", x, model.unembedding[...]), rtol=1e-4, atol=1e-5)


def test_wide_model_with_mup_learns_like_the_base(tmp_path):
    """At initialization, logits shrink as 1/sqrt(width) under μP and do not under standard: a multiplier lost would show."""

    def logit_std(name, width):
        shape = TransformerConfig(vocab_size=64, width=width, depth=1, head_dim=16, context=16)
        model = Transformer(shape, Parametrization(name, base_width=32), rngs=nnx.Rngs(1))
        return float(jnp.std(model(jax.random.randint(jax.random.key(0), (8, 16), 0, 64))))

    np.testing.assert_allclose(logit_std("mup", 512) / logit_std("mup", 32), 0.25, rtol=0.25)
    np.testing.assert_allclose(logit_std("standard", 512) / logit_std("standard", 32), 1.0, rtol=0.25)
