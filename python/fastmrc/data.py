"""Questions and passages on disk.

Questions are read from three shapes of file, told apart by their content:

JSON lines
    One object a line:
    ``{"id", "question", "passages": [{"passage", "answer"}], "answers": [...]}``. A passage may
    also be a plain string. Read line by line, so the size of the file does not matter.
a JSON array
    Of the same objects. The file is held in memory.
SQuAD
    ``{"data": [{"paragraphs": [{"context", "qas": [...]}]}]}``, where an entry of ``qas`` is
    ``{"id", "question", "answers": [{"text"}]}``. The file is held in memory; each question gets
    its paragraph as its only passage.

Training data may also hold pairs, ``{"text", "synonyms": [...]}``, in JSON lines or an array.

A record that cannot be used is reported with its place, and the others are still read.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, TypeAlias, TypeVar

from fastmrc.errors import InputError

__all__ = [
    "BOM",
    "DataIssue",
    "LINE_BREAKS",
    "OnError",
    "Pair",
    "Passage",
    "Question",
    "StrPath",
    "check_text",
    "decode_utf8",
    "json_passage",
    "keyed_lines",
    "raise_issue",
    "read_passages",
    "read_questions",
    "read_training_data",
]

T = TypeVar("T")
R = TypeVar("R")
StrPath: TypeAlias = str | os.PathLike[str]

BOM = b"\xef\xbb\xbf"
_JSON_TYPES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}
# Everything that some reader of text takes for the end of a line, and the field separator.
LINE_BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_SEPARATORS = re.compile(r"[\s,]*")
_DOCUMENT_START = re.compile(r'\s*\{\s*(\n|"(data|version)"\s*:)')


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage and the answer it holds; an empty answer means that it holds none."""

    text: str
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a data set.

    Attributes
    ----------
    id
        Unique in its file, not empty, without tabs and line breaks.
    question
        Text of the question, not blank.
    passages
        Passages in the order of the file; possibly none.
    answers
        Accepted answers; empty if none are given.
    place
        ``file:line``, or ``file: data[i].paragraphs[j].qas[k]`` in a SQuAD file.
    """

    id: str
    question: str
    passages: tuple[Passage, ...]
    answers: tuple[str, ...] = ()
    place: str = ""

    @property
    def pair(self) -> tuple[str, list[str]]:
        """Question and texts of the passages, as ``answer_batch`` takes them."""
        return self.question, [passage.text for passage in self.passages]


@dataclass(frozen=True, slots=True)
class Pair:
    """A text and others that mean the same; `place` is where they stand, ``file:line``."""

    text: str
    synonyms: tuple[str, ...]
    place: str = ""


@dataclass(frozen=True, slots=True)
class DataIssue:
    """A record that was left out.

    Attributes
    ----------
    path
        File as the caller named it.
    line
        Line from 1, or None where only the path inside a SQuAD document is known.
    message
        What was expected and what came.
    item
        Path inside a SQuAD document, else empty.
    """

    path: str
    line: int | None
    message: str
    item: str = ""

    @property
    def place(self) -> str:
        """``file:line`` or ``file: item``."""
        return _place(self.path, self.line, self.item)

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


OnError: TypeAlias = Callable[[DataIssue], None]


@dataclass(frozen=True, slots=True)
class _Record:
    """A parsed JSON value and where it came from."""

    value: object
    line: int | None
    item: str = ""


# --- questions ---------------------------------------------------------------------------------


def read_questions(path: StrPath, *, on_error: OnError | None = None) -> Iterator[Question]:
    """Read the questions of a file in any of the three shapes of this module.

    Parameters
    ----------
    path
        JSON lines, a JSON array or a SQuAD document, in UTF-8, with or without a byte order mark.
    on_error
        Called with each record that cannot be used: not JSON, not UTF-8, no question, a value of
        a wrong type, an id that was used before. ``issues.append`` collects them. If None, the
        first one raises.

    Yields
    ------
    Question
        In the order of the file.

    Raises
    ------
    InputError
        Without ``on_error``, at the first record that cannot be used.
    OSError
        If the file cannot be read.

    Notes
    -----
    After a broken element of an array, reading goes on at the next line on which an element
    starts; a SQuAD document that is not JSON is lost as a whole.
    """
    return _parsed(os.fspath(path), on_error, _parse_question)


def read_training_data(
    path: StrPath, *, on_error: OnError | None = None
) -> Iterator[Question | Pair]:
    """Read questions as `read_questions` does, and pairs ``{"text", "synonyms": [...]}``.

    A record with the key ``synonyms`` is a pair; a file may hold both kinds.
    """

    def parse(value: object, place: str) -> Question | Pair:
        is_pair = isinstance(value, dict) and "synonyms" in value
        return _parse_pair(value, place) if is_pair else _parse_question(value, place)

    return _parsed(os.fspath(path), on_error, parse)


def _parsed(name: str, on_error: OnError | None, parse: Callable[[object, str], R]) -> Iterator[R]:
    """Parse the records of a file; report those that cannot be, and ids that were used before."""
    report = raise_issue if on_error is None else on_error
    seen: dict[str, str] = {}
    for record in _records(name, report):
        place = _place(name, record.line, record.item)
        try:
            parsed = parse(record.value, place)
            if isinstance(parsed, Question):
                first = seen.setdefault(parsed.id, place)
                if first is not place:
                    raise InputError(f"id: {parsed.id!r} was used before, at {first}")
        except InputError as error:
            report(DataIssue(name, record.line, str(error), record.item))
        else:
            yield parsed


def raise_issue(issue: DataIssue) -> None:
    """Raise a record that cannot be used as InputError."""
    raise InputError(str(issue))


def _place(path: str, line: int | None, item: str) -> str:
    if line is not None:
        return f"{path}:{line}"
    return f"{path}: {item}" if item else path


def _records(name: str, report: OnError) -> Iterator[_Record]:
    with open(name, "rb") as file:
        head: list[bytes] = []
        for raw in file:
            head.append(raw if head else raw.removeprefix(BOM))
            if sum(1 for line in head if line.strip()) == 2:
                break
        if _is_json_lines(head):
            yield from _json_lines(name, chain(head, file), report)
            return
        rest = file.read()
    # Bytes that are not UTF-8 become lone surrogates, so one of them costs one record only.
    text = b"".join([*head, rest]).decode("utf-8", "surrogateescape")
    if text.lstrip().startswith("["):
        yield from _array(name, text, report)
        return
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _DOCUMENT_START.match(text):
            message, line_number = _json_problem(error)
            report(DataIssue(name, line_number, message))
        else:
            lines = (line + b"\n" for line in b"".join([*head, rest]).split(b"\n"))
            yield from _json_lines(name, lines, report)
        return
    for match in _ESCAPED_BYTE.finditer(text):
        report(DataIssue(name, text.count("\n", 0, match.start()) + 1, _not_utf8(match.group())))
    if _is_squad(document):
        yield from _squad(name, document["data"], report)
    else:
        yield _Record(document, 1)


def _is_json_lines(head: list[bytes]) -> bool:
    """Tell JSON lines from a document that spans the file, by its first two lines with content."""
    lines = [line.strip() for line in head if line.strip()]
    if not lines:
        return True
    first = _try_json(lines[0])
    if lines[0].startswith(b"["):
        return len(lines) == 2 and isinstance(first, list)
    if not lines[0].startswith(b"{"):
        return True
    if first is not None:
        return len(lines) == 2 or not _is_squad(first)
    if len(lines) == 1:
        return True
    second = _try_json(lines[1])
    return isinstance(second, dict) and "question" in second


def _is_squad(value: object) -> bool:
    return isinstance(value, dict) and "data" in value and "question" not in value


def _try_json(raw: bytes) -> object:
    try:
        return _loads(raw.decode("utf-8", "surrogateescape"))
    except InputError:
        return None


def _json_lines(name: str, lines: Iterable[bytes], report: OnError) -> Iterator[_Record]:
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            value = _loads(decode_utf8(raw))
        except InputError as error:
            report(DataIssue(name, number, str(error)))
        else:
            yield _Record(value, number)


def _array(name: str, text: str, report: OnError) -> Iterator[_Record]:
    """Read the elements one by one, so that a broken one does not take the others with it."""
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    line, counted = 1, 0
    while True:
        match = _SEPARATORS.match(text, position)
        start = match.end() if match else position
        line, counted = line + text.count("\n", counted, start), start
        if text[start : start + 1] in ("]", ""):
            break
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            position = _next_element(text, start)
            message, at = _json_problem(error)
            if position == len(text):
                message += "; the rest of the array cannot be read"
            report(DataIssue(name, at or line, message))
            if position == len(text):
                return
            continue
        position = end
        damaged = _ESCAPED_BYTE.search(text, start, end)
        if damaged:
            at = line + text.count("\n", start, damaged.start())
            report(DataIssue(name, at, _not_utf8(damaged.group())))
        else:
            yield _Record(value, line)
    if start == len(text):
        report(DataIssue(name, line, "not JSON: the array is not closed; is the file cut off?"))
    elif text[start + 1 :].strip():
        report(DataIssue(name, line, "not JSON: text after the end of the array is not read"))


def _next_element(text: str, start: int) -> int:
    """Offset of the next line that begins an object no deeper than the one at `start`."""
    column = start - (text.rfind("\n", 0, start) + 1)
    for match in re.compile(r"\n([ \t]*,?[ \t]*)\{").finditer(text, start):
        if len(match.group(1)) <= column:
            return match.start(1)
    return len(text)


def _squad(name: str, articles: object, report: OnError) -> Iterator[_Record]:
    """Yield the questions of a SQuAD document in the shape of the other files."""
    for article_item, article in _entries(name, "data", articles, report):
        paragraphs = article.get("paragraphs")
        for item, paragraph in _entries(name, f"{article_item}.paragraphs", paragraphs, report):
            context = paragraph.get("context")
            for qa_item, qa in _entries(name, f"{item}.qas", paragraph.get("qas"), report):
                try:
                    answers = _squad_answers(qa.get("answers"))
                except InputError as error:
                    report(DataIssue(name, None, str(error), qa_item))
                    continue
                passage = {"passage": context, "answer": answers[0] if answers else ""}
                record = {"id": qa.get("id"), "question": qa.get("question")}
                yield _Record(record | {"passages": [passage], "answers": answers}, None, qa_item)


def _entries(
    name: str, item: str, values: object, report: OnError
) -> Iterator[tuple[str, dict[str, object]]]:
    if not isinstance(values, list):
        report(DataIssue(name, None, f"expected an array, got {_kind(values)}", item))
        return
    for index, value in enumerate(values):
        if isinstance(value, dict):
            yield f"{item}[{index}]", value
        else:
            message = f"expected an object, got {_kind(value)}"
            report(DataIssue(name, None, message, f"{item}[{index}]"))


def _squad_answers(values: object) -> list[str]:
    if values is None:
        return []
    if not isinstance(values, list):
        raise InputError(f"answers: expected an array, got {_kind(values)}")
    texts: dict[str, None] = {}
    for index, value in enumerate(values):
        text = value.get("text") if isinstance(value, dict) else value
        texts.setdefault(_string(f"answers[{index}]", text))
    return list(texts)


def _parse_question(value: object, place: str) -> Question:
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, got {_kind(value)}")
    question = _string("question", _required(value, "question"))
    if not question.strip():
        raise InputError("question: expected a text, got a blank one")
    passages = _list("passages", _required(value, "passages"))
    answers = [] if value.get("answers") is None else _list("answers", value["answers"])
    return Question(
        id=_question_id(_required(value, "id")),
        question=question,
        passages=tuple(_passage(f"passages[{i}]", entry) for i, entry in enumerate(passages)),
        answers=tuple(_string(f"answers[{i}]", entry) for i, entry in enumerate(answers)),
        place=place,
    )


def _parse_pair(value: object, place: str) -> Pair:
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, got {_kind(value)}")
    text = _string("text", _required(value, "text"))
    entries = _list("synonyms", _required(value, "synonyms"))
    synonyms = tuple(_string(f"synonyms[{i}]", entry) for i, entry in enumerate(entries))
    if not text.strip() or not synonyms or not all(synonym.strip() for synonym in synonyms):
        raise InputError("expected a text and at least one synonym, got a blank one or none")
    return Pair(text, synonyms, place)


def _required(value: dict[str, object], key: str) -> object:
    if value.get(key) is None:
        raise InputError(f"{key}: missing")
    return value[key]


def _question_id(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _string("id", value)
    if not text or LINE_BREAKS.search(text):
        raise InputError(f"id: expected a text without tabs and line breaks, got {text!r}")
    return text


def _passage(name: str, value: object) -> Passage:
    if isinstance(value, str):
        return Passage(check_text(name, value))
    if not isinstance(value, dict):
        raise InputError(f"{name}: expected a string or an object, got {_kind(value)}")
    text = _string(f"{name}.passage", value.get("passage"))
    answer = value.get("answer")
    return Passage(text, "" if answer is None else _string(f"{name}.answer", answer))


def _list(name: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise InputError(f"{name}: expected an array, got {_kind(value)}")
    return value


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name}: expected a string, got {_kind(value)}")
    return check_text(name, value)


def check_text(name: str, text: str) -> str:
    """Return `text` if it can be written as UTF-8.

    A string with half of a surrogate pair (from a cut ``\\u`` escape, or a command line that is
    not UTF-8) can neither be tokenized nor printed.

    Raises
    ------
    InputError
        Naming `name` and the character offset.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"{name}: expected Unicode text, got half a surrogate pair "
            f"(U+{code:04X} at character {error.start})"
        ) from None
    return text


def _kind(value: object) -> str:
    return _JSON_TYPES.get(type(value), type(value).__name__)


def _loads(text: str) -> object:
    try:
        value: object = json.loads(text)
    # Deep nesting and integers of thousands of digits are errors of the text as well.
    except (ValueError, RecursionError) as error:
        raise InputError(_json_problem(error)[0]) from None
    return value


def _json_problem(error: Exception) -> tuple[str, int | None]:
    """Message and line (None if unknown) of what json raised."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})", error.lineno
    if isinstance(error, RecursionError):
        return "not JSON that can be read: nested too deeply", None
    return f"not JSON that can be read: {error}", None


def decode_utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise InputError(f"not UTF-8: 0x{byte:02x} at byte {error.start + 1} of the line") from None


def keyed_lines(
    name: str,
    lines: Iterable[tuple[int, bytes]],
    parse: Callable[[bytes], tuple[str, T]],
    hint: str = "",
) -> dict[str, T]:
    """Read lines that hold an id and something else.

    Parameters
    ----------
    name
        File, for messages.
    lines
        Numbers and contents.
    parse
        Returns id and value of a line; raises InputError.
    hint
        Added to messages.

    Returns
    -------
    dict
        Values by id, in the order of the lines.

    Raises
    ------
    InputError
        With file and line: what `parse` raises, or an id that was used before.
    """
    values: dict[str, T] = {}
    for number, line in lines:
        try:
            key, value = parse(line)
            if key in values:
                raise InputError(f"id: {key!r} was used before")
        except InputError as error:
            raise InputError(f"{name}:{number}: {error}{hint}") from None
        values[key] = value
    return values


def _not_utf8(escaped: str) -> str:
    return f"not UTF-8: 0x{ord(escaped) - 0xDC00:02x}"


# --- passages ----------------------------------------------------------------------------------


def read_passages(source: StrPath) -> list[str]:
    """Read the passages for one question.

    Parameters
    ----------
    source
        A text file with one passage a line, or JSON lines: strings, or objects with
        ``"passage"``. ``"-"`` is the standard input. Blank lines are left out. A file is JSON
        lines if its name ends in ``.jsonl`` or its first line is a JSON string or object.

    Returns
    -------
    list of str
        Possibly empty.

    Raises
    ------
    InputError
        At the first line that is not UTF-8 or not what JSON lines should hold, with file and
        line.
    OSError
        If the file cannot be read.
    """
    name = os.fspath(source)
    with _open_source(name) as (shown, file):
        return _passage_lines(shown, name.endswith(".jsonl"), file)


@contextmanager
def _open_source(name: str) -> Iterator[tuple[str, BinaryIO]]:
    if name == "-":
        yield "standard input", sys.stdin.buffer
    else:
        with open(name, "rb") as file:
            yield name, file


def _passage_lines(shown: str, as_json: bool, lines: Iterable[bytes]) -> list[str]:
    passages: list[str] = []
    for number, raw in enumerate(lines, start=1):
        if number == 1:
            raw = raw.removeprefix(BOM)
        if not raw.strip():
            continue
        try:
            text = decode_utf8(raw).strip("\r\n")
            if not passages and not as_json:
                as_json = isinstance(_try_json(raw), str | dict)
            passages.append(json_passage(text) if as_json else text)
        except InputError as error:
            hint = " (the file is read as JSON lines, as its first line is)" if passages else ""
            raise InputError(f"{shown}:{number}: {error}{hint if as_json else ''}") from None
    return passages


def json_passage(text: str) -> str:
    """Return the passage of a JSON line: a string, or an object with ``"passage"``."""
    value = _loads(text)
    if isinstance(value, dict):
        value = _required(value, "passage")
    return _string("passage", value)
