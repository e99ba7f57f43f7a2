"""``fastmrc bench``: the engine against the pure-Python reference, on the same model and data."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fastmrc.cli import common
from fastmrc.data import DataIssue, Question, read_questions
from fastmrc.errors import InputError
from fastmrc.types import Answer

__all__ = ["SAMPLE", "BenchResult", "Difference", "add_parser", "compare", "run"]

# Questions that come with the package, for a first look without any data.
SAMPLE = Path(__file__).resolve().parent.parent / "samples" / "questions.jsonl"
QUESTIONS = 12
ROUNDS = 3

EXIT_DIFFERENT = 1
Pair = tuple[str, list[str]]


@dataclass(frozen=True, slots=True)
class Difference:
    """A question that engine and reference answer differently."""

    id: str
    engine: str
    reference: str
    engine_score: float
    reference_score: float


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What the comparison found.

    Attributes
    ----------
    questions, passages
        How many were read.
    rounds
        Times that each contender answered them all; the seconds are medians over these.
    engine_seconds, reference_seconds
        For all questions.
    outside_encoder
        Share of the engine's time that its timings do not count as the encoder's, from 0 to 1.
    score_difference
        Largest difference of the scores where the answers are equal.
    differences
        Questions whose answers differ in text or tokens.
    """

    questions: int
    passages: int
    rounds: int
    engine_seconds: float
    reference_seconds: float
    outside_encoder: float
    score_difference: float
    differences: list[Difference]

    @property
    def engine_speed(self) -> float:
        """Questions per second of the engine."""
        return self.questions / self.engine_seconds

    @property
    def reference_speed(self) -> float:
        """Questions per second of the reference."""
        return self.questions / self.reference_seconds

    @property
    def ratio(self) -> float:
        """How many times as fast the engine is."""
        return self.reference_seconds / self.engine_seconds

    def record(self) -> dict[str, Any]:
        """Return plain values for JSON, the speeds included."""
        return asdict(self) | {
            "engine_questions_per_second": self.engine_speed,
            "reference_questions_per_second": self.reference_speed,
            "ratio": self.ratio,
            "equal": not self.differences,
        }


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "bench",
        help="compare engine and reference",
        description="Time the engine against the pure-Python reference on the same model and "
        "data, and check that they answer alike.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", metavar="FILE", help="questions (default: a built-in sample)")
    parser.add_argument(
        "-n",
        "--questions",
        type=common.positive_int,
        default=QUESTIONS,
        metavar="N",
        help="use the first N questions (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=common.positive_int,
        default=ROUNDS,
        metavar="N",
        help="times that each contender answers them all (default: %(default)s)",
    )
    common.add_json_option(parser)
    common.add_reader_options(parser, baseline=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 1 if answers differ, 2 if lines of the data were skipped."""
    options = common.search_options(args)
    questions, skipped = _read(args.data or SAMPLE, args.questions)
    engine = common.build_reader(args, baseline=False)
    reference = common.build_reader(args, baseline=True)
    result = compare(engine, reference, questions, options, args.rounds)
    if args.json:
        common.print_json(result.record() | {"skipped": skipped})
    else:
        _print_result(result)
    if result.differences:
        return EXIT_DIFFERENT
    return common.EXIT_SKIPPED if skipped else 0


def _read(path: str | Path, count: int) -> tuple[list[Question], int]:
    skipped = 0

    def skip(issue: DataIssue) -> None:
        nonlocal skipped
        skipped += 1
        common.report_issue(issue)

    questions = list(islice(read_questions(path, on_error=skip), count))
    if not questions:
        raise InputError(f"{path}: no question could be read")
    return questions, skipped


def compare(
    engine: common.Reader,
    reference: common.Reader,
    questions: Sequence[Question],
    options: dict[str, Any],
    rounds: int,
) -> BenchResult:
    """Time both readers by turns and compare their answers.

    Each answers one question first, untimed. The order within a round changes from round to
    round, so that neither always runs on the warmer machine.
    """
    pairs = [question.pair for question in questions]
    contenders = (engine, reference)
    for reader in contenders:
        reader.answer_batch(pairs[:1], progress=False, **options)
    seconds: tuple[list[float], list[float]] = ([], [])
    answers: list[list[Answer]] = [[], []]
    outside: list[float] = []
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            elapsed, answers[which] = _timed(contenders[which], pairs, options)
            seconds[which].append(elapsed)
        outside.append(_share_outside_encoder(answers[0]))
    differences, score_difference = _compare_answers(questions, *answers)
    return BenchResult(
        questions=len(pairs),
        passages=sum(len(passages) for _, passages in pairs),
        rounds=rounds,
        engine_seconds=statistics.median(seconds[0]),
        reference_seconds=statistics.median(seconds[1]),
        outside_encoder=statistics.median(outside),
        score_difference=score_difference,
        differences=differences,
    )


def _timed(
    reader: common.Reader, pairs: Sequence[Pair], options: dict[str, Any]
) -> tuple[float, list[Answer]]:
    started = time.perf_counter()
    answers = reader.answer_batch(pairs, progress=False, **options)
    return time.perf_counter() - started, answers


def _share_outside_encoder(answers: Sequence[Answer]) -> float:
    total = sum(answer.timings.total for answer in answers)
    encode = sum(answer.timings.encode for answer in answers)
    return 1.0 - encode / total if total > 0 else 0.0


def _compare_answers(
    questions: Sequence[Question], engine: Sequence[Answer], reference: Sequence[Answer]
) -> tuple[list[Difference], float]:
    differences: list[Difference] = []
    score_difference = 0.0
    for question, left, right in zip(questions, engine, reference, strict=True):
        if (left.text, left.token_ids) == (right.text, right.token_ids):
            score_difference = max(score_difference, abs(left.score - right.score))
        else:
            differences.append(
                Difference(question.id, left.text, right.text, left.score, right.score)
            )
    return differences, score_difference


def _print_result(result: BenchResult) -> None:
    equal = result.questions - len(result.differences)
    print(f"{result.questions} questions, {result.passages} passages, median of {result.rounds}")
    print(f"{'':<22}{'questions/s':>12}{'seconds':>12}")
    print(f"{'engine':<22}{result.engine_speed:>12.2f}{result.engine_seconds:>12.3f}")
    print(f"{'reference':<22}{result.reference_speed:>12.2f}{result.reference_seconds:>12.3f}")
    print(f"{'ratio':<22}{result.ratio:>12.2f}")
    print(f"{'outside the encoder':<22}{100 * result.outside_encoder:>11.1f}%")
    print(f"{'equal answers':<22}{equal:>12}{f'of {result.questions}':>12}")
    for item in result.differences:
        print(
            f"  {item.id}: engine {item.engine!r} ({item.engine_score:.6f}), "
            f"reference {item.reference!r} ({item.reference_score:.6f})"
        )
