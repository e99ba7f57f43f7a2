"""The command line: with a reader that pretends, and with the packaged model."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastmrc.cli import answer as answer_command
from fastmrc.cli import common, describe_error, main
from fastmrc.cli.answer import mark_spans
from fastmrc.cli.bench import SAMPLE
from fastmrc.data import read_questions
from fastmrc.errors import InputError
from fastmrc.options import SearchOptions
from fastmrc.predictions import read_predictions
from fastmrc.types import Answer, Candidate, Span, Timings


class FakeReader:
    """Answers with the first character of the first passage that is not ``x``.

    ``reject`` names questions that it refuses, ``interrupt`` the call that ends in Ctrl-C.
    """

    def __init__(self, suffix: str = "", seconds: float = 0.0) -> None:
        self.suffix = suffix
        self.seconds = seconds
        self.reject: set[str] = set()
        self.interrupt: int | None = None
        self.batches: list[list[str]] = []
        self.options: dict[str, Any] = {}

    def answer(self, question: str, passages: Sequence[str], **options: Any) -> Answer:
        self.options = options
        if question in self.reject:
            raise InputError(f"question: refused\n{question}")
        if not passages:
            raise InputError("passages: expected at least one")
        time.sleep(self.seconds)
        text = passages[0][:1]
        if text in ("", "x"):
            return Answer(timings=Timings(0.1, 0.3, 0.1))
        spans = [
            Span(i, p.index(text), p.index(text) + 1) for i, p in enumerate(passages) if text in p
        ]
        candidates = [Candidate(text, -0.5, [7], spans, True)]
        return Answer(text + self.suffix, -0.5, [7], spans, candidates, Timings(0.1, 0.3, 0.1))

    def answer_batch(
        self, pairs: Sequence[tuple[str, Sequence[str]]], *, progress: bool, **options: Any
    ) -> list[Answer]:
        assert not progress
        self.batches.append([question for question, _ in pairs])
        if self.interrupt == len(self.batches):
            raise KeyboardInterrupt
        return [self.answer(question, passages, **options) for question, passages in pairs]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> FakeReader:
    fake = FakeReader()

    def build(args: argparse.Namespace, *, baseline: bool | None = None) -> FakeReader:
        return fake

    monkeypatch.setattr(common, "build_reader", build)
    return fake


@pytest.fixture
def no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(args: argparse.Namespace, *, baseline: bool | None = None) -> FakeReader:
        raise AssertionError("no reader should be loaded")

    monkeypatch.setattr(common, "build_reader", build)


def write_data(path: Path, passages: Sequence[str], broken: Sequence[int] = ()) -> Path:
    """Write question ``q1`` with the first passage and so on; `broken` lines are not JSON."""
    lines = [
        json.dumps({"id": f"q{n}", "question": f"question {n}", "passages": [text]})
        if n not in broken
        else '{"id": '
        for n, text in enumerate(passages, start=1)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.jsonl", ["abc", "xyz", "cde", "def", "efg"])


def predict(data: Path, out: Path, *options: str) -> int:
    return main(["predict", "--data", str(data), "--out", str(out), "--batch-size", "2", *options])


ALL_PREDICTIONS = "q1\ta\nq2\t\nq3\tc\nq4\td\nq5\te\n"

Output = pytest.CaptureFixture[str]


def assert_error(capsys: Output, code: int, text: str) -> None:
    """The error is one line on the standard error and nothing else is printed."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("fastmrc: error: ")
    assert captured.err.count("\n") == 1
    assert text in captured.err


# --- answer ------------------------------------------------------------------------------------


def test_answer_marks_the_spans(reader: FakeReader, capsys: Output) -> None:
    code = main(
        ["answer", "--question", "谁", "--passage", "甲乙", "--passage", "丙", "--passage", "丙甲"]
    )
    assert code == 0
    out = capsys.readouterr().out
    assert out == "Answer: 甲\nScore:  -0.5000\n\n[1] 【甲】乙\n[3] 丙【甲】\n"


def test_answer_json(reader: FakeReader, capsys: Output) -> None:
    assert main(["answer", "--question", "谁", "--passage", "甲乙", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    span = {"passage": 0, "start": 0, "end": 1}
    entry = {"text": "甲", "score": -0.5, "token_ids": [7], "spans": [span]}
    value = json.loads(out)
    assert value["timings"].pop("total") == pytest.approx(0.5)
    assert value == entry | {
        "candidates": [entry | {"finished": True}],
        "timings": {"tokenise": 0.1, "encode": 0.3, "decode": 0.1},
        "no_answer_score": None,
    }


@pytest.mark.parametrize("as_json", [False, True])
def test_no_answer_is_no_error(reader: FakeReader, capsys: Output, as_json: bool) -> None:
    options = ["--json"] if as_json else []
    assert main(["answer", "--question", "谁", "--passage", "xy", *options]) == 0
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)["text"] == ""
    else:
        assert out == "No answer in 1 passage.\n"


def test_answer_without_spans(reader: FakeReader, capsys: Output) -> None:
    reader.answer = lambda *_, **__: Answer("丁", -1.0, [9])  # type: ignore[method-assign]
    assert main(["answer", "--question", "谁", "--passage", "甲", "--mode", "generative"]) == 0
    assert "No passage holds it word for word." in capsys.readouterr().out


@pytest.mark.parametrize("from_stdin", [False, True])
def test_answer_reads_passages(
    reader: FakeReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
    from_stdin: bool,
) -> None:
    path = tmp_path / "p.txt"
    path.write_text("甲乙\n\n丙甲\n", encoding="utf-8")
    with open(path, encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        source = "-" if from_stdin else str(path)
        assert main(["answer", "--question", "谁", "--passages", source]) == 0
    assert capsys.readouterr().out.endswith("[1] 【甲】乙\n[2] 丙【甲】\n")


def test_answer_passes_only_the_options_given(reader: FakeReader) -> None:
    base = ["answer", "--question", "谁", "--passage", "甲"]
    assert main(base) == 0
    assert reader.options == {}
    options = {
        "beam_size": 5,
        "mode": "generative",
        "vote": "mean",
        "min_answer_tokens": 1,
        "max_answer_tokens": 9,
        "finish": "pool",
        "length_penalty": 0.5,
        "combine": "answer",
        "no_answer_threshold": -3.5,
        "stride": 16,
    }
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert main(base + given) == 0
    assert reader.options == options
    SearchOptions(**reader.options)


OPTIONS_OF_METHODS: dict[str, dict[str, Any]] = {
    "mlm": {
        "decoding": "exact",
        "mode": "extractive",
        "vote": "max",
        "top_k": 3,
        "min_answer_tokens": 1,
        "max_answer_tokens": 9,
        "no_answer_ratio": 2.5,
        "no_answer_threshold": 0.5,
        "stride": 16,
        "max_passage_tokens": 99,
        "max_question_tokens": 9,
    },
    "span": {
        "vote": "mean",
        "top_k": 2,
        "max_answer_tokens": 9,
        "no_answer_threshold": 0.5,
        "handle_impossible_answer": True,
        "null_score_diff_threshold": -1.5,
        "align_to_words": False,
        "stride": 16,
        "max_passage_tokens": 99,
        "max_question_tokens": 9,
    },
}


def as_arguments(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        else:
            yield f"--{option}={value}"


@pytest.mark.parametrize("method", OPTIONS_OF_METHODS)
def test_every_option_of_a_method_is_passed_on(reader: FakeReader, method: str) -> None:
    base = ["answer", "--question", "谁", "--passage", "甲", "--method", method]
    assert main(base) == 0
    assert reader.options == {}
    options = OPTIONS_OF_METHODS[method]
    assert main([*base, *as_arguments(options)]) == 0
    assert reader.options == options
    assert set(options) == {field.name for field in fields(common.METHODS[method].options)}
    opposite = {name: not value for name, value in options.items() if isinstance(value, bool)}
    assert main([*base, *as_arguments(opposite)]) == 0
    assert reader.options == opposite


@pytest.mark.parametrize(
    ("method", "given", "text"),
    [
        ("mlm", ["--beam-size", "3"], "--beam-size: no option of --method mlm"),
        ("mlm", ["--no-align-to-words"], "--align-to-words: no option of --method mlm"),
        ("mlm", ["--vote", "max", "--combine", "step"], "--combine: no option of --method mlm"),
        ("mlm", ["--top-k", "2"], "top_k: expected 1 with decoding 'greedy'"),
        ("mlm", ["--decoding", "beam"], "--decoding"),
        ("span", ["--decoding", "exact"], "--decoding: no option of --method span"),
        ("span", ["--mode", "generative"], "--mode: no option of --method span"),
        ("span", ["--min-answer-tokens", "1"], "--min-answer-tokens: no option of --method span"),
        ("span", ["--top-k", "0"], "top_k: expected at least 1, got 0"),
        ("seq2seq", ["--decoding", "exact"], "--decoding: no option of --method seq2seq"),
        ("seq2seq", ["--top-k", "2"], "--top-k: no option of --method seq2seq"),
    ],
)
@pytest.mark.parametrize("command", ["answer", "predict", "bench"])
def test_options_of_another_method(
    no_reader: None,
    data: Path,
    tmp_path: Path,
    capsys: Output,
    command: str,
    method: str,
    given: list[str],
    text: str,
) -> None:
    inputs = {
        "answer": ["--question", "q", "--passage", "p"],
        "predict": ["--data", str(data), "--out", str(tmp_path / "out.tsv")],
        "bench": [],
    }
    code = main([command, *inputs[command], "--method", method, *given])
    assert_error(capsys, code, text)


def test_help_names_methods_and_defaults(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["answer", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "hypotheses kept at each step (seq2seq: 3)",
        "longest answer (seq2seq, span: 32; mlm: 16)",
        "how passages agree (default: original)",
        "(seq2seq, mlm: off; span: 128)",
        "whether answers are whole words (span: on)",
        "whether a passage may hold no answer (span: off)",
    ):
        assert part in text


def test_spans_that_overlap_or_lie_apart() -> None:
    spans = [Span(0, 0, 2), Span(0, 1, 3), Span(0, 4, 5)]
    assert mark_spans("aaabc", spans) == "【aaa】b【c】"
    assert mark_spans("ab", [Span(0, 0, 1), Span(0, 1, 2)]) == "【a】【b】"
    text = "0" * 500 + "甲" + "1" * 500 + "乙" + "2" * 500
    shown = mark_spans(text, [Span(0, 500, 501), Span(0, 1001, 1002)])
    assert shown == (
        "…" + "0" * 40 + "【甲】" + "1" * 40 + "…" + "1" * 40 + "【乙】" + "2" * 40 + "…"
    )
    assert mark_spans("甲" + "1" * 500, [Span(0, 0, 1)]) == "【甲】" + "1" * 40 + "…"


def test_text_cannot_steer_the_terminal() -> None:
    assert mark_spans("\x1b[2Ja\nb", [Span(0, 4, 5)]) == " [2J【a】 b"


def test_terminal_gets_colours(
    reader: FakeReader, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert answer_command._is_colour_terminal()
    assert main(["answer", "--question", "谁", "--passage", "甲乙"]) == 0
    assert "[1] \x1b[1;32m甲\x1b[0m乙" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert not answer_command._is_colour_terminal()


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["answer", "--question", "q"], "--passages --passage"),
        (["answer", "--question", "q", "--passage", "p", "--passages", "f"], "not allowed with"),
        (["answer", "--question", "q", "--passages", "no.txt"], "no.txt: No such file"),
        (["answer", "--question", "q", "--passage", "p", "--beam-size", "x"], "--beam-size"),
        (
            ["answer", "--question", "q", "--passage", "p", "--beam-size", "0"],
            "beam_size: expected",
        ),
        (["answer", "--question", "q", "--passage", "p", "--threads", "0"], "at least 1"),
        (["answer", "--question", "q", "--passage", "p", "--vote", "loud"], "--vote"),
        (["answer", "--question", "q", "--passage", "p", "--method", "magic"], "--method"),
        (["answer", "--question", "q\udcff", "--passage", "p"], "question: expected Unicode text"),
        (["answer", "--question", "q", "--passage", "\udcff"], "passage: expected Unicode text"),
        (["predict", "--data", "no.jsonl", "--out", "o"], "no.jsonl: No such file"),
        (["predict", "--data", ".", "--out", "o"], "data: expected a regular file"),
        (["bench", "--data", "no.jsonl"], "no.jsonl: No such file"),
        (["bench", "-n", "0"], "at least 1"),
        (["bench", "--baseline"], "--baseline"),
    ],
)
def test_errors_are_one_line(
    no_reader: None, capsys: Output, arguments: list[str], text: str
) -> None:
    assert_error(capsys, main(arguments), text)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InputError("question: expected\n  text"), "question: expected text"),
        (ValueError(), "ValueError"),
        (OSError("no model\n\nanywhere"), "no model anywhere"),
        (FileNotFoundError(2, "No such file or directory", "m"), "m: No such file or directory"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_errors_of_the_reader(
    monkeypatch: pytest.MonkeyPatch, capsys: Output, error: Exception, text: str
) -> None:
    def build(args: argparse.Namespace, *, baseline: bool | None = None) -> FakeReader:
        raise error

    monkeypatch.setattr(common, "build_reader", build)
    assert describe_error(error) == text
    assert_error(capsys, main(["answer", "--question", "q", "--passage", "p"]), text)
    monkeypatch.setenv("FASTMRC_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["answer", "--question", "q", "--passage", "p"])


def test_interrupt(reader: FakeReader, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def interrupt(*_: Any, **__: Any) -> Answer:
        raise KeyboardInterrupt

    monkeypatch.setattr(reader, "answer", interrupt)
    assert main(["answer", "--question", "q", "--passage", "p"]) == 130
    assert capsys.readouterr().err == "fastmrc: interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["answer", "--help"], ["--version"]])
def test_help_and_version(arguments: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "fastmrc" in capsys.readouterr().out


def environment() -> dict[str, str]:
    """Let a child process find the package as this one does, and print UTF-8."""
    import fastmrc.cli

    package = Path(fastmrc.cli.__file__).resolve().parent.parent.parent
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
    }


def run_child(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "fastmrc", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, env=environment(), timeout=300, check=False
    )


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = textwrap.dedent("""
        import sys
        from fastmrc.cli import main
        try:
            main(["predict", "--help"])
        finally:
            loaded = {"torch", "transformers", "tqdm"} & set(sys.modules)
            print("loaded:", sorted(loaded), file=sys.stderr)
    """)
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment(), timeout=60, check=True
    )
    assert child.stderr.strip() == b"loaded: []"


def test_broken_pipe_is_quiet() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", FAKE_PROGRAM, "answer", "--question", "q", "--passage", "abc"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(60) == 141


def test_terminal_that_cannot_show_the_text() -> None:
    child = subprocess.run(
        [sys.executable, "-c", FAKE_PROGRAM, "answer", "--question", "q", "--passage", "甲"],
        capture_output=True,
        env=environment() | {"PYTHONIOENCODING": "ascii"},
        timeout=60,
        check=True,
    )
    assert rb"Answer: \u7532" in child.stdout


# --- construction of readers -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name"), [("mlm", "MLMReader"), ("span", "SpanReader"), ("seq2seq", "Seq2SeqReader")]
)
@pytest.mark.parametrize("baseline", [False, True])
def test_method_chooses_the_reader(
    monkeypatch: pytest.MonkeyPatch, method: str, name: str, baseline: bool
) -> None:
    import fastmrc
    import fastmrc.reference

    class Chosen:
        @classmethod
        def from_pretrained(cls, model: str | None, **options: Any) -> FakeReader:
            return FakeReader(suffix="!")

    monkeypatch.setitem(vars(fastmrc.reference if baseline else fastmrc), name, Chosen)
    args = argparse.Namespace(
        method=method,
        baseline=baseline,
        model="somewhere",
        local_files_only=False,
        threads=None,
        device=None,
        dtype=None,
        normalization=None,
        revision=None,
    )
    assert common.build_reader(args).answer("q", ["ab"]).text == "a!"


@pytest.mark.parametrize("baseline", [False, True])
def test_build_reader_passes_what_was_given(
    monkeypatch: pytest.MonkeyPatch, baseline: bool
) -> None:
    import fastmrc
    import fastmrc.reference

    calls: list[tuple[Any, ...]] = []

    class Recorder:
        @classmethod
        def from_pretrained(cls, model: str | None, **options: Any) -> FakeReader:
            calls.append((model, options))
            return FakeReader()

    module = fastmrc.reference if baseline else fastmrc
    # Setting the attribute the usual way would load the real class to restore it.
    monkeypatch.setitem(vars(module), "Seq2SeqReader", Recorder)
    base = ["answer", "--question", "q", "--passage", "p", *["--baseline"][: int(baseline)]]
    assert main(base) == 0
    options = {"revision": "r", "normalization": "none", "dtype": "auto", "device": "cpu"}
    given = [f"--{name}={value}" for name, value in options.items()]
    assert main([*base, *given, "--model", "m", "--local-files-only"]) == 0
    assert calls == [
        (None, {"local_files_only": False}),
        ("m", options | {"local_files_only": True}),
    ]


def test_threads_are_set_in_engine_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import fastmrc

    counts: list[tuple[str, int]] = []
    monkeypatch.setattr(
        fastmrc, "set_num_threads", lambda n: counts.append(("engine", n)), raising=False
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda n: counts.append(("torch", n)))
    common.set_threads(None)
    common.set_threads(3)
    assert counts == [("engine", 3), ("torch", 3)]


# --- predict -----------------------------------------------------------------------------------


def test_predict(reader: FakeReader, data: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "out.tsv"
    assert predict(data, out, "--beam-size", "4") == 0
    assert out.read_text("utf-8") == ALL_PREDICTIONS
    assert [len(batch) for batch in reader.batches] == [2, 2, 1]
    assert reader.options == {"beam_size": 4}
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "answered    4\nno answer   1\nskipped     0\n" in captured.out


def test_predict_json(reader: FakeReader, data: Path, tmp_path: Path, capsys: Output) -> None:
    assert predict(data, tmp_path / "out.tsv", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    seconds, speed = summary.pop("seconds"), summary.pop("questions_per_second")
    assert speed == pytest.approx(5 / seconds)
    assert summary == {
        "questions": 5,
        "already_done": 0,
        "answered": 4,
        "empty": 1,
        "skipped": 0,
    }


@pytest.mark.parametrize("kept", range(len(ALL_PREDICTIONS) + 1))
def test_predict_goes_on_from_any_byte(
    reader: FakeReader, data: Path, tmp_path: Path, kept: int
) -> None:
    out = tmp_path / "out.tsv"
    out.write_text(ALL_PREDICTIONS[:kept])
    assert predict(data, out) == 0
    assert out.read_text() == ALL_PREDICTIONS
    done = ALL_PREDICTIONS[:kept].count("\n")
    assert sum(map(len, reader.batches)) == 5 - done


def test_predict_loads_nothing_when_all_is_done(
    no_reader: None, data: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out.tsv"
    out.write_text(ALL_PREDICTIONS + "q5")
    assert predict(data, out, "--json") == 0
    assert out.read_text() == ALL_PREDICTIONS
    summary = json.loads(capsys.readouterr().out)
    assert summary["already_done"] == 5
    assert summary["questions_per_second"] == 0.0


def test_predict_overwrites_when_told(reader: FakeReader, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tsv"
    out.write_text("something else\nq1\told\n")
    assert predict(data, out, "--overwrite") == 0
    assert out.read_text() == ALL_PREDICTIONS


def test_predict_leaves_a_foreign_file_alone(
    no_reader: None, data: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out.tsv"
    out.write_text("q1\ta\nother\tb\n")
    assert_error(capsys, predict(data, out), "out.tsv:2: id: 'other' is not in the data")
    assert out.read_text() == "q1\ta\nother\tb\n"


def test_overwrite_waits_for_the_reader(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    def build(args: argparse.Namespace, *, baseline: bool | None = None) -> FakeReader:
        raise OSError("no such model")

    monkeypatch.setattr(common, "build_reader", build)
    out = tmp_path / "out.tsv"
    out.write_text("q1\told\n")
    assert predict(data, out, "--overwrite") == 2
    assert out.read_text() == "q1\told\n"


def test_predict_names_broken_lines_and_answers_the_rest(
    reader: FakeReader, tmp_path: Path, capsys: Output
) -> None:
    data = write_data(tmp_path / "d.jsonl", ["abc", "b", "cde", "d", "efg"], broken=[2, 4])
    out = tmp_path / "out.tsv"
    assert predict(data, out, "--json") == 2
    captured = capsys.readouterr()
    assert out.read_text() == "q1\ta\nq3\tc\nq5\te\n"
    assert [line.split(": ")[:3] for line in captured.err.splitlines()] == [
        ["fastmrc", "skipped", f"{data}:2"],
        ["fastmrc", "skipped", f"{data}:4"],
    ]
    assert json.loads(captured.out)["skipped"] == 2


def test_mended_lines_take_their_place(reader: FakeReader, tmp_path: Path) -> None:
    passages = ["abc", "xyz", "cde", "def", "efg"]
    data = write_data(tmp_path / "d.jsonl", passages, broken=[2, 4])
    out = tmp_path / "out.tsv"
    assert predict(data, out) == 2
    write_data(data, passages)
    assert predict(data, out) == 0
    assert out.read_text() == ALL_PREDICTIONS


def test_question_that_the_reader_refuses(
    reader: FakeReader, data: Path, tmp_path: Path, capsys: Output
) -> None:
    reader.reject = {"question 2", "question 5"}
    out = tmp_path / "out.tsv"
    assert predict(data, out) == 2
    assert out.read_text() == "q1\ta\nq3\tc\nq4\td\n"
    assert capsys.readouterr().err.splitlines() == [
        f"fastmrc: skipped: {data}:{n}: id 'q{n}': question: refused question {n}" for n in (2, 5)
    ]


def test_option_that_no_question_can_bear_stops_at_once(
    reader: FakeReader, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def refuse(*_: Any, **__: Any) -> Answer:
        raise InputError("beam_size: expected at most 21128")

    monkeypatch.setattr(reader, "answer", refuse)
    assert_error(capsys, predict(data, tmp_path / "out.tsv"), "beam_size: expected at most 21128")
    assert len(reader.batches) == 3


def test_no_question_at_all(no_reader: None, tmp_path: Path, capsys: Output) -> None:
    data = tmp_path / "empty.jsonl"
    data.write_text("")
    assert_error(capsys, predict(data, tmp_path / "out.tsv"), "no question could be read")
    assert not (tmp_path / "out.tsv").exists()


def test_data_are_not_overwritten(no_reader: None, data: Path, capsys: Output) -> None:
    before = data.read_bytes()
    assert_error(capsys, predict(data, data, "--overwrite"), "out: expected another file")
    assert data.read_bytes() == before


def test_directory_of_the_output_must_exist(
    no_reader: None, data: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "none" / "out.tsv"
    assert_error(capsys, predict(data, out), "out: expected a file in an existing directory")


@pytest.mark.parametrize("overwrite", [False, True])
def test_predict_interrupted(
    reader: FakeReader, data: Path, tmp_path: Path, capsys: Output, overwrite: bool
) -> None:
    reader.interrupt = 2
    out = tmp_path / "out.tsv"
    assert predict(data, out, *["--overwrite"][: int(overwrite)]) == 130
    assert out.read_text() == "q1\ta\nq2\t\n"
    captured = capsys.readouterr()
    assert captured.out == ""
    how = "again without --overwrite" if overwrite else "again"
    assert captured.err == f"interrupted; run the same command {how} to go on\n"
    reader.interrupt = None
    assert predict(data, out) == 0
    assert out.read_text() == ALL_PREDICTIONS
    assert sum(map(len, reader.batches)) == 2 + 2 + 3


# A program whose reader takes 20 ms a question; SIGINT arrives as at a terminal.
FAKE_PROGRAM = f"""
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
import test_cli
from fastmrc.cli import common, main
common.build_reader = lambda args, baseline=None: test_cli.FakeReader(seconds=0.02)
sys.exit(main())
"""


def test_control_c_keeps_what_is_done(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.jsonl", [f"{n % 10}." for n in range(300)])
    out = tmp_path / "out.tsv"
    arguments = ["predict", "--data", str(data), "--out", str(out), "--batch-size", "4"]
    command = [sys.executable, "-c", FAKE_PROGRAM, *arguments]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    printed, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert printed == b""
    assert errors == b"interrupted; run the same command again to go on\n"
    done = read_predictions(out)
    assert 0 < len(done) < 300
    assert list(done) == [f"q{n}" for n in range(1, len(done) + 1)]
    finished = subprocess.run(
        [*command, "--json"], capture_output=True, env=environment(), timeout=120, check=True
    )
    assert json.loads(finished.stdout)["already_done"] == len(done)
    expected = "".join(f"q{n + 1}\t{n % 10}\n" for n in range(300))
    assert out.read_text("utf-8") == expected


# --- bench -------------------------------------------------------------------------------------


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> dict[bool, FakeReader]:
    readers = {False: FakeReader(), True: FakeReader(seconds=0.002)}

    def build(args: argparse.Namespace, *, baseline: bool | None = None) -> FakeReader:
        assert baseline is not None
        return readers[baseline]

    monkeypatch.setattr(common, "build_reader", build)
    return readers


def test_bench(contenders: dict[bool, FakeReader], capsys: Output) -> None:
    assert main(["bench", "--rounds", "3", "-n", "5", "--beam-size", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("5 questions, 15 passages, median of 3\n")
    assert "outside the encoder          40.0%" in out
    for reader in contenders.values():
        assert [len(batch) for batch in reader.batches] == [1, 5, 5, 5]
        assert reader.options == {"beam_size": 2}


def test_bench_json(contenders: dict[bool, FakeReader], capsys: Output) -> None:
    assert main(["bench", "--json", "--rounds", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["questions"] == 12
    assert result["equal"] is True
    assert result["differences"] == []
    assert result["ratio"] > 1.0
    assert result["outside_encoder"] == pytest.approx(0.4)
    assert result["engine_questions_per_second"] == pytest.approx(12 / result["engine_seconds"])


@pytest.mark.parametrize("as_json", [False, True])
def test_bench_reports_different_answers(
    contenders: dict[bool, FakeReader], data: Path, capsys: Output, as_json: bool
) -> None:
    contenders[True].suffix = "!"
    options = ["--json"] if as_json else []
    assert main(["bench", "--data", str(data), "--rounds", "1", *options]) == 1
    out = capsys.readouterr().out
    if as_json:
        result = json.loads(out)
        assert result["equal"] is False
        assert [item["id"] for item in result["differences"]] == ["q1", "q3", "q4", "q5"]
        assert result["differences"][0]["reference"] == "a!"
    else:
        assert "q1: engine 'a' (-0.500000), reference 'a!' (-0.500000)" in out


def test_bench_skips_broken_lines(
    contenders: dict[bool, FakeReader], tmp_path: Path, capsys: Output
) -> None:
    data = write_data(tmp_path / "d.jsonl", ["abc", "b", "cde"], broken=[2])
    assert main(["bench", "--data", str(data), "--rounds", "1", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["questions"] == 2
    assert captured.err.startswith(f"fastmrc: skipped: {data}:2: ")


# --- with the packaged model -------------------------------------------------------------------

CAPITAL = ["中国的首都是北京，它是政治和文化中心。", "上海是中国最大的城市之一。"]


@pytest.fixture
def keep_threads() -> Iterator[None]:
    import torch

    import fastmrc

    before = fastmrc.get_num_threads(), torch.get_num_threads()
    yield
    fastmrc.set_num_threads(before[0])
    torch.set_num_threads(before[1])


def arguments_for(command: str, *options: str) -> list[str]:
    passages = [part for text in CAPITAL for part in ("--passage", text)]
    return [command, "--question", "中国的首都是哪里？", *passages, "--threads", "1", *options]


def test_packaged_model_answers() -> None:
    child = run_child(*arguments_for("answer"))
    assert child.returncode == 0, child.stderr.decode()
    assert child.stderr == b""
    lines = child.stdout.decode("utf-8").splitlines()
    assert lines[0] == "Answer: 北京"
    assert "[1] 中国的首都是【北京】，它是政治和文化中心。" in lines


def test_packaged_model_answers_from_standard_input() -> None:
    source = "\n".join(CAPITAL).encode("utf-8")
    child = run_child(
        "answer", "--question", "中国的首都是哪里？", "--passages", "-", "--json", stdin=source
    )
    assert child.returncode == 0, child.stderr.decode()
    answer = json.loads(child.stdout)
    assert answer["text"] == "北京"
    assert {"passage": 0, "start": 6, "end": 8} in answer["spans"]
    assert answer["candidates"][0]["text"] == "北京"
    assert answer["timings"]["total"] > 0


@pytest.mark.parametrize("mode", ["extractive", "generative"])
def test_baseline_gives_the_same_answer(keep_threads: None, capsys: Output, mode: str) -> None:
    answers = []
    for options in ([], ["--baseline"]):
        assert main(arguments_for("answer", "--json", "--mode", mode, *options)) == 0
        answers.append(json.loads(capsys.readouterr().out))
    engine, reference = answers
    assert engine["text"] == reference["text"]
    assert engine["token_ids"] == reference["token_ids"]
    assert engine["spans"] == reference["spans"]
    assert engine["score"] == pytest.approx(reference["score"], abs=1e-4)


def test_packaged_model_predicts_the_sample(
    keep_threads: None, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out.tsv"
    command = ["predict", "--data", str(SAMPLE), "--out", str(out), "--threads", "1", "--json"]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["questions"] == summary["answered"] + summary["empty"] == 12
    predictions = read_predictions(out)
    questions = {question.id: question for question in read_questions(SAMPLE)}
    assert list(predictions) == list(questions)
    for question_id, text in predictions.items():
        assert not text or any(text in p.text for p in questions[question_id].passages)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    assert main(command) == 0
    assert out.read_bytes() == whole


def test_bench_of_the_packaged_model(keep_threads: None, capsys: Output) -> None:
    assert main(["bench", "-n", "3", "--rounds", "1", "--threads", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["equal"] is True
    assert result["ratio"] > 1.0
    assert 0.0 < result["outside_encoder"] < 1.0


@pytest.mark.parametrize("options", [[], ["--decoding", "exact", "--top-k", "2"], ["--baseline"]])
def test_packaged_model_answers_by_masked_slots(
    keep_threads: None, capsys: Output, options: list[str]
) -> None:
    assert main(arguments_for("answer", "--method", "mlm", "--json", *options)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == "北京"
    assert answer["spans"] == [{"passage": 0, "start": 6, "end": 8}]
    assert 0 < answer["score"] < 1
    assert 0 < answer["no_answer_score"] < 0.5


def sample_of(count: int, tmp_path: Path) -> Path:
    path = tmp_path / "sample.jsonl"
    lines = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")
    return path


def test_predict_and_bench_by_masked_slots(
    keep_threads: None, tmp_path: Path, capsys: Output
) -> None:
    data, out = sample_of(3, tmp_path), tmp_path / "out.tsv"
    rest = ["--data", str(data), "--method", "mlm", "--threads", "1", "--json"]
    assert main(["predict", "--out", str(out), *rest]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 3
    questions = {question.id: question for question in read_questions(data)}
    for question_id, text in read_predictions(out).items():
        assert text and any(text in p.text for p in questions[question_id].passages)
    assert main(["bench", "-n", "2", "--rounds", "1", *rest]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["equal"] is True
    assert result["score_difference"] < 1e-5


def test_span_heads(keep_threads: None, bert_qa_dir: Path, tmp_path: Path, capsys: Output) -> None:
    method = ["--method", "span", "--model", str(bert_qa_dir), "--threads", "1", "--json"]
    found = []
    for options in ([], ["--baseline"], ["--handle-impossible-answer", "--top-k", "2"]):
        passages = ["--passage", "中国北京", "--passage", "上海"]
        assert main(["answer", "--question", "谁?", *passages, *method, *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    engine, oracle, careful = found
    assert engine["text"] in "中国北京上海"
    assert engine["spans"] == oracle["spans"] != []
    assert engine["no_answer_score"] == pytest.approx(oracle["no_answer_score"], abs=1e-6)
    assert 0 < engine["no_answer_score"] < 1
    assert len(careful["candidates"]) != len(engine["candidates"])
    data, out = sample_of(3, tmp_path), tmp_path / "out.tsv"
    assert main(["predict", "--data", str(data), "--out", str(out), *method]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 3
    assert len(read_predictions(out)) == 3
    assert main(["bench", "--data", str(data), "--rounds", "1", *method]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True


def test_span_heads_need_a_model(keep_threads: None, tiny_bert_dir: Path, capsys: Output) -> None:
    base = ["answer", "--question", "q", "--passage", "p", "--method", "span"]
    text = "--model: expected a directory or hub id, as no span model is packaged"
    assert_error(capsys, main(base), text)
    code = main([*base, "--model", str(tiny_bert_dir)])
    assert_error(capsys, code, "holds no trained question-answering model")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "/no/such/model", "--local-files-only"], "/no/such/model"),
        (["--device", "abacus"], "device"),
        (["--beam-size", "100000"], "beam_size"),
        (["--question", ""], "question"),
    ],
)
def test_refusals_of_the_real_reader(options: list[str], text: str) -> None:
    child = run_child(*arguments_for("answer", *options))
    errors = child.stderr.decode("utf-8")
    assert child.returncode == 2
    assert child.stdout == b""
    assert errors.startswith("fastmrc: error: ")
    assert errors.count("\n") == 1
    assert text in errors
