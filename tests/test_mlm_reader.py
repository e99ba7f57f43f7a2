"""The reader by masked language model: engine against oracle, hand-made votes, model families."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    PASSAGES,
    QUESTION_BATCHES,
    QUESTIONS,
    VOTES,
    assert_same_answer,
    cut,
    draw_weights,
    random_cases,
    without_seconds,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

import fastmrc
from fastmrc import Answer, InputError, MLMReader, Span, UnsupportedModelError, reference
from fastmrc.cli.bench import SAMPLE
from fastmrc.data import read_questions
from fastmrc.encoders.slots import SlotEncoder
from fastmrc.pretrained import LoadedModel, load_model
from fastmrc.readers.base import Window

QUESTION = "北京在哪里?"
SOME = ["中国北京在二月天气大", "上海New York山水,火。北京", "人名"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tiny_bert_dir: Path) -> LoadedModel:
    return load_model(tiny_bert_dir, attention=None)


@pytest.fixture(scope="module")
def reader(tiny: LoadedModel) -> MLMReader:
    return MLMReader(tiny)


@pytest.fixture(scope="module")
def oracle(tiny: LoadedModel) -> reference.MLMReader:
    return reference.MLMReader(tiny)


def tokens_of(loaded: LoadedModel, text: str) -> list[int]:
    encode: Any = loaded.tokenizer
    ids: list[int] = encode(text, add_special_tokens=False)["input_ids"]
    return ids


def trie(loaded: LoadedModel, *texts: str) -> fastmrc.Trie:
    return fastmrc.Trie([tokens_of(loaded, text) for text in texts])


# --- engine against oracle -----------------------------------------------------------------------


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, Any]:
    """Any options but those that need to know the passages."""
    most, size = draw(st.integers(1, 6)), draw(st.integers(1, 12) | st.just(255))
    options: dict[str, Any] = {
        "decoding": draw(st.sampled_from(["greedy", "exact"])),
        "mode": draw(st.sampled_from(["extractive", "extractive", "generative"])),
        "vote": draw(st.sampled_from(VOTES)),
        "max_answer_tokens": most,
        "min_answer_tokens": draw(st.integers(0, min(2, most))),
        "max_passage_tokens": size,
        "stride": draw(st.none() | st.integers(0, min(size, 12) - 1)),
        "max_question_tokens": draw(st.integers(1, 63)),
        "no_answer_threshold": draw(st.none() | st.floats(0, 0.1)),
        "no_answer_ratio": draw(st.none() | st.sampled_from([1.02, 1.1, 2.0])),
    }
    if options["decoding"] == "exact":
        options["top_k"] = draw(st.integers(1, 4))
    return options


def voters_are_clear(
    oracle: reference.MLMReader, questions: list[tuple[str, list[str]]], options: dict[str, Any]
) -> bool:
    """Whether rounding cannot decide which passages vote."""
    names = ("max_passage_tokens", "max_question_tokens", "max_answer_tokens")
    asked = {name: options[name] for name in names}
    for question, passages in questions:
        alone = [oracle.answer(question, [text], **asked).no_answer_score for text in passages]
        scores = [score for score in alone if score is not None]
        for least in scores:
            bar = options["no_answer_ratio"] * least
            if any(abs(score - bar) < 1e-6 for score in scores):
                return False
    return True


@random_cases(60)
@given(questions=QUESTION_BATCHES, options=option_sets(), data=st.data())
def test_engine_equals_oracle(
    reader: MLMReader,
    oracle: reference.MLMReader,
    tiny: LoadedModel,
    questions: list[tuple[str, list[str]]],
    options: dict[str, Any],
    data: st.DataObject,
) -> None:
    if options["vote"] == "weighted":
        options["passage_weights"] = draw_weights(data, questions)
    tries = [trie(tiny, "北京", "北京上", "水", "new york"), trie(tiny, "海"), None]
    if options["decoding"] == "exact" and options["mode"] == "generative":
        tries.pop()
    options["constraints"] = [data.draw(st.sampled_from(tries)) for _ in questions]
    if options["no_answer_ratio"] is not None:
        options["stride"] = None  # one window per passage
        assume(voters_are_clear(oracle, questions, options))
    ours = reader.answer_batch(questions, **options)
    theirs = oracle.answer_batch(questions, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_answer(a, b)


@random_cases(25)
@given(questions=QUESTION_BATCHES, decoding=st.sampled_from(["greedy", "exact"]))
def test_batch_equals_singles(
    reader: MLMReader, questions: list[tuple[str, list[str]]], decoding: str
) -> None:
    options: dict[str, Any] = {"decoding": decoding, "max_answer_tokens": 4}
    together = reader.answer_batch(iter(questions), **options)
    for answer, (question, passages) in zip(together, questions, strict=True):
        assert_same_answer(answer, reader.answer(question, passages, **options))


@random_cases(25)
@given(question=QUESTIONS, passages=PASSAGES, decoding=st.sampled_from(["greedy", "exact"]))
def test_answers_are_pieces_of_the_passages(
    reader: MLMReader, question: str, passages: list[str], decoding: str
) -> None:
    answer = reader.answer(question, passages, decoding=decoding, min_answer_tokens=1)
    assert bool(answer.text) == any(passage.strip() for passage in passages)
    assert (answer.text, answer.score) == (
        (answer.candidates[0].text, answer.candidates[0].score) if answer.candidates else ("", 0.0)
    )
    for candidate in answer.candidates:
        assert candidate.text == cut(candidate, passages)[0]
        assert candidate.spans == sorted(candidate.spans, key=lambda s: (s.passage, s.start))


def test_few_logits_at_once(reader: MLMReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passages of many questions are read in batches of bounded size."""
    questions = [(f"{i}月?", SOME[i % 3 :] + ["山" * (i + 1)]) for i in range(12)]
    together = reader.answer_batch(questions, max_answer_tokens=3)
    sizes: list[int] = []
    logits = SlotEncoder.logits

    def counted(encoder: SlotEncoder, rows: Sequence[Any], slots: int) -> torch.Tensor:
        sizes.append(len(rows))
        return logits(encoder, rows, slots)

    monkeypatch.setattr(SlotEncoder, "logits", counted)
    reader.answer_batch(questions, max_answer_tokens=3)
    assert sizes == [36]
    row = 3 * reader._vocabulary_size
    for most, expected in ((7 * row, [7] * 5 + [1]), (row - 1, [1] * 36)):
        sizes.clear()
        monkeypatch.setattr("fastmrc.readers.mlm._MAX_LOGITS", most)
        for a, b in zip(together, reader.answer_batch(questions, max_answer_tokens=3), strict=True):
            assert_same_answer(a, b)
        assert sizes == expected


def test_no_questions(reader: MLMReader, oracle: reference.MLMReader) -> None:
    assert reader.answer_batch([]) == oracle.answer_batch([]) == []


def test_two_threads_at_once(reader: MLMReader) -> None:
    """The number of slots, which the model must not keep, differs from call to call."""
    calls = [(f"{word}?", 1 + i % 4) for i, word in enumerate("谁何哪里时间名字北京")]
    want = [reader.answer(question, SOME, max_answer_tokens=n) for question, n in calls]
    barrier = threading.Barrier(2)

    def work(order: int) -> list[Answer]:
        barrier.wait()
        return [reader.answer(q, SOME, max_answer_tokens=n) for q, n in calls[::order]][::order]

    with ThreadPoolExecutor(2) as pool:
        for answers in pool.map(work, (1, -1)):
            for a, b in zip(answers, want, strict=True):
                assert_same_answer(a, b)


def test_timings_and_progress(
    reader: MLMReader, oracle: reference.MLMReader, capsys: pytest.CaptureFixture[str]
) -> None:
    for one, shown in ((reader, "6/6"), (oracle, "2/2")):
        for answer in one.answer_batch([(QUESTION, SOME)] * 2):
            seconds = answer.timings
            assert min(seconds.tokenise, seconds.encode, seconds.decode) > 0
        assert capsys.readouterr().err == ""
        one.answer_batch([(QUESTION, SOME)] * 2, progress=True)
        assert shown in capsys.readouterr().err


# --- models --------------------------------------------------------------------------------------


def test_every_family_equals_the_oracle(masked_lm_dir: Path) -> None:
    ours = MLMReader.from_pretrained(masked_lm_dir)
    theirs = reference.MLMReader.from_pretrained(masked_lm_dir)
    questions = [(QUESTION, SOME), ("何月?", ["北", "二月,三月" * 5])]
    for options in (
        {"min_answer_tokens": 1},
        {"decoding": "exact", "top_k": 3, "min_answer_tokens": 1, "max_answer_tokens": 5},
        {"mode": "generative", "min_answer_tokens": 1, "max_answer_tokens": 5},
    ):
        for a, b in zip(
            ours.answer_batch(questions, **options),
            theirs.answer_batch(questions, **options),
            strict=True,
        ):
            assert_same_answer(a, b)
            assert a.candidates


@torch.inference_mode()
def test_slot_logits_are_those_of_the_whole_model(masked_lm_dir: Path) -> None:
    """In a padded batch; the whole model reads each row alone, without padding."""
    model: Any = load_model(masked_lm_dir, attention=None).model
    encoder = SlotEncoder(model)
    rng = np.random.default_rng(1)
    rows = [rng.integers(5, model.config.vocab_size, n).astype(np.int32) for n in (9, 31, 17)]
    for slots in (1, 6):
        found = encoder.logits(rows, slots)
        assert (found.shape, found.dtype) == ((3, slots, model.config.vocab_size), torch.float32)
        for row, ours in zip(rows, found, strict=True):
            whole = model(input_ids=torch.from_numpy(row)[None].long()).logits[0, 1 : 1 + slots]
            torch.testing.assert_close(ours, whole, rtol=0.0, atol=3e-5)


def test_the_model_is_not_changed(tiny_bert_dir: Path) -> None:
    loaded = load_model(tiny_bert_dir, attention=None)
    model: Any = loaded.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    inputs = torch.arange(5, 25)[None]
    with torch.inference_mode():
        whole = model(inputs).logits
        MLMReader(loaded).answer(QUESTION, SOME)
        after = model(inputs).logits
    assert whole.shape == (1, 20, model.config.vocab_size)
    assert torch.equal(whole, after)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert dict(model.named_modules()) == modules


def test_bfloat16_has_a_float32_head(masked_lm_dir: Path) -> None:
    reader = MLMReader.from_pretrained(masked_lm_dir, dtype="bfloat16")
    assert reader.answer(QUESTION, SOME, min_answer_tokens=1).text
    logits = reader._encoder.logits([np.arange(5, 25, dtype=np.int32)], 8)
    assert logits.dtype == torch.float32
    # Had the head run in bfloat16, every logit would be one of its few numbers.
    assert (logits.bfloat16().float() != logits).float().mean() > 0.9
    assert {p.dtype for p in reader._loaded.model.parameters()} == {torch.bfloat16}


def test_positions_of_roberta_begin_after_the_padding(tiny_roberta_dir: Path) -> None:
    """514 positions hold 512 tokens: here 6 + 1 of the question + slots + passage."""
    reader = MLMReader.from_pretrained(tiny_roberta_dir)
    passages = ["山" * 400]
    fits = {"max_passage_tokens": 400, "max_answer_tokens": 107, "min_answer_tokens": 1}
    assert reader.answer("谁", passages, **fits).text
    with pytest.raises(InputError, match="at most 512 tokens.*got 513"):
        reader.answer("谁", passages, **fits | {"max_answer_tokens": 108})


def test_tokenizer_without_mask(
    bert_copy: Path, edit_json: Callable[[Path, dict[str, Any]], None]
) -> None:
    edit_json(bert_copy / "tokenizer_config.json", {"mask_token": None})
    for kind in (MLMReader, reference.MLMReader):
        with pytest.raises(UnsupportedModelError, match="the tokenizer names no mask token"):
            kind.from_pretrained(bert_copy)


def test_question_answering_model(bert_qa_dir: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no trained masked-LM model"):
        MLMReader.from_pretrained(bert_qa_dir)


def refuse(tiny: LoadedModel, model: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        MLMReader(replace(tiny, model=model.eval()))


def test_model_without_a_head(tiny: LoadedModel) -> None:
    model: Any = tiny.model
    refuse(tiny, model.bert, "model: expected a body and a head, got BertModel")


def test_weights_with_nan(tiny_bert_dir: Path) -> None:
    loaded = load_model(tiny_bert_dir, attention=None)
    model: Any = loaded.model
    with torch.no_grad():
        model.cls.predictions.bias[0] = np.nan
    refuse(loaded, model, "the logits of the slots to equal.*got a largest difference of nan")


def test_head_that_looks_at_more_than_its_position(tiny: LoadedModel) -> None:
    """Such a model gives other logits where the head sees the slots alone, or none at all."""
    from transformers import BertForMaskedLM

    class Counting(BertForMaskedLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(output.logits.shape[1])[:, None]
            return output

    class Reaching(BertForMaskedLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + output.logits[:, 8:9]
            return output

    config: Any = tiny.model.config
    refuse(tiny, Counting(config), "got a largest difference of 1")
    refuse(tiny, Reaching(config), r"Reaching cannot run on slots alone \(RuntimeError: The size")


def test_weights_that_break_later(
    reader: MLMReader, oracle: reference.MLMReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, message in (
        (np.nan, "logits: .*NaN.*in row 0"),
        (-np.inf, "logits: .*-inf.*in row 0"),
    ):
        full = torch.full((3, 16, reader._vocabulary_size), value)
        monkeypatch.setattr(SlotEncoder, "logits", lambda *_, full=full: full)
        monkeypatch.setattr(reference.MLMReader, "slot_logits", lambda *_, full=full: full.numpy())
        for one in (reader, oracle):
            with pytest.raises(ValueError, match=message):
                one.answer(QUESTION, SOME)


# --- the packaged model --------------------------------------------------------------------------

PAPER = [
    "造纸术起源于西汉，东汉的蔡伦改进了工艺，用树皮、麻头、破布和旧渔网造出了便宜好写的纸。",
    "元兴元年，蔡伦把改良后的造纸方法奏报朝廷，此后各地都用他的办法造纸。",
    "指南针在宋代用于航海，船队在阴天和夜里也能辨认方向。",
]


@pytest.mark.parametrize("decoding", ["greedy", "exact"])
def test_packaged_model_answers(packaged_model: LoadedModel, decoding: str) -> None:
    answer = MLMReader(packaged_model).answer("造纸术在东汉由谁改进？", PAPER, decoding=decoding)
    assert answer.text == "蔡伦"
    assert answer.spans == [Span(0, 12, 14), Span(1, 5, 7)]
    assert 0.2 < answer.score < 4 / 3


def test_packaged_model_equals_the_oracle(
    packaged_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second sample; both decodings read the same logits, which take nearly all the time."""
    for owner, name in ((SlotEncoder, "logits"), (reference.MLMReader, "slot_logits")):
        monkeypatch.setattr(owner, name, remembered(getattr(owner, name)))
    questions = [question.pair for question in read_questions(SAMPLE)][::2]
    ours, theirs = MLMReader(packaged_model), reference.MLMReader(packaged_model)
    for options in ({}, {"decoding": "exact", "top_k": 2}):
        answers = ours.answer_batch(questions, **options)
        for a, b in zip(answers, theirs.answer_batch(questions, **options), strict=True):
            assert_same_answer(a, b, tolerance=1e-5)
        assert sum(bool(answer.text) for answer in answers) >= 5


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a method once for the same inputs."""
    known: dict[bytes, Any] = {}

    def call(self: Any, inputs: Sequence[Any], slots: int) -> Any:
        rows = [getattr(item, "input_ids", item) for item in inputs]
        key = b"|".join(row.tobytes() for row in rows)
        if key not in known:
            known[key] = function(self, inputs, slots)
        return known[key]

    return call


# --- votes by hand -------------------------------------------------------------------------------

END = "[SEP]"
REST = "z"  # gets what is left of a slot's probability; in no passage

Slots = Sequence[Mapping[str, float]]  # slot by slot the probability of tokens


class HandMade:
    """Engine and oracle whose slots hold given probabilities; they must answer alike."""

    def __init__(
        self,
        reader: MLMReader,
        oracle: reference.MLMReader,
        loaded: LoadedModel,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self._readers, self._loaded, self._patch = (reader, oracle), loaded, monkeypatch
        self._tokenizer: Any = loaded.tokenizer

    def answer(
        self, slots: Mapping[str, Slots], *, passages: Sequence[str] | None = None, **options: Any
    ) -> Answer:
        """Answer from `passages`, or else from those whose `slots` are given."""
        by_tokens = {tuple(tokens_of(self._loaded, text)): own for text, own in slots.items()}

        def logits(row: NDArray[np.int32], count: int) -> torch.Tensor:
            return self._logits(by_tokens[self._passage(row.tolist(), count)], count)

        def of_engine(_: Any, rows: Sequence[NDArray[np.int32]], count: int) -> torch.Tensor:
            return torch.stack([logits(row, count) for row in rows])

        def of_oracle(_: Any, windows: Sequence[Window], count: int) -> NDArray[np.float32]:
            return of_engine(_, [window.input_ids for window in windows], count).numpy()

        self._patch.setattr(SlotEncoder, "logits", of_engine)
        self._patch.setattr(reference.MLMReader, "slot_logits", of_oracle)
        texts = list(slots) if passages is None else passages
        ours, theirs = (one.answer(QUESTION, texts, **options) for one in self._readers)
        assert_same_answer(ours, theirs)
        return ours

    def _passage(self, row: list[int], slots: int) -> tuple[int, ...]:
        """Check the form of an input and return the tokens of its passage."""
        cls, sep, mask = (
            getattr(self._tokenizer, f"{role}_token_id") for role in ("cls", "sep", "mask")
        )
        before = [cls, *[mask] * slots, sep, *tokens_of(self._loaded, QUESTION), sep]
        assert row[: len(before)] == before
        assert row[-1] == sep
        return tuple(row[len(before) : -1])

    def _logits(self, slots: Slots, count: int) -> torch.Tensor:
        probabilities = torch.zeros(count, len(self._tokenizer), dtype=torch.float64)
        for i in range(count):
            given = dict(slots[i]) if i < len(slots) else {}
            for token, share in (given | {REST: 1.0 - sum(given.values())}).items():
                probabilities[i, self.id_of(token)] = share
        return probabilities.log().float()

    def id_of(self, token: str) -> int:
        tokenizer = self._tokenizer
        return int(
            tokenizer.sep_token_id if token == END else tokenizer.convert_tokens_to_ids(token)
        )


@pytest.fixture
def by_hand(
    reader: MLMReader,
    oracle: reference.MLMReader,
    tiny: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> HandMade:
    return HandMade(reader, oracle, tiny, monkeypatch)


def vote(*scores: float) -> float:
    return sum(s * s for s in scores) / (1.0 + sum(scores))


def test_score_is_the_mean_of_the_chosen_probabilities(by_hand: HandMade) -> None:
    """The end's included, up to the end only; 海 cannot follow 北 and 京 cannot begin twice."""
    slots = [{"北": 0.6, "京": 0.2}, {"海": 0.45, "京": 0.4}, {END: 0.8}, {END: 0.1}]
    answer = by_hand.answer({"海北京": slots}, max_answer_tokens=4)
    s = (0.6 + 0.4 + 0.8) / 3
    assert (answer.text, answer.spans) == ("北京", [Span(0, 1, 3)])
    assert answer.score == pytest.approx(vote(s), abs=1e-6)
    assert [candidate.finished for candidate in answer.candidates] == [True]


def test_answer_of_all_slots_has_no_end(by_hand: HandMade) -> None:
    answer = by_hand.answer({"北京": [{"北": 0.6}, {"京": 0.4}]}, max_answer_tokens=2)
    assert answer.text == "北京"
    assert answer.score == pytest.approx(vote(0.5), abs=1e-6)
    assert [candidate.finished for candidate in answer.candidates] == [False]


def test_end_of_the_passage_leaves_only_the_end(by_hand: HandMade) -> None:
    answer = by_hand.answer({"京北": [{"北": 0.6}, {"京": 0.9, END: 0.02}]}, max_answer_tokens=3)
    assert answer.text == "北"
    assert answer.score == pytest.approx(vote(0.31), abs=1e-6)


# One slot, so the score of an answer is its probability; 人 has no answer.
VOTERS: dict[str, Slots] = {
    "北京": [{"北": 0.6, END: 0.3}],
    "上海": [{"海": 0.8}],
    "人": [{END: 0.9}],
    "天北": [{"北": 0.5}],
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
            {"vote": "weighted", "passage_weights": [2.0, 0.5, 7.0, 1.0]},
            (2 * 0.36 + 0.25) / (1 + 2 * 0.6 + 0.5),
            0.5 * 0.64 / (1 + 0.5 * 0.8),
        ),
    ],
    ids=lambda value: value.get("vote") if isinstance(value, dict) else "",
)
def test_votes(by_hand: HandMade, options: dict[str, Any], of_north: float, of_sea: float) -> None:
    answer = by_hand.answer(VOTERS, max_answer_tokens=1, **options)
    expected = sorted([("北", of_north), ("海", of_sea)], key=lambda item: -item[1])
    assert [candidate.text for candidate in answer.candidates] == [text for text, _ in expected]
    assert [candidate.score for candidate in answer.candidates] == pytest.approx(
        [score for _, score in expected], rel=1e-5
    )
    assert (answer.text, answer.score) == (
        answer.candidates[0].text,
        answer.candidates[0].score,
    )


def test_ties_go_to_the_first_passage(by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {text: [{text[0]: 0.5}] for text in ("北京", "上海", "火", "上天")}
    answer = by_hand.answer(slots, passages=["火", "北京", "上海"], max_answer_tokens=1)
    assert [candidate.text for candidate in answer.candidates] == ["火", "北", "上"]
    answer = by_hand.answer(slots, passages=["上海", "北京", "火"], max_answer_tokens=1)
    assert [candidate.text for candidate in answer.candidates] == ["上", "北", "火"]
    answer = by_hand.answer(slots, passages=["火", "北京", "上海", "上天"], max_answer_tokens=1)
    assert [candidate.text for candidate in answer.candidates] == ["上", "火", "北"]


def test_same_passage_twice_votes_twice(by_hand: HandMade) -> None:
    answer = by_hand.answer({"北": [{"北": 0.5}]}, passages=["北", "北"], max_answer_tokens=1)
    assert answer.score == pytest.approx(vote(0.5, 0.5), abs=1e-6)
    assert answer.spans == [Span(0, 0, 1), Span(1, 0, 1)]


def test_empty_answers_take_no_part(by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {"京": [{END: 0.9}], "北": [{"北": 0.1}], "人": [{END: 0.99}]}
    answer = by_hand.answer(slots, max_answer_tokens=2)
    assert answer.text == "北"
    assert answer.score == pytest.approx(vote(0.05), abs=1e-6)
    assert len(answer.candidates) == 1


def test_all_passages_are_without_an_answer(by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {"京": [{END: 0.9}], "北": [{"北": 0.4, END: 0.5}]}
    for decoding in ("greedy", "exact"):
        answer = by_hand.answer(slots, decoding=decoding, max_answer_tokens=2)
        assert without_seconds(answer) == Answer(no_answer_score=pytest.approx(0.5))


def test_passage_without_an_answer_of_the_least_length(by_hand: HandMade) -> None:
    """The end may come after two tokens only, so 人 has no answer."""
    slots: dict[str, Slots] = {"人": [{"人": 0.9}], "北京": [{"北": 0.2, END: 0.7}, {"京": 0.4}]}
    for decoding in ("greedy", "exact"):
        options: dict[str, Any] = {"decoding": decoding, "max_answer_tokens": 2}
        answer = by_hand.answer(slots, min_answer_tokens=2, **options)
        assert [candidate.text for candidate in answer.candidates] == ["北京"]
        assert answer.score == pytest.approx(vote(0.3), abs=1e-6)
        alone = by_hand.answer(slots, passages=["人"], min_answer_tokens=2, **options)
        assert without_seconds(alone) == Answer(no_answer_score=0.0)


def test_exact_finds_what_greedy_misses(by_hand: HandMade) -> None:
    """Greedy takes 北, after which nothing good comes."""
    slots: Slots = [{"北": 0.5, "上": 0.4}, {"京": 0.1, "海": 0.9}, {END: 0.8}]
    greedy = by_hand.answer({"北京上海": slots}, max_answer_tokens=3)
    assert greedy.text == "北京"
    assert greedy.score == pytest.approx(vote((0.5 + 0.1 + 0.8) / 3), abs=1e-6)
    exact = by_hand.answer({"北京上海": slots}, decoding="exact", max_answer_tokens=3)
    assert exact.text == "上海"
    assert exact.score == pytest.approx(vote((0.4 + 0.9 + 0.8) / 3), abs=1e-6)


def test_best_answers_of_each_passage_vote(by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {
        "北京": [{"北": 0.55, "京": 0.45}],
        "京天": [{"天": 0.5, "京": 0.4}],
        "天": [{"天": 0.1, END: 0.05}],
    }
    options: dict[str, Any] = {"decoding": "exact", "max_answer_tokens": 1}
    one = by_hand.answer(slots, **options)
    assert [(c.text, c.score) for c in one.candidates] == [
        ("北", pytest.approx(vote(0.55))),
        ("天", pytest.approx(vote(0.5, 0.1))),
    ]
    two = by_hand.answer(slots, **options, top_k=2)
    assert [(c.text, c.score) for c in two.candidates] == [
        ("京", pytest.approx(vote(0.45, 0.4))),
        ("北", pytest.approx(vote(0.55))),
        ("天", pytest.approx(vote(0.5, 0.1))),
    ]
    assert two.candidates[0].spans == [Span(0, 1, 2), Span(1, 0, 1)]
    mean = by_hand.answer(slots, **options, top_k=2, vote="mean")
    assert (mean.text, mean.score) == ("京", pytest.approx(0.85 / 3))


def test_further_answers_do_not_make_up_for_an_empty_one(by_hand: HandMade) -> None:
    """A passage whose best answer is empty holds none, however many are asked for."""
    slots: Slots = [{END: 0.8, "北": 0.15}, {"京": 0.5}, {END: 0.9}]
    for top_k in (1, 2):
        options: dict[str, Any] = {"decoding": "exact", "top_k": top_k, "max_answer_tokens": 3}
        assert by_hand.answer({"在北 京": slots}, **options).candidates == []


def test_the_surest_passages_vote(by_hand: HandMade) -> None:
    """By the probability of the end token, not by the score; rejected ones do not count."""
    slots: dict[str, Slots] = {
        "北": [{"北": 0.6, END: 0.3}],
        "人": [{END: 0.9}],
        "海": [{"海": 0.4, END: 0.2}],
        "天北": [{"北": 0.5, END: 0.1}],
        "海上": [{"海": 0.4, END: 0.2}],
    }

    def answer(ratio: float | None, **options: Any) -> Any:
        return by_hand.answer(slots, max_answer_tokens=1, no_answer_ratio=ratio, **options)

    assert [c.text for c in answer(1.9).candidates] == ["北"]
    assert answer(1.9).spans == [Span(0, 0, 1), Span(3, 1, 2)]  # wherever it was not rejected
    assert answer(1.9).no_answer_score == pytest.approx(0.1, abs=1e-6)
    assert [(c.text, c.spans) for c in answer(2.1).candidates] == [
        ("海", [Span(2, 0, 1), Span(4, 0, 1)]),
        ("北", [Span(0, 0, 1), Span(3, 1, 2)]),
    ]
    assert answer(2.1, vote="mean").candidates[0].score == pytest.approx(0.8 / 3)
    assert answer(3.1).candidates == answer(99).candidates == answer(None).candidates
    mean = answer(None, vote="mean").candidates
    assert answer(np.inf, vote="mean").candidates == mean
    assert mean[0].score == pytest.approx(1.1 / 5)  # rejected ones count here
    weights = [1.0, 9.0, 2.0, 0.0, 1.0]
    weighted = answer(1.4, vote="weighted", passage_weights=weights)
    assert [c.text for c in weighted.candidates] == ["海"]


def test_passages_of_weight_zero_take_no_part(by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {"北": [{"北": 0.9}], "上": [{"上": 0.4}]}
    options: dict[str, Any] = {"vote": "weighted", "max_answer_tokens": 1}
    answer = by_hand.answer(slots, passage_weights=[0.0, 1.0], **options)
    assert [candidate.text for candidate in answer.candidates] == ["上"]
    assert by_hand.answer(slots, passage_weights=[0.0, 0.0], **options).candidates == []


def test_generated_answers_without_text_take_no_part(by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {
        "上海": [{"[PAD]": 0.9}, {END: 0.9}],
        "北": [{"北": 0.6}, {END: 0.9}],
    }
    answer = by_hand.answer(slots, mode="generative", max_answer_tokens=2)
    assert [candidate.text for candidate in answer.candidates] == ["北"]


def test_generated_unknown_token_takes_no_part(by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {"🎉": [{"[UNK]": 0.9}], "北": [{"北": 0.6}]}
    answer = by_hand.answer(slots, mode="generative", max_answer_tokens=1)
    assert [candidate.text for candidate in answer.candidates] == ["北"]


def test_citations_are_of_passages_that_gave_an_answer(by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {
        "北京北": [{"北": 0.9}],
        "上北": [{"上": 0.8}],
        "北北": [{END: 0.9}],
        "天北": [{"北": 0.1}],
    }
    answer = by_hand.answer(slots, max_answer_tokens=1)
    assert answer.spans == [Span(0, 0, 1), Span(0, 2, 3), Span(1, 1, 2), Span(3, 1, 2)]
    assert [c.spans for c in answer.candidates] == [answer.spans, [Span(1, 0, 1)]]


def test_answers_are_the_callers_text(by_hand: HandMade) -> None:
    """Equal when decoded; written as in the first passage that is cited."""
    found: Slots = [{"new": 0.5}, {"york": 0.5}, {END: 0.5}]
    slots = {"在NEW  York\u3000": found, "new york 在": found}
    answer = by_hand.answer(slots, max_answer_tokens=3)
    assert (answer.text, answer.spans) == ("NEW  York", [Span(0, 1, 10), Span(1, 0, 8)])
    assert answer.score == pytest.approx(vote(0.5, 0.5), abs=1e-6)


def test_unknown_characters_do_not_vote_together(by_hand: HandMade) -> None:
    """The tokens are the same, the texts are not."""
    found: Slots = [{"山": 0.9}, {"[UNK]": 0.6}]
    slots = {"山😀": found, "水山🎉": found, "山🎉火": [{"山": 0.9}, {"[UNK]": 0.5}]}
    answer = by_hand.answer(slots, max_answer_tokens=2)
    assert [(c.text, c.score, c.spans) for c in answer.candidates] == [
        ("山🎉", pytest.approx(vote(0.75, 0.7)), [Span(1, 1, 3), Span(2, 0, 2)]),
        ("山😀", pytest.approx(vote(0.75)), [Span(0, 0, 2)]),
    ]
    alone = by_hand.answer({"🎉": [{"[UNK]": 0.5}]}, max_answer_tokens=1)
    assert (alone.text, alone.spans) == ("🎉", [Span(0, 0, 1)])


@pytest.fixture
def bytes_by_hand(byte_level_dir: Path, monkeypatch: pytest.MonkeyPatch) -> HandMade:
    loaded = load_model(byte_level_dir, attention=None)
    return HandMade(MLMReader(loaded), reference.MLMReader(loaded), loaded, monkeypatch)


def test_spaces_that_belong_to_tokens(bytes_by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {
        "a new york": [{"Ġnew": 0.6}, {END: 0.6}],
        "1 new": [{"Ġnew": 0.5}, {END: 0.5}],
    }
    answer = bytes_by_hand.answer(slots, max_answer_tokens=2)
    assert (answer.text, answer.spans) == ("new", [Span(0, 2, 5), Span(1, 2, 5)])
    assert answer.score == pytest.approx(vote(0.6, 0.5), abs=1e-6)


def test_equal_texts_of_different_tokens_are_all_cited(bytes_by_hand: HandMade) -> None:
    either: Slots = [{"new": 0.4, "Ġnew": 0.4}]
    slots: dict[str, Slots] = {"new 1": either, "1 new": either}
    answer = bytes_by_hand.answer(slots, max_answer_tokens=1)
    assert answer.score == pytest.approx(vote(0.4, 0.4), abs=1e-6)
    assert answer.spans == [Span(0, 0, 3), Span(1, 2, 5)]
    # Its tokens are those of the first passage.
    swapped = bytes_by_hand.answer(slots, passages=["1 new", "new 1"], max_answer_tokens=1)
    assert swapped.spans == [Span(0, 2, 5), Span(1, 0, 3)]
    for one, token in ((answer, "new"), (swapped, "Ġnew")):
        assert one.token_ids == [bytes_by_hand.id_of(token)]


def test_windows_of_a_passage_vote_each(by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {
        "上北": [{"北": 0.6}],
        "北京": [{"北": 0.5}],
        "京人": [{END: 0.9}],
        "天": [{"天": 0.7}],
    }
    options: dict[str, Any] = {"max_passage_tokens": 2, "max_answer_tokens": 1}
    cut_off = by_hand.answer(slots, passages=["上北京人", "天"], **options)
    assert [c.text for c in cut_off.candidates] == ["天", "北"]
    assert cut_off.candidates[1].score == pytest.approx(vote(0.6), abs=1e-6)
    answer = by_hand.answer(slots, passages=["上北京人", "天"], stride=1, **options)
    assert [(c.text, c.score) for c in answer.candidates] == [
        ("北", pytest.approx(vote(0.6, 0.5))),
        ("天", pytest.approx(vote(0.7))),
    ]
    assert answer.spans == [Span(0, 1, 2)]
    mean = by_hand.answer(slots, passages=["上北京人", "天"], stride=1, vote="mean", **options)
    assert mean.score == pytest.approx(1.1 / 4, abs=1e-6)
    weighted = by_hand.answer(
        slots,
        passages=["上北京人", "天"],
        stride=1,
        vote="weighted",
        passage_weights=[0.5, 3.0],
        **options,
    )
    assert [(c.text, c.score) for c in weighted.candidates] == [
        ("天", pytest.approx(3 * 0.49 / (1 + 3 * 0.7))),
        ("北", pytest.approx((0.5 * 0.36 + 0.5 * 0.25) / (1 + 0.5 * 1.1))),
    ]


def test_no_answer_threshold(by_hand: HandMade) -> None:
    slots: dict[str, Slots] = {"北": [{"北": 0.5}]}
    score = by_hand.answer(slots, max_answer_tokens=1).score
    assert score == pytest.approx(1 / 6, abs=1e-6)
    kept = by_hand.answer(slots, max_answer_tokens=1, no_answer_threshold=score)
    assert kept.text == "北"
    empty = by_hand.answer(slots, max_answer_tokens=1, no_answer_threshold=np.nextafter(score, 1))
    assert (empty.text, empty.score, empty.token_ids, empty.spans) == ("", 0.0, [], [])
    assert empty.candidates == kept.candidates


def test_free_answers(by_hand: HandMade) -> None:
    """Any tokens; cited where they occur, written without spaces between Chinese characters."""
    slots: dict[str, Slots] = {
        "北 京": [{"北": 0.7}, {"京": 0.7}, {END: 0.7}],
        "上海": [{"天": 0.6}, {"new": 0.6}, {END: 0.6}],
    }
    answer = by_hand.answer(slots, mode="generative", max_answer_tokens=4)
    assert [(c.text, c.spans) for c in answer.candidates] == [
        ("北京", [Span(0, 0, 3)]),
        ("天new", []),
    ]
    assert answer.candidates[1].score == pytest.approx(vote(0.6), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"decoding": "exact"}, {"mode": "generative"}])
def test_constraint_replaces_the_spans(
    by_hand: HandMade, tiny: LoadedModel, options: dict[str, Any]
) -> None:
    slots: dict[str, Slots] = {"北京": [{"北": 0.7, "海": 0.3}, {END: 0.5}], "上": [{"上": 0.9}]}
    answer = by_hand.answer(
        slots, max_answer_tokens=2, constraint=trie(tiny, "海", "人北"), **options
    )
    assert (answer.text, answer.spans) == ("海", [])
    assert answer.score == pytest.approx(vote(0.4), abs=1e-6)


def test_a_constraint_for_each_question(
    reader: MLMReader, oracle: reference.MLMReader, tiny: LoadedModel
) -> None:
    constraints = [trie(tiny, "火"), None, trie(tiny, "月", "水")]
    for decoding in ("greedy", "exact"):
        options: dict[str, Any] = {"decoding": decoding, "min_answer_tokens": 1}
        ours, theirs = (
            one.answer_batch([(QUESTION, SOME)] * 3, constraints=constraints, **options)
            for one in (reader, oracle)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert_same_answer(a, b)
        assert ours[0].text == "火"
        assert_same_answer(ours[1], reader.answer(QUESTION, SOME, **options))
        assert ours[2].text in ("月", "水")


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("passages", [[], [""], ["", " \n"], ["\u200b"]])
def test_no_passages(reader: MLMReader, oracle: reference.MLMReader, passages: list[str]) -> None:
    for one in (reader, oracle):
        for options in ({}, {"decoding": "exact"}, {"mode": "generative"}):
            assert without_seconds(one.answer(QUESTION, passages, **options)) == Answer()


def test_texts_longer_than_the_limits(reader: MLMReader) -> None:
    """255 tokens of a passage and 63 of a question fit."""
    options: dict[str, Any] = {"min_answer_tokens": 1, "max_answer_tokens": 3}
    answer = reader.answer("中" * 500, ["山" * 300 + "水"], **options)
    assert_same_answer(answer, reader.answer("中" * 63, ["山" * 255], **options))
    shorter = reader.answer("中" * 62, ["山" * 254], **options)
    assert shorter.candidates[0].score != pytest.approx(answer.score, abs=1e-6)
    assert max(span.end for span in answer.spans) == 255
    assert_same_answer(
        reader.answer("中国北京", SOME, max_question_tokens=2), reader.answer("中国", SOME)
    )


def test_special_tokens_inside_texts(reader: MLMReader, oracle: reference.MLMReader) -> None:
    passages = ["北京[SEP]上海[CLS]天[MASK]气[PAD]大[UNK]", "[SEP]"]
    for decoding in ("greedy", "exact"):
        answers = [one.answer("[MASK]?", passages, decoding=decoding) for one in (reader, oracle)]
        assert_same_answer(*answers)
    limits = {"min_answer_tokens": 5, "max_answer_tokens": 5}
    whole = reader.answer("?", ["[SEP]"], decoding="exact", **limits)
    assert whole.text == "[SEP]"


def test_normalization_of_passages(tiny_bert_dir: Path) -> None:
    """A space counts as a comma where the model asks for it."""
    options: dict[str, Any] = {"decoding": "exact", "min_answer_tokens": 3}
    original = MLMReader.from_pretrained(tiny_bert_dir, normalization="original")
    assert original.answer(QUESTION, ["天 大"], **options).text == "天 大"
    plain = MLMReader.from_pretrained(tiny_bert_dir)
    assert plain.answer(QUESTION, ["天 大"], **options).text == ""


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"decoding": "beam"}, InputError, "decoding: expected one of greedy, exact, got 'beam'"),
    ({"mode": "both"}, InputError, "mode: expected one of extractive, generative, got 'both'"),
    ({"vote": "median"}, InputError, "vote: expected one of original, mean.*got 'median'"),
    ({"top_k": 2}, InputError, "top_k: expected 1 with decoding 'greedy'.*, got 2"),
    ({"top_k": 0}, InputError, "top_k: expected at least 1, got 0"),
    ({"top_k": 1.0}, InputError, "top_k: expected an integer, got float"),
    (
        {"decoding": "exact", "mode": "generative"},
        InputError,
        "decoding: expected 'greedy' with mode 'generative', got 'exact'",
    ),
    ({"min_answer_tokens": -1}, InputError, "min_answer_tokens: expected at least 0, got -1"),
    ({"max_answer_tokens": 0}, InputError, "max_answer_tokens: expected at least 1, got 0"),
    ({"min_answer_tokens": 17}, InputError, "max_answer_tokens: expected at least 17, got 16"),
    (
        {"max_answer_tokens": 500},
        InputError,
        "at most 512 tokens, the positions of the model, got .*; lower max_passage_tokens, "
        "max_question_tokens or max_answer_tokens",
    ),
    ({"max_passage_tokens": 0}, InputError, "max_passage_tokens: expected at least 1, got 0"),
    ({"max_question_tokens": 0}, InputError, "max_question_tokens: expected at least 1, got 0"),
    ({"stride": 255}, InputError, "stride: expected less than max_passage_tokens=255, got 255"),
    ({"no_answer_threshold": np.nan}, InputError, "no_answer_threshold: expected a number"),
    (
        {"beam_size": 3, "finish": "pool"},
        TypeError,
        "answer: unexpected keyword beam_size, finish; expected decoding, .*vote",
    ),
    ({"passage_weights": [1, 1, 1]}, InputError, "passage_weights: expected .* none otherwise"),
    ({"vote": "weighted"}, InputError, "passage_weights: expected one per passage"),
    ({"vote": "weighted", "passage_weights": [1]}, InputError, "one passage weight per passage, 3"),
    ({"constraint": "北京"}, TypeError, "constraint"),
    ({"constraint": fastmrc.Trie([[3]])}, ValueError, "constraint: expected no end token 3"),
    ({"constraint": fastmrc.Trie([[10**6]])}, ValueError, "constraint: expected tokens below"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options(
    reader: MLMReader, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reader.answer(QUESTION, SOME, **options)


def test_exact_and_free_needs_a_constraint_for_every_question(
    reader: MLMReader, tiny: LoadedModel
) -> None:
    pairs: list[Any] = [(QUESTION, SOME)] * 2
    options: dict[str, Any] = {"decoding": "exact", "mode": "generative"}
    one = trie(tiny, "海")
    with pytest.raises(InputError, match="which needs the spans of a passage or a constraint"):
        reader.answer_batch(pairs, constraints=[one, None], **options)
    answers = reader.answer_batch(pairs, constraints=[one, one], min_answer_tokens=1, **options)
    assert [answer.text for answer in answers] == ["海", "海"]


@pytest.mark.parametrize(
    ("question", "passages", "error", "message"),
    [
        ("", SOME, InputError, "question: expected a question, got empty text"),
        (" \n", SOME, InputError, "question: expected a question, got empty text"),
        (None, SOME, TypeError, "question: expected a string, got NoneType"),
        (QUESTION, "北京", TypeError, "question: expected a list of passages, got str"),
        (QUESTION, ["北", None], TypeError, r"passages\[1\] to be a string, got NoneType"),
        (QUESTION, ["\ud800"], InputError, "passages: expected text that UTF-8 can encode"),
    ],
)
def test_bad_texts(
    reader: MLMReader, question: Any, passages: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reader.answer(question, passages)


def test_an_error_leaves_the_reader_usable(reader: MLMReader) -> None:
    before = reader.answer(QUESTION, SOME)
    for options, error, _ in BAD_OPTIONS:
        with pytest.raises(error):
            reader.answer(QUESTION, SOME, **options)
    assert without_seconds(reader.answer(QUESTION, SOME)) == without_seconds(before)
