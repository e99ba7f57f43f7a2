"""Kernels of the search in plain NumPy: the definition that the native ones must meet.

Arrays come in from NumPy or torch and the results go out the same way, on the same device.
Probabilities and votes are float64; the score of a hypothesis is float32, so that a tie is the
equality of two float32 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError
from fastmrc.options import Vote
from fastmrc.reference._checks import (
    float32_vector,
    int_vector,
    like,
    require_choice,
    require_int,
    to_numpy,
    weight_vector,
)
from fastmrc.reference.constraints import Automaton

__all__ = ["EPS", "beam_step", "log_softmax_topk", "row_stats", "topk"]

EPS = 1e-12
"""Added to a vote before its logarithm."""

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]


def topk(x: Any, k: int) -> tuple[Any, Any]:
    """Find the `k` largest entries of each row.

    Parameters
    ----------
    x
        [rows, V] or [V], float32 or float16 (torch: also bfloat16), V at least 1. Entries of
        minus infinity are not valid.
    k
        At least 1; may be larger than V.

    Returns
    -------
    values
        float32 [rows, k] ([k] for a vector), falling; -inf where there is no valid entry left.
    ids
        int32, same shape; of equal values the lowest id comes first; -1 where `values` is padded.

    Raises
    ------
    InputError
        If a row holds NaN, or a shape or `k` is wrong.
    TypeError
        If `x` or `k` has another type.
    """
    rows = logit_rows("x", x)
    k = require_int("k", k, 1)
    _refuse_rows("x", np.isnan(rows).any(axis=-1), "NaN")
    ids = _falling_order(rows, k)
    return _padded(x, np.take_along_axis(rows, ids, axis=-1), ids, k)


def log_softmax_topk(x: Any, k: int) -> tuple[Any, Any]:
    """Find the `k` largest log-probabilities of each row.

    Parameters
    ----------
    x, k
        As for `topk`; a row must not hold plus infinity.

    Returns
    -------
    log_probs, ids
        As for `topk`, ordered by the entries of `x`; natural logarithm, computed in float64 and
        rounded to float32.

    Raises
    ------
    InputError, TypeError
        As for `topk`, and if a row holds plus infinity.
    """
    rows = logit_rows("x", x)
    k = require_int("k", k, 1)
    _, _, logsumexp = _row_stats("x", rows)
    ids = _falling_order(rows, k)
    values = np.take_along_axis(rows, ids, axis=-1).astype(np.float64)
    valid = values > -np.inf
    totals = np.broadcast_to(logsumexp[:, None], values.shape)
    np.subtract(values, totals, out=values, where=valid)
    with np.errstate(over="ignore"):  # below the range of float32 it is -inf
        return _padded(x, values.astype(np.float32), ids, k, valid)


def row_stats(x: Any) -> tuple[Any, Any, Any]:
    """Find maximum, its place and the log-sum-exp of each row.

    Parameters
    ----------
    x
        [rows, V] or [V], float32 or float16 (torch: also bfloat16), V at least 1.

    Returns
    -------
    max
        float32 [rows] (no dimension for a vector).
    argmax
        int32 [rows], the lowest id on ties; -1 if the whole row is minus infinity.
    logsumexp
        float64 [rows], natural logarithm; -inf if the whole row is minus infinity.

    Raises
    ------
    InputError
        If a row holds NaN or plus infinity, or the shape is wrong.
    TypeError
        If `x` has another type.
    """
    rows = logit_rows("x", x)
    shape = tuple(x.shape[:-1])
    largest, argmax, logsumexp = _row_stats("x", rows)
    return (
        like(largest.reshape(shape), x),
        like(argmax.reshape(shape), x),
        like(logsumexp.reshape(shape), x),
    )


def beam_step(
    logits: Any,
    scores: Any,
    *,
    passages: int | Sequence[int] | NDArray[Any],
    hypotheses: int | Sequence[int] | NDArray[Any],
    beam_size: int,
    end_id: int,
    vote: Vote = "original",
    weights: Any = None,
    constraint: Automaton | Sequence[Automaton | None] | None = None,
    states: Any = None,
    allow_end: bool | Sequence[bool] | NDArray[Any] = True,
) -> tuple[Any, Any, Any]:
    """Let the passages of each question vote, and choose the best continuations.

    With P_pk the softmax of passage p after hypothesis k, s_k(v) the vote over p and S_k the
    score of hypothesis k, the new score is ``float32(S_k + log(s_k(v) + 1e-12))``. The best
    `beam_size` of the allowed (k, v) are returned, by falling score, then lower token, then lower
    parent.

    Parameters
    ----------
    logits
        [rows, V], float32 or float16 (torch: also bfloat16); the rows run over question, then
        passage, then hypothesis.
    scores
        float32 [sum of hypotheses], the score of each hypothesis, question by question. One of
        minus infinity has no continuation.
    passages, hypotheses
        Number of each per question: one integer for all, or [Q]. A question without hypotheses
        has no rows and an empty result.
    beam_size
        Number of results per question, at least 1.
    end_id
        The token that ends an answer.
    vote
        ``"original"`` sum P^2 / (1 + sum P), ``"mean"``, ``"max"``, ``"product"``
        exp(sum log(P + eps) / n), ``"weighted"`` sum w P^2 / (1 + sum w P).
    weights
        float32 [sum of passages], finite and not negative; needed by ``"weighted"``, otherwise
        refused.
    constraint
        Nothing, one automaton for all, or one per question (or None). The end token needs a final
        state.
    states
        int [sum of hypotheses], the automaton state of each hypothesis, -1 if dead; None: the
        root 0.
    allow_end
        Whether the end token may be chosen: one bool for all, or [Q].

    Returns
    -------
    scores
        float32 [Q, beam_size], padded with -inf.
    tokens
        int32 [Q, beam_size], padded with -1.
    parents
        int32 [Q, beam_size], index of the hypothesis within its question, padded with -1.

    Raises
    ------
    InputError
        If shapes, counts or values do not fit, a row holds NaN or plus infinity or only minus
        infinity, or an edge of the constraint is the end token or not in the vocabulary.
    TypeError
        If an argument has the wrong type.
    """
    rows = logit_rows("logits", logits)
    if logits.ndim != 2:
        raise InputError(f"logits: expected 2 dimensions, got {logits.ndim}")
    vocabulary = rows.shape[1]
    beam_size = require_int("beam_size", beam_size, 1)
    end_id = require_int("end_id", end_id, 0, vocabulary - 1)
    require_choice("vote", vote, get_args(Vote))
    totals = float32_vector("scores", scores)
    p_counts, h_counts = _question_counts(passages, hypotheses, len(totals), len(rows))
    questions = len(h_counts)
    w = checked_weights(vote, weights, int(p_counts.sum()))
    automata = _per_question_constraints(constraint, questions)
    places = np.zeros(len(totals), np.int64) if states is None else states
    places = int_vector("states", places, len(totals))
    ends = _per_question_flags(allow_end, questions)
    if np.isnan(totals).any() or np.isposinf(totals).any():
        raise InputError("scores: expected no NaN or +inf")
    check_logits("logits", rows)

    out_scores = np.full((questions, beam_size), -np.inf, dtype=np.float32)
    out_tokens = np.full((questions, beam_size), -1, dtype=np.int32)
    out_parents = np.full((questions, beam_size), -1, dtype=np.int32)
    row = passage = hypothesis = 0
    for q, (n, k) in enumerate(zip(p_counts.tolist(), h_counts.tolist(), strict=True)):
        if k:
            block = rows[row : row + n * k].reshape(n, k, vocabulary)
            own = slice(hypothesis, hypothesis + k)
            allowed = allowed_mask(automata[q], places[own], vocabulary, end_id, bool(ends[q]))
            allowed &= (totals[own] > -np.inf)[:, None]
            w_own = None if w is None else w[passage : passage + n]
            candidates = candidate_scores(block, totals[own], vote=vote, weights=w_own)
            best = select(candidates, allowed, beam_size)
            found = len(best[0])
            out_scores[q, :found], out_tokens[q, :found], out_parents[q, :found] = best
        row, passage, hypothesis = row + n * k, passage + n, hypothesis + k
    return like(out_scores, logits), like(out_tokens, logits), like(out_parents, logits)


def candidate_scores(
    logits: NDArray[Any],
    scores: Float32,
    *,
    vote: Vote,
    weights: Float32 | None = None,
    forbidden: Bool | None = None,
) -> Float32:
    """Score every continuation of every hypothesis of one question.

    Parameters
    ----------
    logits
        [n, K, V] for n passages and K hypotheses, checked by `check_logits`.
    scores
        float32 [K].
    vote, weights
        As for `beam_step`; weights [n].
    forbidden
        bool [K, V]: continuations whose vote counts as 0, hence log(eps); None: none.

    Returns
    -------
    numpy.ndarray
        float32 [K, V].
    """
    votes = _vote(softmax(logits), vote, weights)
    if forbidden is not None:
        votes[forbidden] = 0.0
    extended = scores.astype(np.float64)[:, None] + np.log(votes + EPS)
    return extended.astype(np.float32)


def select(candidates: Float32, allowed: Bool, count: int) -> tuple[Float32, Int32, Int32]:
    """Choose the best `count` allowed entries, fewer if there are fewer.

    Parameters
    ----------
    candidates
        float32 [K, V].
    allowed
        bool [K, V].
    count
        At least 1.

    Returns
    -------
    scores, tokens, parents
        float32, int32 and int32 [at most count]: score falling, then token and parent rising.
    """
    parents, tokens = np.nonzero(allowed)
    scores = candidates[parents, tokens]
    if len(scores) > count:
        # What is below the count-th best value cannot be chosen; what equals it can.
        kept = scores >= np.sort(scores)[-count]
        scores, tokens, parents = scores[kept], tokens[kept], parents[kept]
    order = np.lexsort((parents, tokens, -scores))[:count]
    return scores[order], tokens[order].astype(np.int32), parents[order].astype(np.int32)


def allowed_mask(
    constraint: Automaton | None,
    states: NDArray[Any],
    vocabulary: int,
    end_id: int,
    allow_end: bool,
) -> Bool:
    """Mark what may follow each hypothesis of one question.

    Parameters
    ----------
    constraint
        Automaton, or None for everything.
    states
        int [K], the state of each hypothesis; -1 has no continuation.
    vocabulary, end_id, allow_end
        Size of the vocabulary, the end token and whether it may come now.

    Returns
    -------
    numpy.ndarray
        bool [K, V].

    Raises
    ------
    InputError
        If the automaton holds the end token or one outside of the vocabulary.
    """
    mask = np.zeros((len(states), vocabulary), dtype=np.bool_)
    live = np.flatnonzero(states >= 0)
    if constraint is None:
        mask[live] = True
        mask[:, end_id] &= allow_end
        return mask
    if not len(live):
        return mask
    offsets, tokens = constraint.allowed(states[live].astype(np.int32))
    if len(tokens) and tokens.max() >= vocabulary:
        raise InputError(
            f"constraint: expected tokens below the vocabulary size {vocabulary}, "
            f"got {tokens.max()}"
        )
    if (tokens == end_id).any():
        raise InputError(f"constraint: expected no edge with the end token {end_id}")
    mask[np.repeat(live, np.diff(offsets)), tokens] = True
    if allow_end:
        mask[live, end_id] = constraint.is_final(states[live].astype(np.int32))
    return mask


def check_logits(name: str, rows: NDArray[Any]) -> None:
    """Refuse rows [n, V] that hold NaN or plus infinity, or nothing but minus infinity."""
    _refuse_rows(name, np.isneginf(finite_max(name, rows)), "only -inf")


def checked_weights(vote: Vote, weights: Any, passages: int) -> Float32 | None:
    """Return the weights of the passages, None for a vote without weights."""
    if vote != "weighted":
        if weights is not None:
            raise InputError(f"weights: expected None with vote={vote!r}, got weights")
        return None
    if weights is None:
        raise InputError("weights: expected one weight per passage with vote='weighted', got None")
    return weight_vector("weights", weights, passages)


def softmax(logits: NDArray[Any]) -> Float64:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    probs: Float64 = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probs


def _vote(probs: Float64, vote: Vote, weights: Float32 | None) -> Float64:
    """Combine probs [n, K, V] over the passages, in their order, into votes [K, V]."""
    votes: Float64
    if vote == "max":
        votes = probs.max(axis=0)
    elif vote == "mean":
        votes = probs.sum(axis=0) / len(probs)
    elif vote == "product":
        votes = np.exp(np.log(probs + EPS).sum(axis=0) / len(probs))
    elif weights is None:
        votes = (probs**2).sum(axis=0) / (1.0 + probs.sum(axis=0))
    else:
        w = weights.astype(np.float64)[:, None, None]
        votes = (w * probs**2).sum(axis=0) / (1.0 + (w * probs).sum(axis=0))
    return votes


def _row_stats(name: str, rows: Float32) -> tuple[Float32, Int32, Float64]:
    largest = finite_max(name, rows)
    empty = np.isneginf(largest)
    argmax = np.where(empty, -1, rows.argmax(axis=-1)).astype(np.int32)
    shift = np.where(empty, 0.0, largest.astype(np.float64))
    total = np.exp(rows.astype(np.float64) - shift[:, None]).sum(axis=-1)
    logsumexp = shift + np.log(total, out=np.full_like(total, -np.inf), where=~empty)
    return largest, argmax, logsumexp


def _falling_order(rows: Float32, k: int) -> NDArray[np.intp]:
    # A stable sort of the negated rows leaves equal values in the order of their ids.
    order: NDArray[np.intp] = np.argsort(-rows, axis=-1, kind="stable")
    return order[:, :k]


def _padded(
    x: Any, values: Float32, ids: NDArray[np.intp], k: int, valid: Bool | None = None
) -> tuple[Any, Any]:
    if valid is None:
        valid = values > -np.inf
    shape = (len(values), k)
    out_values = np.full(shape, -np.inf, dtype=np.float32)
    out_ids = np.full(shape, -1, dtype=np.int32)
    width = values.shape[1]
    out_values[:, :width] = np.where(valid, values, -np.inf)
    out_ids[:, :width] = np.where(valid, ids, -1)
    if x.ndim == 1:
        out_values, out_ids = out_values[0], out_ids[0]
    return like(out_values, x), like(out_ids, x)


def logit_rows(name: str, x: Any) -> Float32:
    """Return a float matrix or vector as float32 [rows, V]."""
    array = to_numpy(x)
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array or torch tensor, got {type(x).__name__}")
    if array.ndim not in (1, 2):
        raise InputError(f"{name}: expected 1 or 2 dimensions, got {array.ndim}")
    if array.shape[-1] == 0:
        raise InputError(f"{name}: expected at least one column, got shape {array.shape}")
    if array.dtype not in (np.float32, np.float16):
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {array.dtype}")
    return array.astype(np.float32).reshape(-1, array.shape[-1])


def finite_max(name: str, rows: NDArray[Any]) -> NDArray[Any]:
    """Return the maximum of each row, refusing NaN, which it inherits, and plus infinity."""
    with np.errstate(invalid="ignore"):
        largest: NDArray[Any] = rows.max(axis=-1)
    _refuse_rows(name, np.isnan(largest), "NaN")
    _refuse_rows(name, np.isposinf(largest), "+inf")
    return largest


def _refuse_rows(name: str, bad: Any, what: str) -> None:
    if bad.any():
        raise InputError(f"{name}: expected no row with {what}, got it in row {bad.argmax()}")


def _question_counts(
    passages: Any, hypotheses: Any, num_scores: int, num_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    p = _counts("passages", passages)
    h = _counts("hypotheses", hypotheses)
    if isinstance(h, int):
        if h < 1:
            raise InputError(f"hypotheses: expected at least 1 as a single number, got {h}")
        if num_scores % h:
            raise InputError(f"scores: expected a multiple of hypotheses={h}, got {num_scores}")
        questions = num_scores // h if isinstance(p, int) else len(p)
        h = np.full(questions, h, dtype=np.int64)
    if isinstance(p, int):
        p = np.full(len(h), p, dtype=np.int64)
    if len(p) != len(h):
        raise InputError(f"passages: expected as many as hypotheses, {len(h)}, got {len(p)}")
    if h.sum() != num_scores:
        raise InputError(f"scores: expected {h.sum()}, the sum of hypotheses, got {num_scores}")
    if ((p == 0) & (h > 0)).any():
        raise InputError("passages: expected at least 1 where there are hypotheses, got 0")
    if (p * h).sum() != num_rows:
        raise InputError(
            f"logits: expected {(p * h).sum()} rows, the sum of passages x hypotheses, "
            f"got {num_rows}"
        )
    return p, h


def _counts(name: str, value: Any) -> int | NDArray[np.int64]:
    if np.ndim(to_numpy(value)) == 0:
        return require_int(name, value, 0)
    counts = int_vector(name, value)
    if (counts < 0).any():
        raise InputError(f"{name}: expected at least 0, got {counts.min()}")
    return counts


def _per_question_constraints(
    constraint: Automaton | Sequence[Automaton | None] | None, questions: int
) -> list[Automaton | None]:
    if not isinstance(constraint, (list, tuple)):
        return [constraint] * questions  # type: ignore[list-item]
    if len(constraint) != questions:
        raise InputError(
            f"constraint: expected one for each of {questions} questions, got {len(constraint)}"
        )
    return list(constraint)


def _per_question_flags(flags: Any, questions: int) -> Bool:
    array = np.asarray(to_numpy(flags))
    if array.size and array.dtype != np.bool_:
        raise TypeError(f"allow_end: expected bool, got {array.dtype}")
    if array.ndim and array.shape != (questions,):
        raise InputError(f"allow_end: expected {questions} entries, got shape {array.shape}")
    return np.broadcast_to(array.astype(np.bool_), (questions,))
