"""Times of the other operations, as whole calls, against the CPU path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import cases
from benchmarks.cases import END_ID, PASSAGES, SLOTS, VOCABULARY
from benchmarks.gpu.context import Context
from benchmarks.gpu.device import on_host
from benchmarks.gpu.timing import median_seconds
from fastmrc import SpanIndex, ops


def part_others(context: Context) -> None:
    """The other operations against the CPU path."""
    quick = context.quick
    passages, slots, vocabulary = (2, 4, 2100) if quick else (PASSAGES, SLOTS, VOCABULARY)
    logits = torch.from_numpy(cases.slot_logits()[:passages, :slots, :vocabulary].copy())
    indices = [SpanIndex([passage]) for passage in cases.passages()[:passages]]
    rules: dict[str, Any] = {"end_id": END_ID, "constraint": indices}
    rows = slice(0, 4) if quick else slice(None)
    start, end = torch.from_numpy(cases.span_logits()[:, rows].copy())
    attention, words = (array[rows] for array in cases.cloze_positions())
    drawn = torch.from_numpy(cases.standard_normal_rows(4 if quick else 100)[:, :vocabulary].copy())
    work: Sequence[tuple[str, Callable[..., Any], tuple[torch.Tensor, ...], dict[str, Any]]] = (
        ("slot_argmax", ops.slot_argmax, (logits,), rules),
        ("slot_topk, k 5", ops.slot_topk, (logits,), rules | {"k": 5}),
        ("best_spans", ops.best_spans, (start, end), {"k": 20, "max_length": 30}),
        (
            "attention_sum",
            ops.attention_sum,
            (torch.from_numpy(attention),),
            {"word_ids": words, "k": 5},
        ),
        ("sample, top_k 5", ops.sample, (drawn,), {"end_id": END_ID, "seed": 1, "top_k": 5}),
        ("sample, top_p 0.9", ops.sample, (drawn,), {"end_id": END_ID, "seed": 1, "top_p": 0.9}),
    )
    for name, function, tensors, options in work:
        context.attempt(name, _time_both, context, name, function, tensors, options)


def _time_both(
    context: Context,
    name: str,
    function: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    options: dict[str, Any],
) -> None:
    """Time a whole call, what it copies to the device included, on both paths."""
    ours = functools.partial(function, *(x.to(context.device) for x in tensors), **options)
    theirs = functools.partial(function, *tensors, **options)
    ours()
    device = median_seconds(context.device, ours, 3 if context.quick else 15)
    on_host(theirs)
    host = on_host(median_seconds, torch.device("cpu"), theirs, 3 if context.quick else 5)
    figures: dict[str, Any] = {"device_ms": 1e3 * device, "cpu_ms": 1e3 * host}
    context.report.figure(f"{name}: GPU / CPU path", host / device, "times its speed", **figures)
