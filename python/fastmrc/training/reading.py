"""Training of the readers' models: seq2seq, slots, SimBERT, retrieval, start and end heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from fastmrc.data import Pair, Question, StrPath, read_training_data
from fastmrc.encoders.unilm import SUPPORTED_MODEL_TYPES
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.model_files import write_json
from fastmrc.pretrained import SETTINGS_FILE, LoadedModel, load_base, max_positions
from fastmrc.pretrained import Task as ModelTask
from fastmrc.text import TextCodec
from fastmrc.training.batches import TrainingBatches, drawn_objectives
from fastmrc.training.copying import initialize_copying
from fastmrc.training.evaluation import evaluate_model, reading_options
from fastmrc.training.examples import Corpus
from fastmrc.training.job import (
    DataSummary,
    base_name,
    num_steps,
    require_packages,
    training_device,
)
from fastmrc.training.options import TrainingOptions

__all__ = ["ReadingJob"]

_INPUTS = {
    "seq2seq": "UniLM seq2seq, `[CLS] passage [SEP] question [SEP]` + answer (`Seq2SeqReader`)",
    "mlm": "masked slots, `[CLS] [MASK]*{slots} [SEP] question [SEP] passage [SEP]` (`MLMReader`)",
    "simbert": "SimBERT, `[CLS] a [SEP] b [SEP]`; vectors by {pooling} pooling",
    "retrieval": "vectors of questions and passages, `[CLS] text [SEP]`, by {pooling} pooling",
    "span": "start and end heads (`SpanReader`)",
}


class ReadingJob:
    """A job (`fastmrc.training.job.Job`) on a model of transformers; arguments as for `train`."""

    def __init__(
        self,
        base: StrPath,
        data: Sequence[StrPath],
        held_out: StrPath | None,
        options: TrainingOptions,
        device: str | None,
    ) -> None:
        # Without accelerate transformers says so late and at length.
        require_packages("train", ("accelerate", "bm25s"), "train")
        self._options = options
        self._loaded = _load(base, options, device)
        self._codec = TextCodec(self._loaded.tokenizer, self._loaded.normalization)
        _check_fit(self._loaded, self._codec, options)
        self._corpus, self.summary = _read(data, self._codec, options)
        self.model: Any = self._loaded.model
        self.missing = self._loaded.missing
        self.base = base_name(base)
        pairs = len(self._corpus.pairs)
        self._objectives = drawn_objectives(options, pairs)
        self.inputs = tuple(
            _INPUTS[objective].format(slots=options.slots, pooling=options.pooling)
            for objective in self._objectives
        )
        count = _num_steps(options, self._corpus)
        self.batches = TrainingBatches(self._corpus, self._codec, self.model.config, options, count)
        self.score = None
        if held_out is not None:
            questions, held_pairs = _held_out(held_out, options, self.summary)
            self.score = lambda: evaluate_model(
                self._loaded, self._objectives, questions, held_pairs, options
            )

    def initialize(self) -> None:
        heads = self._options.copy_heads
        if heads:
            documents = self._corpus.documents
            initialize_copying(self.model, self._codec, documents, heads, self._options.seed)

    def save(self, directory: Path) -> None:
        self.model.save_pretrained(directory)
        self._loaded.tokenizer.save_pretrained(directory)
        settings = {
            "normalization": self._loaded.normalization,
            "pooling": self._options.pooling,
            "reading": reading_options(self._options, self._objectives),
        }
        write_json(directory / SETTINGS_FILE, settings)


def _load(base: StrPath, options: TrainingOptions, device: str | None) -> LoadedModel:
    set_seed(options.seed)  # for weights that begin at random
    task: ModelTask = "question-answering" if options.task == "span" else "masked-LM"
    path = base if isinstance(base, str) else Path(base)  # a plain string may be a hub id
    loaded = load_base(path, task=task, device=training_device(device))
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = options.dropout
    if options.normalization is not None:
        loaded = replace(loaded, normalization=options.normalization)
    return loaded


def _check_fit(loaded: LoadedModel, codec: TextCodec, options: TrainingOptions) -> None:
    """Refuse a model that cannot take the inputs of the task."""
    config = loaded.model.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"base: expected a model of type {', '.join(SUPPORTED_MODEL_TYPES)}, got "
            f"{config.model_type!r}"
        )
    if getattr(config, "is_decoder", False):
        raise UnsupportedModelError("base: expected an encoder, got is_decoder=True")
    masks = "mlm" in options.objectives or options.mask_share > 0
    if masks and codec.mask_id is None:
        raise UnsupportedModelError("base: expected a tokenizer with a [MASK] token, got none")
    passage, question = options.windows.window_tokens[1], options.windows.question_tokens
    needed = {
        "seq2seq": passage + question + 3 + options.answer_tokens,
        "mlm": passage + question + 4 + options.slots,
        "simbert": 2 * question + 3,
        "retrieval": max(passage, question) + 2,
        "span": passage + question + 4,
    }
    longest = max(needed[objective] for objective in options.objectives)
    most = max_positions(config)
    if most is not None and longest > most:
        raise InputError(
            f"window_tokens: expected inputs of at most {most} tokens, the positions of the model, "
            f"got up to {longest} with question_tokens, answer_tokens or slots"
        )


def _read(
    data: Sequence[StrPath], codec: TextCodec, options: TrainingOptions
) -> tuple[Corpus, DataSummary]:
    summary = DataSummary()
    corpus = Corpus(codec, options.windows)
    for path in data:
        for record in read_training_data(path, on_error=summary.issues.append):
            if isinstance(record, Pair):
                corpus.add_pair(record)
            else:
                corpus.add_question(record)
    summary.questions, summary.answered = corpus.num_questions, corpus.num_answered
    summary.passages, summary.pairs = len(corpus.documents), len(corpus.pairs)
    summary.not_found = corpus.not_found
    needs_pairs = options.task == "simbert"
    if not (corpus.pairs if needs_pairs else corpus.num_questions):
        raise InputError(
            f"data: expected {'pairs' if needs_pairs else 'questions'} for the task "
            f"{options.task}, got {summary.questions} questions and {summary.pairs} pairs, "
            f"{len(summary.not_found)} answers that are not in their passages and "
            f"{len(summary.issues)} records that cannot be read"
        )
    return corpus, summary


def _num_steps(options: TrainingOptions, corpus: Corpus) -> int:
    examples = 2 * len(corpus.pairs) if options.task == "simbert" else corpus.num_questions
    size = options.retrieval_pairs if options.task == "retrieval" else options.batch_size
    return num_steps(options, examples, size)


def _held_out(
    path: StrPath, options: TrainingOptions, summary: DataSummary
) -> tuple[list[Question], list[Pair]]:
    records = list(read_training_data(path, on_error=summary.issues.append))
    questions = [record for record in records if isinstance(record, Question)]
    pairs = [record for record in records if isinstance(record, Pair)]
    if not (pairs if options.task == "simbert" else questions):
        raise InputError(f"held_out: expected something to read for the task, got none in {path}")
    return questions[: options.eval_questions], pairs[: options.eval_questions]
