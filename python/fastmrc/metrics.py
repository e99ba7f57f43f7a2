"""Scores of predicted answers as the scripts of four tasks compute them.

``sogou``
    SogouQA: accuracy, F1 over characters, and Final, the mean of the two; over the questions that
    were submitted.
``cmrc``
    CMRC 2018: exact match, and F1 from the longest run of units that two answers share. A unit is
    a Chinese character or another word.
``squad``
    SQuAD 1.1 and 2.0: exact match, and F1 over words.
``accuracy``
    The prediction is an accepted answer, as in CMRC 2017.

All values are fractions from 0 to 1.
"""

from __future__ import annotations

import io
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Literal, TypeAlias, get_args

from fastmrc.cloze.documents import read_any_cloze_answers
from fastmrc.data import BOM, StrPath, decode_utf8, keyed_lines, read_questions
from fastmrc.errors import InputError

__all__ = [
    "Evaluation",
    "METRICS",
    "Metric",
    "QuestionScore",
    "Reference",
    "Score",
    "evaluate",
    "name_ids",
    "read_accepted_answers",
    "read_references",
    "score_accuracy",
    "score_cmrc",
    "score_sogou",
    "score_squad",
]

Metric: TypeAlias = Literal["sogou", "cmrc", "squad", "accuracy"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a prediction is compared with.

    Attributes
    ----------
    answers
        Accepted answers; empty if the question has none.
    gold
        The one answer of the second column of a SogouQA file; only ``sogou`` looks at it.
    """

    answers: tuple[str, ...]
    gold: str | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """What one prediction scores.

    Attributes
    ----------
    values
        ``accuracy``, ``f1``, ``precision``, ``recall`` (sogou), ``em``, ``f1`` (cmrc, squad) or
        ``accuracy``.
    best
        The first accepted answer that attains the F1; empty if that is 0 or there is no F1.
    """

    values: dict[str, float]
    best: str = ""


@dataclass(frozen=True, slots=True)
class QuestionScore:
    """The score of one question.

    Attributes
    ----------
    id
        Of the question.
    prediction
        As it was given; None if there was none.
    answers
        Accepted answers.
    values, best
        As in `Score`.
    """

    id: str
    prediction: str | None
    answers: tuple[str, ...]
    values: dict[str, float]
    best: str = ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a file of predictions.

    Attributes
    ----------
    metric
        One of `METRICS`.
    values
        Means over the questions: ``accuracy``, ``f1``, ``final`` (sogou), ``em``, ``f1`` (cmrc,
        squad) or ``accuracy``.
    missing
        Ids without a prediction, in the order of the references.
    questions
        Scores by question, in the order of the predictions (sogou) or of the references.
    """

    metric: Metric
    values: dict[str, float]
    missing: tuple[str, ...]
    questions: tuple[QuestionScore, ...]

    @property
    def count(self) -> int:
        """Questions that were scored."""
        return len(self.questions)

    def worst(self, count: int) -> list[QuestionScore]:
        """Return the `count` questions of lowest F1 (of lowest accuracy, where there is no F1).

        Those that score alike stay in their order.
        """
        key = "accuracy" if self.metric == "accuracy" else "f1"
        return sorted(self.questions, key=lambda question: question.values[key])[:count]


# --- files -------------------------------------------------------------------------------------


def read_references(path: StrPath, metric: Metric) -> dict[str, Reference]:
    """Read the accepted answers of a data set.

    Parameters
    ----------
    path
        For ``sogou`` a file for `read_accepted_answers`, for ``accuracy`` also documents with
        blanks or their answers (`fastmrc.cloze`), else one for `fastmrc.data.read_questions`.
    metric
        One of `METRICS`.

    Returns
    -------
    dict
        References by id, in the order of the file.

    Raises
    ------
    InputError
        At the first record that cannot be used, with file and line: scores on a part of the data
        would mislead. Also if there is no record.
    OSError
        If the file cannot be read.
    """
    if metric == "sogou":
        references = read_accepted_answers(path)
    elif metric == "accuracy" and (answers := read_any_cloze_answers(path)) is not None:
        references = {
            key: Reference((answer,) if answer else ()) for key, answer in answers.items()
        }
    else:
        references = {q.id: Reference(q.answers) for q in read_questions(path)}
    if not references:
        raise InputError(f"{os.fspath(path)}: expected at least one question, got none")
    return references


def read_accepted_answers(path: StrPath) -> dict[str, Reference]:
    """Read a SogouQA file, lines of ``id<TAB>answer<TAB>accepted answers``.

    Parameters
    ----------
    path
        UTF-8, with or without a byte order mark. Accepted answers are separated by ``|``. Blank
        lines are left out.

    Returns
    -------
    dict
        References by id, in the order of the file.

    Raises
    ------
    InputError
        With file and line: not UTF-8, other than three fields, or an id that was used before.
    OSError
        If the file cannot be read.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        lines = enumerate(io.BytesIO(file.read().removeprefix(BOM)), start=1)
        return keyed_lines(name, (line for line in lines if line[1].strip()), _parse_accepted)


def _parse_accepted(line: bytes) -> tuple[str, Reference]:
    fields = decode_utf8(line).rstrip("\r\n").split("\t")
    if len(fields) != 3:
        raise InputError(
            "expected id<TAB>answer<TAB>accepted answers separated by |, "
            f"got {len(fields)} field{'s' if len(fields) > 1 else ''}"
        )
    question_id, gold, accepted = fields
    return question_id, Reference(tuple(accepted.split("|")), gold)


# --- evaluation --------------------------------------------------------------------------------


def evaluate(
    predictions: Mapping[str, str], references: Mapping[str, Reference], metric: Metric
) -> Evaluation:
    """Score predictions against accepted answers.

    Parameters
    ----------
    predictions
        Answers by id, as `fastmrc.predictions.read_predictions` returns them.
    references
        Accepted answers by id, as `read_references` returns them.
    metric
        One of `METRICS`.

    Returns
    -------
    Evaluation
        ``sogou`` takes the means over the predictions, as the script of the task scores the lines
        that were submitted. The others take them over all questions; one without a prediction
        scores 0, even if it has no answer.

    Raises
    ------
    InputError
        If the metric is unknown, a prediction has an id without a reference, or there is nothing
        to score.
    """
    if metric not in METRICS:
        raise InputError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    unknown = [key for key in predictions if key not in references]
    if unknown:
        raise InputError(
            f"predictions: expected ids of the data, got {len(unknown)} unknown: "
            f"{name_ids(unknown, 5)}"
        )
    scored = predictions if metric == "sogou" else references
    if not scored:
        argument = "predictions" if metric == "sogou" else "references"
        raise InputError(f"{argument}: expected at least one question, got none")
    questions = tuple(
        _score_question(key, predictions.get(key), references[key], metric) for key in scored
    )
    return Evaluation(
        metric=metric,
        values=_means(questions, metric),
        missing=tuple(key for key in references if key not in predictions),
        questions=questions,
    )


def name_ids(ids: Sequence[str], limit: int) -> str:
    """Name at most `limit` ids and count the others."""
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(map(repr, ids[:limit])) + more


def _score_question(
    question_id: str, prediction: str | None, reference: Reference, metric: Metric
) -> QuestionScore:
    score = _score(prediction or "", reference, metric)
    if prediction is None:
        score = Score(dict.fromkeys(score.values, 0.0))
    return QuestionScore(question_id, prediction, reference.answers, score.values, score.best)


def _score(prediction: str, reference: Reference, metric: Metric) -> Score:
    if metric == "sogou":
        return score_sogou(prediction, reference.gold, reference.answers)
    score: Callable[[str, Sequence[str]], Score] = {
        "cmrc": score_cmrc,
        "squad": score_squad,
        "accuracy": score_accuracy,
    }[metric]
    return score(prediction, reference.answers)


def _means(questions: Sequence[QuestionScore], metric: Metric) -> dict[str, float]:
    keys = {"sogou": ("accuracy", "f1"), "accuracy": ("accuracy",)}.get(metric, ("em", "f1"))
    means = {key: fsum(q.values[key] for q in questions) / len(questions) for key in keys}
    if metric == "sogou":
        means["final"] = (means["accuracy"] + means["f1"]) / 2
    return means


# --- accuracy ----------------------------------------------------------------------------------


def score_accuracy(prediction: str, answers: Collection[str]) -> Score:
    """Tell whether a prediction is an accepted answer, white space at both ends aside.

    Where no answer is accepted, an empty prediction is right.
    """
    accepted = {answer.strip() for answer in answers} or {""}
    return Score({"accuracy": float(prediction.strip() in accepted)})


# --- SogouQA -----------------------------------------------------------------------------------

# The characters that the task counts as punctuation.
_SOGOU_PUNCTUATION = (
    " `^~<=>|_-,;:!?/.'\"()[]{}@$*\\&#%+\x7f…‰※•—‖‘’“”№←↑→↓∴∨∵∶∩∈∑√∞≯≡≮≤≥≈≌⊥⊙⌒□◆◇◎●★☆♀♂"
    "¨°·§¤±\u3000、。〃々〈〉《》「」『』【】〓〔〕〖〗÷×′▲″△∠≠■ˇˉ￣￥＿！＄（），．：；？～﹑￠"
)
_ASCII_SPACE = " \t\n\r\v\f"
_TO_SPACE = {ord(character): " " for character in _SOGOU_PUNCTUATION}
_TO_HALF_WIDTH = {0x3000: " "} | {code: chr(code - 65248) for code in range(0xFF01, 0xFF5F)}
_TO_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_WITHOUT_SPACE = str.maketrans("", "", _ASCII_SPACE)


def score_sogou(answer: str, gold: str | None, accepted: Sequence[str]) -> Score:
    """Score an answer as the SogouQA script does.

    Parameters
    ----------
    answer
        ASCII white space at both ends does not count.
    gold
        Second column of the accepted answers. An answer is also right if its parts, in any order,
        are those of this one; parts are what punctuation and spaces separate. None leaves this
        out.
    accepted
        Accepted answers. An answer is right if its normalised form is that of one of them.

    Returns
    -------
    Score
        ``accuracy`` (0 or 1) and ``f1``, ``precision``, ``recall`` over the characters of the
        normalised texts, each counted as often as it occurs, for the first of the accepted
        answers that give the highest F1. An empty answer scores 0.

    Notes
    -----
    A text is normalised by turning full-width characters into half-width ones and ASCII letters
    into lower case, and by dropping punctuation and white space.
    """
    stripped = answer.strip(_ASCII_SPACE)
    if not stripped:
        return Score(dict.fromkeys(("accuracy", "f1", "precision", "recall"), 0.0))
    normal = _normalize_sogou(stripped)
    expected = [_normalize_sogou(candidate) for candidate in accepted]
    right = normal in expected
    if not right and gold is not None:
        right = _sogou_parts(stripped) == _sogou_parts(gold)
    f1 = precision = recall = 0.0
    best = ""
    for candidate, text in zip(accepted, expected, strict=True):
        scores = _overlap(normal, text)
        if scores[0] > f1:
            (f1, precision, recall), best = scores, candidate
    values = {"accuracy": float(right), "f1": f1, "precision": precision, "recall": recall}
    return Score(values, best)


def _normalize_sogou(text: str) -> str:
    half_width = text.translate(_TO_HALF_WIDTH).translate(_TO_ASCII_LOWER)
    return half_width.translate(_TO_SPACE).translate(_WITHOUT_SPACE)


def _sogou_parts(text: str) -> set[str]:
    # Punctuation that full-width characters become is not yet a separator here, and two
    # separators in a row make an empty part, which counts.
    separated = text.translate(_TO_SPACE).translate(_TO_ASCII_LOWER)
    return set(map(_normalize_sogou, separated.split(" ")))


def _overlap(prediction: Sequence[str], answer: Sequence[str]) -> tuple[float, float, float]:
    """F1, precision and recall of the items that both hold, as often as both do."""
    common = sum((Counter(prediction) & Counter(answer)).values())
    return _f1(common, len(prediction), len(answer))


def _f1(common: int, predicted: int, expected: int) -> tuple[float, float, float]:
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / predicted, common / expected
    return 2 * precision * recall / (precision + recall), precision, recall


# --- CMRC 2018 ---------------------------------------------------------------------------------

# The script's list also has the two-character "……", which no single character equals: "…" stays.
_CMRC_PUNCTUATION = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"
_WITHOUT_CMRC_PUNCTUATION = str.maketrans("", "", _CMRC_PUNCTUATION)
_CHINESE_OR_OTHER = re.compile("[\u4e00-\u9fa5]|[^\u4e00-\u9fa5]+")

_PADDED = r" \g<0> "
# Applied in this order; what is left are words between white space.
_WORD_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Opening quotes; a double one becomes ``.
        ("``|[«“‘„`]", _PADDED),
        ('^"', " `` "),
        (r"""(?<=[ (\[{<])(?:"|'')""", " `` "),
        (r"(?i)(?<!\w)'(?=\w)(?!(?:re|ve|ll|m|t|s|d|n)\b)", "' "),
        # The last full stop, with the brackets and quotes that close after it.
        (r"""(?<=[^.])\.([])}>"'»”’ ]*+)\s*$""", r" . \1 "),
        # Not the comma of a number. The character after it is consumed, so that the second of
        # two commas before a digit is judged by the digit alone.
        (r"([:,])(\D|$)", r" \1 \2"),
        (r"\.{2,}|[;@#$%&?!\u2012-\u2015]", _PADDED),
        (r"(?<=[^'])' ", " ' "),
        (r"--|''|[][(){}<>*»”’]", _PADDED),
        # A double quote that opened nothing closes; it becomes ''.
        ('"', " '' "),
        (r"^|\s+|$", " "),
        # Clitics and contractions.
        (r"(?<=[^' ])'[sSmMdD]? ", _PADDED),
        (r"(?<=[^' ])(?:'(?:ll|LL|re|RE|ve|VE)|n't|N'T) ", _PADDED),
        (
            r"(?i)\b(can(?=not\b)|d(?='ye\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)"
            r"|more(?='n\b)|wan(?=na\s))('?\w+)",
            r" \1 \2 ",
        ),
        (r"(?i)(?<= )('t)(is)\b", r" \1 \2 "),
        (r"(?i)(?<= )('t)(was)\b", r" \1 \2 "),
    )
]


def score_cmrc(prediction: str, answers: Sequence[str]) -> Score:
    """Score a prediction as the script of CMRC 2018 does.

    Parameters
    ----------
    prediction
        Predicted answer.
    answers
        Accepted answers, the best of which counts.

    Returns
    -------
    Score
        ``em``: 1 if prediction and answer are equal in lower case, without the script's
        punctuation and without white space at both ends. ``f1``: from the longest contiguous run
        of units in both; it is 0 if there is none, so also for two texts of punctuation alone.
        Where no answer is accepted, which the script does not know, both are 1 for a prediction
        that is empty once punctuation is dropped, else 0.

    Notes
    -----
    Units are the characters from U+4E00 to U+9FA5 and the words of what lies between them. The
    script splits these by NLTK's ``word_tokenize``, the Penn Treebank tokenization with NLTK's
    additions; its word rules are followed here. NLTK first cuts sentences with a trained model
    (Punkt), which is left out: a full stop within a run of other text stays with its word, where
    NLTK would cut it off if it takes it for the end of a sentence.

    References
    ----------
    Cui et al. (2019), "A Span-Extraction Dataset for Chinese Machine Reading Comprehension";
    Bird, Loper and Klein (2009), "Natural Language Processing with Python" (NLTK).
    """
    predicted = _clean_cmrc(prediction)
    if not answers:
        empty = float(not predicted)
        return Score({"em": empty, "f1": empty})
    cleaned = [_clean_cmrc(answer) for answer in answers]
    units = _cmrc_units(predicted)
    f1, best = 0.0, ""
    for answer, text in zip(answers, cleaned, strict=True):
        expected = _cmrc_units(text)
        common = _longest_common_run(units, expected)
        candidate = _f1(common, len(units), len(expected))[0]
        if candidate > f1:
            f1, best = candidate, answer
    return Score({"em": float(predicted in cleaned), "f1": f1}, best)


def _clean_cmrc(text: str) -> str:
    return text.lower().strip().translate(_WITHOUT_CMRC_PUNCTUATION)


def _cmrc_units(cleaned: str) -> list[str]:
    units: list[str] = []
    for piece in _CHINESE_OR_OTHER.findall(cleaned):
        if "\u4e00" <= piece[0] <= "\u9fa5":
            units.append(piece)
        else:
            units += _split_words(piece)
    return units


def _split_words(text: str) -> list[str]:
    for pattern, replacement in _WORD_RULES:
        text = pattern.sub(replacement, text)
    return text.split()


def _longest_common_run(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest contiguous run of items that is in both."""
    places: dict[str, list[int]] = {}
    for place, item in enumerate(right):
        places.setdefault(item, []).append(place)
    longest = 0
    # By where in `right` a common run ends that also ends at the current item of `left`.
    runs: dict[int, int] = {}
    for item in left:
        runs = {place: runs.get(place - 1, 0) + 1 for place in places.get(item, ())}
        longest = max(longest, max(runs.values(), default=0))
    return longest


# --- SQuAD -------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_squad(prediction: str, answers: Sequence[str]) -> Score:
    """Score a prediction as the scripts of SQuAD 1.1 and 2.0 do.

    Parameters
    ----------
    prediction
        Predicted answer.
    answers
        Accepted answers, the best of which counts. Those that are empty once normalised are left
        out; where none is left, the question has no answer, and an empty prediction is right.

    Returns
    -------
    Score
        ``em``: 1 if the normalised texts are equal. ``f1``: over their words, each counted as
        often as it occurs; with an empty text, 1 if both are empty.

    Notes
    -----
    A text is normalised by turning it into lower case and dropping ASCII punctuation, the
    articles and white space beyond one space between words. The script of SQuAD 2.0 leaves
    questions without a prediction out of the means; `evaluate` scores them 0, as that of SQuAD
    1.1 does.

    References
    ----------
    Rajpurkar et al. (2016), "SQuAD: 100,000+ Questions for Machine Comprehension of Text";
    Rajpurkar et al. (2018), "Know What You Don't Know: Unanswerable Questions for SQuAD".
    """
    predicted = _normalize_squad(prediction)
    accepted = [(answer, _normalize_squad(answer)) for answer in answers]
    accepted = [pair for pair in accepted if pair[1]]
    if not accepted:
        empty = float(not predicted)
        return Score({"em": empty, "f1": empty})
    f1, best = 0.0, ""
    for answer, text in accepted:
        candidate = _overlap(predicted.split(), text.split())[0]
        if candidate > f1:
            f1, best = candidate, answer
    em = any(predicted == text for _, text in accepted)
    return Score({"em": float(em), "f1": f1}, best)


def _normalize_squad(text: str) -> str:
    bare = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())
