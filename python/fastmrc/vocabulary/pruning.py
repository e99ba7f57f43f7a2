"""The whole of it: choose the tokens, write the smaller model, compare it, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fastmrc.data import OnError, StrPath
from fastmrc.errors import InputError
from fastmrc.model_files import check_new_directory, new_directory
from fastmrc.pretrained import load_model, weight_files
from fastmrc.vocabulary.checking import check_corpus, check_result, load_result
from fastmrc.vocabulary.corpus import CorpusCount, cut_corpus
from fastmrc.vocabulary.reachability import unreachable_tokens
from fastmrc.vocabulary.reasons import Reason
from fastmrc.vocabulary.selection import needed_tokens, required_ids, select_tokens
from fastmrc.vocabulary.wordpieces import WordPieces
from fastmrc.vocabulary.writing import write_model

__all__ = ["PruningReport", "Rule", "prune_vocabulary"]

Rule = Literal["simplified"]


@dataclass(frozen=True, slots=True)
class PruningReport:
    """What `prune_vocabulary` did.

    Attributes
    ----------
    tokens_before, tokens_after
        Rows of the embeddings.
    bytes_before, bytes_after
        Size of the files of weights.
    dropped
        How many rows went, by reason; the reasons that occurred, in the order of `REASONS`.
    corpus_texts, corpus_tokens
        Texts of the corpus and the tokens they are cut into; None for a rule.
    skipped
        Records of the corpus that could not be used.
    """

    tokens_before: int
    tokens_after: int
    bytes_before: int
    bytes_after: int
    dropped: dict[Reason, int]
    corpus_texts: int | None = None
    corpus_tokens: int | None = None
    skipped: int = 0


def prune_vocabulary(
    model_dir: StrPath,
    output_dir: StrPath,
    *,
    rule: Rule | None = None,
    corpus: Sequence[StrPath] | None = None,
    on_error: OnError | None = None,
) -> PruningReport:
    """Write a copy of a masked language model with fewer tokens.

    The copy is compared with the full model before it takes its place, so `output_dir` holds
    either a model that agrees or nothing.

    Parameters
    ----------
    model_dir
        Directory of a model with a WordPiece tokenizer that
        `fastmrc.pretrained.load_model` accepts.
    output_dir
        A missing or empty directory; made if needed, with those above it.
    rule
        ``"simplified"``; this or `corpus`.
    corpus
        Files of questions or pairs (see `fastmrc.data.read_training_data`), of passages in JSON
        lines (strings, or objects with ``"passage"``), or of plain text with one text a line, as
        all ``.txt`` files are read. They are read twice.
    on_error
        Called with each record of the corpus that cannot be used; they are left out and counted.

    Returns
    -------
    PruningReport

    Raises
    ------
    InputError
        If neither or both of `rule` and `corpus` are given, a directory does not fit, or the
        corpus holds no text.
    UnsupportedModelError
        If the model cannot be loaded, has no WordPiece tokenizer, or the rule cannot tell what
        its tokenizer makes of a text; or if the result would differ from the full model.
    OSError
        If a file cannot be read or written.
    """
    _check_choice(rule, corpus)
    source, output = Path(model_dir).expanduser(), Path(output_dir).expanduser()
    if not source.is_dir():
        raise InputError(f"model_dir: there is no directory '{source}'")
    check_new_directory(output)
    # Not every model has the attention that load_model asks for by default.
    full = load_model(source, attention=None)
    pieces = WordPieces.of(full)
    count = CorpusCount()
    if corpus is None:
        reasons = unreachable_tokens(pieces)
    else:
        needed = needed_tokens(pieces, cut_corpus(full, corpus, count, on_error))
        reasons = {t: "not_in_corpus" for t in pieces.vocabulary if t not in needed}
    embeddings: Any = full.model.get_input_embeddings()
    rows = len(embeddings.weight)
    required = required_ids(full, pieces, rows)
    selection = select_tokens(rows, pieces.vocabulary, reasons, required)

    with new_directory(output) as directory:
        write_model(full, pieces, selection, directory)
        pruned = load_result(full, directory)
        check_result(full, pruned, selection)
        check_corpus(full, pruned, selection, corpus or ())
        sizes = [_weight_bytes(place) for place in (source, directory)]
    return PruningReport(
        tokens_before=rows,
        tokens_after=len(selection.kept),
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        dropped=selection.dropped,
        corpus_texts=None if corpus is None else count.texts,
        corpus_tokens=None if corpus is None else count.tokens,
        skipped=count.skipped,
    )


def _weight_bytes(directory: Path) -> int:
    names = weight_files(directory, str(directory))
    return sum((directory / name).stat().st_size for name in names)


def _check_choice(rule: Rule | None, corpus: Sequence[StrPath] | None) -> None:
    if (rule is None) == (corpus is None):
        given = "neither" if rule is None else "both"
        raise InputError(f"rule, corpus: expected one of them, got {given}")
    if rule is not None and rule not in get_args(Rule):
        raise InputError(f"rule: expected one of {', '.join(get_args(Rule))}, got {rule!r}")
    if isinstance(corpus, str | bytes):
        raise InputError("corpus: expected a list of files, got one path")
    if corpus is not None and not corpus:
        raise InputError("corpus: expected at least one file, got none")
