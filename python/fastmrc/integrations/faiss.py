"""Approximate search over large corpora by FAISS (extra ``faiss``)."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastmrc.errors import InputError
from fastmrc.retrieval import check_matrix

__all__ = ["faiss_index"]

# Rows that are handed over at once, as float32.
_ROWS = 65_536
# Rows that an index is trained on, spread evenly: FAISS draws no more for 1,000 centroids.
_TRAINING_ROWS = 256_000


def faiss_index(corpus: Any, factory: str = "HNSW32") -> Any:
    """Build a FAISS index of vectors for inner products.

    Parameters
    ----------
    corpus
        [m, d], float32 or float16, such as `fastmrc.SimilarityModel.encode` gives; memory-mapped
        arrays are read in blocks.
    factory
        Kind of index as `faiss.index_factory` takes it, such as ``"HNSW32"`` or
        ``"IVF1024,PQ48"``.

    Returns
    -------
    faiss.Index
        Trained and filled; ``scores, ids = index.search(model.encode(texts), k)``.

    Raises
    ------
    InputError
        If FAISS is not installed, does not know the kind of index, or the vectors do not fit.
    TypeError
        For another dtype.
    """
    try:
        import faiss
    except ImportError:
        raise InputError("faiss_index: expected FAISS: pip install 'fastmrc[faiss]'") from None
    vectors = check_matrix("corpus", corpus)
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise InputError(
            f"factory: expected an index that FAISS can make of {vectors.shape[1]} numbers, got "
            f"{factory!r}"
        ) from None
    if not index.is_trained:
        step = max(1, len(vectors) // _TRAINING_ROWS)
        try:
            index.train(np.ascontiguousarray(vectors[::step], dtype=np.float32))
        except RuntimeError:
            raise InputError(
                f"corpus: expected enough vectors to train {factory!r}, got {len(vectors)}"
            ) from None
    for begin in range(0, len(vectors), _ROWS):
        index.add(np.ascontiguousarray(vectors[begin : begin + _ROWS], dtype=np.float32))
    return index
