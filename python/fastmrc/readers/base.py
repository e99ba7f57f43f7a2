"""What every reader does around its search: texts to tokens, results to answers."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastmrc import _C
from fastmrc.constraints import Automaton, flatten_sequences
from fastmrc.errors import InputError
from fastmrc.options import SearchOptions
from fastmrc.pretrained import LoadedModel, Normalization, load_masked_lm
from fastmrc.text import TextCodec, TokenizedText, window_starts
from fastmrc.types import Answer, Candidate, Hypothesis, SearchResult, Span, Timings

__all__ = ["Decoded", "PreparedQuestion", "Reader", "Window"]

_OPTION_NAMES = frozenset(field.name for field in fields(SearchOptions))


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a passage that takes part in the vote as a passage of its own."""

    passage: int  # index into the caller's list
    text: TokenizedText
    input_ids: NDArray[np.int32]  # [CLS] passage [SEP] question [SEP]


@dataclass(frozen=True, slots=True)
class PreparedQuestion:
    """A question in tokens."""

    passages: Sequence[str]
    windows: list[Window]
    weights: list[float] | None  # one per window
    constraint: Automaton | None


@dataclass(frozen=True, slots=True)
class Decoded:
    """The search's result for one question and the seconds it took."""

    result: SearchResult
    encode: float
    decode: float


class Reader(ABC):
    """Base of the seq2seq readers, native and reference.

    A subclass says how a batch of prepared questions is decoded; everything else is here.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._codec = TextCodec(loaded.tokenizer, loaded.normalization)
        self._vocabulary_size = int(loaded.model.config.vocab_size)

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
            Directory or hub id of a masked language model fine-tuned as a UniLM reader; nothing:
            the packaged model.
        device
            ``"cpu"`` (default) or a CUDA device.
        dtype
            ``"float32"``, ``"bfloat16"`` or ``"auto"``: bfloat16 where the hardware multiplies it
            natively. LM head, softmax and scores stay float32.
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
        from fastmrc.encoder import resolve_dtype

        if dtype not in ("float32", "bfloat16", "auto"):
            raise InputError(f"dtype: expected float32, bfloat16 or auto, got {dtype!r}")
        if normalization not in (None, "original", "none"):
            raise InputError(f"normalization: expected original or none, got {normalization!r}")
        loaded = load_masked_lm(
            path_or_id,
            revision=revision,
            local_files_only=local_files_only,
            dtype=resolve_dtype(dtype, device or "cpu"),
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
            `fastmrc.Trie` of the admissible answers.
        beam_size
            Hypotheses kept, 1 to the vocabulary size; default 3.
        mode
            ``"extractive"`` (default): the answer is a contiguous piece of a passage;
            ``"generative"``: any text.
        vote
            How passages agree on a token: ``"original"`` (default), ``"mean"``, ``"max"``,
            ``"product"`` or ``"weighted"``; see `fastmrc.ops.beam_step`.
        min_answer_tokens, max_answer_tokens
            Bounds of the answer's length without its end token; default 0 and 32. With n tokens at
            most there are n steps, so an answer of n tokens has no end token.
        finish
            ``"original"`` (default): the search ends when its best hypothesis ends; ``"pool"``: the
            usual rule, finished hypotheses compete by score / length ** `length_penalty`.
        length_penalty
            For ``finish="pool"``; default 1.0.
        combine
            ``"step"`` (default): passages vote on every token; ``"answer"``: each passage is read
            alone and finished answers vote: s of an answer is the geometric mean of its token
            probabilities, equal answers count sum s^2 / (1 + sum s), the score is its logarithm.
        no_answer_threshold
            Answers with a lower score are replaced by the empty one; None (default): never.
        stride
            None (default): passages are cut on the right at `max_passage_tokens`; else they are
            read in windows that share `stride` tokens, each voting as a passage.
        max_passage_tokens, max_question_tokens
            Limits in tokens; default 254 and 63.
        look_ahead
            Tokens that are encoded together with one that has a single continuation in the
            passages, where one question is read at a time; default 4. Changes the number of forward
            passes, and logits by rounding only; 0: one pass per step. `fastmrc.reference` does not
            look ahead.

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
        search_options = _search_options(options)
        if search_options.beam_size > self._vocabulary_size:
            raise InputError(
                f"beam_size: expected at most the vocabulary size {self._vocabulary_size}, "
                f"got {search_options.beam_size}"
            )
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
                search_options,
            )
            for i, pair in enumerate(pairs)
        ]
        tokenise = (time.perf_counter() - begin) / max(1, len(pairs))
        if search_options.combine == "answer":
            return self._answer_by_passage(prepared, search_options, tokenise, progress)
        decoded = self._decode(prepared, search_options, progress)
        return [
            self._assemble(question, item, search_options, tokenise)
            for question, item in zip(prepared, decoded, strict=True)
        ]

    @abstractmethod
    def _decode(
        self, questions: Sequence[PreparedQuestion], options: SearchOptions, progress: bool
    ) -> list[Decoded]:
        """Run the search for each question; one without windows has no answer."""

    def _prepare(
        self,
        name: str,
        pair: tuple[str, Sequence[str]],
        weights: Sequence[float] | None,
        constraint: Automaton | None,
        options: SearchOptions,
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
                windows.append(Window(p, piece, self._input_ids(piece, question_ids)))
        window_weights = None if weights is None else [float(weights[w.passage]) for w in windows]
        return PreparedQuestion(passages, windows, window_weights, constraint)

    def _input_ids(
        self, piece: TokenizedText, question_ids: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        cls, sep = [self._codec.cls_id], [self._codec.sep_id]
        parts = [cls, piece.token_ids, sep, question_ids, sep]
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])

    def _assemble(
        self,
        question: PreparedQuestion,
        decoded: Decoded,
        options: SearchOptions,
        tokenise: float,
    ) -> Answer:
        begin = time.perf_counter()
        result = decoded.result
        windows = [
            window
            for window, stays in zip(question.windows, result.surviving, strict=True)
            if stays
        ]
        candidates = [self._candidate(question, windows, h, options) for h in result.hypotheses]
        best = None
        if result.best is not None:
            best = next(
                candidate
                for candidate, h in zip(candidates, result.hypotheses, strict=True)
                if h == result.best
            )
        decode = decoded.decode + time.perf_counter() - begin
        timings = Timings(tokenise, decoded.encode, decode)
        return _to_answer(best, candidates, options, timings)

    def _candidate(
        self,
        question: PreparedQuestion,
        windows: list[Window],
        hypothesis: Hypothesis,
        options: SearchOptions,
    ) -> Candidate:
        spans = self._spans(question, windows, hypothesis.token_ids)
        if options.mode == "extractive" and spans:
            text = _cut(question.passages, spans[0])
        else:
            text = self._codec.decode(hypothesis.token_ids)
        return Candidate(text, hypothesis.score, hypothesis.token_ids, spans, hypothesis.finished)

    def _spans(
        self,
        question: PreparedQuestion,
        windows: list[Window],
        token_ids: list[int],
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

    def _answer_by_passage(
        self,
        questions: list[PreparedQuestion],
        options: SearchOptions,
        tokenise: float,
        progress: bool,
    ) -> list[Answer]:
        """Read every window alone and let finished answers vote (``combine="answer"``)."""
        alone = [
            PreparedQuestion(question.passages, [window], None, question.constraint)
            for question in questions
            for window in question.windows
        ]
        weights = [w for question in questions for w in question.weights or ()]
        # One passage has nobody to agree with: its own probabilities are the score.
        decoded = self._decode(alone, replace(options, vote="mean"), progress)
        ends = np.cumsum([0] + [len(question.windows) for question in questions])
        answers = []
        for question, (first, last) in zip(questions, pairwise(ends.tolist()), strict=True):
            begin = time.perf_counter()
            group = decoded[first:last]
            candidates = self._vote_on_answers(
                question, group, weights[first:last] or [1.0] * len(group), options
            )
            timings = Timings(
                tokenise,
                sum(item.encode for item in group),
                sum(item.decode for item in group) + time.perf_counter() - begin,
            )
            best = candidates[0] if candidates else None
            answers.append(_to_answer(best, candidates[: options.beam_size], options, timings))
        return answers

    def _vote_on_answers(
        self,
        question: PreparedQuestion,
        group: Sequence[Decoded],
        weights: Sequence[float],
        options: SearchOptions,
    ) -> list[Candidate]:
        """Merge the answers of the windows; best first, ties to the first window."""
        merged: dict[tuple[tuple[int, ...], str | None], tuple[float, float, Candidate]] = {}
        surviving = [
            window
            for window, item in zip(question.windows, group, strict=True)
            if item.result.surviving[0]
        ]
        for window, item, weight in zip(question.windows, group, weights, strict=True):
            best = item.result.best
            if best is None or not best.token_ids:
                continue  # empty answers take no part
            own = self._candidate(question, [window], best, options)
            key = (tuple(best.token_ids), self._surface(question, own))
            s = math.exp(_mean_log_probability(best, options))
            total, squares, candidate = merged.get(key, (0.0, 0.0, own))
            merged[key] = (total + weight * s, squares + weight * s * s, candidate)
        candidates = []
        for (_, surface), (total, squares, candidate) in merged.items():
            spans = self._spans(question, surviving, candidate.token_ids, surface)
            vote = squares / (1.0 + total)
            score = math.log(vote) if vote > 0 else -math.inf
            candidates.append(replace(candidate, score=score, spans=spans or candidate.spans))
        return sorted(candidates, key=lambda candidate: -candidate.score)  # stable

    def _surface(self, question: PreparedQuestion, candidate: Candidate) -> str | None:
        """Return what tells apart answers of the same tokens; None if they are the same text."""
        if self._codec.unk_id not in candidate.token_ids:
            return None
        return _cut(question.passages, candidate.spans[0]) if candidate.spans else candidate.text


def _mean_log_probability(hypothesis: Hypothesis, options: SearchOptions) -> float:
    length = len(hypothesis.token_ids) + hypothesis.finished
    total = hypothesis.score
    if options.finish == "pool":
        total *= length**options.length_penalty
    return total / length


def _search_options(options: dict[str, Any]) -> SearchOptions:
    unknown = sorted(set(options) - _OPTION_NAMES)
    if unknown:
        raise TypeError(
            f"answer: unexpected keyword {', '.join(unknown)}; "
            f"expected {', '.join(sorted(_OPTION_NAMES))}"
        )
    return SearchOptions(**options)


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


def _to_answer(
    best: Candidate | None,
    candidates: list[Candidate],
    options: SearchOptions,
    timings: Timings,
) -> Answer:
    threshold = options.no_answer_threshold
    if best is None or not best.token_ids or (threshold is not None and best.score < threshold):
        return Answer(candidates=candidates, timings=timings)
    return Answer(best.text, best.score, best.token_ids, best.spans, candidates, timings)


def _cut(passages: Sequence[str], span: Span) -> str:
    return passages[span.passage][span.start : span.end]


def _strip(passage: str, span: Span) -> Span:
    """Leave out white space at both ends, which some tokenizers count to a token."""
    text = passage[span.start : span.end]
    start = span.start + len(text) - len(text.lstrip())
    return Span(span.passage, start, max(start, span.end - (len(text) - len(text.rstrip()))))
