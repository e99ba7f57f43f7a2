"""Similar texts, search, pairs and answers from a corpus by the command line, packaged model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastmrc.cli import main
from fastmrc.corpus_index import index_directory
from fastmrc.data import read_training_data

Output = pytest.CaptureFixture[str]

PASSAGES = [
    "中国的首都是北京，它是政治和文化中心。",
    "上海是中国最大的城市之一。",
    "水由氢和氧组成。",
]
QUESTIONS = ["北京在哪里？", "北京在什么地方？", "水由什么组成？", "水是由什么组成的？", "你好"]


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    import torch

    import fastmrc

    before = fastmrc.get_num_threads(), torch.get_num_threads()
    yield
    fastmrc.set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(PASSAGES), encoding="utf-8")
    return path


def run(*arguments: str) -> int:
    return main([*arguments, "--threads", "1"])


def json_of(capsys: Output) -> dict[str, Any]:
    captured = capsys.readouterr()
    assert captured.err == ""
    value: dict[str, Any] = json.loads(captured.out)
    return value


def test_similar(capsys: Output) -> None:
    options = ("--count", "20", "--k", "3", "--seed", "1", "--max-tokens", "20")
    assert run("similar", "北京在哪里？", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert run("similar", "北京在哪里？", *options, "--json") == 0
    found = json_of(capsys)
    assert found["text"] == "北京在哪里？"
    assert [f"{one['score']:.4f}  {one['text']}" for one in found["similar"]] == lines
    for top_k in ("0", "1"):
        assert run("similar", "水", "--count", "2", "--top-k", top_k, "--max-tokens", "1") == 0
        assert capsys.readouterr().out


def test_search(corpus: Path, capsys: Output) -> None:
    arguments = ("search", "--corpus", str(corpus), PASSAGES[2], "--k", "2")
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == f"1.0000  [3] {PASSAGES[2]}"
    assert index_directory(corpus).is_dir()
    before = {path: path.stat().st_mtime_ns for path in index_directory(corpus).iterdir()}
    assert run(*arguments, "--json") == 0
    found = json_of(capsys)
    assert found["texts"] == 3
    (result,) = found["results"]
    assert result["query"] == PASSAGES[2] and len(result["hits"]) == 2
    assert (result["hits"][0]["id"], result["hits"][0]["text"]) == (2, PASSAGES[2])
    assert before == {p: p.stat().st_mtime_ns for p in index_directory(corpus).iterdir()}


def test_search_for_several(corpus: Path, capsys: Output) -> None:
    arguments = ("search", "--corpus", str(corpus), "水", "上海", "--k", "9", "--no-index")
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "水:" and lines[4] == "上海:" and len(lines) == 8
    assert not index_directory(corpus).exists()


def test_search_names_broken_lines(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"passage": text}) for text in PASSAGES]
    path.write_text("\n".join([lines[0], "{", *lines[1:]]), encoding="utf-8")
    assert run("search", "--corpus", str(path), "水", "--json") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"fastmrc: skipped: {path}:2: ")
    assert json.loads(captured.out)["texts"] == 3


def test_an_index_that_cannot_be_kept(corpus: Path, capsys: Output) -> None:
    index_directory(corpus).write_text("in the way", encoding="utf-8")
    assert run("search", "--corpus", str(corpus), PASSAGES[0], "--k", "1") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("1.0000  [1] ")
    assert captured.err.count("\n") == 1 and "the vectors are not kept" in captured.err


@pytest.mark.parametrize("method", ["seq2seq", "mlm"])
def test_answer_from_a_corpus(corpus: Path, capsys: Output, method: str) -> None:
    arguments = ["answer", "--question", "中国的首都是哪里？", "--corpus", str(corpus)]
    arguments += ["--top-passages", "2", "--method", method]
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Answer: 北京"
    # The number is that of the passage in the file.
    assert "[1] 中国的首都是【北京】，它是政治和文化中心。" in lines
    assert run(*arguments, "--json") == 0
    answer = json_of(capsys)
    assert answer["text"] == "北京" and len(answer["passages"]) == 2
    (span,) = answer["spans"]
    cited = answer["passages"][span["passage"]]
    assert cited["id"] == 0 and cited["passage"][span["start"] : span["end"]] == "北京"
    scores = [one["score"] for one in answer["passages"]]
    assert scores == sorted(scores, reverse=True)


def test_mine_pairs(tmp_path: Path, capsys: Output) -> None:
    source, output = tmp_path / "questions.txt", tmp_path / "pairs.jsonl"
    source.write_text("\n".join([*QUESTIONS, QUESTIONS[0], ""]), encoding="utf-8")
    arguments = ["mine-pairs", str(source), "--output", str(output), "--min-cosine", "0.8"]
    assert run(*arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"2 pairs of 5 texts, written to {output}" and len(out) == 3
    pairs = {(p.text, *p.synonyms) for p in read_training_data(output)}  # type: ignore[union-attr]
    assert pairs == {(QUESTIONS[0], QUESTIONS[1]), (QUESTIONS[2], QUESTIONS[3])}
    assert run(*arguments) == 2  # nothing already written is lost
    assert capsys.readouterr().err == f"fastmrc: error: {output}: File exists\n"
    output.unlink()
    assert run(*arguments, "--json") == 0
    report = json_of(capsys)
    assert (report["texts"], report["pairs"], len(report["samples"])) == (5, 2, 2)


def test_mine_pairs_of_questions(tmp_path: Path, capsys: Output) -> None:
    source, output = tmp_path / "questions.jsonl", tmp_path / "pairs.jsonl"
    records: list[dict[str, Any]] = [
        {"id": str(i), "question": text, "passages": [{"passage": PASSAGES[0], "answer": ""}]}
        for i, text in enumerate(QUESTIONS)
    ]
    lines = [*map(json.dumps, records), '{"id": "9"}']
    source.write_text("\n".join(lines), encoding="utf-8")
    arguments = ["mine-pairs", str(source), "--output", str(output), "--min-cosine", "0.8"]
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"fastmrc: skipped: {source}:6: ")
    assert captured.out.startswith("2 pairs of 5 texts")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["similar", "水", "--count", "0"], "at least 1"),
        (["similar", "水", "--top-p", "0"], "top_p: expected a share"),
        (["similar", "水", "--temperature", "nan"], "temperature: expected a number"),
        (["similar", "水", "--max-tokens", "0"], "max_tokens: expected at least 1"),
        (["similar", "水", "--seed", "-1"], "seed: expected an integer from 0"),
        (["similar", ""], "text: expected"),
        (["similar", "水", "--model", "/no/model"], "there is no directory"),
        (["similar", "水", "--pooling", "linear"], "pooling 'linear' needs the weights"),
        (["similar", "水\udcff"], "text: expected Unicode text"),
        (["search", "--corpus", "no.txt", "水"], "no.txt: No such file"),
        (["search", "--corpus", ".", "水"], "Is a directory"),
        (["search", "--corpus", "no.txt", " "], "query: expected a text, got none"),
        (["mine-pairs", "x", "--output", "/no/folder/o"], "/no/folder: No such file"),
        (["answer", "--question", "q", "--corpus", "x", "--model", "/no"], "no directory '/no'"),
        (["search", "水"], "--corpus"),
        (["search", "--corpus", "x"], "QUERY"),
        (["mine-pairs", "no.txt", "--output", "o"], "no.txt: No such file"),
        (["mine-pairs", "x", "--output", "o", "--min-cosine", "2"], "--min-cosine: expected"),
        (["answer", "--question", "q", "--corpus", "no.txt"], "no.txt: No such file"),
        (["answer", "--question", "q", "--passage", "p", "--top-passages", "3"], "--corpus"),
        (["answer", "--question", "q", "--passage", "p", "--corpus", "x"], "not allowed with"),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Output,
    arguments: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and text in captured.err
    assert list(tmp_path.iterdir()) == []


def test_too_few_texts(tmp_path: Path, capsys: Output) -> None:
    source = tmp_path / "one.txt"
    source.write_text("水\n水\n", encoding="utf-8")
    assert run("mine-pairs", str(source), "--output", str(tmp_path / "o")) == 2
    assert "expected at least 2 different texts, got 1" in capsys.readouterr().err
    source.write_text("", encoding="utf-8")
    assert run("search", "--corpus", str(source), "水") == 2
    assert "expected texts to search, got none" in capsys.readouterr().err
