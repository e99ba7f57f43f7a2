"""How well and how fast do models read?

Answers questions with each reader and model that is named, and scores the answers by the metric of
CMRC 2018. With ``--passages-alone`` it also reads every passage by itself and says how often a
passage that holds an answer keeps one, and how often one without is rejected.

    python -m benchmarks.reading --data FILE --method seq2seq mlm -n 400
    python -m benchmarks.reading --data MULTI --passages-alone -n 200
    python -m benchmarks.reading --data FILE --model ORIGINAL_DIR INT8_DIR

The data are JSON lines: ``{"id", "question", "passages": [{"passage", "answer"}], "answers"}``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fastmrc
from fastmrc.cli.common import METHODS
from fastmrc.data import Question, read_questions
from fastmrc.errors import InputError
from fastmrc.metrics import Reference, evaluate


@dataclass(frozen=True, slots=True)
class Result:
    """What one model and reader scored.

    Attributes
    ----------
    model, method
        Directory (or "packaged") and kind of reader.
    questions
        Number of them.
    em, f1
        In percent.
    empty
        Questions without an answer.
    questions_per_second
        Of the whole call, tokenising included.
    same
        Share of the answers that are equal to those of the first model, with the same reader.
    kept, rejected
        Shares of the passages with an answer that give one when read alone, and of those without
        that give none; None if not asked for.
    """

    model: str
    method: str
    questions: int
    em: float
    f1: float
    empty: int
    questions_per_second: float
    same: float
    kept: float | None = None
    rejected: float | None = None


def spread(path: Path, limit: int | None) -> list[Question]:
    """Read up to `limit` questions, spread evenly over the file."""
    questions = [q for q in read_questions(path) if q.answers]
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i * len(questions) // limit] for i in range(limit)]


def measure(
    model: Path | None,
    method: str,
    questions: Sequence[Question],
    options: dict[str, Any],
    first: dict[str, list[str]],
    alone: bool,
) -> Result:
    """Answer all questions with one model."""
    reader = getattr(fastmrc, METHODS[method].reader).from_pretrained(model)
    reader.answer_batch([questions[0].pair], **options)
    begin = time.perf_counter()
    answers = reader.answer_batch([q.pair for q in questions], progress=True, **options)
    seconds = time.perf_counter() - begin
    texts = [answer.text for answer in answers]
    references = {q.id: Reference(q.answers) for q in questions}
    by_id = {q.id: text for q, text in zip(questions, texts, strict=True)}
    scores = evaluate(by_id, references, "cmrc").values
    earlier = first.setdefault(method, texts)
    kept, rejected = _read_alone(reader, questions, options) if alone else (None, None)
    return Result(
        model="packaged" if model is None else str(model),
        method=method,
        questions=len(questions),
        em=100 * scores["em"],
        f1=100 * scores["f1"],
        empty=texts.count(""),
        questions_per_second=len(questions) / seconds,
        same=sum(a == b for a, b in zip(texts, earlier, strict=True)) / len(texts),
        kept=kept,
        rejected=rejected,
    )


def _read_alone(
    reader: Any, questions: Sequence[Question], options: dict[str, Any]
) -> tuple[float | None, float | None]:
    """Return how often a passage with an answer gives one, and one without gives none."""
    pairs = [(q.question, [p.text]) for q in questions for p in q.passages]
    holds = [bool(p.answer) for q in questions for p in q.passages]
    given = [bool(answer.text) for answer in reader.answer_batch(pairs, progress=True, **options)]
    found = [g for g, h in zip(given, holds, strict=True) if h]
    spared = [not g for g, h in zip(given, holds, strict=True) if not h]
    return (
        sum(found) / len(found) if found else None,
        sum(spared) / len(spared) if spared else None,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How well and how fast do models read?")
    parser.add_argument("--data", type=Path, required=True, help="questions, JSON lines")
    parser.add_argument(
        "--model", type=Path, nargs="+", default=[None], help="directories (the packaged model)"
    )
    parser.add_argument("--method", nargs="+", choices=tuple(METHODS), default=["seq2seq"])
    parser.add_argument("-n", type=int, help="number of questions (all)")
    own = "(the model's own, or the reader's)"
    parser.add_argument("--max-passage-tokens", type=int, help=f"of windows {own}")
    parser.add_argument("--stride", type=int, help=f"tokens that windows share {own}")
    parser.add_argument("--no-answer-ratio", type=float, help=f"of windows that vote {own}")
    parser.add_argument(
        "--passages-alone", action="store_true", help="also read each passage alone"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args(arguments)
    if options.n is not None and options.n < 1:
        parser.error(f"-n: expected at least 1, got {options.n}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = parse_arguments(arguments)
    questions = spread(args.data, args.n)
    if not questions:
        raise InputError(f"{args.data}: expected questions with answers, got none")
    names = ("max_passage_tokens", "stride", "no_answer_ratio")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    first: dict[str, list[str]] = {}
    for method in args.method:
        for model in args.model:
            result = measure(model, method, questions, options, first, args.passages_alone)
            print(json.dumps(asdict(result)) if args.json else _line(result), flush=True)
    return 0


def _line(result: Result) -> str:
    text = (
        f"{result.model} {result.method}: {result.questions} questions, EM {result.em:.1f}, "
        f"F1 {result.f1:.1f}, {result.empty} without answer, "
        f"{result.questions_per_second:.2f} questions/s, {result.same:.1%} as the first model"
    )
    if result.kept is not None or result.rejected is not None:
        shares = [("kept", result.kept), ("rejected", result.rejected)]
        shown = (f"{name} {share:.1%}" for name, share in shares if share is not None)
        text += f"; passages alone: {', '.join(shown)}"
    return text


if __name__ == "__main__":
    sys.exit(main())
