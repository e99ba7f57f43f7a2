"""The readers of the originals: the baselines of the engine, with the same signatures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fastmrc.options import SearchOptions, SlotOptions
from fastmrc.pretrained import LoadedModel
from fastmrc.readers.base import PreparedQuestion, Window
from fastmrc.readers.beam import BeamReader, Decoded
from fastmrc.readers.slots import FilledSlots, SlotKernels, SlotReader
from fastmrc.readers.span_heads import SpanHeadReader, WindowSpans, spans_of, text_mask
from fastmrc.reference.beam_search import beam_search
from fastmrc.reference.constraints import SpanIndex
from fastmrc.reference.encoder import ReencodingEncoder
from fastmrc.reference.ops import row_stats
from fastmrc.reference.slots import slot_argmax, slot_topk
from fastmrc.reference.spans import best_spans
from fastmrc.types import SearchResult

__all__ = ["MLMReader", "Seq2SeqReader", "SpanReader"]


class Seq2SeqReader(BeamReader):
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
            return Decoded(SearchResult(None, [], [], [], []), 0.0, 0.0)
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
            weights=question.window_weights() if options.vote == "weighted" else None,
            min_tokens=options.min_answer_tokens,
            max_tokens=options.max_answer_tokens,
            finish=options.finish,
            length_penalty=options.length_penalty,
            no_answer_ratio=options.no_answer_ratio,
            constraint=question.constraint,
        )
        total = time.perf_counter() - begin
        return Decoded(result, clock.seconds, total - clock.seconds)


class MLMReader(SlotReader):
    """Reader by masked language model in plain Python: one question at a time, the output layer at
    every position.

    Same arguments and answers as `fastmrc.MLMReader`.
    """

    kernels = SlotKernels(slot_argmax, slot_topk, row_stats, SpanIndex)

    def _fill(
        self, questions: Sequence[PreparedQuestion], options: SlotOptions, progress: bool
    ) -> list[FilledSlots]:
        return [
            self._fill_question(question, options)
            for question in tqdm(questions, disable=not progress, unit="question")
        ]

    def _fill_question(self, question: PreparedQuestion, options: SlotOptions) -> FilledSlots:
        if not question.windows:
            return FilledSlots([], 0.0, 0.0)
        begin = time.perf_counter()
        logits = self.slot_logits(question.windows, options.max_answer_tokens)
        middle = time.perf_counter()
        constraints = [question.constraint] * len(question.windows)
        read = self._read_slots(logits, question.windows, constraints, options)
        return FilledSlots(read, middle - begin, time.perf_counter() - middle)

    @torch.inference_mode()
    def slot_logits(self, windows: Sequence[Window], slots: int) -> NDArray[np.float32]:
        """Run the whole model on all windows; return float32 [windows, slots, V]."""
        logits = self._loaded.model(**_batch(self._loaded, windows)).logits
        result: NDArray[np.float32] = logits[:, 1 : 1 + slots].float().cpu().numpy()
        return result


class SpanReader(SpanHeadReader):
    """Reader by start and end heads in plain Python: one window at a time.

    Same arguments and answers as `fastmrc.SpanReader`.
    """

    def _best_spans(
        self, windows: Sequence[Window], k: int, max_length: int, progress: bool
    ) -> list[WindowSpans]:
        return [
            self._best_spans_of(window, k, max_length)
            for window in tqdm(windows, disable=not progress, unit="window")
        ]

    @torch.inference_mode()
    def _best_spans_of(self, window: Window, k: int, max_length: int) -> WindowSpans:
        begin = time.perf_counter()
        batch = _batch(self._loaded, [window])
        if "token_type_ids" in self._loaded.tokenizer.model_input_names:
            batch["token_type_ids"] = (
                torch.from_numpy(window.token_types).long()[None].to(self._loaded.model.device)
            )
        output = self._loaded.model(**batch)
        start = output.start_logits.float().cpu().numpy()
        end = output.end_logits.float().cpu().numpy()
        middle = time.perf_counter()
        scores, starts, ends, nulls = best_spans(
            start,
            end,
            k,
            max_length,
            mask=text_mask([window], start.shape[1]),
            null_position=self._null_position,
        )
        return WindowSpans(
            spans_of(window, scores[0], starts[0], ends[0]),
            None if self._null_position is None else float(nulls[0]),
            middle - begin,
            time.perf_counter() - middle,
        )


def _batch(loaded: LoadedModel, windows: Sequence[Window]) -> dict[str, Any]:
    """Build the model's arguments, padded on the right."""
    shape = len(windows), max(len(window.input_ids) for window in windows)
    input_ids = torch.full(shape, int(loaded.model.config.pad_token_id or 0))
    mask = torch.zeros(shape, dtype=torch.long)
    for row, window in enumerate(windows):
        length = len(window.input_ids)
        input_ids[row, :length] = torch.from_numpy(window.input_ids)
        mask[row, :length] = 1
    device = loaded.model.device
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


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
