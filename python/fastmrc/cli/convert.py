"""``fastmrc convert``: BERT checkpoints of TensorFlow or bert4torch for transformers."""

from __future__ import annotations

import argparse

from fastmrc.cli import common

__all__ = ["add_parser", "run"]


def add_parser(subparsers: common.SubParsers) -> None:
    """Add the command to the parser of the program."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a BERT checkpoint of TensorFlow or bert4torch into a model directory",
        description="Write a BERT checkpoint in the layout of the original TensorFlow code (as "
        "SimBERT is published) or of bert4torch as a directory that transformers and fastmrc load.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        help="prefix of a TensorFlow checkpoint (.../bert_model.ckpt), a directory with one, or a "
        "file of bert4torch's weights (.pt, .bin, .safetensors)",
    )
    parser.add_argument("output", metavar="DIR", help="new or empty directory")
    parser.add_argument(
        "--config", metavar="FILE", help="default: bert_config.json beside the source"
    )
    parser.add_argument("--vocabulary", metavar="FILE", help="default: vocab.txt beside the source")
    parser.add_argument("--cased", action="store_true", help="the tokenizer does not lower letters")
    common.add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the directory."""
    from fastmrc.integrations.checkpoints import convert_checkpoint

    output = convert_checkpoint(
        args.source,
        args.output,
        config=args.config,
        vocabulary=args.vocabulary,
        lower_case=not args.cased,
    )
    if args.json:
        common.print_json({"output": str(output)})
    else:
        print(f"written to {output}")
    return 0
