"""Equality of the operations: each on the same logits on the device and on the CPU path."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cases import BEAM_SIZE, END_ID
from benchmarks.gpu.context import DTYPES, Context
from benchmarks.gpu.device import on_host
from benchmarks.gpu.report import Check, Outcome
from fastmrc import SpanIndex, Trie, ops
from fastmrc.options import Vote


def part_operations(context: Context) -> None:
    """Every operation against the CPU path."""
    context.do_all(
        (
            _check_rows,
            _check_automata,
            _check_beam_step,
            _check_sample,
            _check_slots,
            _check_spans_and_words,
        ),
    )


def _outcome(function: Callable[..., Any], *tensors: torch.Tensor, **options: Any) -> Outcome:
    try:
        found = function(*tensors, **options)
    except (ValueError, TypeError) as error:
        text = str(error)
        return f"{type(error).__name__}: {text.partition(', got ')[2] or text}"
    results = found if isinstance(found, tuple) else (found,)
    return tuple(np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x) for x in results)


@dataclass
class Operation:
    """Calls an operation on both paths and compares."""

    context: Context
    check: Check
    exact: bool = False

    def compare(
        self, case: str, function: Callable[..., Any], *tensors: torch.Tensor, **options: Any
    ) -> None:
        """Compare results for tensors of the host, and see that those of the device stay as they
        are."""
        there = [_copied(x, self.context.device) for x in tensors]
        ours = _outcome(function, *there, **options)
        theirs = on_host(_outcome, function, *tensors, **options)
        self.check.arrays(case, ours, theirs, self.exact)
        for x, before in zip(there, tensors, strict=True):
            same = torch.equal(x.cpu().nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))
            self.check.arrays(f"{case}, input", (np.asarray(same),), (np.asarray(True),), True)


def _copied(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on the device with the strides of `x`."""
    if x.is_contiguous():
        return x.to(device, copy=True)
    room = torch.zeros(x.shape[0], x.stride(0), dtype=x.dtype, device=device)
    own = room[:, room.shape[1] - x.shape[1] :]
    own.copy_(x)
    return own


def _rows(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Draw logits of one kind on the host."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(0, 4, shape, generator=generator).to(dtype)
    if kind == "strided":
        wide = torch.randn(shape[0], shape[1] + 5, generator=generator).to(dtype)
        return wide[:, 5:]
    x = (4 * torch.randn(shape, generator=generator)).to(dtype)
    if kind == "masked":
        x[torch.rand(shape, generator=generator) < 0.6] = -math.inf
        x[0] = -math.inf
    return x


def _drawn(context: Context, combinations: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Yield seeds and combinations, each several times."""
    return enumerate(list(combinations) * context.sizes.draws, start=1)


def _constraint_of(kind: str, questions: int, vocabulary: int, end: int, seed: int) -> Any:
    """Make the constraints of questions: none, spans or a trie for all, or mixed."""
    rng = np.random.default_rng(seed)
    tokens = np.delete(np.arange(vocabulary, dtype=np.int32), end)

    def sequences(count: int, longest: int) -> list[NDArray[np.int32]]:
        few = rng.choice(tokens, min(len(tokens), 40), replace=False)
        return [rng.choice(few, rng.integers(1, longest)) for _ in range(count)]

    if kind == "none":
        return None
    if kind == "spans":
        return [SpanIndex(sequences(3, 30)) for _ in range(questions)]
    if kind == "trie":
        return Trie(sequences(30, 5))
    made = [SpanIndex(sequences(2, 20)), None, Trie(sequences(9, 4))]
    return [made[q % 3] for q in range(questions)]


def _states_of(constraint: Any, owners: Sequence[int], seed: int) -> NDArray[np.int32] | None:
    """Draw an automaton state for each owner: the root, the dead state or any other."""
    if constraint is None:
        return None
    rng = np.random.default_rng(seed)
    states = []
    for owner in owners:
        own = constraint[owner] if isinstance(constraint, list) else constraint
        most = 1 if own is None else own.num_states
        states.append(rng.choice([0, 0, -1, *rng.integers(0, most, 5)]))
    return np.array(states, dtype=np.int32)


def _check_rows(context: Context) -> None:
    check = Check("row_stats, topk, log_softmax_topk")
    run = Operation(context, check, exact=True)
    seed = 0
    for shape in context.sizes.row_shapes:
        for dtype in DTYPES:
            for kind in ("normal", "ties", "masked", "strided"):
                seed += 1
                x = _rows(kind, shape, dtype, seed)
                case = f"{list(shape)} {dtype} {kind}"
                run.compare(f"row_stats {case}", ops.row_stats, x)
                for k in (1, 8, 70):
                    run.compare(f"topk {k} {case}", ops.topk, x, k=k)
                run.compare(f"log_softmax_topk {case}", ops.log_softmax_topk, x, k=5)
    x = _rows("ties", (3, 700), torch.float32, 1)
    for k in (512, 513, 900):
        run.compare(f"topk {k}", ops.topk, x, k=k)
        run.compare(f"log_softmax_topk {k}", ops.log_softmax_topk, x, k=k)
    for function in (ops.row_stats, functools.partial(ops.topk, k=3)):
        run.compare("a vector", function, x[0])
        for bad in (math.nan, math.inf):
            broken = x.clone()
            broken[1, 650] = bad
            run.compare(f"a row with {bad}", function, broken)
    context.report.check(check)


def _check_automata(context: Context) -> None:
    check = Check("automata: advance, allowed, is_final")
    run = Operation(context, check, exact=True)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 30, n).astype(np.int32) for n in (40, 25, 1, 9)]
    for automaton in (SpanIndex(sequences), Trie(sequences), SpanIndex([])):
        states = torch.arange(-1, automaton.num_states, dtype=torch.int32)
        tokens = torch.from_numpy(rng.integers(0, 31, len(states)).astype(np.int32))
        name = type(automaton).__name__
        run.compare(f"{name} advance", automaton.advance, states, tokens)
        run.compare(f"{name} allowed", automaton.allowed, states)
        run.compare(f"{name} is_final", automaton.is_final, states)
    context.report.check(check)


def _check_beam_step(context: Context) -> None:
    check = Check("beam_step")
    kinds = ("none", "spans", "trie", "mixed")
    combinations = itertools.product(context.sizes.vocabularies, DTYPES, get_args(Vote), kinds)
    for seed, case in _drawn(context, combinations):
        if context.may_go_on("beam_step"):
            _compare_beam_step(context, check, seed, *case)
    _compare_large_beam_step(context, check)
    context.report.check(check)


def _compare_beam_step(
    context: Context,
    check: Check,
    seed: int,
    vocabulary: int,
    dtype: torch.dtype,
    vote: str,
    kind: str,
) -> None:
    rng = np.random.default_rng(seed)
    questions, end = 5, 7
    passages = rng.integers(1, 5, questions)
    hypotheses = rng.integers(0, 4, questions)
    rows = int((passages * hypotheses).sum())
    logits = ("normal", "ties", "equal")[seed % 3]
    x = _rows("normal" if logits == "equal" else logits, (rows, vocabulary), dtype, seed)
    if logits == "equal":
        x = torch.zeros_like(x)
    if seed % 4 == 0:
        x[:, vocabulary // 2 :: 2] = -math.inf
    owners = np.repeat(np.arange(questions), hypotheses).tolist()
    constraint = _constraint_of(kind, questions, vocabulary, end, seed)
    weights = rng.choice([0.0, 0.5, 1.0, 3.0], passages.sum()).astype(np.float32)
    Operation(context, check, exact=logits == "equal").compare(
        f"vocabulary {vocabulary}, {dtype}, {vote}, {kind}, {logits}",
        ops.beam_step,
        x,
        scores=-rng.random(len(owners)).astype(np.float32),
        passages=passages,
        hypotheses=hypotheses,
        beam_size=(1, 3, 8)[seed % 3],
        end_id=end,
        vote=vote,
        weights=weights if vote == "weighted" else None,
        constraint=constraint,
        states=_states_of(constraint, owners, seed),
        allow_end=[bool(flag) for flag in rng.integers(0, 2, questions)],
    )


def _compare_large_beam_step(context: Context, check: Check) -> None:
    """Compare a step of the shape that is timed."""
    sizes = context.sizes
    rows = sizes.batch * sizes.passages * BEAM_SIZE
    questions = context.passages()
    for dtype in DTYPES:
        logits = _rows("normal", (rows, sizes.vocabulary), dtype, 0)
        for constraint in (None, [SpanIndex(passages) for passages in questions]):
            Operation(context, check).compare(
                f"{list(logits.shape)}, {dtype}, {'spans' if constraint else 'none'}",
                ops.beam_step,
                logits,
                scores=-np.random.default_rng(0).random(sizes.batch * BEAM_SIZE),
                passages=sizes.passages,
                hypotheses=BEAM_SIZE,
                beam_size=BEAM_SIZE,
                end_id=END_ID,
                constraint=constraint,
            )


def _check_sample(context: Context) -> None:
    check = Check("sample")
    run = Operation(context, check, exact=True)
    rows, end = 12, 7
    truncations: Sequence[dict[str, Any]] = (
        {},
        {"top_k": 5},
        {"top_p": 0.7, "temperature": 0.5},
        {"top_k": 20, "top_p": 0.9, "temperature": 1.7},
    )
    kinds = ("none", "spans", "mixed")
    combinations = itertools.product(context.sizes.vocabularies, DTYPES, kinds, truncations)
    for seed, (vocabulary, dtype, kind, options) in _drawn(context, combinations):
        constraint = _constraint_of(kind, rows, vocabulary, end, seed)
        run.compare(
            f"vocabulary {vocabulary}, {dtype}, {kind}, {options}",
            ops.sample,
            _rows("normal" if seed % 3 else "ties", (rows, vocabulary), dtype, seed),
            end_id=end,
            seed=seed * 2**40 + 1,
            positions=np.arange(rows),
            constraint=constraint,
            states=_states_of(constraint, range(rows), seed),
            allow_end=[row % 3 > 0 for row in range(rows)],
            **options,
        )
    context.report.check(check)


def _check_slots(context: Context) -> None:
    check = Check("slot_argmax, slot_topk")
    run = Operation(context, check)
    passages, slots, end = 4, 6, 7
    kinds = ("spans", "trie", "none", "mixed")
    combinations = itertools.product(context.sizes.vocabularies, DTYPES, kinds)
    for seed, (vocabulary, dtype, kind) in _drawn(context, combinations):
        x = _rows("normal" if seed % 3 else "ties", (passages * slots, vocabulary), dtype, seed)
        x[:, end] += 2
        x = x.reshape(passages, slots, vocabulary)
        rules: dict[str, Any] = {
            "end_id": end,
            "constraint": _constraint_of(kind, passages, vocabulary, end, seed),
            "min_tokens": seed % 3,
        }
        case = f"vocabulary {vocabulary}, {dtype}, {kind}"
        run.compare(f"slot_argmax {case}", ops.slot_argmax, x, **rules)
        if kind in ("spans", "trie"):
            run.compare(f"slot_topk {case}", ops.slot_topk, x, k=1 + seed % 5, **rules)
    context.report.check(check)


def _check_spans_and_words(context: Context) -> None:
    spans, words = Check("best_spans"), Check("attention_sum")
    seed = 0
    for columns in (1, 17, 384):
        for dtype in DTYPES:
            for kind in ("normal", "ties"):
                seed += 1
                rng = np.random.default_rng(seed)
                start, end = (_rows(kind, (6, columns), dtype, 9 * seed + i) for i in range(2))
                mask = rng.random((6, columns)) < 0.8
                case = f"{columns} columns, {dtype}, {kind}"
                for null in (None, 0):
                    options = {"k": 1 + seed % 7, "max_length": 1 + seed % 30}
                    given = {"mask": None if seed % 2 else mask, "null_position": null}
                    Operation(context, spans).compare(
                        f"{case}, null {null}", ops.best_spans, start, end, **options, **given
                    )
                Operation(context, words).compare(
                    case,
                    ops.attention_sum,
                    start,
                    word_ids=rng.integers(0, 9, (6, columns)).astype(np.int32),
                    k=1 + seed % 5,
                    mask=mask if seed % 2 else None,
                    lengths=rng.integers(0, columns + 1, 6) if seed % 4 < 2 else None,
                )
    context.report.check(spans)
    context.report.check(words)
