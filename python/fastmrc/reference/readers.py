"""The reader of the original: the baseline of the engine, with the same signatures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from fastmrc.options import SearchOptions
from fastmrc.pretrained import LoadedModel
from fastmrc.readers.base import Decoded, PreparedQuestion, Reader
from fastmrc.reference.beam_search import beam_search
from fastmrc.reference.encoder import ReencodingEncoder
from fastmrc.types import SearchResult

__all__ = ["Seq2SeqReader"]


class Seq2SeqReader(Reader):
    """UniLM reader in plain Python: one question at a time, every hypothesis encoded anew.

    Same arguments and answers as `fastmrc.Seq2SeqReader`.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        self._encoder = ReencodingEncoder(loaded.model, end_id=self._codec.sep_id)

    def _decode(
        self, questions: Sequence[PreparedQuestion], options: SearchOptions, progress: bool
    ) -> list[Decoded]:
        return [
            self._search(question, options)
            for question in tqdm(questions, disable=not progress, unit="question")
        ]

    def _search(self, question: PreparedQuestion, options: SearchOptions) -> Decoded:
        if not question.windows:
            return Decoded(SearchResult(None, [], []), 0.0, 0.0)
        begin = time.perf_counter()
        clock = _Clock(
            self._encoder.next_logits_for([w.input_ids.tolist() for w in question.windows])
        )
        result = beam_search(
            clock,
            [window.text.token_ids.tolist() for window in question.windows],
            end_id=self._codec.sep_id,
            beam_size=options.beam_size,
            mode=options.mode,
            vote=options.vote,
            weights=question.weights,
            min_tokens=options.min_answer_tokens,
            max_tokens=options.max_answer_tokens,
            finish=options.finish,
            length_penalty=options.length_penalty,
            constraint=question.constraint,
        )
        total = time.perf_counter() - begin
        return Decoded(result, clock.seconds, total - clock.seconds)


class _Clock:
    """Calls a function and adds up the time it takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        begin = time.perf_counter()
        result = self._function(*args)
        self.seconds += time.perf_counter() - begin
        return result
