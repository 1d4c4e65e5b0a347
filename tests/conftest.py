"""Every test runs with strict rank and dtype promotion, and leaves the user's caches alone."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

pytest.register_assert_rewrite("shells")
from shells import config_file, handlers_stay, shell, small_disk, tokens  # noqa: E402, F401 (for tests of the command line)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """One cache for all workers of the session: the built-in corpus and compiled programs are made once."""
    from scaling_jax.process import use_compilation_cache

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    use_compilation_cache()
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that run for a fraction of the time that it takes to optimize them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def full_compilation(quick_compilation):
    """In a module of quick programs, for a test of what the optimized ones do."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
