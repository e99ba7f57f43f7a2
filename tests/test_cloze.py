"""Documents with blanks, questions made of texts, the two encoders and the cloze reader."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmrc import InputError, UnsupportedModelError, metrics, reference
from fastmrc.cli import main
from fastmrc.cloze import (
    BLANK,
    ClozeDocument,
    ClozeReader,
    draw_questions,
    read_cloze,
    read_cloze_answers,
)
from fastmrc.cloze.bilstm import BiLSTMEncoder
from fastmrc.cloze.documents import is_cloze_file
from fastmrc.cloze.encoder import ClozeEncoder
from fastmrc.cloze.model import load_cloze_encoder, save_cloze_encoder
from fastmrc.cloze.questions import draw_blanks
from fastmrc.cloze.transformer import TransformerEncoder
from fastmrc.cloze.words import cut_words, is_noun_like
from fastmrc.pretrained import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = ["大山", "小水", "北京", "上海", "天气", "的", "在", "。"]
SENTENCES = ["北京 的 天气 在 大山 。", "XXXXX 的 小水 在 上海 。", "上海 的 大山 在 北京 。"]
WORDS = tuple(" ".join(SENTENCES).split())
CMRC_2017 = "".join(f"{i + 1} ||| {s}\n" for i, s in enumerate(SENTENCES))
QUERY = "<qid_{}> ||| XXXXX 的 小水 在 上海 。\n"


def random_bilstm(seed: int = 0, depth: int = 2, match: Any = "states") -> BiLSTMEncoder:
    torch.manual_seed(seed)
    vectors = np.random.default_rng(seed).normal(size=(len(VOCABULARY) + 1, 8)).astype(np.float32)
    return BiLSTMEncoder(VOCABULARY, vectors, hidden=4, depth=depth, match=match).eval()


@pytest.fixture(scope="module")
def tiny_bert(tiny_bert_dir: Path) -> TransformerEncoder:
    return TransformerEncoder(load_model(tiny_bert_dir)).eval()


@pytest.fixture(params=["bilstm", "transformer"])
def encoder(request: pytest.FixtureRequest) -> ClozeEncoder:
    if request.param == "bilstm":
        return random_bilstm()
    made: ClozeEncoder = request.getfixturevalue("tiny_bert")
    return made


# --- files -------------------------------------------------------------------------------------


def test_cmrc_2017_files(tmp_path: Path) -> None:
    path = tmp_path / "cloze.doc_query"
    path.write_text(CMRC_2017 + QUERY.format(0) + "\n" + CMRC_2017 + QUERY.format(7), "utf-8")
    documents = list(read_cloze(path))
    assert [d.id for d in documents] == ["qid_0", "qid_7"]
    assert documents[0].words == WORDS and documents[0].blanks == (WORDS.index(BLANK),)
    assert [d.answer for d in documents] == ["", ""]
    assert documents[0].place == f"{path}:4"
    beside = tmp_path / "cloze.answer"
    beside.write_text("<qid_7> ||| 大山\n<qid_0> ||| 北京\n", "utf-8")
    assert [d.answer for d in read_cloze(path)] == ["北京", "大山"]
    assert read_cloze_answers(beside) == {"qid_7": "大山", "qid_0": "北京"}


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "cloze.jsonl"
    records = [
        {"id": "a", "words": WORDS, "answer": "大山"},
        {"id": "b", "text": "小猫喜欢鱼。XXXXX也喜欢小猫。"},
    ]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    first, second = read_cloze(path)
    assert (first.words, first.answer) == (WORDS, "大山")
    assert second.words == ("小猫", "喜欢", "鱼", "。", BLANK, "也", "喜欢", "小猫", "。")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (CMRC_2017, ["3: the last document has no query line; is the file cut off?"]),
        ("1 ||| 北京\n<q> ||| 北京\n", ["2: expected XXXXX between spaces, got none"]),
        ("1 ||| XXXXX\n2 || 北京\n<q> ||| XXXXX\n", ["2: expected n ||| sentence or <id> |||"]),
        ("1 ||| XXXXX\n<q> ||| \n1 ||| XXXXX\n<q> ||| \n", ["4: id: 'q' was used before"]),
        ('{"id": "a"}\n', ['1: expected "words", a list of strings']),
        ('{"id": "a", "words": ["b"]}\n', ["1: expected the word XXXXX, got none"]),
        ('{"id": 3, "words": ["XXXXX"]}\n', ['1: expected an object with an "id"']),
        (
            '{"id": "a", "words": ["XXXXX"], "answer": 1}\n',
            ["1: answer: expected a string, got int"],
        ),
        ('{"id": "a", "words": ["XXXXX"]}\n{"id"', ["2: not JSON"]),
        ("1 ||| XXXXX\n\udcff\n<q> ||| \n", ["2: not UTF-8: 0xff"]),
    ],
)
def test_broken_records_are_named(text: str, messages: list[str], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    issues: list[Any] = []
    good = list(read_cloze(path, on_error=issues.append))
    assert len(issues) == len(messages)
    for issue, message in zip(issues, messages, strict=True):
        assert f"{path}:{message}" in str(issue)
    assert len(good) == text.count("<q> ||| ") - 1 or len(good) <= 1
    with pytest.raises(InputError, match=str(path)):
        list(read_cloze(path))


def test_an_answer_file_with_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "cloze.answer"
    path.write_text("<qid_0> ||| 北京\nqid_1 上海\n", "utf-8")
    with pytest.raises(InputError, match=r"cloze.answer:2: expected <id> \|\|\| answer"):
        read_cloze_answers(path)


def test_kinds_of_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text, expected in [
        (CMRC_2017, True),
        ("\n1 ||| a XXXXX\n", True),
        ('{"id": "a", "words": []}', True),
        ('{"id": "a", "text": "XXXXX"}', True),
        ('{"passage": "XXXXX"}', False),
        ('{"id": "a", "question": "b", "words": []}', False),
        ("北京的天气\n", False),
        ("", False),
    ]:
        path.write_text(text, "utf-8")
        assert is_cloze_file(path) is expected, text


# --- words and questions -----------------------------------------------------------------------


def test_words_and_nouns() -> None:
    assert cut_words("小猫 喜欢鱼。") == ["小猫", "喜欢", "鱼", "。"]
    assert [
        w for w in ["小猫", "喜欢", "的", "北京", "。", "42", "大王八怪"] if is_noun_like(w)
    ] == [
        "小猫",
        "北京",
        "大王八怪",
    ]


def test_questions_follow_the_rule_of_the_data_set() -> None:
    words = "北京 的 天气 好 。 上海 的 天气 在 北京 好 。 大山 好 。"
    text = words.split()
    made = [q for seed in range(40) for q in draw_questions([text], per_text=3, seed=seed)]
    assert {q.answer for q in made} == {"北京", "天气"}
    for question in made:
        assert question.words.count(BLANK) == 1
        assert question.answer in question.words  # once removed, still there
        (blank,) = question.blanks
        restored = [*question.words[:blank], question.answer, *question.words[blank + 1 :]]
        assert restored == text
    # Each word can be asked for once only, so that it stays.
    assert len(list(draw_questions([text], per_text=9))) == 2
    assert list(draw_questions(["大山"])) == []
    with pytest.raises(InputError, match="per_text: expected at least 1, got 0"):
        list(draw_questions([text], per_text=0))


def test_blanks_keep_their_distance_and_their_words() -> None:
    words = ["北京", "天气"] * 20
    for seed in range(20):
        rng = np.random.default_rng(seed)
        blanks = draw_blanks(words, 6, rng, taken={3: "天气"}, distance=5)
        assert 3 in blanks and len(blanks) <= 6
        places = sorted(blanks)
        assert all(b - a >= 5 for a, b in zip(places, places[1:], strict=False))
        left = Counter(w for i, w in enumerate(words) if i not in blanks)
        assert all(left[word] for word in blanks.values())
    assert draw_blanks(["北京", BLANK], 2, rng, taken={1: "上海"}) == {}


# --- encoders ----------------------------------------------------------------------------------


def numpy_weights(encoder: BiLSTMEncoder) -> dict[str, Any]:
    weights = {name: w.detach().numpy() for name, w in encoder.lstm.named_parameters()}
    vectors = torch.cat([encoder.unknown, encoder.known]).detach().numpy()
    return weights | {"vectors": vectors}


@pytest.mark.parametrize("match", ["states", "embeddings"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bilstm_is_that_of_the_reference(depth: int, match: str) -> None:
    rng = np.random.default_rng(depth)
    encoder = random_bilstm(depth, depth, match)
    rows, expected = [], []
    for length in [1, 2, 3, 7, 20, 20]:
        words = rng.choice([*VOCABULARY, "无", "名"], length).tolist()
        blank = int(rng.integers(length)) if length > 2 else 0
        (row,) = encoder.rows(words, [blank])
        ids = encoder.word_ids(words).tolist()
        logits = reference.bilstm_logits(
            ids, blank, numpy_weights(encoder), depth=depth, match=match
        )
        rows.append(row)
        expected.append(logits[row.positions])
    with torch.inference_mode():
        got = encoder(rows).numpy()
    for own, logits in zip(got, expected, strict=True):
        np.testing.assert_allclose(own[: len(logits)], logits, atol=1e-5)
        assert (own[len(logits) :] == -np.inf).all()


def test_the_blanks_own_word_is_not_seen(encoder: ClozeEncoder) -> None:
    place = WORDS.index(BLANK)
    with torch.inference_mode():
        logits = [
            encoder(encoder.rows([*WORDS[:place], word, *WORDS[place + 1 :]], [place])).numpy()
            for word in (BLANK, "大山", "北京")
        ]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


def test_a_batch_gives_what_single_documents_give(encoder: ClozeEncoder) -> None:
    documents = [WORDS, WORDS[5:14], (BLANK, "北京"), ("上海", BLANK), WORDS * 3]
    rows = [row for words in documents for row in encoder.rows(words, [words.index(BLANK)])]
    with torch.inference_mode():
        together = encoder(rows).numpy()
        for own, row in zip(together, rows, strict=True):
            alone = encoder([row]).numpy()[0]
            np.testing.assert_allclose(own[: len(alone)], alone, atol=1e-5)


def test_windows_show_every_word_once(tiny_bert_dir: Path) -> None:
    encoder = TransformerEncoder(load_model(tiny_bert_dir), 32)
    words = [*VOCABULARY[:5]] * 12
    for blank in (0, 30, 59):
        words[blank] = BLANK
        rows = encoder.rows(words, [blank])
        assert len(rows) > 2
        assert all(len(row.tokens) <= 32 for row in rows)
        seen = np.concatenate([row.positions for row in rows])
        assert sorted(seen.tolist()) == [i for i in range(60) if words[i] != BLANK]
        for row in rows:
            assert row.tokens[row.blank_columns[0]] == encoder.tokenizer.mask_token_id
            for position, (first, last) in zip(row.positions, row.word_columns, strict=True):
                shown = encoder.tokenizer.decode(row.tokens[first : last + 1])
                assert shown.replace(" ", "") == words[position]
        words[blank] = VOCABULARY[blank % 5]


def test_windows_hold_long_words(tiny_bert_dir: Path) -> None:
    encoder = TransformerEncoder(load_model(tiny_bert_dir), 32)
    words = ["1.2-3/4.5" * 10, "北京", BLANK, "1.2-3/4.5" * 10, "天气"] * 3
    rows = encoder.rows(words, [2])
    assert max(len(row.tokens) for row in rows) <= 32
    assert sorted(p for row in rows for p in row.positions.tolist()) == [
        i for i, word in enumerate(words) if word != BLANK
    ]


def test_layers_beyond_the_model(tiny_bert_dir: Path) -> None:
    with pytest.raises(InputError, match="layers: expected 1 to"):
        TransformerEncoder(load_model(tiny_bert_dir), layers=99)


def test_settings_that_do_not_fit(tiny_bert_dir: Path) -> None:
    vectors = np.zeros((3, 8), np.float32)
    with pytest.raises(InputError, match="vectors: expected 2, one per word"):
        BiLSTMEncoder(["a"], vectors)
    with pytest.raises(InputError, match="hidden: expected 4 with match='embeddings'"):
        BiLSTMEncoder(["a", "b"], vectors, hidden=8, match="embeddings")
    with pytest.raises(InputError, match="match: expected states or embeddings, got 'both'"):
        BiLSTMEncoder(["a", "b"], vectors, match="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_tokens: expected 32 to"):
        TransformerEncoder(load_model(tiny_bert_dir), 8)


# --- reader ------------------------------------------------------------------------------------


def literal_fill(encoder: ClozeEncoder, words: Sequence[str], blank: int) -> dict[str, float]:
    """Sum the attention to each word, one document and one window at a time."""
    logits: dict[int, float] = {}
    for row in encoder.rows(words, [blank]):
        with torch.inference_mode():
            own = encoder([row])[0].tolist()
        logits |= dict(zip(row.positions.tolist(), own, strict=False))
    weights = {i: np.exp(logit - max(logits.values())) for i, logit in logits.items()}
    scores: dict[str, float] = {}
    for i, weight in weights.items():
        scores[words[i]] = scores.get(words[i], 0.0) + weight / sum(weights.values())
    return scores


def test_fill(encoder: ClozeEncoder) -> None:
    reader = ClozeReader(encoder)
    answer = reader.fill(WORDS, top_words=20)
    place = WORDS.index(BLANK)
    expected = literal_fill(encoder, WORDS, place)
    assert [blank.position for blank in answer.blanks] == [place]
    assert {w.text: pytest.approx(w.score, abs=1e-5) for w in answer.words} == expected
    scores = [word.score for word in answer.words]
    assert scores == sorted(scores, reverse=True)
    for word in answer.words:
        assert word.positions == tuple(i for i, w in enumerate(WORDS) if w == word.text)
    assert answer.text == max(expected, key=lambda word: expected[word])
    assert "。" not in expected  # no answer


def test_several_blanks_and_batches(encoder: ClozeEncoder) -> None:
    reader = ClozeReader(encoder)
    several = (*WORDS, BLANK, "的", "天气")
    documents = [WORDS, several, (BLANK, "北京"), ("北京", BLANK), WORDS * 20]
    answers = reader.fill_batch(documents, progress=True)
    assert [len(answer.blanks) for answer in answers] == [1, 2, 1, 1, 20]
    for document, answer in zip(documents, answers, strict=True):
        alone = reader.fill(document)
        for a, b in zip(answer.blanks, alone.blanks, strict=True):
            assert a.position == b.position and a.text == b.text
            assert a.words[0].score == pytest.approx(b.words[0].score, abs=1e-5)
    assert answers[2].text == answers[3].text == "北京"
    assert reader.fill_batch([]) == []


def test_a_document_of_blanks_has_no_words(encoder: ClozeEncoder) -> None:
    answer = ClozeReader(encoder).fill([BLANK, "。", BLANK])
    assert answer.text == "" and answer.words == () and len(answer.blanks) == 2


def test_unknown_words_are_one_word_to_a_bilstm() -> None:
    words = [BLANK, "甲", "乙", "甲"]
    answer = ClozeReader(random_bilstm()).fill(words)
    assert len(answer.words) == 1 and answer.words[0].score == pytest.approx(1)
    assert answer.words[0].text in ("甲", "乙")


def test_long_words_and_unknown_characters(tiny_bert: TransformerEncoder) -> None:
    words = [BLANK, "龘", "Ａ" * 600, "北京", "a" * 2000]  # noqa: RUF001
    answer = ClozeReader(tiny_bert).fill(words, top_words=9)
    assert {word.text for word in answer.words} == set(words[1:])


def test_a_text_is_cut_into_words(tiny_bert: TransformerEncoder) -> None:
    answer = ClozeReader(tiny_bert).fill("北京的天气。XXXXX在上海。")
    assert answer.document.words == ("北京", "的", "天气", "。", BLANK, "在", "上海", "。")


def test_threads_share_a_reader(encoder: ClozeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmrc.cloze.transformer._CACHED_WORDS", 3)  # full again and again
    reader = ClozeReader(encoder)
    documents = [tuple(WORDS[i:]) + (BLANK, "北京") for i in range(12)]
    expected = [answer.text for answer in reader.fill_batch(documents)]
    with ThreadPoolExecutor(4) as threads:
        rounds = [threads.submit(reader.fill_batch, documents) for _ in range(12)]
        assert all([a.text for a in own.result()] == expected for own in rounds)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("北京的天气", "document: expected a blank, the word XXXXX, got none"),
        ("", "document: expected a blank"),
        ([], "document: expected a blank"),
        (["北京"], "document: expected a blank"),
        (5, "document: expected a text or a sequence of words, got int"),
        ([BLANK, "a\nb"], "document: expected words without line breaks and tabs"),
        ([BLANK, 5], "document: expected a text or a sequence of words, got list"),
        ("XXXXX\udcff", "document: "),
    ],
)
def test_bad_documents(document: Any, message: str, tiny_bert: TransformerEncoder) -> None:
    with pytest.raises(InputError, match=message):
        ClozeReader(tiny_bert).fill(document)


def test_bad_arguments(tiny_bert: TransformerEncoder) -> None:
    reader = ClozeReader(tiny_bert)
    with pytest.raises(InputError, match="documents: expected a sequence of documents"):
        reader.fill_batch("XXXXX")
    for bad in (0, True, 2.5):
        with pytest.raises(InputError, match="top_words: expected an integer of at least 1"):
            reader.fill(WORDS, top_words=bad)  # type: ignore[arg-type]


# --- directories -------------------------------------------------------------------------------


def test_models_on_disk(encoder: ClozeEncoder, tmp_path: Path) -> None:
    save_cloze_encoder(encoder, tmp_path)
    again = load_cloze_encoder(tmp_path)
    assert again.settings() == encoder.settings()
    with torch.inference_mode():
        rows = encoder.rows(WORDS, [6])
        np.testing.assert_allclose(again(again.rows(WORDS, [6])), encoder(rows), atol=1e-6)


def test_damaged_directories(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="path: there is no directory"):
        load_cloze_encoder(tmp_path / "none")
    with pytest.raises(UnsupportedModelError, match='expected "cloze" with the encoder'):
        load_cloze_encoder(tmp_path)
    save_cloze_encoder(random_bilstm(), tmp_path)
    (tmp_path / "words.txt").write_text("a\n", "utf-8")
    with pytest.raises(UnsupportedModelError, match="cannot load the cloze model"):
        load_cloze_encoder(tmp_path)
    (tmp_path / "cloze.safetensors").write_bytes(b"broken")
    with pytest.raises(UnsupportedModelError, match="cannot load the cloze model"):
        load_cloze_encoder(tmp_path)
    (tmp_path / "fastmrc.json").write_text("{", "utf-8")
    with pytest.raises(UnsupportedModelError, match="cannot read fastmrc.json"):
        load_cloze_encoder(tmp_path)


# --- commands ----------------------------------------------------------------------------------


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    save_cloze_encoder(random_bilstm(), directory)
    return directory


@pytest.fixture
def cloze_file(tmp_path: Path) -> Path:
    path = tmp_path / "cloze.doc_query"
    path.write_text("".join(CMRC_2017 + QUERY.format(i) for i in range(5)), "utf-8")
    return path


def test_command_cloze(model_dir: Path, cloze_file: Path, capsys: Any) -> None:
    command = ["cloze", str(cloze_file), "--model", str(model_dir)]
    assert main([*command, "--top-words", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and lines[0].startswith("qid_0: ") and BLANK in lines[0]
    assert main([*command, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["id"] for r in records] == [f"qid_{i}" for i in range(5)]
    assert records[0]["blanks"][0]["words"][0]["positions"]


def test_command_cloze_on_a_text(
    model_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("北京的天气。\nXXXXX在上海，XXXXX在大山。\n", "utf-8")  # noqa: RUF001
    assert main(["cloze", str(path), "--model", str(model_dir), "--json"]) == 0
    first = capsys.readouterr().out
    assert len(json.loads(first)["blanks"]) == 2
    stdin = io.TextIOWrapper(io.BytesIO(path.read_bytes()), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["cloze", "-", "--model", str(model_dir), "--json"]) == 0
    assert capsys.readouterr().out == first


def test_command_cloze_reads_documents_from_the_standard_input(
    model_dir: Path, cloze_file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(cloze_file.read_bytes()), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    many = ["--top-words", "2000000000", "--json"]  # more words than there are
    assert main(["cloze", "-", "--model", str(model_dir), *many]) == 0
    assert capsys.readouterr().out.count("qid_") == 5


def test_command_cloze_errors(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "text.txt"
    for text, message in [
        ("北京的天气。", "expected a blank"),
        (" \n", "text.txt: document: expected a blank"),
        ("1 ||| 北京\n<q> ||| \n", "no document could be read"),
    ]:
        path.write_text(text, "utf-8")
        assert main(["cloze", str(path), "--model", str(model_dir)]) == 2
        assert message in capsys.readouterr().err
    assert main(["cloze", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
    path.write_text("XXXXX北京", "utf-8")
    assert main(["cloze", str(path), "--model", str(tmp_path / "none")]) == 2
    assert "there is no directory" in capsys.readouterr().err
    # What can be read is answered all the same.
    path.write_text(CMRC_2017 + QUERY.format(0) + "2 | a\n" + QUERY.format(1), "utf-8")
    assert main(["cloze", str(path), "--model", str(model_dir)]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("qid_0") and "skipped" in captured.err


@pytest.mark.parametrize(("form", "line"), [("tsv", "qid_0\t"), ("cmrc2017", "<qid_0> ||| ")])
def test_predict_and_evaluate(
    form: str, line: str, model_dir: Path, cloze_file: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "predictions"
    command = ["predict", "--method", "cloze", "--data", str(cloze_file), "--model", str(model_dir)]
    command += ["--out", str(out), "--format", form, "--batch-size", "2"]
    assert main(command) == 0
    whole = out.read_text("utf-8")
    assert whole.startswith(line) and len(whole.splitlines()) == 5
    # An interrupted run leaves a line half-written.
    out.write_text("".join(whole.splitlines(True)[:2]) + whole.splitlines()[2][:7], "utf-8")
    assert main(command) == 0 and out.read_text("utf-8") == whole
    assert "(2 by an earlier run)" in capsys.readouterr().out
    out.write_text("something else", "utf-8")
    assert main(command) == 2 and out.read_text("utf-8") == "something else"
    capsys.readouterr()
    out.write_text(whole, "utf-8")
    answers = cloze_file.with_suffix(".answer")
    best = whole.splitlines()[0].removeprefix(line)
    other = next(word for word in VOCABULARY if word != best)
    lines = [f"<qid_{i}> ||| {best if i < 3 else other}\n" for i in range(5)]
    answers.write_text("".join(lines), "utf-8")
    for data in (cloze_file, answers):
        evaluate = ["evaluate", "--data", str(data), "--predictions", str(out)]
        assert main([*evaluate, "--metric", "accuracy", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(0.6)


def test_predict_refuses_options_of_readers(
    model_dir: Path, cloze_file: Path, tmp_path: Path, capsys: Any
) -> None:
    command = ["predict", "--method", "cloze", "--data", str(cloze_file), "--model", str(model_dir)]
    command += ["--out", str(tmp_path / "out")]
    flags = ["--baseline"], ["--local-files-only"]
    for extra in (["--beam-size", "2"], ["--dtype", "bfloat16"], *flags):
        assert main([*command, *extra]) == 2
        assert f"{extra[0]}: no option of --method cloze" in capsys.readouterr().err


def test_answers_that_are_not_known_are_not_scored(cloze_file: Path, capsys: Any) -> None:
    predictions = cloze_file.with_suffix(".tsv")
    predictions.write_text("qid_0\t北京\n", "utf-8")
    command = ["evaluate", "--data", str(cloze_file), "--predictions", str(predictions)]
    assert main([*command, "--metric", "accuracy"]) == 2
    assert "got none for 5 of 5, the first 'qid_0'" in capsys.readouterr().err


def test_ids_that_a_format_cannot_hold(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    path, out = tmp_path / "ids.jsonl", tmp_path / "out"
    path.write_text(json.dumps({"id": "a b", "words": [BLANK, "北京"]}) + "\n", "utf-8")
    command = ["predict", "--method", "cloze", "--data", str(path), "--model", str(model_dir)]
    command += ["--out", str(out)]
    assert main([*command, "--format", "cmrc2017"]) == 2 and not out.exists()
    assert "id: 'a b' cannot be written with --format cmrc2017" in capsys.readouterr().err
    assert main(command) == 0 and out.read_text("utf-8") == "a b\t北京\n"


def test_a_prediction_of_several_blanks(tmp_path: Path, model_dir: Path) -> None:
    path, out = tmp_path / "two.jsonl", tmp_path / "out"
    path.write_text(json.dumps({"id": "a", "words": [BLANK, "北京", BLANK]}) + "\n", "utf-8")
    command = ["predict", "--method", "cloze", "--data", str(path), "--model", str(model_dir)]
    assert main([*command, "--out", str(out)]) == 0
    assert out.read_text("utf-8") == "a\t北京 北京\n"
    path.write_text(json.dumps({"id": "a", "words": [BLANK, "。", BLANK]}) + "\n", "utf-8")
    assert main([*command, "--out", str(out), "--overwrite"]) == 0
    assert out.read_text("utf-8") == "a\t\n"


def test_accuracy_by_hand() -> None:
    gold = {"a": metrics.Reference(("北京",)), "b": metrics.Reference(("上海",))}
    result = metrics.evaluate({"a": "北京", "b": "北京"}, gold, "accuracy")
    assert result.values == {"accuracy": 0.5}


def test_document_of_a_document() -> None:
    document = ClozeDocument("q", WORDS)
    assert ClozeDocument.of(document) is document
