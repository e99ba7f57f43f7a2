"""Metrics: answers worked out by hand, properties, and the files that they read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastmrc import metrics
from fastmrc.errors import InputError
from fastmrc.metrics import (
    Metric,
    Reference,
    Score,
    evaluate,
    read_accepted_answers,
    read_references,
    score_accuracy,
    score_cmrc,
    score_sogou,
    score_squad,
)
from fastmrc.predictions import read_predictions, restore_order

BOM = b"\xef\xbb\xbf"


def sogou(accuracy: float, f1: float, precision: float, recall: float) -> dict[str, float]:
    values = {"accuracy": accuracy, "f1": f1, "precision": precision, "recall": recall}
    return pytest.approx(values, abs=1e-15)  # type: ignore[return-value]


NOTHING = sogou(0, 0, 0, 0)
PERFECT = sogou(1, 1, 1, 1)


# --- SogouQA -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("甲乙", "甲乙"),
        ("ＡＢ１　２", "ab12"),  # full width to half width, lower case, no space
        ("ab12", "ＡＢ１　２"),
        ("《甲·乙》，", "甲乙"),
        ("甲＠乙｝", "甲乙"),  # become @ and }, which are punctuation
        ("甲\t \v乙", "甲乙"),
    ],
)
def test_sogou_normalization(answer: str, accepted: str) -> None:
    assert score_sogou(answer, None, [accepted]) == Score(PERFECT, accepted)


@pytest.mark.parametrize(
    ("answer", "accepted", "f1", "precision", "recall"),
    [
        # 2 of 3 characters predicted, 2 of 4 expected; their harmonic mean.
        ("甲乙丙", "乙丙丁戊", 4 / 7, 2 / 3, 1 / 2),
        ("丙乙", "乙丙", 1, 1, 1),  # the order of characters does not matter to F1
        ("甲甲甲", "甲", 1 / 2, 1 / 3, 1),  # a character counts as often as both hold it
        ("甲甲乙", "甲乙乙", 2 / 3, 2 / 3, 2 / 3),
        ("甲", "乙", 0, 0, 0),
        # Letters beyond ASCII keep their case, white space beyond ASCII stays.
        ("é甲", "É甲", 1 / 2, 1 / 2, 1 / 2),
        ("甲\u00a0", "甲", 2 / 3, 1 / 2, 1),
    ],
)
def test_sogou_f1(answer: str, accepted: str, f1: float, precision: float, recall: float) -> None:
    score = score_sogou(answer, None, [accepted])
    assert score == Score(sogou(0, f1, precision, recall), accepted if f1 else "")


def test_sogou_takes_the_first_of_the_best() -> None:
    # F1 is 2/3 against both, but one lacks precision and the other recall.
    one, four = "甲", "甲乙丙丁"
    assert score_sogou("甲乙", None, [one, four]) == Score(sogou(0, 2 / 3, 1 / 2, 1), one)
    assert score_sogou("甲乙", None, [four, one]) == Score(sogou(0, 2 / 3, 1, 1 / 2), four)
    assert score_sogou("甲乙", None, ["丙", one, "甲乙丙"]).best == "甲乙丙"  # 4/5


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("俄国 巴西", True),
        ("俄国、巴西", True),
        (" 俄国 巴西\t", True),  # at both ends nothing is separated
        ("俄国 巴西 巴西", True),  # a set: once or twice is the same
        ("俄国  巴西", False),  # the empty part between two separators is one more
        ("俄国 巴西。", False),
        ("俄国＠巴西", False),  # separates only once it has become @, which is too late
        ("俄国", False),
    ],
)
def test_sogou_parts_in_any_order(answer: str, right: bool) -> None:
    assert score_sogou(answer, "巴西 俄国", ["巴西俄国"]).values["accuracy"] == right
    assert score_sogou(answer, None, ["巴西俄国"]).values["accuracy"] == 0


def test_sogou_parts_are_normalized() -> None:
    assert score_sogou("ｂ A", "a,B", ["x"]).values["accuracy"] == 1


@pytest.mark.parametrize("answer", ["", " ", "\t\v"])
def test_sogou_empty_answer(answer: str) -> None:
    assert score_sogou(answer, "", ["", "甲"]) == Score(NOTHING)


def test_sogou_answer_of_punctuation() -> None:
    assert score_sogou("。", "甲", ["甲"]) == Score(NOTHING)
    # The normalised text is accepted, but there are no characters to count.
    assert score_sogou("。", "甲", ["甲", ""]) == Score(sogou(1, 0, 0, 0))


# --- CMRC 2018 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("《红楼梦》", ["红", "楼", "梦"]),
        ("iPhone 5s，2012年", ["iphone", "5s2012", "年"]),  # punctuation goes before words are cut
        ("a-b:c", ["abc"]),
        ("丙…丁", ["丙", "…", "丁"]),  # the script drops "……" as one character, which is none
        ("\u4e00\u9fa5\u9fa6", ["\u4e00", "\u9fa5", "\u9fa6"]),
        ("\u9fa6\u9fa6", ["\u9fa6\u9fa6"]),  # beyond the range: part of a word
        ("", []),
        ("《》", []),
    ],
)
def test_cmrc_units(text: str, units: list[str]) -> None:
    assert metrics._cmrc_units(metrics._clean_cmrc(text)) == units


# What NLTK 3.10.4 makes of them.
WORDS = {
    "he said: yes": "he said : yes",
    "3,000, 5:30": "3,000 , 5:30",
    "a,,5": "a , ,5",
    "a,": "a ,",
    "the u.s. army.": "the u.s. army .",
    'it ends.") ': "it ends . '' )",
    "wait... what?!": "wait ... what ? !",
    "a—b;c@d*e$5": "a — b ; c @ d * e $ 5",
    "(a) [b] {c} <d>": "( a ) [ b ] { c } < d >",
    "a--b": "a -- b",
    '"a" ("b")': "`` a '' ( `` b '' )",
    "''a'' ''b''": "'' a '' `` b ''",
    "```a": "`` ` a",
    "“a” «b» ‘c’ „d": "“ a ” « b » ‘ c ’ „ d",
    "'a' b' 's": "' a ' b ' 's",
    "x's' y": "x 's ' y",
    "he's i'm we'd they'll you're i've don't": "he 's i 'm we 'd they 'll you 're i 've do n't",
    "HE'S DON'T WE'LL": "HE 'S DO N'T WE 'LL",
    "cannot gimme gonna gotta lemme wanna d'ye more'n": (
        "can not gim me gon na got ta lem me wan na d 'ye more 'n"
    ),
    "Cannot cannots wannabe": "Can not cannots wannabe",
    "lemme'tis cannot'twas": "lem me 't is can not 't was",
    "'tis": "' tis",
    # No sentences are cut: the first full stop stays.
    "one. two.": "one. two .",
    ".": ".",
}


@pytest.mark.parametrize(("text", "words"), WORDS.items())
def test_words(text: str, words: str) -> None:
    assert metrics._split_words(text) == words.split()


@given(st.text(alphabet="ab1 '`.,:;?!()[]-*&…“”«»\n"))
def test_words_keep_every_character(text: str) -> None:
    def same_quotes(pieces: Sequence[str]) -> str:
        return "".join(pieces).replace("`", "'")

    assert same_quotes(metrics._split_words(text)) == same_quotes(text.split())


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("北京大学", ["北京大学"], 1, 1),
        ("《红楼梦》 ", ["红楼梦"], 1, 1),
        ("IPHONE", ["iPhone"], 1, 1),
        # Two units in a row are common, not the four that a subsequence would have.
        ("北京大学", ["北京的大学"], 0, 4 / 9),
        ("在北京大学里", ["北京大学"], 0, 8 / 10),
        # Words are units: the run is "2018 年", 2 of 3 and 2 of 2.
        ("約 2018 年", ["2018年"], 0, 4 / 5),
        ("上海", ["北京", "上海市", "海"], 0, 4 / 5),  # the best: 2/2 and 2/3
        ("上海", ["北京", "上海"], 1, 1),
        ("甲……", ["甲"], 0, 2 / 3),  # "……" is one word
        ("甲 乙", ["甲乙"], 0, 1),  # white space inside counts for EM only
        ("甲", ["乙"], 0, 0),
        ("", ["甲"], 0, 0),
        ("《", ["》"], 1, 0),  # equal once punctuation is gone, but no unit is common
        ("", [], 1, 1),
        ("。", [], 1, 1),
        ("甲", [], 0, 0),
    ],
)
def test_cmrc(prediction: str, answers: list[str], em: float, f1: float) -> None:
    assert score_cmrc(prediction, answers).values == pytest.approx({"em": em, "f1": f1}, abs=1e-15)


def test_cmrc_names_the_best_answer() -> None:
    assert score_cmrc("上海", ["北京", "上海市", "上海"]).best == "上海"
    assert score_cmrc("上海", ["北京"]).best == ""


@given(st.lists(st.sampled_from("ab甲"), max_size=9), st.lists(st.sampled_from("ab甲"), max_size=9))
def test_longest_common_run(left: list[str], right: list[str]) -> None:
    def runs(items: list[str]) -> set[tuple[str, ...]]:
        places = range(len(items) + 1)
        return {tuple(items[i:j]) for i in places for j in places[i:]}

    expected = max(map(len, runs(left) & runs(right)))
    assert metrics._longest_common_run(left, right) == expected


# --- SQuAD -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("The  U.S.", ["us"], 1, 1),
        ("a cat, an owl", ["Cat owl"], 1, 1),
        ("another theory", ["other ory"], 0, 0),  # articles are whole words
        ("a big cat", ["the cat sat"], 0, 1 / 2),  # big cat / cat sat: 1 of 2 and 1 of 2
        ("cat cat cat", ["cat"], 0, 1 / 2),  # 1 of 3 and 1 of 1
        ("cat sat", ["sat cat"], 0, 1),
        ("“cat”", ["cat"], 0, 0),  # only ASCII punctuation goes
        ("dog", ["cat", "big dog", "small grey dog"], 0, 2 / 3),
        ("dog", ["cat", "dog"], 1, 1),
        ("", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("the.", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["the"], 1, 1),  # an answer of nothing is none
        ("cat", ["the"], 0, 0),
        ("", ["the", "cat"], 0, 0),
    ],
)
def test_squad(prediction: str, answers: list[str], em: float, f1: float) -> None:
    assert score_squad(prediction, answers).values == pytest.approx({"em": em, "f1": f1}, abs=1e-15)


def test_squad_names_the_best_answer() -> None:
    assert score_squad("dog", ["big dog", "The dog"]).best == "The dog"


# --- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        (" 甲\n", ["乙", "甲 "], True),
        ("甲", ["甲乙"], False),
        ("A", ["a"], False),
        ("", ["甲"], False),
        (" ", [], True),
        ("甲", [], False),
    ],
)
def test_accuracy(prediction: str, answers: list[str], right: bool) -> None:
    assert score_accuracy(prediction, answers) == Score({"accuracy": float(right)})


# --- properties of all -------------------------------------------------------------------------

TEXT = st.text(alphabet="甲乙丙ab A12.,，《》…'", max_size=8)
ANSWERS = st.lists(TEXT, min_size=1, max_size=3)


def sogou_without_gold(prediction: str, answers: Sequence[str]) -> Score:
    return score_sogou(prediction, None, answers)


def has_words(text: str) -> bool:
    """Tell whether something is left of a text by each metric; SQuAD drops the article."""
    return any(character.isalnum() for character in text.lower().replace("a", ""))


WITH_F1 = pytest.mark.parametrize("score", [sogou_without_gold, score_cmrc, score_squad])
Scorer = Callable[[str, Sequence[str]], Score]


@WITH_F1
@given(prediction=TEXT, answers=ANSWERS)
def test_values_are_fractions_and_a_full_match_has_full_f1(
    score: Scorer, prediction: str, answers: list[str]
) -> None:
    result = score(prediction, answers)
    assert all(0 <= value <= 1 for value in result.values.values())
    match = result.values.get("em", result.values.get("accuracy"))
    f1 = result.values["f1"]
    assert match in (0, 1)
    # Two texts of nothing match, but what their F1 is differs.
    assume(has_words(prediction))
    assert f1 == 1 or not match
    assert (result.best in answers) if f1 else result.best == ""


@WITH_F1
@given(left=TEXT, right=TEXT)
def test_f1_is_symmetric(score: Scorer, left: str, right: str) -> None:
    assume(has_words(left) and has_words(right))
    assert score(left, [right]).values["f1"] == score(right, [left]).values["f1"]


@WITH_F1
@given(prediction=TEXT, answers=ANSWERS)
def test_the_best_answer_counts(score: Scorer, prediction: str, answers: list[str]) -> None:
    assume(all(map(has_words, answers)))
    singles = [score(prediction, [answer]).values["f1"] for answer in answers]
    result = score(prediction, answers)
    assert result.values["f1"] == max(singles)
    if result.best:
        assert singles[answers.index(result.best)] == max(singles)


# --- evaluation --------------------------------------------------------------------------------

REFERENCES = {
    "q1": Reference(("甲",), "甲"),
    "q2": Reference(("乙丙", "乙"), "乙丙"),
    "q3": Reference(("丁",), "丁"),
}


def test_sogou_scores_what_was_submitted() -> None:
    result = evaluate({"q3": "戊", "q2": "丙"}, REFERENCES, "sogou")
    # q2: F1 of 丙 against 乙丙 is 2/3, not right; q3: nothing.
    assert result.values == pytest.approx({"accuracy": 0, "f1": 1 / 3, "final": 1 / 6})
    assert result.count == 2
    assert result.missing == ("q1",)
    assert [question.id for question in result.questions] == ["q3", "q2"]
    assert result.questions[1].best == "乙丙"
    assert result.questions[1].answers == ("乙丙", "乙")
    assert result.questions[1].prediction == "丙"


def test_final_is_the_mean_of_accuracy_and_f1() -> None:
    values = evaluate({"q1": "甲", "q2": "丙", "q3": "戊"}, REFERENCES, "sogou").values
    assert values == pytest.approx({"accuracy": 1 / 3, "f1": 5 / 9, "final": 4 / 9})


@pytest.mark.parametrize("metric", ["cmrc", "squad", "accuracy"])
def test_missing_predictions_score_nothing(metric: Metric) -> None:
    references = REFERENCES | {"q4": Reference(())}
    result = evaluate({"q3": "丁"}, references, metric)
    key = "accuracy" if metric == "accuracy" else "f1"
    assert result.values[key] == 1 / 4
    assert result.count == 4
    assert result.missing == ("q1", "q2", "q4")
    assert [question.prediction for question in result.questions] == [None, None, "丁", None]
    # An empty answer that was given is right where there is none.
    assert evaluate({"q3": "丁", "q4": ""}, references, metric).values[key] == 2 / 4


def test_worst_questions_in_their_order() -> None:
    predictions = {"q1": "甲", "q2": "丙", "q3": "戊", "q4": "己"}
    references = REFERENCES | {"q4": Reference(("庚",), "庚")}
    result = evaluate(predictions, references, "cmrc")
    assert [question.id for question in result.worst(3)] == ["q3", "q4", "q2"]
    assert [question.id for question in result.worst(9)] == ["q3", "q4", "q2", "q1"]
    # Neither q2 nor q3 is right, but q2 has an F1.
    submitted = evaluate({"q2": "丙", "q3": "戊"}, references, "sogou")
    assert [question.id for question in submitted.worst(2)] == ["q3", "q2"]
    accuracy = evaluate(predictions, references, "accuracy")
    assert [question.id for question in accuracy.worst(4)] == ["q2", "q3", "q4", "q1"]


@pytest.mark.parametrize(
    ("predictions", "references", "metric", "message"),
    [
        ({}, REFERENCES, "f1", "metric: expected one of sogou, cmrc, squad, accuracy, got 'f1'"),
        ({"q9": "", "q1": ""}, REFERENCES, "cmrc", "predictions: .* got 1 unknown: 'q9'$"),
        (
            dict.fromkeys("abcdefg", ""),
            REFERENCES,
            "sogou",
            "got 7 unknown: 'a', 'b', 'c', 'd', 'e' and 2 more$",
        ),
        ({}, REFERENCES, "sogou", "predictions: expected at least one question, got none"),
        ({}, {}, "cmrc", "references: expected at least one question, got none"),
    ],
)
def test_evaluation_of_bad_input(
    predictions: dict[str, str], references: dict[str, Reference], metric: Metric, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(predictions, references, metric)


@given(st.permutations([f"q{n}" for n in range(7)]), st.lists(TEXT, min_size=7, max_size=7))
def test_means_do_not_depend_on_the_order(order: list[str], answers: list[str]) -> None:
    references = {f"q{n}": Reference(("甲乙丙", "ab"), "甲") for n in range(7)}
    predictions = {f"q{n}": answer for n, answer in enumerate(answers)}
    shuffled = {key: predictions[key] for key in order}
    for metric in metrics.METRICS:
        means = evaluate(predictions, references, metric).values
        assert evaluate(shuffled, references, metric).values == means
        assert all(0 <= value <= 1 for value in means.values())


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_accepted_answers(tmp_path: Path, bom: bytes, line_end: bytes) -> None:
    path = tmp_path / "accepted.tsv"
    lines = ["q1\t甲\t甲|Ａ 乙|", "", "q2\t乙\t乙"]
    path.write_bytes(bom + line_end.join(line.encode() for line in lines))
    expected = {"q1": Reference(("甲", "Ａ 乙", ""), "甲"), "q2": Reference(("乙",), "乙")}
    assert read_accepted_answers(path) == expected
    assert list(read_references(path, "sogou")) == ["q1", "q2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q1\ta\ta\n\nq1\tb\tb\n", r"a.tsv:3: id: 'q1' was used before"),
        (b"q1\ta\ta\nq2\n", r"a.tsv:2: expected id<TAB>answer<TAB>.* got 1 field$"),
        (b"q1\ta\ta\tb\n", r"a.tsv:1: expected id<TAB>answer<TAB>.* got 4 fields$"),
        (b"q1\ta\t\xff\n", r"a.tsv:1: not UTF-8: 0xff at byte 6"),
        (b"\n", r"a.tsv: expected at least one question, got none"),
    ],
)
def test_broken_accepted_answers(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_references(path, "sogou")


def test_references_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [{"id": n, "question": "问", "passages": [], "answers": ["甲"] * n} for n in (2, 0)]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_references(path, "cmrc") == {"2": Reference(("甲", "甲")), "0": Reference(())}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"id": "q1", "question": "x", "passages": []}', "data.jsonl:2: id: 'q1' was used before"),
        ('{"id": ', "data.jsonl:2: not JSON"),
    ],
)
def test_a_broken_question_is_an_error(tmp_path: Path, second: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": "q1", "question": "x", "passages": []}\n' + second)
    with pytest.raises(InputError, match=message):
        read_references(path, "squad")


def test_no_questions(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n")
    with pytest.raises(InputError, match="data.jsonl: expected at least one question, got none"):
        read_references(path, "accuracy")


# --- predictions in JSON -----------------------------------------------------------------------


def read(tmp_path: Path, content: bytes) -> dict[str, str]:
    path = tmp_path / "p"
    path.write_bytes(content)
    return read_predictions(path)


@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("indent", [None, 2])
def test_predictions_may_be_one_json_object(tmp_path: Path, bom: bytes, indent: int | None) -> None:
    answers = {"q2": "甲\t乙\n", "q1": "", "q{": "丙"}
    text = json.dumps(answers, ensure_ascii=False, indent=indent)
    predictions = read(tmp_path, bom + b" \r\n" + text.encode() + b"\n")
    assert predictions == answers
    assert list(predictions) == list(answers)


def test_empty_predictions(tmp_path: Path) -> None:
    assert read(tmp_path, b"{}") == read(tmp_path, b"") == read(tmp_path, BOM) == {}


def test_lines_may_look_a_little_like_json(tmp_path: Path) -> None:
    assert read(tmp_path, b"{a\tb\n}\tc\r\n") == {"{a": "b", "}": "c"}
    assert read(tmp_path, BOM + b"q1\t{}\n") == {"q1": "{}"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"q1": "a", "q1": "a"}', r"p: id: 'q1' was used before$"),
        (b'{"q1": 3}', r"p: answer of 'q1': expected a string, got 3$"),
        (b'{"q1": "a", "q2": ["x"]}', r"p: answer of 'q2': expected a string, got \[\"x\"\]$"),
        (b'{"q1": null}', r"p: answer of 'q1': expected a string, got null$"),
        (b'{"q1": {"a": "b"}}', r"p: answer of 'q1': expected a string, got \{\"a\": \"b\"\}$"),
        (b'{"q1": "\\ud800"}', r"p: answer of 'q1': .* half a surrogate pair"),
        (b'{"q1": "a"\n', r"p:1: expected id<TAB>answer, .* \(nor is the file one JSON object: "),
        (b'{"q1": "a"} {}', r"p:1: expected id<TAB>answer, .* Extra data"),
        (b'{"q1": "\xff"}', r"p:1: not UTF-8: 0xff at byte 9"),
        (b'{"a":' * 100_000, r"p:1: expected id<TAB>answer, "),
        (b'["q1"]', r"p:1: expected id<TAB>answer, got '\[\"q1\"\]'$"),
    ],
)
def test_broken_json_predictions(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, content)


def test_order_is_restored_in_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_text('{"q1": "a"}')
    with pytest.raises(InputError, match="p:1: expected id<TAB>answer"):
        restore_order(path, ["q1"])
    assert path.read_text() == '{"q1": "a"}'
