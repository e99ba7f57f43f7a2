"""Batches of training examples: a pure function of the seed and the batch's number.

A run that resumes at batch n therefore sees what an uninterrupted one sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.pretrained import first_position
from fastmrc.text import TextCodec, join_tokens
from fastmrc.training.examples import Corpus, ReadingExample
from fastmrc.training.options import Objective, TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "Row",
    "TrainingBatches",
    "batches_per_chunk",
    "collate",
    "drawn_objectives",
    "pair_row",
    "permutation",
    "seq2seq_row",
    "slots_row",
    "span_row",
    "text_row",
]

IntArray = NDArray[np.int32]

# Batches that are drawn together and cut by length, so that little of a batch is padding.
_CHUNK = 32
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One input and its targets.

    Attributes
    ----------
    id
        Of the question.
    input_ids, token_types
        int32 [n].
    prefix
        Tokens that see each other and nothing behind them; the rest sees itself from left to
        right, too (UniLM).
    columns, labels
        Where the output layer is read, and the token it must give, int32 [m].
    copies
        Pairs of an index into `labels` and a column that holds the same token of the passage,
        int32 [c, 2].
    """

    id: str
    input_ids: IntArray
    token_types: IntArray
    prefix: int
    columns: IntArray
    labels: IntArray
    copies: IntArray = field(default_factory=lambda: np.zeros((0, 2), np.int32))


def seq2seq_row(example: ReadingExample, codec: TextCodec, answer_tokens: int) -> Row:
    """``[CLS] passage [SEP] question [SEP] answer``; the answer and its end are the targets."""
    cls, sep = [codec.cls_id], [codec.sep_id]
    prefix = join_tokens(cls, example.passage, sep, example.question, sep)
    labels = join_tokens(example.answer, sep)[:answer_tokens]
    return replace(_unilm_row(example.id, prefix, labels), copies=_copies(example, labels, 1))


def slots_row(example: ReadingExample, codec: TextCodec, slots: int) -> Row:
    """``[CLS] [MASK]*slots [SEP] question [SEP] passage [SEP]``; targets up to the first end."""
    assert codec.mask_id is not None
    cls, sep = [codec.cls_id], [codec.sep_id]
    before = join_tokens(cls, [codec.mask_id] * slots, sep, example.question, sep)
    labels = join_tokens(example.answer, sep)[:slots]
    input_ids = join_tokens(before, example.passage, sep)
    return Row(
        example.id,
        input_ids,
        np.zeros_like(input_ids),
        len(input_ids),
        np.arange(len(labels), dtype=np.int32) + 1,
        labels,
        _copies(example, labels, len(before)),
    )


def span_row(example: ReadingExample, codec: TextCodec) -> Row:
    """Question and passage as the tokenizer joins them; columns: first and last token of the
    answer, the first of the input if there is none."""
    layout = codec.pair_layout()
    input_ids, token_types = layout.join(example.question, example.passage)
    if not codec.gives_token_types:
        token_types = np.zeros_like(token_types)
    start = layout.second_at(len(example.question))
    ends = [0, 0]
    if len(example.places):
        first = start + int(example.places[0])
        ends = [first, first + len(example.answer) - 1]
    return Row(
        example.id,
        input_ids,
        token_types,
        len(input_ids),
        np.array(ends, np.int32),
        np.zeros(0, np.int32),
    )


def pair_row(first: IntArray, second: IntArray, name: str, codec: TextCodec) -> Row:
    """``[CLS] a [SEP] b [SEP]``: SimBERT's input, with `b` and its end as targets."""
    sep = [codec.sep_id]
    return _unilm_row(name, join_tokens([codec.cls_id], first, sep), join_tokens(second, sep))


def text_row(tokens: IntArray, name: str, codec: TextCodec) -> Row:
    """``[CLS] text [SEP]``, without targets: what a vector is made of."""
    input_ids = join_tokens([codec.cls_id], tokens, [codec.sep_id])
    none = np.zeros(0, np.int32)
    return Row(name, input_ids, np.zeros_like(input_ids), len(input_ids), none, none)


def _unilm_row(name: str, prefix: IntArray, labels: IntArray) -> Row:
    """Each target is read at the token before it; the last one is no input."""
    return Row(
        name,
        join_tokens(prefix, labels[:-1]),
        np.repeat(np.array([0, 1], np.int32), [len(prefix), len(labels) - 1]),
        len(prefix),
        np.arange(len(labels), dtype=np.int32) + len(prefix) - 1,
        labels,
    )


def _copies(example: ReadingExample, labels: IntArray, passage_at: int) -> IntArray:
    copied = min(len(labels), len(example.answer))
    offsets = np.arange(copied)
    pairs = [
        np.stack([offsets, offsets + place + passage_at], axis=1)
        for place in example.places.tolist()
    ]
    return np.concatenate(pairs).astype(np.int32) if pairs else np.zeros((0, 2), np.int32)


def collate(rows: Sequence[Row], config: PreTrainedConfig, padding: int) -> dict[str, Any]:
    """Pad rows into tensors.

    Returns
    -------
    dict
        ``inputs``: arguments of the model's body, [B, T] each, and the mask [B, 1, T, T], float32,
        0 or a very negative number;
        ``prefix`` int64 [B];
        ``row``, ``column``, ``label`` int64 [n] of the targets;
        ``copy_target``, ``copy_column`` int64 [c];
        ``ids``.
    """
    length = max(len(row.input_ids) for row in rows)
    input_ids = np.full((len(rows), length), padding, dtype=np.int64)
    token_types = np.zeros((len(rows), length), dtype=np.int64)
    sees = np.zeros((len(rows), length, length), dtype=bool)
    for b, row in enumerate(rows):
        end = len(row.input_ids)
        input_ids[b, :end] = row.input_ids
        token_types[b, :end] = row.token_types
        sees[b, :, : row.prefix] = True
        answer = slice(row.prefix, end)
        sees[b, answer, answer] = np.tri(end - row.prefix, dtype=bool)
    if getattr(config, "type_vocab_size", 1) < 2:
        token_types[:] = 0
    positions = np.arange(length) + first_position(config)
    mask = np.where(sees, np.float32(0), np.finfo(np.float32).min)[:, None]
    inputs = {
        "input_ids": input_ids,
        "token_type_ids": token_types,
        "position_ids": np.broadcast_to(positions, input_ids.shape).copy(),
        "attention_mask": mask,
    }
    counts = [len(row.labels) for row in rows]
    first_target = np.cumsum([0, *counts])[:-1]
    arrays = {
        "prefix": np.array([row.prefix for row in rows]),
        "row": np.repeat(np.arange(len(rows)), [len(row.columns) for row in rows]),
        "column": np.concatenate([row.columns for row in rows]),
        "label": np.concatenate([row.labels for row in rows]),
        "copy_target": np.concatenate(
            [row.copies[:, 0] + first for row, first in zip(rows, first_target, strict=True)]
        ),
        "copy_column": np.concatenate([row.copies[:, 1] for row in rows]),
    }
    batch: dict[str, Any] = {
        name: torch.from_numpy(a.astype(np.int64)) for name, a in arrays.items()
    }
    batch["inputs"] = {name: torch.from_numpy(array) for name, array in inputs.items()}
    batch["ids"] = [row.id for row in rows]
    return batch


class TrainingBatches(torch.utils.data.Dataset[dict[str, Any]]):
    """Batches by number, from 0.

    Parameters
    ----------
    corpus
        With what the objectives need: questions, or pairs for SimBERT.
    codec, config
        Of the model.
    options
        Of the run.
    count
        Number of batches.
    """

    def __init__(
        self,
        corpus: Corpus,
        codec: TextCodec,
        config: PreTrainedConfig,
        options: TrainingOptions,
        count: int,
    ) -> None:
        self._corpus = corpus
        self._codec = codec
        self._config = config
        self._options = options
        self._count = count
        self._padding = int(config.pad_token_id or 0)
        self._counts = batches_per_chunk(options, len(corpus.pairs))
        self._chunk: tuple[int, list[tuple[Objective, list[Row]]]] = (-1, [])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Any]:
        chunk, place = divmod(number, _CHUNK)
        if self._chunk[0] != chunk:
            self._chunk = (chunk, self._draw_chunk(chunk))
        objective, rows = self._chunk[1][place]
        return collate(rows, self._config, self._padding) | {"objective": objective}

    def _draw_chunk(self, chunk: int) -> list[tuple[Objective, list[Row]]]:
        """Draw the batches of a chunk, in the order of training."""
        rng = np.random.default_rng([self._options.seed, chunk])
        batches: list[tuple[Objective, list[Row]]] = []
        for objective, count in self._counts.items():
            size = self._batch_size(objective)
            numbers = range(chunk * count * size, (chunk + 1) * count * size)
            if objective in ("simbert", "retrieval"):
                draw = self._pair_rows if objective == "simbert" else self._retrieval_rows
                rows_of = [draw(numbers[b : b + size], rng) for b in range(0, count * size, size)]
            else:
                rows = [self._reading_row(objective, n, rng) for n in numbers]
                rows.sort(key=lambda row: len(row.input_ids))
                rows_of = [rows[b : b + size] for b in range(0, len(rows), size)]
            batches += [(objective, rows) for rows in rows_of]
        order = rng.permutation(len(batches))
        return [batches[i] for i in order]

    def _batch_size(self, objective: Objective) -> int:
        if objective == "retrieval":
            return self._options.retrieval_pairs
        # A pair is two rows, one in each order.
        return max(1, self._options.batch_size // (2 if objective == "simbert" else 1))

    def _reading_row(self, objective: Objective, number: int, rng: np.random.Generator) -> Row:
        example = self._reading_example(objective, number, rng)
        if objective == "seq2seq":
            return seq2seq_row(example, self._codec, self._options.answer_tokens)
        if objective == "mlm":
            return slots_row(example, self._codec, self._options.slots)
        return span_row(example, self._codec)

    def _reading_example(
        self, objective: Objective, number: int, rng: np.random.Generator
    ) -> ReadingExample:
        if rng.random() < self._options.cloze:
            for _ in range(_TRIES):
                document = int(rng.integers(len(self._corpus.documents)))
                example = self._corpus.draw_cloze(document, rng)
                if example is not None:
                    return example
        example = self._corpus.draw(self._nth(objective, number, self._corpus.num_questions), rng)
        for _ in range(_TRIES):
            if objective != "span" or len(example.places) or not len(example.answer):
                break
            # An answer in several parts is no span, nor is there none.
            example = self._corpus.draw(int(rng.integers(self._corpus.num_questions)), rng)
        return example

    def _pair_rows(self, numbers: range, rng: np.random.Generator) -> list[Row]:
        """Return both orders of each pair: rows 2i and 2i + 1 belong together."""
        rows = []
        for n in numbers:
            *texts, name = self._corpus.pairs[self._nth("simbert", n, len(self._corpus.pairs))]
            for first, second in (texts, texts[::-1]):
                rows.append(pair_row(self._masked(first, rng), second, name, self._codec))
        return rows

    def _masked(self, tokens: IntArray, rng: np.random.Generator) -> IntArray:
        if not self._options.mask_share:
            return tokens
        hidden = rng.random(len(tokens)) < self._options.mask_share
        return np.where(hidden, np.int32(self._codec.mask_id or 0), tokens)

    def _retrieval_rows(self, numbers: range, rng: np.random.Generator) -> list[Row]:
        """Return questions in the even rows, each followed by a window of its passage.

        Two questions on one passage would each be told that the other's is wrong, so there are
        fewer where others are not found.
        """
        rows: list[Row] = []
        documents: set[int] = set()
        questions: set[int] = set()
        for n in numbers:
            index = self._nth("retrieval", n, self._corpus.num_questions)
            for _ in range(_TRIES):
                evidence = self._corpus.draw_evidence(index, rng)
                if index not in questions and evidence.document not in documents:
                    questions.add(index)
                    documents.add(evidence.document)
                    for tokens in (evidence.question, evidence.passage):
                        rows.append(text_row(tokens, evidence.id, self._codec))
                    break
                index = int(rng.integers(self._corpus.num_questions))
        return rows

    def _nth(self, objective: Objective, number: int, size: int) -> int:
        """Return the `number`-th item of endless shuffled passes over `size` items."""
        epoch, place = divmod(number, size)
        stream = ("seq2seq", "mlm", "simbert", "span", "retrieval").index(objective)
        order = permutation(self._options.seed, stream, epoch, size)
        return int(order[place])


@lru_cache(maxsize=8)
def permutation(seed: int, stream: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Return the order of a pass over `size` items, a function of the arguments."""
    return np.random.default_rng([seed, stream, epoch, size]).permutation(size)


def batches_per_chunk(options: TrainingOptions, pairs: int) -> dict[Objective, int]:
    """Return how many batches of a chunk each objective gets."""
    if options.task != "mixed":
        return {options.task: _CHUNK}
    paired = round(options.simbert_share * _CHUNK) if pairs else 0
    retrieved = min(round(options.retrieval_share * _CHUNK), _CHUNK - paired)
    reading = _CHUNK - paired - retrieved
    slots = int(options.mlm_share * reading)
    counts: dict[Objective, int] = {
        "seq2seq": reading - slots,
        "mlm": slots,
        "simbert": paired,
        "retrieval": retrieved,
    }
    return {objective: count for objective, count in counts.items() if count}


def drawn_objectives(options: TrainingOptions, pairs: int) -> tuple[Objective, ...]:
    """Return the objectives that a run draws batches of: a mixture without pairs has no SimBERT."""
    return tuple(batches_per_chunk(options, pairs))
