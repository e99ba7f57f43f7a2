"""Answers of masked slots in plain NumPy, slot by slot and exactly.

Slot i of passage p holds the distribution P_pi of token i of its answer; an answer of m tokens is
followed by the end token in slot m, unless it fills all slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError
from fastmrc.reference._checks import like, require_int
from fastmrc.reference.constraints import ROOT, Automaton
from fastmrc.reference.ops import allowed_mask, check_logits, logit_rows, softmax

__all__ = ["slot_argmax", "slot_topk"]

Float64 = NDArray[np.float64]

_Answer = tuple[list[int], np.float32]  # tokens and score


def slot_argmax(
    logits: Any,
    *,
    end_id: int,
    constraint: Automaton | Sequence[Automaton | None] | None = None,
    min_tokens: int = 0,
) -> tuple[Any, Any, Any]:
    """Take in each slot the most likely token that may follow, until the end token.

    Parameters
    ----------
    logits
        [passages, slots, V], float32 or float16 (torch: also bfloat16).
    end_id
        The token that ends an answer.
    constraint
        Nothing, one automaton for all passages, or one per passage (or None). An answer must end
        in a final state.
    min_tokens
        The end token is not allowed before so many tokens.

    Returns
    -------
    tokens
        int32 [passages, slots], without the end token, padded with -1.
    lengths
        int32 [passages], number of tokens; -1 if the constraint leaves no answer.
    scores
        float32 [passages], mean of the chosen probabilities, the end token's included; -inf if
        there is no answer.

    Raises
    ------
    InputError
        If shapes or values do not fit, a row that is read holds NaN, plus infinity or only minus
        infinity, or an edge of the constraint is the end token or not in the vocabulary.
    TypeError
        If an argument has the wrong type.

    Notes
    -----
    The reader by masked language model of bert4keras (task_reading_comprehension_by_mlm), which
    lets a passage's own n-grams go on: ``constraint=SpanIndex([passage])``. Of equal logits
    the lower token is taken.
    """
    rows, automata, end_id, min_tokens = _checked(logits, end_id, constraint, min_tokens)
    with np.errstate(invalid="ignore"):  # bad rows are refused when they are come to
        probs = softmax(rows)
    answers = [
        [_greedy(rows[p], probs[p], automaton, end_id, min_tokens)]
        for p, automaton in enumerate(automata)
    ]
    tokens, lengths, scores = _to_arrays(answers, 1, rows.shape[1])
    return like(tokens[:, 0], logits), like(lengths[:, 0], logits), like(scores[:, 0], logits)


def slot_topk(
    logits: Any,
    k: int,
    *,
    end_id: int,
    constraint: Automaton | Sequence[Automaton],
    min_tokens: int = 0,
) -> tuple[Any, Any, Any]:
    """Find the `k` best answers of each passage among all that the constraint admits.

    An answer of m < slots tokens scores (sum of P_i(token i) + P_m(end)) / (m + 1), one that fills
    all slots sum / slots.

    Parameters
    ----------
    logits, end_id, constraint, min_tokens
        As for `slot_argmax`; a constraint is needed.
    k
        At least 1.

    Returns
    -------
    tokens
        int32 [passages, k, slots], padded with -1; falling by score, equal scores by their tokens
        in lexicographic order.
    lengths
        int32 [passages, k], -1 where there is no further answer.
    scores
        float32 [passages, k], -inf where there is no further answer.

    Raises
    ------
    InputError, TypeError
        As for `slot_argmax`, for any row, and if there is no constraint.
    """
    rows, automata, end_id, min_tokens = _checked(logits, end_id, constraint, min_tokens)
    k = require_int("k", k, 1)
    check_logits("logits", rows.reshape(-1, rows.shape[2]))
    answers = []
    for slots, automaton in zip(rows, automata, strict=True):
        if automaton is None:
            raise InputError("constraint: expected one per passage, got None")
        allowed_mask(automaton, np.array([ROOT]), rows.shape[2], end_id, False)  # for its checks
        found = list(_all_answers(softmax(slots), automaton, end_id, min_tokens))
        answers.append(sorted(found, key=lambda answer: (-answer[1], answer[0]))[:k])
    tokens, lengths, scores = _to_arrays(answers, k, rows.shape[1])
    return like(tokens, logits), like(lengths, logits), like(scores, logits)


def _greedy(
    logits: NDArray[Any],
    probs: Float64,
    automaton: Automaton | None,
    end_id: int,
    min_tokens: int,
) -> _Answer:
    """Fill the slots of one passage, logits and probs [slots, V]."""
    nothing: _Answer = [], np.float32(-np.inf)
    tokens: list[int] = []
    total = 0.0
    state = np.array([ROOT], dtype=np.int32)
    for i, row in enumerate(probs):
        check_logits("logits", logits[i : i + 1])
        allowed = allowed_mask(automaton, state, len(row), end_id, i >= min_tokens)[0]
        if not allowed.any():
            return nothing
        candidates = np.flatnonzero(allowed)  # by logits, which order as the probabilities do
        token = int(candidates[logits[i, candidates].argmax()])
        total += float(row[token])
        if token == end_id:
            return tokens, np.float32(total / (i + 1))
        tokens.append(token)
        if automaton is not None:
            state = automaton.advance(state, np.array([token]))
    if automaton is not None and not automaton.is_final(state)[0]:
        return nothing
    return tokens, np.float32(total / len(probs))


def _all_answers(
    probs: Float64, automaton: Automaton, end_id: int, min_tokens: int
) -> Iterator[_Answer]:
    """Yield every answer of one passage, by running sums over all paths of one length."""
    slots = len(probs)
    paths: list[list[int]] = [[]]
    states, totals = np.array([ROOT], dtype=np.int32), np.zeros(1)
    for length in range(slots + 1):
        if length == slots:
            scores = totals / slots
        else:
            scores = (totals + probs[length, end_id]) / (length + 1)
        if length >= min_tokens:
            finals = automaton.is_final(states)
            for path, score, final in zip(paths, scores, finals, strict=True):
                if final:
                    yield path, np.float32(score)
        if length == slots or not paths:
            return
        offsets, tokens = automaton.allowed(states)
        parents = np.repeat(np.arange(len(paths)), np.diff(offsets))
        states = automaton.advance(states[parents], tokens)
        totals = totals[parents] + probs[length, tokens]
        paths = [
            [*paths[parent], token]
            for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True)
        ]


def _checked(
    logits: Any, end_id: int, constraint: Any, min_tokens: int
) -> tuple[NDArray[np.float32], list[Automaton | None], int, int]:
    if getattr(logits, "ndim", 0) != 3:
        raise InputError(
            f"logits: expected 3 dimensions, passages, slots and vocabulary, "
            f"got {getattr(logits, 'ndim', type(logits).__name__)}"
        )
    passages, slots, vocabulary = logits.shape
    if slots == 0:
        raise InputError("logits: expected at least one slot")
    rows = logit_rows("logits", logits.reshape(passages * slots, vocabulary))
    end_id = require_int("end_id", end_id, 0, vocabulary - 1)
    min_tokens = require_int("min_tokens", min_tokens, 0, slots)
    several = isinstance(constraint, (list, tuple))
    automata = list(constraint) if several else [constraint] * passages
    if len(automata) != passages:
        raise InputError(
            f"constraint: expected one for each of {passages} passages, got {len(automata)}"
        )
    return rows.reshape(passages, slots, vocabulary), automata, end_id, min_tokens


def _to_arrays(
    answers: Sequence[Sequence[_Answer]], k: int, slots: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    shape = (len(answers), k)
    tokens = np.full((*shape, slots), -1, dtype=np.int32)
    lengths = np.full(shape, -1, dtype=np.int32)
    scores = np.full(shape, -np.inf, dtype=np.float32)
    for p, found in enumerate(answers):
        for i, (sequence, score) in enumerate(found):
            if score == -np.inf:
                continue
            tokens[p, i, : len(sequence)] = sequence
            lengths[p, i], scores[p, i] = len(sequence), score
    return tokens, lengths, scores
