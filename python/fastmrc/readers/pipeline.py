"""The calling convention of the question-answering pipeline that transformers had up to 5.2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

from fastmrc.errors import InputError
from fastmrc.readers.base import Window
from fastmrc.readers.span_heads import (
    SpanHeadReader,
    WindowSpans,
    spans_to_look_at,
    widen_to_words,
)
from fastmrc.readers.voting import answer_vote
from fastmrc.text import TokenizedText, window_starts

__all__ = ["answer_as_pipeline"]

_MAX_SEQ_LEN = 384
_DOC_STRIDE = 128

Result = dict[str, Any]

_EMPTY: Result = {"score": 0.0, "start": 0, "end": 0, "answer": ""}


@dataclass(frozen=True, slots=True)
class _Example:
    question: str
    contexts: list[str]
    several: bool  # whether the caller gave a list of contexts


def answer_as_pipeline(
    reader: SpanHeadReader,
    *inputs: Any,
    question: Any = None,
    context: Any = None,
    top_k: int = 1,
    doc_stride: int | None = None,
    max_answer_len: int = 15,
    max_seq_len: int | None = None,
    max_question_len: int | None = None,
    handle_impossible_answer: bool = False,
    align_to_words: bool = True,
    padding: object = None,
    batch_size: object = None,
    num_workers: object = None,
) -> Any:
    """Answer as `fastmrc.SpanReader.__call__` says.

    Notes
    -----
    What differs from the pipeline: where fewer spans are possible than `top_k`, it filled up with
    spans of probability 0, which are left out here; `max_question_len`, which it ignored with fast
    tokenizers, is obeyed where it is given; accents that a tokenizer drops stay with their letter.
    """
    top_k = _require_int("top_k", top_k, 1)
    max_answer_len = _require_int("max_answer_len", max_answer_len, 1)
    examples, single = _examples(inputs, question, context)
    limits = _Limits(reader, max_seq_len, doc_stride, max_question_len)
    windows = [_windows(reader, example, limits) for example in examples]
    found = reader._best_spans(
        [window for own in windows for window in own],
        spans_to_look_at(top_k, align_to_words),
        max_answer_len,
        progress=False,
    )
    remaining = iter(found)
    results = []
    for example, own in zip(examples, windows, strict=True):
        spans = list(islice(remaining, len(own)))
        by_context: list[list[tuple[Window, WindowSpans]]] = [[] for _ in example.contexts]
        for window, of_window in zip(own, spans, strict=True):
            by_context[window.passage].append((window, of_window))
        answers = [
            _merge(text, group, align_to_words)
            for text, group in zip(example.contexts, by_context, strict=True)
        ]
        merged = _vote(answers) if example.several else answers[0]
        if handle_impossible_answer:
            null_scores = [one.null_score for one in spans if one.null_score is not None]
            null = min(null_scores, default=0.0)
            merged.append(_EMPTY | {"score": _original_vote([null]) if example.several else null})
        merged = sorted(merged, key=lambda answer: -answer["score"])[:top_k] or [dict(_EMPTY)]
        results.append(merged[0] if len(merged) == 1 else merged)
    return results[0] if single else results


def _require_int(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return int(value)


class _Limits:
    """Lengths of windows, in tokens."""

    def __init__(
        self,
        reader: SpanHeadReader,
        max_seq_len: int | None,
        doc_stride: int | None,
        max_question_len: int | None,
    ) -> None:
        longest = reader._max_positions
        if max_seq_len is None:
            max_seq_len = _MAX_SEQ_LEN if longest is None else min(longest, _MAX_SEQ_LEN)
        self.sequence = _require_int("max_seq_len", max_seq_len, 1)
        if longest is not None and self.sequence > longest:
            raise InputError(
                f"max_seq_len: expected at most {longest}, the positions of the model, "
                f"got {self.sequence}"
            )
        self.stride = None if doc_stride is None else _require_int("doc_stride", doc_stride, 0)
        self.question = (
            None
            if max_question_len is None
            else _require_int("max_question_len", max_question_len, 1)
        )

    def window(self, special: int, question: int) -> tuple[int, int]:
        """Return the context tokens of a window and those it shares with the next one."""
        size = self.sequence - special - question
        if size < 1:
            raise InputError(
                f"max_seq_len: expected room for the context beside {special} special tokens and "
                f"{question} of the question, got {self.sequence}"
            )
        if self.stride is None:
            return size, min(self.sequence // 2, _DOC_STRIDE, size - 1)
        if self.stride >= size:
            raise InputError(
                f"doc_stride: expected 0 to less than {size}, the context tokens of a window, "
                f"got {self.stride}"
            )
        return size, self.stride


def _windows(reader: SpanHeadReader, example: _Example, limits: _Limits) -> list[Window]:
    question = reader._codec.encode_question(example.question)[: limits.question]
    size, stride = limits.window(reader._layout.num_special, len(question))
    windows = []
    for p, text in enumerate(reader._codec.encode_passages(example.contexts)):
        for start in window_starts(len(text), size, stride):
            piece = text.piece(start, start + size)
            if len(piece):
                windows.append(reader._window(p, piece, question))
    return windows


def _merge(
    context: str, windows: Sequence[tuple[Window, WindowSpans]], align_to_words: bool
) -> list[Result]:
    """Collect the answers of one context; the scores of equal texts add up, as in the pipeline."""
    answers: dict[str, Result] = {}
    for window, found in windows:
        for first, last, score in found.spans:
            start, end = _characters(window.text, first, last, align_to_words)
            text = context[start:end]
            answer = answers.setdefault(
                text.lower(), {"score": 0.0, "start": start, "end": end, "answer": text}
            )
            answer["score"] += score
    return list(answers.values())


def _characters(
    text: TokenizedText, first: int, last: int, align_to_words: bool
) -> tuple[int, int]:
    if align_to_words:
        first, last = widen_to_words(text, first, last)
    return int(text.starts[first]), int(text.ends[last])


def _vote(answers: Sequence[Sequence[Result]]) -> list[Result]:
    """Let the contexts of one question vote on equal texts; ties to the first context."""
    scores: dict[str, list[float]] = {}
    first: dict[str, Result] = {}
    for passage, own in enumerate(answers):
        for answer in own:
            key = answer["answer"].lower()
            scores.setdefault(key, []).append(answer["score"])
            first.setdefault(key, answer | {"passage": passage})
    return [first[key] | {"score": _original_vote(given)} for key, given in scores.items()]


def _original_vote(scores: Sequence[float]) -> float:
    return answer_vote(scores, [1.0] * len(scores), len(scores), "original")


def _examples(inputs: tuple[Any, ...], question: Any, context: Any) -> tuple[list[_Example], bool]:
    """Return the inputs in one form, and whether the caller expects one result."""
    if inputs and (question is not None or context is not None):
        raise InputError("question, context: expected keywords or positional inputs, got both")
    if inputs:
        return _positional(inputs)
    if isinstance(question, str):
        return [_example(0, question, context)], True
    if not isinstance(question, list | tuple):
        raise InputError(
            f"question: expected a string or a list, got {type(question).__name__}; "
            f"call with question= and context="
        )
    if isinstance(context, str):
        context = [context] * len(question)
    if not isinstance(context, list | tuple) or len(context) != len(question):
        got = len(context) if isinstance(context, list | tuple) else type(context).__name__
        raise InputError(f"context: expected one per question, {len(question)}, got {got}")
    pairs = zip(question, context, strict=True)
    examples = [_example(i, q, c) for i, (q, c) in enumerate(pairs)]
    return examples, len(examples) == 1


def _positional(inputs: tuple[Any, ...]) -> tuple[list[_Example], bool]:
    if len(inputs) == 2 and all(isinstance(item, str) for item in inputs):
        return [_example(0, *inputs)], True
    items: Any = inputs[0] if len(inputs) == 1 else list(inputs)
    if isinstance(items, Mapping):
        items = [items]
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise InputError(f"inputs: expected dictionaries, got {type(items).__name__}")
    examples = []
    for i, item in enumerate(items):
        if not isinstance(item, Mapping) or not {"question", "context"} <= set(item):
            raise InputError(
                f"inputs[{i}]: expected a dictionary with question and context, got {item!r:.60}"
            )
        examples.append(_example(i, item["question"], item["context"]))
    return examples, len(examples) == 1


def _example(index: int, question: Any, context: Any) -> _Example:
    several = isinstance(context, list | tuple)
    contexts = list(context) if several else [context]
    for name, text in [("question", question), *(("context", text) for text in contexts)]:
        if not isinstance(text, str):
            raise InputError(
                f"{name}: expected a string in input {index}, got {type(text).__name__}"
            )
        if not text:
            raise InputError(f"{name}: expected a text in input {index}, got an empty one")
    if not contexts:
        raise InputError(f"context: expected at least one in input {index}, got none")
    return _Example(question, contexts, several)
