"""``fastmrc mine-pairs``: training pairs for SimBERT from texts without labels."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import sys

from fastmrc.cli import common
from fastmrc.corpus import corpus_texts, question_texts
from fastmrc.data import DataIssue
from fastmrc.errors import InputError

__all__ = ["add_parser", "run"]

# Pairs that are shown, spread evenly from the nearest to the least near.
SAMPLES = 8


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "mine-pairs",
        help="find pairs of similar texts",
        description="Find the texts of some files that are each other's nearest neighbours, as "
        'lines of {"text", "synonyms"} for `fastmrc train --task simbert`.',
        allow_abbrev=False,
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="questions in JSON lines, a JSON array or SQuAD JSON, or a text a line",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="new file of the pairs")
    parser.add_argument(
        "--min-cosine",
        type=float,
        default=0.95,
        metavar="X",
        help="least cosine of a pair, which depends on the model (default: 0.95)",
    )
    common.add_json_option(parser)
    common.add_similarity_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the pairs and show some; 2 if records of the files were skipped."""
    if not (math.isfinite(args.min_cosine) and -1 <= args.min_cosine <= 1):
        raise InputError(f"--min-cosine: expected a number from -1 to 1, got {args.min_cosine}")
    if os.path.exists(args.output):  # before the work
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), args.output)
    folder = os.path.dirname(os.path.abspath(args.output))
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)
    issues: list[DataIssue] = []

    def skip(issue: DataIssue) -> None:
        issues.append(issue)
        common.report_issue(issue)

    read = (text.strip() for text in corpus_texts(args.files, skip, question_texts))
    texts = list(dict.fromkeys(text for text in read if text))
    if len(texts) < 2:
        raise InputError(f"files: expected at least 2 different texts, got {len(texts)}")
    from fastmrc.mining import mine_pairs

    model = common.build_similarity_model(args)
    pairs = mine_pairs(texts, model, args.min_cosine, progress=sys.stderr.isatty())
    with open(args.output, "x", encoding="utf-8") as file:
        for pair in pairs:
            record = {"text": pair.text, "synonyms": [pair.synonym]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    shown = sorted({i * (len(pairs) - 1) // (SAMPLES - 1) for i in range(SAMPLES)} if pairs else ())
    samples = [pairs[i] for i in shown]
    if args.json:
        sampled = [{"score": p.score, "text": p.text, "synonym": p.synonym} for p in samples]
        common.print_json({"texts": len(texts), "pairs": len(pairs), "samples": sampled})
    else:
        print(f"{len(pairs):,} pairs of {len(texts):,} texts, written to {args.output}")
        for p in samples:
            print(f"{p.score:.4f}  {common.printable(p.text)} | {common.printable(p.synonym)}")
    return common.EXIT_SKIPPED if issues else 0
