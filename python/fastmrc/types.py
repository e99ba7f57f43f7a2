"""Plain result types shared by the readers, the engine and the reference."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "Answer",
    "Candidate",
    "Hypothesis",
    "SampledSequence",
    "SearchResult",
    "Span",
    "Timings",
]


@dataclass(frozen=True, slots=True)
class Span:
    """Where an answer stands in the caller's own text.

    Attributes
    ----------
    passage
        Index into the caller's list of passages.
    start, end
        Half-open character range in that passage.
    """

    passage: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A token sequence of the search, without the final end token.

    Attributes
    ----------
    token_ids
        Tokens without the end token.
    score
        Sum of the log votes (finish ``"original"``) or that sum divided by
        ``length ** length_penalty`` (finish ``"pool"``); natural logarithm.
    finished
        Whether the end token was chosen.
    """

    token_ids: list[int]
    score: float
    finished: bool


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """A token sequence that was drawn.

    Attributes
    ----------
    token_ids
        Tokens without the end token that finished it.
    log_prob
        Logarithm of the probability of all its tokens and, if it is finished, that end token, under
        the model's own distribution: temperature 1, nothing left out.
    finished
        Whether the end token was drawn; else the greatest length was reached, or nothing could
        follow.
    """

    token_ids: list[int]
    log_prob: float
    finished: bool


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search returns for one question.

    Attributes
    ----------
    best
        The answer of the search, ``None`` if there is none.
    hypotheses
        Finished and live hypotheses by falling score, at most the beam size.
    surviving
        For each passage, whether it holds an answer: its most likely first token is not the end.
    voting
        For each passage, whether it voted: all that survive, or the likeliest of them.
    no_answer
        For each passage, the probability of the end token as the first one.
    """

    best: Hypothesis | None
    hypotheses: list[Hypothesis]
    surviving: list[bool]
    voting: list[bool]
    no_answer: list[float]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent on one question; shared work of a batch is divided evenly."""

    tokenise: float = 0.0
    encode: float = 0.0
    decode: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the three parts, in seconds."""
        return self.tokenise + self.encode + self.decode


@dataclass(frozen=True, slots=True)
class Candidate:
    """One entry of the n-best list: text, score, token ids and citations."""

    text: str
    score: float
    token_ids: list[int]
    spans: list[Span]
    finished: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question.

    Attributes
    ----------
    text
        Answer text; empty if there is no answer. In extractive mode the characters of the
        first span as the caller wrote them.
    score
        0.0 if there is no answer. Seq2seq reader: natural logarithm of the votes; the others: the
        vote itself.
    token_ids
        Answer tokens without the end token.
    spans
        Every occurrence in the passages that were not rejected, in order.
    candidates
        The n-best list by falling score. Seq2seq reader: finished and live hypotheses, at most the
        beam size; the others: the answers that passages voted on.
    timings
        Seconds spent on this question.
    no_answer_score
        The smallest probability of "no answer" over the windows of all passages; None if there is
        no window, or the span reader's model has no position for it.
    """

    text: str = ""
    score: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    no_answer_score: float | None = None
