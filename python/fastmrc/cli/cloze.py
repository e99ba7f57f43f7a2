"""``fastmrc cloze``: words for the blanks of documents."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastmrc.cli import common
from fastmrc.cloze.documents import BLANK, ClozeDocument, holds_cloze, parse_cloze
from fastmrc.data import BOM, DataIssue, decode_utf8
from fastmrc.errors import InputError

if TYPE_CHECKING:
    from fastmrc.cloze.reader import ClozeAnswer

__all__ = ["add_parser", "run"]

# Words of a document shown on both sides of a blank.
_SHOWN = 8


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "cloze",
        help="fill blanks with words of the document",
        description=f"Choose words of a document for each {BLANK} in it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="CMRC 2017 documents, JSON lines, or one text; - is the standard input",
    )
    parser.add_argument(
        "--top-words",
        type=common.positive_int,
        default=5,
        metavar="N",
        help="words shown for each blank (default: 5)",
    )
    common.add_json_option(parser)
    common.add_cloze_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the words; 2 if a document could not be read."""
    issues: list[DataIssue] = []
    documents = _read(args.file, issues)
    reader = common.build_cloze_reader(args)
    answers = reader.fill_batch(
        documents, top_words=args.top_words, progress=sys.stderr.isatty() and len(documents) > 1
    )
    for answer in answers:
        if args.json:
            common.print_json(_record(answer))
        else:
            _print_answer(answer)
    return common.EXIT_SKIPPED if issues else 0


def _read(path: str, issues: list[DataIssue]) -> list[ClozeDocument]:
    if path == "-":
        name, raw = "standard input", sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            name, raw = path, file.read()
    if not holds_cloze(raw):
        try:
            return [ClozeDocument.of(decode_utf8(raw.removeprefix(BOM)))]
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def skip(issue: DataIssue) -> None:
        issues.append(issue)
        common.report_issue(issue)

    documents = list(parse_cloze(name, raw, skip))
    if not documents:
        raise InputError(f"{name}: no document could be read")
    return documents


def _record(answer: ClozeAnswer) -> dict[str, Any]:
    return {
        "id": answer.document.id,
        "words": answer.document.words,
        "blanks": [asdict(blank) for blank in answer.blanks],
    }


def _print_answer(answer: ClozeAnswer) -> None:
    words = answer.document.words
    for blank in answer.blanks:
        shown = " ".join(words[max(0, blank.position - _SHOWN) : blank.position + _SHOWN + 1])
        name = f"{answer.document.id}: " if answer.document.id else ""
        print(common.printable(f"{name}{shown}"))
        if not blank.words:
            print("  no word to choose")
        for word in blank.words:
            places = ", ".join(map(str, word.positions))
            print(common.printable(f"  {word.score:.4f}  {word.text}  (words {places})"))
