"""What the commands share: options of readers, their construction, messages."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import unicodedata
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast, get_args

from fastmrc.data import DataIssue
from fastmrc.errors import InputError
from fastmrc.options import (
    Combine,
    Decoding,
    Finish,
    Mode,
    ReaderOptions,
    SearchOptions,
    SlotOptions,
    SpanOptions,
    Vote,
)
from fastmrc.pretrained import Pooling
from fastmrc.types import Answer

if TYPE_CHECKING:
    from fastmrc.cloze.reader import ClozeReader
    from fastmrc.corpus_index import CorpusIndex
    from fastmrc.similarity import SimilarityModel

__all__ = [
    "EXIT_SKIPPED",
    "METHODS",
    "Method",
    "Reader",
    "SubParsers",
    "add_cloze_options",
    "add_json_option",
    "add_reader_options",
    "add_similarity_options",
    "build_cloze_reader",
    "build_reader",
    "build_similarity_model",
    "open_corpus",
    "positive_int",
    "print_json",
    "refuse_search_options",
    "printable",
    "report_issue",
    "search_options",
    "set_threads",
]

SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


@dataclass(frozen=True, slots=True)
class Method:
    """A kind of reader: its class, of the same name in fastmrc and in fastmrc.reference."""

    reader: str
    options: type[ReaderOptions]


METHODS = {
    "seq2seq": Method("Seq2SeqReader", SearchOptions),
    "mlm": Method("MLMReader", SlotOptions),
    "span": Method("SpanReader", SpanOptions),
}
EXIT_SKIPPED = 2  # records could not be used
DTYPES = ("float32", "bfloat16", "float16", "auto")
NORMALIZATIONS = ("original", "none")


class Reader(Protocol):
    """What the commands need of a reader."""

    def answer(self, question: str, passages: Sequence[str], **options: Any) -> Answer:
        """Answer one question."""
        ...

    def answer_batch(
        self, pairs: Sequence[tuple[str, Sequence[str]]], *, progress: bool, **options: Any
    ) -> list[Answer]:
        """Answer several questions, in their order."""
        ...


def printable(text: str) -> str:
    """Replace control characters one for one, so that no text can steer the terminal."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def positive_int(text: str) -> int:
    """Parse an integer of at least 1 for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def add_reader_options(
    parser: argparse.ArgumentParser, *, baseline: bool = True, cloze: bool = False
) -> None:
    """Add the options that choose, load and steer a reader.

    Parameters
    ----------
    parser
        Parser of the command.
    baseline
        Whether the command lets the user choose the reference instead of the engine.
    cloze
        Whether it lets them choose the cloze reader, which takes none of the search options.
    """
    model = parser.add_argument_group("model")
    methods = (*METHODS, "cloze") if cloze else tuple(METHODS)
    model.add_argument("--method", choices=methods, default="seq2seq", help="kind of reader")
    model.add_argument(
        "--model",
        metavar="PATH|ID",
        help="directory or hub id (default: the packaged model; span: needed)",
    )
    model.add_argument(
        "--normalization", choices=NORMALIZATIONS, help="of passages (default: the model's own)"
    )
    _add_loading_options(model)
    if baseline:
        model.add_argument(
            "--baseline", action="store_true", help="use the pure-Python reference, slow"
        )
    search = parser.add_argument_group(
        "search", "A default gives way to what the model says for itself in its fastmrc.json."
    )
    _add_search_options(search)


def add_similarity_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose and load a similarity model."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="PATH|ID", help="directory or hub id (default: the packaged model)"
    )
    model.add_argument(
        "--pooling",
        choices=get_args(Pooling),
        help="how a vector is made of the last hidden states (default: the model's own)",
    )
    _add_loading_options(model)


def build_similarity_model(args: argparse.Namespace) -> SimilarityModel:
    """Load the model that the options of `add_similarity_options` ask for."""
    from fastmrc.similarity import SimilarityModel

    set_threads(args.threads)
    options = _given(args, ("device", "dtype", "pooling", "revision"))
    return SimilarityModel.from_pretrained(
        args.model, local_files_only=args.local_files_only, **options
    )


def add_cloze_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose and load a cloze model."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="PATH", help="directory (default: the packaged model)")
    model.add_argument("--device", help="as torch names it, such as cpu or cuda:0 (default: cpu)")
    model.add_argument("--threads", type=positive_int, metavar="N", help="of engine and encoder")


def build_cloze_reader(args: argparse.Namespace) -> ClozeReader:
    """Load the reader that the options of `add_cloze_options` ask for."""
    from fastmrc.cloze.reader import ClozeReader

    set_threads(args.threads)
    return ClozeReader.from_pretrained(args.model, device=args.device)


def _add_loading_options(model: argparse._ArgumentGroup) -> None:
    model.add_argument("--revision", help="revision of a hub model")
    model.add_argument("--local-files-only", action="store_true", help="never use the network")
    model.add_argument("--dtype", choices=DTYPES, help="of the encoder (default: float32)")
    model.add_argument("--device", help="as torch names it, such as cpu or cuda:0 (default: cpu)")
    model.add_argument("--threads", type=positive_int, metavar="N", help="of engine and encoder")


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def open_corpus(
    path: str, model: SimilarityModel, *, keep: bool, issues: list[DataIssue]
) -> CorpusIndex:
    """Open a corpus and report on the standard error what could not be used or written."""
    from fastmrc import corpus_index

    def skip(issue: DataIssue) -> None:
        issues.append(issue)
        report_issue(issue)

    return corpus_index.open_corpus(
        path,
        model,
        keep=keep,
        on_error=skip,
        say=lambda reason: print(f"fastmrc: {reason}", file=sys.stderr),
        progress=sys.stderr.isatty(),
    )


def _add_search_options(search: argparse._ArgumentGroup) -> None:
    def add(name: str, text: str, **keywords: Any) -> None:
        option = "--" + name.replace("_", "-")
        search.add_argument(option, help=f"{text} ({_defaults(name)})", default=None, **keywords)

    add("beam_size", "hypotheses kept at each step", type=int, metavar="K")
    add("decoding", "slot by slot, or the best span", choices=get_args(Decoding))
    add("mode", "copy a span, or write freely", choices=get_args(Mode))
    without_weights = [vote for vote in get_args(Vote) if vote != "weighted"]
    add("vote", "how passages agree", choices=without_weights)
    add("top_k", "answers of each passage that vote", type=int, metavar="K")
    add("min_answer_tokens", "shortest answer", type=int, metavar="N")
    add("max_answer_tokens", "longest answer", type=int, metavar="N")
    add("finish", "when the search ends", choices=get_args(Finish))
    add("length_penalty", "exponent of the length with --finish pool", type=float, metavar="X")
    add("combine", "vote at each step, or on finished answers", choices=get_args(Combine))
    add(
        "no_answer_ratio",
        "only passages vote that are at most X (1 or more; inf: any) times as likely to hold no "
        "answer as the surest",
        type=float,
        metavar="X",
    )
    add("no_answer_threshold", "give no answer below this score", type=float, metavar="X")
    yes_or_no: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    add("handle_impossible_answer", "whether a passage may hold no answer", **yes_or_no)
    add(
        "null_score_diff_threshold",
        "logarithm by which its no-answer score must be higher",
        type=float,
        metavar="X",
    )
    add("align_to_words", "whether answers are whole words", **yes_or_no)
    add("stride", "read long passages in windows that overlap by N tokens", type=int, metavar="N")
    add("max_passage_tokens", "cut passages, or windows of them", type=int, metavar="N")
    add("max_question_tokens", "cut the question", type=int, metavar="N")


def _defaults(name: str) -> str:
    """Say which methods take an option, and its default."""
    by_default: dict[str, list[str]] = {}
    for method, kind in METHODS.items():
        for field in fields(kind.options):
            if field.name == name and field.default is not MISSING:
                shown = str(field.default)
                shown = {"None": "off", "False": "off", "True": "on"}.get(shown, shown)
                by_default.setdefault(shown, []).append(method)
    if list(by_default.values()) == [list(METHODS)]:
        return f"default: {next(iter(by_default))}"
    return "; ".join(f"{', '.join(who)}: {shown}" for shown, who in by_default.items())


def search_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the search options that were given, checked; the reader's defaults stand for others.

    Raises
    ------
    InputError
        Naming the first option that does not fit.
    """
    method = METHODS[args.method]
    given = _given_search_options(args)
    _refuse_others(args.method, given, {field.name for field in fields(method.options)})
    method.options(**given)
    return given


def refuse_search_options(args: argparse.Namespace) -> None:
    """Raise InputError for options of readers that the cloze reader does not have."""
    others = _given(args, ("normalization", "dtype", "revision"))
    others |= {name: True for name in ("baseline", "local_files_only") if getattr(args, name)}
    _refuse_others(args.method, _given_search_options(args) | others, set())


def _given_search_options(args: argparse.Namespace) -> dict[str, Any]:
    names = {field.name: None for kind in METHODS.values() for field in fields(kind.options)}
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _refuse_others(method: str, given: Mapping[str, Any], known: Set[str]) -> None:
    for name in given:
        if name not in known:
            raise InputError(f"--{name.replace('_', '-')}: no option of --method {method}")


def set_threads(count: int | None) -> None:
    """Set the threads of the engine and of torch; None leaves the defaults."""
    if count is None:
        return
    import torch

    from fastmrc import set_num_threads

    set_num_threads(count)
    torch.set_num_threads(count)


def build_reader(args: argparse.Namespace, *, baseline: bool | None = None) -> Reader:
    """Load the reader that the options ask for.

    Parameters
    ----------
    args
        With the attributes of `add_reader_options`.
    baseline
        Engine (False) or reference (True), whatever the options say; None: as they say.

    Returns
    -------
    Reader
        Options that were not given are not passed on, so the reader's own defaults hold.
    """
    if args.model is None and args.method == "span":
        raise InputError("--model: expected a directory or hub id, as no span model is packaged")
    set_threads(args.threads)
    use_reference = args.baseline if baseline is None else baseline
    module = importlib.import_module("fastmrc.reference" if use_reference else "fastmrc")
    options = _given(args, ("device", "dtype", "normalization", "revision"))
    reader_class = getattr(module, METHODS[args.method].reader)
    reader = reader_class.from_pretrained(
        args.model, local_files_only=args.local_files_only, **options
    )
    return cast(Reader, reader)


def print_json(value: object) -> None:
    """Print one JSON object on one line of the standard output."""
    print(json.dumps(value, ensure_ascii=False))


def report_issue(issue: DataIssue | str) -> None:
    """Name a record that is left out, in one line on the standard error."""
    print(f"fastmrc: skipped: {' '.join(str(issue).split())}", file=sys.stderr)
