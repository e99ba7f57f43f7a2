"""What the readers by masked language model, native and reference, do around the slots."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from fastmrc.cuda.runtime import deferred_checks, to_host
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.options import SlotOptions
from fastmrc.pretrained import LoadedModel
from fastmrc.readers.base import PreparedQuestion, Reader, Reading, Window, to_answer
from fastmrc.readers.voting import voting_windows
from fastmrc.text import TokenizedText, join_tokens
from fastmrc.types import Answer, Timings

__all__ = ["FilledSlots", "SlotKernels", "SlotReader", "WindowSlots"]


@dataclass(frozen=True, slots=True)
class WindowSlots:
    """The answers of one window, best first, and the probability that it holds none."""

    readings: list[Reading]
    no_answer: float


@dataclass(frozen=True, slots=True)
class FilledSlots:
    """What the slots of each window of a question spell, and the seconds they took."""

    windows: list[WindowSlots]
    encode: float
    decode: float


@dataclass(frozen=True, slots=True)
class SlotKernels:
    """Operations of one side, with the signatures of `fastmrc.ops` and `fastmrc.SpanIndex`."""

    slot_argmax: Callable[..., Any]
    slot_topk: Callable[..., Any]
    row_stats: Callable[..., Any]
    span_index: Callable[..., Any]


class SlotReader(Reader):
    """Base of the MLM readers: ``[CLS] [MASK]*L [SEP] question [SEP] passage [SEP]``."""

    method = "mlm"
    options_type = SlotOptions
    kernels: ClassVar[SlotKernels]

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        if self._codec.mask_id is None:
            raise UnsupportedModelError(f"{loaded.source}: the tokenizer names no mask token")
        self._mask_id = self._codec.mask_id

    @abstractmethod
    def _fill(
        self, questions: Sequence[PreparedQuestion], options: SlotOptions, progress: bool
    ) -> list[FilledSlots]:
        """Fill the slots of every window of each question."""

    def _read_slots(
        self,
        logits: Any,
        windows: Sequence[Window],
        constraints: Sequence[Any],
        options: SlotOptions,
    ) -> list[WindowSlots]:
        """Read the answers of windows off their logits [windows, slots, V]."""
        automata = [
            self.kernels.span_index([window.text.token_ids])
            if constraint is None and options.mode == "extractive"
            else constraint
            for window, constraint in zip(windows, constraints, strict=True)
        ]
        rules = {
            "end_id": self._codec.sep_id,
            "constraint": automata,
            "min_tokens": options.min_answer_tokens,
        }
        first = logits[:, 0]
        with deferred_checks() as faults:
            if options.decoding == "exact":
                found = self.kernels.slot_topk(logits, options.top_k, **rules)
            else:
                found = (array[:, None] for array in self.kernels.slot_argmax(logits, **rules))
            *_, logsumexp = self.kernels.row_stats(first)
            tokens, lengths, scores = (to_host(array) for array in found)
            faults.check()
        ends = to_host(first[:, self._codec.sep_id]).astype(np.float64)
        no_answer = np.exp(ends - to_host(logsumexp)).tolist()
        return [
            WindowSlots(_readings_of(window, tokens[i], lengths[i], scores[i]), no_answer[i])
            for i, window in enumerate(windows)
        ]

    def _window(
        self,
        passage: int,
        piece: TokenizedText,
        question_ids: NDArray[np.int32],
        options: SlotOptions,
    ) -> Window:
        self._check_length(options.max_answer_tokens + len(question_ids) + len(piece) + 4)
        cls, sep = [self._codec.cls_id], [self._codec.sep_id]
        slots = [self._mask_id] * options.max_answer_tokens
        before = join_tokens(cls, slots, sep, question_ids, sep)
        input_ids = join_tokens(before, piece.token_ids, sep)
        return Window(passage, piece, input_ids, np.zeros_like(input_ids), len(before))

    def _checked_options(self, options: dict[str, Any]) -> SlotOptions:
        checked = cast(SlotOptions, super()._checked_options(options))
        # Said before any passage is read: a data set fails at once, not question by question.
        most = self._max_positions
        if most is not None and checked.max_answer_tokens > most:
            raise InputError(
                f"max_answer_tokens: expected at most {most}, the positions of the model, "
                f"got {checked.max_answer_tokens}"
            )
        return checked

    def _answer_prepared(
        self, questions: list[PreparedQuestion], options: SlotOptions, progress: bool
    ) -> list[Answer]:
        free = [question.constraint is None for question in questions]
        if options.decoding == "exact" and options.mode == "generative" and any(free):
            raise InputError(
                "decoding: expected 'greedy' with mode 'generative', got 'exact', which needs "
                "the spans of a passage or a constraint"
            )
        filled = self._fill(questions, options, progress)
        return [
            self._assemble(question, item, options)
            for question, item in zip(questions, filled, strict=True)
        ]

    def _assemble(
        self, question: PreparedQuestion, filled: FilledSlots, options: SlotOptions
    ) -> Answer:
        begin = time.perf_counter()
        # A window whose best answer is empty holds none: its further ones do not change that.
        given = [own.readings for own in filled.windows]
        given = [own if own and own[0].token_ids else [] for own in given]
        no_answer = [own.no_answer for own in filled.windows]
        weights = question.window_weights()
        ratio = options.no_answer_ratio
        voting = voting_windows([bool(own) for own in given], no_answer, weights, ratio)
        candidates = self._vote(
            question,
            [given[i] for i in voting],
            [weights[i] for i in voting],
            [window for window, own in zip(question.windows, given, strict=True) if own],
            options,
            options.mode == "extractive",
        )
        decode = filled.decode + time.perf_counter() - begin
        best = candidates[0] if candidates else None
        timings = Timings(0.0, filled.encode, decode)
        return to_answer(best, candidates, options, timings, min(no_answer, default=None))


def _readings_of(
    window: Window,
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int32],
    scores: NDArray[np.float32],
) -> list[Reading]:
    """Turn the arrays of one window, [k, slots], [k] and [k], into its answers."""
    return [
        Reading(window, tokens[i, :n].tolist(), float(scores[i]), n < tokens.shape[1])
        for i, n in enumerate(lengths.tolist())
        if n >= 0
    ]
