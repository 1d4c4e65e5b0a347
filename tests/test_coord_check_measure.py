"""What a coordinate check measures, against a forward pass in numpy, Trainer's own steps, and what Adam and AdamW do by definition."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import small_config

from scaling_jax.coord_check.measure import ACTIVATION, CHANGE, DECAY, EPSILON, QUARTERS, UPDATE, check_config, coordinates
from scaling_jax.coord_check.measure import activations as shown
from scaling_jax.model import Transformer
from scaling_jax.parameters import Parameters
from scaling_jax.train.step import Trainer

VOCAB, CONTEXT, SEQUENCES, STEPS, LR = 24, 8, 4, 3, 0.02


pytestmark = pytest.mark.usefixtures("quick_compilation")


def config_of(**fields):
    """Base width 16 and depth 1: at width 32 and depth 4 the multipliers differ from 1."""
    config = small_config(model__vocab_size=VOCAB, model__context=CONTEXT, optimizer__lr=LR, **fields)
    config.model.depth = config.parametrization.base_depth = 1
    return config


@functools.cache
def tokens():
    """Half of the vocabulary, so that some rows of the embedding have no gradient."""
    return np.random.default_rng(0).integers(0, VOCAB // 2, (SEQUENCES, CONTEXT + 1)).astype(np.int32)


def measured(config, axis="width", size=16, seeds=(0,), steps=STEPS):
    return [c for values in coordinates(config, axis, size, seeds, steps, tokens()) for c in values]


def table(found, quantity, step, seed=0):
    return {c.kind: c.value for c in found if (c.quantity, c.step, c.seed) == (quantity, step, seed)}


DEPTH = 3  # whose quarters lie between blocks, and not in the middle


@functools.cache
def deep():
    """The config and what is measured: a readout and queries that start at random, so that nothing is trivially zero."""
    config = check_config(config_of(parametrization__name="completep", model__width=32), "depth", DEPTH)
    config.parametrization.output_init = "normal"
    return config, measured(config, "depth", DEPTH)


@functools.cache
def plain_loop():
    """The parameters that Trainer.step makes, before each step and after the last, as numpy."""
    trainer = Trainer(deep()[0])
    state, trajectory = trainer.init(0), []
    for _ in range(STEPS + 1):
        trajectory.append({".".join(path): np.array(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(state.params)})
        state, _ = trainer.step(state, jnp.asarray(tokens())[None], False)
    return trajectory


# A forward pass of its own, in float64


def rms_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def rotate(x, theta):
    """Pairs (i, i + half) of each head as complex numbers, turned by position · theta^(-i/half)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[-2])[:, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def forward(config, params, inputs):
    """Every activation, those of the blocks stacked over depth; `residual` after 0, 1, … blocks."""
    width, head_dim, depth = config.model.width, config.model.head_dim, config.model.depth
    base_head_dim, k = config.parametrization.base_head_dim, depth / config.parametrization.base_depth
    x = params["embedding"][inputs]
    seen = {name: [] for name in ("q", "k", "v", "attention logits", "attention output", "MLP hidden", "MLP output")}
    residual = [x]
    for block in range(depth):
        w = {name.removeprefix("blocks."): value[block] for name, value in params.items() if name.startswith("blocks.")}
        split = [rms_norm(x) @ w[name] for name in ("query", "key", "value")]
        q, key, v = (y.reshape(*y.shape[:2], width // head_dim, head_dim).swapaxes(1, 2) for y in split)
        q, key = rotate(q, config.model.rope_theta), rotate(key, config.model.rope_theta)
        logits = q @ key.swapaxes(-1, -2) * base_head_dim**0.5 / head_dim
        causal = np.tril(np.ones(logits.shape[-2:]))
        weights = np.exp(logits) * causal
        weights /= weights.sum(-1, keepdims=True)
        attention = (weights @ v).swapaxes(1, 2).reshape(*x.shape) @ w["attention_out"]
        x = x + attention / k
        h = rms_norm(x) @ w["mlp_in"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        mlp = h @ w["mlp_out"]
        x = x + mlp / k
        for name, value in zip(seen, (q, key, v, logits * causal, attention, h, mlp), strict=True):
            seen[name].append(value)
        residual.append(x)
    stacked = {name: np.stack(values) for name, values in seen.items()}
    read_out = rms_norm(x) @ params["unembedding"] * config.parametrization.base_width / width
    return {"embedding": residual[0], **stacked, "logits": read_out}, residual


def quarters(residual):
    """The residual stream after each quarter of three blocks."""
    e, *r = residual
    return [0.25 * e + 0.75 * r[0], 0.5 * r[0] + 0.5 * r[1], 0.75 * r[1] + 0.25 * r[2], r[2]]


def activations(config, params):
    seen, residual = forward(config, params, tokens()[:, :-1])
    return seen | {f"residual {i}/{QUARTERS}": x for i, x in enumerate(quarters(residual), 1)}


def mean_abs(x):
    return float(np.abs(x).mean())


def test_activations_are_those_of_a_forward_pass_by_hand():
    config, found = deep()
    for step in (1, STEPS):
        expected = {kind: mean_abs(x) for kind, x in activations(config, plain_loop()[step - 1]).items()}
        expected["attention scale"] = config.parametrization.base_head_dim**0.5 / config.model.head_dim
        assert table(found, ACTIVATION, step) == pytest.approx(expected, rel=2e-4)


def test_change_is_from_the_first_step_and_not_from_the_one_before():
    config, found = deep()
    first = activations(config, plain_loop()[0])
    assert set(table(found, CHANGE, 1).values()) == {0.0}
    last = activations(config, plain_loop()[STEPS - 1])
    expected = {kind: mean_abs(last[kind] - first[kind]) for kind in first}
    change = last["logits"] - first["logits"]
    expected["target logit"] = np.take_along_axis(change, tokens()[:, 1:, None], axis=2).mean() - change.mean()
    assert expected["target logit"] > 0  # it learns
    assert table(found, CHANGE, STEPS) == pytest.approx(expected, rel=2e-3)


def test_updates_are_those_of_trainer_step_in_a_plain_loop():
    """All of the trajectory: the t-th update of every parameter, from the first to the one after the last activations."""
    _, found = deep()
    for step in range(1, STEPS + 1):
        before, after = plain_loop()[step - 1 : step + 1]
        expected = {name: mean_abs(after[name] - before[name]) / LR for name in before}
        assert table(found, UPDATE, step) == pytest.approx(expected, rel=2e-3)


def test_adams_first_step_moves_every_entry_that_has_a_gradient_by_its_own_lr():
    """Adam's first direction is the gradient's sign, so the update over lr is the table's lr, times the share of entries in use."""
    config = config_of(model__biases=True, optimizer__eps=1e-12, parametrization__name="completep", parametrization__depth_exponent=0.5)
    config.model.depth = 4
    config = check_config(config, "width", 32)
    config.parametrization.output_init = "normal"
    found = [c for c in measured(config, size=32, steps=1) if c.quantity == UPDATE]
    seen = len(np.unique(tokens()[:, :-1])) / VOCAB
    branch = 4**-0.5  # depth^(α - 1)
    expected = {"embedding": seen, "output": 1.0, "hidden": branch / 2, "query": branch / 2, "vector": branch}
    assert {c.role for c in found} == set(expected)
    for c in found:
        assert c.value == pytest.approx(expected[c.role], rel=1e-3), c.kind


class Shown(nnx.Module):
    """A module of one's own that shows a residual stream: after block n, its embedding times 10^n."""

    def __init__(self, config, parametrization, *, rngs):
        make = Parameters(parametrization, rngs, width=config.width, depth=config.depth)
        self.table = make.matrix("embedding", (config.vocab_size, config.width))
        self.out = make.matrix("output", (config.width, config.vocab_size))
        self.depth = config.depth

    def __call__(self, tokens_BxL, tap=lambda kind, x: None):
        x_BxLxD = self.table[...][tokens_BxL]
        tap("embedding", x_BxLxD)
        tap("residual", jnp.stack([x_BxLxD * 10.0**n for n in range(1, self.depth + 1)]))
        return x_BxLxD @ self.out[...]


@pytest.mark.parametrize(("depth", "multiples"), [(1, (3.25, 5.5, 7.75, 10)), (2, (5.5, 10, 55, 100)), (4, (10, 100, 1000, 10000))])
def test_the_residual_stream_is_shown_after_each_quarter_of_the_depth(depth, multiples):
    """Between blocks by interpolation; a depth that 4 divides by its blocks."""
    config = check_config(config_of(), "depth", depth)
    found = table(next(coordinates(config, "depth", depth, [0], 1, tokens(), Shown)), ACTIVATION, 1)
    assert set(found) == {"embedding", "logits", *(f"residual {i}/4" for i in range(1, 5))}
    assert [found[f"residual {i}/4"] / found["embedding"] for i in range(1, 5)] == pytest.approx(multiples, rel=1e-5)


SEEDS = 3, 1


@functools.cache
def batches_behind_zero_readout():
    """Weight decay in the trajectory would show as an update of what has no gradient."""
    config = check_config(config_of(optimizer__eps=1e-12, optimizer__weight_decay=0.5), "width", 32)
    return list(coordinates(config, "width", 32, SEEDS, 2, tokens()))


def behind_zero_readout():
    return [c for values in batches_behind_zero_readout() for c in values]


def test_behind_a_zero_readout_only_the_readout_moves_at_first():
    found = behind_zero_readout()
    for seed in SEEDS:
        first = table(found, UPDATE, 1, seed)
        assert first.pop("unembedding") == pytest.approx(1.0, rel=1e-4)
        assert set(first.values()) == {0.0}
        assert table(found, ACTIVATION, 1, seed)["logits"] == 0.0 < table(found, ACTIVATION, 2, seed)["logits"]
        assert all(value > 0 for value in table(found, UPDATE, 2, seed).values())


def test_every_seed_starts_from_parameters_of_its_own():
    found, trainer = behind_zero_readout(), Trainer(check_config(config_of(), "width", 32))
    for seed in SEEDS:
        expected = mean_abs(np.asarray(trainer.init(seed).params["embedding"][...])[tokens()[:, :-1]])
        assert table(found, ACTIVATION, 1, seed)["embedding"] == pytest.approx(expected, rel=1e-5)
        assert set(table(found, CHANGE, 1, seed).values()) == {0.0}  # since its own first step


def test_a_seed_is_yielded_when_it_is_measured_and_decay_once_with_the_first():
    batches = batches_behind_zero_readout()
    assert [{c.seed for c in values if c.quantity != DECAY} for values in batches] == [{3}, {1}]
    assert [{(c.seed, c.step) for c in values if c.quantity == DECAY} for values in batches] == [{(0, 0)}, set()]
    assert {c.step for values in batches for c in values if c.quantity != DECAY} == {1, 2}
    assert {(c.axis, c.size) for values in batches for c in values} == {("width", 32)}


def test_queries_start_at_zero_where_heads_grow():
    config = check_config(config_of(), "width", 32, heads=2)
    first = table(measured(config, size=32, steps=1), ACTIVATION, 1)
    assert first["q"] == first["attention logits"] == 0.0 < first["k"]


@pytest.mark.parametrize(
    ("name", "mode", "weight_decay", "expected"),
    [  # AdamW takes lr·weight_decay·w off; at width 32 and depth 4, twice and four times the base
        ("mup", "independent", 0.3, {"embedding": 1.0, "hidden": 1.0, "query": 1.0, "output": 1.0, "vector": 0.0}),
        ("mup", "coupled", 0.3, {"embedding": 1.0, "hidden": 0.5, "query": 0.5, "output": 1.0, "vector": 0.0}),
        ("completep", "independent", 0.0, {"embedding": 1.0, "hidden": 0.5, "query": 0.5, "output": 1.0, "vector": 0.0}),
        ("completep", "coupled", 0.0, {"embedding": 1.0, "hidden": 0.25, "query": 0.25, "output": 1.0, "vector": 0.0}),
        ("standard", "coupled", 0.0, {"embedding": 1.0, "hidden": 1.0, "query": 1.0, "output": 1.0, "vector": 0.0}),
    ],
)
def test_decay_is_what_adamw_takes_off(name, mode, weight_decay, expected):
    """Whatever the config's own weight decay, which may be 0."""
    config = config_of(model__width=32, model__biases=True, optimizer__decay_mode=mode, optimizer__weight_decay=weight_decay)
    config.parametrization.name, config.parametrization.depth_exponent = name, 0.5
    found = next(coordinates(check_config(config, "depth", 4), "depth", 4, (0,), 0, tokens()))
    assert {c.quantity for c in found} == {DECAY, EPSILON} and {c.role for c in found} == set(expected)
    for c in (c for c in found if c.quantity == DECAY):
        assert c.value == pytest.approx(expected[c.role], rel=1e-5), c.kind


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # far below epsilon Adam's step is lr·gradient/epsilon; at width 32 and depth 4, twice and four times the base, α = 1/2
        ("standard", {"embedding": 1, "hidden": 1, "query": 1, "output": 1, "vector": 1}),
        ("mup", {"embedding": 2, "hidden": 1, "query": 1, "output": 2, "vector": 2}),
        ("completep", {"embedding": 2, "hidden": 1, "query": 1, "output": 2, "vector": 2}),
    ],
)
def test_epsilon_is_what_adam_divides_a_tiny_gradient_by(name, expected):
    config = config_of(model__width=32, model__biases=True)
    config.parametrization.name, config.parametrization.depth_exponent = name, 0.5
    found = [c for c in next(coordinates(check_config(config, "depth", 4), "depth", 4, (0,), 0, tokens())) if c.quantity == EPSILON]
    assert {c.role for c in found} == set(expected)
    for c in found:
        assert c.value == pytest.approx(expected[c.role], rel=1e-3), c.kind


def test_an_activation_that_is_shown_twice_is_refused():
    class Twice(nnx.Module):
        def __call__(self, tokens_BxL, tap):
            tap("hidden", tokens_BxL)
            tap("hidden", tokens_BxL)

    with pytest.raises(ValueError, match="'hidden' twice"):
        shown(Twice(), tokens())


def test_the_conditions_of_a_check():
    config = config_of(model__compute_dtype="bfloat16", optimizer__weight_decay=0.1, train__accumulation=2)
    config.schedule.name, config.schedule.warmup_tokens = "cosine", 64
    config.mesh.fsdp, config.mesh.replica = -1, 2
    before = config.to_json()
    checked = check_config(config, "width", 48, lr=0.125)
    assert config.to_json() == before
    assert (checked.model.width, checked.model.depth, checked.model.head_dim) == (48, 1, 8)
    assert (checked.optimizer.lr, checked.optimizer.weight_decay) == (0.125, 0.0)
    assert (checked.schedule.name, checked.schedule.warmup_tokens, checked.train.accumulation) == ("constant", 0, 1)
    assert (checked.parametrization.output_init, checked.parametrization.query_init) == ("zero", "normal")
    assert checked.model.compute_dtype == "float32" and set(checked.mesh.values()) == {1}
    assert checked.parametrization.base_width == 16  # the base stays where it is
    assert check_config(config, "depth", 5).model.depth == 5
    assert check_config(config, "depth", 5).optimizer.lr == LR


def test_with_heads_it_is_head_dim_that_grows():
    for width in (16, 64):
        checked = check_config(config_of(), "width", width, heads=2)
        assert checked.model.width // checked.model.head_dim == 2
        assert checked.parametrization.query_init == "zero" and checked.parametrization.base_head_dim == 8


def test_grouped_heads_have_the_attention_scale_that_the_table_says():
    """Their logits are over the key head that each query head shares with its neighbours."""
    config = check_config(small_config(model__kv_heads=1, model__dropout=0.5), "width", 32)
    config.parametrization.base_head_dim, config.model.head_dim = 4, 8
    (first,) = coordinates(config, "width", 32, [0], 1, tokens(), Transformer)
    scale = next(c.value for c in first if c.kind == "attention scale")
    assert scale == pytest.approx(4**0.5 / 8, rel=1e-4)
    assert config.model.dropout == 0
