"""Texts of a corpus: read from files, and cut into tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastmrc.data import (
    BOM,
    DataIssue,
    Pair,
    Question,
    StrPath,
    decode_utf8,
    json_passage,
    read_training_data,
)
from fastmrc.errors import InputError
from fastmrc.pretrained import LoadedModel
from fastmrc.text import TextCodec
from fastmrc.vocabulary.wordpieces import WordPieces

__all__ = [
    "CorpusCount",
    "Cut",
    "Cutter",
    "OnError",
    "corpus_batches",
    "corpus_texts",
    "cut_corpus",
]

OnError: TypeAlias = Callable[[DataIssue], None]

_BATCH = 256


@dataclass(frozen=True, slots=True)
class Cut:
    """A text, its token ids, and the characters [start, end) of each."""

    text: str
    ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]


@dataclass(slots=True)
class CorpusCount:
    """What was found in a corpus: texts, their tokens, and records that could not be used."""

    texts: int = 0
    tokens: int = 0
    skipped: int = 0


class Cutter:
    """Cuts texts in each way that fastmrc and other programs do with one tokenizer.

    Parameters
    ----------
    loaded
        Model whose tokenizer and normalization are used.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        names = dict.fromkeys(("none", loaded.normalization))
        self._codecs = [TextCodec(loaded.tokenizer, name) for name in names]
        # Here a text that looks like a special token is one.
        self._plain = WordPieces.of(loaded).backend

    def cut(self, texts: Sequence[str]) -> Iterator[list[Cut]]:
        """Yield the texts as cut in each way."""
        for codec in self._codecs:
            tokenized = codec.encode_passages(texts)
            yield [
                Cut(text, t.token_ids, t.starts, t.ends)
                for text, t in zip(texts, tokenized, strict=True)
            ]
        yield [
            Cut(text, np.array(e.ids, dtype=np.int32), *_offsets(e.offsets))
            for text, e in zip(
                texts, self._plain.encode_batch(texts, add_special_tokens=False), strict=True
            )
        ]


def _offsets(pairs: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    offsets = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return offsets[:, 0], offsets[:, 1]


def cut_corpus(
    full: LoadedModel, corpus: Sequence[StrPath], count: CorpusCount, on_error: OnError | None
) -> Iterator[Cut]:
    """Read a corpus and cut its texts in each way.

    Parameters
    ----------
    full
        Model whose tokenizer cuts.
    corpus
        Files, as `corpus_texts` takes them.
    count
        Counts up while the result is consumed; its tokens are those of fastmrc without
        normalization.
    on_error
        Called with each record that cannot be used, if not None.

    Yields
    ------
    Cut
        One for each text and way.

    Raises
    ------
    InputError
        If the corpus holds no text.
    OSError
        If a file cannot be read.
    """

    def skip(issue: DataIssue) -> None:
        count.skipped += 1
        if on_error is not None:
            on_error(issue)

    cutter = Cutter(full)
    for texts in corpus_batches(corpus, skip):
        count.texts += len(texts)
        for i, cuts in enumerate(cutter.cut(texts)):
            if i == 0:
                count.tokens += sum(len(cut.ids) for cut in cuts)
            yield from cuts
    if not count.tokens:
        files = ", ".join(f"'{path}'" for path in corpus)
        raise InputError(f"corpus: expected texts, got none that can be used in {files}")


def corpus_batches(corpus: Sequence[StrPath], on_error: OnError) -> Iterator[list[str]]:
    """Yield the texts of a corpus as `corpus_texts` does, in lists of a fair size for `Cutter`."""
    texts = corpus_texts(corpus, on_error)
    while batch := list(islice(texts, _BATCH)):
        yield batch


def corpus_texts(corpus: Sequence[StrPath], on_error: OnError) -> Iterator[str]:
    """Yield the texts of a corpus.

    Parameters
    ----------
    corpus
        Files of questions or pairs, of passages in JSON lines, or of plain text with one text a
        line, told apart by their names and contents.
    on_error
        Called with each record that cannot be used.

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
                yield from _texts_of(record)
        else:
            yield from _lines(path, kind == "passages", on_error)


def _texts_of(record: Question | Pair) -> Iterator[str]:
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
