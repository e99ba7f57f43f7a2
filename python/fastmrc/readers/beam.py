"""What the seq2seq readers, native and reference, do around the beam search."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError
from fastmrc.options import SearchOptions
from fastmrc.readers.base import PreparedQuestion, Reader, Reading, Window, to_answer
from fastmrc.readers.voting import voting_windows
from fastmrc.text import TokenizedText, join_tokens
from fastmrc.types import Answer, Candidate, Hypothesis, SearchResult, Timings

__all__ = ["BeamReader", "Decoded"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """The search's result for one question and the seconds it took."""

    result: SearchResult
    encode: float
    decode: float


class BeamReader(Reader):
    """Base of the seq2seq readers: the input is ``[CLS] passage [SEP] question [SEP]``."""

    method = "seq2seq"
    attention = "sdpa"
    options_type = SearchOptions

    @abstractmethod
    def _decode(
        self, questions: Sequence[PreparedQuestion], options: SearchOptions, progress: bool
    ) -> list[Decoded]:
        """Run the search for each question; one without windows has no answer."""

    def _window(
        self,
        passage: int,
        piece: TokenizedText,
        question_ids: NDArray[np.int32],
        options: SearchOptions,
    ) -> Window:
        cls, sep = [self._codec.cls_id], [self._codec.sep_id]
        input_ids = join_tokens(cls, piece.token_ids, sep, question_ids, sep)
        return Window(passage, piece, input_ids, np.zeros_like(input_ids), 1)

    def _answer_prepared(
        self, questions: list[PreparedQuestion], options: SearchOptions, progress: bool
    ) -> list[Answer]:
        if options.beam_size > self._vocabulary_size:
            raise InputError(
                f"beam_size: expected at most the vocabulary size {self._vocabulary_size}, "
                f"got {options.beam_size}"
            )
        if options.combine == "answer":
            return self._answer_by_window(questions, options, progress)
        decoded = self._decode(questions, options, progress)
        return [
            self._assemble(question, item, options)
            for question, item in zip(questions, decoded, strict=True)
        ]

    def _assemble(
        self, question: PreparedQuestion, decoded: Decoded, options: SearchOptions
    ) -> Answer:
        begin = time.perf_counter()
        result = decoded.result
        windows = [
            window
            for window, stays in zip(question.windows, result.surviving, strict=True)
            if stays
        ]
        extractive = options.mode == "extractive"
        candidates = [self._candidate(question, windows, h, extractive) for h in result.hypotheses]
        best = None
        if result.best is not None:
            best = next(
                candidate
                for candidate, h in zip(candidates, result.hypotheses, strict=True)
                if h == result.best
            )
        decode = decoded.decode + time.perf_counter() - begin
        timings = Timings(0.0, decoded.encode, decode)
        no_answer = min(result.no_answer, default=None)
        return to_answer(best, candidates, options, timings, no_answer)

    def _answer_by_window(
        self, questions: list[PreparedQuestion], options: SearchOptions, progress: bool
    ) -> list[Answer]:
        """Read every window alone and let finished answers vote (``combine="answer"``)."""
        alone = [
            PreparedQuestion(question.passages, [window], None, question.constraint)
            for question in questions
            for window in question.windows
        ]
        # One passage has nobody to agree with: its own probabilities are the score.
        decoded = self._decode(alone, replace(options, vote="mean", no_answer_ratio=None), progress)
        ends = np.cumsum([0] + [len(question.windows) for question in questions])
        answers = []
        for question, (first, last) in zip(questions, pairwise(ends.tolist()), strict=True):
            begin = time.perf_counter()
            group = decoded[first:last]
            candidates = self._vote_on_results(question, group, options)
            timings = Timings(
                0.0,
                sum(item.encode for item in group),
                sum(item.decode for item in group) + time.perf_counter() - begin,
            )
            best = candidates[0] if candidates else None
            no_answer = min((item.result.no_answer[0] for item in group), default=None)
            heard = candidates[: options.beam_size]
            answers.append(to_answer(best, heard, options, timings, no_answer))
        return answers

    def _vote_on_results(
        self, question: PreparedQuestion, group: Sequence[Decoded], options: SearchOptions
    ) -> list[Candidate]:
        """Merge the answers of the windows; the score is the logarithm of the vote."""
        weights = question.window_weights()
        results = [item.result for item in group]
        voting = voting_windows(
            [result.surviving[0] for result in results],
            [result.no_answer[0] for result in results],
            weights,
            options.no_answer_ratio,
        )
        readings: list[list[Reading]] = []
        for i in voting:
            window, best = question.windows[i], results[i].best
            if best is None or not best.token_ids:
                readings.append([])
                continue
            s = math.exp(_mean_log_probability(best, options))
            readings.append([Reading(window, best.token_ids, s, best.finished)])
        voted = self._vote(
            question,
            readings,
            [weights[i] for i in voting],
            [w for w, result in zip(question.windows, results, strict=True) if result.surviving[0]],
            options,
            options.mode == "extractive",
        )
        return [replace(c, score=math.log(c.score) if c.score > 0 else -math.inf) for c in voted]


def _mean_log_probability(hypothesis: Hypothesis, options: SearchOptions) -> float:
    length = len(hypothesis.token_ids) + hypothesis.finished
    total = hypothesis.score
    if options.finish == "pool":
        total *= length**options.length_penalty
    return total / length
