"""Exact search for the vectors with the largest inner products.

A block of the corpus at a time is multiplied with the queries in float32, and the best entries of
each query are kept, 16 more than asked for. Those are scored again in float64, which decides. Where
rounding could have kept out an entry that belongs to the best, the query is searched again in
float64, so the result is that of float64 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fastmrc import _C
from fastmrc._build import follow_torch
from fastmrc.errors import InputError

__all__ = ["SearchHits", "check_matrix", "search_vectors"]

# Scores of so many queries and corpus rows are held at once: 8 MB, which stay in a cache.
_QUERY_ROWS = 512
_CORPUS_ROWS = 4096
# Candidates beyond k that are scored again.
_SPARE = 16
# Queries that are searched for again together.
_RESEARCHED = 64
# Of float32: rounding, what a product that is too small loses, and the largest sum that is safe.
_UNIT, _LEAST, _LARGEST = 2.0**-24, 2.0**-126, 2.0**127


class SearchHits(NamedTuple):
    """The best entries of each query.

    Attributes
    ----------
    ids
        int64 [queries, k], rows of the corpus; -1 where there are no more.
    scores
        float32 [queries, k], inner products, falling, equal ones by rising id; -inf where there are
        no more.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]


def search_vectors(queries: Any, corpus: Any, k: int, *, progress: bool = False) -> SearchHits:
    """Find the `k` rows of a corpus with the largest inner products with each query.

    Parameters
    ----------
    queries
        [n, d], float32 or float16, NumPy or torch on the CPU.
    corpus
        [m, d], likewise; a memory-mapped array is read block by block, as a rule once.
    k
        At least 1; what is missing is padded.
    progress
        Whether to show a progress bar on stderr.

    Returns
    -------
    SearchHits
        Equal to a search in float64. The same for any number of threads.

    Raises
    ------
    InputError
        For shapes that do not fit, `k` below 1, NaN, infinity, or numbers so large that products
        leave the range of float32.
    TypeError
        For another dtype.
    """
    asked, entries = check_matrix("queries", queries), check_matrix("corpus", corpus)
    if asked.shape[1] != entries.shape[1]:
        raise InputError(
            f"corpus: expected vectors of {asked.shape[1]} numbers as the queries, got "
            f"{entries.shape[1]}"
        )
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"k: expected an integer, got {type(k).__name__}")
    if k < 1:
        raise InputError(f"k: expected at least 1, got {k}")
    follow_torch()
    rows = torch.from_numpy(np.array(asked, dtype=np.float32))
    norms = torch.linalg.vector_norm(rows.double(), dim=1).numpy()
    if not np.isfinite(norms).all():
        raise InputError("queries: expected finite numbers, got NaN or infinity")
    ids, scores, largest_norm = _candidates(rows, entries, int(k) + _SPARE, progress)
    if norms.max(initial=0.0) * largest_norm > _LARGEST:
        raise InputError("corpus: expected inner products within the range of float32")
    exact = _C.inner_products(rows, entries, ids) if len(entries) else scores.astype(np.float64)
    order = np.lexsort((ids, -exact), axis=-1)
    ids, exact = np.take_along_axis(ids, order, axis=1), np.take_along_axis(exact, order, axis=1)
    if len(entries) > ids.shape[1]:
        # Sums of d products in float32, in any order, are off by at most this (Higham 2002, 3.1).
        d = asked.shape[1]
        gamma = d * _UNIT / (1 - d * _UNIT)
        bound = gamma * norms * largest_norm + d * _LEAST
        unsure = np.flatnonzero(exact[:, k - 1] <= scores[:, -1].astype(np.float64) + bound)
        for first in range(0, len(unsure), _RESEARCHED):
            part = unsure[first : first + _RESEARCHED]
            best = _exhaustive(rows[part], entries, exact[part, k - 1], int(k))
            ids[part, :k], exact[part, :k] = best
    hits = SearchHits(
        np.full((len(ids), k), -1, np.int64), np.full((len(ids), k), -np.inf, np.float32)
    )
    found = min(int(k), len(entries))
    hits.ids[:, :found], hits.scores[:, :found] = ids[:, :found], exact[:, :found]
    return hits


def check_matrix(name: str, vectors: Any) -> NDArray[np.floating]:
    """Return vectors as a NumPy array [n, d] without a copy; refuse other shapes and dtypes."""
    if isinstance(vectors, torch.Tensor):
        if vectors.device.type != "cpu":
            raise InputError(f"{name}: expected vectors on the CPU, got {vectors.device}")
        vectors = vectors.detach()
        vectors = (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()
    if not isinstance(vectors, np.ndarray):
        raise TypeError(f"{name}: expected an array of vectors, got {type(vectors).__name__}")
    if vectors.dtype not in (np.float32, np.float16):
        raise TypeError(f"{name}: expected float32 or float16, got {vectors.dtype}")
    if vectors.ndim != 2 or vectors.shape[1] < 1:
        raise InputError(f"{name}: expected shape [n, d], got {list(vectors.shape)}")
    if vectors.shape[1] > 1 and len(vectors) and vectors.strides[1] != vectors.itemsize:
        raise InputError(
            f"{name}: expected vectors that are contiguous in memory (numpy.ascontiguousarray)"
        )
    return vectors


def _blocks(corpus: NDArray[np.floating]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row and the rows of each block, float32."""
    ready = corpus.dtype == np.float32 and corpus.flags.c_contiguous and corpus.flags.writeable
    buffer = None if ready else np.empty((_CORPUS_ROWS, corpus.shape[1]), np.float32)
    for begin in range(0, len(corpus), _CORPUS_ROWS):
        block = corpus[begin : begin + _CORPUS_ROWS]
        if buffer is not None:  # torch takes neither read-only nor float16 arrays here
            np.copyto(buffer[: len(block)], block)
            block = buffer[: len(block)]
        yield begin, torch.from_numpy(block)


def _candidates(
    queries: torch.Tensor, corpus: NDArray[np.floating], count: int, progress: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32], float]:
    """Return ids and scores [n, min(count, m)] of the best by float32 and the largest norm of a
    row of the corpus."""
    count = min(count, max(1, len(corpus)))
    ids = np.full((len(queries), count), -1, dtype=np.int64)
    scores = np.full((len(queries), count), -np.inf, dtype=np.float32)
    # On request torch multiplies float32 in bfloat16, which the bound does not cover.
    exact_products = torch.get_float32_matmul_precision() == "highest"
    memory = torch.empty(min(_QUERY_ROWS, len(queries)) * _CORPUS_ROWS)
    largest = 0.0
    with tqdm(total=len(corpus), disable=not progress, unit="vector", unit_scale=True) as bar:
        for begin, block in _blocks(corpus):
            norm = float(torch.linalg.vector_norm(block, dim=1).max())
            if not norm < np.inf:
                raise InputError(
                    f"corpus: expected finite numbers whose squares add up to less than 1e38, got "
                    f"others in rows {begin} to {begin + len(block) - 1}"
                )
            largest = max(largest, norm)
            for first in range(0, len(queries), _QUERY_ROWS):
                part = slice(first, min(first + _QUERY_ROWS, len(queries)))
                own = queries[part]
                out = memory[: len(own) * len(block)].view(len(own), len(block))
                if exact_products:
                    torch.mm(own, block.T, out=out)
                else:
                    np.matmul(own.numpy(), block.numpy().T, out=out.numpy())
                _C.topk_merge(out, begin, scores[part], ids[part])
            bar.update(len(block))
    return ids, scores, largest


def _exhaustive(
    queries: torch.Tensor, corpus: NDArray[np.floating], least: NDArray[np.float64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the best `k` of each query, [n, k], among all rows that reach its score in `least`."""
    ids: list[list[NDArray[np.int64]]] = [[] for _ in queries]
    scores: list[list[NDArray[np.float64]]] = [[] for _ in queries]
    for begin, block in _blocks(corpus):
        every = np.tile(np.arange(len(block)), (len(queries), 1))
        products = _C.inner_products(queries, block, every)
        for q, row in enumerate(products):
            places = np.flatnonzero(row >= least[q])
            ids[q].append(places + begin)
            scores[q].append(row[places])
    best_ids, best = np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k))
    for q in range(len(queries)):
        own_ids, own = np.concatenate(ids[q]), np.concatenate(scores[q])
        order = np.lexsort((own_ids, -own))[:k]
        best_ids[q], best[q] = own_ids[order], own[order]
    return best_ids, best
