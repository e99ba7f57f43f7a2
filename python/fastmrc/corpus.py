"""Texts of files of any kind: questions, pairs, passages, or a text a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fastmrc.data import (
    BOM,
    DataIssue,
    OnError,
    Pair,
    Question,
    StrPath,
    decode_utf8,
    json_passage,
    read_training_data,
)
from fastmrc.errors import InputError

__all__ = ["all_texts", "corpus_texts", "question_texts", "searched_texts"]


def all_texts(record: Question | Pair) -> Iterator[str]:
    """Yield every text of a record."""
    if isinstance(record, Pair):
        yield record.text
        yield from record.synonyms
        return
    yield record.question
    for passage in record.passages:
        yield passage.text
        if passage.answer:
            yield passage.answer
    yield from record.answers


def searched_texts(record: Question | Pair) -> Iterator[str]:
    """Yield the passages of a question, or the texts of a pair."""
    if isinstance(record, Question):
        for passage in record.passages:
            yield passage.text
    else:
        yield from all_texts(record)


def question_texts(record: Question | Pair) -> Iterator[str]:
    """Yield the question, or the texts of a pair."""
    if isinstance(record, Question):
        yield record.question
    else:
        yield from all_texts(record)


def corpus_texts(
    corpus: Sequence[StrPath],
    on_error: OnError,
    of_record: Callable[[Question | Pair], Iterable[str]] = all_texts,
) -> Iterator[str]:
    """Yield the texts of a corpus.

    Parameters
    ----------
    corpus
        Files of questions or pairs, of passages in JSON lines, or of plain text with one text a
        line, told apart by their names and contents.
    on_error
        Called with each record that cannot be used.
    of_record
        Which texts of a question or pair count.

    Yields
    ------
    str
        In the order of the files.

    Raises
    ------
    OSError
        If a file cannot be read.
    """
    for path in corpus:
        kind = _file_kind(path)
        if kind == "records":
            for record in read_training_data(path, on_error=on_error):
                yield from of_record(record)
        else:
            yield from _lines(path, kind == "passages", on_error)


def _file_kind(path: StrPath) -> Literal["records", "passages", "text"]:
    """Tell by its name, or else by its first line with content, what a file holds."""
    suffix = Path(path).suffix
    if suffix == ".txt":
        return "text"
    with open(path, "rb") as file:
        for content in filter(None, (line.removeprefix(BOM).strip() for line in file)):
            value = _json_or_none(content)
            if isinstance(value, str) or (isinstance(value, dict) and "passage" in value):
                return "passages"
            # A broken line of JSON lines tells nothing.
            if value is not None or suffix != ".jsonl":
                is_json = content.startswith((b"{", b"[{")) or content == b"["
                return "records" if is_json or suffix.startswith(".json") else "text"
    return "text"


def _json_or_none(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _lines(path: StrPath, as_json: bool, on_error: OnError) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            content = raw.removeprefix(BOM) if number == 1 else raw
            if not content.strip():
                continue
            try:
                text = decode_utf8(content).strip("\r\n")
                yield json_passage(text) if as_json else text
            except InputError as error:
                on_error(DataIssue(str(path), number, str(error)))
