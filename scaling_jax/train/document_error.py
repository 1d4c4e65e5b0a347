"""Means over tokens, and how far they can be trusted: a standard error over documents.

The tokens of a document are alike, and in evaluation blocks they lie side by side: counted as so many independent losses they would
promise a precision that is not there. A document is a cluster, drawn as a whole. With s_d the sum of a document's losses and w_d its
weight, tokens or bytes, R = Σs_d / Σw_d is a ratio of two sums over D documents, and by linearization

    se² = D/(D − 1) · Σ(s_d − R·w_d)² / (Σw_d)²

(Cochran 1977, Sampling Techniques, chapter 6; with weights that count tokens the cluster-robust variance of a mean, Liang & Zeger 1986).
"""

import numpy as np


class RatioByDocument:
    """Σ values / Σ weights of each of some columns with its standard error, over rows that come piece by piece in the order of documents.

    Kept are sums and, of each column, the document that is not complete yet: the memory does not grow with rows or documents.
    """

    def __init__(self, columns: int = 1):
        self._open = np.zeros((2, columns))  # values, weights of the last document
        self._open_document = np.full(columns, -1)
        self._sums = np.zeros((6, columns))  # over the documents before it: of 1, s, w, s², s·w, w²

    def add(self, values_NxC: np.ndarray, weights_NxC: np.ndarray, documents_NxC: np.ndarray) -> None:
        """Adds rows.

        Args:
          values_NxC: losses, or what else is to be averaged.
          weights_NxC: what each counts for.
          documents_NxC: which document each is of; never descending down a column, from one call to the next either.
        """
        rows, columns = documents_NxC.shape
        if rows == 0:
            return
        begun_C = self._open_document >= 0
        carried_C = np.where(begun_C, self._open_document, documents_NxC[0])
        # One column after the other, each headed by the document that was left open.
        documents = np.vstack([carried_C, documents_NxC]).T.reshape(-1)
        first_row = np.arange(len(documents)) % (rows + 1) == 0
        starts = np.flatnonzero(first_row | np.concatenate([[True], documents[1:] != documents[:-1]]))
        s, w = (
            np.add.reduceat(np.vstack([carried, new]).astype(np.float64).T.reshape(-1), starts)
            for carried, new in zip(self._open, (values_NxC, weights_NxC), strict=True)
        )
        column = starts // (rows + 1)
        last = np.concatenate([column[1:] != column[:-1], [True]])
        for total, moment in zip(self._sums, _moments(s, w), strict=True):
            total += np.bincount(column[~last], moment[~last], columns)
        self._open, self._open_document = np.stack([s[last], w[last]]), documents[starts[last]]

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ratio, standard error, documents) of every column, [C] each; nan where there is nothing, an error with one document too."""
        begun_C = self._open_document >= 0
        documents, s, w, ss, sw, ww = self._sums + np.where(begun_C, _moments(*self._open), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = s / w
            squares = np.maximum(ss - 2 * ratio * sw + ratio**2 * ww, 0.0)  # of s_d − R·w_d
            error = np.sqrt(np.where(documents > 1, documents / (documents - 1), np.nan) * squares) / w
        return ratio, error, documents.astype(np.int64)


def _moments(s: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(s), s, w, s * s, s * w, w * w])
