"""Vectors, generation, ranking and the index of a corpus."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BERT_TOKENS, CHINESE, save_model

import fastmrc
from fastmrc import corpus_index, reference, similarity
from fastmrc.corpus_index import CorpusIndex, index_directory, open_corpus
from fastmrc.data import DataIssue
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.mining import MinedPair, mine_pairs
from fastmrc.options import SamplingOptions
from fastmrc.pretrained import load_model
from fastmrc.retrieval import search_vectors
from fastmrc.similarity import SimilarityModel

EditJson = Callable[[Path, dict[str, Any]], None]

TEXTS = [
    "北京天气",
    "",
    "上海",
    "New York is the place, 一二三四五六七八九十",
    "北京的天气是？",
    "水",
]


@pytest.fixture(scope="module")
def model(tiny_bert_dir: Path) -> SimilarityModel:
    return SimilarityModel.from_pretrained(tiny_bert_dir)


# --- vectors -------------------------------------------------------------------------------------


def literal_vectors(directory: Path, texts: Sequence[str], pooling: str) -> Any:
    """Return the vectors by definition, one text at a time."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    whole: Any = AutoModel.from_pretrained(directory).eval()
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = whole(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            vector = hidden.mean(dim=0) if pooling == "mean" else hidden[0]
            if pooling == "linear":
                vector = whole.pooler.dense(vector)
        vectors.append((vector / vector.norm()).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("pooling", ["mean", "cls", "linear"])
def test_vectors_by_definition(no_head_dir: Path, pooling: Any) -> None:
    model = SimilarityModel.from_pretrained(no_head_dir, pooling=pooling)
    vectors = model.encode(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), model.dimension)
    np.testing.assert_allclose(vectors, literal_vectors(no_head_dir, TEXTS, pooling), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_vectors_of_any_model(masked_lm_dir: Path) -> None:
    model = SimilarityModel.from_pretrained(masked_lm_dir, pooling="mean")
    expected = literal_vectors(masked_lm_dir, TEXTS[2:], "mean")
    np.testing.assert_allclose(model.encode(TEXTS[2:]), expected, atol=1e-4)


def test_the_pooling_of_a_model(
    bert_copy: Path, no_head_dir: Path, edit_json: EditJson, tmp_path: Path
) -> None:
    assert SimilarityModel.from_pretrained().pooling == "mean"  # its fastmrc.json says so
    assert SimilarityModel.from_pretrained(no_head_dir).pooling == "linear"
    assert SimilarityModel.from_pretrained(bert_copy).pooling == "mean"  # it holds no pooler
    with pytest.raises(UnsupportedModelError, match="pooling 'linear' needs the weights"):
        SimilarityModel.from_pretrained(bert_copy, pooling="linear")
    (bert_copy / "fastmrc.json").write_text('{"pooling": "cls"}', encoding="utf-8")
    assert SimilarityModel.from_pretrained(bert_copy).pooling == "cls"
    assert SimilarityModel.from_pretrained(bert_copy, pooling="mean").pooling == "mean"
    edit_json(bert_copy / "fastmrc.json", {"pooling": "max"})
    with pytest.raises(UnsupportedModelError, match='pooling: expected one of .*got "max"'):
        SimilarityModel.from_pretrained(bert_copy)
    with pytest.raises(InputError, match="pooling: expected mean, cls or linear, got 'max'"):
        SimilarityModel.from_pretrained(no_head_dir, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dtype: expected one of float32, float16, bfloat16, auto"):
        SimilarityModel.from_pretrained(no_head_dir, dtype="int8")


def test_a_body_with_holes_is_refused(no_head_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = Path(shutil.copytree(no_head_dir, tmp_path / "holes"))
    weights = load_file(directory / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="expected a trained encoder, but 1 of its"):
        SimilarityModel.from_pretrained(directory)


def test_long_texts_are_cut(model: SimilarityModel) -> None:
    long = "北京。" * 400
    assert np.array_equal(model.encode(long), model.encode("北京。" * 170))  # 510 tokens
    assert np.array_equal(model.encode("北京。上海天气", max_tokens=5), model.encode("北京。"))
    for wrong in (0, 511):
        with pytest.raises(InputError, match=f"max_tokens: expected 1 to 510.*got {wrong}"):
            model.encode("北京", max_tokens=wrong)
    with pytest.raises(InputError, match="max_tokens: expected at least 1, got 0"):
        model.cut(["北京"], 0)


def test_encoding_texts(model: SimilarityModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.encode([]).shape == (0, model.dimension)
    assert np.array_equal(model.encode("北京"), model.encode(["北京"]))
    model.encode(TEXTS, progress=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err
    with pytest.raises(TypeError, match=r"texts\[1\]: expected a string, got int"):
        model.encode(["北京", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="texts: expected texts, got int"):
        model.encode(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="texts: expected text that UTF-8 can encode"):
        model.encode(["\ud800"])


def test_search_takes_texts_and_vectors(model: SimilarityModel) -> None:
    vectors = model.encode(TEXTS)
    expected = search_vectors(vectors[:2], vectors, 3)
    for queries in (TEXTS[:2], vectors[:2], tuple(TEXTS[:2])):
        for corpus in (TEXTS, vectors):
            hits = model.search(queries, corpus, 3)
            np.testing.assert_array_equal(hits.ids, expected.ids)
            np.testing.assert_allclose(hits.scores, expected.scores, atol=1e-6)
    ids, scores = model.search("水", TEXTS, 1)
    assert ids.tolist() == [[5]] and scores[0, 0] == pytest.approx(1, abs=1e-6)
    with pytest.raises(TypeError, match=r"corpus\[0\]: expected a string, got int"):
        model.search("水", [1, 2])  # type: ignore[list-item]


# --- generation ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("top_k", [2, 5, None])
def test_texts_as_the_oracle(tiny_model_dir: Path, top_k: int | None) -> None:
    loaded = load_model(tiny_model_dir)
    model = SimilarityModel(loaded)
    options: dict[str, Any] = {"top_k": top_k, "top_p": 0.95, "max_tokens": 6, "min_tokens": 1}
    drawn = model.generate("北京天气", 12, seed=3, **options)
    end_id = int(loaded.tokenizer.sep_token_id or 0)
    row = loaded.tokenizer("北京天气")["input_ids"]
    encoder = reference.ReencodingEncoder(loaded.model, end_id=end_id)
    next_logits = encoder.next_logits_for([row])
    expected = reference.sample_sequences(
        lambda prefixes: next_logits(prefixes, [0])[0],
        12,
        end_id=end_id,
        options=SamplingOptions(**options),
        seed=3,
    )
    assert [(g.token_ids, g.finished) for g in drawn] == [
        (e.token_ids, e.finished) for e in expected
    ]
    np.testing.assert_allclose(
        [g.log_prob for g in drawn], [e.log_prob for e in expected], atol=1e-3
    )
    assert len({g.text for g in drawn}) > 3


def test_a_seed_gives_the_same_texts(
    model: SimilarityModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model.generate("北京", 20, seed=1, max_tokens=8)
    assert [g.token_ids for g in model.generate("北京", 7, seed=1, max_tokens=8)] == [
        g.token_ids for g in first[:7]
    ]
    assert [g.text for g in model.generate("北京", 20, seed=2, max_tokens=8)] != [
        g.text for g in first
    ]
    assert [g.text for g in model.generate("北京", 20, max_tokens=8)] != [
        g.text for g in model.generate("北京", 20, max_tokens=8)
    ]
    assert model.generate("北京", 0) == []
    monkeypatch.setattr(similarity, "_SEQUENCES", 6)  # drawn in blocks
    assert [g.token_ids for g in model.generate("北京", 20, seed=np.uint64(1), max_tokens=8)] == [
        g.token_ids for g in first
    ]


def test_generating_under_a_constraint(model: SimilarityModel) -> None:
    codec = model._codec
    texts = ["北京", "上海天气", "水"]
    trie = fastmrc.Trie([codec.encode_question(text) for text in texts])
    drawn = model.generate("北京", 60, top_k=None, seed=0, constraint=trie)
    assert {g.text for g in drawn} == set(texts) and all(g.finished for g in drawn)
    index = fastmrc.SpanIndex([codec.encode_question("一二三四")])
    for g in model.generate("北京", 30, seed=0, constraint=index, min_tokens=2):
        assert len(g.token_ids) >= 2 and g.text in "一二三四"


def test_long_prompts_leave_room(model: SimilarityModel) -> None:
    long = "北京。" * 400
    kept = "北京。" * 166  # 498 of 510 - 10 tokens
    assert [g.token_ids for g in model.generate(long, 3, seed=0, max_tokens=10)] == [
        g.token_ids for g in model.generate(kept, 3, seed=0, max_tokens=10)
    ]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "text: expected a text with at least one token"),
        ("\u200b", {}, "text: expected a text with at least one token"),
        ("水", {"n": -1}, "n: expected an integer of at least 0, got -1"),
        ("水", {"n": 1.5}, "n: expected an integer"),
        ("水", {"top_k": 0}, "top_k: expected at least 1"),
        ("水", {"top_p": 0}, "top_p: expected a share"),
        ("水", {"temperature": -1}, "temperature: expected a finite number above 0"),
        ("水", {"min_tokens": 9, "max_tokens": 8}, "max_tokens: expected at least 9, got 8"),
        ("水", {"max_tokens": 510}, "max_tokens: expected at most 509, the positions"),
        ("水", {"seed": -1}, "seed: expected an integer from 0"),
        ("水", {"seed": 0.5}, "seed: expected an integer from 0"),
    ],
)
def test_wrong_options_are_refused(
    model: SimilarityModel, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(text, **options)


def test_models_that_generate_nothing(no_head_dir: Path, tiny_distilbert_dir: Path) -> None:
    model = SimilarityModel.from_pretrained(no_head_dir)
    with pytest.raises(UnsupportedModelError, match="no trained masked-LM head, so it gives"):
        model.generate("水")
    model = SimilarityModel.from_pretrained(tiny_distilbert_dir)
    with pytest.raises(UnsupportedModelError, match="expected a type that takes a cache"):
        model.generate("水")
    with pytest.raises(TypeError, match=r"text\[0\]: expected a string, got NoneType"):
        model.generate(None)  # type: ignore[arg-type]


def test_similar_texts(model: SimilarityModel) -> None:
    options: dict[str, Any] = {"seed": 5, "max_tokens": 4, "top_k": 3}
    drawn = {g.text for g in model.generate("北京", 80, **options)}
    found = model.similar("北京", 80, 200, **options)
    assert {one.text for one in found} == drawn - {"北京", ""} and len(found) > 10
    scores = [one.score for one in found]
    assert scores == sorted(scores, reverse=True)
    vectors = model.encode(["北京", *(one.text for one in found)])
    np.testing.assert_allclose(scores, vectors[1:] @ vectors[0], atol=1e-6)
    assert model.similar("北京", 80, 4, **options) == found[:4]
    # What the tokenizer makes of a text is the text itself.
    trie = fastmrc.Trie([model._codec.encode_question(text) for text in ("new york", "水")])
    only = model.similar(" New  York", 50, constraint=trie, top_k=None, seed=0)
    assert [one.text for one in only] == ["水"]
    assert model.similar("北京", 0) == []
    with pytest.raises(InputError, match="k: expected an integer of at least 1, got 0"):
        model.similar("北京", 5, 0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        model.similar("北京", 5, 5, beam=3)


# --- the index of a corpus -----------------------------------------------------------------------


class Encodings:
    """Counts the texts that a model encodes."""

    def __init__(self, model: SimilarityModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fail_after: int | None = None
        encode = model.encode

        def counted(texts: Any, **options: Any) -> Any:
            if self.fail_after is not None and self.count >= self.fail_after:
                raise KeyboardInterrupt
            self.count += len(texts)
            return encode(texts, **options)

        monkeypatch.setattr(model, "encode", counted)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\ufeff北京\n\n上海天气\n北京\n  \n水\n", encoding="utf-8")
    return path


def opened(path: Path, model: SimilarityModel, **options: Any) -> CorpusIndex:
    issues: list[DataIssue] = []
    given: dict[str, Any] = {"on_error": issues.append, "say": lambda text: pytest.fail(text)}
    index = open_corpus(path, model, **(given | options))
    assert not issues
    return index


def test_vectors_are_kept(
    corpus: Path, model: SimilarityModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encodings = Encodings(model, monkeypatch)
    index = opened(corpus, model)
    assert index.texts == ["北京", "上海天气", "水"] and encodings.count == 3
    assert isinstance(index.vectors, np.memmap)
    again = opened(corpus, model)
    assert encodings.count == 3 and np.array_equal(again.vectors, index.vectors)
    assert opened(corpus, model, keep=False).texts == index.texts and encodings.count == 6
    assert np.array_equal(model.encode(index.texts), index.vectors)
    assert index.owners.tolist() == [0, 1, 2]


def test_texts_are_found_by_their_best_piece(tmp_path: Path, model: SimilarityModel) -> None:
    rng = np.random.default_rng(0)
    sentences = ["".join(rng.choice(list(CHINESE), 30)) + "。" for _ in range(60)]
    texts = ["".join(sentences[i : i + 6]) for i in range(0, 60, 6)]
    path = tmp_path / "long.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    index = opened(path, model)
    assert index.texts == texts and index.owners.tolist() == [
        i for i in range(10) for _ in range(6)
    ]
    assert np.array_equal(index.vectors, model.encode(sentences))
    queries = model.encode([sentences[20], sentences[59]])
    for k in (1, 3, 10, 50):
        hits = index.search(queries, k)
        best = (queries @ index.vectors.T).reshape(2, 10, 6).max(axis=2)
        expected = np.argsort(-best, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(hits.ids, expected)
        np.testing.assert_allclose(
            hits.scores, np.take_along_axis(best, expected, axis=1), rtol=1e-5
        )
    assert index.search(queries, 1).ids.tolist() == [[3], [9]]
    assert index.search(np.zeros((0, model.dimension), np.float32), 2).ids.shape == (0, 2)


def test_vectors_are_made_anew(
    corpus: Path, bert_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoded(**options: Any) -> int:
        model = SimilarityModel.from_pretrained(bert_copy, **options)
        encodings = Encodings(model, monkeypatch)
        index = opened(corpus, model)
        np.testing.assert_allclose(index.vectors, model.encode(index.texts), atol=1e-6)
        return encodings.count - 3

    assert [encoded(), encoded()] == [3, 0]
    corpus.write_text("北京\n上海天气\n火", encoding="utf-8")  # as many texts
    assert [encoded(), encoded()] == [3, 0]
    # Several models may search one file in turn.
    assert [encoded(pooling="cls"), encoded(pooling="cls"), encoded()] == [3, 0, 0]
    assert [encoded(dtype="bfloat16"), encoded()] == [3, 0]
    other = save_model(bert_copy.parent / "other", "BertForMaskedLM", BERT_TOKENS, seed=1)
    shutil.copy(other / "model.safetensors", bert_copy)
    assert [encoded(), encoded()] == [3, 0]
    before = set(index_directory(corpus).iterdir())
    corpus.write_text("北京\n上海天气\n土", encoding="utf-8")
    assert encoded() == 3
    assert not before & set(index_directory(corpus).iterdir())  # of texts that are gone


@pytest.mark.parametrize("suffix", [".vectors", ".owners"])
@pytest.mark.parametrize("content", [b"", b"x", b"x" * 24, None])
def test_damaged_files_are_written_anew(
    corpus: Path, model: SimilarityModel, suffix: str, content: bytes | None
) -> None:
    whole = np.array(opened(corpus, model).vectors)
    (path,) = index_directory(corpus).glob(f"*{suffix}")
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    index = opened(corpus, model)
    assert np.array_equal(index.vectors, whole) and index.owners.tolist() == [0, 1, 2]
    np.zeros(3, np.int64).tofile(next(index_directory(corpus).glob("*.owners")))
    assert opened(corpus, model).owners.tolist() == [0, 1, 2]


def test_an_interrupted_index_is_gone_on_with(
    tmp_path: Path, model: SimilarityModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corpus.txt"
    texts = [f"北京{i}" for i in range(10)]
    path.write_text("\n".join(texts), encoding="utf-8")
    whole = model.encode(texts)
    monkeypatch.setattr(corpus_index, "_CHUNK", 4)
    encodings = Encodings(model, monkeypatch)
    encodings.fail_after = 8
    with pytest.raises(KeyboardInterrupt):
        opened(path, model)
    (part,) = index_directory(path).glob("*.part")
    with open(part, "ab") as file:  # a row that was cut off
        file.write(b"half")
    encodings.fail_after = None
    index = opened(path, model)
    assert encodings.count == 10  # the first 8 were there
    np.testing.assert_allclose(index.vectors, whole, atol=1e-6)
    assert not part.exists()


def test_what_is_mapped_is_never_written_to(corpus: Path, model: SimilarityModel) -> None:
    index = opened(corpus, model)
    before = np.array(index.vectors)
    corpus.write_text("水", encoding="utf-8")
    assert len(opened(corpus, model).texts) == 1
    assert np.array_equal(index.vectors, before)


def test_a_complete_index_needs_no_right_to_write(corpus: Path, model: SimilarityModel) -> None:
    opened(corpus, model)
    for path in index_directory(corpus).glob("*.lock"):
        path.unlink()
        path.mkdir()  # cannot be opened
    assert isinstance(opened(corpus, model).vectors, np.memmap)


def test_waiting_for_another_process_is_said(corpus: Path, model: SimilarityModel) -> None:
    import fcntl
    import threading

    texts = ["北京", "上海天气", "水"]
    directory = index_directory(corpus)
    directory.mkdir()
    lock = corpus_index._Files(directory, texts, model)._lock
    said = threading.Event()
    with open(lock, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Thread(
            target=lambda: (said.wait(20), fcntl.flock(file, fcntl.LOCK_UN)), daemon=True
        ).start()
        index = opened(corpus, model, say=lambda text: said.set())
    assert said.is_set() and index.texts == texts


def test_a_corpus_that_cannot_be_written_beside(corpus: Path, model: SimilarityModel) -> None:
    index_directory(corpus).write_text("in the way", encoding="utf-8")
    reasons: list[str] = []
    index = opened(corpus, model, say=reasons.append)
    assert len(index.texts) == len(index.vectors) == 3
    assert len(reasons) == 1 and "the vectors are not kept" in reasons[0]


def test_a_full_disk_stops_no_search(
    corpus: Path, model: SimilarityModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_index._Files, "complete", full)
    reasons: list[str] = []
    assert len(opened(corpus, model, say=reasons.append).vectors) == 3
    assert "No space left on device; the vectors are not kept" in reasons[0]


def test_passages_of_questions_are_a_corpus(tmp_path: Path, model: SimilarityModel) -> None:
    path = tmp_path / "questions.jsonl"
    records: list[dict[str, Any]] = [
        {"id": str(i), "question": "谁", "passages": [{"passage": text, "answer": ""}]}
        for i, text in enumerate(["北京", "上海", "北京"])
    ]
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join([*lines, "{"]), encoding="utf-8")
    issues: list[DataIssue] = []
    index = open_corpus(path, model, on_error=issues.append, say=lambda text: pytest.fail(text))
    assert index.texts == ["北京", "上海"] and [issue.line for issue in issues] == [4]
    path.write_text('{"text": "北京", "synonyms": ["水", "火"]}', encoding="utf-8")
    assert opened(path, model).texts == ["北京", "水", "火"]


def test_an_empty_corpus(tmp_path: Path, model: SimilarityModel) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n  \n", encoding="utf-8")
    with pytest.raises(InputError, match=r"empty\.txt: expected texts to search, got none"):
        opened(path, model)
    assert not index_directory(path).exists()
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "missing.txt", model)


# --- pairs ---------------------------------------------------------------------------------------


class Plane:
    """A model whose vectors are given by angles."""

    def __init__(self, angles: dict[str, float]) -> None:
        self._angles = angles

    def encode(self, texts: Sequence[str], progress: bool = False) -> Any:
        radians = np.radians([self._angles[text] for text in texts])
        return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)

    def search(self, queries: Any, corpus: Any, k: int, progress: bool = False) -> Any:
        return search_vectors(queries, corpus, k)


def test_mutual_neighbours() -> None:
    angles = {"a": 0.0, "b": 3.0, "c": 7.0, "d": 90.0, "e": 91.0, "f": 180.0, "g": 230.0}
    plane: Any = Plane(angles)
    texts = ["f", "a", "b", "c", "d", "e", "a", "g"]
    found = mine_pairs(texts, plane, 0.9)
    # c is nearest to b, but b to a; f and g are each other's, but far apart.
    assert [(p.text, p.synonym) for p in found] == [("d", "e"), ("a", "b")]
    assert [p.score for p in found] == pytest.approx(np.cos(np.radians([1.0, 3.0])))
    assert [(p.text, p.synonym) for p in mine_pairs(texts, plane, -1)][2:] == [("f", "g")]
    same: Any = Plane({"a": 0.0, "b": 0.0, "c": 0.0})
    assert mine_pairs(["a", "b", "c"], same, 0.5) == [MinedPair("a", "b", 1.0)]
    assert mine_pairs(["a"], plane, 0) == mine_pairs([], plane, 0) == []
