"""Predictions on disk: ``id<TAB>answer`` lines in UTF-8, written so that a run can be resumed.

The lines may also be those of CMRC 2017, ``<id> ||| answer``, and what others have written one JSON
object, ``{"id": "answer", ...}``, as the scripts of SQuAD and CMRC 2018 take it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from types import TracebackType

from fastmrc.data import BOM, LINE_BREAKS, StrPath, check_text, decode_utf8, keyed_lines
from fastmrc.errors import InputError

__all__ = [
    "CMRC_2017",
    "LINE_FORMATS",
    "TAB_SEPARATED",
    "LineFormat",
    "PredictionWriter",
    "Progress",
    "check_progress",
    "prediction_line",
    "read_predictions",
    "restore_order",
]

_CMRC_2017_LINE = re.compile(r"\s*<([^<>\s]+)>\s*\|\|\|(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LineFormat:
    """How a prediction stands on a line.

    Attributes
    ----------
    name
        As the command line names it.
    prefix
        From an id to what stands before the answer.
    parse
        From a line to id and answer; raises InputError.
    """

    name: str
    prefix: Callable[[str], str]
    parse: Callable[[bytes], tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Progress:
    """What an earlier run left in a file of predictions.

    Attributes
    ----------
    done
        Ids of the complete lines, in the order of the file.
    size
        Bytes of the complete lines. What follows is a partly written line.
    """

    done: tuple[str, ...] = ()
    size: int = 0


def prediction_line(question_id: str, answer: str, line_format: LineFormat | None = None) -> str:
    """Format one prediction, by default ``id<TAB>answer``, and a newline.

    Tabs and line breaks in the answer (of any kind, U+0085, U+2028 and U+2029 included) become
    spaces, one for one, since the format has no escape for them.
    """
    prefix = (line_format or TAB_SEPARATED).prefix(question_id)
    return f"{prefix}{LINE_BREAKS.sub(' ', answer)}\n"


def read_predictions(path: StrPath) -> dict[str, str]:
    """Read ``id<TAB>answer`` lines, the last of which may lack its newline, those of CMRC 2017, or
    one JSON object.

    Parameters
    ----------
    path
        UTF-8, with or without a byte order mark. It is read as JSON if it holds one object
        ``{"id": "answer", ...}`` and nothing else.

    Returns
    -------
    dict
        Answers by id, in the order of the file; an empty answer means that there was none.

    Raises
    ------
    InputError
        With file and line: not UTF-8, no tab, or an id that was used before. With file and id:
        an answer in JSON that is not a string, or an id that was used before.
    OSError
        If the file cannot be read.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        raw = file.read().removeprefix(BOM)
    if raw.lstrip().startswith(b"{"):
        try:
            values = json.loads(raw.decode("utf-8"), object_pairs_hook=_UniqueKeys)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        except (ValueError, RecursionError) as error:
            return _parse_lines(name, raw, f" (nor is the file one JSON object: {error})")
        return _check_answers(name, values)
    return _parse_lines(name, raw)


class _UniqueKeys(dict[str, object]):
    """A JSON object whose keys differ."""

    def __init__(self, pairs: Iterable[tuple[str, object]]) -> None:
        super().__init__()
        for key, value in pairs:
            if key in self:
                raise InputError(f"id: {key!r} was used before")
            self[key] = value


def _check_answers(name: str, values: dict[str, object]) -> dict[str, str]:
    predictions: dict[str, str] = {}
    for question_id, answer in values.items():
        place = f"{name}: answer of {question_id!r}"
        if not isinstance(answer, str):
            got = _shorten(json.dumps(answer, ensure_ascii=False))
            raise InputError(f"{place}: expected a string, got {got}")
        predictions[question_id] = check_text(place, answer)
    return predictions


def _parse_lines(name: str, raw: bytes, hint: str = "") -> dict[str, str]:
    line_format = CMRC_2017 if _CMRC_2017_LINE.match(raw[:200].decode(errors="replace")) else None
    lines = enumerate(io.BytesIO(raw), start=1)
    return keyed_lines(name, lines, (line_format or TAB_SEPARATED).parse, hint)


def _parse_cmrc_2017(raw: bytes) -> tuple[str, str]:
    line = decode_utf8(raw).rstrip("\r\n")
    match = _CMRC_2017_LINE.match(line)
    if match is None:
        raise InputError(f"expected <id> ||| answer, got {_shorten(line)!r}")
    return match[1], match[2].strip()


def _parse_prediction(raw: bytes) -> tuple[str, str]:
    question_id, tab, answer = decode_utf8(raw).rstrip("\r\n").partition("\t")
    if not tab:
        raise InputError(f"expected id<TAB>answer, got {_shorten(question_id)!r}")
    return question_id, answer


TAB_SEPARATED = LineFormat("tsv", "{}\t".format, _parse_prediction)
CMRC_2017 = LineFormat("cmrc2017", "<{}> ||| ".format, _parse_cmrc_2017)
LINE_FORMATS = {form.name: form for form in (TAB_SEPARATED, CMRC_2017)}


def _shorten(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def check_progress(
    path: StrPath, known: Collection[str], line_format: LineFormat = TAB_SEPARATED
) -> Progress:
    """See what a file of predictions holds already; nothing is changed.

    Parameters
    ----------
    path
        File of predictions; it need not exist.
    known
        Ids of the data set.
    line_format
        Of its lines.

    Returns
    -------
    Progress
        Ids of the complete lines. A last line without its newline was being written when the
        earlier run ended; it does not count.

    Raises
    ------
    InputError
        With file and line, if the file is not one of predictions for this data set: an unknown
        or repeated id, no tab, not UTF-8, or a last partial line that begins no known id.
    OSError
        If the file cannot be read.
    """
    name = os.fspath(path)
    ids = set(known)
    done: dict[str, None] = {}
    size = 0
    if not os.path.exists(name):
        return Progress()
    _require_regular_file(name, os.stat(name))
    with open(name, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                if not raw.endswith(b"\n"):
                    _check_partial(raw, ids, line_format)
                    break
                question_id, _ = line_format.parse(raw)
                if question_id not in ids:
                    raise InputError(f"id: {question_id!r} is not in the data")
                if question_id in done:
                    raise InputError(f"id: {question_id!r} was used before")
            except InputError as error:
                raise InputError(
                    f"{name}:{number}: {error}; the file is left as it is "
                    "(it does not hold predictions for this data)"
                ) from None
            done[question_id] = None
            size += len(raw)
    return Progress(tuple(done), size)


def _require_regular_file(name: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{name}: expected a regular file for the predictions")


def _check_partial(raw: bytes, known: Collection[str], line_format: LineFormat) -> None:
    """Refuse to cut off a last line that this program cannot have begun to write."""
    prefixes = (line_format.prefix(question_id).encode("utf-8") for question_id in known)
    begun = any(raw.startswith(prefix) or prefix.startswith(raw) for prefix in prefixes)
    if not begun:
        shown = _shorten(raw.partition(b"\t")[0].decode("utf-8", "replace"))
        raise InputError(f"a last line without newline that begins no id of the data: {shown!r}")


class PredictionWriter:
    """Append predictions to a file, each line flushed as it is written.

    Parameters
    ----------
    path
        File of predictions; made if it does not exist.
    keep
        Bytes to keep, as `check_progress` reports them; what follows is cut off. 0 starts anew.
    line_format
        Of its lines.

    Raises
    ------
    OSError
        If the file cannot be written.
    """

    def __init__(
        self, path: StrPath, *, keep: int = 0, line_format: LineFormat = TAB_SEPARATED
    ) -> None:
        self._format = line_format
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            _require_regular_file(os.fspath(path), os.fstat(descriptor))
        except InputError:
            os.close(descriptor)
            raise
        self._file = os.fdopen(descriptor, "r+b")
        self._file.truncate(keep)
        self._file.seek(keep)

    def write(self, question_id: str, answer: str) -> None:
        """Write one line and hand it to the operating system."""
        self._file.write(prediction_line(question_id, answer, self._format).encode("utf-8"))
        self._file.flush()

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def restore_order(
    path: StrPath, order: Iterable[str], line_format: LineFormat = TAB_SEPARATED
) -> bool:
    """Put the lines of a file of predictions into the order of the data.

    They are out of order after a run that answers questions which an earlier one had to skip.
    The file is replaced as a whole, so an interruption leaves the old or the new one.

    Parameters
    ----------
    path
        A complete file of predictions.
    order
        Ids of the data set; those without a prediction are left out.
    line_format
        Of its lines.

    Returns
    -------
    bool
        Whether the file was out of order.
    """
    name = os.path.realpath(path)
    with open(name, "rb") as complete:
        predictions = keyed_lines(name, enumerate(complete, start=1), line_format.parse)
    ordered = [question_id for question_id in order if question_id in predictions]
    if ordered == list(predictions):
        return False
    part = f"{name}.part"
    with open(part, "wb") as file:
        for question_id in ordered:
            line = prediction_line(question_id, predictions[question_id], line_format)
            file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(name, part)
    os.replace(part, name)
    return True
