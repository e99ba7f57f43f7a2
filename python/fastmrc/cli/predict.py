"""``fastmrc predict``: answer a data set into a file, resumable."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol, cast

from fastmrc.cli import common
from fastmrc.cloze.documents import ClozeDocument, read_cloze
from fastmrc.data import DataIssue, OnError, Question, read_questions
from fastmrc.errors import InputError
from fastmrc.predictions import (
    LINE_FORMATS,
    TAB_SEPARATED,
    LineFormat,
    PredictionWriter,
    Progress,
    check_progress,
    prediction_line,
    restore_order,
)

__all__ = ["Summary", "add_parser", "run"]

BATCH_SIZE = 16

EXIT_INTERRUPTED = 130


@dataclass(slots=True)
class Summary:
    """What a run did.

    Attributes
    ----------
    questions
        Questions of the data set that could be read.
    already_done
        Of these, answered by an earlier run.
    answered, empty
        Answered by this run, and found to have no answer.
    skipped
        Lines that could not be read and questions that the reader refused.
    seconds
        Spent on answering, without loading the model.
    """

    questions: int = 0
    already_done: int = 0
    answered: int = 0
    empty: int = 0
    skipped: int = 0
    seconds: float = 0.0

    @property
    def questions_per_second(self) -> float:
        """Speed of this run; 0.0 if it had nothing to do."""
        done = self.answered + self.empty
        return done / self.seconds if done else 0.0


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "predict",
        help="answer a data set",
        description="Answer a data set into lines of id<TAB>answer, in the order of the data. "
        "Run again after an interruption, it goes on where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="JSON lines, a JSON array or SQuAD JSON; cloze: CMRC 2017 documents or JSON lines",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="predictions")
    parser.add_argument("--overwrite", action="store_true", help="start anew")
    parser.add_argument(
        "--format",
        choices=tuple(LINE_FORMATS),
        default=TAB_SEPARATED.name,
        help="of the predictions: id<TAB>answer, or <id> ||| answer (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=common.positive_int,
        default=BATCH_SIZE,
        metavar="N",
        help="questions given to the reader at once; an interruption loses at most these "
        "(default: %(default)s)",
    )
    common.add_json_option(parser)
    common.add_reader_options(parser, cloze=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer what is not answered yet; 2 if something was skipped, 130 if interrupted."""
    try:
        summary = _predict(args)
    except KeyboardInterrupt:
        how = "again without --overwrite" if args.overwrite else "again"
        print(f"interrupted; run the same command {how} to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    if args.json:
        speed = {"questions_per_second": summary.questions_per_second}
        common.print_json(asdict(summary) | speed)
    else:
        _print_summary(summary, args.out)
    return common.EXIT_SKIPPED if summary.skipped else 0


def _print_summary(summary: Summary, out: str) -> None:
    before = f" ({summary.already_done} by an earlier run)" if summary.already_done else ""
    print(f"questions   {summary.questions}{before}")
    print(f"answered    {summary.answered}")
    print(f"no answer   {summary.empty}")
    print(f"skipped     {summary.skipped}")
    print(f"time        {summary.seconds:.1f} s, {summary.questions_per_second:.2f} questions/s")
    print(f"written to  {out}")


def _predict(args: argparse.Namespace) -> Summary:
    task = _cloze_task(args) if args.method == "cloze" else _reading_task(args)
    line_format = LINE_FORMATS[args.format]
    _check_paths(args.data, args.out)
    summary = Summary()

    def skip(issue: DataIssue) -> None:
        common.report_issue(issue)
        summary.skipped += 1

    # The data are read twice, so that only their ids are held in memory.
    ids = [question.id for question in task.read(skip)]
    if not ids:
        raise InputError(f"{args.data}: no question could be read")
    _check_ids(ids, line_format)
    progress = Progress() if args.overwrite else check_progress(args.out, ids, line_format)
    summary.questions, summary.already_done = len(ids), len(progress.done)
    if summary.already_done == summary.questions:
        _cut_partial_line(args.out, progress)
    else:
        answer = task.load()
        with PredictionWriter(args.out, keep=progress.size, line_format=line_format) as writer:
            todo = _questions_to_do(task, progress)
            _answer_all(answer, todo, args.batch_size, writer, summary)
    restore_order(args.out, ids, line_format)
    return summary


def _check_ids(ids: Sequence[str], line_format: LineFormat) -> None:
    """Refuse ids that could not be read back."""
    for question_id in ids:
        try:
            (read, _) = line_format.parse(prediction_line(question_id, "", line_format).encode())
        except InputError:
            read = ""
        if read != question_id:
            raise InputError(
                f"id: {question_id!r} cannot be written with --format {line_format.name}"
            )


class _Item(Protocol):
    """A question of either kind."""

    @property
    def id(self) -> str: ...

    @property
    def place(self) -> str: ...


_Answer = Callable[[Sequence[Any]], list[str]]


@dataclass(frozen=True, slots=True)
class _Task:
    """How a kind of question is read and answered."""

    read: Callable[[OnError], Iterator[_Item]]
    load: Callable[[], _Answer]


def _reading_task(args: argparse.Namespace) -> _Task:
    options = common.search_options(args)

    def load() -> _Answer:
        reader = common.build_reader(args)

        def answer(batch: Sequence[Question]) -> list[str]:
            pairs = [question.pair for question in batch]
            return [a.text for a in reader.answer_batch(pairs, progress=False, **options)]

        return answer

    return _Task(lambda skip: read_questions(args.data, on_error=skip), load)


def _cloze_task(args: argparse.Namespace) -> _Task:
    common.refuse_search_options(args)

    def load() -> _Answer:
        reader = common.build_cloze_reader(args)

        def answer(batch: Sequence[ClozeDocument]) -> list[str]:
            filled = reader.fill_batch(batch, top_words=1)
            return [" ".join(filter(None, (b.text for b in own.blanks))) for own in filled]

        return answer

    return _Task(lambda skip: read_cloze(args.data, on_error=skip), load)


def _check_paths(data: str, out: str) -> None:
    if not os.path.exists(data):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), data)
    if not os.path.isfile(data):
        raise InputError(f"data: expected a regular file, as it is read twice, got {data}")
    if os.path.exists(out) and os.path.samefile(data, out):
        raise InputError(f"out: expected another file than the data, got {out}")
    folder = os.path.dirname(out) or "."
    if not os.path.isdir(folder):
        raise InputError(f"out: expected a file in an existing directory, got {out}")


def _cut_partial_line(out: str, progress: Progress) -> None:
    with PredictionWriter(out, keep=progress.size):
        pass


def _questions_to_do(task: _Task, progress: Progress) -> Iterator[_Item]:
    done = set(progress.done)
    # The first reading has reported what cannot be used.
    for question in task.read(lambda issue: None):
        if question.id not in done:
            yield question


def _answer_all(
    answer: _Answer,
    questions: Iterator[_Item],
    batch_size: int,
    writer: PredictionWriter,
    summary: Summary,
) -> None:
    started = time.perf_counter()
    with _progress_bar(summary.questions, summary.already_done) as bar:
        while batch := list(islice(questions, batch_size)):
            results = _answer_batch(answer, batch)
            _raise_if_hopeless(results, summary)
            for question, result in zip(batch, results, strict=True):
                if isinstance(result, ValueError):
                    bar.clear()
                    common.report_issue(f"{question.place}: id {question.id!r}: {result}")
                    summary.skipped += 1
                    continue
                writer.write(question.id, result)
                if result:
                    summary.answered += 1
                else:
                    summary.empty += 1
            bar.update(len(batch))
            summary.seconds = time.perf_counter() - started


def _answer_batch(answer: _Answer, batch: Sequence[_Item]) -> list[str | ValueError]:
    """Answer a batch; if the reader refuses it, one by one, so that one question costs itself."""
    try:
        return [*answer(batch)]
    except ValueError as error:
        if len(batch) == 1:
            return [error]
    return [result for question in batch for result in _answer_batch(answer, [question])]


def _raise_if_hopeless(results: Sequence[str | ValueError], summary: Summary) -> None:
    """Stop if every question so far fails alike: an option, not the data, is wrong."""
    errors = [result for result in results if isinstance(result, ValueError)]
    if summary.answered + summary.empty or not 1 < len(errors) == len(results):
        return
    if len({str(error) for error in errors}) == 1:
        raise errors[0]


class _Bar(AbstractContextManager["_Bar"], Protocol):
    def update(self, count: int) -> object: ...

    def clear(self) -> object: ...


def _progress_bar(total: int, done: int) -> _Bar:
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    bar = tqdm(total=total, initial=done, unit="q", file=sys.stderr, disable=hidden)
    return cast(_Bar, bar)
