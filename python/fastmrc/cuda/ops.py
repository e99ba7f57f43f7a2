"""The operations of `fastmrc.ops` on torch tensors of a GPU, with the contracts given there.

Results are tensors on the device of the logits. Host arrays among the arguments (counts, states,
masks) are copied there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmrc.constraints import Automaton, native_automata
from fastmrc.cuda.automata import DeviceAutomata
from fastmrc.cuda.runtime import call_on, kernels, stream_of
from fastmrc.options import Vote

__all__ = [
    "attention_sum",
    "beam_step",
    "best_spans",
    "log_softmax_topk",
    "row_stats",
    "sample",
    "slots",
    "topk",
]


@dataclass(frozen=True, slots=True)
class _Stats:
    """What the pass over the rows found; [rows] each."""

    max: torch.Tensor
    argmax: torch.Tensor
    logsumexp: torch.Tensor

    def arguments(self) -> dict[str, torch.Tensor]:
        return {"max": self.max, "argmax": self.argmax, "logsumexp": self.logsumexp}


def _empty(x: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _workspace(x: torch.Tensor, items: int) -> torch.Tensor:
    return torch.empty(items, dtype=torch.uint8, device=x.device)


def _two_dimensions(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the rows without a graph of gradients; a vector is one row."""
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a tensor that DLPack can export, got {x.layout}")
    if x.ndim not in (1, 2):
        raise ValueError(f"{name}: expected 1 or 2 dimensions, got {x.ndim}")
    x = x.detach()
    if x.shape[-1] < 1:
        raise ValueError(f"{name}: expected at least one column, got shape {list(x.shape)}")
    return x if x.ndim == 2 else x[None]


def _row_pass(
    x: torch.Tensor,
    fault: torch.Tensor,
    *,
    stats: bool = False,
    k: int = 0,
    log_softmax: bool = False,
) -> tuple[_Stats | None, torch.Tensor, torch.Tensor]:
    """Run the fused pass over rows [rows, V]; largest entries [rows, k]."""
    rows, cols = x.shape
    found = None
    if stats:
        ints, doubles = _empty(x, rows, dtype=torch.int32), _empty(x, rows, dtype=torch.float64)
        found = _Stats(_empty(x, rows), ints, doubles)
    values, ids = _empty(x, rows, k), _empty(x, rows, k, dtype=torch.int32)
    kernels().row_pass(
        x=x,
        live=None,
        k=k,
        values=values,
        ids=ids,
        log_softmax=log_softmax,
        fault=fault,
        counters=torch.zeros(rows, dtype=torch.int32, device=x.device),
        workspace=_workspace(x, kernels().row_pass_bytes(rows, cols, k)),
        stream=stream_of(x.device),
        **(found.arguments() if found else dict.fromkeys(("max", "argmax", "logsumexp"))),
    )
    return found, values, ids


def _stats(x: torch.Tensor, fault: torch.Tensor) -> _Stats:
    found, _, _ = _row_pass(x, fault, stats=True)
    assert found is not None
    return found


def topk(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastmrc.ops.topk`; more than 512 entries are sorted by torch."""
    return _largest(x, k, log_softmax=False)


def log_softmax_topk(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastmrc.ops.log_softmax_topk`."""
    return _largest(x, k, log_softmax=True)


def _largest(x: torch.Tensor, k: int, log_softmax: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    rows = _two_dimensions("x", x)
    with call_on(x.device) as faults:
        fault = faults.new(x.device, "x")
        if k <= kernels().MAX_TOPK:
            _, values, ids = _row_pass(rows, fault, k=k, log_softmax=log_softmax)
        else:
            values, ids = _sorted(rows, k, log_softmax, fault)
    return (values[0], ids[0]) if x.ndim == 1 else (values, ids)


def _sorted(
    x: torch.Tensor, k: int, log_softmax: bool, fault: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    found, largest, _ = _row_pass(x, fault, stats=log_softmax, k=1)  # notes NaN
    unsound = largest[:, :1].isnan()
    values, order = torch.sort(x.float(), dim=1, descending=True, stable=True)
    values, ids = values[:, :k], order[:, :k].int()
    ids = torch.where(values.isneginf() | unsound, -1, ids)
    if found is not None:
        values = (values.double() - found.logsumexp[:, None]).float()
    values = torch.where(ids < 0, -math.inf, values)
    values = torch.where(unsound, math.nan, values)
    missing = k - x.shape[1]
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, missing), value=-math.inf)
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    return values, ids


def row_stats(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `fastmrc.ops.row_stats`."""
    rows = _two_dimensions("x", x)
    with call_on(x.device) as faults:
        found = _stats(rows, faults.new(x.device, "x"))
    result = found.max, found.argmax, found.logsumexp
    return (result[0][0], result[1][0], result[2][0]) if x.ndim == 1 else result


def _on(x: torch.Tensor, values: Any, dtype: torch.dtype, name: str, items: int) -> torch.Tensor:
    """Return values, from the host or the device, as a vector beside `x`."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.asarray(values))
    if tensor.ndim != 1 or len(tensor) != items:
        raise ValueError(f"{name}: expected {items} entries, got shape {list(tensor.shape)}")
    return tensor.to(device=x.device, dtype=dtype).contiguous()


def beam_step(
    logits: torch.Tensor,
    scores: Any,
    *,
    passages: list[int],
    hypotheses: list[int],
    beam_size: int,
    end_id: int,
    vote: Vote,
    weights: Any,
    constraint: Automaton | Sequence[Automaton | None] | None,
    states: Any,
    allow_end: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `fastmrc.ops.beam_step`; counts are lists, one entry per question."""
    logits = _two_dimensions("logits", logits)
    questions, vocabulary = len(passages), logits.shape[1]
    _check_step(logits, passages, hypotheses, beam_size, end_id, allow_end)
    if (vote == "weighted") == (weights is None):
        raise ValueError("weights: expected one per passage for vote 'weighted', None otherwise")
    slots = max([1, *hypotheses])
    # Hypothesis k of question q is at q * slots + k here.
    places = [q * slots + k for q, n in enumerate(hypotheses) for k in range(n)]
    at = torch.tensor(places, dtype=torch.int64, device=logits.device)

    def spread(values: Any, dtype: torch.dtype, name: str) -> torch.Tensor:
        own = _on(logits, values, dtype, name, len(places))
        return torch.zeros(questions * slots, dtype=dtype, device=logits.device).index_put_(
            (at,), own
        )

    rows, row = [], 0
    for voting, live in zip(passages, hypotheses, strict=True):
        rows += [row + p * live for p in range(voting)]
        row += voting * live
    first_passage = np.concatenate([[0], np.cumsum(passages)]).astype(np.int64)
    automata = DeviceAutomata.of(
        native_automata("constraint", constraint, questions), logits.device
    )
    found = [_empty(logits, questions, beam_size)]
    found += [_empty(logits, questions, beam_size, dtype=torch.int32) for _ in range(2)]
    with call_on(logits.device) as faults:
        fault = faults.new(logits.device, "logits", vocabulary, end_id)
        stats = _stats(logits, fault)
        kernels().beam_step(
            logits=logits,
            argmax=stats.argmax,
            logsumexp=stats.logsumexp,
            questions=questions,
            slots=slots,
            passages=len(rows),
            hypotheses=torch.tensor(hypotheses, dtype=torch.int32, device=logits.device),
            first_passage=torch.from_numpy(first_passage).to(logits.device),
            passage_row=torch.tensor(rows, dtype=torch.int64, device=logits.device),
            weights=None
            if weights is None
            else _on(logits, weights, torch.float32, "weights", len(rows)),
            scores=spread(scores, torch.float32, "scores"),
            states=None if states is None else spread(states, torch.int32, "states"),
            automata=automata.native,
            automaton_of=automata.automaton_of,
            all_constrained=automata.all_constrained,
            allow_end=torch.tensor(allow_end, dtype=torch.bool, device=logits.device),
            vote=vote,
            end_id=end_id,
            width=beam_size,
            best_scores=found[0],
            tokens=found[1],
            parents=found[2],
            fault=fault,
            workspace=_workspace(
                logits,
                kernels().beam_step_bytes(
                    vocabulary, questions, slots, beam_size, automata.all_constrained
                ),
            ),
            stream=stream_of(logits.device),
        )
    return found[0], found[1], found[2]


def _check_step(
    logits: torch.Tensor,
    passages: list[int],
    hypotheses: list[int],
    beam_size: int,
    end_id: int,
    allow_end: list[bool],
) -> None:
    questions, (rows, vocabulary) = len(passages), logits.shape
    for name, values in (("hypotheses", hypotheses), ("allow_end", allow_end)):
        if len(values) != questions:
            raise ValueError(f"{name}: expected {questions} entries, got {len(values)}")
    if min([0, *passages, *hypotheses]) < 0:
        raise ValueError("passages, hypotheses: expected counts >= 0")
    expected = sum(p * h for p, h in zip(passages, hypotheses, strict=True))
    if rows != expected:
        raise ValueError(
            f"logits: expected {expected} rows (passages x hypotheses of all questions), got {rows}"
        )
    if not 1 <= beam_size <= vocabulary:
        raise ValueError(
            f"beam_size: expected 1 to the vocabulary size {vocabulary}, got {beam_size}"
        )
    _check_end_id(end_id, vocabulary)


def _check_end_id(end_id: int, vocabulary: int) -> None:
    if not 0 <= end_id < vocabulary:
        raise ValueError(f"end_id: expected a token below {vocabulary}, got {end_id}")


def sample(
    logits: torch.Tensor,
    *,
    end_id: int,
    seed: int,
    streams: Any,
    positions: Any,
    top_k: int,
    top_p: float,
    temperature: float,
    constraint: Automaton | Sequence[Automaton | None] | None,
    states: Any,
    allow_end: Any,
    row_of: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastmrc.ops.sample`; `row_of` [draws] names the row of each draw, by default its own."""
    logits = _two_dimensions("logits", logits)
    rows = logits.shape[0]
    draws = rows if row_of is None else len(row_of)
    automata = DeviceAutomata.of(native_automata("constraint", constraint, rows), logits.device)

    def vector(values: Any, dtype: torch.dtype, name: str, items: int) -> torch.Tensor | None:
        if values is None:
            return None
        if isinstance(values, np.ndarray) and values.dtype.kind == "u":
            values = values.view(values.dtype.str.replace("u", "i"))  # the same bits
        return _on(logits, values, dtype, name, items)

    tokens = _empty(logits, draws, dtype=torch.int32)
    log_probs = _empty(logits, draws, dtype=torch.float64)
    with call_on(logits.device) as faults:
        # Rows that nothing is drawn from are not judged.
        stats = _stats(logits, torch.zeros(1, dtype=torch.int64, device=logits.device))
        kernels().sample(
            logits=logits,
            automata=automata.native,
            automaton_of=automata.automaton_of,
            states=vector(states, torch.int32, "states", rows),
            allow_end=vector(allow_end, torch.bool, "allow_end", rows),
            end_id=end_id,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            seed=seed,
            draws=draws,
            row_of=vector(row_of, torch.int32, "row_of", draws),
            streams=vector(streams, torch.int64, "streams", draws),
            positions=vector(positions, torch.int32, "positions", draws),
            tokens=tokens,
            log_probs=log_probs,
            fault=faults.new(logits.device, "logits", logits.shape[1], end_id),
            workspace=_workspace(logits, kernels().sample_bytes(rows, logits.shape[1])),
            stream=stream_of(logits.device),
            **stats.arguments(),
        )
    return tokens, log_probs


def slots(
    logits: torch.Tensor,
    passages: int,
    number: int,
    *,
    end_id: int,
    min_tokens: int,
    constraint: Automaton | Sequence[Automaton | None] | None,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `fastmrc.ops.slot_topk`, or `slot_argmax` for a `k` of 0, with arrays of one answer;
    logits are [passages * number, V]."""
    logits = _two_dimensions("logits", logits)
    if number < 1:
        raise ValueError("logits: expected at least one slot")
    if not 0 <= min_tokens <= number:
        raise ValueError(
            f"min_tokens: expected 0 to the number of slots {number}, got {min_tokens}"
        )
    _check_end_id(end_id, logits.shape[1])
    own = native_automata("constraint", constraint, passages)
    if len(own) != passages:
        raise ValueError(f"constraint: expected {passages} entries, got {len(own)}")
    if k > 0 and None in own:
        raise ValueError("constraint: expected one per passage")
    automata = DeviceAutomata.of(own, logits.device)
    width = max(1, k)
    tokens = _empty(logits, passages, width, number, dtype=torch.int32)
    lengths = _empty(logits, passages, width, dtype=torch.int32)
    scores = _empty(logits, passages, width)
    with call_on(logits.device) as faults:
        fault = faults.new(logits.device, "logits", logits.shape[1], end_id)
        # Greedy slots are judged as far as they are reached.
        unjudged = torch.zeros(1, dtype=torch.int64, device=logits.device)
        stats = _stats(logits, unjudged if k == 0 else fault)
        kernels().slots(
            logits=logits,
            passages=passages,
            slots=number,
            width=k,
            automata=automata.native,
            automaton_of=automata.automaton_of,
            end_id=end_id,
            min_tokens=min_tokens,
            tokens=tokens,
            lengths=lengths,
            scores=scores,
            fault=fault,
            workspace=_workspace(
                logits, kernels().slot_topk_bytes(passages, number, k) if k else 0
            ),
            stream=stream_of(logits.device),
            **stats.arguments(),
        )
    return tokens, lengths, scores


def _mask(x: torch.Tensor, mask: Any) -> torch.Tensor | None:
    if mask is None:
        return None
    tensor = mask if isinstance(mask, torch.Tensor) else torch.from_numpy(np.asarray(mask))
    if tensor.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {tensor.dtype}")
    if tensor.shape != x.shape:
        raise ValueError(f"mask: expected shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
    return tensor.to(x.device).contiguous()


def best_spans(
    start: torch.Tensor,
    end: torch.Tensor,
    k: int,
    max_length: int,
    *,
    mask: Any,
    null_position: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `fastmrc.ops.best_spans`; a null position of -1: there is none."""
    start, end = _two_dimensions("start", start), _two_dimensions("end", end)
    rows, cols = start.shape
    scores, null_scores = _empty(start, rows, max(k, 0)), _empty(start, rows)
    starts, ends = (_empty(start, rows, max(k, 0), dtype=torch.int32) for _ in range(2))
    with call_on(start.device) as faults:
        kernels().best_spans(
            start=start,
            end=end,
            mask=_mask(start, mask),
            null_position=null_position,
            max_length=max_length,
            k=k,
            scores=scores,
            starts=starts,
            ends=ends,
            null_scores=null_scores,
            fault=faults.new(start.device, "start"),
            workspace=_workspace(start, kernels().best_spans_bytes(rows, cols, max(k, 1))),
            stream=stream_of(start.device),
        )
    return scores, starts, ends, null_scores


def attention_sum(
    logits: torch.Tensor, word_ids: Any, k: int, *, mask: Any, lengths: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `fastmrc.ops.attention_sum`."""
    logits = _two_dimensions("logits", logits)
    rows, cols = logits.shape
    words = (
        word_ids if isinstance(word_ids, torch.Tensor) else torch.from_numpy(np.asarray(word_ids))
    )
    if words.shape != logits.shape:
        raise ValueError(
            f"word_ids: expected shape {tuple(logits.shape)}, got {tuple(words.shape)}"
        )
    if words.dtype.is_floating_point or words.dtype == torch.bool:
        raise TypeError(f"word_ids: expected integers, got {words.dtype}")
    found = _empty(logits, rows, max(k, 0), dtype=torch.int32)
    probs = _empty(logits, rows, max(k, 0), dtype=torch.float64)
    first = _empty(logits, rows, max(k, 0), dtype=torch.int32)
    with call_on(logits.device) as faults:
        kernels().attention_sum(
            logits=logits,
            word_ids=words.to(device=logits.device, dtype=torch.int32).contiguous(),
            mask=_mask(logits, mask),
            lengths=None if lengths is None else _on(logits, lengths, torch.int64, "lengths", rows),
            k=k,
            words=found,
            probs=probs,
            first=first,
            fault=faults.new(logits.device, "logits"),
            workspace=_workspace(logits, kernels().attention_sum_bytes(rows, cols, max(k, 1))),
            stream=stream_of(logits.device),
        )
    return found, probs, first
