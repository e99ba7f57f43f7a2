"""Times of the beam step: whole steps of a search, and the operation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cases import BEAM_SIZE, END_ID
from benchmarks.gpu.context import Context, dtype_name
from benchmarks.gpu.timing import host_seconds, median_seconds
from fastmrc import ops
from fastmrc.cuda.runtime import stream_of
from fastmrc.options import Mode, SearchOptions


def part_beam_step(context: Context) -> None:
    """A whole step of the search, and the operation."""
    searches: Sequence[tuple[Mode, torch.dtype]] = (
        ("extractive", torch.float16),
        ("extractive", torch.float32),
        ("generative", torch.float16),
    )
    for mode, dtype in searches:
        context.attempt(f"{mode}, {dtype}", _time_search, context, mode, dtype)
    with context.report.guard("ops.beam_step"):
        _time_beam_step(context)


class DrawnLogits:
    """Stands for the encoder of a search: memory for its inputs, and logits drawn beforehand."""

    def __init__(self, context: Context, steps: int, dtype: torch.dtype) -> None:
        from fastmrc.encoders.device import _Buffers

        sizes = context.sizes
        self.device = context.device
        self.rows = sizes.batch * sizes.passages
        prefix = sizes.passage_tokens + 2
        columns = (prefix + (steps + 1) * BEAM_SIZE + 7) // 8 * 8
        self._buffers = _Buffers(self.rows, prefix, columns, BEAM_SIZE, self.device)
        self._first, self._others = (
            3 * context.normal(self.rows * n, sizes.vocabulary, dtype=dtype, seed=n)
            for n in (1, BEAM_SIZE)
        )
        for logits in (self._first, self._others):
            logits[:, END_ID] = -20  # the end is allowed and never the best

    def prefill(self) -> torch.Tensor:
        return self._first

    def begin(self, passages: NDArray[np.int64]) -> tuple[Any, NDArray[np.int64]]:
        inputs = self._buffers.inputs(self.rows)
        inputs.first_position.fill_(inputs.prefix)
        inputs.mask[..., : inputs.prefix] = True
        return inputs, np.arange(len(passages))

    def step(self) -> torch.Tensor:
        return self._others


def _time_search(context: Context, mode: Mode, dtype: torch.dtype) -> None:
    """Time the first step of a search and some later ones, each from the state before it."""
    from fastmrc.cuda.beam_search import _Search

    steps = 8
    options = SearchOptions(mode=mode, max_answer_tokens=steps, beam_size=BEAM_SIZE)
    source, questions = DrawnLogits(context, steps, dtype), context.passages()
    none: list[Any] = [None] * len(questions)
    search = _Search(source, questions, END_ID, context.sizes.vocabulary, options, None)
    first = source.prefill()
    search.read_first(first)
    search.build_indices(none)
    search.choose_passages()
    search.constrain(none)
    search.set_inputs(*source.begin(search.passages))
    native, stream = search._native, stream_of(context.device)
    name = f"{mode}, {dtype_name(dtype)}"

    def read_and_step() -> None:
        native.first_step(
            logits=first,
            surviving=search._surviving,
            no_answer=search._no_answer,
            stream=stream,
        )
        native.step(logits=first, t=0, stream=stream)

    for t in range(5):
        logits = first if t == 0 else source.step()
        work: Callable[[], None] = read_and_step
        if t > 0:
            work = functools.partial(native.step, logits=logits, t=t, stream=stream)
        before = search._state.clone()
        restore = functools.partial(search._state.copy_, before)
        if t in (0, 1, 4):
            seconds, warm = (context.watch.seconds(work, c, restore) for c in ("clean", "as it is"))
            restore()
            host = host_seconds(context.device, work)
            live = int(before[: len(questions)].sum())
            wanted = "<= 100" if (dtype, mode) == (torch.float16, "extractive") else None
            details = {"warm": 1e6 * warm, "host": 1e6 * host, "live hypotheses before": live}
            context.report.figure(f"step {t}, {name}", 1e6 * seconds, "us", wanted, **details)
        restore()
        search.step(logits, t)


def _time_beam_step(context: Context) -> None:
    """Time `ops.beam_step` with everything it allocates and copies, by the clock."""
    sizes = context.sizes
    rows = sizes.batch * sizes.passages * BEAM_SIZE
    logits = context.normal(rows, sizes.vocabulary, dtype=torch.float16)
    scores = torch.zeros(sizes.batch * BEAM_SIZE, device=context.device)

    def step() -> None:
        ops.beam_step(
            logits,
            scores,
            passages=sizes.passages,
            hypotheses=BEAM_SIZE,
            beam_size=BEAM_SIZE,
            end_id=END_ID,
        )

    step()
    seconds = median_seconds(context.device, step, 3 if context.emulated else 20)
    context.report.figure("ops.beam_step, generative, float16, whole call", 1e6 * seconds, "us")
