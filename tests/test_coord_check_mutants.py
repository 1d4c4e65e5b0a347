"""Every known way to get the parametrization wrong is caught, and the right one never flagged.

Each mutant is a table, or a model, that differs in one thing. Small sizes, so that all of them fit in a test; the tolerances are
those of `scaling-jax coord-check`. benchmarks/coord_check.py does the same at the sizes of the documentation.
"""

import dataclasses
import functools

import jax
import pytest
from helpers import small_config
from jax.experimental.compilation_cache import compilation_cache

from scaling_jax.coord_check.measure import DECAY, Coordinate, check_config, coordinates
from scaling_jax.coord_check.verdict import Expected, passed, slopes, worst
from scaling_jax.data.corpus import open_run_data
from scaling_jax.model import Transformer
from scaling_jax.parametrization import Parametrization

WIDTHS, DEPTHS, STEPS, SEEDS = (32, 64, 128), (2, 8, 32), 5, 4


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation(tmp_path_factory):
    """These programs run for a fraction of the time that it takes to optimize them, and mutants of an lr share theirs."""
    directory, least = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()


@functools.cache
def tokens():
    return open_run_data(config_of()).train.batch(0, 16)


def config_of(name="mup", **fields):
    config = small_config(model__width=32, model__head_dim=8, parametrization__name=name, optimizer__lr=4e-3, **fields)
    config.parametrization.base_width = 32
    return config


def measured(config, axis="width", sizes=WIDTHS, seeds=range(SEEDS), heads=0, model=Transformer) -> list[Coordinate]:
    found = []
    for size in sizes:
        for values in coordinates(check_config(config, axis, size, heads=heads), axis, size, seeds, STEPS, tokens(), model):
            found += values
    return found


def mutant(change=None, **methods):
    """A Transformer whose parametrization passes every rule through `change(self, role, rule, sizes)`, or has other `methods`."""

    class Wrong(Parametrization):
        def rule(self, role, **sizes):
            right = super().rule(role, **sizes)
            return change(self, role, right, sizes) if change else right

    for name, method in methods.items():
        setattr(Wrong, name, method)
    return lambda config, parametrization, rngs: Transformer(config, Wrong(**dataclasses.asdict(parametrization)), rngs=rngs)


def of(parametrization, name, role, sizes):
    """The rule that another table gives."""
    return Parametrization(**dataclasses.asdict(parametrization) | {"name": name}).rule(role, **sizes)


def m(sizes):
    return sizes["fan_in"] / sizes["base_fan_in"]


def n(parametrization, sizes):
    return sizes["width"] / parametrization.base_width


def init_only(p, role, rule, sizes):
    return of(p, "standard", role, sizes)._replace(init_std=rule.init_std)


def lr_only(p, role, rule, sizes):
    return of(p, "standard", role, sizes)._replace(lr=rule.lr, weight_decay=rule.weight_decay)


def no_output_multiplier(p, role, rule, sizes):
    return rule._replace(multiplier=1.0)


def output_multiplier_twice(p, role, rule, sizes):
    return rule._replace(multiplier=rule.multiplier**2)


def hidden_lr_twice(p, role, rule, sizes):
    return rule._replace(lr=rule.lr**2, weight_decay=1 / rule.lr**2 if rule.weight_decay else 0.0)


def embedding_lr_scaled(p, role, rule, sizes):
    return rule._replace(lr=rule.lr / n(p, sizes), weight_decay=n(p, sizes)) if role == "embedding" else rule


def one_kind_ignored(p, role, rule, sizes):
    is_mlp_out = role == "hidden" and sizes["base_fan_in"] != p.base_width
    return of(p, "standard", role, sizes) if is_mlp_out else rule


def tied_like_hidden(p, role, rule, sizes):
    return rule._replace(init_std=rule.init_std * n(p, sizes) ** -0.5) if role == "tied" else rule


def tied_grows(p, role, rule, sizes):
    return rule._replace(init_std=rule.init_std * n(p, sizes) ** 0.5) if role == "tied" else rule


def decay_not_compensated(p, role, rule, sizes):
    return rule._replace(weight_decay=min(rule.weight_decay, 1.0)) if m(sizes) > 1 else rule._replace(weight_decay=1.0)


def eps_not_scaled(p, role, rule, sizes):
    return rule._replace(eps=1.0)


def bias_lr_scaled(p, role, rule, sizes):
    return rule._replace(lr=rule.lr / n(p, sizes)) if role == "vector" else rule


def hidden_lr_over_depth(p, role, rule, sizes):
    return rule._replace(lr=rule.lr * p.base_depth / sizes["depth"]) if role in ("hidden", "query") else rule


HEADS = {"heads": 2}
DEPTH = {"axis": "depth", "sizes": DEPTHS}
# Where Adam's epsilon matters: at or above the gradients' entries, whose mean size is about 1e-3 at these sizes.
LARGE_EPS = {"optimizer__eps": 3e-3}
MUTANTS = {
    "standard with μP init": (mutant(init_only), {}, {}),
    "standard with μP lr": (mutant(lr_only), {}, {}),
    "no output multiplier": (mutant(no_output_multiplier), {}, {}),
    "output multiplier twice": (mutant(output_multiplier_twice), {}, {}),
    "hidden lr divided twice": (mutant(hidden_lr_twice), {}, {}),
    "1/sqrt(head_dim) attention": (mutant(attention_scale=lambda self, head_dim: head_dim**-0.5), {}, HEADS),
    "embedding lr scaled": (mutant(embedding_lr_scaled), {}, {}),
    "one kind of layer ignored": (mutant(one_kind_ignored), {}, {}),
    "tied embedding like hidden": (mutant(tied_like_hidden), {"model__tied_embeddings": True}, {}),
    "tied embedding grows": (mutant(tied_grows), {"model__tied_embeddings": True}, {}),
    "weight decay not compensated": (mutant(decay_not_compensated), {}, {}),
    "epsilon not scaled": (mutant(eps_not_scaled), LARGE_EPS, {}),
    "hidden bias lr scaled": (mutant(bias_lr_scaled), {"model__biases": True}, {}),
    "residual branch unscaled": (mutant(residual_multiplier=lambda self, depth: 1.0), {"name": "completep"}, DEPTH),
    "hidden lr over depth": (mutant(hidden_lr_over_depth), {"name": "completep"}, DEPTH),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_caught(name):
    model, fields, how = MUTANTS[name]
    expected = Expected(tied_embeddings="model__tied_embeddings" in fields, growing_heads="heads" in how)
    rows = slopes(measured(config_of(**fields), **how, model=model), expected)
    assert not passed(rows), f"{name} passed; nearest to its tolerance: {max(worst(rows), key=lambda row: row.off)}"


@pytest.mark.parametrize(
    ("fields", "how", "expected"),
    [
        ({}, {}, Expected()),
        ({"model__biases": True, "model__mlp": "swiglu", "parametrization__query_init": "zero"}, {}, Expected()),
        ({"model__tied_embeddings": True}, {}, Expected(tied_embeddings=True)),
        ({}, HEADS, Expected(growing_heads=True)),
        (LARGE_EPS, {}, Expected()),
        ({"optimizer__decay_mode": "coupled"}, {}, Expected(coupled_decay=True)),
        ({"name": "completep", "model__biases": True}, {}, Expected()),
        ({"name": "completep", "model__biases": True}, DEPTH, Expected()),
        ({"name": "completep", "parametrization__depth_exponent": 0.5}, DEPTH, Expected(depth_exponent=0.5)),
    ],
    ids=lambda value: "-".join(map(str, value)) or "plain" if isinstance(value, dict) else None,
)
def test_the_right_one_passes(fields, how, expected):
    rows = slopes(measured(config_of(**fields), **how), expected)
    assert passed(rows), [row for row in worst(rows) if not row.ok]


@pytest.mark.parametrize("sets", [5, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [{}, DEPTH], ids=["width", "depth"])
def test_the_right_one_is_never_flagged(how, sets):
    """Over 20 seeds, and over 20 sets of seeds."""
    everything = measured(config_of("completep"), seeds=range(sets * SEEDS), **how)
    for first in range(0, sets * SEEDS, SEEDS):
        chosen = [c for c in everything if first <= c.seed < first + SEEDS or c.quantity == DECAY]
        rows = slopes(chosen, Expected())
        assert passed(rows), (first, [row for row in worst(rows) if not row.ok])


@pytest.mark.parametrize("how", [{}, DEPTH], ids=["width", "depth"])
def test_standard_fails_both_in_width_and_depth(how):
    rows = slopes(measured(config_of("standard"), **how), Expected())
    failed = {(row.quantity, row.kind) for row in worst(rows) if not row.ok}
    assert ("change", "residual 4/4") in failed and not passed(rows)
