"""The course of a group, piece by piece."""

import math

import numpy as np
from etils import epath

from scaling_jax.curves import Curves, Step, noise_due, read


def step(number, noise=False):
    noise_Mx3 = np.array([[number, 1.0, math.inf], [2.0 * number, np.nan, np.nan]]) if noise else None
    return Step(number, 10 * number, np.float32([number, -number]), np.float32([1.0, np.nan]), noise_Mx3)


def written(path, numbers, pieces=(3, 5)):
    curves = Curves(epath.Path(path), ["a", "b"], 0)
    for number in numbers:
        curves.add(step(number, noise=number % 2 == 0))
        if number in pieces:
            curves.write()
    return curves


def test_pieces_hold_every_step_and_the_noise_that_was_kept(tmp_path):
    written(tmp_path, range(1, 6))
    pieces = list(read(epath.Path(tmp_path)))
    assert [list(piece["step_S"]) for piece in pieces] == [[1, 2, 3], [4, 5]]
    assert list(pieces[1]["trajectories"]) == ["a", "b"]
    np.testing.assert_array_equal(pieces[1]["loss_SxM"], [[4, -4], [5, -5]])
    np.testing.assert_array_equal(pieces[1]["noise_tokens_K"], [40])
    np.testing.assert_array_equal(pieces[1]["noise_KxMx3"], [[[4, 1, math.inf], [8, np.nan, np.nan]]])


def test_the_last_losses_are_those_on_disk_and_those_that_wait(tmp_path):
    curves = written(tmp_path, range(1, 8))
    np.testing.assert_array_equal(curves.last(5), [[n, -n] for n in (3, 4, 5, 6, 7)])
    np.testing.assert_array_equal(curves.last(1), [[7, -7]])
    assert curves.last(100).shape == (7, 2)


def test_the_last_losses_of_a_decay_are_its_own_and_before_them_its_trunks(tmp_path):
    written(tmp_path / "trunk", range(1, 6))
    decay = Curves(epath.Path(tmp_path / "decay"), ["a", "b"], 40, (epath.Path(tmp_path / "trunk"), 40))
    for number in (50, 60):
        decay.add(step(number))
    np.testing.assert_array_equal(decay.last(4), [[n, -n] for n in (3, 4, 50, 60)])


def test_what_came_after_the_checkpoint_is_cut_off(tmp_path):
    written(tmp_path, range(1, 6))
    again = Curves(epath.Path(tmp_path), ["a", "b"], 30)
    assert [piece["tokens_S"][-1] for piece in read(epath.Path(tmp_path))] == [30]
    again.add(step(4))
    np.testing.assert_array_equal(again.last(9), [[n, -n] for n in (1, 2, 3, 4)])


def test_noise_is_kept_evenly_over_the_logarithm_of_tokens():
    kept = np.array([tokens for tokens in range(8, 1 << 16, 8) if noise_due(tokens - 8, tokens)])
    late = kept[kept >= 1 << 12]
    assert abs(len(late) - 4 * 64) <= 1
    assert np.diff(np.log2(late)).max() < 2 / 64 + 8 / (1 << 12)
