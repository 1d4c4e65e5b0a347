"""The measurement's arithmetic, counted in compiled programs: no more than 3% over the plain step. Nothing here is run."""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from scaling_jax import model
from scaling_jax.config import default_config
from scaling_jax.model import Transformer, TransformerConfig
from scaling_jax.model.cpu import _ends
from scaling_jax.noise_scale import per_example
from scaling_jax.pods.flops import dot_flops, jaxpr_dot_flops, loop_weighted_flops
from scaling_jax.train.step import Trainer, transformer_config

LIMIT = 1.03
SEQUENCES, CONTEXT, VOCAB = 16, 128, 512


def portable(shape: TransformerConfig, *args: Any, **kwargs: Any) -> Transformer:
    """The model as other devices run it."""
    return Transformer(dataclasses.replace(shape, for_cpu=False), *args, **kwargs)


def trainer_of(width: int = 256, model: Callable[..., Transformer] = Transformer, **fields: object) -> Trainer:
    config = default_config()
    config.model.width, config.model.depth = width, 4
    config.model.context, config.model.vocab_size = CONTEXT, VOCAB
    config.train.batch_tokens = SEQUENCES * CONTEXT
    for name, value in fields.items():
        section, key = name.split("__")
        config[section][key] = value
    return Trainer(config, model=model)


def compiled(trainer: Trainer, measure: bool) -> jax.stages.Compiled:
    return trainer.lower_step(SEQUENCES, measure).compile()


@cache
def compiled_256(measure: bool) -> jax.stages.Compiled:
    return compiled(trainer_of(), measure)


def flops(trainer: Trainer, measure: bool) -> int:
    """By the traced program, which costs no compilation."""

    def step(state, tokens_AxBxL):
        return trainer.step(state, tokens_AxBxL, measure)

    accumulation = trainer.config.train.accumulation
    tokens_AxBxL = jax.ShapeDtypeStruct((accumulation, SEQUENCES // accumulation, CONTEXT + 1), jnp.int32)
    return jaxpr_dot_flops(jax.make_jaxpr(step)(trainer.abstract_state, tokens_AxBxL))


def closed_form(trainer: Trainer, blocks: int = len(_ends(CONTEXT))) -> Fraction:
    """6·N and the attention for every token, and the unembedding's three products, which N leaves out.

    Of n blocks of queries the i-th sees i / n of the keys: (n + 1) / 2n of the attention's products. One block is the attention without
    the causal saving.
    """
    shape = transformer_config(trainer.config)
    attention = 12 * shape.depth * shape.context * shape.width
    attention_done = Fraction(blocks + 1, 2 * blocks) * attention
    return (shape.flops_per_token - attention + attention_done + 6 * shape.width * VOCAB) * SEQUENCES * CONTEXT


def test_products_of_the_compiled_step():
    assert dot_flops(compiled_256(True).as_text()) <= LIMIT * dot_flops(compiled_256(False).as_text())


def test_all_arithmetic_of_the_compiled_step():
    """Squares, sums and the estimator count here too; they grow with the parameters, the products with parameters and tokens."""
    assert loop_weighted_flops(compiled_256(True).as_text()) <= LIMIT * loop_weighted_flops(compiled_256(False).as_text())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model__tied_embeddings": True},
        {"model__mlp": "swiglu"},
        {"model__remat": "full"},
        {"train__accumulation": 4},
        {"model__compute_dtype": "bfloat16"},
    ],
    ids=lambda fields: next(iter(fields), "default"),
)
def test_products_of_the_traced_step_at_width_512(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    if "model__compute_dtype" in fields:  # in bfloat16 as other devices take it: see the next test
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    trainer = trainer_of(512, **fields)
    assert flops(trainer, False) < flops(trainer, True) <= LIMIT * flops(trainer, False)


def test_in_bfloat16_a_cpu_takes_the_norms_from_gram_matrices():
    """More products, but in its fastest unit; of query, key and value together, as they are multiplied."""
    width, trainer = 512, trainer_of(512, model__compute_dtype="bfloat16")
    of_block = (1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)
    sides = 4 * of_block * width + (width + VOCAB) + width  # the unembedding's, and the embedding's, which is a Gram form anyhow
    expected = flops(trainer, False) + SEQUENCES * 2 * CONTEXT**2 * sides
    assert flops(trainer, True) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("width", [256, 512])
def test_the_plain_step_is_the_closed_form(width: int):
    """To the last product: the embedding's gather and its gradient, the only layer without an input gradient, are no products."""
    trainer = trainer_of(width)
    assert flops(trainer, False) == closed_form(trainer)
    if width == 256:  # the compiler may add a product or save one, but not one of a layer
        assert dot_flops(compiled_256(False).as_text()) == pytest.approx(float(closed_form(trainer)), rel=1e-3)


def test_the_plain_step_of_other_devices_has_the_whole_attention():
    trainer = trainer_of(model=portable)
    assert flops(trainer, False) == closed_form(trainer, blocks=1) > closed_form(trainer)


def test_the_closed_form_of_swiglu_and_tied_embeddings():
    trainer = trainer_of(model__mlp="swiglu", model__tied_embeddings=True)
    assert flops(trainer, False) == closed_form(trainer)


# ------------------------------------------------------------------------------------- dearer methods, which these counts must tell apart


def gram_dense(x_BxLxI, w_IxO, probe_B=None, *_, **__):
    """‖x_bᵀ·dy_b‖² = Σ_{l,m} (x_l·x_m)(dy_l·dy_m): right, and 2·L²·(I + O) more multiplications per sequence."""
    if probe_B is None:
        return jnp.einsum("bli,io->blo", x_BxLxI, w_IxO)
    return _gram_dense(x_BxLxI, w_IxO, probe_B)


@jax.custom_vjp
def _gram_dense(x_BxLxI, w_IxO, probe_B):
    return jnp.einsum("bli,io->blo", x_BxLxI, w_IxO)


def _gram_dense_bwd(residuals, dy_BxLxO):
    x_BxLxI, w_IxO = residuals
    x_gram_BxLxL = jnp.einsum("bli,bmi->blm", x_BxLxI, x_BxLxI)
    dy_gram_BxLxL = jnp.einsum("blo,bmo->blm", dy_BxLxO, dy_BxLxO)
    dx_BxLxI, dw_IxO = jnp.einsum("blo,io->bli", dy_BxLxO, w_IxO), jnp.einsum("bli,blo->io", x_BxLxI, dy_BxLxO)
    return dx_BxLxI, dw_IxO, jnp.sum(x_gram_BxLxL * dy_gram_BxLxL, axis=(1, 2))


_gram_dense.defvjp(lambda x, w, p: (_gram_dense(x, w, p), (x, w)), _gram_dense_bwd)


def test_the_gram_form_is_over_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(per_example, "dense", gram_dense)
    monkeypatch.setattr("scaling_jax.model.weights.on_one_device", lambda: False)  # each matrix by itself, to count them
    gram_flops = SEQUENCES * 2 * CONTEXT**2
    added = 0
    for path, param in nnx.to_flat_state(trainer_of().abstract_state.params):
        sides = param.shape[-1] if path[-1] == "embedding" else sum(param.shape[-2:])  # the embedding's is a Gram form anyhow
        added += gram_flops * sides * (param.shape[0] if param.ndim == 3 else 1)
    trainer = trainer_of()
    assert flops(trainer, True) == pytest.approx(flops(trainer, False) + added, rel=1e-3)  # the rest is the estimator's and ‖G‖²
    text, plain = compiled(trainer, True).as_text(), compiled_256(False).as_text()
    assert dot_flops(text) > LIMIT * dot_flops(plain)
    assert loop_weighted_flops(text) > LIMIT * loop_weighted_flops(plain)


@pytest.mark.parametrize("width", [256, 512])
def test_a_second_pass_by_vmap_is_over_the_limit(width: int):
    trainer = trainer_of(width)

    def loss(params, tokens_L):
        logits_1xLxV = nnx.merge(trainer.graph, params)(tokens_L[None, :-1])
        return model.sequence_losses(logits_1xLxV, tokens_L[None, 1:])[0]

    def sq_norms(params, tokens_BxL):
        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, tokens_BxL)
        return sum(jnp.sum(jnp.square(g.reshape(SEQUENCES, -1)), axis=1) for g in jax.tree.leaves(grads))

    tokens_BxL = jax.ShapeDtypeStruct((SEQUENCES, CONTEXT + 1), jnp.int32)
    second_pass = jaxpr_dot_flops(jax.make_jaxpr(sq_norms)(trainer.abstract_state.params, tokens_BxL))
    assert second_pass == flops(trainer, False)
