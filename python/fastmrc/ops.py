"""Batched kernels over rows of logits; NumPy arrays or torch tensors in, the same kind out.

Every array enters through DLPack and is never modified; a row must be contiguous in memory, rows
may be apart. Read-only arrays and tensors that require gradients are accepted.
``fastmrc.reference`` holds the same functions in plain NumPy.

Tensors on an NVIDIA GPU are worked on there, on torch's current stream, by the same contracts,
where the package was built with ``FASTMRC_CUDA=ON``; the other arguments may then be on the host or
the device, the results are on the device. Whether the input holds NaN only the device knows: each
call waits for it unless it is made in `deferred_checks`.
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
from fastmrc.cuda.runtime import deferred_checks, on_device
from fastmrc.options import Vote, require_truncation

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "attention_sum",
    "beam_step",
    "best_spans",
    "deferred_checks",
    "log_softmax_topk",
    "row_stats",
    "sample",
    "slot_argmax",
    "slot_topk",
    "topk",
]


def _cuda_ops() -> Any:
    from fastmrc.cuda import ops

    return ops


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
    if on_device(x):
        found: tuple[Any, Any] = _cuda_ops().topk(x, k)
        return found
    follow_torch()
    result = _like(x, _without_rows_axis(x, _C.topk(x, k)))
    return result[0], result[1]


def log_softmax_topk(x: Any, k: int) -> tuple[Any, Any]:
    """Return the ``k`` largest entries of the log-softmax of each row; contract of ``topk``."""
    if on_device(x):
        found: tuple[Any, Any] = _cuda_ops().log_softmax_topk(x, k)
        return found
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
    if on_device(x):
        found: tuple[Any, Any, Any] = _cuda_ops().row_stats(x)
        return found
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
    number = len(_float_vector("scores", scores))
    passage_counts, hypothesis_counts = _counts(passages, hypotheses, number)
    questions = len(passage_counts)
    if isinstance(allow_end, bool):
        allow_end = [allow_end] * questions
    if on_device(logits):
        found: tuple[Any, Any, Any] = _cuda_ops().beam_step(
            logits,
            _float_vector("scores", scores),
            passages=passage_counts.tolist(),
            hypotheses=hypothesis_counts.tolist(),
            beam_size=beam_size,
            end_id=end_id,
            vote=vote,
            weights=None if weights is None else _float_vector("weights", weights),
            constraint=constraint,
            states=None if states is None else _integers("states", states),
            allow_end=list(allow_end),
        )
        return found
    follow_torch()
    score_values = _float_vector("scores", scores)
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


def sample(
    logits: Any,
    *,
    end_id: int,
    seed: int,
    streams: ArrayLike | None = None,
    positions: int | ArrayLike = 0,
    top_k: int | None = None,
    top_p: float = 1.0,
    temperature: float = 1.0,
    constraint: Automaton | Sequence[Automaton | None] | None = None,
    states: ArrayLike | None = None,
    allow_end: bool | Sequence[bool] = True,
) -> tuple[Any, Any]:
    """Draw one token from each row.

    Of the tokens that may follow the `top_k` likeliest are kept (of equal logits the lower token),
    of these the fewest likeliest whose share of the weights ``exp(logit / temperature)`` reaches
    `top_p`. The token drawn is the first, by rising id, at which the running sum of the weights
    exceeds a random number times their total.

    Parameters
    ----------
    logits
        [rows, V], float32, float16 or bfloat16.
    end_id
        The token that ends a sequence.
    seed
        0 to 2**64 - 1.
    streams, positions
        Integers [rows] or one for all. Seed, stream and position alone make the random number of a
        row (Philox4x32-10, Salmon et al. 2011); by default the streams are 0, 1, ...
    top_k, top_p, temperature
        As in `fastmrc.options.SamplingOptions`.
    constraint
        What may follow: an automaton for all rows or one per row; None: everything.
    states
        int32 [rows], automaton states; None: all at the root.
    allow_end
        Whether the end token may be drawn (in a final state), for all or per row.

    Returns
    -------
    tokens
        int32 [rows]; -1 where nothing may follow.
    log_probs
        float64 [rows], logarithm of the token's probability in the softmax of the whole row at
        temperature 1; -inf where nothing may follow.

    Raises
    ------
    ValueError
        For shapes or values that do not fit, a row with NaN, +inf or nothing but -inf.
    TypeError
        For a wrong dtype.
    """
    require_truncation(top_k, top_p, temperature)
    if getattr(logits, "ndim", 2) != 2:
        raise ValueError(f"logits: expected 2 dimensions, got {logits.ndim}")
    rows = int(logits.shape[0]) if hasattr(logits, "shape") else 0
    seed = _whole_number("seed", seed)
    stream_values = None if streams is None else _per_row("streams", streams, rows, np.uint64)
    at_start = type(positions) is int and positions == 0
    position_values = None if at_start else _per_row("positions", positions, rows, np.uint32)
    if on_device(logits):
        found: tuple[Any, Any] = _cuda_ops().sample(
            logits,
            end_id=_number("end_id", end_id),
            seed=seed,
            streams=stream_values,
            positions=position_values,
            top_k=top_k or 0,
            top_p=top_p,
            temperature=temperature,
            constraint=constraint,
            states=None if states is None else _integers("states", states),
            allow_end=None if allow_end is True else _flags("allow_end", allow_end, rows),
        )
        return found
    follow_torch()
    result = _like(
        logits,
        _C.sample(
            logits,
            seed,
            stream_values,
            position_values,
            top_k or 0,
            top_p,
            temperature,
            _number("end_id", end_id),
            [] if constraint is None else native_automata("constraint", constraint, rows),
            None if states is None else int_vector("states", states),
            None if allow_end is True else _flags("allow_end", allow_end, rows),
        ),
    )
    return result[0], result[1]


def slot_argmax(
    logits: Any,
    *,
    end_id: int,
    constraint: Automaton | Sequence[Automaton | None] | None = None,
    min_tokens: int = 0,
) -> tuple[Any, Any, Any]:
    """Take in each slot the most likely token that may follow, until the end token.

    The reader by masked language model of bert4keras: slot i of a passage holds the distribution
    of token i of its answer. Slots behind the end token are not read.

    Parameters
    ----------
    logits
        [passages, slots, V], float32, float16 or bfloat16; the passages of all questions of a
        batch, one after the other.
    end_id
        The end token.
    constraint
        What may follow: an automaton for all passages or one per passage; None: everything. An
        answer must end in a final state. ``SpanIndex([passage])`` admits the spans of a passage.
    min_tokens
        The end token is not allowed before so many tokens, 0 to the number of slots.

    Returns
    -------
    tokens
        int32 [passages, slots], without the end token, padded with -1; of equal logits the lower
        token.
    lengths
        int32 [passages], number of tokens; -1 if there is no answer.
    scores
        float32 [passages], mean of the chosen probabilities, the end token's included; -inf if
        there is no answer.

    Raises
    ------
    ValueError
        For shapes or values that do not fit, or a row that is read and holds NaN, +inf or nothing
        but -inf.
    TypeError
        For a wrong dtype.
    """
    rows, passages, slots = _slot_rows(logits)
    if on_device(logits):
        tokens, lengths, scores = _cuda_ops().slots(
            rows,
            passages,
            slots,
            end_id=end_id,
            min_tokens=min_tokens,
            constraint=constraint,
            k=0,
        )
        return tokens[:, 0], lengths[:, 0], scores[:, 0]
    follow_torch()
    automata = native_automata("constraint", constraint, passages)
    tokens, lengths, scores = _C.slot_argmax(rows, slots, end_id, min_tokens, automata)
    result = _like(logits, (tokens[:, 0], lengths[:, 0], scores[:, 0]))
    return result[0], result[1], result[2]


def slot_topk(
    logits: Any,
    k: int,
    *,
    end_id: int,
    constraint: Automaton | Sequence[Automaton],
    min_tokens: int = 0,
) -> tuple[Any, Any, Any]:
    """Find the ``k`` best answers of each passage among all that the constraint admits.

    An answer of m tokens scores (sum of P_i(token i) + P_m(end)) / (m + 1), one that fills all
    slots sum / slots: the score of ``slot_argmax``, which can miss the best answer.

    Parameters
    ----------
    logits, end_id, constraint, min_tokens
        As for `slot_argmax`; a constraint is needed.
    k
        At least 1; what is missing is padded.

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
    ValueError, TypeError
        As for `slot_argmax`; all rows are read.
    """
    rows, passages, slots = _slot_rows(logits)
    if on_device(logits):
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        found: tuple[Any, Any, Any] = _cuda_ops().slots(
            rows,
            passages,
            slots,
            end_id=end_id,
            min_tokens=min_tokens,
            constraint=constraint,
            k=k,
        )
        return found
    follow_torch()
    automata = native_automata("constraint", constraint, passages)
    result = _like(logits, _C.slot_topk(rows, slots, end_id, min_tokens, automata, k))
    return result[0], result[1], result[2]


def best_spans(
    start: Any,
    end: Any,
    k: int,
    max_length: int,
    *,
    mask: Any = None,
    null_position: int | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Find the ``k`` best spans of each row under a model with a start and an end head.

    With P_s and P_e the softmax of start and end logits over the positions of ``mask`` and
    ``null_position``, the span from i to j scores P_s(i) P_e(j) (Chen et al. 2017, as in the
    question-answering pipeline that transformers had up to 5.2).

    Parameters
    ----------
    start, end
        [rows, n], float32, float16 or bfloat16.
    k
        Spans per row, at least 1; what is missing is padded.
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
        float32 [rows, k], ordered by start logit + end logit, then by start, then by end; padded
        with -inf. An entry of -inf begins or ends no span.
    starts, ends
        int32 [rows, k], first and last position, padded with -1.
    null_scores
        float32 [rows], P_s P_e at the null position; 0 without one.

    Raises
    ------
    ValueError
        For shapes or values that do not fit, or a position that counts and holds NaN or +inf.
    TypeError
        For a wrong dtype.
    """
    if getattr(start, "ndim", 2) != 2:
        raise ValueError(f"start: expected 2 dimensions, got {start.ndim}")
    null = -1 if null_position is None else _number("null_position", null_position)
    if on_device(start):
        found: tuple[Any, Any, Any, Any] = _cuda_ops().best_spans(
            start, end, k, max_length, mask=mask, null_position=null
        )
        return found
    follow_torch()
    result = _like(start, _C.best_spans(start, end, k, max_length, _flat_mask(mask, start), null))
    return result[0], result[1], result[2], result[3]


def attention_sum(
    logits: Any, word_ids: Any, k: int, *, mask: Any = None, lengths: ArrayLike | None = None
) -> tuple[Any, Any, Any]:
    """Choose the words whose positions have the largest sums of attention.

    The attention is the softmax over the positions that count: those before the row's length whose
    mask is set; a logit more than 708 below the largest has a share of 0. Kadlec et al., "Text
    Understanding with the Attention Sum Reader Network", 2016.

    Parameters
    ----------
    logits
        [rows, positions], float32, float16 or bfloat16. A position of -inf has no share.
    word_ids
        int32 [rows, positions], which word stands where; 0 or more where a position counts.
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
        word, which is the third result; padded with -1, 0 and -1. Exponentials and sums are
        accurate to double precision.

    Raises
    ------
    ValueError
        For shapes or values that do not fit, or a position that counts and holds NaN, +inf or a
        negative word.
    TypeError
        For a wrong dtype.
    """
    if getattr(logits, "ndim", 2) != 2:
        raise ValueError(f"logits: expected 2 dimensions, got {logits.ndim}")
    if on_device(logits):
        found: tuple[Any, Any, Any] = _cuda_ops().attention_sum(
            logits,
            word_ids,
            _number("k", k),
            mask=mask,
            lengths=None if lengths is None else _integers("lengths", lengths),
        )
        return found
    follow_torch()
    ids = np.asarray(word_ids)
    if ids.shape != np.shape(logits):
        raise ValueError(f"word_ids: expected shape {np.shape(logits)}, got {ids.shape}")
    result = _like(
        logits,
        _C.attention_sum(
            logits,
            int_vector("word_ids", ids.reshape(-1)),
            _number("k", k),
            _flat_mask(mask, logits),
            None if lengths is None else int_vector("lengths", lengths).astype(np.int64),
        ),
    )
    return result[0], result[1], result[2]


def _slot_rows(logits: Any) -> tuple[Any, int, int]:
    """Return logits [passages, slots, V] as rows [passages * slots, V], and the two counts."""
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 3:
        got = type(logits).__name__ if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"logits: expected an array [passages, slots, V], got {got}")
    return logits.reshape(shape[0] * shape[1], shape[2]), shape[0], shape[1]


def _flat_mask(mask: Any, start: Any) -> Any:
    if mask is None:
        return None
    array = np.asarray(mask)
    if array.dtype != np.bool_:
        raise TypeError(f"mask: expected bool, got {array.dtype}")
    if array.shape != np.shape(start):
        raise ValueError(f"mask: expected shape {np.shape(start)}, got {array.shape}")
    return np.ascontiguousarray(array, dtype=np.uint8).ravel()


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
    raise TypeError(f"{name}: expected an integer, got {value!r}")


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    number = operator.index(value)
    if not 0 <= number < 2**64:
        raise ValueError(f"{name}: expected 0 to 2**64 - 1, got {number}")
    return number


def _per_row(name: str, values: Any, rows: int, dtype: type[np.unsignedinteger[Any]]) -> Any:
    """Return whole numbers, none negative, one per row, as an array of this dtype."""
    array = np.asarray(values)
    # Of a list with numbers below and above 2**63 NumPy would make floats.
    if array.ndim == 1 and array.dtype.kind == "f" and all(isinstance(v, int) for v in values):
        array = np.array(values, dtype=object)
    if array.size and array.dtype.kind not in "iuO":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim > 1:
        got = f"{array.ndim} dimensions"
        raise ValueError(f"{name}: expected one per row or one for all, got {got}")
    most = int(np.iinfo(dtype).max)
    if array.size and not 0 <= array.min() <= array.max() <= most:
        raise ValueError(
            f"{name}: expected 0 to {most}, got numbers from {array.min()} to {array.max()}"
        )
    return np.ascontiguousarray(array if array.ndim else np.full(rows, array)).astype(dtype)


def _flags(name: str, values: Any, rows: int) -> Any:
    array = np.asarray(values)
    if array.size and array.dtype != np.bool_:
        raise TypeError(f"{name}: expected True or False, got {array.dtype}")
    return np.ascontiguousarray(array if array.ndim else np.full(rows, array)).astype(np.uint8)


def _integers(name: str, values: Any) -> Any:
    """Return integers of a GPU as they are, others as a vector."""
    return values if on_device(values) else int_vector(name, values)


def _float_vector(name: str, values: Any) -> Any:
    if on_device(values):
        return values
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" and array.size:
        raise TypeError(f"{name}: expected numbers, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.float32)
