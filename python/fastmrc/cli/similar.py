"""``fastmrc similar``: texts that say the same as one, drawn and ranked."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from fastmrc.cli import common
from fastmrc.data import check_text
from fastmrc.options import SamplingOptions

__all__ = ["add_parser", "run"]


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "similar",
        help="write texts that say the same",
        description="Draw texts that say the same as one, drop duplicates and the text itself, and "
        "rank the others by cosine.",
        allow_abbrev=False,
    )
    parser.add_argument("text", metavar="TEXT")
    number: dict[str, Any] = {"type": float, "metavar": "X"}
    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    positive: dict[str, Any] = {"type": common.positive_int, "metavar": "N"}
    parser.add_argument("--count", default=100, help="texts drawn (default: 100)", **positive)
    parser.add_argument("--k", default=20, help="texts shown (default: 20)", **positive)
    parser.add_argument("--top-k", help="likeliest tokens drawn from (default: 5; 0: all)", **whole)
    parser.add_argument("--top-p", help="share of them drawn from (default: 1)", **number)
    parser.add_argument("--temperature", help="divides the logits (default: 1)", **number)
    parser.add_argument("--min-tokens", help="shortest text (default: 0)", **whole)
    parser.add_argument("--max-tokens", help="longest text (default: 64)", **whole)
    parser.add_argument("--seed", help="for the same texts again", **whole)
    common.add_json_option(parser)
    common.add_similarity_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the texts; the exit code is 0 whether or not there are any."""
    text = check_text("text", args.text)
    names = ("top_k", "top_p", "temperature", "min_tokens", "max_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.top_k == 0:
        given["top_k"] = None
    # What is wrong shows before a model is loaded.
    SamplingOptions(**{"max_tokens": 64} | given)
    model = common.build_similarity_model(args)
    found = model.similar(text, args.count, args.k, seed=args.seed, **given)
    if args.json:
        common.print_json({"text": text, "similar": [asdict(one) for one in found]})
        return 0
    if not found:
        print("No other text was drawn.")
    for one in found:
        print(f"{one.score:.4f}  {common.printable(one.text)}")
    return 0
