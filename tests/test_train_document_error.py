"""The standard error over documents: against a plain loop, and against the spread of many draws of documents."""

import numpy as np
import pytest

from scaling_jax.train.document_error import RatioByDocument


def by_hand(values, weights, documents):
    """Ratio, standard error and number of documents, one after the other."""
    ids = sorted(set(documents))
    s = [sum(v for v, d in zip(values, documents, strict=True) if d == i) for i in ids]
    w = [sum(v for v, d in zip(weights, documents, strict=True) if d == i) for i in ids]
    ratio = sum(s) / sum(w)
    squares = sum((a - ratio * b) ** 2 for a, b in zip(s, w, strict=True))
    return ratio, np.sqrt(len(ids) / (len(ids) - 1) * squares) / sum(w) if len(ids) > 1 else np.nan, len(ids)


@pytest.mark.parametrize("pieces", [[60], [1] * 60, [7, 0, 20, 33]])
def test_columns_in_pieces_agree_with_a_loop(pieces):
    rng = np.random.default_rng(0)
    values, weights = rng.normal(3, 1, (60, 5)), rng.integers(0, 4, (60, 5)).astype(float)
    documents = np.cumsum(rng.random((60, 5)) < [0.5, 0.2, 0.05, 0.0, 1.0], axis=0) * 3 + 7  # one column is a single document
    ratio = RatioByDocument(5)
    for start, stop in zip(np.cumsum([0, *pieces]), np.cumsum(pieces), strict=False):
        ratio.add(values[start:stop], weights[start:stop], documents[start:stop])
    expected = [by_hand(*(x[:, c] for x in (values, weights, documents))) for c in range(5)]
    for found, wanted in zip(ratio.read(), zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert np.isnan(ratio.read()[1][3]) and not np.isnan(ratio.read()[0][3])


def test_nothing_is_unknown_and_equal_losses_have_no_error():
    ratio = RatioByDocument()
    assert np.isnan(ratio.read()[0][0]) and np.isnan(ratio.read()[1][0]) and ratio.read()[2][0] == 0
    ratio.add(np.full((9, 1), 1.7), np.ones((9, 1)), np.arange(9)[:, None] // 2)
    (value,), (error,), (documents,) = ratio.read()
    assert (round(value, 12), documents) == (1.7, 5) and error < 1e-8


@pytest.mark.parametrize("long_ones_are_harder", [0.0, 0.3])
def test_the_error_is_the_spread_over_draws_of_documents(long_ones_are_harder):
    """Documents of lengths 5 to 200, each with an effect of its own that may go with its length; a column is a draw of 80."""
    rng = np.random.default_rng(1)
    draws, count = 500, 80
    length_DxR = np.clip(np.exp(rng.normal(3, 0.8, (count, draws))), 5, 200).astype(int)
    effect_DxR = 2 + 0.5 * rng.normal(size=(count, draws)) + long_ones_are_harder * (np.log(length_DxR) - 3)
    rows = length_DxR.sum(0).max()
    ids = [np.repeat(np.arange(count), length_D) for length_D in length_DxR.T]
    document_NxR = np.stack([np.pad(document, (0, rows - len(document)), mode="edge") for document in ids], axis=1)
    weight_NxR = (np.arange(rows)[:, None] < length_DxR.sum(0)[None]).astype(float)
    value_NxR = weight_NxR * (np.take_along_axis(effect_DxR, document_NxR, 0) + rng.normal(size=document_NxR.shape))
    ratio = RatioByDocument(draws)
    ratio.add(value_NxR, weight_NxR, document_NxR)
    loss_R, error_R, _ = ratio.read()
    spread = loss_R.std(ddof=1)
    assert 0.9 < np.sqrt(np.mean(error_R**2)) / spread < 1.1
    tokens_R = weight_NxR.sum(0)
    over_tokens_R = np.sqrt((value_NxR**2).sum(0) / tokens_R - loss_R**2) / np.sqrt(tokens_R)  # as if all were independent
    assert over_tokens_R.max() < 0.45 * spread
    inside = np.abs(loss_R - effect_and_length(long_ones_are_harder)) < 1.96 * error_R
    assert 0.9 < inside.mean() < 0.98


def effect_and_length(slope):
    """Mean effect of a token: over many documents, weighted by their length."""
    rng = np.random.default_rng(2)
    length = np.clip(np.exp(rng.normal(3, 0.8, 400_000)), 5, 200).astype(int)
    return np.average(2 + slope * (np.log(length) - 3), weights=length)
