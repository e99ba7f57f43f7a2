"""``fastmrc answer``: one question, its answer and the passages that hold it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastmrc.cli import common
from fastmrc.data import DataIssue, check_text, read_passages
from fastmrc.errors import InputError
from fastmrc.types import Answer, Span

__all__ = ["add_parser", "answer_record", "mark_spans", "run"]

Marks = tuple[str, str]

PLAIN_MARKS: Marks = ("【", "】")
TERMINAL_MARKS: Marks = ("\x1b[1;32m", "\x1b[0m")
# Passages up to this many characters are printed whole, longer ones around their spans.
WHOLE_PASSAGE = 160
CONTEXT = 40
TOP_PASSAGES = 10


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "answer",
        help="answer one question",
        description="Answer one question from passages and show where the answer stands.",
        allow_abbrev=False,
    )
    parser.add_argument("--question", required=True, metavar="Q")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--passages",
        metavar="FILE|-",
        help="a text file with one passage a line, or JSON lines; - is the standard input",
    )
    source.add_argument(
        "--passage", action="append", metavar="TEXT", help="a passage; may be given several times"
    )
    source.add_argument(
        "--corpus",
        metavar="FILE",
        help="a file like --passages of any length, or of questions with passages: the passages "
        "nearest to the question are read; their vectors are kept in FILE.index",
    )
    found = parser.add_argument_group("corpus")
    found.add_argument(
        "--top-passages",
        type=common.positive_int,
        metavar="N",
        help="passages of the corpus that are read (default: 10)",
    )
    found.add_argument(
        "--retriever",
        metavar="PATH|ID",
        help="model that finds them (default: the packaged model)",
    )
    found.add_argument("--no-index", action="store_true", help="keep no vectors on the disk")
    common.add_json_option(parser)
    common.add_reader_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer; the exit code is 0 whether or not there is one, 2 if records of the corpus
    were skipped."""
    options = common.search_options(args)
    question = check_text("question", args.question)
    if args.corpus is None and (args.top_passages or args.retriever or args.no_index):
        raise InputError("--top-passages, --retriever, --no-index: expected --corpus with them")
    issues: list[DataIssue] = []
    found: list[_Found] = []
    reader = None
    if args.corpus is not None:
        reader = common.build_reader(args)  # what is wrong with it shows before a long indexing
        found = _find(args, question, issues)
        passages = [one.passage for one in found]
    elif args.passages is not None:
        passages = read_passages(args.passages)
    else:
        passages = [check_text("passage", text) for text in args.passage]
    answer = (reader or common.build_reader(args)).answer(question, passages, **options)
    if args.json:
        record = answer_record(answer)
        if found:
            record["passages"] = [asdict(one) for one in found]
        common.print_json(record)
    else:
        marks = TERMINAL_MARKS if _is_colour_terminal() else PLAIN_MARKS
        numbers = [one.id + 1 for one in found] or list(range(1, len(passages) + 1))
        print("\n".join(_describe(answer, passages, numbers, marks)))
    return common.EXIT_SKIPPED if issues else 0


@dataclass(frozen=True, slots=True)
class _Found:
    """A passage of the corpus: its place among them from 0, its cosine with the question."""

    id: int
    score: float
    passage: str


def _find(args: argparse.Namespace, question: str, issues: list[DataIssue]) -> list[_Found]:
    """Return the passages nearest to the question, nearest first."""
    from fastmrc.similarity import SimilarityModel

    common.set_threads(args.threads)
    model = SimilarityModel.from_pretrained(
        args.retriever,
        device=args.device,
        dtype=args.dtype or "float32",
        local_files_only=args.local_files_only,
    )
    corpus = common.open_corpus(args.corpus, model, keep=not args.no_index, issues=issues)
    ids, scores = corpus.search(model.encode(question), args.top_passages or TOP_PASSAGES)
    ranked = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
    return [_Found(i, score, corpus.texts[i]) for i, score in ranked]


def answer_record(answer: Answer) -> dict[str, Any]:
    """Return `answer` as plain values for JSON, the total of the timings added."""
    record = asdict(answer)
    record["timings"]["total"] = answer.timings.total
    return record


def _describe(
    answer: Answer, passages: Sequence[str], numbers: Sequence[int], marks: Marks
) -> Iterable[str]:
    if not answer.text:
        yield f"No answer in {_count(len(passages), 'passage')}."
        return
    yield f"Answer: {common.printable(answer.text)}"
    yield f"Score:  {answer.score:.4f}"
    yield ""
    by_passage: dict[int, list[Span]] = {}
    for span in answer.spans:
        by_passage.setdefault(span.passage, []).append(span)
    if not by_passage:
        yield "No passage holds it word for word."
    for index, spans in sorted(by_passage.items()):
        yield f"[{numbers[index]}] {mark_spans(passages[index], spans, marks)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _is_colour_terminal() -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()


def mark_spans(passage: str, spans: Sequence[Span], marks: Marks = PLAIN_MARKS) -> str:
    """Show a passage on one line with its spans marked.

    Parameters
    ----------
    passage
        Text of the passage; line breaks and control characters are shown as spaces.
    spans
        Character ranges in it. Overlapping ones are marked as one.
    marks
        What stands before and after each span.

    Returns
    -------
    str
        The whole passage if it is short, else what stands around the spans, with ``…`` for
        what is left out.
    """
    text = common.printable(passage)
    marked = _merge((span.start, span.end) for span in spans)
    if len(text) <= WHOLE_PASSAGE:
        shown = [(0, len(text))]
    else:
        shown = _merge(
            (max(0, start - CONTEXT), min(len(text), end + CONTEXT)) for start, end in marked
        )
    pieces: list[str] = []
    for begin, finish in shown:
        pieces.append("…" if begin > 0 else "")
        position = begin
        for start, end in marked:
            if begin <= start and end <= finish:
                pieces += [text[position:start], marks[0], text[start:end], marks[1]]
                position = end
        pieces.append(text[position:finish])
    if shown and shown[-1][1] < len(text):
        pieces.append("…")
    return "".join(pieces)


def _merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort ranges and join those that overlap."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
