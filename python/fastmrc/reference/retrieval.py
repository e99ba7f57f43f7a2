"""Search for the largest inner products by brute force."""

from __future__ import annotations

from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from fastmrc.reference._checks import require_int, to_numpy

__all__ = ["search_vectors"]


def search_vectors(
    queries: Any, corpus: Any, k: SupportsIndex
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the `k` rows of a corpus with the largest inner products with each query.

    Parameters
    ----------
    queries, corpus
        [n, d] and [m, d], floating point; finite.
    k
        At least 1; what is missing is padded.

    Returns
    -------
    ids
        int64 [n, k]; -1 where there are no more rows.
    scores
        float64 [n, k], falling, equal ones by rising id; -inf where there are no more rows. Rows
        are added up one by one, so that equal rows have equal scores.
    """
    k = require_int("k", k, 1)
    asked, entries = to_numpy(queries).astype(np.float64), to_numpy(corpus).astype(np.float64)
    ids = np.full((len(asked), k), -1, dtype=np.int64)
    scores = np.full((len(asked), k), -np.inf)
    for q, query in enumerate(asked):
        products = (entries * query).sum(axis=1)
        best = np.lexsort((np.arange(len(entries)), -products))[:k]
        ids[q, : len(best)] = best
        scores[q, : len(best)] = products[best]
    return ids, scores
