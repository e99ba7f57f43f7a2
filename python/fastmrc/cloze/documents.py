"""Documents with blanks, and the files that hold them.

CMRC 2017
    Lines ``n ||| sentence`` with words between spaces, one of them ``XXXXX``, then the line
    ``<qid_n> ||| query``, which repeats the sentence with the blank and is not read. The answers
    are in a file of their own, ``<qid_n> ||| answer``; beside ``NAME.doc_query`` it is
    ``NAME.answer``.
JSON lines
    ``{"id", "words": [...], "answer"}`` or ``{"id", "text", "answer"}``, the answer where it is
    known; texts are cut into words.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastmrc.cloze.words import cut_words
from fastmrc.data import (
    BOM,
    LINE_BREAKS,
    DataIssue,
    OnError,
    StrPath,
    check_text,
    decode_utf8,
    keyed_lines,
    raise_issue,
)
from fastmrc.errors import InputError
from fastmrc.predictions import CMRC_2017

__all__ = [
    "BLANK",
    "ClozeDocument",
    "answers_beside",
    "cut_text",
    "holds_cloze",
    "is_cloze_file",
    "parse_cloze",
    "read_any_cloze_answers",
    "read_cloze",
    "read_cloze_answers",
]

BLANK = "XXXXX"
_BAR = "|||"
_QUERY = re.compile(r"<([^<>\s]+)>\Z")
_NUMBER = re.compile(r"[0-9]+\Z")


@dataclass(frozen=True, slots=True)
class ClozeDocument:
    """A document in words.

    Attributes
    ----------
    id
        Of its question; empty if there is none.
    words
        `BLANK` where a word is missing.
    answer
        The missing word; empty if it is not known.
    place
        ``file:line`` of its end; empty for one that was made.
    """

    id: str
    words: tuple[str, ...]
    answer: str = ""
    place: str = ""

    @property
    def blanks(self) -> tuple[int, ...]:
        """Positions of the blanks."""
        return tuple(i for i, word in enumerate(self.words) if word == BLANK)

    @classmethod
    def of(cls, document: str | Sequence[str] | ClozeDocument) -> ClozeDocument:
        """Make a document of a text, which is cut into words, or of words.

        Raises
        ------
        InputError
            If it is neither, or no word is `BLANK`.
        """
        if isinstance(document, ClozeDocument):
            made = document
        elif isinstance(document, str):
            made = cls("", tuple(cut_text(check_text("document", document))))
        elif isinstance(document, Sequence) and all(isinstance(word, str) for word in document):
            made = cls("", _checked("document", document))
        else:
            got = type(document).__name__
            raise InputError(f"document: expected a text or a sequence of words, got {got}")
        if not made.blanks:
            raise InputError(f"document: expected a blank, the word {BLANK}, got none")
        return made


def cut_text(text: str) -> Iterator[str]:
    """Yield the words of a text between its blanks, and the blanks."""
    for i, part in enumerate(text.split(BLANK)):
        if i:
            yield BLANK
        if part.strip():
            yield from cut_words(part)


def is_cloze_file(path: StrPath) -> bool:
    """Tell by its first line with content whether a file holds documents with blanks."""
    with open(path, "rb") as file:
        return _is_cloze(_first_line(file))


def holds_cloze(raw: bytes) -> bool:
    """Tell by the first line with content whether bytes hold documents with blanks."""
    return _is_cloze(_first_line(io.BytesIO(raw)))


def _is_cloze(line: bytes) -> bool:
    return _is_numbered(line) or _is_json_cloze(line)


def _first_line(lines: Iterable[bytes]) -> bytes:
    return next(filter(None, (line.removeprefix(BOM).strip() for line in lines)), b"")


def _is_numbered(line: bytes) -> bool:
    head, bar, _ = line.decode("utf-8", "replace").partition(_BAR)
    return bool(bar) and _NUMBER.match(head.strip()) is not None


def _is_json_cloze(line: bytes) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or "question" in value:
        return False
    return "words" in value or BLANK in str(value.get("text", ""))


def answers_beside(path: StrPath) -> Path | None:
    """Return the file ``NAME.answer`` beside ``NAME.doc_query``, if there is one."""
    if Path(path).suffix != ".doc_query":
        return None
    beside = Path(path).with_suffix(".answer")
    return beside if beside.is_file() else None


def read_cloze(
    path: StrPath, answers: StrPath | None = None, *, on_error: OnError | None = None
) -> Iterator[ClozeDocument]:
    """Read documents with blanks, in either form of this module.

    Parameters
    ----------
    path
        UTF-8, with or without a byte order mark.
    answers
        CMRC 2017 answers; None: the file beside ``NAME.doc_query`` if there is one.
    on_error
        Called with each record that cannot be used; if None, the first one raises.

    Yields
    ------
    ClozeDocument
        In the order of the file.

    Raises
    ------
    InputError
        Without `on_error`, at the first record that cannot be used; for answers that cannot be
        read in any case.
    OSError
        If a file cannot be read.
    """
    name = os.fspath(path)
    answers = answers_beside(path) if answers is None else answers
    known = {} if answers is None else read_cloze_answers(answers)
    with open(name, "rb") as file:
        raw = file.read()
    for document in parse_cloze(name, raw, on_error):
        answer = document.answer or known.get(document.id, "")
        yield replace(document, answer=answer)


def parse_cloze(name: str, raw: bytes, on_error: OnError | None = None) -> Iterator[ClozeDocument]:
    """Yield the documents with blanks that the bytes of a file hold; see `read_cloze`."""
    report = raise_issue if on_error is None else on_error
    seen: set[str] = set()
    is_json = _first_line(io.BytesIO(raw)).startswith(b"{")
    lines = enumerate(io.BytesIO(raw.removeprefix(BOM)), start=1)
    content = ((number, line) for number, line in lines if line.strip())
    for document in (_json_lines if is_json else _cmrc_2017)(name, content, report):
        if document.id in seen:
            line = int(document.place.rpartition(":")[2])
            report(DataIssue(name, line, f"id: {document.id!r} was used before"))
            continue
        seen.add(document.id)
        yield document


def read_cloze_answers(path: StrPath) -> dict[str, str]:
    """Read a CMRC 2017 file of answers; answers by id, in the order of the file.

    Raises
    ------
    InputError
        With file and line: not UTF-8, not ``<id> ||| answer``, or an id that was used before.
    OSError
        If the file cannot be read.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        lines = [(n, line.removeprefix(BOM)) for n, line in enumerate(file, start=1)]
    return keyed_lines(name, [line for line in lines if line[1].strip()], CMRC_2017.parse)


def read_any_cloze_answers(path: StrPath) -> dict[str, str] | None:
    """Read the answers of a file of documents with blanks, or of a CMRC 2017 file of answers; None
    if the file is neither.

    Raises
    ------
    InputError
        If an answer is not known.
    """
    if not os.path.isfile(path):  # what is no regular file can be read only once, by another
        return None
    with open(path, "rb") as file:
        raw = file.read()
    if _first_line(io.BytesIO(raw)).startswith(b"<"):
        return read_cloze_answers(path)
    if not holds_cloze(raw):
        return None
    answers = {document.id: document.answer for document in read_cloze(path)}
    unknown = [key for key, answer in answers.items() if not answer]
    if unknown:
        raise InputError(
            f"{os.fspath(path)}: expected an answer for each document, got none for {len(unknown)} "
            f"of {len(answers)}, the first {unknown[0]!r}; CMRC 2017 answers are looked for in "
            "NAME.answer beside NAME.doc_query"
        )
    return answers


def _cmrc_2017(
    name: str, lines: Iterable[tuple[int, bytes]], report: OnError
) -> Iterator[ClozeDocument]:
    words: list[str] = []
    sound = True  # a document with a broken line is left out as a whole
    number = 0
    for number, raw in lines:
        try:
            head, bar, text = decode_utf8(raw).partition(_BAR)
            query = _QUERY.match(head.strip())
            if not bar or (query is None and _NUMBER.match(head.strip()) is None):
                got = head.strip()[:40]
                raise InputError(f"expected n {_BAR} sentence or <id> {_BAR} query, got {got!r}")
        except InputError as error:
            report(DataIssue(name, number, str(error)))
            sound = False
            continue
        if query is None:
            words += text.split()
            continue
        if sound and BLANK not in words:
            report(DataIssue(name, number, f"expected {BLANK} between spaces, got none"))
        elif sound:
            yield ClozeDocument(query[1], tuple(words), place=f"{name}:{number}")
        words, sound = [], True
    if words:
        report(DataIssue(name, number, "the last document has no query line; is the file cut off?"))


def _json_lines(
    name: str, lines: Iterable[tuple[int, bytes]], report: OnError
) -> Iterator[ClozeDocument]:
    for number, raw in lines:
        try:
            yield _parse_json(raw, f"{name}:{number}")
        except InputError as error:
            report(DataIssue(name, number, str(error)))


def _parse_json(line: bytes, place: str) -> ClozeDocument:
    try:
        value = json.loads(decode_utf8(line))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("id"), str) or not value["id"]:
        raise InputError('expected an object with an "id" that is a string')
    words, text, answer = value.get("words"), value.get("text"), value.get("answer", "")
    if not isinstance(answer, str):
        raise InputError(f"answer: expected a string, got {type(answer).__name__}")
    if isinstance(text, str):
        words = list(cut_text(check_text("text", text)))
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise InputError('expected "words", a list of strings, or "text", a string')
    if BLANK not in words:
        raise InputError(f"expected the word {BLANK}, got none")
    return ClozeDocument(check_text("id", value["id"]), _checked("words", words), answer, place)


def _checked(name: str, words: Sequence[str]) -> tuple[str, ...]:
    for word in words:
        check_text(name, word)
        if LINE_BREAKS.search(word):
            raise InputError(f"{name}: expected words without line breaks and tabs, got {word!r}")
    return tuple(words)
