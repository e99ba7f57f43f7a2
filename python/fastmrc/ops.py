"""Batched kernels over rows of logits; NumPy arrays or torch tensors in, the same kind out.

Every array enters through DLPack, is never modified and must be on the CPU; a row must be
contiguous in memory, rows may be apart. Read-only arrays and tensors that require gradients are
accepted. ``fastmrc.reference`` holds the same functions in plain NumPy.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmrc import _C
from fastmrc._build import follow_torch
from fastmrc.constraints import Automaton, int_vector, native_automata
from fastmrc.options import Vote

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["beam_step", "log_softmax_topk", "row_stats", "topk"]


def _like(x: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert results to the library of ``x``: torch tensors for a torch tensor."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return arrays
    return tuple(torch.from_numpy(array) for array in arrays)


def _without_rows_axis(x: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(array[0] for array in arrays) if getattr(x, "ndim", 2) == 1 else arrays


def topk(x: Any, k: int) -> tuple[Any, Any]:
    """Return the ``k`` largest entries of each row.

    Parameters
    ----------
    x
        [rows, V] or [V], float32, float16 or bfloat16.
    k
        At least 1. Entries of -inf do not count; what is missing is padded.

    Returns
    -------
    values, ids
        float32 and int32, [rows, k] (or [k]), falling; equal values by rising id; padding is -inf
        and -1.

    Raises
    ------
    ValueError
        If ``k`` is below 1 or a row holds NaN, or for a wrong shape, stride or device.
    TypeError
        If ``x`` is no array or has another dtype.
    """
    follow_torch()
    result = _like(x, _without_rows_axis(x, _C.topk(x, k)))
    return result[0], result[1]


def log_softmax_topk(x: Any, k: int) -> tuple[Any, Any]:
    """Return the ``k`` largest entries of the log-softmax of each row; contract of ``topk``."""
    follow_torch()
    result = _like(x, _without_rows_axis(x, _C.log_softmax_topk(x, k)))
    return result[0], result[1]


def row_stats(x: Any) -> tuple[Any, Any, Any]:
    """Return maximum, argmax and log-sum-exp of each row in one read.

    Parameters
    ----------
    x
        [rows, V] or [V], float32, float16 or bfloat16.

    Returns
    -------
    max, argmax, logsumexp
        float32, int32 and float64, [rows] (or scalars); the first argmax on ties; -inf, -1, -inf
        for a row of -inf.

    Raises
    ------
    ValueError
        If a row holds NaN or +inf, or for a wrong shape, stride or device.
    """
    follow_torch()
    result = _like(x, _C.row_stats(x))
    if getattr(x, "ndim", 2) == 1:
        return result[0][0], result[1][0], result[2][0]
    return result[0], result[1], result[2]


def beam_step(
    logits: Any,
    scores: ArrayLike,
    *,
    passages: int | ArrayLike,
    hypotheses: int | ArrayLike,
    beam_size: int,
    end_id: int,
    vote: Vote = "original",
    weights: ArrayLike | None = None,
    constraint: Automaton | Sequence[Automaton | None] | None = None,
    states: ArrayLike | None = None,
    allow_end: bool | Sequence[bool] = True,
) -> tuple[Any, Any, Any]:
    """Select the best continuations of a batch of questions.

    The score of token v after hypothesis k is ``scores[k] + log(vote + 1e-12)``, the vote taken
    over the softmax rows of the question's passages, in double precision, kept as float32.

    Parameters
    ----------
    logits
        [rows, V], float32, float16 or bfloat16; rows in the order question, passage, hypothesis.
    scores
        float32 [sum of hypotheses].
    passages, hypotheses
        Number of passages and of live hypotheses, one integer each or [questions].
    beam_size
        Continuations to return per question, 1 to V.
    end_id
        The end token.
    vote
        ``original``: sum P^2 / (1 + sum P); ``mean``; ``max``; ``product``: geometric mean;
        ``weighted``: sum w P^2 / (1 + sum w P).
    weights
        float32 [sum of passages], for ``weighted`` only.
    constraint
        What may follow: an automaton for all questions or one per question; None: everything.
    states
        int32 [sum of hypotheses], automaton states; None: all at the root.
    allow_end
        Whether the end token may be chosen (in a final state), for all or per question.

    Returns
    -------
    scores, tokens, parents
        float32, int32, int32 [questions, beam_size]: falling by score, then rising token, then
        rising parent (index of the hypothesis in its question); padding is -inf, -1, -1.

    Raises
    ------
    ValueError
        For shapes, counts or values that do not fit, a row with NaN, +inf or nothing but -inf.
    TypeError
        For a wrong dtype.
    """
    follow_torch()
    score_values = _float_vector("scores", scores)
    passage_counts, hypothesis_counts = _counts(passages, hypotheses, len(score_values))
    questions = len(passage_counts)
    if isinstance(allow_end, bool):
        allow_end = [allow_end] * questions
    result = _like(
        logits,
        _C.beam_step(
            logits,
            score_values,
            passage_counts,
            hypothesis_counts,
            beam_size,
            end_id,
            vote,
            None if weights is None else _float_vector("weights", weights),
            native_automata("constraint", constraint, questions),
            None if states is None else int_vector("states", states),
            list(allow_end),
        ),
    )
    return result[0], result[1], result[2]


def _counts(passages: Any, hypotheses: Any, scores: int) -> list[Any]:
    """Return passages and hypotheses per question; two plain numbers: the scores tell how many."""
    given = (("passages", passages), ("hypotheses", hypotheses))
    counts: list[Any] = [
        _number(name, x) if isinstance(x, int) or np.ndim(x) == 0 else int_vector(name, x)
        for name, x in given
    ]
    questions = max((len(x) for x in counts if not isinstance(x, int)), default=-1)
    if questions < 0:
        questions = scores // max(1, counts[1])
    return [np.array([x] * questions, dtype=np.int32) if isinstance(x, int) else x for x in counts]


def _number(name: str, value: Any) -> int:
    if not isinstance(value, bool):
        try:
            number = operator.index(value)
        except TypeError:
            pass
        else:
            if 0 <= number < 2**31:
                return number
            raise ValueError(f"{name}: expected 0 or a positive 32-bit integer, got {number}")
    raise TypeError(f"{name}: expected an integer or one per question, got {value!r}")


def _float_vector(name: str, values: ArrayLike) -> Any:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" and array.size:
        raise TypeError(f"{name}: expected numbers, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.float32)
