"""``fastmrc prune-vocab``: drop tokens that a model does not need."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import get_args

from fastmrc.cli import common
from fastmrc.vocabulary import REASONS, PruningReport, Rule, prune_vocabulary

__all__ = ["add_parser", "run"]


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "prune-vocab",
        help="drop tokens that a model does not need",
        description="Write a copy of a masked language model without the tokens that no text "
        "needs (--rule), or that the texts of some files do not need (--corpus). The logits of "
        "the other tokens stay as they are.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model with a WordPiece tokenizer"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new or empty directory")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument(
        "--rule",
        choices=get_args(Rule),
        help="drop what no text is ever cut into, such as ## with a Chinese character",
    )
    choice.add_argument(
        "--corpus",
        nargs="+",
        metavar="FILE",
        help="keep what is needed by questions, pairs of texts and passages in JSON lines, a JSON "
        "array, SQuAD JSON or lines of text",
    )
    common.add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the pruned model; 2 if records of the corpus were skipped."""
    report = prune_vocabulary(
        args.model,
        args.output,
        rule=args.rule,
        corpus=args.corpus,
        on_error=common.report_issue,
    )
    if args.json:
        common.print_json(asdict(report))
    else:
        _print_report(report, args.output)
    return common.EXIT_SKIPPED if report.skipped else 0


def _print_report(report: PruningReport, output: str) -> None:
    tokens = f"{report.tokens_before:,} -> {report.tokens_after:,} tokens"
    print(f"{tokens}; {_megabytes(report.bytes_before)} -> {_megabytes(report.bytes_after)} MB")
    if not report.dropped:
        print("nothing to drop")
    for reason, count in report.dropped.items():
        print(f"  {count:>7,}  {REASONS[reason]}")
    if report.corpus_texts is not None:
        print(f"corpus      {report.corpus_texts:,} texts, {report.corpus_tokens:,} tokens")
    if report.skipped:
        print(f"skipped     {report.skipped:,}")
    print(f"written to  {output}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"
