"""The reader by start and end heads: engine against oracle, hand-made heads, the pipeline's way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    BERT_TOKENS,
    PASSAGES,
    QUESTION_BATCHES,
    QUESTIONS,
    VOTES,
    WORDS,
    assert_same_answer,
    cut,
    draw_weights,
    random_cases,
    save_model,
    without_seconds,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import fastmrc
from fastmrc import Answer, InputError, Span, SpanReader, UnsupportedModelError, reference
from fastmrc.integrations.transformers import pipeline
from fastmrc.pretrained import LoadedModel, load_model

QUESTION = "北京在哪里?"
SOME = ["中国北京在二月天气大", "上海New York山水,火。北京", "人名"]
LONG = "New York,上海 newing the 2024年" * 12

pytestmark = pytest.mark.usefixtures("one_thread")


def load_qa(directory: Path) -> LoadedModel:
    return load_model(directory, task="question-answering", attention=None)


@pytest.fixture(scope="module")
def tiny(bert_qa_dir: Path) -> LoadedModel:
    return load_qa(bert_qa_dir)


@pytest.fixture(scope="module")
def reader(tiny: LoadedModel) -> SpanReader:
    return SpanReader(tiny)


@pytest.fixture(scope="module")
def oracle(tiny: LoadedModel) -> reference.SpanReader:
    return reference.SpanReader(tiny)


# --- engine against oracle -----------------------------------------------------------------------


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, Any]:
    """Any options but the weights, which need to know the passages."""
    size = draw(st.integers(1, 12) | st.just(320))
    return {
        "vote": draw(st.sampled_from(VOTES)),
        "top_k": draw(st.integers(1, 4)),
        "align_to_words": draw(st.booleans()),
        "handle_impossible_answer": draw(st.booleans()),
        "null_score_diff_threshold": draw(st.sampled_from([0.0, -2.0, 2.0])),
        "max_answer_tokens": draw(st.integers(1, 8)),
        "max_passage_tokens": size,
        "stride": draw(st.none() | st.integers(0, min(size, 12) - 1)),
        "max_question_tokens": draw(st.integers(1, 63)),
        "no_answer_threshold": draw(st.none() | st.floats(0, 0.05)),
    }


@random_cases(60)
@given(questions=QUESTION_BATCHES, options=option_sets(), data=st.data())
def test_engine_equals_oracle(
    reader: SpanReader,
    oracle: reference.SpanReader,
    questions: list[tuple[str, list[str]]],
    options: dict[str, Any],
    data: st.DataObject,
) -> None:
    if options["vote"] == "weighted":
        options["passage_weights"] = draw_weights(data, questions)
    ours = reader.answer_batch(questions, **options)
    theirs = oracle.answer_batch(questions, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_answer(a, b)


@random_cases(25)
@given(questions=QUESTION_BATCHES)
def test_batch_equals_singles(reader: SpanReader, questions: list[tuple[str, list[str]]]) -> None:
    options: dict[str, Any] = {"top_k": 2, "max_passage_tokens": 6, "stride": 2}
    together = reader.answer_batch(iter(questions), **options)
    for answer, (question, passages) in zip(together, questions, strict=True):
        assert_same_answer(answer, reader.answer(question, passages, **options))


@random_cases(25)
@given(question=QUESTIONS, passages=PASSAGES, align=st.booleans())
def test_answers_are_pieces_of_the_passages(
    reader: SpanReader, question: str, passages: list[str], align: bool
) -> None:
    answer = reader.answer(question, passages, top_k=3, align_to_words=align)
    assert bool(answer.text) == any(passage.strip() for passage in passages)
    for candidate in answer.candidates:
        assert candidate.text == cut(candidate, passages)[0]
        assert candidate.spans == sorted(candidate.spans, key=lambda s: (s.passage, s.start))


def test_every_family_equals_the_oracle(qa_dir: Path) -> None:
    ours, theirs = SpanReader.from_pretrained(qa_dir), reference.SpanReader.from_pretrained(qa_dir)
    questions = [(QUESTION, SOME), ("何月?", ["北", "二月,三月New York" * 5, ""])]
    for options in (
        {"top_k": 3},
        {"max_passage_tokens": 9, "stride": 4, "handle_impossible_answer": True},
    ):
        for a, b in zip(
            ours.answer_batch(questions, **options),
            theirs.answer_batch(questions, **options),
            strict=True,
        ):
            assert_same_answer(a, b)
            assert a.no_answer_score
    for keywords in ({"top_k": 4}, {"max_seq_len": 24, "doc_stride": 3, "top_k": 2}):
        assert_same_results(
            ours(question=QUESTION, context=LONG[:60], **keywords),
            theirs(question=QUESTION, context=LONG[:60], **keywords),
        )


def assert_same_results(ours: Any, theirs: Any) -> None:
    """Results of the pipeline's way; scores within 1e-6."""
    if isinstance(theirs, list):
        assert isinstance(ours, list) and len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_results(a, b)
        return
    assert ours == theirs | {"score": pytest.approx(theirs["score"], abs=1e-6)}


def test_two_threads_at_once(reader: SpanReader) -> None:
    questions = [f"{word}?" for word in "谁何哪里时间名字北京"]
    want = [reader.answer(question, SOME, top_k=2) for question in questions]
    barrier = threading.Barrier(2)

    def work(order: int) -> list[Answer]:
        barrier.wait()
        return [reader.answer(q, SOME, top_k=2) for q in questions[::order]][::order]

    with ThreadPoolExecutor(2) as pool:
        for answers in pool.map(work, (1, -1)):
            for a, b in zip(answers, want, strict=True):
                assert_same_answer(a, b)


def test_timings_and_progress(
    reader: SpanReader, oracle: reference.SpanReader, capsys: pytest.CaptureFixture[str]
) -> None:
    for one in (reader, oracle):
        for answer in one.answer_batch([(QUESTION, SOME)] * 2):
            seconds = answer.timings
            assert min(seconds.tokenise, seconds.encode, seconds.decode) > 0
        one(question=QUESTION, context=SOME[0])
        assert capsys.readouterr().err == ""
        one.answer_batch([(QUESTION, SOME)] * 2, progress=True)
        assert "6/6" in capsys.readouterr().err


# --- models --------------------------------------------------------------------------------------


def test_token_types_are_given_where_the_tokenizer_names_them(
    bert_qa_dir: Path, bert_qa_without_types_dir: Path
) -> None:
    """The same weights, which tell the types apart."""
    one, other = load_qa(bert_qa_dir), load_qa(bert_qa_without_types_dir)
    for (_, a), (_, b) in zip(
        one.model.named_parameters(), other.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b)
    with_types, without = SpanReader(one), SpanReader(other)
    text = {"question": QUESTION, "context": SOME[0]}
    assert with_types(**text)["score"] != pytest.approx(without(**text)["score"], rel=1e-3)
    for loaded, ours in ((one, with_types), (other, without)):
        assert_same_results(ours(**text), pipeline_until_5_2(loaded, QUESTION, SOME[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(bert_qa_dir: Path, dtype: str) -> None:
    reader = SpanReader.from_pretrained(bert_qa_dir, dtype=dtype)
    assert {str(p.dtype) for p in reader._loaded.model.parameters()} == {f"torch.{dtype}"}
    answer = reader.answer(QUESTION, SOME)
    assert answer.text in cut(answer, SOME)


def test_positions_of_roberta_begin_after_the_padding(roberta_qa_dir: Path) -> None:
    """514 positions hold 512 tokens: here 4 special ones, 1 of the question, and the passage."""
    reader = SpanReader.from_pretrained(roberta_qa_dir)
    assert reader.answer("谁", ["山" * 600], max_passage_tokens=507).text
    with pytest.raises(InputError, match="at most 512 tokens, the positions .* got 513"):
        reader.answer("谁", ["山" * 600], max_passage_tokens=508)
    assert reader(question="谁", context="山" * 600, max_seq_len=512)["answer"]
    with pytest.raises(
        InputError, match="max_seq_len: expected at most 512, the positions .* got 513"
    ):
        reader(question="谁", context="山" * 600, max_seq_len=513)


def test_no_model_comes_with_the_package() -> None:
    for kind in (SpanReader, reference.SpanReader):
        with pytest.raises(
            InputError, match="expected a directory or hub id, as no question-answering model comes"
        ):
            kind.from_pretrained()


def test_masked_language_model(tiny_bert_dir: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match="no trained question-answering model: .* missing.*qa_outputs"
    ):
        SpanReader.from_pretrained(tiny_bert_dir)


def test_model_without_heads(tiny: LoadedModel, tiny_bert_dir: Path) -> None:
    masked = load_model(tiny_bert_dir)
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM gives no start and end"):
        SpanReader(masked)

    class Short(Heads):
        def __call__(self, **inputs: Any) -> Any:
            output = super().__call__(**inputs)
            output.end_logits = output.end_logits[:, 1:]
            return output

    with pytest.raises(UnsupportedModelError, match=r"got shapes \(1, 6\) and \(1, 5\) for 6"):
        SpanReader(replace(tiny, model=Short(tiny, {})))


def test_weights_with_nan(bert_qa_dir: Path) -> None:
    loaded = load_qa(bert_qa_dir)
    model: Any = loaded.model
    with torch.no_grad():
        model.qa_outputs.bias[1] = np.nan
    for one in (SpanReader(loaded), reference.SpanReader(loaded)):
        with pytest.raises(ValueError, match="end: .*NaN"):
            one.answer(QUESTION, SOME)
        with pytest.raises(ValueError, match="end: .*NaN"):
            one(question=QUESTION, context=SOME[0])


def test_the_model_is_not_changed(bert_qa_dir: Path) -> None:
    loaded = load_qa(bert_qa_dir)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    SpanReader(loaded).answer(QUESTION, SOME)
    after = loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


# --- heads by hand -------------------------------------------------------------------------------

Shares = Sequence[float]  # probability of [CLS], then of each token of the text


def result(score: float, start: int, end: int, answer: str, **passage: int) -> dict[str, Any]:
    """What a call of the reader returns for one answer."""
    return {"score": close(score), "start": start, "end": end, "answer": answer} | passage


class Heads:
    """A model whose heads give the probabilities that are set down for each text.

    What no softmax may look at, question, [SEP] and padding, is NaN.
    """

    def __init__(self, loaded: LoadedModel, shares: Mapping[str, tuple[Shares, Shares]]) -> None:
        tokenizer: Any = loaded.tokenizer
        self._shares = {
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]): own
            for text, own in shares.items()
        }
        self._sep = tokenizer.sep_token_id
        self.config = SimpleNamespace(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            max_position_embeddings=512,
            model_type="bert",
        )
        self.device = torch.device("cpu")
        self.training = False

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> Any:
        start, end = torch.full((2, *input_ids.shape), np.nan, dtype=torch.float64)
        for row, (ids, length) in enumerate(
            zip(input_ids.tolist(), attention_mask.sum(dim=1).tolist(), strict=True)
        ):
            text_at = ids.index(self._sep) + 1 if self._sep in ids else 1
            text = tuple(ids[text_at : length - 1])
            if text in self._shares:
                for logits, shares in zip((start, end), self._shares[text], strict=True):
                    assert sum(shares) == pytest.approx(1.0)
                    assert len(shares) == 1 + len(text)
                    logs = torch.tensor(shares, dtype=torch.float64).log()
                    logits[row, 0], logits[row, text_at : length - 1] = logs[0], logs[1:]
        return SimpleNamespace(start_logits=start.float(), end_logits=end.float())


class ByHand:
    """Engine and oracle on the same heads; they must answer alike."""

    def __init__(self, loaded: LoadedModel, **shares: tuple[Shares, Shares]) -> None:
        model: Any = Heads(loaded, shares)
        self._readers = [
            kind(replace(loaded, model=model)) for kind in (SpanReader, reference.SpanReader)
        ]

    def answer(self, *passages: str, **options: Any) -> Answer:
        ours, theirs = (one.answer(QUESTION, passages, **options) for one in self._readers)
        assert_same_answer(ours, theirs)
        return ours

    def __call__(self, context: Any, **keywords: Any) -> Any:
        ours, theirs = (one(question="谁", context=context, **keywords) for one in self._readers)
        assert_same_results(ours, theirs)
        return ours


def vote(*scores: float) -> float:
    return sum(s * s for s in scores) / (1.0 + sum(scores))


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-5)


# The best spans: 北京 0.42, 上海 0.12, 北京上海 0.12 (the earlier start first).
CITIES: tuple[Shares, Shares] = ((0.1, 0.6, 0.0, 0.3, 0.0), (0.1, 0.0, 0.7, 0.0, 0.2))
TWO_CITIES = {"北京上海": CITIES}


def test_score_is_the_product_of_start_and_end(tiny: LoadedModel) -> None:
    one = ByHand(tiny, 北京上海=CITIES)
    answer = one.answer("北京上海")
    assert (answer.text, answer.spans) == ("北京", [Span(0, 0, 2)])
    assert answer.score == close(vote(0.42))
    assert answer.no_answer_score == close(0.01)
    assert len(answer.candidates) == 1
    # Widened to words, which Chinese characters are, nothing changes.
    several = one.answer("北京上海", top_k=9)
    assert [(c.text, c.score) for c in several.candidates] == [
        ("北京", close(vote(0.42))),
        ("北京上海", close(vote(0.12))),
        ("上海", close(vote(0.06))),
    ]
    assert [c.text for c in one.answer("北京上海", top_k=2).candidates] == ["北京", "北京上海"]


def test_longest_answer(tiny: LoadedModel) -> None:
    one = ByHand(tiny, 北京上海=((0.1, 0.6, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1, 0.6)))
    assert one.answer("北京上海").text == "北京上海"
    assert one.answer("北京上海", max_answer_tokens=4).text == "北京上海"
    assert one.answer("北京上海", max_answer_tokens=3).text != "北京上海"
    assert one.answer("北京上海", max_answer_tokens=1).text in ("北", "海")


def test_span_in_two_windows_counts_once(tiny: LoadedModel) -> None:
    """With its best score: 三四 is 0.3 in the first window and 0.2 in the second."""
    one = ByHand(
        tiny,
        一二三四=((0.1, 0.3, 0.0, 0.6, 0.0), (0.2, 0.0, 0.3, 0.0, 0.5)),
        三四五六=((0.3, 0.4, 0.0, 0.3, 0.0), (0.1, 0.0, 0.5, 0.0, 0.4)),
    )
    options: dict[str, Any] = {"max_passage_tokens": 4, "stride": 2}
    answer = one.answer("一二三四五六", **options)
    assert (answer.text, answer.spans) == ("三四", [Span(0, 2, 4)])
    assert answer.score == close(vote(0.3))
    assert answer.no_answer_score == close(0.02)
    three = one.answer("一二三四五六", top_k=3, **options)
    # 0.15 for 一二三四, as its start is 0.3 and its end 0.5.
    assert [(c.text, c.score) for c in three.candidates] == [
        ("三四", close(vote(0.3))),
        ("三四五六", close(vote(0.16))),
        ("一二三四", close(vote(0.15))),
    ]
    first_only = one.answer("一二三四五六", max_passage_tokens=4, stride=None, top_k=9)
    assert first_only.no_answer_score == close(0.02)
    assert all("五" not in c.text for c in first_only.candidates)
    mean = one.answer("一二三四五六", vote="mean", **options)
    assert mean.score == close(0.3)


def test_spans_that_align_to_the_same_words_add_up(tiny: LoadedModel) -> None:
    """The tokens are new and ##ing: 0.3 for the first, 0.18 for both, 0.09 for the last."""
    one = ByHand(tiny, newing=((0.1, 0.6, 0.3), (0.2, 0.5, 0.3)))
    answer = one.answer("newing")
    assert (answer.text, answer.spans) == ("newing", [Span(0, 0, 6)])
    assert answer.score == close(vote(0.57))
    apart = one.answer("newing", align_to_words=False, top_k=3)
    assert [(c.text, c.score) for c in apart.candidates] == [
        ("new", close(vote(0.3))),
        ("newing", close(vote(0.18))),
        ("ing", close(vote(0.09))),
    ]


def test_aligned_spans_of_two_windows_do_not_add_up(tiny: LoadedModel) -> None:
    """Within a window they do: 0.57 in the first, 0.4 in the second."""
    one = ByHand(
        tiny,
        **{
            "北newing": ((0.1, 0.0, 0.6, 0.3), (0.2, 0.0, 0.5, 0.3)),
            "newing京": ((0.5, 0.5, 0.0, 0.0), (0.2, 0.4, 0.4, 0.0)),
        },
    )
    answer = one.answer("北newing京", max_passage_tokens=3, stride=2)
    assert (answer.text, answer.score) == ("newing", close(vote(0.57)))
    assert len(answer.candidates) == 1


def test_word_that_a_window_cuts(tiny: LoadedModel) -> None:
    """A span is widened as far as the window goes."""
    one = ByHand(
        tiny,
        **{
            "北new": ((0.1, 0.1, 0.8), (0.1, 0.1, 0.8)),
            "##ing": ((0.9, 0.1), (0.9, 0.1)),
        },
    )
    answer = one.answer("北newing", max_passage_tokens=2, stride=None)
    assert (answer.text, answer.spans) == ("new", [Span(0, 1, 4)])


NULL = {
    "人": ((0.6, 0.4), (0.6, 0.4)),  # 0.36 for no answer, 0.16 for 人
    "北": ((0.4, 0.6), (0.5, 0.5)),  # 0.2 and 0.3
    "京北": ((0.8, 0.1, 0.1), (0.7, 0.1, 0.2)),  # 0.56; the best span has 0.02
}


def test_passage_without_an_answer_leaves(tiny: LoadedModel) -> None:
    one = ByHand(tiny, **NULL)
    stays = one.answer(*NULL)
    assert [c.text for c in stays.candidates] == ["北", "人", "京北"]
    assert stays.candidates[0].spans == [Span(1, 0, 1), Span(2, 1, 2)]
    answer = one.answer(*NULL, handle_impossible_answer=True)
    assert [(c.text, c.score) for c in answer.candidates] == [("北", close(vote(0.3)))]
    assert answer.spans == [Span(1, 0, 1)]
    assert answer.no_answer_score == stays.no_answer_score == close(0.2)
    # It counts as a voter that did not give the answer.
    mean = one.answer(*NULL, handle_impossible_answer=True, vote="mean")
    assert mean.score == close(0.3 / 3)


def test_threshold_of_no_answer(tiny: LoadedModel) -> None:
    """No answer is by log(0.36 / 0.16) = 0.81 more likely than 人, by -0.41 than 北."""
    one = ByHand(tiny, **NULL)
    for bar, texts in (
        (-9.0, []),
        (-0.42, []),
        (-0.4, ["北"]),
        (0.8, ["北"]),
        (0.82, ["北", "人"]),
        (9.0, ["北", "人"]),
        (np.inf, ["北", "人"]),
        (-np.inf, []),
    ):
        answer = one.answer(
            "人", "北", handle_impossible_answer=True, null_score_diff_threshold=bar
        )
        assert [c.text for c in answer.candidates] == texts
        ignored = one.answer("人", "北", null_score_diff_threshold=bar)
        assert [c.text for c in ignored.candidates] == ["北", "人"]


def test_no_passage_is_left(tiny: LoadedModel) -> None:
    one = ByHand(tiny, **NULL)
    answer = one.answer("京北", "人", handle_impossible_answer=True)
    assert without_seconds(answer) == Answer(no_answer_score=close(0.36))


def test_smallest_no_answer_score_of_the_windows_decides(tiny: LoadedModel) -> None:
    """One window says 0.72 for no answer, the other, which holds the answer, 0.2."""
    one = ByHand(
        tiny, 人上=((0.9, 0.1, 0.0), (0.8, 0.1, 0.1)), 北京=((0.4, 0.6, 0.0), (0.5, 0.0, 0.5))
    )
    answer = one.answer("人上北京", handle_impossible_answer=True, max_passage_tokens=2, stride=0)
    assert (answer.text, answer.no_answer_score) == ("北京", close(0.2))


def test_certain_and_impossible_spans(tiny: LoadedModel) -> None:
    """Probabilities of 0 and 1 have logarithms here."""
    one = ByHand(tiny, 北=((0.0, 1.0), (0.0, 1.0)), 人=((1.0, 0.0), (1.0, 0.0)))
    answer = one.answer("人", "北", handle_impossible_answer=True)
    assert (answer.text, answer.score) == ("北", close(0.5))
    assert answer.no_answer_score == 0.0
    nothing = one.answer("人")
    assert without_seconds(nothing) == Answer(no_answer_score=1.0)


# The probability of an answer, all at its first token.
VOTERS = {
    "北京": ((0.4, 0.6, 0.0), (0.0, 1.0, 0.0)),
    "上海": ((0.2, 0.8, 0.0), (0.0, 1.0, 0.0)),
    "北": ((0.5, 0.5), (0.0, 1.0)),
    "人": ((0.9, 0.1), (0.0, 1.0)),
}
EPS = 1e-12


@pytest.mark.parametrize(
    ("options", "of_north", "of_sea"),
    [
        ({}, (0.36 + 0.25) / 2.1, 0.64 / 1.8),
        ({"vote": "mean"}, 1.1 / 4, 0.8 / 4),
        ({"vote": "max"}, 0.6, 0.8),
        ({"vote": "product"}, (0.6 * 0.5 * EPS**2) ** 0.25, (0.8 * EPS**3) ** 0.25),
        (
            {"vote": "weighted", "passage_weights": [2.0, 0.5, 1.0, 0.0, 9.0]},
            (2 * 0.36 + 0.25) / (1 + 2 * 0.6 + 0.5),
            0.5 * 0.64 / (1 + 0.5 * 0.8),
        ),
    ],
    ids=lambda value: value.get("vote", "original") if isinstance(value, dict) else "",
)
def test_votes(tiny: LoadedModel, options: dict[str, Any], of_north: float, of_sea: float) -> None:
    """Passages without a token, here the last one, are no voters."""
    one = ByHand(tiny, **VOTERS)
    answer = one.answer(*VOTERS, " ", **options)
    found = {candidate.text: candidate.score for candidate in answer.candidates}
    assert (found["北"], found["上"]) == (close(of_north), close(of_sea))
    assert list(found)[:2] == (["北", "上"] if of_north > of_sea else ["上", "北"])
    assert answer.spans == answer.candidates[0].spans
    north = next(c for c in answer.candidates if c.text == "北")
    assert north.spans == [Span(0, 0, 1), Span(2, 0, 1)]


def test_ties_go_to_the_first_passage(tiny: LoadedModel) -> None:
    same = ((0.5, 0.5), (0.5, 0.5))
    one = ByHand(tiny, 火=same, 北=same, 上=same)
    for order in ("火北上", "上北火", "北火上"):
        answer = one.answer(*order)
        assert [candidate.text for candidate in answer.candidates] == list(order)


def test_best_answers_of_each_passage_vote(tiny: LoadedModel) -> None:
    one = ByHand(
        tiny,
        北京=((0.0, 0.55, 0.45), (0.0, 0.5, 0.5)),
        京天=((0.0, 0.4, 0.6), (0.0, 0.5, 0.5)),
    )
    first = one.answer("北京", "京天", max_answer_tokens=1)
    assert [(c.text, c.score) for c in first.candidates] == [
        ("天", close(vote(0.3))),
        ("北", close(vote(0.275))),
    ]
    both = one.answer("北京", "京天", max_answer_tokens=1, top_k=2)
    assert [(c.text, c.score) for c in both.candidates] == [
        ("天", close(vote(0.3))),
        ("京", close(vote(0.225, 0.2))),
        ("北", close(vote(0.275))),
    ]


def test_text_that_stands_twice_in_a_passage_votes_once(tiny: LoadedModel) -> None:
    """With the score of its best place."""
    one = ByHand(tiny, 北京北=((0.0, 0.4, 0.0, 0.6), (0.0, 0.5, 0.0, 0.5)), 北=((0.5, 0.5),) * 2)
    for order in (["北京北", "北"], ["北", "北京北"]):
        answer = one.answer(*order, top_k=3, max_answer_tokens=1)
        assert [(c.text, c.score) for c in answer.candidates] == [("北", close(vote(0.3, 0.25)))]
        assert len(answer.spans) == 3
    # Only the best places of a passage are answers.
    first = one.answer("北京北", top_k=1, max_answer_tokens=3)
    assert [c.text for c in first.candidates] == ["北"]
    assert [c.text for c in one.answer("北京北", top_k=2).candidates] == ["北"]
    assert [c.text for c in one.answer("北京北", top_k=3).candidates] == ["北", "北京北"]


def test_no_answer_threshold(tiny: LoadedModel) -> None:
    one = ByHand(tiny, **NULL)
    score = one.answer("北").score
    kept = one.answer("北", no_answer_threshold=score)
    assert kept.text == "北"
    empty = one.answer("北", no_answer_threshold=score + 1e-4)
    assert (empty.text, empty.score, empty.spans) == ("", 0.0, [])
    assert empty.candidates == kept.candidates
    assert empty.no_answer_score == kept.no_answer_score


def test_unknown_characters_are_those_of_the_place(tiny: LoadedModel) -> None:
    """The tokens of 山😀 and 山🎉 are the same, the texts are not; the second stands for itself."""
    one = ByHand(
        tiny,
        **{
            "山😀山🎉": ((0.0, 0.2, 0.0, 0.8, 0.0), (0.0, 0.0, 0.2, 0.0, 0.8)),
            "山😀": ((0.4, 0.6, 0.0), (0.0, 0.0, 1.0)),
        },
    )
    answer = one.answer("山😀山🎉", "山😀")
    assert [(c.text, c.score, c.spans) for c in answer.candidates] == [
        ("山🎉", close(vote(0.64)), [Span(0, 2, 4)]),
        ("山😀", close(vote(0.6)), [Span(0, 0, 2), Span(1, 0, 2)]),
    ]


def test_tokenizer_that_puts_cls_behind(tmp_path: Path) -> None:
    """Then no position before the passage stands for no answer."""
    directory = save_model(
        tmp_path, "BertForQuestionAnswering", BERT_TOKENS, pair="$A [SEP] $B:1 [SEP]:1 [CLS]:1"
    )
    ours, theirs = (kind.from_pretrained(directory) for kind in (SpanReader, reference.SpanReader))
    for options in ({}, {"handle_impossible_answer": True, "null_score_diff_threshold": -99.0}):
        answer = ours.answer(QUESTION, SOME, **options)
        assert_same_answer(answer, theirs.answer(QUESTION, SOME, **options))
        assert answer.text
        assert answer.no_answer_score is None
    found = ours(question="谁", context="北京", top_k=9, handle_impossible_answer=True)
    assert found[-1] == result(0.0, 0, 0, "")


# --- bad input to answer -------------------------------------------------------------------------


@pytest.mark.parametrize("passages", [[], [""], ["", " \n"], ["\u200b"]])
def test_no_passages(reader: SpanReader, oracle: reference.SpanReader, passages: list[str]) -> None:
    for one in (reader, oracle):
        for options in ({}, {"handle_impossible_answer": True}):
            assert without_seconds(one.answer(QUESTION, passages, **options)) == Answer()


def test_texts_longer_than_the_limits(reader: SpanReader) -> None:
    """Windows of 320 tokens that share 128; 63 tokens of the question."""
    long = LONG * 3
    assert_same_answer(
        reader.answer("中" * 500, [long], top_k=3),
        reader.answer("中" * 63, [long], top_k=3, max_passage_tokens=320, stride=128),
    )
    assert_same_answer(
        reader.answer(QUESTION, [long], top_k=3, max_passage_tokens=100),
        reader.answer(QUESTION, [long], top_k=3, max_passage_tokens=100, stride=50),
    )
    assert_same_answer(
        reader.answer("中国北京", SOME, max_question_tokens=2), reader.answer("中国", SOME)
    )


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"top_k": 0}, InputError, "top_k: expected at least 1, got 0"),
    ({"top_k": None}, InputError, "top_k: expected an integer, got NoneType"),
    ({"vote": "median"}, InputError, "vote: expected one of original, mean.*got 'median'"),
    ({"max_answer_tokens": 0}, InputError, "max_answer_tokens: expected at least 1, got 0"),
    ({"max_passage_tokens": 0}, InputError, "max_passage_tokens: expected at least 1, got 0"),
    ({"max_question_tokens": 0}, InputError, "max_question_tokens: expected at least 1, got 0"),
    ({"stride": -1}, InputError, "stride: expected at least 0, got -1"),
    ({"stride": 320}, InputError, "stride: expected less than max_passage_tokens=320, got 320"),
    ({"null_score_diff_threshold": np.nan}, InputError, "null_score_diff_threshold: expected a"),
    ({"no_answer_threshold": np.nan}, InputError, "no_answer_threshold: expected a number"),
    (
        {"decoding": "exact", "beam_size": 2},
        TypeError,
        "answer: unexpected keyword beam_size, decoding; expected align_to_words, handle_imp",
    ),
    ({"min_answer_tokens": 1}, TypeError, "answer: unexpected keyword min_answer_tokens"),
    ({"passage_weights": [1, 1, 1]}, InputError, "passage_weights: expected .* none otherwise"),
    ({"vote": "weighted"}, InputError, "passage_weights: expected one per passage"),
    ({"constraint": fastmrc.Trie([[5]])}, InputError, "constraint: expected none, as spans are"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options(
    reader: SpanReader, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reader.answer(QUESTION, SOME, **options)


@pytest.mark.parametrize(
    ("question", "passages", "error", "message"),
    [
        ("", SOME, InputError, "question: expected a question, got empty text"),
        (None, SOME, TypeError, "question: expected a string, got NoneType"),
        (QUESTION, "北京", TypeError, "question: expected a list of passages, got str"),
        (QUESTION, ["\ud800"], InputError, "passages: expected text that UTF-8 can encode"),
    ],
)
def test_bad_texts(
    reader: SpanReader, question: Any, passages: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reader.answer(question, passages)


def test_constraint_of_one_question_of_several(reader: SpanReader) -> None:
    with pytest.raises(InputError, match="constraint: expected none"):
        reader.answer_batch([(QUESTION, SOME)] * 2, constraints=[None, fastmrc.Trie([[5]])])
    assert len(reader.answer_batch([(QUESTION, SOME)] * 2, constraints=[None, None])) == 2
    assert reader.answer_batch([]) == []


# --- in the way of the pipeline ------------------------------------------------------------------


@torch.inference_mode()
def pipeline_until_5_2(
    loaded: LoadedModel,
    question: str,
    context: str,
    *,
    top_k: int = 1,
    doc_stride: int = 128,
    max_answer_len: int = 15,
    max_seq_len: int = 384,
    handle_impossible_answer: bool = False,
    align_to_words: bool = True,
) -> Any:
    """The pipeline of transformers 5.2, cut down to fast tokenizers with right-hand padding.

    Where fewer spans than `top_k` are possible it filled up with spans of probability 0, which
    are left out here.
    """
    tokenizer: Any = loaded.tokenizer
    model: Any = loaded.model
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_seq_len,
        stride=doc_stride,
        return_overflowing_tokens=True,
    )
    answers: list[dict[str, Any]] = []
    min_null_score = 1000000.0
    for one in encoded.encodings:
        inputs = {"input_ids": one.ids, "attention_mask": one.attention_mask}
        if "token_type_ids" in tokenizer.model_input_names:
            inputs["token_type_ids"] = one.type_ids
        output = model(**{name: torch.tensor([value]) for name, value in inputs.items()})
        in_context = np.array([owner == 1 for owner in one.sequence_ids])
        counted = in_context | (np.array(one.ids) == tokenizer.cls_token_id)
        start, end = (
            softmax(np.where(counted, logits[0].double().numpy(), -10000.0))
            for logits in (output.start_logits, output.end_logits)
        )
        min_null_score = min(min_null_score, start[0] * end[0])
        start[0] = end[0] = 0.0
        table = np.tril(np.triu(np.outer(start, end)), max_answer_len - 1)
        best = np.argsort(-table.ravel(), kind="stable")
        for place in best[: top_k * 2 + 10 if align_to_words else top_k]:
            s, e = np.unravel_index(place, table.shape)
            if not (in_context[s] and in_context[e] and table[s, e] > 0):
                continue
            if align_to_words:
                a = one.word_to_chars(one.token_to_word(int(s)), 1)[0]
                b = one.word_to_chars(one.token_to_word(int(e)), 1)[1]
            else:
                a, b = one.offsets[s][0], one.offsets[e][1]
            text = context[a:b]
            for answer in answers:
                if answer["answer"].lower() == text.lower():
                    answer["score"] += float(table[s, e])
                    break
            else:
                answers.append({"score": float(table[s, e]), "start": a, "end": b, "answer": text})
    if handle_impossible_answer:
        answers.append({"score": float(min_null_score), "start": 0, "end": 0, "answer": ""})
    answers = sorted(answers, key=lambda answer: -answer["score"])[:top_k]
    return answers[0] if len(answers) == 1 else answers


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shares = np.exp(logits - logits.max())
    return np.asarray(shares / shares.sum())


CONTEXTS = (
    st.lists(st.sampled_from([word for word in WORDS if "[" not in word]), min_size=1, max_size=24)
    .map(" ".join)
    .filter(str.strip)
)


@random_cases(50)
@given(
    question=st.sampled_from(["谁", "New York?", "北京在哪里"]),
    context=CONTEXTS,
    room=st.integers(4, 30),
    shared=st.integers(0, 3),
    keywords=st.fixed_dictionaries(
        {},
        optional={
            "top_k": st.integers(1, 6),
            "max_answer_len": st.integers(1, 9),
            "handle_impossible_answer": st.booleans(),
            "align_to_words": st.booleans(),
        },
    ),
)
def test_equals_the_removed_pipeline(
    reader: SpanReader,
    tiny: LoadedModel,
    question: str,
    context: str,
    room: int,
    shared: int,
    keywords: dict[str, Any],
) -> None:
    special_and_question = 3 + len(reader._codec.encode_question(question))
    keywords |= {"max_seq_len": special_and_question + room, "doc_stride": shared}
    assert_same_results(
        reader(question=question, context=context, **keywords),
        pipeline_until_5_2(tiny, question, context, **keywords),
    )


def test_every_family_equals_the_removed_pipeline(qa_dir: Path) -> None:
    loaded = load_qa(qa_dir)
    ours = SpanReader(loaded)
    for keywords in ({}, {"top_k": 5}, {"top_k": 3, "max_seq_len": 60, "doc_stride": 20}):
        assert_same_results(
            ours(question=QUESTION, context=LONG, **keywords),
            pipeline_until_5_2(loaded, QUESTION, LONG, **keywords),
        )


def test_defaults_of_the_pipeline(reader: SpanReader, tiny: LoadedModel) -> None:
    """Windows of 384 tokens that share 128, or half of a smaller window; 15 tokens an answer."""
    long = LONG * 3
    keywords: dict[str, Any] = {"question": QUESTION, "context": long, "top_k": 3}
    explicit = {"max_seq_len": 384, "doc_stride": 128, "max_answer_len": 15}
    assert reader(**keywords) == reader(**keywords, **explicit)
    assert reader(**keywords, max_seq_len=60) == reader(**keywords, max_seq_len=60, doc_stride=30)
    assert reader(**keywords, max_seq_len=12) == reader(**keywords, max_seq_len=12, doc_stride=2)
    assert_same_results(reader(**keywords), pipeline_until_5_2(tiny, QUESTION, long, top_k=3))


def test_windows_are_as_short_as_the_model(tmp_path: Path) -> None:
    directory = save_model(
        tmp_path, "BertForQuestionAnswering", BERT_TOKENS, max_position_embeddings=40
    )
    reader = SpanReader.from_pretrained(directory)
    texts: dict[str, Any] = {"question": QUESTION, "context": LONG}
    assert reader(**texts) == reader(**texts, max_seq_len=40, doc_stride=20)
    with pytest.raises(InputError, match="at most 40, the positions of the model, got 41"):
        reader(**texts, max_seq_len=41)


def test_scores_by_hand(reader: SpanReader, tiny: LoadedModel) -> None:
    """Softmax over [CLS] and context of start and end logits; their product."""
    tokenizer: Any = tiny.tokenizer
    model: Any = tiny.model
    inputs = tokenizer("谁", "北京", return_tensors="pt")  # [CLS] 谁 [SEP] 北 京 [SEP]
    with torch.inference_mode():
        output = model(**inputs)
    start, end = (
        softmax(logits[0, [0, 3, 4]].double().numpy())
        for logits in (output.start_logits, output.end_logits)
    )
    expected = {
        "北": start[1] * end[1],
        "北京": start[1] * end[2],
        "京": start[2] * end[2],
        "": start[0] * end[0],
    }
    found = reader(question="谁", context="北京", top_k=9, handle_impossible_answer=True)
    assert {item["answer"]: item["score"] for item in found} == {
        text: pytest.approx(score, abs=1e-6) for text, score in expected.items()
    }
    scores = [item["score"] for item in found]
    assert scores == sorted(scores, reverse=True)


def test_results_by_hand(tiny: LoadedModel) -> None:
    one = ByHand(tiny, 北京上海=CITIES)
    best = result(0.42, 0, 2, "北京")
    second = result(0.12, 0, 4, "北京上海")
    third = result(0.06, 2, 4, "上海")
    assert one("北京上海") == best
    assert one("北京上海", top_k=2) == [best, second]
    # Fewer spans are possible than were asked for: no more are made up.
    assert one("北京上海", top_k=50) == [best, second, third]
    assert one("北京上海", max_answer_len=1) == result(0.0, 0, 0, "")
    every = one("北京上海", top_k=9, handle_impossible_answer=True)
    assert every == [best, second, third, result(0.01, 0, 0, "")]


def test_answer_of_one_token(reader: SpanReader) -> None:
    found = reader(question=QUESTION, context="北京,上海", max_answer_len=1, top_k=9)
    assert sorted(item["answer"] for item in found) == sorted("北京,上海")


def test_windows_of_a_context_add_up(tiny: LoadedModel) -> None:
    """As in the pipeline, the scores of equal texts add up, 0.3 and 0.2 of 三四."""
    one = ByHand(
        tiny,
        一二三四=((0.1, 0.3, 0.0, 0.6, 0.0), (0.2, 0.0, 0.3, 0.0, 0.5)),
        三四五六=((0.3, 0.4, 0.0, 0.3, 0.0), (0.1, 0.0, 0.5, 0.0, 0.4)),
    )
    windows: dict[str, Any] = {"max_seq_len": 8, "doc_stride": 2}  # [CLS] 谁 [SEP] .... [SEP]
    assert one("一二三四五六", **windows) == result(0.5, 2, 4, "三四")
    found = one("一二三四五六", top_k=9, handle_impossible_answer=True, **windows)
    assert [item["score"] for item in found if not item["answer"]] == [close(0.02)]


def test_equal_texts_in_different_case_add_up(tiny: LoadedModel) -> None:
    """The first, which is the best of its window, is the answer."""
    half = ((0.0, 0.3, 0.1, 0.6), (0.0, 0.3, 0.1, 0.6))
    one = ByHand(tiny, **{"new , NEW": half})
    found = one("new , NEW", top_k=9, max_answer_len=1)
    assert found[0] == result(0.36 + 0.09, 6, 9, "NEW")
    assert [item["answer"] for item in found] == ["NEW", ","]


def test_align_to_words_in_the_way_of_the_pipeline(tiny: LoadedModel) -> None:
    one = ByHand(tiny, newing=((0.1, 0.6, 0.3), (0.2, 0.5, 0.3)))
    assert one("newing", top_k=3) == result(0.57, 0, 6, "newing")
    apart = one("newing", top_k=3, align_to_words=False)
    assert [item["answer"] for item in apart] == ["new", "newing", "ing"]
    assert [item["start"] for item in apart] == [0, 0, 3]


def test_impossible_answer(tiny: LoadedModel) -> None:
    one = ByHand(tiny, **NULL)
    assert one("人")["answer"] == "人"
    assert one("人", handle_impossible_answer=True) == result(0.36, 0, 0, "")
    assert one("北", handle_impossible_answer=True)["answer"] == "北"


@pytest.mark.parametrize("keywords", [{}, {"top_k": 3}, {"handle_impossible_answer": True}])
def test_context_of_white_space(reader: SpanReader, keywords: dict[str, Any]) -> None:
    for context in (" \n ", [" "], [" ", "\n"]):
        found = reader(question=QUESTION, context=context, **keywords)
        assert found == result(0.0, 0, 0, "")


def test_empty_result_is_the_callers(reader: SpanReader) -> None:
    found = reader(question=QUESTION, context=" ")
    before = dict(found)
    try:
        found["score"] = 5.0
        assert reader(question=QUESTION, context=" ") == before
    finally:
        found.update(before)


def test_several_contexts_vote(tiny: LoadedModel) -> None:
    """Every span takes part; ties and places go to the first context."""
    one = ByHand(
        tiny,
        上=((0.4, 0.6), (0.2, 0.8)),  # 0.48
        北=((0.5, 0.5), (0.2, 0.8)),  # 0.4
        京北=((0.1, 0.2, 0.7), (0.5, 0.0, 0.5)),  # 北 0.35, 京北 0.1
    )
    found = one(["上", "北", "京北"], top_k=9)
    assert found == [
        result(vote(0.4, 0.35), 0, 1, "北", passage=1),
        result(vote(0.48), 0, 1, "上", passage=0),
        result(vote(0.1), 0, 2, "京北", passage=2),
    ]
    assert one(["上", "北", "京北"]) == found[0]
    assert one(["上"]) == found[1]
    assert one(("京北", "上"), top_k=2) == [
        found[1] | {"passage": 1},
        result(vote(0.35), 1, 2, "北", passage=0),
    ]


def test_no_answer_of_several_contexts(tiny: LoadedModel) -> None:
    """Its score is the smallest of the contexts, one vote: a context without the answer must not
    outvote one that has it."""
    one = ByHand(tiny, **NULL)
    options: dict[str, Any] = {"top_k": 9, "max_answer_len": 1, "handle_impossible_answer": True}
    assert one(["人", "北"], **options) == [
        result(vote(0.3), 0, 1, "北", passage=1),
        result(vote(0.2), 0, 0, ""),
        result(vote(0.16), 0, 1, "人", passage=0),
    ]
    assert one(["人"], **options) == [
        result(vote(0.36), 0, 0, ""),
        result(vote(0.16), 0, 1, "人", passage=0),
    ]


def test_context_of_white_space_among_several(tiny: LoadedModel) -> None:
    one = ByHand(tiny, 上=((0.4, 0.6), (0.2, 0.8)))
    assert one([" ", "上"], top_k=9) == result(vote(0.48), 0, 1, "上", passage=1)


CALLS: dict[str, Callable[[Any, str, str, str], Any]] = {
    "dictionaries": lambda one, q, c, d: one([asked(q, c), asked(q, d)]),
    "generator": lambda one, q, c, d: one(asked(q, text) for text in (c, d)),
    "dictionaries one by one": lambda one, q, c, d: one(asked(q, c), asked(q, d)),
    "two lists": lambda one, q, c, d: one(question=[q, q], context=[c, d]),
    "tuples": lambda one, q, c, d: one(question=(q, q), context=(c, d)),
    "dictionary": lambda one, q, c, d: [one(asked(q, c)), one(asked(q, d))],
    "list of one dictionary": lambda one, q, c, d: [one([asked(q, c)]), one([asked(q, d)])],
    "two strings": lambda one, q, c, d: [one(q, c), one(q, d)],
    "lists of one": lambda one, q, c, d: [
        one(question=[q], context=[c]),
        one(question=[q], context=d),
    ],
}


def asked(question: str, context: str) -> dict[str, str]:
    return {"question": question, "context": context}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_ways_to_call(reader: SpanReader, call: Any, top_k: int) -> None:
    """All give what single calls give: a dictionary, or a list of two where two are asked for."""
    want = [reader(question=QUESTION, context=text, top_k=top_k) for text in SOME[:2]]
    assert [isinstance(result, dict) for result in want] == [top_k == 1] * 2

    def one(*inputs: Any, **keywords: Any) -> Any:
        return reader(*inputs, **keywords, top_k=top_k)

    assert_same_results(call(one, QUESTION, *SOME[:2]), want)


def test_questions_with_one_context(reader: SpanReader) -> None:
    questions = [QUESTION, "谁?", "何月?"]
    want = [reader(question=question, context=SOME[0]) for question in questions]
    assert_same_results(reader(question=questions, context=SOME[0]), want)


def test_several_contexts_among_several_questions(reader: SpanReader) -> None:
    found = reader(question=["谁", QUESTION], context=[SOME, SOME[0]], top_k=2)
    assert_same_results(found[0], reader(question="谁", context=SOME, top_k=2))
    assert_same_results(found[1], reader(question=QUESTION, context=SOME[0], top_k=2))
    assert [["passage" in item for item in items] for items in found] == [[True] * 2, [False] * 2]


def test_no_inputs(reader: SpanReader) -> None:
    assert reader([]) == reader(question=[], context=[]) == []


def test_long_questions(reader: SpanReader) -> None:
    long: dict[str, Any] = {"question": "中" * 100, "context": SOME[0]}
    assert reader(**long, max_question_len=40) == reader("中" * 40, SOME[0])
    assert reader(**long)["score"] != pytest.approx(reader("中" * 40, SOME[0])["score"])
    assert reader(**long) == reader(**long, max_question_len=100)


def test_keywords_without_effect(reader: SpanReader) -> None:
    texts = {"question": QUESTION, "context": SOME[0]}
    assert reader(**texts) == reader(**texts, padding="max_length", batch_size=8, num_workers=2)


ONE: dict[str, Any] = {"question": QUESTION, "context": "北京"}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (ONE | {"question": ""}, "question: expected a text in input 0, got an empty one"),
        (ONE | {"context": ""}, "context: expected a text in input 0, got an empty one"),
        (ONE | {"context": ["北", ""]}, "context: expected a text in input 0, got an empty one"),
        (ONE | {"context": []}, "context: expected at least one in input 0, got none"),
        (ONE | {"question": None}, "question: expected a string or a list, got NoneType"),
        (ONE | {"context": None}, "context: expected a string in input 0, got NoneType"),
        (ONE | {"context": 3}, "context: expected a string in input 0, got int"),
        (ONE | {"question": b"q"}, "question: expected a string or a list, got bytes"),
        ({"question": QUESTION}, "context: expected a string in input 0, got NoneType"),
        ({}, "question: expected .*call with question= and context="),
        (
            {"question": ["a", "b"], "context": ["c"]},
            "context: expected one per question, 2, got 1",
        ),
        ({"question": ["a"], "context": None}, "expected one per question, 1, got NoneType"),
        ({"question": ["a", None], "context": "c"}, "question: expected a string in input 1"),
        (ONE | {"context": "\ud800"}, "passages: expected text that UTF-8 can encode"),
        (ONE | {"top_k": 0}, "top_k: expected an integer of at least 1, got 0"),
        (ONE | {"top_k": 1.5}, "top_k: expected an integer of at least 1, got 1.5"),
        (ONE | {"top_k": True}, "top_k: expected an integer of at least 1, got True"),
        (ONE | {"max_answer_len": 0}, "max_answer_len: expected an integer of at least 1, got 0"),
        (ONE | {"max_question_len": 0}, "max_question_len: expected an integer of at least 1"),
        # Three special tokens and six of the question leave no room for the context.
        (ONE | {"max_seq_len": 9}, "max_seq_len: expected room .* beside 3 .* and 6 .*, got 9"),
        (
            ONE | {"max_seq_len": 20, "doc_stride": 11},
            "doc_stride: expected 0 to less than 11, .*11",
        ),
        (ONE | {"doc_stride": -1}, "doc_stride: expected an integer of at least 0, got -1"),
    ],
)
def test_bad_keywords(reader: SpanReader, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        reader(**keywords)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["北京"], "inputs: expected dictionaries, got str"),
        ([3], "inputs: expected dictionaries, got int"),
        (["a", "b", "c"], r"inputs\[0\]: expected a dictionary with question and context, got 'a'"),
        ([{"question": "a"}], r"inputs\[0\]: expected a dictionary with question and context"),
        ([[ONE, None]], r"inputs\[1\]: expected a dictionary .*, got None"),
        ([[ONE, ONE | {"context": ""}]], "context: expected a text in input 1"),
        ([ONE | {"question": ["a"]}], "question: expected a string in input 0, got list"),
    ],
)
def test_bad_inputs(reader: SpanReader, inputs: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        reader(*inputs)


def test_unknown_and_double_keywords(reader: SpanReader) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'beam_size'"):
        reader(ONE, beam_size=2)
    with pytest.raises(InputError, match="expected keywords or positional inputs, got both"):
        reader(ONE, question="a")


def test_shortest_windows(reader: SpanReader) -> None:
    """One token of the context each; no token is shared."""
    found = reader(ONE, max_seq_len=10, top_k=9, doc_stride=0)
    assert sorted(item["answer"] for item in found) == ["京", "北"]
    assert reader(ONE, max_seq_len=10, top_k=9) == found


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_seq_len": 20.0}, "max_seq_len: expected an integer"),
        ({"max_seq_len": "20"}, "max_seq_len: expected an integer"),
        ({"doc_stride": 2.5}, "doc_stride: expected an integer"),
        ({"doc_stride": "2"}, "doc_stride: expected an integer"),
        ({"max_seq_len": 1000}, "max_seq_len: expected at most 512"),
    ],
)
def test_bad_lengths(reader: SpanReader, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        reader(question="谁", context=LONG * 4, **keywords)


def test_numbers_of_numpy(reader: SpanReader) -> None:
    assert reader(ONE, top_k=np.int64(2)) == reader(ONE, top_k=2)


@pytest.mark.parametrize("value", [None, "5"])
def test_max_passage_tokens_of_another_type(reader: SpanReader, value: Any) -> None:
    with pytest.raises(InputError, match="max_passage_tokens: expected an integer, got"):
        reader.answer(QUESTION, SOME, max_passage_tokens=value)


# --- fastmrc.integrations.transformers -----------------------------------------------------------


def test_pipeline_by_directory(bert_qa_dir: Path, reader: SpanReader) -> None:
    for task in ("question-answering", None):
        answer = pipeline(task, model=str(bert_qa_dir), device=-1)
        assert_same_results(answer(QUESTION, SOME[0]), reader(QUESTION, SOME[0]))
    answer = pipeline(model=str(bert_qa_dir), device=torch.device("cpu"), dtype="bfloat16")
    assert isinstance(answer, SpanReader)
    assert answer._loaded.model.dtype == torch.bfloat16


def test_pipeline_by_model(tiny: LoadedModel, reader: SpanReader) -> None:
    answer = pipeline("question-answering", model=tiny.model, tokenizer=tiny.tokenizer)
    assert_same_results(answer(QUESTION, SOME[0]), reader(QUESTION, SOME[0]))
    assert answer.answer(QUESTION, SOME).text == reader.answer(QUESTION, SOME).text


def test_pipeline_with_keywords(bert_qa_dir: Path, reader: SpanReader) -> None:
    answer = pipeline(model=str(bert_qa_dir), top_k=2, max_answer_len=1)
    texts = {"question": QUESTION, "context": SOME[0]}
    assert_same_results(answer(**texts), reader(**texts, top_k=2, max_answer_len=1))
    assert_same_results(answer(**texts, top_k=1), reader(**texts, max_answer_len=1))


def test_pipeline_refuses(
    tiny: LoadedModel, bert_qa_dir: Path, slow_tokenizer_dir: Path, tiny_bert_dir: Path
) -> None:
    from transformers import EsmTokenizer

    model: Any = tiny.model
    name = str(bert_qa_dir)
    slow: Any = EsmTokenizer.from_pretrained(slow_tokenizer_dir)
    with pytest.raises(InputError, match="task: expected 'question-answering', got 'fill-mask'"):
        pipeline("fill-mask", model=name)
    with pytest.raises(InputError, match="tokenizer: expected a fast tokenizer, .* EsmTokenizer"):
        pipeline(model=model, tokenizer=slow)
    with pytest.raises(InputError, match="tokenizer: expected a fast tokenizer, .* got NoneType"):
        pipeline(model=model)
    with pytest.raises(InputError, match="tokenizer: expected a fast tokenizer, .* got other"):
        pipeline(model=name, tokenizer="other")
    with pytest.raises(InputError, match="as no question-answering model comes with fastmrc"):
        pipeline("question-answering")
    with pytest.raises(UnsupportedModelError, match="no trained question-answering model"):
        pipeline(model=str(tiny_bert_dir))
    with pytest.raises(InputError, match="device: expected a device that torch can use"):
        pipeline(model=name, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device: .* got 'cuda:0'"):
            pipeline(model=name, device=0)


def test_pipeline_refuses_training_mode(bert_qa_dir: Path) -> None:
    loaded = load_qa(bert_qa_dir)
    loaded.model.train()
    with pytest.raises(InputError, match=r"got training mode; call model.eval\(\)"):
        pipeline(model=loaded.model, tokenizer=loaded.tokenizer)


def test_pipeline_with_the_name_of_the_tokenizer(bert_qa_dir: Path, reader: SpanReader) -> None:
    name = str(bert_qa_dir)
    answer = pipeline("question-answering", model=name, tokenizer=name)
    assert_same_results(answer(QUESTION, SOME[0]), reader(QUESTION, SOME[0]))


def test_pipeline_by_path(bert_qa_dir: Path, tiny: LoadedModel) -> None:
    assert isinstance(pipeline(model=bert_qa_dir), SpanReader)
    other = pipeline(model=bert_qa_dir, tokenizer=tiny.tokenizer)
    assert isinstance(other, SpanReader) and other._loaded.tokenizer is tiny.tokenizer


def test_pipeline_with_an_unknown_keyword(bert_qa_dir: Path) -> None:
    with pytest.raises(TypeError, match="beam_size"):
        pipeline(model=str(bert_qa_dir), beam_size=2)


def test_registered_with_transformers(bert_qa_dir: Path) -> None:
    from transformers import pipeline as make
    from transformers.pipelines import PIPELINE_REGISTRY

    from fastmrc.integrations.transformers import REGISTERED_TASK, pipeline, register_pipeline

    before = dict(PIPELINE_REGISTRY.supported_tasks)
    try:
        ours = pipeline("question-answering", model=bert_qa_dir, register=True)
        theirs = make(REGISTERED_TASK, model=str(bert_qa_dir), dtype="float32")
        assert isinstance(theirs, SpanReader)
        asked = {"question": "北京在哪里?", "context": "中国北京在二月天气大"}
        assert theirs(**asked) == ours(**asked)
        several = make(REGISTERED_TASK, model=str(bert_qa_dir), dtype="float32", top_k=2, device=-1)
        assert len(several(**asked)) == 2
        assert REGISTERED_TASK in register_pipeline()
    finally:
        PIPELINE_REGISTRY.supported_tasks.clear()
        PIPELINE_REGISTRY.supported_tasks.update(before)
