"""Best spans under start and end scores, by NumPy over the whole table of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError
from fastmrc.reference._checks import like, require_int, to_numpy
from fastmrc.reference.ops import finite_max, logit_rows

__all__ = ["best_spans"]


def best_spans(
    start: Any,
    end: Any,
    k: int,
    max_length: int,
    *,
    mask: Any = None,
    null_position: int | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Find the `k` best spans of each row under a model with a start and an end head.

    With P_s and P_e the softmax of start and end logits over the positions of `mask` and
    `null_position`, the span from i to j scores P_s(i) P_e(j).

    Parameters
    ----------
    start, end
        [rows, n], float32 or float16 (torch: also bfloat16).
    k
        Spans per row, at least 1.
    max_length
        Positions that a span may cover, at least 1.
    mask
        bool [rows, n], positions where an answer may begin or end; None: all. What it leaves out
        is not read.
    null_position
        Position that stands for "no answer" (that of [CLS]): it counts in the softmax but begins
        and ends no span. None: there is none.

    Returns
    -------
    scores
        float32 [rows, k], ordered by start logit + end logit (in float64), then by start, then by
        end; padded with -inf. An entry of -inf begins or ends no span.
    starts, ends
        int32 [rows, k], first and last position, padded with -1.
    null_scores
        float32 [rows], P_s P_e at the null position; 0 without one.

    Raises
    ------
    InputError
        If shapes or values do not fit or a position that counts holds NaN or plus infinity.
    TypeError
        If an argument has the wrong type.

    Notes
    -----
    ``decode_spans`` of the question-answering pipeline that transformers had up to 5.2, after
    Chen et al. 2017 (DrQA): the table of all pairs, its band, and the largest entries by a
    partition. Here the entries are sums of logits, so that nothing underflows.
    """
    first, last = logit_rows("start", start), logit_rows("end", end)
    if start.ndim != 2 or first.shape != last.shape or end.ndim != 2:
        raise InputError(
            f"end: expected the shape of start, [rows, n], got {tuple(start.shape)} and "
            f"{tuple(end.shape)}"
        )
    rows, n = first.shape
    k, max_length = require_int("k", k, 1), require_int("max_length", max_length, 1)
    inside = _checked_mask(mask, rows, n)
    counted = inside.copy()
    if null_position is not None:
        null_position = require_int("null_position", null_position, 0, n - 1)
        counted[:, null_position] = True
        inside[:, null_position] = False
    first = np.where(counted, first, np.float32(-np.inf))
    last = np.where(counted, last, np.float32(-np.inf))
    totals = _logsumexp("start", first) + _logsumexp("end", last)

    scores = np.full((rows, k), -np.inf, dtype=np.float32)
    starts = np.full((rows, k), -1, dtype=np.int32)
    ends = np.full((rows, k), -1, dtype=np.int32)
    null_scores = np.zeros(rows, dtype=np.float32)
    for row in range(rows):
        a, b = first[row].astype(np.float64), last[row].astype(np.float64)
        if null_position is not None and a[null_position] + b[null_position] > -np.inf:
            null_scores[row] = np.exp(a[null_position] + b[null_position] - totals[row])
        i, j, sums = _best(a, b, inside[row], k, max_length)
        starts[row, : len(i)], ends[row, : len(j)] = i, j
        scores[row, : len(i)] = np.exp(sums - totals[row])
    return like(scores, start), like(starts, start), like(ends, start), like(null_scores, start)


def _best(
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    inside: NDArray[np.bool_],
    k: int,
    max_length: int,
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return starts, ends and sums of the best spans of one row."""
    table = np.add.outer(np.where(inside, start, -np.inf), np.where(inside, end, -np.inf))
    band = np.tril(np.triu(np.ones(table.shape, dtype=np.bool_)), max_length - 1)
    flat = np.where(band, table, -np.inf).ravel()
    bar = -np.partition(-flat, k - 1)[k - 1] if k < len(flat) else -np.inf
    places = np.flatnonzero((flat >= bar) & (flat > -np.inf))
    i, j = np.unravel_index(places, table.shape)
    order = np.lexsort((j, i, -flat[places]))[:k]
    return i[order], j[order], flat[places[order]]


def _checked_mask(mask: Any, rows: int, n: int) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones((rows, n), dtype=np.bool_)
    array = np.asarray(to_numpy(mask))
    if array.dtype != np.bool_:
        raise TypeError(f"mask: expected bool, got {array.dtype}")
    if array.shape != (rows, n):
        raise InputError(f"mask: expected shape {(rows, n)}, got {array.shape}")
    return array.copy()


def _logsumexp(name: str, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    largest = finite_max(name, rows).astype(np.float64)
    shift = np.where(np.isneginf(largest), 0.0, largest)
    total = np.exp(rows.astype(np.float64) - shift[:, None]).sum(axis=-1)
    result: NDArray[np.float64] = np.log(total, out=np.full_like(total, -np.inf), where=total > 0)
    return shift + result
