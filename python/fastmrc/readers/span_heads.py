"""What the readers by start and end heads, native and reference, do around the best spans."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.options import SpanOptions
from fastmrc.pretrained import LoadedModel
from fastmrc.readers.base import PreparedQuestion, Reader, Reading, Window, to_answer
from fastmrc.text import TokenizedText
from fastmrc.types import Answer, Timings

__all__ = [
    "SpanHeadReader",
    "WindowSpans",
    "spans_of",
    "spans_to_look_at",
    "text_mask",
    "widen_to_words",
]


@dataclass(frozen=True, slots=True)
class WindowSpans:
    """The best spans of a window, and the seconds they took.

    Attributes
    ----------
    spans
        First and last token in the window's text, and the probability; best first.
    null_score
        Probability of "no answer"; None if the tokenizer has no [CLS].
    encode, decode
        Seconds.
    """

    spans: list[tuple[int, int, float]]
    null_score: float | None
    encode: float
    decode: float


class SpanHeadReader(Reader):
    """Base of the span readers: question and passage as the model's tokenizer joins them."""

    method = "span"
    task = "question-answering"
    options_type = SpanOptions

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        if loaded.tokenizer.padding_side != "right":
            raise UnsupportedModelError(
                f"{loaded.source}: expected a tokenizer that pads on the right, where the question "
                f"goes first, got padding on the {loaded.tokenizer.padding_side}"
            )
        self._layout = self._codec.pair_layout()
        before = self._layout.before.tolist()
        cls_id = loaded.tokenizer.cls_token_id
        self._null_position = before.index(cls_id) if cls_id in before else None

    @abstractmethod
    def _best_spans(
        self, windows: Sequence[Window], k: int, max_length: int, progress: bool
    ) -> list[WindowSpans]:
        """Find the best `k` spans of at most `max_length` tokens in each window."""

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """Answer in the way of the question-answering pipeline that transformers had up to 5.2.

        Parameters
        ----------
        *inputs
            One ``{"question": str, "context": str}`` or a list of them, question and context as
            two strings, or nothing and the keywords ``question=`` and ``context=``: two strings,
            two lists, a list of questions with one context, or, beyond the pipeline, one question
            with a list of contexts, which then vote.
        top_k : int
            Answers to return, default 1.
        doc_stride : int
            Tokens that neighbouring windows of a long context share, default 128 (or half of
            `max_seq_len`).
        max_answer_len : int
            Tokens of an answer, default 15.
        max_seq_len : int
            Tokens of a window with question and special tokens, default 384 or the model's limit.
        max_question_len : int
            Tokens of the question, which is cut on the right; default: it is not cut.
        handle_impossible_answer : bool
            Whether the empty answer may be returned; default False.
        align_to_words : bool
            Whether answers are widened to whole words; default True.
        padding, batch_size, num_workers
            Accepted and without effect.

        Returns
        -------
        dict or list
            ``{"score": float, "start": int, "end": int, "answer": str}``, with the index of its
            context as ``"passage"`` where one question has several (the empty answer has none); a
            list of at most `top_k` of them by falling score where there is not exactly one; a list
            of such results for a list of several inputs.

        Raises
        ------
        InputError
            If an argument is wrong; the message names it.
        TypeError
            For an unknown keyword.
        """
        from fastmrc.readers.pipeline import answer_as_pipeline

        return answer_as_pipeline(self, *inputs, **arguments)

    def _window(
        self,
        passage: int,
        piece: TokenizedText,
        question_ids: NDArray[np.int32],
        options: Any = None,
    ) -> Window:
        input_ids, token_types = self._layout.join(question_ids, piece.token_ids)
        self._check_length(len(input_ids))
        text_at = self._layout.second_at(len(question_ids))
        return Window(passage, piece, input_ids, token_types, text_at)

    def _answer_prepared(
        self, questions: list[PreparedQuestion], options: SpanOptions, progress: bool
    ) -> list[Answer]:
        if any(question.constraint is not None for question in questions):
            raise InputError("constraint: expected none, as spans are chosen by start and end")
        windows = [window for question in questions for window in question.windows]
        found = self._best_spans(
            windows,
            spans_to_look_at(options.top_k, options.align_to_words),
            options.max_answer_tokens,
            progress,
        )
        remaining = iter(found)
        return [
            self._assemble(question, list(islice(remaining, len(question.windows))), options)
            for question in questions
        ]

    def _assemble(
        self, question: PreparedQuestion, found: Sequence[WindowSpans], options: SpanOptions
    ) -> Answer:
        begin = time.perf_counter()
        readings: list[list[Reading]] = []
        null_scores = []
        surviving: list[Window] = []
        weights = []
        pairs = zip(question.windows, found, strict=True)
        for p, group in groupby(pairs, key=lambda pair: pair[0].passage):
            own = list(group)
            null_score = _smallest_null(spans for _, spans in own)
            best = self._merge_windows(question.passages[p], own, options)
            if _holds_no_answer(best, null_score, options):
                best = []
            else:
                surviving += [window for window, _ in own]
            readings.append(best)
            weights.append(1.0 if question.weights is None else question.weights[p])
            if null_score is not None:
                null_scores.append(null_score)
        candidates = self._vote(question, readings, weights, surviving, options)
        timings = Timings(
            0.0,
            sum(spans.encode for spans in found),
            sum(spans.decode for spans in found) + time.perf_counter() - begin,
        )
        best_candidate = candidates[0] if candidates else None
        no_answer = min(null_scores, default=None)
        return to_answer(best_candidate, candidates, options, timings, no_answer)

    def _merge_windows(
        self, passage: str, own: Sequence[tuple[Window, WindowSpans]], options: SpanOptions
    ) -> list[Reading]:
        """Return the best answers of one passage.

        Spans of one window that become the same by alignment are different events, whose
        probabilities add up; the same span in another window is the same event, which counts once.
        """
        best: dict[tuple[int, int], Reading] = {}
        for window, found in own:
            inside: dict[tuple[int, int], float] = {}
            for start, end, score in found.spans:
                span = (start, end)
                if options.align_to_words:
                    span = widen_to_words(window.text, start, end)
                inside[span] = inside.get(span, 0.0) + score
            for (start, end), score in inside.items():
                place = int(window.text.starts[start]), int(window.text.ends[end])
                if place in best and best[place].score >= score:
                    continue
                tokens = window.text.token_ids[start : end + 1].tolist()
                surface = passage[place[0] : place[1]].strip()
                best[place] = Reading(window, tokens, score, surface=surface)
        ranked = sorted(best.values(), key=lambda reading: -reading.score)
        return ranked[: options.top_k]


def text_mask(windows: Sequence[Window], columns: int) -> NDArray[np.bool_]:
    """Mark the tokens of the passage, bool [windows, columns]."""
    mask = np.zeros((len(windows), columns), dtype=np.bool_)
    for row, window in zip(mask, windows, strict=True):
        row[window.text_at : window.text_at + len(window.text)] = True
    return mask


def spans_of(window: Window, scores: Any, starts: Any, ends: Any) -> list[tuple[int, int, float]]:
    """Turn the arrays of one window, [k] each, into spans of its text."""
    return [
        (start - window.text_at, end - window.text_at, score)
        for score, start, end in zip(scores.tolist(), starts.tolist(), ends.tolist(), strict=True)
        if start >= 0
    ]


def spans_to_look_at(top_k: int, align_to_words: bool) -> int:
    """Return how many spans of a window to find for `top_k` answers.

    Some become the same when they are widened to words; the number is the pipeline's.
    """
    return 2 * top_k + 10 if align_to_words else top_k


def widen_to_words(text: TokenizedText, start: int, end: int) -> tuple[int, int]:
    """Widen a span of tokens to the words it touches, as far as they are in the text.

    Without words at both ends it stays as it is.
    """
    first, last = int(text.words[start]), int(text.words[end])
    if first < 0 or last < 0:
        return start, end
    while start > 0 and text.words[start - 1] == first:
        start -= 1
    while end + 1 < len(text) and text.words[end + 1] == last:
        end += 1
    return start, end


def _smallest_null(found: Any) -> float | None:
    scores = [spans.null_score for spans in found]
    return None if None in scores else min(scores, default=None)


def _holds_no_answer(
    best: Sequence[Reading], null_score: float | None, options: SpanOptions
) -> bool:
    if not options.handle_impossible_answer or null_score is None or not best:
        return False
    bar = options.null_score_diff_threshold
    return _log(null_score) - _log(best[0].score) > bar


def _log(score: float) -> float:
    return math.log(score) if score > 0 else -1e9
