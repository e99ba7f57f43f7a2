"""Training: examples, batches, losses, the schedule, whole runs on tiny models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BERT_TOKENS, save_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmrc import InputError, MLMReader, Seq2SeqReader, SpanReader, UnsupportedModelError
from fastmrc.data import Pair, Passage, Question
from fastmrc.encoders.pooling import pooled
from fastmrc.errors import TrainingError
from fastmrc.pretrained import load_base, load_model, packaged_model_path
from fastmrc.reference.encoder import ReencodingEncoder
from fastmrc.similarity import SimilarityModel
from fastmrc.text import TextCodec
from fastmrc.training import LossWeights, TrainingOptions, WindowOptions, train
from fastmrc.training import reading as reading_module
from fastmrc.training import run as run_module
from fastmrc.training.batches import (
    Row,
    TrainingBatches,
    collate,
    pair_row,
    seq2seq_row,
    slots_row,
    span_row,
    text_row,
)
from fastmrc.training.copying import fit_copying, initialize_copying
from fastmrc.training.examples import Corpus, ReadingExample, find_tokens
from fastmrc.training.near import NearDocuments
from fastmrc.training.objectives import batch_loss
from fastmrc.training.trainer import Schedule, last_checkpoint

pytest.importorskip("accelerate", reason="training needs the extra `train`")
pytest.importorskip("bm25s", reason="training needs the extra `train`")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "北京是中国的大名。上海在中国的水中，天气有火。天木在北京时间，有山有水。"  # noqa: RUF001
QUESTIONS = [
    Question("q1", "中国的大名是哪里", (Passage(TEXT, "北京"),)),
    Question("q2", "上海在哪里", (Passage(TEXT, "中国的水中"), Passage("天气", ""))),
    Question("q3", "谁", (Passage("上海有人。北京有水，山在一月。", ""),)),  # noqa: RUF001
    Question("q4", "天气", (Passage("New York 天气有火", "New York"),)),
]
PAIRS = [Pair("北京在哪里", ("北京是何地",)), Pair("谁是中国人", ("何人是中国的", "哪人"))]


@pytest.fixture(scope="module")
def codec(tiny_bert_dir: Path) -> TextCodec:
    loaded = load_model(tiny_bert_dir)
    return TextCodec(loaded.tokenizer, loaded.normalization)


def make_corpus(codec: TextCodec, **options: Any) -> Corpus:
    corpus = Corpus(codec, WindowOptions(**options))
    for question in QUESTIONS:
        corpus.add_question(question)
    for pair in PAIRS:
        corpus.add_pair(pair)
    return corpus


def write_data(path: Path, questions: list[Question], pairs: list[Pair] | None = None) -> Path:
    records: list[dict[str, Any]] = [
        {
            "id": q.id,
            "question": q.question,
            "passages": [{"passage": p.text, "answer": p.answer} for p in q.passages],
        }
        for q in questions
    ]
    records += [{"text": p.text, "synonyms": list(p.synonyms)} for p in pairs or []]
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


# --- examples ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=3))
def test_find_tokens(passage: list[int], answer: list[int]) -> None:
    n = len(answer)
    expected = [i for i in range(len(passage)) if n and passage[i : i + n] == answer]
    found = find_tokens(np.array(passage, np.int32), np.array(answer, np.int32))
    assert found.tolist() == [i for i in expected if i + n <= len(passage)]


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**31), index=st.integers(0, 3), size=st.integers(1, 40))
def test_an_example_holds_its_answer(codec: TextCodec, seed: int, index: int, size: int) -> None:
    corpus = make_corpus(codec, window_tokens=(size, size), negatives=0.5)
    example = corpus.draw(index, np.random.default_rng(seed))
    question = QUESTIONS[index]
    assert example.id == question.id and len(example.passage) <= size
    texts = [codec.encode_passages([p.text])[0].token_ids.tolist() for p in question.passages]
    window = example.passage.tolist()
    assert any(window == text[i : i + len(window)] for text in texts for i in range(len(text)))
    for place in example.places.tolist():
        assert window[place : place + len(example.answer)] == example.answer.tolist()
    answers = [p.answer for p in question.passages if p.answer]
    held = [a for a in answers if find_tokens(example.passage, codec.encode_question(a)).size]
    assert codec.decode(example.answer.tolist()) == (held[0].lower() if held else "")
    assert (example.places.size > 0) == bool(held)


def test_windows_around_the_answer_hold_it(codec: TextCodec) -> None:
    corpus = make_corpus(codec, window_tokens=(6, 12), negatives=0.0)
    for seed in range(50):
        assert corpus.draw(0, np.random.default_rng(seed)).answer.size
    corpus = make_corpus(codec, window_tokens=(6, 6), negatives=1.0)
    drawn = [corpus.draw(0, np.random.default_rng(seed)).answer.size for seed in range(50)]
    assert 0 in drawn and max(drawn) > 0


def test_the_target_is_the_first_answer_whose_parts_occur(codec: TextCodec) -> None:
    corpus = Corpus(codec, WindowOptions(window_tokens=(50, 50)))
    # As in the original: any passage's answer counts, and space-separated parts count one by one.
    passages = (Passage("山在北京", "天木 上海"), Passage("上海有水，天木有山", "水"))  # noqa: RUF001
    corpus.add_question(Question("a", "谁", passages))
    drawn = [corpus.draw(0, np.random.default_rng(seed)) for seed in range(30)]
    answers = {codec.decode(e.passage.tolist())[:2]: e for e in drawn}
    assert answers["山在"].answer.size == 0
    assert answers["上海"].answer.tolist() == codec.encode_question("天木,上海").tolist()
    assert answers["上海"].places.size == 0


def test_an_answer_that_occurs_nowhere_is_named(codec: TextCodec) -> None:
    corpus = Corpus(codec, WindowOptions())
    corpus.add_question(Question("lost", "谁", (Passage("北京有山", "上海"),)))
    corpus.add_question(Question("empty", "谁", (Passage(" ", ""),)))
    assert (corpus.not_found, corpus.num_questions) == (["lost"], 0)


def test_distractors_share_words_and_do_not_hold_the_answer(codec: TextCodec) -> None:
    corpus = make_corpus(codec, window_tokens=(60, 60), negatives=0.0, distractors=1.0)
    third = codec.encode_passages([QUESTIONS[2].passages[0].text])[0].token_ids.tolist()
    for seed in range(20):
        # Of the other passages only the third question's has words of these questions ...
        near = corpus.draw(1, np.random.default_rng(seed))
        assert near.passage.tolist() == third and near.answer.size == near.places.size == 0
        # ... and it holds the first one's answer.
        assert corpus.draw(0, np.random.default_rng(seed)).answer.size


def test_documents_are_ranked_by_shared_words() -> None:
    documents = [[2, 1, 9], [1, 2, 9], [5, 6, 7], []]
    near = NearDocuments([np.array(tokens, np.int32) for tokens in documents])
    for question, count, expected in (
        ([1, 2], 10, [1, 0]),  # both tokens, and next to each other
        ([1, 2], 1, [1]),
        ([9], 10, [0, 1]),  # equal: by number
        ([4], 10, []),
        ([], 10, []),
    ):
        assert near.nearest(np.array(question, np.int32), count).tolist() == expected


def test_cloze_questions_ask_for_a_span_of_the_passage(codec: TextCodec) -> None:
    corpus = make_corpus(codec, window_tokens=(20, 30), cloze_drop=0.0)
    made = [corpus.draw_cloze(0, np.random.default_rng(seed)) for seed in range(60)]
    examples = [example for example in made if example is not None]
    assert len(examples) > 20
    text = codec.encode_passages([TEXT])[0].token_ids.tolist()
    for example in examples:
        passage = example.passage
        at = [i for i in range(len(text)) if text[i : i + len(passage)] == passage.tolist()]
        assert at and example.answer.size and example.places.size
        for place in example.places.tolist():
            copied = example.passage[place : place + len(example.answer)]
            assert copied.tolist() == example.answer.tolist()
        assert codec.decode(example.answer.tolist()).isalnum()


def test_no_cloze_question_without_a_sentence(codec: TextCodec) -> None:
    corpus = Corpus(codec, WindowOptions())
    corpus.add_question(Question("a", "谁", (Passage("北京。山。", ""),)))
    assert corpus.draw_cloze(0, np.random.default_rng(0)) is None


# --- rows and batches --------------------------------------------------------------------------


def example_of(codec: TextCodec, passage: str, answer: str, question: str = "谁") -> ReadingExample:
    tokens = codec.encode_passages([passage])[0].token_ids
    target = codec.encode_question(answer)
    return ReadingExample(
        "id", codec.encode_question(question), tokens, target, find_tokens(tokens, target)
    )


def test_rows_are_the_inputs_of_the_readers(tiny_bert_dir: Path, codec: TextCodec) -> None:
    example = example_of(codec, TEXT, "北京", "哪里")
    for reader, row in (
        (Seq2SeqReader.from_pretrained(tiny_bert_dir), seq2seq_row(example, codec, 32)),
        (MLMReader.from_pretrained(tiny_bert_dir), slots_row(example, codec, 16)),
    ):
        prepared: Any = reader
        options = prepared._checked_options({})
        window = prepared._prepare("q", ("哪里", [TEXT]), None, None, options).windows[0]
        assert row.input_ids[: row.prefix].tolist() == window.input_ids.tolist()
        for label, column in row.copies.tolist():
            assert row.input_ids[column] == row.labels[label]
        assert {label for label, _ in row.copies.tolist()} == {0, 1}


def test_span_rows_are_the_input_of_the_span_reader(bert_qa_dir: Path) -> None:
    reader: Any = SpanReader.from_pretrained(bert_qa_dir)
    codec = reader._codec
    row = span_row(example_of(codec, TEXT, "大名", "哪里"), codec)
    options = reader._checked_options({})
    window = reader._prepare("q", ("哪里", [TEXT]), None, None, options).windows[0]
    assert row.input_ids.tolist() == window.input_ids.tolist()
    assert row.token_types.tolist() == window.token_types.tolist()
    assert max(row.token_types) == 1  # the tokenizer of this model says that it gives types
    start, end = row.columns.tolist()
    assert codec.decode(row.input_ids[start : end + 1].tolist()) == "大名"
    assert span_row(example_of(codec, "北京", "上海"), codec).columns.tolist() == [0, 0]


def test_span_rows_have_types_where_the_reader_gives_them(codec: TextCodec) -> None:
    assert not codec.gives_token_types
    assert not span_row(example_of(codec, TEXT, "大名"), codec).token_types.any()


def test_long_answers_have_no_end(codec: TextCodec) -> None:
    example = example_of(codec, TEXT, TEXT[:10])
    sep = codec.sep_id
    assert seq2seq_row(example, codec, 11).labels.tolist() == [*example.answer.tolist(), sep]
    assert seq2seq_row(example, codec, 10).labels.tolist() == example.answer.tolist()
    assert slots_row(example, codec, 4).labels.tolist() == example.answer[:4].tolist()
    none = example_of(codec, "北京", "上海")
    none = replace(none, answer=none.answer[:0], places=none.places[:0])
    assert seq2seq_row(none, codec, 32).labels.tolist() == [sep]
    assert slots_row(none, codec, 16).labels.tolist() == [sep]


@pytest.mark.parametrize("fixture", ["tiny_bert_dir", "tiny_roberta_dir", "tiny_electra_dir"])
def test_logits_in_training_are_those_of_the_original(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    """The 4-D mask, types and positions of a padded batch, against encoding each prefix anew."""
    directory = request.getfixturevalue(fixture)
    loaded = load_base(directory)
    codec = TextCodec(loaded.tokenizer, loaded.normalization)
    rows = [
        seq2seq_row(example_of(codec, TEXT, "北京是"), codec, 32),
        seq2seq_row(example_of(codec, "上海有水", "水"), codec, 32),
    ]
    loaded.model.eval()
    reference = ReencodingEncoder(load_model(directory).model, end_id=codec.sep_id)
    logits = logits_at_targets(loaded.model, collate(rows, loaded.model.config, 0))
    n = 0
    for row in rows:
        next_logits = reference.next_logits_for([row.input_ids[: row.prefix].tolist()])
        for t in range(len(row.labels)):
            expected = next_logits([row.labels[:t].tolist()], [0])[0, 0]
            ours = torch.log_softmax(logits[n], -1).numpy()
            np.testing.assert_allclose(ours, expected, atol=1e-4)
            n += 1


@torch.no_grad()
def logits_at_targets(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = model(**batch["inputs"]).logits
    return logits[batch["row"], batch["column"]]


def test_slot_logits_in_training_are_those_of_the_reader(tiny_bert_dir: Path) -> None:
    loaded = load_base(tiny_bert_dir)
    codec = TextCodec(loaded.tokenizer, loaded.normalization)
    loaded.model.eval()
    rows = [slots_row(example_of(codec, text, "北京"), codec, 4) for text in (TEXT, "北京有水")]
    ours = logits_at_targets(loaded.model, collate(rows, loaded.model.config, 0))
    expected = []
    for row in rows:
        tokens = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            expected.append(loaded.model(input_ids=tokens).logits[0, 1 : 1 + len(row.labels)])
    torch.testing.assert_close(ours, torch.cat(expected), atol=1e-4, rtol=0)


def options_of(task: Any = "mixed", **changes: Any) -> TrainingOptions:
    small: dict[str, Any] = {
        "batch_size": 4,
        "max_steps": 6,
        "dropout": 0.0,
        "eval_steps": 3,
        "eval_questions": 4,
        "bfloat16": False,
        "windows": WindowOptions(window_tokens=(8, 24), question_tokens=16),
    }
    return TrainingOptions(task=task, **(small | changes))


def batches_of(codec: TextCodec, directory: Path, options: TrainingOptions) -> TrainingBatches:
    corpus = Corpus(codec, options.windows)
    for question in QUESTIONS:
        corpus.add_question(question)
    for pair in PAIRS:
        corpus.add_pair(pair)
    return TrainingBatches(corpus, codec, load_model(directory).model.config, options, 96)


def assert_same_batch(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert (ours["objective"], ours["ids"]) == (theirs["objective"], theirs["ids"])
    for name, tensor in ours.items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    for name, tensor in ours["inputs"].items():
        torch.testing.assert_close(tensor, theirs["inputs"][name], rtol=0, atol=0)


def test_a_batch_depends_on_seed_and_number_only(codec: TextCodec, tiny_bert_dir: Path) -> None:
    options = options_of(cloze=0.3)
    batches = batches_of(codec, tiny_bert_dir, options)
    forwards = [batches[i] for i in range(70)]
    again = batches_of(codec, tiny_bert_dir, options)
    for i in (69, 3, 40):
        assert_same_batch(again[i], forwards[i])
    other = batches_of(codec, tiny_bert_dir, replace(options, seed=1))
    assert any(other[i]["ids"] != forwards[i]["ids"] for i in range(32))


def test_a_mixture_takes_its_objectives_in_turn(codec: TextCodec, tiny_bert_dir: Path) -> None:
    for share, counts in ((0.5, [24, 24, 16]), (0.75, [12, 36, 16]), (0.0, [48, 0, 16])):
        options = options_of(simbert_share=0.25, retrieval_share=0.0, mlm_share=share)
        batches = batches_of(codec, tiny_bert_dir, options)
        objectives = [batches[i]["objective"] for i in range(64)]
        assert [objectives.count(o) for o in ("seq2seq", "mlm", "simbert")] == counts
        assert objectives[:32] != sorted(objectives[:32])
    options = options_of(simbert_share=0.25, retrieval_share=0.5)
    batches = batches_of(codec, tiny_bert_dir, options)
    objectives = [batches[i]["objective"] for i in range(32)]
    counts = [objectives.count(o) for o in ("seq2seq", "mlm", "simbert", "retrieval")]
    assert counts == [4, 4, 8, 16]


def test_every_question_comes_once_in_each_pass(codec: TextCodec, tiny_bert_dir: Path) -> None:
    batches = batches_of(codec, tiny_bert_dir, options_of("seq2seq"))
    ids = [name for i in range(32) for name in batches[i]["ids"]]
    assert {name: ids.count(name) for name in set(ids)} == {q.id: 32 for q in QUESTIONS}


def test_pairs_come_in_both_orders(codec: TextCodec, tiny_bert_dir: Path) -> None:
    batch = batches_of(codec, tiny_bert_dir, options_of("simbert"))[0]
    tokens, prefix = batch["inputs"]["input_ids"], batch["prefix"]
    for a, b in ((0, 1), (2, 3)):
        first = [tokens[row, 1 : prefix[row] - 1].tolist() for row in (a, b)]
        answers = [batch["label"][batch["row"] == row].tolist()[:-1] for row in (a, b)]
        assert first == answers[::-1]


def test_the_first_text_of_a_pair_may_be_masked(codec: TextCodec, tiny_bert_dir: Path) -> None:
    batches = batches_of(codec, tiny_bert_dir, options_of("simbert", mask_share=0.5))
    masked = whole = 0
    for n in range(8):
        batch = batches[n]
        tokens, prefix = batch["inputs"]["input_ids"], batch["prefix"]
        for row in range(len(prefix)):
            first = tokens[row, 1 : prefix[row] - 1]
            # The first text of a row is the second one of its partner, which is never masked.
            text = batch["label"][batch["row"] == row ^ 1][:-1]
            hidden = first == codec.mask_id
            assert torch.equal(first[~hidden], text[~hidden])
            masked, whole = masked + int(hidden.sum()), whole + len(first)
    assert 0.3 < masked / whole < 0.7


def test_questions_are_drawn_with_a_window_around_their_answer(
    codec: TextCodec, tiny_bert_dir: Path
) -> None:
    options = options_of("retrieval", retrieval_pairs=2)
    batches = batches_of(codec, tiny_bert_dir, options)
    drawn = set()
    for n in range(32):
        batch = batches[n]
        ids, prefix = batch["inputs"]["input_ids"], batch["prefix"].tolist()
        assert batch["objective"] == "retrieval" and len(prefix) in (2, 4)
        assert batch["label"].numel() == batch["row"].numel() == 0
        texts = [codec.decode(ids[row, 1 : n - 1].tolist()) for row, n in enumerate(prefix)]
        for question, window, name in zip(texts[::2], texts[1::2], batch["ids"][::2], strict=True):
            (own,) = [q for q in QUESTIONS if q.id == name]
            assert question == codec.decode(codec.encode_question(own.question).tolist())
            assert {"q1": "北京", "q4": "new york"}.get(name, "") in window
            drawn.add(name)
        assert len(set(texts[1::2])) == len(texts[1::2])
    assert drawn == {q.id for q in QUESTIONS}


# --- losses ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eager(tiny_bert_dir: Path) -> Any:
    loaded = load_base(tiny_bert_dir)
    assert loaded.missing == ()
    loaded.model.eval()
    return loaded.model


def cross_entropy(logits: Any, labels: Any) -> float:
    rows = np.asarray(logits, np.float64)
    most = rows.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(rows - most).sum(axis=1)) + most[:, 0]
    return float((log_sum - rows[np.arange(len(rows)), np.asarray(labels)]).mean())


def test_reading_losses_literally(eager: Any, codec: TextCodec) -> None:
    rows = [
        seq2seq_row(example_of(codec, TEXT, "北京"), codec, 32),
        seq2seq_row(example_of(codec, "上海有水", "有水"), codec, 32),
    ]
    batch = collate(rows, eager.config, 0) | {"objective": "seq2seq"}
    weights = LossWeights(passage=0.5, attention=0.25, attention_heads=1)
    with torch.no_grad():
        total, parts = batch_loss(eager, batch, weights, "mean")
        output = eager(**batch["inputs"], output_attentions=True)
    logits = output.logits[batch["row"], batch["column"]].numpy()
    labels = np.concatenate([row.labels for row in rows])
    token = cross_entropy(logits, labels)
    allowed = np.full(logits.shape, -np.inf)
    attention = output.attentions[-1].numpy()
    paid, n = [], 0
    for b, row in enumerate(rows):
        for t in range(len(row.labels)):
            present = set(row.input_ids[: row.prefix].tolist())
            allowed[n, list(present)] = logits[n, list(present)]
            columns = [column for label, column in row.copies.tolist() if label == t]
            if columns:
                paid.append(-math.log(attention[b, 0, row.columns[t], columns].sum()))
            n += 1
    passage, attended = cross_entropy(allowed, labels), float(np.mean(paid))
    assert float(parts["token"]) == pytest.approx(token, abs=1e-4)
    assert float(parts["passage"]) == pytest.approx(passage, abs=1e-4)
    assert float(parts["attention"]) == pytest.approx(attended, abs=1e-4)
    expected = token + 0.5 * passage + 0.25 * attended
    assert float(total) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_similarity_loss_literally(eager: Any, codec: TextCodec, pooling: Any) -> None:
    texts = [("北京在哪里", "北京是何地"), ("谁是人", "何人")]
    tokens = [[codec.encode_question(text) for text in pair] for pair in texts]
    rows: list[Row] = []
    for first, second in tokens:
        rows += [pair_row(first, second, "p", codec), pair_row(second, first, "p", codec)]
    batch = collate(rows, eager.config, 0) | {"objective": "simbert"}
    with torch.no_grad():
        total, parts = batch_loss(eager, batch, LossWeights(similarity=2.0), pooling)
    vectors = []
    for row in rows:  # each text alone: what it becomes must not depend on what follows it
        alone = torch.from_numpy(row.input_ids[: row.prefix].astype(np.int64))[None]
        with torch.no_grad():
            hidden = eager.base_model(input_ids=alone).last_hidden_state[0].numpy()
        vector = hidden.mean(axis=0) if pooling == "mean" else hidden[0]
        vectors.append(vector / np.linalg.norm(vector))
    scores = np.array(vectors) @ np.array(vectors).T * 30
    np.fill_diagonal(scores, -np.inf)
    similarity = cross_entropy(scores, [1, 0, 3, 2])
    assert float(parts["similarity"]) == pytest.approx(similarity, abs=1e-3)
    assert float(total) == pytest.approx(float(parts["token"]) + 2 * similarity, abs=1e-2)


def test_pooled_vectors_ignore_padding() -> None:
    hidden = torch.randn(2, 5, 3)
    vectors = pooled(hidden, torch.tensor([3, 5]), "mean")
    expected = torch.nn.functional.normalize(hidden[0, :3].mean(dim=0), dim=0)
    torch.testing.assert_close(vectors[0], expected)


def test_span_loss_literally(bert_qa_dir: Path) -> None:
    loaded = load_base(bert_qa_dir, task="question-answering")
    loaded.model.eval()
    codec = TextCodec(loaded.tokenizer, loaded.normalization)
    rows = [
        span_row(example_of(codec, TEXT, "大名"), codec),
        span_row(example_of(codec, "北京有水", "上海"), codec),
    ]
    batch = collate(rows, loaded.model.config, 0) | {"objective": "span"}
    with torch.no_grad():
        total, _ = batch_loss(loaded.model, batch, LossWeights(), "mean")
    expected = []
    for row in rows:
        inputs = {
            "input_ids": torch.from_numpy(row.input_ids.astype(np.int64))[None],
            "token_type_ids": torch.from_numpy(row.token_types.astype(np.int64))[None],
        }
        with torch.no_grad():
            output = loaded.model(**inputs)
        ends = (output.start_logits, output.end_logits)
        expected += [cross_entropy(e.numpy(), [c]) for e, c in zip(ends, row.columns, strict=True)]
    assert float(total) == pytest.approx(float(np.mean(expected)), abs=1e-4)


# --- copying -----------------------------------------------------------------------------------


def test_fit_copying_is_the_best_map_of_its_rank() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(400, 12))
    targets = states @ rng.normal(size=(12, 7)) + 0.1 * rng.normal(size=(400, 7)) + 3
    into, out, mean = (
        a.numpy() for a in fit_copying(torch.tensor(states), torch.tensor(targets), 3)
    )
    fitted = (states - mean) @ into @ out.T
    centred, goal = states - states.mean(axis=0), targets - targets.mean(axis=0)
    full = centred @ np.linalg.lstsq(centred, goal, rcond=None)[0]
    u, s, v = np.linalg.svd(full, full_matrices=False)
    best = np.sum((goal - u[:, :3] * s[:3] @ v[:3]) ** 2)  # reduced-rank regression
    assert np.sum((goal - fitted) ** 2) == pytest.approx(best, rel=0.02)
    assert np.sum((goal - fitted) ** 2) < 0.9 * np.sum((goal - fitted[:, ::-1]) ** 2)


def test_copying_heads_name_the_token_they_attend_to(tmp_path: Path) -> None:
    directory = save_model(
        tmp_path / "m", "BertForMaskedLM", BERT_TOKENS, num_attention_heads=1, hidden_act="gelu"
    )
    loaded = load_base(directory)
    codec = TextCodec(loaded.tokenizer, loaded.normalization)
    corpus = make_corpus(codec)
    model: Any = loaded.model
    attention = model.bert.encoder.layer[-1].attention
    row = codec.encode_passages([TEXT])[0].token_ids.astype(np.int64)
    tokens = torch.from_numpy(np.concatenate([[codec.cls_id], row, [codec.sep_id]]))

    @torch.no_grad()
    def named() -> float:
        """Share of the tokens whose output row is nearest to what attending to them brings."""
        states = model.bert(input_ids=tokens[None], output_hidden_states=True).hidden_states[-2][0]
        copied = attention.output.dense(attention.self.value(states)) - attention.output.dense.bias
        rows = model.get_output_embeddings().weight
        distance = torch.cdist(copied / 8.0 + rows[tokens].mean(dim=0), rows)
        return float((distance.argmin(dim=1) == tokens).float().mean())

    assert named() < 0.2
    initialize_copying(model, codec, corpus.documents, 1, 0)
    assert named() > 0.6


def test_copying_needs_the_layers_of_bert(tiny_modernbert_dir: Path, tiny_bert_dir: Path) -> None:
    loaded = load_base(tiny_modernbert_dir)
    codec = TextCodec(loaded.tokenizer, loaded.normalization)
    documents = make_corpus(codec).documents
    with pytest.raises(UnsupportedModelError, match="attention layers"):
        initialize_copying(loaded.model, codec, documents, 1, 0)
    loaded = load_base(tiny_bert_dir)
    with pytest.raises(UnsupportedModelError, match="copy_heads: expected 1 to 2"):
        initialize_copying(loaded.model, codec, documents, 3, 0)


# --- the schedule ------------------------------------------------------------------------------


def test_schedule_by_steps() -> None:
    schedule = Schedule(100, None, 0.1)
    rates = [schedule(step) for step in range(101)]
    assert max(Schedule(6, None, 0.05)(step) for step in range(7)) <= 1
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0) and rates[55] == pytest.approx(0.5)
    assert rates[100] == 0.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_schedule_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("fastmrc.training.trainer.time.monotonic", lambda: now[0])
    schedule = Schedule(10**6, 100.0, 0.0)
    now[0] += 25
    assert schedule(1) == pytest.approx(0.75)
    kept = dict(schedule.__dict__)
    assert kept == {"spent": 25.0}  # all that LambdaLR keeps in a checkpoint
    now[0] = 7.0  # another process, another clock
    resumed = Schedule(10**6, 100.0, 0.0)
    resumed.__dict__.update(kept)
    now[0] += 25
    assert resumed(2) == pytest.approx(0.5)
    now[0] += 60
    assert resumed(3) == 0.0 and resumed.progress(3) == 1.0


# --- whole runs --------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.jsonl", QUESTIONS, PAIRS)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_retrieval_loss_literally(eager: Any, codec: TextCodec, pooling: Any) -> None:
    texts = ["北京在哪里", "北京是中国的首都，有山有水，天气是一二三四五", "谁", "上海有水"]
    rows = [text_row(codec.encode_question(text), text, codec) for text in texts]
    batch = collate(rows, eager.config, 0) | {"objective": "retrieval"}
    vectors = []
    with torch.no_grad():
        total, parts = batch_loss(eager, batch, LossWeights(), pooling)
        for row in rows:
            ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
            hidden = eager.base_model(input_ids=ids).last_hidden_state[0].numpy()
            vector = hidden.mean(axis=0) if pooling == "mean" else hidden[0]
            vectors.append(vector / np.linalg.norm(vector))
    scores = 30 * np.array(vectors) @ np.array(vectors).T
    np.fill_diagonal(scores, -1e12)
    expected = cross_entropy(scores, [1, 0, 3, 2])
    assert set(parts) == {"similarity"}
    assert float(total) == float(parts["similarity"]) == pytest.approx(expected, abs=1e-3)


def test_every_reader_loads_what_a_mixture_gives(
    tiny_bert_dir: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    summaries = []
    result = train(
        tiny_bert_dir,
        [data],
        output,
        options_of(cloze=0.2, simbert_share=0.25, copy_heads=1, normalization="original"),
        held_out=data,
        on_start=lambda summary, initialized: summaries.append((summary, initialized)),
    )
    assert result.steps == 6 and math.isfinite(result.loss)
    assert set(result.scores) == {
        "seq2seq_em", "seq2seq_f1", "mlm_em", "mlm_f1", "simbert_top1", "retrieval_top1", "score"
    }  # fmt: skip
    summary, initialized = summaries[0]
    assert (summary.questions, summary.answered, summary.pairs) == (4, 3, 3)
    assert initialized == ()
    for reader_class in (Seq2SeqReader, MLMReader):
        answer = reader_class.from_pretrained(output).answer("谁", [TEXT])
        assert answer.text == "" or answer.text in TEXT
    model = SimilarityModel.from_pretrained(output)
    assert model.pooling == "mean" and len(model.generate("谁", 3, max_tokens=4)) == 3
    settings = json.loads((output / "fastmrc.json").read_text(encoding="utf-8"))
    lengths = {"max_passage_tokens": 24, "stride": 12, "max_question_tokens": 16}
    assert settings == {
        "normalization": "original",
        "pooling": "mean",
        "reading": {
            "seq2seq": lengths | {"max_answer_tokens": 32},
            "mlm": lengths | {"max_answer_tokens": 16},
        },
    }
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "data.jsonl" in card and "| seed | 0 |" in card and str(tmp_path) not in card
    left = {path.name for path in output.iterdir()}
    assert not {"checkpoints", ".lock"} & left


def test_the_span_reader_loads_its_task(tiny_bert_dir: Path, data: Path, tmp_path: Path) -> None:
    seen = []
    result = train(
        tiny_bert_dir,
        [data],
        tmp_path / "out",
        options_of("span"),
        held_out=data,
        on_start=lambda _, initialized: seen.append(initialized),
    )
    assert set(result.scores) == {"span_em", "span_f1", "score"}
    assert seen == [("qa_outputs.bias", "qa_outputs.weight")]
    answer = SpanReader.from_pretrained(tmp_path / "out").answer("谁", [TEXT])
    assert answer.text in TEXT


@pytest.mark.parametrize(
    ("task", "reader_class"), [("seq2seq", Seq2SeqReader), ("mlm", MLMReader), ("span", SpanReader)]
)
def test_a_reader_learns_its_questions(
    task: Any, reader_class: Any, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    """The loss falls, and the reader answers what it was trained on."""
    questions = [QUESTIONS[0], QUESTIONS[1]]
    data = write_data(tmp_path / "data.jsonl", questions)
    options = options_of(
        task,
        max_steps=150,
        learning_rate=3e-3,
        weight_decay=0.0,
        eval_steps=75,
        windows=WindowOptions(window_tokens=(60, 60), question_tokens=16, negatives=0.0),
    )
    result = train(tiny_bert_dir, [data], tmp_path / "out", options)
    log = json.loads((tmp_path / "out" / "training_log.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] == result.loss < 0.3 * losses[0]
    reader = reader_class.from_pretrained(tmp_path / "out")
    for question in questions:
        text, passages = question.pair
        assert reader.answer(text, passages).text == question.passages[0].answer


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], None]:
    """Let training die in the middle of a step, as a kill would."""
    compute = run_module.ReaderTrainer.compute_loss

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise Killed
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(run_module.ReaderTrainer, "compute_loss", dying)
    return lambda: monkeypatch.setattr(run_module.ReaderTrainer, "compute_loss", compute)


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    tiny_bert_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(dropout=0.1, max_steps=9, eval_steps=3, cloze=0.3)
    whole = train(tiny_bert_dir, [data], tmp_path / "whole", options, held_out=data)
    revive = kill_at(monkeypatch, 8)
    with pytest.raises(Killed):
        train(tiny_bert_dir, [data], tmp_path / "killed", options, held_out=data)
    assert last_checkpoint(tmp_path / "killed" / "checkpoints").name == "checkpoint-6"  # type: ignore[union-attr]
    # A checkpoint that was being written has no trainer state yet.
    (tmp_path / "killed" / "checkpoints" / "checkpoint-7").mkdir()
    revive()
    resumed = train(tiny_bert_dir, [data], tmp_path / "killed", options, held_out=data)
    assert resumed.steps == whole.steps == 9
    logs = [
        json.loads((tmp_path / name / "training_log.json").read_text(encoding="utf-8"))
        for name in ("whole", "killed")
    ]
    for ours, theirs in zip(*logs, strict=True):
        for key in ("step", "loss", "learning_rate", "eval_score"):
            assert ours.get(key) == pytest.approx(theirs.get(key), abs=1e-6)
    models = [load_model(tmp_path / name).model.state_dict() for name in ("whole", "killed")]
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], atol=1e-6, rtol=0)


def test_a_resumed_run_may_be_longer(
    tiny_bert_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revive = kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        train(tiny_bert_dir, [data], tmp_path / "out", options_of())
    revive()
    result = train(tiny_bert_dir, [data], tmp_path / "out", options_of(max_steps=8))
    assert result.steps == 8


def test_the_first_bound_ends_a_run(codec: TextCodec) -> None:
    corpus = make_corpus(codec)  # four questions, three pairs

    def steps(task: Any = "mlm", **bounds: Any) -> int:
        return reading_module._num_steps(TrainingOptions(task=task, batch_size=2, **bounds), corpus)

    assert steps() == 6 and steps(max_steps=5) == 5 and steps(epochs=2) == 4
    assert steps(max_steps=5, epochs=2) == 4 and steps("simbert", epochs=2) == 6
    assert steps("retrieval", epochs=2, retrieval_pairs=4) == 2
    assert steps(max_hours=1.0) > 10**6 and steps(max_hours=1.0, epochs=1) == 2


def test_a_run_stops_in_time_and_keeps_its_model(
    tiny_bert_dir: Path, data: Path, tmp_path: Path
) -> None:
    options = options_of(max_steps=None, max_hours=1.0 / 3600)
    result = train(tiny_bert_dir, [data], tmp_path / "out", options, held_out=data)
    assert result.steps >= 1 and result.hours >= 1.0 / 3600
    assert "score" in result.scores
    assert Seq2SeqReader.from_pretrained(tmp_path / "out")


def test_the_best_checkpoint_is_kept(
    tiny_bert_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([5.0, 9.0, 1.0])
    kept: list[torch.Tensor] = []

    def score(loaded: Any, *_: Any) -> dict[str, float]:
        kept.append(loaded.model.get_input_embeddings().weight.detach().clone())
        return {"score": next(scores)}

    monkeypatch.setattr(reading_module, "evaluate_model", score)
    options = options_of(max_steps=9)
    result = train(tiny_bert_dir, [data], tmp_path / "out", options, held_out=data)
    assert result.scores == {"score": 9.0}
    saved: Any = load_model(tmp_path / "out").model
    torch.testing.assert_close(saved.get_input_embeddings().weight, kept[1])
    assert not torch.allclose(kept[1], kept[2])


# --- what goes wrong ---------------------------------------------------------------------------


def with_infinite_gradients(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda loss: loss * math.nan, r"loss: .* got nan at step \d+ \(seq2seq; questions .*q2"),
        (with_infinite_gradients, r"gradients: .* at step \d+ \(seq2seq; questions .*q2"),
    ],
    ids=["loss", "gradients"],
)
def test_what_is_not_finite_stops_the_run(
    tiny_bert_dir: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    breaks: Any,
    message: str,
) -> None:
    loss_of = batch_loss

    def broken(model: Any, batch: Any, *rest: Any) -> Any:
        loss, parts = loss_of(model, batch, *rest)
        return (breaks(loss) if "q2" in batch["ids"] else loss), parts

    monkeypatch.setattr("fastmrc.training.trainer.batch_loss", broken)
    with pytest.raises(TrainingError, match=message):
        train(tiny_bert_dir, [data], tmp_path / "out", options_of("seq2seq"))


def test_data_without_what_the_task_needs(tiny_bert_dir: Path, tmp_path: Path) -> None:
    lost = Question("lost", "谁", (Passage("北京有山", "上海"),))
    data = write_data(tmp_path / "data.jsonl", [lost])
    with open(data, "a", encoding="utf-8") as file:
        file.write("broken\n")
    with pytest.raises(InputError, match="1 answers that are not in their passages and 1 records"):
        train(tiny_bert_dir, [data], tmp_path / "a", options_of("seq2seq"))
    with pytest.raises(InputError, match="expected pairs for the task simbert"):
        train(tiny_bert_dir, [data], tmp_path / "b", options_of("simbert"))
    good = write_data(tmp_path / "good.jsonl", [*QUESTIONS, lost])
    result = train(tiny_bert_dir, [good], tmp_path / "c", options_of("seq2seq"))
    assert result.data.not_found == ["lost"] and result.data.questions == 4
    assert "1 questions whose answer" in (tmp_path / "c" / "README.md").read_text(encoding="utf-8")


def test_a_base_without_output_layer_begins_at_random(
    tiny_bert_dir: Path, data: Path, tmp_path: Path
) -> None:
    body = save_model(tmp_path / "body", "BertModel", BERT_TOKENS)
    seen = []
    result = train(
        body,
        [data],
        tmp_path / "out",
        options_of("mlm"),
        on_start=lambda _, initialized: seen.append(initialized),
    )
    assert result.initialized and seen == [result.initialized]
    assert all(name.startswith("cls.") for name in result.initialized)
    assert MLMReader.from_pretrained(tmp_path / "out")
    (body / "model.safetensors").write_bytes((tiny_bert_dir / "model.safetensors").read_bytes())
    config = json.loads((body / "config.json").read_text(encoding="utf-8"))
    (body / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8"
    )
    with pytest.raises(UnsupportedModelError, match="expected a trained encoder"):
        train(body, [data], tmp_path / "other", options_of("mlm"))


def test_an_output_in_use_is_refused(
    tiny_bert_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"new or empty directory, got .* with notes.txt"):
        train(tiny_bert_dir, [data], other, options_of())
    assert (other / "notes.txt").read_text() == "mine"
    output = tmp_path / "out"
    revive = kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        train(tiny_bert_dir, [data], output, options_of())
    revive()
    with pytest.raises(InputError, match="an interrupted run with other options"):
        train(tiny_bert_dir, [data], output, options_of(seed=3))
    with run_module._locked(output), pytest.raises(InputError, match="another run is writing"):
        train(tiny_bert_dir, [data], output, options_of())
    train(tiny_bert_dir, [data], output, options_of())
    with pytest.raises(InputError, match="holds a finished run"):
        train(tiny_bert_dir, [data], output, options_of())


def test_a_failed_first_try_does_not_take_the_directory(
    tiny_bert_dir: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(InputError, match="there is no directory"):
        train(tmp_path / "none", [data], output, options_of())
    broken = tmp_path / "broken.jsonl"
    broken.write_text("no JSON\n")
    with pytest.raises(InputError, match="held_out: expected something to read"):
        train(tiny_bert_dir, [data], output, options_of(seed=2), held_out=broken)
    with pytest.raises(FileNotFoundError):
        train(tiny_bert_dir, [data, tmp_path / "none"], output, options_of())
    assert list(output.iterdir()) == []
    assert train(tiny_bert_dir, [data], output, options_of()).steps == 6


def test_new_weights_follow_the_seed(tiny_bert_dir: Path, data: Path, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> torch.Tensor:
        options = options_of("span", max_steps=1, seed=seed)
        train(tiny_bert_dir, [data], tmp_path / name, options)
        model: Any = load_model(tmp_path / name, task="question-answering").model
        found: torch.Tensor = model.qa_outputs.weight
        return found

    first = weights("a", 1)
    torch.testing.assert_close(weights("b", 1), first)
    assert not torch.allclose(weights("c", 2), first)


def test_simbert_alone_in_bfloat16(tiny_bert_dir: Path, data: Path, tmp_path: Path) -> None:
    options = options_of("simbert", bfloat16=True, pooling="cls")
    result = train(tiny_bert_dir, [data], tmp_path / "out", options, held_out=data)
    assert set(result.scores) == {"simbert_top1", "score"} and math.isfinite(result.loss)


def test_retrieval_alone(tiny_bert_dir: Path, data: Path, tmp_path: Path) -> None:
    options = options_of("retrieval", retrieval_pairs=2)
    result = train(tiny_bert_dir, [data], tmp_path / "out", options, held_out=data)
    assert set(result.scores) == {"retrieval_top1", "score"} and math.isfinite(result.loss)


def test_top1_counts_questions_whose_nearest_passage_is_their_own(tiny_bert_dir: Path) -> None:
    from fastmrc.training.evaluation import evaluate_model

    loaded = load_model(tiny_bert_dir)
    texts = ["北京在哪里", "谁是中国人", "上海有水"]

    def top1(passages: list[str]) -> float:
        questions = [
            Question(str(i), text, (Passage(passage),))
            for i, (text, passage) in enumerate(zip(texts, passages, strict=True))
        ]
        scores = evaluate_model(loaded, ("retrieval",), questions, [], options_of("retrieval"))
        return scores["retrieval_top1"]

    assert top1(texts) == 100 and top1([texts[0], texts[2], texts[1]]) == pytest.approx(100 / 3)


def test_top1_counts_texts_whose_nearest_is_a_synonym(tiny_bert_dir: Path) -> None:
    from fastmrc.training.evaluation import evaluate_model

    loaded = load_model(tiny_bert_dir)
    same = [Pair("北京在哪里", ("北京在哪里",)), Pair("谁是中国人", ("谁是中国人",))]
    other = [Pair("北京在哪里", ("谁是中国人",)), Pair("谁是中国人", ("北京在哪里",))]
    for pairs, expected in ((same, 100.0), (other, 0.0)):
        scores = evaluate_model(loaded, ("simbert",), [], pairs, options_of("simbert"))
        assert scores["simbert_top1"] == expected


def test_padding_does_not_change_a_loss(eager: Any, codec: TextCodec) -> None:
    row = seq2seq_row(example_of(codec, "上海有水", "有水"), codec, 32)
    longer = seq2seq_row(example_of(codec, TEXT, "北京"), codec, 32)
    alone = collate([row], eager.config, 0) | {"objective": "seq2seq"}
    both = collate([row, longer], eager.config, 0) | {"objective": "seq2seq"}
    weights = LossWeights(attention=0.0)
    with torch.no_grad():
        first = batch_loss(eager, alone, weights, "mean")[1]["passage"]
        second = batch_loss(
            eager, collate([longer], eager.config, 0) | {"objective": "mlm"}, weights, "mean"
        )[1]["passage"]
        total = batch_loss(eager, both, weights, "mean")[1]["passage"]
    n = [len(row.labels), len(longer.labels)]
    mean = (float(first) * n[0] + float(second) * n[1]) / sum(n)
    assert float(total) == pytest.approx(mean, abs=1e-4)


def test_a_disk_that_fills_while_a_checkpoint_is_written(
    tiny_bert_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(value, "/dev/full" if "checkpoint-6" in str(path) else path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(TrainingError, match="checkpoint-3 is kept"):
            train(tiny_bert_dir, [data], tmp_path / "out", options_of())
    (tmp_path / "out" / "checkpoints" / "checkpoint-6" / "trainer_state.json").write_text("{")
    assert train(tiny_bert_dir, [data], tmp_path / "out", options_of()).steps == 6


def test_a_full_disk_loses_nothing(
    tiny_bert_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_card", full)
        with pytest.raises(TrainingError, match=r"No space left.*checkpoint-6 is kept"):
            train(tiny_bert_dir, [data], tmp_path / "out", options_of())
    assert train(tiny_bert_dir, [data], tmp_path / "out", options_of()).steps == 6
    assert MLMReader.from_pretrained(tmp_path / "out")


def test_models_and_lengths_that_do_not_fit(
    tiny_distilbert_dir: Path, tiny_bert_dir: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="base: expected a model of type bert"):
        train(tiny_distilbert_dir, [data], tmp_path / "a", options_of())
    windows = WindowOptions(window_tokens=(8, 500))
    with pytest.raises(InputError, match="window_tokens: expected inputs of at most 512 tokens"):
        train(tiny_bert_dir, [data], tmp_path / "b", options_of(windows=windows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "other"}, "task: expected one of seq2seq"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"max_hours": 0.0}, "max_hours: expected a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate: expected a number above 0"),
        ({"cloze": 1.5}, "cloze: expected a share between 0 and 1"),
        ({"dropout": -0.1}, "dropout: expected a share"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"task": "span", "copy_heads": 2}, "copy_heads: expected 0 for the task span"),
        ({"retrieval_pairs": 1}, "retrieval_pairs: expected at least 2, got 1"),
        ({"mask_share": 2.0}, "mask_share: expected a share"),
        ({"pooling": "linear"}, "pooling: expected mean or cls, got 'linear'"),
        (
            {"task": "mixed", "simbert_share": 0.6, "retrieval_share": 0.6},
            "retrieval_share: expected at most 1 with simbert_share",
        ),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingOptions(**({"task": "mlm"} | changes))
    with pytest.raises(InputError, match="attention: expected a finite weight"):
        LossWeights(attention=math.nan)
    with pytest.raises(InputError, match="window_tokens: expected 1 <= shortest"):
        WindowOptions(window_tokens=(9, 8))


# --- command and recipe ------------------------------------------------------------------------


def test_train_command(
    tiny_bert_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastmrc.cli import main

    command = ["train", "--task", "mlm", "--data", str(data), "--base", str(tiny_bert_dir)]
    command += ["--output", str(tmp_path / "out"), "--max-steps", "4", "--eval-steps", "2"]
    command += ["--window-tokens", "8", "24", "--batch-size", "2", "--held-out", str(data)]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["steps"] == 4 and set(record["scores"]) == {"mlm_em", "mlm_f1", "score"}
    assert "4 questions (3 with an answer)" in captured.err
    assert "step 4 (100.0%, 0 minutes left): " in captured.err
    assert main(command) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "none.jsonl")]) == 2


def test_the_recipe_of_the_packaged_model(
    tiny_bert_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastmrc.recipes import zh_reader

    source = tmp_path / "source"
    source.mkdir()
    for name in ("drcd_dev_simp", "drcd_test_simp", "cmrc2017_user", "xquad_zh"):
        write_data(source / f"{name}.jsonl", QUESTIONS)
    unanswered = [Question(f"u{i}", "谁", (Passage("北京有山", ""),)) for i in range(9)]
    write_data(source / "chinesesquad_dev.jsonl", [QUESTIONS[0], *unanswered])
    write_data(source / "paraphrase_pairs.jsonl", [], PAIRS)
    trial = [Question(f"t{i}", "谁", (Passage(f"北京有{i}山", "山"),)) for i in range(5)]
    write_data(source / "cmrc2018_trial.jsonl", trial)
    monkeypatch.setattr(
        zh_reader, "_HELD_OUT", {"cmrc2018_trial.jsonl": 2, "drcd_test_simp.jsonl": 1}
    )
    for name in ("SHORT", "LONG", "REJECT", "RETRIEVE"):
        options = getattr(zh_reader, name)
        tiny = replace(
            options,
            max_steps=2,
            batch_size=2,
            eval_steps=2,
            copy_heads=min(1, options.copy_heads),
            windows=WindowOptions(window_tokens=(8, 16), question_tokens=16),
        )
        monkeypatch.setattr(zh_reader, name, tiny)
    files, held_out = zh_reader.prepare_data(source, tmp_path / "data")
    lines = {p.name: p.read_text(encoding="utf-8").splitlines() for p in {*files, held_out}}
    assert len(lines["chinesesquad_dev.jsonl"]) == 1 + 3
    assert [p.name for p in files].count("cmrc2018_trial.jsonl") == 3
    held = {json.loads(line)["passages"][0]["passage"] for line in lines["held_out.jsonl"]}
    assert held == {"北京有3山", "北京有4山", "New York 天气有火"}
    trained = {json.loads(line)["id"] for line in lines["cmrc2018_trial.jsonl"]}
    assert trained == {"t0", "t1", "t2"}
    command = ["--data", str(source), "--base", str(tiny_bert_dir), "--hours", "0.1"]
    command += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "model")]
    assert zh_reader.main(command) == 0
    for reader_class in (Seq2SeqReader, MLMReader):
        assert reader_class.from_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "fastmrc.json").read_text(encoding="utf-8"))
    assert settings["format"] == "int8-per-row"
    packaged = json.loads((packaged_model_path() / "fastmrc.json").read_text(encoding="utf-8"))
    assert settings["reading"] == packaged["reading"] == zh_reader.READING
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert re.findall("^# (.*)", card, re.MULTILINE) == ["short", "long", "reject", "retrieve"]
    pairs = (tmp_path / "work" / "data" / "mined_pairs.jsonl").read_text(encoding="utf-8")
    assert all("synonyms" in json.loads(line) for line in pairs.splitlines())
    tokenize = load_model(tmp_path / "model").tokenizer.tokenize
    assert tokenize("Ｎｅｗ山") == tokenize("New山") == ["new", "山"]  # noqa: RUF001
    capsys.readouterr()
    command[-1] = str(tmp_path / "other")
    assert zh_reader.main(["--data", str(tmp_path / "none"), *command[2:]]) == 2
    assert "none: has not the recipe's data sets drcd_dev_simp.jsonl, " in capsys.readouterr().err
    assert zh_reader.main([*command, "--hours", "nan"]) == 2
    assert "--hours: expected a number above 0, got nan" in capsys.readouterr().err
    (source / "cmrc2017_user.jsonl").write_text("[1]\n", encoding="utf-8")
    assert zh_reader.main(command) == 2
    assert "cmrc2017_user.jsonl: expected one JSON object a line" in capsys.readouterr().err
