"""Scores of a model in training, by the readers that will use it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastmrc.data import Pair, Question
from fastmrc.encoders.batches import by_length, padded_inputs
from fastmrc.metrics import Reference, evaluate
from fastmrc.pretrained import LoadedModel
from fastmrc.readers.base import Reader
from fastmrc.readers.mlm import MLMReader
from fastmrc.readers.seq2seq import Seq2SeqReader
from fastmrc.readers.span import SpanReader
from fastmrc.text import TextCodec, join_tokens
from fastmrc.training.objectives import pooled
from fastmrc.training.options import Objective, TrainingOptions

__all__ = ["evaluate_model", "reading_options"]

_READERS: dict[Objective, type[Reader]] = {
    "seq2seq": Seq2SeqReader,
    "mlm": MLMReader,
    "span": SpanReader,
}


def evaluate_model(
    loaded: LoadedModel,
    objectives: Sequence[Objective],
    questions: Sequence[Question],
    pairs: Sequence[Pair],
    options: TrainingOptions,
) -> dict[str, float]:
    """Score a model on held-out questions and pairs, in the lengths that it is trained on.

    Returns
    -------
    dict
        For each reading objective ``{objective}_f1`` and ``{objective}_em`` by the CMRC 2018
        metric, in percent, passages read in windows; for SimBERT ``simbert_top1``, the share of
        texts whose nearest other text is a synonym, in percent; ``score``, the mean over the
        objectives of F1 or top1.
    """
    model: Any = copy.deepcopy(loaded.model)
    model.eval()
    model.set_attn_implementation("sdpa")
    loaded = replace(loaded, model=model)
    values: dict[str, float] = {}
    main = []
    for objective in objectives:
        if objective == "simbert" and pairs:
            values["simbert_top1"] = _top1(loaded, pairs, options)
            main.append(values["simbert_top1"])
        elif objective != "simbert" and questions:
            scores = _read(objective, loaded, questions, options)
            values |= {f"{objective}_{name}": value for name, value in scores.items()}
            main.append(scores["f1"])
    if main:
        values["score"] = sum(main) / len(main)
    return values


def reading_options(
    options: TrainingOptions, objectives: Sequence[Objective]
) -> dict[str, dict[str, int]]:
    """Return the readers' options for a model: passages in windows as long as it was trained on.

    Parameters
    ----------
    options
        Of its training.
    objectives
        Those that it was trained for.

    Returns
    -------
    dict
        For each kind of reader that the model serves, as ``reading`` in ``fastmrc.json``.
    """
    window = options.windows.window_tokens[1]
    lengths = {
        "max_passage_tokens": window,
        "stride": window // 2,
        "max_question_tokens": options.windows.question_tokens,
    }
    return {
        objective: lengths
        | {"max_answer_tokens": options.slots if objective == "mlm" else options.answer_tokens}
        for objective in objectives
        if objective in _READERS
    }


def _read(
    objective: Objective,
    loaded: LoadedModel,
    questions: Sequence[Question],
    options: TrainingOptions,
) -> dict[str, float]:
    reading = reading_options(options, [objective])
    reader = _READERS[objective](replace(loaded, reading=reading))
    answers = reader.answer_batch([question.pair for question in questions])
    predictions = {q.id: answer.text for q, answer in zip(questions, answers, strict=True)}
    references = {q.id: Reference(q.answers or _answers_of(q)) for q in questions}
    values = evaluate(predictions, references, "cmrc").values
    return {name: 100 * value for name, value in values.items()}


def _answers_of(question: Question) -> tuple[str, ...]:
    given = (passage.answer for passage in question.passages)
    return tuple(dict.fromkeys(answer for answer in given if answer))


@torch.inference_mode()
def _top1(loaded: LoadedModel, pairs: Sequence[Pair], options: TrainingOptions) -> float:
    """Return the percentage of texts whose nearest other text is of the same record."""
    codec = TextCodec(loaded.tokenizer, loaded.normalization)
    texts = [text for pair in pairs for text in (pair.text, *pair.synonyms)]
    group = torch.tensor([i for i, pair in enumerate(pairs) for _ in (pair.text, *pair.synonyms)])
    limit = options.windows.question_tokens
    tokens = [codec.encode_question(text)[:limit] for text in texts]
    rows = [join_tokens([codec.cls_id], own, [codec.sep_id]) for own in tokens]
    vectors = torch.zeros(len(texts), int(loaded.model.config.hidden_size))
    for batch in by_length([len(row) for row in rows]):
        own = [rows[i] for i in batch]
        inputs = padded_inputs(own, int(loaded.model.config.pad_token_id or 0), loaded.model.device)
        hidden = loaded.model.base_model(**inputs).last_hidden_state
        vectors[batch] = pooled(hidden, inputs["attention_mask"].sum(dim=1), options.pooling).cpu()
    scores = vectors @ vectors.T
    nearest = scores.fill_diagonal_(-2).argmax(dim=1)
    return float((group[nearest] == group).float().mean()) * 100
