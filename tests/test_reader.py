"""The readers end to end: engine against oracle, citations, options and bad input."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmrc
from fastmrc import Answer, InputError, Seq2SeqReader, Span, UnsupportedModelError, reference
from fastmrc.encoders.unilm import UniLMEncoder
from fastmrc.options import SearchOptions
from fastmrc.pretrained import LoadedModel, load_model
from fastmrc.readers.base import PreparedQuestion
from fastmrc.readers.beam import BeamReader, Decoded
from fastmrc.types import Hypothesis, SearchResult

QUESTION = "北京在哪里?"
PASSAGES = ["中国北京在二月天气大", "上海New York山水,火。北京", "人名"]

# Of the kind the packaged model was made for.
REAL = [
    (
        "世界上最高的山峰是哪座?",
        [
            "珠穆朗玛峰位于中国与尼泊尔边境,海拔8848米,是世界最高峰。",
            "世界上最高的山峰是珠穆朗玛峰。",
            "今天天气很好。",
        ],
    ),
    ("中国的首都是哪里?", ["中国的首都是北京。", "北京是中华人民共和国的首都。"]),
    ("谁写了《红楼梦》?", ["《红楼梦》的作者是曹雪芹。", "清代作家曹雪芹所著。", "四大名著之一。"]),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tiny_bert_dir: Path) -> LoadedModel:
    return load_model(tiny_bert_dir)


@pytest.fixture(scope="module")
def reader(tiny: LoadedModel) -> Seq2SeqReader:
    return Seq2SeqReader(tiny)


@pytest.fixture(scope="module")
def oracle(tiny: LoadedModel) -> reference.Seq2SeqReader:
    return reference.Seq2SeqReader(tiny)


def assert_same(ours: Answer, theirs: Answer, tolerance: float = 1e-3) -> None:
    """Everything but the seconds; scores are compared within float32 rounding of the encoder."""
    assert (ours.text, ours.token_ids, ours.spans) == (theirs.text, theirs.token_ids, theirs.spans)
    assert ours.score == pytest.approx(theirs.score, abs=tolerance)
    assert len(ours.candidates) == len(theirs.candidates)
    for a, b in zip(ours.candidates, theirs.candidates, strict=True):
        assert replace(a, score=0.0) == replace(b, score=0.0)
        assert a.score == pytest.approx(b.score, abs=tolerance)


# --- engine against oracle -----------------------------------------------------------------------

TRIE_TEXTS = ["北京", "北京在", "上海", "new york"]


def _trie(loaded: LoadedModel, texts: Sequence[str] = TRIE_TEXTS) -> fastmrc.Trie:
    encode: Any = loaded.tokenizer
    return fastmrc.Trie([encode(text, add_special_tokens=False)["input_ids"] for text in texts])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"beam_size": 1, "mode": "generative", "max_answer_tokens": 5},
    {"beam_size": 5, "mode": "generative", "max_answer_tokens": 4, "min_answer_tokens": 2},
    {"finish": "pool", "length_penalty": 0.7, "max_answer_tokens": 6},
    {"finish": "pool", "length_penalty": -0.5, "mode": "generative", "max_answer_tokens": 4},
    {"vote": "mean"},
    {"vote": "max", "min_answer_tokens": 3},
    {"vote": "product", "beam_size": 4},
    {"vote": "weighted", "passage_weights": [0.5, 2.0, 0.0]},
    {"no_answer_ratio": 1.0},
    {"no_answer_ratio": 1.05, "max_passage_tokens": 5, "stride": 2},
    {"no_answer_ratio": 1.1, "vote": "weighted", "passage_weights": [0.5, 2.0, 0.0]},
    {"combine": "answer"},
    {"combine": "answer", "no_answer_ratio": 1.05, "max_passage_tokens": 5, "stride": 2},
    {"combine": "answer", "vote": "weighted", "passage_weights": [0.5, 2.0, 1.0]},
    {"combine": "answer", "finish": "pool", "mode": "generative", "max_answer_tokens": 3},
    {"max_passage_tokens": 4},
    {"max_passage_tokens": 5, "stride": 2, "min_answer_tokens": 1},
    {"max_question_tokens": 2},
    {"no_answer_threshold": -2.0},
    {"constraint": "trie", "min_answer_tokens": 1},
    {"max_answer_tokens": 1},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items())
)
def test_engine_equals_oracle(
    reader: Seq2SeqReader,
    oracle: reference.Seq2SeqReader,
    tiny: LoadedModel,
    options: dict[str, Any],
) -> None:
    if "constraint" in options:
        options = options | {"constraint": _trie(tiny)}
    for question in (QUESTION, "谁?", "the name of New York 2024"):
        ours = reader.answer(question, PASSAGES, **options)
        assert_same(ours, oracle.answer(question, PASSAGES, **options))


@pytest.mark.parametrize("mode", ["extractive", "generative"])
def test_every_family_equals_the_oracle(tiny_model_dir: Path, mode: str) -> None:
    loaded = load_model(tiny_model_dir)
    ours = Seq2SeqReader(loaded)
    theirs = reference.Seq2SeqReader(loaded)
    for question in (QUESTION, "何月?"):
        options: dict[str, Any] = {"mode": mode, "min_answer_tokens": 2, "max_answer_tokens": 5}
        assert_same(
            ours.answer(question, PASSAGES, **options), theirs.answer(question, PASSAGES, **options)
        )


@pytest.mark.parametrize("mode", ["extractive", "generative"])
def test_packaged_model_equals_the_oracle(packaged_model: LoadedModel, mode: str) -> None:
    options: dict[str, Any] = {"mode": mode, "beam_size": 2, "max_answer_tokens": 8}
    ours = Seq2SeqReader(packaged_model).answer_batch(REAL, **options)
    theirs = reference.Seq2SeqReader(packaged_model).answer_batch(REAL, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)
    assert any(answer.text for answer in ours)


@pytest.mark.parametrize("count", [1, 2, 64, 70])
def test_number_of_passages(
    reader: Seq2SeqReader, oracle: reference.Seq2SeqReader, count: int
) -> None:
    passages = [f"{'北京上海天气山水'[i % 7 :]}{i}" for i in range(count)]
    options: dict[str, Any] = {"min_answer_tokens": 1, "max_answer_tokens": 3}
    ours = reader.answer(QUESTION, passages, **options)
    assert_same(ours, oracle.answer(QUESTION, passages, **options))


def test_batch_equals_singles(reader: Seq2SeqReader) -> None:
    questions = [
        (QUESTION, PASSAGES),
        ("谁?", []),
        ("何时" * 20, ["二月" * 60, "五"]),
        ("name", ["", "the new name"]),
        (QUESTION, PASSAGES[::-1]),
    ]
    options: dict[str, Any] = {"min_answer_tokens": 1, "max_answer_tokens": 6}
    together = reader.answer_batch(iter(questions), **options)
    for answer, (question, passages) in zip(together, questions, strict=True):
        assert_same(answer, reader.answer(question, passages, **options), tolerance=1e-4)


def test_groups_of_questions(reader: Seq2SeqReader, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [(f"{i}月?", PASSAGES[i % 3 :] + ["山" * i]) for i in range(12)]
    options: dict[str, Any] = {"min_answer_tokens": 1, "max_answer_tokens": 3}
    together = reader.answer_batch(questions, **options)
    monkeypatch.setattr("fastmrc.readers.seq2seq._GROUP_TOKENS", 50)
    for a, b in zip(together, reader.answer_batch(questions, **options), strict=True):
        assert_same(a, b, tolerance=1e-4)


def test_order_of_passages(reader: Seq2SeqReader) -> None:
    order = [2, 0, 1]
    one = reader.answer(QUESTION, PASSAGES, min_answer_tokens=1)
    other = reader.answer(QUESTION, [PASSAGES[p] for p in order], min_answer_tokens=1)
    assert one.token_ids == other.token_ids
    assert sorted((order[s.passage], s.start, s.end) for s in other.spans) == [
        (s.passage, s.start, s.end) for s in one.spans
    ]


def test_no_questions(reader: Seq2SeqReader) -> None:
    assert reader.answer_batch([]) == []
    assert reader.answer_batch([], combine="answer") == []


def test_deterministic(reader: Seq2SeqReader) -> None:
    first, second = (reader.answer(QUESTION, PASSAGES) for _ in range(2))
    assert replace(first, timings=second.timings) == second


def test_several_threads_at_once(reader: Seq2SeqReader) -> None:
    questions = [(f"{word}?", PASSAGES) for word in "谁何哪里时间名字北京上海"]
    options: dict[str, Any] = {"min_answer_tokens": 1, "max_answer_tokens": 4}
    want = [reader.answer(*pair, **options) for pair in questions]
    barrier = threading.Barrier(4)

    def work(_: int) -> list[Answer]:
        barrier.wait()
        return [reader.answer(*pair, **options) for pair in questions]

    with ThreadPoolExecutor(4) as pool:
        for answers in pool.map(work, range(4)):
            for a, b in zip(answers, want, strict=True):
                assert_same(a, b, tolerance=1e-5)


def test_timings(reader: Seq2SeqReader, oracle: reference.Seq2SeqReader) -> None:
    for one in (reader, oracle):
        for combine in ("step", "answer"):
            for answer in one.answer_batch([(QUESTION, PASSAGES)] * 2, combine=combine):
                timings = answer.timings
                assert min(timings.tokenise, timings.encode, timings.decode) > 0
                assert timings.total == pytest.approx(
                    timings.tokenise + timings.encode + timings.decode
                )


# --- from tokens to the caller's text ------------------------------------------------------------

Script = Callable[[PreparedQuestion], Sequence[str]]


class Scripted(BeamReader):
    """A reader whose search finds given texts; everything else is that of the readers."""

    def __init__(self, loaded: LoadedModel, found: Script, leaves: Sequence[int] = ()) -> None:
        super().__init__(loaded)
        self._found, self._leaves = found, leaves

    def _decode(
        self, questions: Sequence[PreparedQuestion], options: SearchOptions, progress: bool
    ) -> list[Decoded]:
        return [Decoded(self._result(question), 0.0, 0.0) for question in questions]

    def _result(self, question: PreparedQuestion) -> SearchResult:
        hypotheses = [
            Hypothesis(self._codec.encode_passages([text])[0].token_ids.tolist(), -1.0 - i, True)
            for i, text in enumerate(self._found(question))
        ]
        surviving = [window.passage not in self._leaves for window in question.windows]
        no_answer = [0.1 * (window.passage + 1) for window in question.windows]
        best = hypotheses[0] if hypotheses else None
        return SearchResult(best, hypotheses, surviving, surviving, no_answer)


def _scripted(
    loaded: LoadedModel, *texts: str, leaves: Sequence[int] = (), normalization: Any = "none"
) -> Scripted:
    return Scripted(replace(loaded, normalization=normalization), lambda _: texts, leaves)


def _cut(answer: Answer, passages: Sequence[str]) -> list[str]:
    return [passages[span.passage][span.start : span.end] for span in answer.spans]


@pytest.mark.parametrize(
    ("found", "passages", "pieces"),
    [
        ("北京", ["在北京,北京市", "上海", "北 京"], ["北京", "北京", "北 京"]),
        ("new york", ["The NEW York", "new  york!"], ["NEW York", "new  york"]),
        ("ing", ["newing thing"], []),
        ("##ing", ["newing"], []),
        ("天大", ["北😀天 大山"], ["天 大"]),
        ("the北", ["the\u0301北"], ["the\u0301北"]),
        ("北the", ["北the\u0301山"], ["北the\u0301"]),
        ("[sep]", ["北[SEP]京[SEP]"], ["[SEP]", "[SEP]"]),
        ("北北", ["北北北"], ["北北", "北北"]),
        ("山", ["\u3000山\u3000", "", "  山"], ["山", "山"]),
    ],
)
def test_spans_are_the_callers_text(
    tiny: LoadedModel, found: str, passages: list[str], pieces: list[str]
) -> None:
    answer = _scripted(tiny, found).answer(QUESTION, passages)
    assert _cut(answer, passages) == pieces
    assert answer.spans == sorted(answer.spans, key=lambda s: (s.passage, s.start))
    if pieces:
        assert answer.text == pieces[0]


def test_spans_through_the_normalization(tiny: LoadedModel) -> None:
    passages = ["北京、上海；天 大，山", "上海,天,大"]  # noqa: RUF001
    answer = _scripted(tiny, "上海,天,大", normalization="original").answer(QUESTION, passages)
    assert answer.text == "上海；天 大"  # noqa: RUF001
    assert _cut(answer, passages) == ["上海；天 大", "上海,天,大"]  # noqa: RUF001
    answer = _scripted(tiny, ",天", normalization="original").answer(QUESTION, ["海 天", "海，天"])  # noqa: RUF001
    assert answer.spans[1] == Span(1, 1, 3)
    assert [(s.passage, s.end) for s in answer.spans] == [(0, 3), (1, 3)]


def test_passages_that_left_are_not_cited(tiny: LoadedModel) -> None:
    answer = _scripted(tiny, "北京", leaves=[0]).answer(QUESTION, ["北京", "北京", "上海"])
    assert answer.spans == [Span(1, 0, 2)]


def test_unknown_tokens_stand_for_one_text_only(tiny: LoadedModel) -> None:
    passages = ["山😀", "山🎉", "山😀水"]
    answer = _scripted(tiny, "山😀").answer(QUESTION, passages)
    assert answer.text == "山😀"
    assert answer.spans == [Span(0, 0, 2), Span(2, 0, 2)]


def test_unknown_tokens_do_not_vote_together(tiny: LoadedModel) -> None:
    """Two surfaces with the same token ids are two answers."""
    passages = ["山🎉", "山😀", "山😀水"]
    one = Scripted(tiny, lambda _: ["山😀"])
    answer = one.answer(QUESTION, passages, combine="answer")
    assert [candidate.text for candidate in answer.candidates] == ["山😀", "山🎉"]
    assert answer.spans == [Span(1, 0, 2), Span(2, 0, 2)]
    assert answer.candidates[1].spans == [Span(0, 0, 2)]
    generated = one.answer(QUESTION, passages, combine="answer", mode="generative")
    assert [candidate.spans for candidate in generated.candidates] == [
        [Span(1, 0, 2), Span(2, 0, 2)],
        [Span(0, 0, 2)],
    ]


def test_answers_of_passages_vote(tiny: LoadedModel) -> None:
    """s = exp(-1 / 3 tokens) of each; two equal answers beat one."""
    texts = {0: "上海", 1: "北京", 2: "北京"}
    one = Scripted(tiny, lambda question: [texts[question.windows[0].passage]])
    passages = ["上海", "北京", "北京,上海"]
    answer = one.answer(QUESTION, passages, combine="answer")
    s = np.exp(-1 / 3)
    assert answer.text == "北京"
    assert answer.score == pytest.approx(np.log(2 * s**2 / (1 + 2 * s)))
    assert answer.spans == [Span(1, 0, 2), Span(2, 0, 2)]
    assert answer.candidates[1].spans == [Span(0, 0, 2), Span(2, 3, 5)]
    weighted = one.answer(
        QUESTION, passages, combine="answer", vote="weighted", passage_weights=[9, 1, 1]
    )
    assert weighted.text == "上海"
    assert weighted.score == pytest.approx(np.log(9 * s**2 / (1 + 9 * s)))


def test_options_of_the_model(tiny: LoadedModel) -> None:
    settings = {"max_passage_tokens": 4, "stride": 2, "no_answer_ratio": 1.0, "beam_size": 2}
    one = Seq2SeqReader(replace(tiny, reading={"seq2seq": settings, "mlm": {"top_k": 3}}))
    plain = Seq2SeqReader(tiny)

    def same(given: dict[str, Any], expected: dict[str, Any]) -> None:
        ours = one.answer(QUESTION, PASSAGES, **given)
        assert_same(ours, plain.answer(QUESTION, PASSAGES, **expected))

    same({}, settings)
    same({"max_answer_tokens": 2}, settings | {"max_answer_tokens": 2})
    same({"no_answer_ratio": None}, settings | {"no_answer_ratio": None})
    same({"max_passage_tokens": 3}, settings | {"max_passage_tokens": 3})
    same({"max_passage_tokens": 2}, settings | {"max_passage_tokens": 2, "stride": 1})
    same({"stride": None}, settings | {"stride": None})
    same({"vote": "max"}, settings | {"vote": "max"})
    with pytest.raises(InputError, match="stride: expected less than max_passage_tokens=4, got 9"):
        one.answer(QUESTION, PASSAGES, stride=9)
    theirs = reference.Seq2SeqReader(replace(tiny, reading={"seq2seq": settings}))
    assert_same(one.answer(QUESTION, PASSAGES), theirs.answer(QUESTION, PASSAGES))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_answer_ratio": 0.5}, "no_answer_ratio: expected at least 1, got 0.5"),
        ({"decoding": "exact"}, "unexpected keyword decoding"),
        ({"no_answer_ratio": True}, "no_answer_ratio: expected a number, got bool"),
        ({"no_answer_ratio": 10**400}, "no_answer_ratio: expected a number that a float holds"),
        ({"stride": 300}, "stride: expected less than max_passage_tokens=254, got 300"),
    ],
)
def test_bad_options_of_the_model(
    tiny: LoadedModel, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"fastmrc.json: reading: seq2seq: .*{message}"):
        Seq2SeqReader(replace(tiny, reading={"seq2seq": settings}))


def test_the_surest_passages_vote(tiny: LoadedModel) -> None:
    """The script says "no answer" with 0.1, 0.2 and so on."""
    texts = {0: "上海", 1: "北京", 2: "北京", 3: "人"}
    passages = ["上海", "北京", "北京,上海", "人"]
    one = Scripted(tiny, lambda question: [texts[question.windows[0].passage]])
    s = np.exp(-1 / 3)
    first = one.answer(QUESTION, passages, combine="answer", no_answer_ratio=1.9)
    assert (first.text, first.score) == ("上海", pytest.approx(np.log(s**2 / (1 + s))))
    assert len(first.candidates) == 1
    assert first.spans == [Span(0, 0, 2), Span(2, 3, 5)]  # cited wherever it was not rejected
    assert first.no_answer_score == pytest.approx(0.1)
    options: dict[str, Any] = {"combine": "answer", "vote": "mean"}
    three = one.answer(QUESTION, passages, no_answer_ratio=3.1, **options)
    assert (three.text, three.score) == ("北京", pytest.approx(np.log(2 * s / 3)))
    everyone = one.answer(QUESTION, passages, **options)
    assert (everyone.text, everyone.score) == ("北京", pytest.approx(np.log(2 * s / 4)))
    rejected = Scripted(tiny, lambda question: [texts[question.windows[0].passage]], [0])
    options = {"combine": "answer", "no_answer_ratio": 1.0}
    assert rejected.answer(QUESTION, passages, **options).text == "北京"
    options |= {"vote": "weighted", "passage_weights": [0.0, 0.0, 1.0, 9.0]}
    assert one.answer(QUESTION, passages, **options).text == "北京"


def test_windows_cite_the_whole_passage(tiny: LoadedModel) -> None:
    passage = "一二三四五六七八北京九十"
    one = _scripted(tiny, "北京")
    assert one.answer(QUESTION, [passage], max_passage_tokens=4).spans == []
    for stride in (0, 1, 2, 3):
        answer = one.answer(QUESTION, ["山", passage], max_passage_tokens=4, stride=stride)
        cut_apart = stride == 0 and passage.index("北") % 4 == 3
        assert answer.spans == ([] if cut_apart else [Span(1, 8, 10)])


def test_windows_vote_each(tiny: LoadedModel) -> None:
    seen: list[tuple[list[int], list[float]]] = []

    def found(question: PreparedQuestion) -> list[str]:
        seen.append(([window.passage for window in question.windows], question.window_weights()))
        return ["一"]

    one = Scripted(tiny, found)
    passages = ["一二三四五", "", "一二"]
    one.answer(QUESTION, passages, max_passage_tokens=2, stride=1)
    one.answer(
        QUESTION,
        passages,
        max_passage_tokens=2,
        stride=1,
        vote="weighted",
        passage_weights=[1.0, 2.0, 3.0],
    )
    assert seen == [
        ([0, 0, 0, 0, 2], [1.0, 1.0, 1.0, 1.0, 1.0]),
        ([0, 0, 0, 0, 2], [1.0, 1.0, 1.0, 1.0, 3.0]),
    ]


def test_generated_text_has_no_spaces_between_chinese(tiny: LoadedModel) -> None:
    answer = _scripted(tiny, "天气大 new york").answer(QUESTION, ["山"], mode="generative")
    assert answer.text == "天气大new york"
    assert answer.spans == []
    cited = _scripted(tiny, "天气").answer(QUESTION, ["天 气"], mode="generative")
    assert (cited.text, cited.spans) == ("天气", [Span(0, 0, 3)])


def test_candidates_cite_too(tiny: LoadedModel) -> None:
    answer = _scripted(tiny, "北京", "上海", "").answer(QUESTION, ["上海北京"])
    assert [c.text for c in answer.candidates] == ["北京", "上海", ""]
    assert [c.spans for c in answer.candidates] == [[Span(0, 2, 4)], [Span(0, 0, 2)], []]


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_answer(tiny: LoadedModel, texts: list[str]) -> None:
    answer = _scripted(tiny, *texts).answer(QUESTION, PASSAGES)
    assert (answer.text, answer.score, answer.token_ids, answer.spans) == ("", 0.0, [], [])
    assert len(answer.candidates) == len(texts)


def test_no_answer_threshold(tiny: LoadedModel) -> None:
    one = _scripted(tiny, "北京")  # of score -1
    assert one.answer(QUESTION, PASSAGES, no_answer_threshold=-1.5).text == "北京"
    assert one.answer(QUESTION, PASSAGES, no_answer_threshold=-1.0).text == "北京"
    refused = one.answer(QUESTION, PASSAGES, no_answer_threshold=-0.5)
    assert (refused.text, refused.score, refused.spans) == ("", 0.0, [])
    assert [c.text for c in refused.candidates] == ["北京"]


def test_answers_are_pieces_of_the_passages(reader: Seq2SeqReader) -> None:
    for question in ("谁?", "何时?", "哪里?", "name?"):
        answer = reader.answer(question, PASSAGES, min_answer_tokens=2, beam_size=5)
        assert answer.text and answer.spans
        assert answer.text in _cut(answer, PASSAGES)


def test_a_trie_of_answers(reader: Seq2SeqReader, tiny: LoadedModel) -> None:
    answer = reader.answer(QUESTION, PASSAGES, constraint=_trie(tiny), min_answer_tokens=1)
    assert answer.text.lower() in TRIE_TEXTS
    (one, two) = reader.answer_batch(
        [(QUESTION, PASSAGES)] * 2, constraints=[_trie(tiny, ["火"]), None], min_answer_tokens=1
    )
    assert one.text == "火"
    assert_same(two, reader.answer(QUESTION, PASSAGES, min_answer_tokens=1), tolerance=1e-4)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["", " ", "\n\t\u3000"])
def test_empty_question(reader: Seq2SeqReader, question: str) -> None:
    with pytest.raises(InputError, match="question: expected a question, got empty text"):
        reader.answer(question, PASSAGES)
    with pytest.raises(InputError, match=r"questions\[1\]: expected a question, got empty text"):
        reader.answer_batch([(QUESTION, PASSAGES), (question, PASSAGES)])


@pytest.mark.parametrize("passages", [[], [""], ["", " \n"], ["\u200b"]])
@pytest.mark.parametrize("combine", ["step", "answer"])
def test_no_passages(
    reader: Seq2SeqReader, oracle: reference.Seq2SeqReader, passages: list[str], combine: str
) -> None:
    for one in (reader, oracle):
        answer = one.answer(QUESTION, passages, combine=combine)
        assert replace(answer, timings=fastmrc.Timings()) == Answer()


@pytest.mark.parametrize("combine", ["step", "answer"])
def test_empty_passages_take_no_part(reader: Seq2SeqReader, combine: str) -> None:
    options: dict[str, Any] = {"combine": combine, "min_answer_tokens": 1}
    answer = reader.answer(QUESTION, ["", PASSAGES[0], " ", PASSAGES[1]], **options)
    alone = reader.answer(QUESTION, PASSAGES[:2], **options)
    assert (answer.text, answer.token_ids) == (alone.text, alone.token_ids)
    assert answer.score == pytest.approx(alone.score, abs=1e-5)
    assert [s.passage for s in answer.spans] == [2 * s.passage + 1 for s in alone.spans]


def test_passage_without_a_known_token(
    reader: Seq2SeqReader, oracle: reference.Seq2SeqReader
) -> None:
    passages = ["😀 🎉 \U00020000", "ᚠ"]
    options: dict[str, Any] = {"min_answer_tokens": 1, "max_answer_tokens": 2}
    answer = reader.answer(QUESTION, passages, **options)
    assert_same(answer, oracle.answer(QUESTION, passages, **options))
    assert answer.text in _cut(answer, passages)
    assert len(set(_cut(answer, passages))) == 1


def test_question_without_a_known_token(reader: Seq2SeqReader) -> None:
    assert reader.answer("😀", PASSAGES, min_answer_tokens=1).text
    assert reader.answer("\u200b", PASSAGES, min_answer_tokens=1).text


def test_question_longer_than_the_limit(reader: Seq2SeqReader) -> None:
    answer = reader.answer("中" * 500, PASSAGES)
    assert_same(answer, reader.answer("中" * 63, PASSAGES))
    one = reader.answer("中国北京", PASSAGES, max_question_tokens=2)
    assert_same(one, reader.answer("中国", PASSAGES))


def test_passage_longer_than_the_limit(reader: Seq2SeqReader) -> None:
    options: dict[str, Any] = {"min_answer_tokens": 1, "max_answer_tokens": 3}
    answer = reader.answer(QUESTION, ["山" * 300 + "水"], **options)
    assert_same(answer, reader.answer(QUESTION, ["山" * 254], **options))
    assert all(span.end <= 254 for span in answer.spans)


def test_special_tokens_inside_a_passage(
    reader: Seq2SeqReader, oracle: reference.Seq2SeqReader
) -> None:
    passages = ["北京[SEP]上海[CLS]天[MASK]气[PAD]大[UNK]", "[SEP]"]
    for mode in ("extractive", "generative"):
        options: dict[str, Any] = {"mode": mode, "min_answer_tokens": 3, "max_answer_tokens": 4}
        answer = reader.answer("[SEP]?", passages, **options)
        assert_same(answer, oracle.answer("[SEP]?", passages, **options))
    assert reader.answer("?", ["[SEP]"], min_answer_tokens=5, max_answer_tokens=5).text == "[SEP]"


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"beam_size": 0}, InputError, "beam_size: expected at least 1, got 0"),
    ({"beam_size": -3}, InputError, "beam_size: expected at least 1, got -3"),
    ({"beam_size": 10**6}, InputError, "beam_size: expected at most the vocabulary size"),
    ({"beam_size": 2.0}, InputError, "beam_size: expected an integer, got float"),
    ({"beam_size": True}, InputError, "beam_size: expected an integer, got bool"),
    ({"beam_size": None}, InputError, "beam_size: expected an integer, got NoneType"),
    ({"mode": "both"}, InputError, "mode: expected one of extractive, generative, got 'both'"),
    ({"vote": "median"}, InputError, "vote: expected one of original, mean.*got 'median'"),
    ({"finish": "late"}, InputError, "finish: expected one of original, pool, got 'late'"),
    ({"combine": "no"}, InputError, "combine: expected one of step, answer, got 'no'"),
    ({"min_answer_tokens": -1}, InputError, "min_answer_tokens: expected at least 0, got -1"),
    ({"max_answer_tokens": 0}, InputError, "max_answer_tokens: expected at least 1, got 0"),
    (
        {"min_answer_tokens": 5, "max_answer_tokens": 4},
        InputError,
        "max_answer_tokens: expected at least 5, got 4",
    ),
    ({"max_answer_tokens": 5000}, InputError, "at most 512 tokens, the positions of the model"),
    ({"max_passage_tokens": 0}, InputError, "max_passage_tokens: expected at least 1, got 0"),
    ({"max_question_tokens": 0}, InputError, "max_question_tokens: expected at least 1, got 0"),
    ({"stride": -1}, InputError, "stride: expected at least 0, got -1"),
    ({"stride": 254}, InputError, "stride: expected less than max_passage_tokens=254, got 254"),
    ({"length_penalty": np.nan}, InputError, "length_penalty: expected a finite number"),
    ({"length_penalty": np.inf}, InputError, "length_penalty: expected a finite number"),
    ({"no_answer_threshold": np.nan}, InputError, "no_answer_threshold: expected a number"),
    ({"beams": 3}, TypeError, "answer: unexpected keyword beams; expected beam_size"),
    ({"passage_weights": [1, 1, 1]}, InputError, "passage_weights: expected .* none otherwise"),
    ({"vote": "weighted"}, InputError, "passage_weights: expected one per passage"),
    ({"vote": "weighted", "passage_weights": [1]}, InputError, "one passage weight per passage, 3"),
    ({"vote": "weighted", "passage_weights": [1, 1, -1]}, InputError, "passage weights >= 0"),
    ({"vote": "weighted", "passage_weights": [1, 1, np.nan]}, InputError, "passage weights >= 0"),
    ({"vote": "weighted", "passage_weights": [1, 1, np.inf]}, InputError, "passage weights >= 0"),
    ({"constraint": "北京"}, TypeError, "constraints: expected a fastmrc.SpanIndex or Trie"),
    ({"constraint": ["北京"]}, TypeError, "constraints: expected a fastmrc.SpanIndex or Trie"),
    ({"constraint": fastmrc.Trie([[3]])}, ValueError, "constraint: expected no end token 3"),
    ({"constraint": fastmrc.Trie([[10**6]])}, ValueError, "constraint: expected tokens below"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options(
    reader: Seq2SeqReader, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reader.answer(QUESTION, PASSAGES, **options)


@pytest.mark.parametrize(
    ("question", "passages", "error", "message"),
    [
        (None, PASSAGES, TypeError, "question: expected a string, got NoneType"),
        (b"a", PASSAGES, TypeError, "question: expected a string, got bytes"),
        (QUESTION, "北京", TypeError, "question: expected a list of passages, got str"),
        (QUESTION, None, TypeError, "question: expected a list of passages, got NoneType"),
        (QUESTION, [None], TypeError, r"question: expected passages\[0\] to be a string"),
        (QUESTION, ["北", 3], TypeError, r"passages\[1\] to be a string, got int"),
        (QUESTION, ["\ud800"], InputError, "passages: expected text that UTF-8 can encode"),
        ("\ud800", PASSAGES, InputError, "question: expected text that UTF-8 can encode"),
    ],
)
def test_bad_texts(
    reader: Seq2SeqReader, question: Any, passages: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reader.answer(question, passages)


@pytest.mark.parametrize("pair", ["问答", (QUESTION,), (QUESTION, PASSAGES, 1), None, 7])
def test_bad_pairs(reader: Seq2SeqReader, pair: Any) -> None:
    with pytest.raises(
        TypeError, match=r"questions\[1\]: expected a pair of question and passages"
    ):
        reader.answer_batch([(QUESTION, PASSAGES), pair])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passage_weights": [[1.0] * 3]}, "passage_weights: expected one per question, 2, got 1"),
        ({"constraints": [None]}, "constraints: expected one per question, 2, got 1"),
    ],
)
def test_bad_batches(reader: Seq2SeqReader, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        reader.answer_batch([(QUESTION, PASSAGES)] * 2, vote="weighted", **options)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN in row 0"), (-np.inf, "only -inf in row 0")]
)
def test_a_model_that_breaks(
    reader: Seq2SeqReader, monkeypatch: pytest.MonkeyPatch, value: float, message: str
) -> None:
    logits = UniLMEncoder.logits
    monkeypatch.setattr(UniLMEncoder, "logits", lambda *args: torch.full_like(logits(*args), value))
    with pytest.raises(ValueError, match=message):
        reader.answer(QUESTION, PASSAGES)


def test_an_error_leaves_the_reader_usable(reader: Seq2SeqReader) -> None:
    before = reader.answer(QUESTION, PASSAGES)
    for options, error, _ in BAD_OPTIONS:
        with pytest.raises(error):
            reader.answer(QUESTION, PASSAGES, **options)
    assert_same(reader.answer(QUESTION, PASSAGES), before, tolerance=0)


def test_inputs_are_not_modified(reader: Seq2SeqReader) -> None:
    passages, weights = list(PASSAGES), [1.0, 2.0, 3.0]
    reader.answer(QUESTION, passages, vote="weighted", passage_weights=weights)
    assert (passages, weights) == (PASSAGES, [1.0, 2.0, 3.0])
    reader.answer(QUESTION, tuple(PASSAGES), vote="weighted", passage_weights=np.ones(3))
