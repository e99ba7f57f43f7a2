"""``fastmrc search``: the texts of a file that are most similar to a query."""

from __future__ import annotations

import argparse
from typing import Any

from fastmrc.cli import common
from fastmrc.data import DataIssue, check_text
from fastmrc.errors import InputError

__all__ = ["add_parser", "run"]

# Characters of a text that are shown.
SHOWN = 120


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "search",
        help="find similar texts in a file",
        description="Find the texts of a file that are most similar to a query. Numbers in "
        "brackets count its different texts. Their vectors are kept in FILE.index beside it, and "
        "made anew when it or the model changes.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--corpus",
        required=True,
        metavar="FILE",
        help="a text a line, passages in JSON lines, or questions whose passages are searched",
    )
    parser.add_argument("query", nargs="+", metavar="QUERY")
    parser.add_argument(
        "--k", type=common.positive_int, default=10, metavar="K", help="texts found (default: 10)"
    )
    parser.add_argument("--no-index", action="store_true", help="keep no vectors on the disk")
    common.add_json_option(parser)
    common.add_similarity_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found; 2 if records of the file were skipped."""
    queries = [check_text("query", query) for query in args.query]
    if not all(query.strip() for query in queries):
        raise InputError("query: expected a text, got none")
    model = common.build_similarity_model(args)
    issues: list[DataIssue] = []
    corpus = common.open_corpus(args.corpus, model, keep=not args.no_index, issues=issues)
    ids, scores = corpus.search(model.encode(queries), args.k)
    results: list[dict[str, Any]] = [
        {
            "query": query,
            "hits": [
                {"id": i, "score": score, "text": corpus.texts[i]}
                for i, score in zip(own_ids, own_scores, strict=True)
            ],
        }
        for query, own_ids, own_scores in zip(queries, ids.tolist(), scores.tolist(), strict=True)
    ]
    if args.json:
        common.print_json({"texts": len(corpus.texts), "results": results})
    else:
        _print_results(results)
    return common.EXIT_SKIPPED if issues else 0


def _print_results(results: list[dict[str, Any]]) -> None:
    for result in results:
        if len(results) > 1:
            print(f"{common.printable(result['query'])}:")
        for hit in result["hits"]:
            text = common.printable(hit["text"])
            shown = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
            print(f"{hit['score']:.4f}  [{hit['id'] + 1}] {shown}")
