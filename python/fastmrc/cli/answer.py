"""``fastmrc answer``: one question, its answer and the passages that hold it."""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from fastmrc.cli import common
from fastmrc.data import check_text, read_passages
from fastmrc.types import Answer, Span

__all__ = ["add_parser", "answer_record", "mark_spans", "run"]

Marks = tuple[str, str]

PLAIN_MARKS: Marks = ("【", "】")
TERMINAL_MARKS: Marks = ("\x1b[1;32m", "\x1b[0m")
# Passages up to this many characters are printed whole, longer ones around their spans.
WHOLE_PASSAGE = 160
CONTEXT = 40


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
    common.add_json_option(parser)
    common.add_reader_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer; the exit code is 0 whether or not there is one."""
    options = common.search_options(args)
    question = check_text("question", args.question)
    if args.passages is not None:
        passages = read_passages(args.passages)
    else:
        passages = [check_text("passage", text) for text in args.passage]
    answer = common.build_reader(args).answer(question, passages, **options)
    if args.json:
        common.print_json(answer_record(answer))
    else:
        marks = TERMINAL_MARKS if _is_colour_terminal() else PLAIN_MARKS
        print("\n".join(_describe(answer, passages, marks)))
    return 0


def answer_record(answer: Answer) -> dict[str, Any]:
    """Return `answer` as plain values for JSON, the total of the timings added."""
    record = asdict(answer)
    record["timings"]["total"] = answer.timings.total
    return record


def _describe(answer: Answer, passages: Sequence[str], marks: Marks) -> Iterable[str]:
    if not answer.text:
        yield f"No answer in {_count(len(passages), 'passage')}."
        return
    yield f"Answer: {_printable(answer.text)}"
    yield f"Score:  {answer.score:.4f}"
    yield ""
    by_passage: dict[int, list[Span]] = {}
    for span in answer.spans:
        by_passage.setdefault(span.passage, []).append(span)
    if not by_passage:
        yield "No passage holds it word for word."
    for index, spans in sorted(by_passage.items()):
        yield f"[{index + 1}] {mark_spans(passages[index], spans, marks)}"


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
    text = _printable(passage)
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


def _printable(text: str) -> str:
    """Replace control characters one for one, so that no text can steer the terminal."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
