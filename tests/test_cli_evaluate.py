"""``fastmrc evaluate``: output, exit codes and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastmrc.cli import main

Output = pytest.CaptureFixture[str]

ACCEPTED = "q1\t蔡伦\t蔡伦|蔡侯\nq2\t汉 唐\t汉唐\nq3\t西安\t西安\nq4\t1\t1\n"


def question(number: int, *answers: str) -> dict[str, object]:
    return {"id": f"q{number}", "question": "问？", "passages": [], "answers": list(answers)}


QUESTIONS = [question(1, "蔡伦", "蔡侯"), question(2, "汉唐"), question(3, "长安"), question(4)]


@pytest.fixture
def accepted(tmp_path: Path) -> Path:
    path = tmp_path / "accepted.tsv"
    path.write_text(ACCEPTED, encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS), encoding="utf-8")
    return path


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    return tmp_path / "predictions.tsv"


def evaluate(data: Path, predictions: Path, metric: str, *options: str) -> int:
    command = ["evaluate", "--data", str(data), "--predictions", str(predictions)]
    return main([*command, "--metric", metric, *options])


def assert_error(capsys: Output, code: int, *texts: str) -> None:
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("fastmrc: error: ")
    assert captured.err.count("\n") == 1
    for text in texts:
        assert text in captured.err


# --- output ------------------------------------------------------------------------------------


def test_sogou_table(accepted: Path, predictions: Path, capsys: Output) -> None:
    predictions.write_text("q3\t长安\nq1\t蔡 伦。\nq2\t唐、汉\n", encoding="utf-8")
    assert evaluate(accepted, predictions, "sogou", "--worst", "1") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    # Right: q1 by its normalised form, q2 by its parts; F1 1, 1 and 1/2.
    assert captured.out == (
        "metric      sogou\n"
        "questions   3\n"
        "missing     1 (not scored)\n"
        "accuracy    0.6667\n"
        "f1          0.8333\n"
        "final       0.7500\n"
        "worst\n"
        "  'q3': accuracy 0.0000, f1 0.5000, precision 0.5000, recall 0.5000; "
        "predicted '长安'; accepted '西安'\n"
    )


def test_sogou_json(accepted: Path, predictions: Path, capsys: Output) -> None:
    predictions.write_text("q1\t蔡侯\nq3\t西\n", encoding="utf-8")
    assert evaluate(accepted, predictions, "sogou", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out) == {
        "metric": "sogou",
        "count": 2,
        "accuracy": 0.5,
        "f1": pytest.approx(5 / 6),
        "final": pytest.approx(2 / 3),
        "missing": 2,
    }


@pytest.mark.parametrize(
    ("metric", "scores"),
    [
        # q1 is right, q2 lacks one of two units, q3 is missing, q4 rightly has no answer.
        ("cmrc", {"em": 0.5, "f1": pytest.approx((1 + 2 / 3 + 0 + 1) / 4)}),
        ("squad", {"em": 0.5, "f1": 0.5}),
        ("accuracy", {"accuracy": 0.5}),
    ],
)
def test_json_of_the_others(
    data: Path, predictions: Path, capsys: Output, metric: str, scores: dict[str, float]
) -> None:
    predictions.write_text("q1\t蔡侯\nq2\t汉\nq4\t\n", encoding="utf-8")
    assert evaluate(data, predictions, metric, "--json", "--worst", "2") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    worst = result.pop("worst")
    assert result == {"metric": metric, "count": 4, **scores, "missing": ["q3"]}
    # q2 is better than q3 only where a part of an answer counts.
    ids = ["q3", "q2"] if metric == "cmrc" else ["q2", "q3"]
    assert [entry["id"] for entry in worst] == ids
    zero = dict.fromkeys(scores, 0.0)
    assert worst[ids.index("q3")] == {"id": "q3", **zero, "prediction": None, "answers": ["长安"]}
    assert worst[ids.index("q2")]["prediction"] == "汉"
    assert captured.err == (
        "fastmrc: missing: 1 of 4 questions have no prediction and score 0: 'q3'\n"
    )


def test_table_of_the_others(data: Path, predictions: Path, capsys: Output) -> None:
    predictions.write_text("q1\t蔡侯\nq2\t汉\nq4\t甲\n", encoding="utf-8")
    assert evaluate(data, predictions, "cmrc", "--worst", "2") == 0
    assert capsys.readouterr().out == (
        "metric      cmrc\n"
        "questions   4\n"
        "missing     1 (scored 0)\n"
        "em          0.2500\n"
        "f1          0.4167\n"
        "worst\n"
        "  'q3': em 0.0000, f1 0.0000; predicted none; accepted '长安'\n"
        "  'q4': em 0.0000, f1 0.0000; predicted '甲'; accepted none\n"
    )


def test_nothing_is_missing(data: Path, predictions: Path, capsys: Output) -> None:
    predictions.write_text("q1\t\nq2\t\nq3\t\nq4\t\n", encoding="utf-8")
    assert evaluate(data, predictions, "accuracy") == 0
    captured = capsys.readouterr()
    assert captured.out == (
        "metric      accuracy\nquestions   4\nmissing     0\naccuracy    0.2500\n"
    )
    assert captured.err == ""


def test_many_missing_ids(tmp_path: Path, predictions: Path, capsys: Output) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(question(n, "甲")) for n in range(12)))
    predictions.write_bytes(b"")
    assert evaluate(data, predictions, "squad", "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["missing"] == [f"q{n}" for n in range(12)]
    assert (result["em"], result["f1"], result["count"]) == (0.0, 0.0, 12)
    assert captured.err.count("\n") == 1
    assert "12 of 12 questions" in captured.err
    assert captured.err.endswith("'q8', 'q9' and 2 more\n")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfq1\t\xe7\x94\xb2\r\nq2\tb\r\n",
        b'\xef\xbb\xbf{"q1": "\xe7\x94\xb2",\r\n "q2": "b"}\r\n',
    ],
)
def test_windows_files(tmp_path: Path, predictions: Path, capsys: Output, content: bytes) -> None:
    predictions.write_bytes(content)
    data = tmp_path / "accepted.tsv"
    data.write_bytes(b"\xef\xbb\xbfq1\t\xe7\x94\xb2\t\xe7\x94\xb2\r\nq2\tb\ta|b\r\n")
    assert evaluate(data, predictions, "sogou", "--json") == 0
    assert json.loads(capsys.readouterr().out)["final"] == 1.0


def test_squad_file_as_data(tmp_path: Path, predictions: Path, capsys: Output) -> None:
    data = tmp_path / "squad.json"
    qa = {"id": "q1", "question": "Who?", "answers": [{"text": "The cat"}, {"text": "A dog"}]}
    paragraph = {"context": "The cat and a dog.", "qas": [qa]}
    data.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    predictions.write_text('{"q1": "dog."}')
    assert evaluate(data, predictions, "squad", "--json") == 0
    assert json.loads(capsys.readouterr().out)["em"] == 1.0


def test_worst_questions_cannot_steer_the_terminal(
    data: Path, predictions: Path, capsys: Output
) -> None:
    predictions.write_text(json.dumps({"q3": "\x1b[2J\n甲\u2028"}))
    assert evaluate(data, predictions, "cmrc", "--worst", "9") == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 5 + 1 + 4 + 1  # table, "worst", all four questions, the last line end
    assert r"predicted '\x1b[2J\n甲\u2028'; accepted" in "\n".join(lines)


def test_evaluation_loads_neither_torch_nor_transformers(data: Path, predictions: Path) -> None:
    predictions.write_text("q1\t甲\n", encoding="utf-8")
    code = textwrap.dedent("""
        import sys
        from fastmrc.cli import main
        code = main(["evaluate", "--metric", "cmrc", "--data", sys.argv[1], "--predictions",
                     sys.argv[2]])
        print("loaded:", sorted({"torch", "transformers", "tqdm"} & set(sys.modules)), code)
    """)
    child = subprocess.run(
        [sys.executable, "-c", code, str(data), str(predictions)],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert child.stdout.endswith(b"loaded: [] 0\n")


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["sogou", "cmrc", "squad", "accuracy"])
def test_unknown_and_repeated_ids(
    accepted: Path, data: Path, predictions: Path, capsys: Output, metric: str
) -> None:
    source = accepted if metric == "sogou" else data
    predictions.write_text("q1\ta\nx1\tb\nx2\tc\n")
    code = evaluate(source, predictions, metric)
    assert_error(capsys, code, "predictions: expected ids of the data, got 2 unknown: 'x1', 'x2'")
    predictions.write_text("q1\ta\nq2\tb\nq1\ta\n")
    code = evaluate(source, predictions, metric)
    assert_error(capsys, code, "predictions.tsv:3: id: 'q1' was used before")
    predictions.write_text('{"q1": "a", "q1": "b"}')
    code = evaluate(source, predictions, metric)
    assert_error(capsys, code, "predictions.tsv: id: 'q1' was used before")


def test_bad_data(tmp_path: Path, predictions: Path, capsys: Output) -> None:
    predictions.write_text("q1\ta\n")
    path = tmp_path / "bad"
    for metric, content, text in [
        ("sogou", "q1\ta\ta\nq1\tb\tb\n", "bad:2: id: 'q1' was used before"),
        ("sogou", json.dumps(question(1, "a")), "bad:1: expected id<TAB>answer<TAB>accepted"),
        ("sogou", "", "bad: expected at least one question, got none"),
        ("cmrc", json.dumps(question(1)) + "\n{", "bad:2: not JSON"),
        ("cmrc", (json.dumps(question(1)) + "\n") * 2, "bad:2: id: 'q1' was used before"),
        ("cmrc", ACCEPTED, "bad:1: not JSON"),
        ("accuracy", "", "bad: expected at least one question, got none"),
    ]:
        path.write_text(content, encoding="utf-8")
        assert_error(capsys, evaluate(path, predictions, metric), text)


@pytest.mark.parametrize("content", ["", "{}"])
def test_nothing_was_submitted(
    accepted: Path, predictions: Path, capsys: Output, content: str
) -> None:
    predictions.write_text(content)
    code = evaluate(accepted, predictions, "sogou")
    assert_error(capsys, code, "predictions: expected at least one question, got none")


def test_bad_arguments(accepted: Path, predictions: Path, capsys: Output) -> None:
    predictions.write_text("q1\ta\n")
    assert_error(capsys, evaluate(accepted, predictions, "bleu"), "--metric", "bleu")
    assert_error(capsys, evaluate(accepted, predictions, "sogou", "--worst", "0"), "at least 1")
    missing = predictions.with_name("no.tsv")
    assert_error(capsys, evaluate(accepted, missing, "sogou"), "no.tsv: No such file")
    assert_error(capsys, evaluate(missing, predictions, "cmrc"), "no.tsv: No such file")
    assert_error(capsys, main(["evaluate", "--metric", "cmrc"]), "--data, --predictions")
