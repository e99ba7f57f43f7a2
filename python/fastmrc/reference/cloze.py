"""The cloze reader in plain Python and NumPy: attention-sum, and the encoder of the original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError
from fastmrc.reference._checks import int_vector, like, require_int, to_numpy
from fastmrc.reference.ops import logit_rows

__all__ = ["attention_sum", "bilstm_logits"]

# Below it exponentials leave the range of normal numbers.
_NOTHING = -708.0

Weights = Mapping[str, NDArray[np.floating[Any]]]


def attention_sum(
    logits: Any,
    word_ids: Any,
    k: SupportsIndex,
    *,
    mask: Any = None,
    lengths: Any = None,
) -> tuple[Any, Any, Any]:
    """Choose the words whose positions have the largest sums of attention.

    The attention is the softmax over the positions that count: those before the row's length whose
    mask is set; a logit more than 708 below the largest has a share of 0. Kadlec et al., "Text
    Understanding with the Attention Sum Reader Network", 2016.

    Parameters
    ----------
    logits
        [rows, positions], float32 or float16 (torch: also bfloat16).
    word_ids
        int [rows, positions], which word stands where; 0 or more where a position counts.
    k
        Words to return per row, at least 1.
    mask
        bool [rows, positions]; None: all set.
    lengths
        int [rows]; None: all positions.

    Returns
    -------
    words, probs, positions
        int32, float64, int32 [rows, k]: sums falling, equal ones by the first position of the
        word, which is the third result; padded with -1, 0 and -1.

    Raises
    ------
    InputError
        If shapes or values do not fit, or a position that counts holds NaN, plus infinity or a
        negative word.
    TypeError
        If an argument has the wrong type.
    """
    rows = logit_rows("logits", logits)
    count, positions = rows.shape
    k = require_int("k", k, 1)
    ids = np.asarray(to_numpy(word_ids))
    if ids.shape != rows.shape:
        raise InputError(f"word_ids: expected shape {rows.shape}, got {ids.shape}")
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"word_ids: expected integers, got {ids.dtype}")
    counts = _positions_that_count(mask, lengths, rows.shape)
    words = np.full((count, k), -1, np.int32)
    probs = np.zeros((count, k))
    first = np.full((count, k), -1, np.int32)
    for i in range(count):
        ranked = _ranked_words(rows[i].tolist(), ids[i].tolist(), counts[i].tolist(), i)
        for j, (word, prob, position) in enumerate(ranked[:k]):
            words[i, j], probs[i, j], first[i, j] = word, prob, position
    return like(words, logits), like(probs, logits), like(first, logits)


def _positions_that_count(mask: Any, lengths: Any, shape: tuple[int, int]) -> NDArray[np.bool_]:
    count, positions = shape
    counts = np.ones(shape, bool) if mask is None else np.array(to_numpy(mask))
    if counts.dtype != np.bool_:
        raise TypeError(f"mask: expected bool, got {counts.dtype}")
    if counts.shape != shape:
        raise InputError(f"mask: expected shape {shape}, got {counts.shape}")
    if lengths is not None:
        for i, length in enumerate(int_vector("lengths", lengths, count)):
            if not 0 <= length <= positions:
                raise InputError(f"lengths: expected 0 to {positions}, got {length}")
            counts[i, length:] = False
    return counts


def _ranked_words(
    logits: list[float], words: list[int], counts: list[bool], row: int
) -> list[tuple[int, float, int]]:
    """Return word, probability and first position of each word of a row, best first."""
    weights: dict[int, list[float]] = {}
    first: dict[int, int] = {}
    largest = -math.inf
    for i, logit in enumerate(logits):
        if not counts[i]:
            continue
        if not logit < math.inf:
            place = f"at row {row}, position {i}"
            raise InputError(f"logits: expected numbers below infinity, got {logit} {place}")
        if words[i] < 0 and logit > -math.inf:
            place = f"at row {row}, position {i}"
            raise InputError(f"word_ids: expected 0 or more, got {words[i]} {place}")
        largest = max(largest, logit)
    for i, logit in enumerate(logits):
        if counts[i] and logit > -math.inf:
            weight = 0.0 if logit - largest < _NOTHING else math.exp(logit - largest)
            weights.setdefault(words[i], []).append(weight)
            first.setdefault(words[i], i)
    # Rounded once, so that equal weights give equal sums in any order.
    sums = {word: math.fsum(own) for word, own in weights.items()}
    total = math.fsum(sums.values())
    ranked = sorted(sums, key=lambda word: (-sums[word], first[word]))
    return [(word, sums[word] / total, first[word]) for word in ranked]


def bilstm_logits(
    words: Sequence[int], blank: int, weights: Weights, *, depth: int, match: str = "states"
) -> NDArray[np.float64]:
    """Return the logits of the positions of a document with one blank, in float64.

    The context is cut at the blank. Left and right side run through the same stack of
    bidirectional LSTMs; the query is the mean of their final states, a position's logit the inner
    product of the query with the state of the top layer there (``match="states"``) or with the
    word's vector (``match="embeddings"``). An empty side is one position of the unknown word, 0.

    Parameters
    ----------
    words
        Word ids of the document.
    blank
        Position of the blank; its logit is -inf.
    weights
        ``vectors`` [words, dimension] and, as torch names them, ``forwards.0.weight_ih_l0``
        [4 h, in], ``forwards.0.weight_hh_l0`` [4 h, h], ``forwards.0.bias_ih_l0`` and
        ``forwards.0.bias_hh_l0`` [4 h], the same with ``backwards`` and for the further layers.
    depth
        Layers.
    match
        What the query is compared with.

    Returns
    -------
    numpy.ndarray
        float64 [len(words)].
    """
    sides = [list(words[:blank]), list(words[blank + 1 :])]
    tops, finals = [], []
    for side in sides:
        states = weights["vectors"][side or [0]].astype(np.float64)
        for layer in range(depth):
            forward = _lstm(states, weights, f"forwards.{layer}")
            backward = _lstm(states[::-1], weights, f"backwards.{layer}")[::-1]
            states = np.concatenate([forward, backward], axis=1)
        hidden = states.shape[1] // 2
        tops.append(states if side else states[:0])
        finals.append(np.concatenate([states[-1, :hidden], states[0, hidden:]]))
    query = (finals[0] + finals[1]) / 2
    if match == "embeddings":
        tops = [weights["vectors"][side].astype(np.float64) for side in sides]
    return np.concatenate([tops[0] @ query, [-np.inf], tops[1] @ query])


def _lstm(inputs: NDArray[np.float64], weights: Weights, name: str) -> NDArray[np.float64]:
    """Run one direction of one layer from left to right; [positions, hidden]."""
    w_ih, w_hh = weights[f"{name}.weight_ih_l0"], weights[f"{name}.weight_hh_l0"]
    bias = weights[f"{name}.bias_ih_l0"].astype(np.float64) + weights[f"{name}.bias_hh_l0"]
    state = cell = np.zeros(w_hh.shape[1])
    states = []
    for x in inputs:
        gates = w_ih.astype(np.float64) @ x + w_hh.astype(np.float64) @ state + bias
        into, forget, candidate, out = np.split(gates, 4)
        cell = _sigmoid(forget) * cell + _sigmoid(into) * np.tanh(candidate)
        state = _sigmoid(out) * np.tanh(cell)
        states.append(state)
    return np.array(states)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-x))
