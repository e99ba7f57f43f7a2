"""Reading of questions and passages, writing and resuming of predictions."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmrc.cli.bench import SAMPLE
from fastmrc.data import (
    DataIssue,
    Passage,
    Question,
    read_passages,
    read_questions,
)
from fastmrc.errors import InputError
from fastmrc.predictions import (
    PredictionWriter,
    Progress,
    check_progress,
    prediction_line,
    read_predictions,
    restore_order,
)

BOM = b"\xef\xbb\xbf"


def record(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A good question as it stands in a file."""
    return {
        "id": f"q{number}",
        "question": f"问题{number}？",
        "passages": [
            {"passage": "答案是甲。", "answer": "甲"},
            {"passage": "无关。", "answer": ""},
        ],
        "answers": ["甲"],
    } | changes


def dump(value: object, **options: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, **options).encode("utf-8")


def read(tmp_path: Path, content: bytes) -> tuple[list[Question], list[DataIssue]]:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    issues: list[DataIssue] = []
    return list(read_questions(path, on_error=issues.append)), issues


def ids(questions: list[Question]) -> list[str]:
    return [question.id for question in questions]


def squad(*paragraphs: object) -> dict[str, Any]:
    return {"version": "1.0", "data": [{"title": "t", "paragraphs": list(paragraphs)}]}


def paragraph(*numbers: int, **changes: Any) -> dict[str, Any]:
    answers = [{"text": "甲", "answer_start": 3}, {"text": "甲"}, {"text": "是甲"}]
    return {
        "context": "答案是甲。",
        "qas": [
            {"id": f"q{n}", "question": f"问题{n}？", "answers": answers} | changes for n in numbers
        ],
    }


# --- shapes ------------------------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    questions, issues = read(tmp_path, dump(record(1)) + b"\r\n\n" + dump(record(2)))
    assert not issues
    assert ids(questions) == ["q1", "q2"]
    assert questions[0].passages == (Passage("答案是甲。", "甲"), Passage("无关。"))
    assert questions[0].answers == ("甲",)
    assert questions[0].pair == ("问题1？", ["答案是甲。", "无关。"])
    assert questions[1].place == f"{tmp_path / 'data.json'}:3"


def test_passages_may_be_strings_and_answers_missing_or_null(tmp_path: Path) -> None:
    passages = ["甲", {"passage": "乙"}, {"passage": "丙", "answer": None}]
    line = {"id": 7, "question": "问？", "passages": passages}
    questions, issues = read(tmp_path, dump(line))
    assert not issues
    assert questions[0].id == "7"
    assert questions[0].passages == (Passage("甲"), Passage("乙"), Passage("丙"))
    assert questions[0].answers == ()


@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
@pytest.mark.parametrize("bom", [b"", BOM])
def test_array(tmp_path: Path, indent: int | str | None, bom: bytes) -> None:
    content = bom + b"\n" + dump([record(1), record(2)], indent=indent) + b"\n"
    questions, issues = read(tmp_path, content)
    assert not issues
    assert ids(questions) == ["q1", "q2"]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("bom", [b"", BOM])
def test_squad(tmp_path: Path, indent: int | None, bom: bytes) -> None:
    document = squad(paragraph(1, 2), paragraph(3, answers=[], is_impossible=True))
    questions, issues = read(tmp_path, bom + dump(document, indent=indent))
    assert not issues
    assert ids(questions) == ["q1", "q2", "q3"]
    assert questions[0].passages == (Passage("答案是甲。", "甲"),)
    assert questions[0].answers == ("甲", "是甲")
    assert questions[2].passages == (Passage("答案是甲。"),)
    assert questions[2].answers == ()
    assert questions[1].place.endswith("data.json: data[0].paragraphs[0].qas[1]")


def test_squad_with_one_article_a_line(tmp_path: Path) -> None:
    articles = [squad(paragraph(n))["data"][0] for n in (1, 2)]
    content = b'{"data": [\n' + b",\n".join(dump(article) for article in articles) + b"\n]}\n"
    questions, issues = read(tmp_path, content)
    assert not issues
    assert ids(questions) == ["q1", "q2"]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_alone(tmp_path: Path, indent: int | None) -> None:
    questions, issues = read(tmp_path, dump(record(), indent=indent))
    assert not issues
    assert ids(questions) == ["q1"]


@pytest.mark.parametrize("content", [b"", BOM, b"\n \n", b"[]", b'{"data": []}'])
def test_nothing(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content) == ([], [])


def test_line_separators_inside_strings_do_not_break_lines(tmp_path: Path) -> None:
    text = "甲\u2028乙\u0085丙"
    questions, issues = read(tmp_path, dump(record(1, question=text)) + b"\n" + dump(record(2)))
    assert not issues
    assert questions[0].question == text


def test_json_lines_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)  # keeps the pipe open: the end never comes
    try:
        os.write(descriptor, b"".join(dump(record(n)) + b"\n" for n in range(100)))
        questions = read_questions(path)
        assert [next(questions).id for _ in range(3)] == ["q0", "q1", "q2"]
        del questions
    finally:
        os.close(descriptor)


# --- broken records ----------------------------------------------------------------------------

BROKEN = {
    "cut": (b'{"id": "x", "question"', "not JSON"),
    "text": (b"hello", "not JSON"),
    "number": (b"12", "expected a JSON object, got a number"),
    "array": (b"[1, 2]", "expected a JSON object, got an array"),
    "deep": (b"[" * 100_000, "not JSON"),
    "digits": (b'{"id": ' + b"1" * 5000 + b"}", "not JSON that can be read"),
    "no id": (dump({"question": "问", "passages": []}), "id: missing"),
    "no question": (dump({"id": "x", "passages": []}), "question: missing"),
    "no passages": (dump({"id": "x", "question": "问"}), "passages: missing"),
    "blank": (dump(record(9, question=" \n")), "question: expected a text"),
    "question": (dump(record(9, question=["问"])), "question: expected a string, got an array"),
    "passages": (dump(record(9, passages="甲")), "passages: expected an array, got a string"),
    "passage": (dump(record(9, passages=["甲", 3])), r"passages\[1\]: expected a string or an obj"),
    "text of passage": (
        dump(record(9, passages=[{"text": "甲"}])),
        r"passages\[0\].passage: expected a string, got null",
    ),
    "answer": (
        dump(record(9, passages=[{"passage": "甲", "answer": 1}])),
        r"passages\[0\].answer: expected a string, got a number",
    ),
    "answers": (dump(record(9, answers="甲")), "answers: expected an array"),
    "one answer": (dump(record(9, answers=[None])), r"answers\[0\]: expected a string, got null"),
    "id type": (dump(record(9, id=True)), "id: expected a string, got a boolean"),
    "id text": (dump(record(9, id="a\tb")), "id: expected a text without tabs"),
    "empty id": (dump(record(9, id="")), "id: expected a text without tabs"),
    "same id": (dump(record(0)), "id: 'q0' was used before, at .*data.json:1"),
    "surrogate": (rb'{"id": "x", "question": "\ud800", "passages": []}', "half a surrogate pair"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8: 0xff at byte 9"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_line_is_named_and_the_rest_is_read(tmp_path: Path, case: str) -> None:
    broken, message = BROKEN[case]
    lines = [dump(record(0)), b"", broken, dump(record(2))]
    questions, issues = read(tmp_path, b"\n".join(lines))
    assert ids(questions) == ["q0", "q2"]
    assert [issue.line for issue in issues] == [3]
    assert str(issues[0]).startswith(f"{tmp_path / 'data.json'}:3: ")
    with pytest.raises(InputError, match=rf"data.json:3: .*{message}"):
        list(read_questions(tmp_path / "data.json"))


# A first line of open brackets alone is the start of an array.
@pytest.mark.parametrize("case", [case for case in BROKEN if case not in ("same id", "deep")])
def test_broken_first_line(tmp_path: Path, case: str) -> None:
    broken, _ = BROKEN[case]
    questions, issues = read(tmp_path, b"\n".join([broken, dump(record(1)), dump(record(2))]))
    assert ids(questions) == ["q1", "q2"]
    assert [issue.line for issue in issues] == [1]


def test_two_broken_first_lines(tmp_path: Path) -> None:
    content = b"\n".join([b'{"id": 1', b'{"id": 2', dump(record(3))])
    questions, issues = read(tmp_path, content)
    assert ids(questions) == ["q3"]
    assert [issue.line for issue in issues] == [1, 2]


@pytest.mark.parametrize("indent", [0, 2])
def test_broken_element_of_an_array(tmp_path: Path, indent: int) -> None:
    content = dump([record(1), record(2), record(3)], indent=indent)
    if indent == 0:
        content = b"[\n" + b",\n".join(dump(record(n)) for n in (1, 2, 3)) + b"\n]"
    broken = content.replace('"问题2？"'.encode(), b'"\xff')
    questions, issues = read(tmp_path, broken)
    assert ids(questions) == ["q1", "q3"]
    assert len(issues) == 1
    assert issues[0].line is not None
    assert "not JSON" in issues[0].message
    line = broken.split(b"\n")[issues[0].line - 1]
    assert b'"\xff' in line or b'"passages"' in line


def test_element_of_an_array_that_is_not_utf8(tmp_path: Path) -> None:
    lines = [dump(record(n)) for n in (1, 2, 3)]
    lines[1] = lines[1].replace("问".encode(), b"\xfe")
    questions, issues = read(tmp_path, b"[" + b",\n".join(lines) + b"]")
    assert ids(questions) == ["q1", "q3"]
    assert [str(issue) for issue in issues] == [f"{tmp_path / 'data.json'}:2: not UTF-8: 0xfe"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" + dump(record(1)), "the array is not closed"),
        (b"[" + dump(record(1)) + b", {]", "the rest of the array cannot be read"),
        (b"[" + dump(record(1)) + b"]x", "text after the end of the array"),
        (b"[" + dump(record(1)) + b", 3]", "expected a JSON object, got a number"),
    ],
)
def test_damaged_array_keeps_what_can_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    questions, issues = read(tmp_path, content)
    assert ids(questions) == ["q1"]
    assert len(issues) == 1
    assert message in issues[0].message
    assert issues[0].line == 1


def test_squad_that_is_not_json_names_the_line(tmp_path: Path) -> None:
    content = dump(squad(paragraph(1)), indent=1).replace(b'"context"', b"context")
    questions, issues = read(tmp_path, content)
    assert not questions
    assert len(issues) == 1
    assert issues[0].line is not None
    assert b"context" in content.split(b"\n")[issues[0].line - 1]


def test_broken_entries_of_squad(tmp_path: Path) -> None:
    good = paragraph(1, 2)
    del good["qas"][0]["question"]
    document = squad(good, 3, {"context": "甲"}, paragraph(4, answers=5), {"qas": [{"id": "z"}]})
    questions, issues = read(tmp_path, dump(document))
    assert ids(questions) == ["q2"]
    prefix = f"{tmp_path / 'data.json'}: data[0].paragraphs"
    assert [str(issue) for issue in issues] == [
        f"{prefix}[0].qas[0]: question: missing",
        f"{prefix}[1]: expected an object, got a number",
        f"{prefix}[2].qas: expected an array, got null",
        f"{prefix}[3].qas[0]: answers: expected an array, got a number",
        f"{prefix}[4].qas[0]: question: missing",
    ]


def test_squad_that_is_not_utf8_loses_one_question(tmp_path: Path) -> None:
    content = dump(squad(paragraph(1, 2)), indent=1).replace("问题1".encode(), b"\xff")
    questions, issues = read(tmp_path, content)
    assert ids(questions) == ["q2"]
    assert issues[0].message == "not UTF-8: 0xff"
    assert b"\xff" in content.split(b"\n")[(issues[0].line or 0) - 1]
    assert issues[1].item == "data[0].paragraphs[0].qas[0]"


def test_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_questions(tmp_path / "none"))


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from([broken for broken, _ in BROKEN.values() if len(broken) < 1000]),
            st.integers(0, 5).map(lambda n: dump(record(n))),
            st.sampled_from([b"[", b"]", b"{", b",", b'{"data": [', b"]}"]),
        ),
        max_size=8,
    ),
    st.sampled_from([b"\n", b"\r\n", b",\n", b""]),
)
def test_no_content_raises(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], separator: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "data.json"
    content = separator.join(parts)
    path.write_bytes(content)
    issues: list[DataIssue] = []
    questions = list(read_questions(path, on_error=issues.append))
    assert len({question.id for question in questions}) == len(questions)
    lines = content.count(b"\n") + 1
    assert all(issue.line is None or 1 <= issue.line <= lines for issue in issues)


# --- the built-in sample -----------------------------------------------------------------------


def test_sample_is_sound() -> None:
    questions = list(read_questions(SAMPLE))
    assert len(questions) == 12
    for question in questions:
        assert 2 <= len(question.passages) <= 5
        held = {passage.answer for passage in question.passages} - {""}
        assert held <= set(question.answers)
        assert all(passage.answer in passage.text for passage in question.passages)
    assert [question.id for question in questions if not question.answers] == ["sample-12"]


# --- passages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", '甲 乙。\r\n\n"丙"丁\n'),
        ("p.jsonl", '{"passage": "甲 乙。"}\n\n"\\"丙\\"丁"\n'),
        ("p.txt", '{"passage": "甲 乙。", "answer": ""}\n"\\"丙\\"丁"'),
        ("p", '"甲 乙。"\n{"passage": "\\"丙\\"丁"}'),
    ],
)
@pytest.mark.parametrize("bom", [b"", BOM])
def test_passages(tmp_path: Path, name: str, content: str, bom: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(bom + content.encode("utf-8"))
    assert read_passages(path) == ["甲 乙。", '"丙"丁']


def test_passages_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("甲\n乙\n".encode())))
    assert read_passages("-") == ["甲", "乙"]


def test_no_passages(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n\n")
    assert read_passages(path) == []


@pytest.mark.parametrize("first", [b"12", b"[1]", b"{", b"null", b'"', b"{x} y"])
def test_lines_that_look_a_little_like_json_are_text(tmp_path: Path, first: bytes) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(first + b"\nb\n")
    assert read_passages(path) == [first.decode(), "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xe7\x94\xb2\n\xff\n", r"p.txt:2: not UTF-8: 0xff at byte 1"),
        (b'{"passage": "a"}\nb\n', r"p.txt:2: not JSON: .* \(the file is read as JSON lines"),
        (b'{"text": "a"}\n', r"p.txt:1: passage: missing"),
        (b'{"passage": 1}\n', r"p.txt:1: passage: expected a string, got a number"),
        (b'"\\udc00"\n', r"p.txt:1: passage: .* half a surrogate pair"),
    ],
)
def test_broken_passages(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_passages(path)


# --- predictions -------------------------------------------------------------------------------


def test_prediction_line_is_one_line() -> None:
    assert prediction_line("q", "甲\t乙\r\n丙\u2028丁") == "q\t甲 乙  丙 丁\n"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_predictions_survive_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, answers: list[str]
) -> None:
    path = tmp_path_factory.mktemp("trip") / "out.tsv"
    with PredictionWriter(path) as writer:
        for number, answer in enumerate(answers):
            writer.write(str(number), answer)
    assert len(path.read_text("utf-8").splitlines()) == len(answers)
    read_back = read_predictions(path)
    assert list(read_back) == [str(number) for number in range(len(answers))]
    assert [len(text) for text in read_back.values()] == [len(answer) for answer in answers]


def test_each_line_is_flushed(tmp_path: Path) -> None:
    path = tmp_path / "out.tsv"
    with PredictionWriter(path) as writer:
        writer.write("q1", "甲")
        assert path.read_text("utf-8") == "q1\t甲\n"


def test_writer_keeps_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.tsv"
    path.write_bytes(b"q1\t\xe7\x94\xb2\nq2\t\xe4\xb9")
    progress = check_progress(path, ["q1", "q2", "q3"])
    assert progress == Progress(("q1",), 7)
    assert path.stat().st_size == 12
    with PredictionWriter(path, keep=progress.size) as writer:
        writer.write("q2", "乙")
    assert path.read_text("utf-8") == "q1\t甲\nq2\t乙\n"


@pytest.mark.parametrize("content", [None, b""])
def test_no_progress(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "out.tsv"
    if content is not None:
        path.write_bytes(content)
    assert check_progress(path, ["q1"]) == Progress()


@pytest.mark.parametrize("partial", ["q", "问", "q2", "q2\t", "q2\tx y"])
def test_partial_line_of_this_data(tmp_path: Path, partial: str) -> None:
    path = tmp_path / "out.tsv"
    path.write_text(partial, encoding="utf-8")
    assert check_progress(path, ["q2", "问题"]) == Progress()


def test_partial_line_may_end_within_a_character(tmp_path: Path) -> None:
    path = tmp_path / "out.tsv"
    path.write_bytes("问".encode()[:2])
    assert check_progress(path, ["问题"]) == Progress()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q1\ta\nq9\tb\n", r"out.tsv:2: id: 'q9' is not in the data"),
        (b"q1\ta\nq1\tb\n", r"out.tsv:2: id: 'q1' was used before"),
        (b"q1\ta\nnotes\n", r"out.tsv:2: expected id<TAB>answer, got 'notes'"),
        (b"q1\ta\n\n", r"out.tsv:2: expected id<TAB>answer, got ''"),
        (b"q1\ta\n\xff\tb\n", r"out.tsv:2: not UTF-8"),
        (b"my thesis", r"out.tsv:1: a last line without newline that begins no id"),
        (b"q1\ta\nq\tb", r"out.tsv:2: a last line without newline that begins no id"),
    ],
)
def test_foreign_file_is_refused_and_left_alone(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "out.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message + ".*the file is left as it is"):
        check_progress(path, ["q1", "q2"])
    assert path.read_bytes() == content


def test_predictions_belong_into_regular_files(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(InputError, match="expected a regular file"):
        check_progress(path, ["q1"])
    with pytest.raises(InputError, match="expected a regular file"):
        PredictionWriter(path)
    with pytest.raises(IsADirectoryError):
        PredictionWriter(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"q1\n", "out.tsv:1: expected id"), (b"a\tb\na\tc", "out.tsv:2: id: 'a' was used before")],
)
def test_broken_predictions(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "out.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_predictions(path)


def test_restore_order(tmp_path: Path) -> None:
    path = tmp_path / "out.tsv"
    path.write_text("c\t3\na\t1\n")
    path.chmod(0o640)
    assert restore_order(path, ["a", "b", "c"])
    assert path.read_text() == "a\t1\nc\t3\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert not restore_order(path, ["a", "b", "c"])
    assert os.listdir(tmp_path) == ["out.tsv"]
