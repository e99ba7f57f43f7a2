"""The native reader by start and end heads."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastmrc import ops
from fastmrc.cuda.runtime import to_host
from fastmrc.encoders.batches import by_length, return_freed_memory
from fastmrc.encoders.span_heads import SpanEncoder
from fastmrc.pretrained import LoadedModel
from fastmrc.readers.base import Window
from fastmrc.readers.span_heads import SpanHeadReader, WindowSpans, spans_of, text_mask

__all__ = ["SpanReader"]


class SpanReader(SpanHeadReader):
    """Reader by start and end heads, for any ``AutoModelForQuestionAnswering`` of transformers.

    `answer` reads several passages, which vote on finished answers; a call of the reader itself
    takes and returns what the question-answering pipeline of transformers did, see `__call__`.
    `fastmrc.reference.SpanReader` gives the same answers in plain Python. May be used from several
    threads.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        texts = (self._codec.encode_question(text) for text in ("0", "0 0"))
        sample = self._layout.join(*texts)
        self._encoder = SpanEncoder(loaded.model, self._codec.gives_token_types, sample)

    def _best_spans(
        self, windows: Sequence[Window], k: int, max_length: int, progress: bool
    ) -> list[WindowSpans]:
        found: dict[int, WindowSpans] = {}
        batches = by_length(
            [len(window.input_ids) for window in windows], device=self._encoder.device
        )
        with tqdm(total=len(windows), disable=not progress, unit="window") as bar:
            for batch in batches:
                chosen = [windows[i] for i in batch]
                begin = time.perf_counter()
                start, end = self._encoder.logits(
                    [window.input_ids for window in chosen],
                    [window.token_types for window in chosen],
                )
                middle = time.perf_counter()
                mask: NDArray[np.bool_] = text_mask(chosen, start.shape[1])
                with ops.deferred_checks() as faults:
                    best = ops.best_spans(
                        start, end, k, max_length, mask=mask, null_position=self._null_position
                    )
                    scores, starts, ends, nulls = (to_host(array) for array in best)
                    faults.check()
                parts = zip(batch, chosen, scores, starts, ends, nulls.tolist(), strict=True)
                encode = (middle - begin) / len(batch)
                decode = (time.perf_counter() - middle) / len(batch)
                for i, window, *arrays, null in parts:
                    null_score = None if self._null_position is None else null
                    found[i] = WindowSpans(spans_of(window, *arrays), null_score, encode, decode)
                bar.update(len(batch))
                if len(batch) < len(windows):
                    return_freed_memory()
        return [found[i] for i in range(len(windows))]
