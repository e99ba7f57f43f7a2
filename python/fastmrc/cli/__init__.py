"""Command line of fastmrc.

Each command is a module of this package, named in `COMMANDS` (with ``_`` for ``-``), with

``add_parser(subparsers)``
    adding its parser, ``set_defaults(run=run)`` included;
``run(args) -> int``
    doing the work and returning the exit code.

Nothing here imports torch or transformers before a command needs a reader, so that ``--help``
answers at once.

Exit codes: 0 done, 1 ``bench`` found different answers or ``audit`` tokens that are not argmaxable,
2 an error or lines that could not be used, 3 ``audit`` left tokens undecided, 130 interrupted, 141
the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastmrc import __version__
from fastmrc.errors import InputError, TrainingError

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS = (
    "answer",
    "predict",
    "evaluate",
    "similar",
    "search",
    "mine-pairs",
    "cloze",
    "audit",
    "train",
    "prune-vocab",
    "convert",
    "bench",
)

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, reported by `main` like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with the parsers of all commands."""
    parser = _Parser(
        prog="fastmrc", description="Answer questions from passages.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fastmrc {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"fastmrc.cli.{name.replace('-', '_')}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        Exit code, as listed in this module. Errors are one line on the standard error;
        ``FASTMRC_DEBUG=1`` in the environment lets them through as exceptions.
    """
    _print_any_character()
    try:
        args = build_parser().parse_args(argv)
        code: int = args.run(args)
        # A pipe without a reader shows here rather than when the interpreter shuts down.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fastmrc: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if os.environ.get("FASTMRC_DEBUG"):
            raise
        print(f"fastmrc: error: {describe_error(error)}", file=sys.stderr)
        return EXIT_ERROR


def describe_error(error: Exception) -> str:
    """Return one line for `error`; its type is named where the message alone says too little."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | TrainingError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _print_any_character() -> None:
    """Escape characters that the terminal's encoding lacks, instead of failing on them."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _discard_stdout() -> None:
    """Send what is still buffered to the null device, as flushing it would raise again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        # A stream without a descriptor has no buffer that is flushed at exit.
        return
