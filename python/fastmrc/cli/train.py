"""``fastmrc train``: fine-tune a masked language model for the readers, resumable."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from fastmrc.cli import common
from fastmrc.errors import InputError
from fastmrc.metrics import name_ids

if TYPE_CHECKING:
    from fastmrc.training.options import TrainingOptions
    from fastmrc.training.run import DataSummary, TrainingResult

__all__ = ["add_parser", "run"]

TASKS = ("seq2seq", "mlm", "simbert", "mixed", "span")
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
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="questions with passages (JSON lines, a JSON array, SQuAD JSON), and for SimBERT "
        'lines of {"text", "synonyms"}',
    )
    parser.add_argument("--base", required=True, metavar="PATH|ID", help="directory or hub id")
    parser.add_argument("--output", required=True, metavar="DIR", help="new directory")
    parser.add_argument(
        "--held-out", metavar="FILE", help="read at each evaluation; the best checkpoint is kept"
    )
    parser.add_argument("--device", help="as torch names it (default: cuda if there is one)")
    parser.add_argument("--threads", type=common.positive_int, metavar="N", help="of torch")
    _add_options(parser)
    common.add_json_option(parser)
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **keywords: Any) -> None:
        parser.add_argument("--" + name.replace("_", "-"), help=text, default=None, **keywords)

    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    number: dict[str, Any] = {"type": float, "metavar": "X"}
    add("max_hours", "time, evaluation included", **number)
    add("max_steps", "batches", **whole)
    add("epochs", "passes over the questions (default: 3, or no bound with another one)", **number)
    add("batch_size", "examples in a batch (default: 32)", **whole)
    add("learning_rate", "its peak (default: 2e-4)", **number)
    add("warmup", "share of the run in which it rises (default: 0.05)", **number)
    add("weight_decay", "of AdamW (default: 0.01)", **number)
    add("dropout", "of the model (default: 0.1)", **number)
    add("cloze", "share of cloze questions made from the passages (default: 0)", **number)
    add("copy_heads", "heads that begin as a copying channel (default: 0)", **whole)
    add("simbert_share", "of the batches of a mixture (default: 0.1)", **number)
    add("slots", "[MASK] slots of the MLM input (default: 16)", **whole)
    add("pooling", "of sentence vectors (default: mean)", choices=("mean", "cls"))
    add("normalization", "of passages (default: the base's own)", choices=common.NORMALIZATIONS)
    add("eval_questions", "held-out questions at each evaluation (default: 100)", **whole)
    add("eval_steps", "batches between evaluations (default: 500)", **whole)
    add("seed", "of everything that is drawn (default: 0)", **whole)
    add("window_tokens", "shortest and longest window (default: 96 254)", nargs=2, type=int)
    add("negatives", "share of windows drawn anywhere (default: 0.25)", **number)
    add("distractors", "share of passages of other questions (default: 0)", **number)
    add(
        "bfloat16",
        "products in bfloat16 (default: where the hardware has them)",
        action=argparse.BooleanOptionalAction,
    )


def run(args: argparse.Namespace) -> int:
    """Train and print what came of it."""
    try:
        import accelerate  # noqa: F401  # without it transformers asks for it late, in a long text
    except ImportError:
        raise InputError(
            "train needs the package accelerate: pip install 'fastmrc[train]'"
        ) from None
    from fastmrc.training import train

    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    result = train(
        args.base,
        args.data,
        args.output,
        training_options(args),
        held_out=args.held_out,
        device=args.device,
        progress=True,
        on_start=_report_data,
    )
    if args.json:
        common.print_json(_record(result))
    else:
        _print_result(result, args.output)
    return 0


def training_options(args: argparse.Namespace) -> TrainingOptions:
    """Return the options that were given; those of `TrainingOptions` stand for others."""
    from fastmrc.training import TrainingOptions, WindowOptions

    def given(kind: type) -> dict[str, Any]:
        names = [field.name for field in fields(kind)]
        return {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}

    windows = given(WindowOptions)
    if "window_tokens" in windows:
        windows["window_tokens"] = tuple(windows["window_tokens"])
    return TrainingOptions(**given(TrainingOptions), windows=WindowOptions(**windows))


def _report_data(data: DataSummary, initialized: tuple[str, ...]) -> None:
    for issue in data.issues:
        common.report_issue(issue)
    say(
        f"{data.questions:,} questions ({data.answered:,} with an answer), {data.passages:,} "
        f"passages, {data.pairs:,} pairs"
    )
    if data.not_found:
        named = name_ids(data.not_found, NAMED_IDS)
        say(f"left out: {len(data.not_found):,} answers are in none of their passages: {named}")
    if initialized:
        say(
            f"the base lacks {len(initialized)} weights, which begin at random: {initialized[0]}, …"
        )


def say(text: str) -> None:
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
