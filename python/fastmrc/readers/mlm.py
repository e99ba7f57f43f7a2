"""The native reader by masked language model: all slots of the answer at once."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm import tqdm

from fastmrc import ops
from fastmrc.constraints import SpanIndex
from fastmrc.encoders.batches import by_length, return_freed_memory
from fastmrc.encoders.slots import SlotEncoder
from fastmrc.options import SlotOptions
from fastmrc.pretrained import LoadedModel
from fastmrc.readers.base import PreparedQuestion
from fastmrc.readers.slots import FilledSlots, SlotKernels, SlotReader, WindowSlots

__all__ = ["MLMReader"]

# Most logits of one forward pass: 128 MB of float32.
_MAX_LOGITS = 1 << 25
_MAX_GPU_LOGITS = 1 << 28  # 1 GB


class MLMReader(SlotReader):
    """Reader by masked language model: one forward pass fills all slots of an answer.

    Each passage gives the answer that its slots spell, among its own spans; equal answers of
    several passages vote (the reading comprehension example by masked language model of
    bert4keras). Takes any ``...ForMaskedLM`` of transformers. `fastmrc.reference.MLMReader` gives
    the same answers in plain Python. May be used from several threads.
    """

    kernels = SlotKernels(ops.slot_argmax, ops.slot_topk, ops.row_stats, SpanIndex)

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        self._encoder = SlotEncoder(loaded.model)

    def _fill(
        self, questions: Sequence[PreparedQuestion], options: SlotOptions, progress: bool
    ) -> list[FilledSlots]:
        places = [(q, w) for q, question in enumerate(questions) for w in question.windows]
        read: dict[int, WindowSlots] = {}
        encode, decode = [0.0] * len(questions), [0.0] * len(questions)
        device = self._encoder.device
        most_logits = _MAX_GPU_LOGITS if device.type == "cuda" else _MAX_LOGITS
        most_rows = most_logits // (self._vocabulary_size * options.max_answer_tokens)
        batches = by_length([len(window.input_ids) for _, window in places], most_rows, device)
        with tqdm(total=len(places), disable=not progress, unit="passage") as bar:
            for batch in batches:
                windows = [places[i][1] for i in batch]
                constraints = [questions[places[i][0]].constraint for i in batch]
                begin = time.perf_counter()
                logits = self._encoder.logits(
                    [window.input_ids for window in windows], options.max_answer_tokens
                )
                middle = time.perf_counter()
                found = self._read_slots(logits, windows, constraints, options)
                end = time.perf_counter()
                read |= zip(batch, found, strict=True)
                for i in batch:
                    encode[places[i][0]] += (middle - begin) / len(batch)
                    decode[places[i][0]] += (end - middle) / len(batch)
                bar.update(len(batch))
                if len(batch) < len(places):
                    return_freed_memory()
        filled: list[list[WindowSlots]] = [[] for _ in questions]
        for i, (q, _) in enumerate(places):
            filled[q].append(read[i])
        return [FilledSlots(*parts) for parts in zip(filled, encode, decode, strict=True)]
