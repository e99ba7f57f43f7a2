"""Does the int8 form answer like the original weights?

Answers the same questions with both models and reports exact match, character F1 (each the best
over the gold answers, the mean over questions) and the share of equal answers.

    python -m benchmarks.quantization --data FILE --original DIR --packaged DIR -n 200

The data are JSON lines: ``{"question", "passages": [{"passage"}], "answers": [...]}``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import fastmrc
from fastmrc.data import Question, read_questions
from fastmrc.errors import InputError
from fastmrc.pretrained import packaged_model_path

STRIDE = 128


@dataclass(frozen=True, slots=True)
class Result:
    """Scores of one model between 0 and 1, its size in bytes and the time in seconds."""

    model: str
    bytes: int
    exact_match: float
    f1: float
    seconds: float


def character_f1(answer: str, gold: str) -> float:
    """Return F1 over the multisets of characters; 1.0 if both are empty."""
    if not answer and not gold:
        return 1.0
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold))


def spread(path: Path, limit: int) -> list[Question]:
    """Read up to `limit` questions, spread evenly over the file."""
    questions = list(read_questions(path))
    return questions[:: max(1, len(questions) // limit)][:limit]


def measure(name: str, directory: Path, questions: Sequence[Question]) -> tuple[Result, list[str]]:
    """Answer all questions with the model in `directory`."""
    reader = fastmrc.Seq2SeqReader.from_pretrained(directory)
    start = time.perf_counter()
    answers = reader.answer_batch([q.pair for q in questions], stride=STRIDE)
    seconds = time.perf_counter() - start
    texts = [answer.text for answer in answers]
    pairs = list(zip(texts, questions, strict=True))
    exact = sum(text in question.answers for text, question in pairs)
    f1 = sum(max(character_f1(text, gold) for gold in q.answers or [""]) for text, q in pairs)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    count = len(questions)
    return Result(name, size, exact / count, f1 / count, seconds), texts


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the int8 model with its original.")
    parser.add_argument("--data", type=Path, required=True, help="questions, JSON lines")
    parser.add_argument("--original", type=Path, required=True, help="model directory")
    parser.add_argument(
        "--packaged", type=Path, default=packaged_model_path(), help="int8 model directory"
    )
    parser.add_argument("-n", type=int, default=100, help="number of questions (100)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.n < 1:
        parser.error(f"-n: expected at least 1, got {options.n}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit code."""
    options = parse_arguments(arguments)
    try:
        questions = spread(options.data, options.n)
        if not questions:
            raise InputError(f"--data: expected questions in '{options.data}', got none")
        original, original_texts = measure("original", options.original, questions)
        packaged, packaged_texts = measure("packaged", options.packaged, questions)
    except (OSError, ValueError, KeyError) as error:
        print(f"quantization.py: {error}", file=sys.stderr)
        return 2
    equal = sum(a == b for a, b in zip(original_texts, packaged_texts, strict=True))
    share = equal / len(questions)
    if options.json:
        models = [asdict(result) for result in (original, packaged)]
        print(json.dumps({"questions": len(questions), "equal_answers": share, "models": models}))
        return 0
    print(f"{len(questions)} questions, stride {STRIDE}; equal answers {share:.1%}")
    print(f"{'model':<10} {'MB':>6} {'EM':>6} {'F1':>6} {'seconds':>8}")
    for result in (original, packaged):
        print(
            f"{result.model:<10} {result.bytes / 1e6:>6.1f} {100 * result.exact_match:>6.1f} "
            f"{100 * result.f1:>6.1f} {result.seconds:>8.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
