"""Scores of a model in training, by the readers that will use it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrc.data import Pair, Question
from fastmrc.encoders.vectors import VectorEncoder
from fastmrc.metrics import Reference, evaluate
from fastmrc.pretrained import LoadedModel
from fastmrc.readers.base import Reader
from fastmrc.readers.mlm import MLMReader
from fastmrc.readers.seq2seq import Seq2SeqReader
from fastmrc.readers.span import SpanReader
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
        texts whose nearest other text is a synonym; for retrieval ``retrieval_top1``, the share of
        questions whose nearest passage, of all of these questions', is their own, both in percent;
        ``score``, the mean over the objectives of F1 or top1.
    """
    model: Any = copy.deepcopy(loaded.model)
    model.eval()
    model.set_attn_implementation("sdpa")
    loaded = replace(loaded, model=model)
    values: dict[str, float] = {}
    main = []
    for objective in objectives:
        if objective == "simbert":
            if pairs:
                values["simbert_top1"] = _synonyms_first(loaded, pairs, options)
                main.append(values["simbert_top1"])
        elif not questions:
            continue
        elif objective == "retrieval":
            values["retrieval_top1"] = _passages_first(loaded, questions, options)
            main.append(values["retrieval_top1"])
        else:
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


def _synonyms_first(loaded: LoadedModel, pairs: Sequence[Pair], options: TrainingOptions) -> float:
    """Return the percentage of texts whose nearest other text is of the same record."""
    texts = [text for pair in pairs for text in (pair.text, *pair.synonyms)]
    group = np.array([i for i, pair in enumerate(pairs) for _ in (pair.text, *pair.synonyms)])
    vectors = _vectors(loaded, texts, options, options.windows.question_tokens)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -2)
    return float((group[scores.argmax(axis=1)] == group).mean()) * 100


def _passages_first(
    loaded: LoadedModel, questions: Sequence[Question], options: TrainingOptions
) -> float:
    """Return the percentage of questions whose nearest passage is one of their own that hold the
    answer, or any of their own if none does."""
    passages = list(dict.fromkeys(p.text for q in questions for p in q.passages))
    held = [[p for p in q.passages if p.answer] or q.passages for q in questions]
    own = [{passages.index(p.text) for p in ps} for ps in held]
    asked = [question.question for question in questions]
    queries = _vectors(loaded, asked, options, options.windows.question_tokens)
    nearest = (queries @ _vectors(loaded, passages, options, None).T).argmax(axis=1).tolist()
    return float(np.mean([i in mine for i, mine in zip(nearest, own, strict=True)])) * 100


def _vectors(
    loaded: LoadedModel, texts: Sequence[str], options: TrainingOptions, max_tokens: int | None
) -> NDArray[np.float32]:
    encoder = VectorEncoder(loaded, options.pooling)
    vectors = np.zeros((len(texts), encoder.dimension), np.float32)
    for places, own in encoder.batches(encoder.rows(texts, max_tokens)):
        vectors[places] = own
    return vectors
