"""``fastmrc train``: fine-tune a masked language model for the readers, resumable."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, get_args

from fastmrc.cli import common
from fastmrc.metrics import name_ids
from fastmrc.training.options import (
    TRAINED_POOLINGS,
    ClozeOptions,
    Task,
    TrainingOptions,
    WindowOptions,
)

if TYPE_CHECKING:
    from fastmrc.training.run import DataSummary, TrainingResult

__all__ = ["add_parser", "run"]

_KINDS = (TrainingOptions, WindowOptions, ClozeOptions)
_DEFAULTS = {field.name: field.default for kind in _KINDS for field in fields(kind)}
# Ids that the message about answers that were not found names.
NAMED_IDS = 10


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "train",
        help="fine-tune a model",
        description="Fine-tune a masked language model for the readers. Run again after an "
        "interruption, it goes on from its last checkpoint. Needs the extra `train`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--task",
        required=True,
        choices=get_args(Task),
        help="what the model is for; mixed: the first four on one set of weights, span: start and "
        "end heads, cloze: words for blanks",
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="questions with passages (JSON lines, a JSON array, SQuAD JSON), for SimBERT lines of "
        '{"text", "synonyms"}, for cloze documents with blanks and files of texts',
    )
    parser.add_argument(
        "--base",
        metavar="PATH|ID",
        help="directory or hub id; cloze: by default the packaged model, none for a bilstm",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new directory, or that of an interrupted run",
    )
    parser.add_argument(
        "--held-out",
        metavar="FILE",
        help="like --data, its beginning is read at each evaluation; the best checkpoint is kept",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--threads", type=common.positive_int, metavar="N", help="of torch and the engine"
    )
    _add_options(parser)
    common.add_json_option(parser)
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **keywords: Any) -> None:
        option = "--" + name.replace("_", "-")
        default = _DEFAULTS[name]
        if default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" (default: {shown})"
        parser.add_argument(option, help=text, default=None, **keywords)

    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    number: dict[str, Any] = {"type": float, "metavar": "X"}
    add("max_hours", "stop after X hours, over all runs that resume each other", **number)
    add("max_steps", "stop after N batches", **whole)
    add("epochs", "passes over the questions (default: 3 without another bound)", **number)
    add("batch_size", "examples in a batch", **whole)
    add("learning_rate", "its peak", **number)
    add("warmup", "share of the run in which it rises", **number)
    add("weight_decay", "of AdamW", **number)
    add("dropout", "of the model", **number)
    add("cloze", "share of cloze questions made from the passages", **number)
    add("copy_heads", "heads that begin as a copying channel", **whole)
    add("simbert_share", "of the batches of a mixture", **number)
    add("retrieval_share", "of the batches of a mixture", **number)
    add("retrieval_pairs", "questions in a batch of the retrieval objective", **whole)
    add("mask_share", "of the first text's tokens that [MASK] replaces for SimBERT", **number)
    add("mlm_share", "of the other batches of a mixture; the rest is for seq2seq", **number)
    add("slots", "[MASK] slots of the MLM input", **whole)
    add("answer_tokens", "longest answer of the seq2seq input, its end included", **whole)
    add("pooling", "of sentence vectors", choices=TRAINED_POOLINGS)
    add("normalization", "of passages (default: the base's own)", choices=common.NORMALIZATIONS)
    add("eval_questions", "held-out questions at each evaluation", **whole)
    add("eval_steps", "batches between evaluations", **whole)
    add("seed", "of everything that is drawn", **whole)
    add(
        "window_tokens",
        "shortest and longest window of a passage",
        nargs=2,
        type=int,
        metavar=("N", "M"),
    )
    add("question_tokens", "longest question", **whole)
    add("negatives", "share of windows drawn anywhere", **number)
    add(
        "distractors",
        "share of questions with a window of another passage",
        **number,
    )
    add("encoder", "of cloze", choices=("transformer", "bilstm"))
    add(
        "blanks",
        "cloze questions asked of a document at once, by a transformer (default: 8)",
        **whole,
    )
    add("labelled_share", "of the cloze examples from documents with blanks", **number)
    add("rename_share", "of the cloze examples with other words for repeated ones", **number)
    add("max_tokens", "longest cloze input (default: the model's positions)", **whole)
    add("layers", "of the base that a cloze transformer keeps (default: all)", **whole)
    add("train_layers", "how many upper ones of them are trained (default: all)", **whole)
    add("dimension", "of the word vectors of a bilstm", **whole)
    add("min_count", "of a word that gets one", **whole)
    add("hidden", "size of its states in each direction", **whole)
    add("depth", "its layers", **whole)
    add("match", "what its query is compared with", choices=("states", "embeddings"))
    add(
        "bfloat16",
        "products in bfloat16 (default: where the hardware has them)",
        action=argparse.BooleanOptionalAction,
    )


def run(args: argparse.Namespace) -> int:
    """Train and print what came of it."""
    from fastmrc.training import train
    from fastmrc.training.batches import drawn_objectives

    common.set_threads(args.threads)
    options = training_options(args)

    def report(data: DataSummary, initialized: tuple[str, ...]) -> None:
        _report_data(data, initialized)
        if "simbert" not in drawn_objectives(options, data.pairs) and options.task == "mixed":
            _say("no pairs of texts: nothing is trained for SimBERT")

    try:
        result = train(
            args.base,
            args.data,
            args.output,
            options,
            held_out=args.held_out,
            device=args.device,
            progress=True,
            on_start=report,
        )
    except KeyboardInterrupt:
        _say("the same command goes on from the last checkpoint, if one was written")
        raise
    if args.json:
        common.print_json(_record(result))
    else:
        _print_result(result, args.output)
    return 0


def training_options(args: argparse.Namespace) -> TrainingOptions:
    """Return the options that were given; those of `TrainingOptions` stand for others."""

    def given(kind: type) -> dict[str, Any]:
        names = [field.name for field in fields(kind)]
        return {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}

    windows = given(WindowOptions)
    if "window_tokens" in windows:
        windows["window_tokens"] = tuple(windows["window_tokens"])
    return TrainingOptions(
        **given(TrainingOptions),
        windows=WindowOptions(**windows),
        cloze_reader=ClozeOptions(**given(ClozeOptions)),
    )


def _report_data(data: DataSummary, initialized: tuple[str, ...]) -> None:
    for issue in data.issues:
        common.report_issue(issue)
    _say(
        f"{data.questions:,} questions ({data.answered:,} with an answer), {data.passages:,} "
        f"passages, {data.pairs:,} pairs"
    )
    if data.not_found:
        named = name_ids(data.not_found, NAMED_IDS)
        _say(f"left out: {len(data.not_found):,} answers are in none of their passages: {named}")
    if initialized:
        _say(
            f"the base lacks {len(initialized)} weights, which begin at random: {initialized[0]}, …"
        )


def _say(text: str) -> None:
    """Print a message on the standard error."""
    print(f"fastmrc: {text}", file=sys.stderr)


def _record(result: TrainingResult) -> dict[str, Any]:
    record = asdict(result)
    record["data"]["issues"] = len(result.data.issues)
    record["data"]["not_found"] = len(result.data.not_found)
    return record


def _print_result(result: TrainingResult, output: str) -> None:
    scores = ", ".join(f"{name} {value:.1f}" for name, value in result.scores.items())
    print(f"{output}: {result.steps:,} batches, {result.hours:.2f} hours, loss {result.loss:.3f}")
    if scores:
        print(scores)
