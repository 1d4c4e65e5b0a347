"""Checkpoints: what is kept, what a damaged one leads to, and that a save is what the state was when it began."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.errors import UserError
from scaling_jax.train.checkpoint import SET_ASIDE, Checkpoints


def state(value):
    return {"a": jnp.full((300, 200), value, jnp.float32), "n": jnp.int32(value)}


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def save_all(folder, tokens, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for t in tokens:
            checkpoints.save(t, state(t))


def test_round_trip_is_exact(tmp_path):
    save_all(tmp_path, [128])
    with Checkpoints(tmp_path) as checkpoints:
        tokens, found = checkpoints.restore_latest(ABSTRACT, print)
    assert tokens == 128
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(state(128)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_newest_and_the_chosen_ones_are_kept(tmp_path):
    """Of each chosen token count the first checkpoint at or after it stays, whatever comes later."""
    save_all(tmp_path, range(100, 1100, 100), keep_latest=2, keep_at_tokens=(250, 400))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.tokens() == [300, 400, 900, 1000]


def test_no_checkpoint_is_none(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(ABSTRACT, print) is None


def test_save_keeps_the_values_although_the_state_is_donated_at_once(tmp_path):
    """An asynchronous save that reads the arrays after the next step has reused their memory would store that step's."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep_latest=20) as checkpoints:
        for tokens in range(1, 11):
            now = state(tokens)
            checkpoints.save(tokens, now)
            for _ in range(5):
                now = step(now)
        checkpoints.wait()
        for tokens in range(1, 11):
            found = checkpoints.restore(tokens, ABSTRACT)
            assert (np.asarray(found["a"]) == tokens).all() and int(found["n"]) == tokens


def damage(folder, how):
    """Spoils every data file of a checkpoint."""
    for path in folder.rglob("*"):
        if path.is_file() and (how == "delete" or path.stat().st_size > 0):
            if how == "truncate":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            elif how == "delete" and "manifest" in path.name:
                path.unlink()


@pytest.mark.parametrize("how", ["truncate", "delete"])
def test_an_unreadable_checkpoint_is_named_and_the_one_before_it_used(tmp_path, how):
    save_all(tmp_path, [100, 200, 300], keep_latest=3)
    damage(tmp_path / "checkpoints" / "300", how)
    said = []
    with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
        tokens, found = checkpoints.restore_latest(ABSTRACT, said.append)
        assert tokens == 200 and int(found["n"]) == 200
        checkpoints.save(300, state(301))  # the run comes to the same place again
        checkpoints.wait()
        assert int(checkpoints.restore(300, ABSTRACT)["n"]) == 301
    assert len(said) == 1 and "checkpoints/300 cannot be read" in said[0] and "200 tokens" in said[0]
    assert (tmp_path / SET_ASIDE / "300").is_dir()


def test_when_none_can_be_read_the_run_does_not_start_over_by_itself(tmp_path):
    save_all(tmp_path, [100, 200])
    for tokens in ("100", "200"):
        damage(tmp_path / "checkpoints" / tokens, "truncate")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no checkpoint can be read.*200.*100"):
        checkpoints.restore_latest(ABSTRACT, print)
    assert (tmp_path / "checkpoints" / "200").is_dir()


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    """What a kill in the middle of a save leaves behind is cleaned up, not restored."""
    save_all(tmp_path, [100])
    (tmp_path / "checkpoints" / "200.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.tokens() == [100]
        assert checkpoints.restore_latest(ABSTRACT, print)[0] == 100


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    import collections
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("Usage", "total used free")(10**9, 10**9, 1000))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no space left for a checkpoint: 0.2 MB needed"):
        checkpoints.save(100, state(1))
    assert not list((tmp_path / "checkpoints").iterdir())
