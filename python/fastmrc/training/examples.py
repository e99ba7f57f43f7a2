"""Training examples: questions with a window of a passage, cloze questions, pairs of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastmrc.data import Pair, Question
from fastmrc.text import SENTENCE_ENDS, TextCodec, TokenizedText
from fastmrc.training.near import NearDocuments
from fastmrc.training.options import WindowOptions

__all__ = ["Corpus", "Document", "Evidence", "ReadingExample", "find_tokens"]

IntArray = NDArray[np.int32]

_NONE = np.zeros(0, dtype=np.int32)
# Of the documents nearest to a question, among how many a distractor is drawn.
_NEAREST = 40
_LONGEST_CLOZE_ANSWER = 10
_LONGEST_CLOZE_QUESTION = 40
_SHORTEST_SENTENCE = 8
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Document:
    """A passage in tokens; `text` is normalized as the model reads it."""

    text: str
    tokens: TokenizedText

    def window(self, start: int, stop: int) -> str:
        """Return the characters of the tokens [start, stop)."""
        piece = self.tokens.piece(start, stop)
        return self.text[piece.starts[0] : piece.ends[-1]] if len(piece) else ""


@dataclass(frozen=True, slots=True)
class ReadingExample:
    """A question, a window of a passage, and what is to be answered.

    Attributes
    ----------
    id
        Of the question; of the document for a cloze question.
    question, passage, answer
        Token ids, int32; an empty answer: the window holds none.
    places
        Where the answer begins in `passage`, int32 [n]; none if it is not copied from one place.
    """

    id: str
    question: IntArray
    passage: IntArray
    answer: IntArray
    places: IntArray


@dataclass(frozen=True, slots=True)
class Evidence:
    """A question and a window of a passage that it was asked of.

    Attributes
    ----------
    id
        Of the question.
    question, passage
        Token ids, int32.
    document
        Index of the passage that the window is of.
    """

    id: str
    question: IntArray
    document: int
    passage: IntArray


@dataclass(slots=True)
class _Question:
    id: str
    tokens: IntArray
    documents: list[int]
    answers: list[str]
    # By document, for each answer the token ranges [start, stop) in which it occurs.
    spans: dict[int, list[list[tuple[int, int]]]] = field(default_factory=dict)

    @property
    def answered(self) -> list[int]:
        """The documents that hold an answer."""
        return [document for document in self.documents if self.first_spans(document)]

    def first_spans(self, document: int) -> list[tuple[int, int]]:
        """Return the ranges of the first answer that occurs in a document."""
        return next((ranges for ranges in self.spans[document] if ranges), [])


class Corpus:
    """Questions and pairs in tokens, from which examples are drawn.

    Parameters
    ----------
    codec
        Of the model.
    options
        How passages are cut.

    Attributes
    ----------
    documents
        Passages, each once.
    pairs
        Token ids of two texts that mean the same, and the place they come from.
    not_found
        Ids of questions with an answer that occurs in none of their passages.
    """

    def __init__(self, codec: TextCodec, options: WindowOptions) -> None:
        self._codec = codec
        self._options = options
        self._questions: list[_Question] = []
        self._document_of: dict[str, int] = {}
        self.documents: list[Document] = []
        self.pairs: list[tuple[IntArray, IntArray, str]] = []
        self.not_found: list[str] = []
        self._question_words = [
            codec.encode_question(word) for word in options.cloze_question_words
        ]
        self._sentences: dict[int, list[tuple[int, int]]] = {}  # by document, once asked for
        self._near: NearDocuments | None = None  # of all documents, once asked for

    @property
    def num_questions(self) -> int:
        """Number of questions that can be drawn."""
        return len(self._questions)

    @property
    def num_answered(self) -> int:
        """Number of questions with an answer in one of their passages."""
        return sum(1 for question in self._questions if question.answers)

    def add_question(self, question: Question) -> None:
        """Add a question; one without passages is left out."""
        texts = [passage.text for passage in question.passages if passage.text.strip()]
        given = [passage.answer for passage in question.passages] + list(question.answers)
        answers = list(dict.fromkeys(answer.strip() for answer in given if answer.strip()))
        entry = _Question(
            question.id,
            self._codec.encode_question(question.question)[: self._options.question_tokens],
            self._add_documents(texts),
            answers,
        )
        for document in entry.documents:
            found = (self._ranges(document, answer) for answer in answers)
            entry.spans[document] = list(found)
        copied = any(entry.first_spans(document) for document in entry.documents)
        if answers and not copied and not self._parts_found(entry):
            self.not_found.append(question.id)
        elif entry.documents:
            self._questions.append(entry)

    def add_pair(self, pair: Pair) -> None:
        """Add texts of the same meaning, one pair for each synonym."""
        limit = self._options.question_tokens
        first, *others = self._codec.encode_texts([pair.text, *pair.synonyms], limit)
        for second in others:
            if len(first) and len(second):
                self.pairs.append((first, second, pair.place))

    def draw(self, index: int, rng: np.random.Generator) -> ReadingExample:
        """Draw a passage of question `index` and a window of it."""
        question, options = self._questions[index], self._options
        if options.distractors and rng.random() < options.distractors:
            distractor = self._distractor(question, rng)
            if distractor is not None:
                size = self._size(rng)
                start = _random_start(len(self.documents[distractor].tokens), size, rng)
                passage = self.documents[distractor].tokens.token_ids[start : start + size]
                return ReadingExample(question.id, question.tokens, passage, _NONE, _NONE)
        document, start, stop = self._window_of(question, options.negatives, rng)
        answer, places = self._target(question, document, start, stop)
        passage = self.documents[document].tokens.token_ids[start:stop]
        return ReadingExample(question.id, question.tokens, passage, answer, places)

    def draw_evidence(self, index: int, rng: np.random.Generator) -> Evidence:
        """Draw a window of a passage of question `index` that holds its answer, around it; of any
        of its passages if none does."""
        question = self._questions[index]
        document, start, stop = self._window_of(question, 0.0, rng, question.answered or None)
        passage = self.documents[document].tokens.token_ids[start:stop]
        return Evidence(question.id, question.tokens, document, passage)

    def _window_of(
        self,
        question: _Question,
        anywhere: float,
        rng: np.random.Generator,
        among: list[int] | None = None,
    ) -> tuple[int, int, int]:
        """Draw a document of a question, or one `among` them, and the tokens [start, stop) of it:
        around the answer, except for the share `anywhere`."""
        documents = question.documents if among is None else among
        document = documents[int(rng.integers(len(documents)))]
        length = len(self.documents[document].tokens)
        spans, size = question.first_spans(document), self._size(rng)
        if spans and rng.random() >= anywhere:
            start = _start_around(spans[int(rng.integers(len(spans)))], length, size, rng)
        else:
            start = _random_start(length, size, rng)
        return document, start, min(length, start + size)

    def draw_cloze(self, index: int, rng: np.random.Generator) -> ReadingExample | None:
        """Make a question of a sentence of document `index`; None if it has no fitting one.

        A span of the sentence is replaced by a question word and is the answer.
        """
        document = self.documents[index]
        longest = self._options.window_tokens[1]
        sentences = [s for s in self._sentences_of(index) if s[1] - s[0] <= longest]
        for _ in range(_TRIES if sentences else 0):
            first, last = sentences[int(rng.integers(len(sentences)))]
            # Two tokens or more: a single character is seldom an answer.
            length = min(1 + int(rng.geometric(0.35)), _LONGEST_CLOZE_ANSWER, last - first - 2)
            start = int(rng.integers(first, last - length + 1))
            if not _is_phrase(document, start, start + length):
                continue
            question = self._cloze_question(document, (first, last), (start, start + length), rng)
            size = max(self._size(rng), last - first)
            tokens = document.tokens.token_ids
            begin = _start_around((first, last), len(tokens), size, rng)
            passage = tokens[begin : begin + size]
            answer = tokens[start : start + length]
            places = find_tokens(passage, answer)
            return ReadingExample(f"cloze:{index}", question, passage, answer, places)
        return None

    def _add_documents(self, texts: Sequence[str]) -> list[int]:
        new = [text for text in dict.fromkeys(texts) if text not in self._document_of]
        if new:
            self._near = None
        for text, tokens in zip(new, self._codec.encode_passages(new), strict=True):
            self._document_of[text] = len(self.documents)
            self.documents.append(Document(self._codec.normalize(text), tokens))
        indices = dict.fromkeys(self._document_of[text] for text in texts)
        return [i for i in indices if len(self.documents[i].tokens)]

    def _ranges(self, document: int, answer: str) -> list[tuple[int, int]]:
        return _token_ranges(self.documents[document], self._codec.normalize(answer))

    def _parts_found(self, question: _Question) -> bool:
        texts = [self.documents[document].text for document in question.documents]
        return any(
            all(self._codec.normalize(part) in text for part in answer.split())
            for answer in question.answers
            for text in texts
        )

    def _target(
        self, question: _Question, document: int, start: int, stop: int
    ) -> tuple[IntArray, IntArray]:
        """Return the answer that a window holds and its places: the first non-empty one of the
        question whose space-separated parts all occur in it, as the original has it."""
        tokens = self.documents[document].tokens.token_ids
        window = self.documents[document].window(start, stop)
        for text, ranges in zip(question.answers, question.spans[document], strict=True):
            inside = next((r for r in ranges if start <= r[0] and r[1] <= stop), None)
            if inside is not None:
                answer = tokens[inside[0] : inside[1]]
                return answer, find_tokens(tokens[start:stop], answer)
            if all(self._codec.normalize(part) in window for part in text.split()):
                answer = self._codec.encode_passages([",".join(text.split())])[0].token_ids
                return answer, find_tokens(tokens[start:stop], answer)
        return _NONE, _NONE

    def _distractor(self, question: _Question, rng: np.random.Generator) -> int | None:
        """Draw a document that shares words with the question but does not hold its answer."""
        if self._near is None:
            self._near = NearDocuments([document.tokens.token_ids for document in self.documents])
        nearest = self._near.nearest(question.tokens, _NEAREST).tolist()
        answers = [self._codec.normalize(answer) for answer in question.answers]
        others = [
            document
            for document in nearest
            if document not in question.documents
            and not any(answer in self.documents[document].text for answer in answers)
        ]
        return others[int(rng.integers(len(others)))] if others else None

    def _size(self, rng: np.random.Generator) -> int:
        least, most = self._options.window_tokens
        return int(rng.integers(least, most + 1))

    def _sentences_of(self, index: int) -> list[tuple[int, int]]:
        if index not in self._sentences:
            self._sentences[index] = list(_sentences(self.documents[index]))
        return self._sentences[index]

    def _cloze_question(
        self,
        document: Document,
        sentence: tuple[int, int],
        blank: tuple[int, int],
        rng: np.random.Generator,
    ) -> IntArray:
        """Replace the blank by a question word, drop some of the other tokens, cut far ones."""
        ids = document.tokens.token_ids
        before, after = ids[sentence[0] : blank[0]], ids[blank[1] : sentence[1]]
        before = before[-_LONGEST_CLOZE_QUESTION // 2 :]
        after = after[: _LONGEST_CLOZE_QUESTION // 2]
        word = self._question_words[int(rng.integers(len(self._question_words)))]
        kept = [part[rng.random(len(part)) >= self._options.cloze_drop] for part in (before, after)]
        return np.concatenate([kept[0], word, kept[1]])[: self._options.question_tokens]


def find_tokens(passage: IntArray, answer: IntArray) -> IntArray:
    """Return where `answer` begins in `passage`, int32 [n]; none for an empty answer."""
    if not 0 < len(answer) <= len(passage):
        return _NONE
    windows = np.lib.stride_tricks.sliding_window_view(passage, len(answer))
    return np.flatnonzero((windows == answer).all(axis=1)).astype(np.int32)


def _token_ranges(document: Document, answer: str) -> list[tuple[int, int]]:
    """Return the token ranges of every occurrence of a text: those that are the text if there are
    any, else those that cover it ("on" in "London")."""
    tokens = document.tokens
    exact: list[tuple[int, int]] = []
    covering: list[tuple[int, int]] = []
    at = document.text.find(answer)
    while at >= 0:
        end = at + len(answer)
        start = int(np.searchsorted(tokens.ends, at, side="right"))
        stop = int(np.searchsorted(tokens.starts, end, side="left"))
        if start < stop:
            fits = tokens.starts[start] == at and tokens.ends[stop - 1] == end
            (exact if fits else covering).append((start, stop))
        at = document.text.find(answer, at + 1)
    return exact or covering


def _random_start(length: int, size: int, rng: np.random.Generator) -> int:
    return int(rng.integers(0, max(0, length - size) + 1))


def _start_around(span: tuple[int, int], length: int, size: int, rng: np.random.Generator) -> int:
    """Draw where a window of `size` tokens begins that holds the span."""
    low = max(0, min(span[1], length) - size)
    high = min(span[0], max(0, length - size))
    return int(rng.integers(low, high + 1)) if low <= high else span[0]


def _sentences(document: Document) -> Iterator[tuple[int, int]]:
    tokens, first = document.tokens, 0
    for i, end in enumerate(tokens.ends.tolist()):
        if document.text[end - 1] in SENTENCE_ENDS or i + 1 == len(tokens):
            if _SHORTEST_SENTENCE <= i - first <= 2 * _LONGEST_CLOZE_QUESTION:
                yield first, i
            first = i + 1


def _is_phrase(document: Document, start: int, stop: int) -> bool:
    """Whether tokens [start, stop) are letters and digits only and cut no word."""
    words = document.tokens.words
    if start > 0 and words[start - 1] == words[start] >= 0:
        return False
    if stop < len(words) and words[stop - 1] == words[stop] >= 0:
        return False
    return document.window(start, stop).isalnum()
