"""What every reader does around its search: texts to tokens, results to answers."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fastmrc import _C
from fastmrc.constraints import Automaton, flatten_sequences
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.options import ReaderOptions
from fastmrc.pretrained import (
    SETTINGS_FILE,
    LoadedModel,
    Method,
    Normalization,
    Task,
    load_model,
    max_positions,
)
from fastmrc.readers.voting import answer_vote
from fastmrc.text import TextCodec, TokenizedText, window_starts
from fastmrc.types import Answer, Candidate, Hypothesis, Span, Timings

__all__ = ["PreparedQuestion", "Reader", "Reading", "Window", "to_answer"]


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a passage that is read on its own."""

    passage: int  # index into the caller's list
    text: TokenizedText
    input_ids: NDArray[np.int32]  # the encoder's input
    token_types: NDArray[np.int32]  # of the encoder's input
    text_at: int  # where the text begins in the input


@dataclass(frozen=True, slots=True)
class PreparedQuestion:
    """A question in tokens."""

    passages: Sequence[str]
    windows: list[Window]
    weights: Sequence[float] | None  # one per passage
    constraint: Automaton | None

    def window_weights(self) -> list[float]:
        """Return the weight of the passage of each window, 1.0 without weights."""
        if self.weights is None:
            return [1.0] * len(self.windows)
        return [float(self.weights[window.passage]) for window in self.windows]


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer that one window or passage gives on its own.

    Attributes
    ----------
    window
        Where it was found.
    token_ids
        Without the end token; none: no answer.
    score
        0 to 1.
    finished
        Whether the end token was chosen.
    surface
        Characters of the answer where the reader knows its place, else None.
    """

    window: Window
    token_ids: list[int]
    score: float
    finished: bool = True
    surface: str | None = None


class Reader(ABC):
    """Base of all readers, native and reference.

    A subclass says what its options are, how a window becomes the encoder's input, and how prepared
    questions are answered; everything else is here.
    """

    method: ClassVar[Method]
    task: ClassVar[Task] = "masked-LM"
    attention: ClassVar[str | None] = None  # implementation of transformers; None: any
    options_type: ClassVar[type[ReaderOptions]]

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._codec = TextCodec(loaded.tokenizer, loaded.normalization)
        self._vocabulary_size = int(loaded.model.config.vocab_size)
        self._max_positions = max_positions(loaded.model.config)
        self._settings: dict[str, Any] = {}
        settings = dict(loaded.reading.get(self.method, {}))
        try:
            self._checked_options(settings)
        except (InputError, TypeError) as error:
            text = str(error).removeprefix("answer: ")
            raise UnsupportedModelError(
                f"{loaded.source}: {SETTINGS_FILE}: reading: {self.method}: {text}"
            ) from None
        self._settings = settings

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: str = "float32",
        normalization: Normalization | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a reader.

        Parameters
        ----------
        path_or_id
            Directory or hub id of a model fine-tuned for this reader; nothing: the packaged model.
        device
            ``"cpu"`` (default) or a CUDA device, where the search runs, too, if the package was
            built with its kernels (``fastmrc.build_info()["cuda"]``).
        dtype
            ``"float32"``, ``"bfloat16"``, ``"float16"`` (for GPUs) or ``"auto"``: bfloat16 where
            the hardware multiplies it natively. LM head, softmax and scores stay float32; start and
            end heads run in `dtype`.
        normalization
            Characters of passages before tokenising: ``"original"`` or ``"none"``; by default what
            the model directory says.
        revision, local_files_only
            As in transformers.

        Raises
        ------
        InputError
            If the model does not exist or an argument is wrong.
        UnsupportedModelError
            If the model cannot serve this reader.
        """
        if normalization not in (None, "original", "none"):
            raise InputError(f"normalization: expected original or none, got {normalization!r}")
        loaded = load_model(
            path_or_id,
            task=cls.task,
            attention=cls.attention,
            revision=revision,
            local_files_only=local_files_only,
            dtype=dtype,
            device=device,
        )
        if normalization is not None:
            loaded = replace(loaded, normalization=normalization)
        return cls(loaded)

    def answer(
        self,
        question: str,
        passages: Sequence[str],
        *,
        passage_weights: Sequence[float] | None = None,
        constraint: Automaton | None = None,
        **options: Any,
    ) -> Answer:
        """Answer one question from its passages.

        Parameters
        ----------
        question
            Not empty; cut on the right at `max_question_tokens`.
        passages
            Any number; none of them, or only empty ones, give the empty answer.
        passage_weights
            One finite number >= 0 per passage, for the vote ``"weighted"``.
        constraint
            Automaton over token ids that replaces the constraint of the mode, for instance a
            `fastmrc.Trie` of the admissible answers. Not for `SpanReader`.
        **options
            Fields of the reader's options: `fastmrc.options.SearchOptions` for `Seq2SeqReader`,
            `SlotOptions` for `MLMReader`, `SpanOptions` for `SpanReader`. Where none is given the
            model's own holds (``reading`` in its ``fastmrc.json``), else the default. A `stride` of
            the model's that does not fit the `max_passage_tokens` of the call becomes half of it.

        Returns
        -------
        Answer

        Raises
        ------
        InputError
            If an argument is wrong; the message names it.
        TypeError
            If a question or passage is no string, or for an unknown keyword.
        """
        weights = None if passage_weights is None else [passage_weights]
        constraints = None if constraint is None else [constraint]
        return self.answer_batch(
            [(question, passages)], passage_weights=weights, constraints=constraints, **options
        )[0]

    def answer_batch(
        self,
        questions: Iterable[tuple[str, Sequence[str]]],
        *,
        passage_weights: Sequence[Sequence[float]] | None = None,
        constraints: Sequence[Automaton | None] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[Answer]:
        """Answer many questions, several at once.

        Parameters
        ----------
        questions
            Pairs of question and passages.
        passage_weights, constraints
            One entry per question.
        progress
            Whether to show a progress bar on stderr.
        **options
            As for `answer`.

        Returns
        -------
        list of Answer
            In the order of the questions.
        """
        checked = self._checked_options(options)
        pairs = list(questions)
        _check_per_question("passage_weights", passage_weights, len(pairs))
        _check_per_question("constraints", constraints, len(pairs))
        begin = time.perf_counter()
        prepared = [
            self._prepare(
                f"questions[{i}]" if len(pairs) > 1 else "question",
                pair,
                None if passage_weights is None else passage_weights[i],
                None if constraints is None else constraints[i],
                checked,
            )
            for i, pair in enumerate(pairs)
        ]
        tokenise = (time.perf_counter() - begin) / max(1, len(pairs))
        answers = self._answer_prepared(prepared, checked, progress)
        return [
            replace(answer, timings=replace(answer.timings, tokenise=tokenise))
            for answer in answers
        ]

    @abstractmethod
    def _answer_prepared(
        self, questions: list[PreparedQuestion], options: Any, progress: bool
    ) -> list[Answer]:
        """Answer the questions; one without windows has no answer."""

    @abstractmethod
    def _window(
        self, passage: int, piece: TokenizedText, question_ids: NDArray[np.int32], options: Any
    ) -> Window:
        """Build the encoder's input for a piece of a passage."""

    def _checked_options(self, options: dict[str, Any]) -> ReaderOptions:
        names = {field.name for field in fields(self.options_type)}
        unknown = sorted(set(options) - names)
        if unknown:
            raise TypeError(
                f"answer: unexpected keyword {', '.join(unknown)}; "
                f"expected {', '.join(sorted(names))}"
            )
        merged = self._settings | options
        most, stride = merged.get("max_passage_tokens"), merged.get("stride")
        if "stride" not in options and isinstance(most, int) and stride and stride >= most:
            merged["stride"] = most // 2
        return self.options_type(**merged)

    def _prepare(
        self,
        name: str,
        pair: tuple[str, Sequence[str]],
        weights: Sequence[float] | None,
        constraint: Automaton | None,
        options: ReaderOptions,
    ) -> PreparedQuestion:
        question, passages = _checked_pair(name, pair)
        if (weights is None) == (options.vote == "weighted"):
            raise InputError(
                "passage_weights: expected one per passage for vote 'weighted' and none otherwise"
            )
        if weights is not None:
            _check_weights(name, weights, len(passages))
        question_ids = self._codec.encode_question(question)[: options.max_question_tokens]
        windows = []
        for p, text in enumerate(self._codec.encode_passages(passages)):
            if len(text) == 0:
                continue  # nothing to read: takes no part
            for start in window_starts(len(text), options.max_passage_tokens, options.stride):
                piece = text.piece(start, start + options.max_passage_tokens)
                windows.append(self._window(p, piece, question_ids, options))
        return PreparedQuestion(passages, windows, weights, constraint)

    def _check_length(self, tokens: int) -> None:
        if self._max_positions is not None and tokens > self._max_positions:
            raise InputError(
                f"passages: expected inputs of at most {self._max_positions} tokens, the positions "
                f"of the model, got {tokens}; lower max_passage_tokens, max_question_tokens or "
                f"max_answer_tokens"
            )

    def _candidate(
        self,
        question: PreparedQuestion,
        windows: Sequence[Window],
        reading: Reading | Hypothesis,
        extractive: bool,
        surface: str | None = None,
        spellings: Iterable[tuple[int, ...]] = (),
    ) -> Candidate:
        """Locate an answer, and its other `spellings` in tokens, and give it its text."""
        found = {
            span
            for tokens in {tuple(reading.token_ids), *spellings}
            for span in self._spans(question, windows, tokens, surface)
        }
        spans = sorted(found, key=lambda span: (span.passage, span.start, span.end))
        if extractive and spans:
            text = _cut(question.passages, spans[0])
        else:
            text = self._codec.decode(reading.token_ids)
        return Candidate(text, reading.score, reading.token_ids, spans, reading.finished)

    def _spans(
        self,
        question: PreparedQuestion,
        windows: Sequence[Window],
        token_ids: Sequence[int],
        surface: str | None = None,
    ) -> list[Span]:
        """Find every occurrence of the tokens in the windows, as characters of the passages.

        [UNK] stands for many texts, of which only `surface`, or else the first, is the answer.
        """
        if not token_ids:
            return []
        tokens, offsets = flatten_sequences("passages", [w.text.token_ids for w in windows])
        found = _C.find_occurrences(tokens, offsets, np.array(token_ids, dtype=np.int32))
        spans = set()
        for w, position in found.tolist():
            text = windows[w].text
            start, end = int(text.starts[position]), int(text.ends[position + len(token_ids) - 1])
            passage = windows[w].passage
            spans.add(_strip(question.passages[passage], Span(passage, start, end)))
        ordered = sorted(spans, key=lambda span: (span.passage, span.start, span.end))
        if self._codec.unk_id in token_ids and ordered:
            if surface is None:
                surface = _cut(question.passages, ordered[0])
            ordered = [span for span in ordered if _cut(question.passages, span) == surface]
        return ordered

    def _vote(
        self,
        question: PreparedQuestion,
        voters: Sequence[Sequence[Reading]],
        weights: Sequence[float],
        surviving: Sequence[Window],
        options: ReaderOptions,
        extractive: bool = True,
    ) -> list[Candidate]:
        """Let windows or passages vote on finished answers.

        Parameters
        ----------
        question
            The question.
        voters
            For each window or passage its answers, best first; empty texts take no part.
        weights
            One per voter; those of weight 0 take no part.
        surviving
            Windows in which occurrences are cited.
        options
            With the vote.
        extractive
            Whether answers are written as in the passages.

        Returns
        -------
        list of Candidate
            One per decoded text, best first, ties to the first voter; the score is the vote.
        """
        heard: dict[tuple[str, str | None], dict[int, float]] = {}  # score by voter
        first: dict[tuple[str, str | None], Reading] = {}
        spellings: dict[tuple[str, str | None], set[tuple[int, ...]]] = {}
        for v, readings in enumerate(voters):
            for reading in readings if weights[v] > 0 else ():
                key = (self._codec.decode(reading.token_ids), self._surface(question, reading))
                if key[0] or (extractive and key[1]):
                    first.setdefault(key, reading)
                    heard.setdefault(key, {}).setdefault(v, reading.score)
                    spellings.setdefault(key, set()).add(tuple(reading.token_ids))
        candidates = []
        for key, scores in heard.items():
            given = [weights[v] for v in scores]
            score = answer_vote(list(scores.values()), given, len(voters), options.vote)
            reading = replace(first[key], score=score)
            candidates.append(
                self._candidate(question, surviving, reading, extractive, key[1], spellings[key])
            )
        return sorted(candidates, key=lambda candidate: -candidate.score)  # stable

    def _surface(self, question: PreparedQuestion, reading: Reading) -> str | None:
        """Return what tells apart answers of the same tokens; None if they are the same text."""
        if self._codec.unk_id not in reading.token_ids:
            return None
        if reading.surface is not None:
            return reading.surface
        spans = self._spans(question, [reading.window], reading.token_ids)
        if spans:
            return _cut(question.passages, spans[0])
        return self._codec.decode(reading.token_ids)


def _check_per_question(name: str, values: Sequence[Any] | None, questions: int) -> None:
    if values is not None and len(values) != questions:
        raise InputError(f"{name}: expected one per question, {questions}, got {len(values)}")


def _checked_pair(name: str, pair: tuple[str, Sequence[str]]) -> tuple[str, Sequence[str]]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name}: expected a pair of question and passages, got {pair!r:.60}")
    question, passages = pair
    if not isinstance(question, str):
        raise TypeError(f"{name}: expected a string, got {type(question).__name__}")
    if not question.strip():
        raise InputError(f"{name}: expected a question, got empty text")
    if isinstance(passages, str) or not isinstance(passages, Sequence):
        raise TypeError(f"{name}: expected a list of passages, got {type(passages).__name__}")
    for p, passage in enumerate(passages):
        if not isinstance(passage, str):
            raise TypeError(
                f"{name}: expected passages[{p}] to be a string, got {type(passage).__name__}"
            )
    return question, passages


def _check_weights(name: str, weights: Sequence[float], passages: int) -> None:
    if len(weights) != passages:
        raise InputError(
            f"{name}: expected one passage weight per passage, {passages}, got {len(weights)}"
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"{name}: expected finite passage weights >= 0, got {weight}")


def to_answer(
    best: Candidate | None,
    candidates: list[Candidate],
    options: ReaderOptions,
    timings: Timings,
    no_answer_score: float | None,
) -> Answer:
    """Return the best candidate as the answer, the empty one if it is below the threshold."""
    threshold = options.no_answer_threshold
    found = Answer(candidates=candidates, timings=timings, no_answer_score=no_answer_score)
    if best is None or not best.token_ids or (threshold is not None and best.score < threshold):
        return found
    return replace(
        found, text=best.text, score=best.score, token_ids=best.token_ids, spans=best.spans
    )


def _cut(passages: Sequence[str], span: Span) -> str:
    return passages[span.passage][span.start : span.end]


def _strip(passage: str, span: Span) -> Span:
    """Leave out white space at both ends, which some tokenizers count to a token."""
    text = passage[span.start : span.end]
    start = span.start + len(text) - len(text.lstrip())
    return Span(span.passage, start, max(start, span.end - (len(text) - len(text.rstrip()))))
