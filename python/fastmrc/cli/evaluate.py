"""``fastmrc evaluate``: score a file of predictions."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fastmrc.cli import common
from fastmrc.metrics import METRICS, Evaluation, QuestionScore, evaluate, name_ids, read_references
from fastmrc.predictions import read_predictions

__all__ = ["add_parser", "evaluation_record", "run"]

# Ids that the message about missing predictions names.
NAMED_IDS = 10


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score predictions",
        description="Score predictions as the script of a task does. sogou scores the questions "
        "that were submitted; the others score all, 0 where a prediction is missing.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="JSON lines, a JSON array or SQuAD JSON; for sogou lines of "
        "id<TAB>answer<TAB>accepted answers separated by |; for accuracy also CMRC 2017 documents "
        "or answers",
    )
    parser.add_argument(
        "--predictions",
        required=True,
        metavar="FILE",
        help='lines of id<TAB>answer or <id> ||| answer, or one JSON object {"id": "answer", ...}',
    )
    parser.add_argument("--metric", required=True, choices=METRICS)
    parser.add_argument(
        "--worst", type=common.positive_int, metavar="N", help="list the N worst questions"
    )
    common.add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the scores; the exit code is 0 whatever they are."""
    references = read_references(args.data, args.metric)
    result = evaluate(read_predictions(args.predictions), references, args.metric)
    if result.missing and result.metric != "sogou":
        print(
            f"fastmrc: missing: {len(result.missing)} of {result.count} questions have no "
            f"prediction and score 0: {name_ids(result.missing, NAMED_IDS)}",
            file=sys.stderr,
        )
    if args.json:
        common.print_json(evaluation_record(result, args.worst))
    else:
        _print_result(result, args.worst)
    return 0


def evaluation_record(result: Evaluation, worst: int | None = None) -> dict[str, Any]:
    """Return plain values for JSON.

    Parameters
    ----------
    result
        Scores of a file of predictions.
    worst
        How many of the worst questions to list; None leaves the list out.

    Returns
    -------
    dict
        ``metric``, ``count``, the scores, ``missing`` (ids; for sogou their number) and perhaps
        ``worst``.
    """
    record: dict[str, Any] = {"metric": result.metric, "count": result.count, **result.values}
    record["missing"] = len(result.missing) if result.metric == "sogou" else list(result.missing)
    if worst is not None:
        record["worst"] = [
            {"id": q.id, **q.values, "prediction": q.prediction, "answers": list(q.answers)}
            for q in result.worst(worst)
        ]
    return record


def _print_result(result: Evaluation, worst: int | None) -> None:
    print(f"metric      {result.metric}")
    print(f"questions   {result.count}")
    scored = "not scored" if result.metric == "sogou" else "scored 0"
    print(f"missing     {len(result.missing)}{f' ({scored})' if result.missing else ''}")
    for name, value in result.values.items():
        print(f"{name:<12}{value:.4f}")
    if worst is not None:
        print("worst")
        for question in result.worst(worst):
            print(f"  {_describe(question)}")


def _describe(question: QuestionScore) -> str:
    # repr shows control characters as escapes, so that no text can steer the terminal.
    scores = ", ".join(f"{name} {value:.4f}" for name, value in question.values.items())
    predicted = "none" if question.prediction is None else repr(question.prediction)
    accepted = ", ".join(map(repr, question.answers)) or "none"
    return f"{question.id!r}: {scores}; predicted {predicted}; accepted {accepted}"
