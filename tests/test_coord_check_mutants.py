"""Every known way to get the parametrization wrong is caught, and the right one never flagged.

Small sizes, so that all of them fit in a test; the tolerances are those of `scaling-jax coord-check`. benchmarks/coord_check.py does the
same at the sizes of the documentation.
"""

import functools

import jax
import pytest
from helpers import small_config
from jax.experimental.compilation_cache import compilation_cache
from mutants import LARGE_EPS, MUTANTS

from scaling_jax.coord_check.measure import PROBED, Coordinate, check_config, coordinates
from scaling_jax.coord_check.verdict import Expected, passed, slopes, worst
from scaling_jax.data.corpus import open_run_data
from scaling_jax.model import Transformer

SIZES = {"width": (32, 64, 128), "heads": (32, 64, 128), "depth": (2, 8, 32)}
STEPS, SEEDS = 5, 4


@pytest.fixture(scope="module", autouse=True)
def _shared_programs(quick_compilation, tmp_path_factory):
    """Mutants of an lr share their compiled programs."""
    directory, least = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()


def config_of(name="mup", **fields):
    fields = {"parametrization__name": name} | fields
    config = small_config(model__width=32, model__head_dim=8, optimizer__lr=4e-3, **fields)
    config.parametrization.base_width = 32
    return config


@functools.cache
def tokens():
    return open_run_data(config_of()).train.batch(0, 16)


def measured(config, varied="width", seeds=SEEDS, model=Transformer) -> list[Coordinate]:
    axis, heads, found = ("depth" if varied == "depth" else "width"), (2 if varied == "heads" else 0), []
    for size in SIZES[varied]:
        for values in coordinates(check_config(config, axis, size, heads=heads), axis, size, range(seeds), STEPS, tokens(), model):
            found += values
    return found


# One for each way of being caught, and for each axis; the others, ten seconds each, are slow. test_docs forgets the output multiplier.
QUICK = {
    "standard with μP init", "1/sqrt(head_dim) attention", "tied embedding like hidden", "hidden lr divided twice",
    "weight decay not compensated", "epsilon not scaled", "residual branch unscaled",
}  # fmt: skip


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS])
def test_caught(name):
    model, fields, varied = MUTANTS[name]
    expected = Expected(tied_embeddings="model__tied_embeddings" in fields, growing_heads=varied == "heads")
    rows = slopes(measured(config_of(**fields), varied, model=model), expected)
    assert not passed(rows), f"{name} passed; nearest to its tolerance: {max(worst(rows), key=lambda row: row.off)}"
    if name == "epsilon not scaled, and large":  # in training itself, where it matters
        assert any(row.ok is False for row in rows if row.quantity == "update")


@pytest.mark.parametrize(
    ("name", "fields", "varied", "expected"),
    [
        ("mup", {"model__biases": True, "model__mlp": "swiglu", "parametrization__query_init": "zero"}, "width", Expected()),
        ("mup", {"model__tied_embeddings": True}, "width", Expected(tied_embeddings=True)),
        ("mup", {}, "heads", Expected(growing_heads=True)),
        pytest.param("mup", LARGE_EPS, "width", Expected(), marks=pytest.mark.slow),
        pytest.param("mup", {"optimizer__decay_mode": "coupled"}, "width", Expected(coupled_decay=True), marks=pytest.mark.slow),
        pytest.param("completep", {"model__biases": True}, "width", Expected(), marks=pytest.mark.slow),
        ("completep", {"model__biases": True}, "depth", Expected()),
        pytest.param("completep", {"parametrization__depth_exponent": 0.5}, "depth", Expected(depth_exponent=0.5), marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(key.split("__")[1] for key in value) or "plain" if isinstance(value, dict) else str(value)[:9],
)
def test_the_right_one_passes(name, fields, varied, expected):
    rows = slopes(measured(config_of(name, **fields), varied), expected)
    assert passed(rows), [row for row in worst(rows) if not row.ok]


@pytest.mark.slow
@pytest.mark.parametrize("sets", [20])
@pytest.mark.parametrize("varied", ["width", "depth"])
def test_the_right_one_is_never_flagged(varied, sets):
    """Over 20 seeds, and over 20 sets of seeds."""
    everything = measured(config_of("completep"), varied, seeds=sets * SEEDS)
    for first in range(0, sets * SEEDS, SEEDS):
        chosen = [c for c in everything if first <= c.seed < first + SEEDS or c.quantity in PROBED]
        rows = slopes(chosen, Expected())
        assert passed(rows), (first, [row for row in worst(rows) if not row.ok])


# In depth it is as one with its residual branch unscaled, which is caught above.
@pytest.mark.parametrize("varied", ["width", pytest.param("depth", marks=pytest.mark.slow)])
def test_standard_fails_both_in_width_and_depth(varied):
    rows = slopes(measured(config_of("standard"), varied), Expected())
    failed = {(row.quantity, row.kind) for row in worst(rows) if not row.ok}
    assert ("change", "residual 4/4") in failed and not passed(rows)
