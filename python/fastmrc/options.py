"""Options of a reader call and of sampling, validated in one place: one class each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from fastmrc.errors import InputError

__all__ = [
    "NUCLEUS_SLACK",
    "AuditMethod",
    "Combine",
    "Decoding",
    "Finish",
    "Mode",
    "ReaderOptions",
    "SamplingOptions",
    "SearchOptions",
    "SlotOptions",
    "SpanOptions",
    "Vote",
    "require_ratio",
    "require_truncation",
]

Mode = Literal["extractive", "generative"]
Vote = Literal["original", "mean", "max", "product", "weighted"]
Finish = Literal["original", "pool"]
Combine = Literal["step", "answer"]
Decoding = Literal["greedy", "exact"]
AuditMethod = Literal["auto", "frank-wolfe", "reflection", "lp"]

NUCLEUS_SLACK = 1e-5
"""By how little a nucleus may miss `SamplingOptions.top_p`: more than the error of native sums."""
_SPAN_STRIDE = 128
_MOST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """Keywords that every reader takes.

    Attributes
    ----------
    vote
        How passages agree: ``"original"`` (default) sum s^2 / (1 + sum s), ``"mean"``, ``"max"``,
        ``"product"`` (geometric mean) or ``"weighted"`` sum w s^2 / (1 + sum w s) with
        `passage_weights`. The seq2seq reader votes on tokens (see `fastmrc.ops.beam_step`), the
        others on finished answers, with s the score of an answer in each passage.
    max_answer_tokens
        Longest answer, without its end token.
    no_answer_threshold
        Answers with a lower score are replaced by the empty one; None (default): never.
    stride
        None: passages are cut on the right at `max_passage_tokens`; else they are read in windows
        that share `stride` tokens. Each window votes as a passage of its own, except in the span
        reader, which merges them.
    max_passage_tokens, max_question_tokens
        Limits in tokens.
    """

    vote: Vote = "original"
    max_answer_tokens: int = 32
    no_answer_threshold: float | None = None
    stride: int | None = None
    max_passage_tokens: int = 254
    max_question_tokens: int = 63

    def __post_init__(self) -> None:
        _require_choice("vote", self.vote, get_args(Vote))
        _require_int("max_answer_tokens", self.max_answer_tokens, 1)
        _require_int("max_passage_tokens", self.max_passage_tokens, 1)
        _require_int("max_question_tokens", self.max_question_tokens, 1)
        if self.stride is not None:
            _require_int("stride", self.stride, 0)
            if self.stride >= self.max_passage_tokens:
                raise InputError(
                    f"stride: expected less than max_passage_tokens={self.max_passage_tokens}, "
                    f"got {self.stride}"
                )
        if self.no_answer_threshold is not None:
            _require_number("no_answer_threshold", self.no_answer_threshold)


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ReaderOptions):
    """Keywords of the seq2seq reader.

    Attributes
    ----------
    beam_size
        Hypotheses kept, 1 to the vocabulary size; default 3.
    mode
        ``"extractive"`` (default): the answer is a contiguous piece of a passage;
        ``"generative"``: any text.
    min_answer_tokens, max_answer_tokens
        Bounds of the answer's length without its end token; default 0 and 32. With n tokens at
        most there are n steps, so an answer of n tokens has no end token.
    finish
        ``"original"`` (default): the search ends when its best hypothesis ends; ``"pool"``: the
        usual rule, finished hypotheses compete by score / length ** `length_penalty`.
    length_penalty
        For ``finish="pool"``; default 1.0.
    no_answer_ratio
        At least 1, or None (default). Of the passages (or windows of them) that are not rejected
        those vote whose probability of the end token as the first one is at most so many times the
        least of all (of a passage whose weight is not 0). Near 1 the passage that is surest to hold
        an answer is read alone; None or infinity: all vote.
    combine
        ``"step"`` (default): passages vote on every token; ``"answer"``: each passage is read
        alone and finished answers vote, s being the geometric mean of an answer's token
        probabilities; the score is the logarithm of the vote.
    look_ahead
        Tokens that are encoded together with one that has a single continuation in the passages,
        where one question is read at a time; default 4. Changes the number of forward passes, and
        logits by rounding only; 0: one pass per step. `fastmrc.reference` does not look ahead.
    max_passage_tokens, max_question_tokens
        Default 254 and 63, as the original.
    """

    beam_size: int = 3
    mode: Mode = "extractive"
    min_answer_tokens: int = 0
    finish: Finish = "original"
    length_penalty: float = 1.0
    no_answer_ratio: float | None = None
    combine: Combine = "step"
    look_ahead: int = 4

    def __post_init__(self) -> None:
        _require_choice("mode", self.mode, get_args(Mode))
        _require_choice("finish", self.finish, get_args(Finish))
        _require_choice("combine", self.combine, get_args(Combine))
        _require_int("beam_size", self.beam_size, 1)
        _require_lengths(self.min_answer_tokens, self.max_answer_tokens)
        _require_int("look_ahead", self.look_ahead, 0)
        require_ratio(self.no_answer_ratio)
        if not math.isfinite(self.length_penalty):
            raise InputError(f"length_penalty: expected a finite number, got {self.length_penalty}")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class SlotOptions(ReaderOptions):
    """Keywords of the reader by masked language model.

    Attributes
    ----------
    decoding
        ``"greedy"`` (default): slot by slot the most likely token that goes on within the passage,
        as the original; ``"exact"``: the best span of each passage under the same score, which
        greedy can miss.
    mode
        ``"extractive"`` (default): the answer is a contiguous piece of a passage;
        ``"generative"``: any tokens (greedy only).
    top_k
        Answers of each passage that take part in the vote, with ``decoding="exact"``; default 1.
    no_answer_ratio
        As for `SearchOptions`, by the probability of the end token in the first slot.
    min_answer_tokens
        Least length of an answer; default 0. A passage without one so long gives none, and greedy
        decoding gives none where it comes to the end of the passage before.
    max_answer_tokens
        Number of [MASK] slots, default 16: what the model was trained with matters, as the slots
        are part of its input.
    max_passage_tokens, max_question_tokens
        Default 255 and 63, as the original.
    """

    decoding: Decoding = "greedy"
    mode: Mode = "extractive"
    top_k: int = 1
    no_answer_ratio: float | None = None
    min_answer_tokens: int = 0
    max_answer_tokens: int = 16
    max_passage_tokens: int = 255

    def __post_init__(self) -> None:
        _require_choice("decoding", self.decoding, get_args(Decoding))
        _require_choice("mode", self.mode, get_args(Mode))
        _require_int("top_k", self.top_k, 1)
        require_ratio(self.no_answer_ratio)
        _require_lengths(self.min_answer_tokens, self.max_answer_tokens)
        if self.decoding == "greedy" and self.top_k > 1:
            raise InputError(
                f"top_k: expected 1 with decoding 'greedy', which finds one answer per passage, "
                f"got {self.top_k}"
            )
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class SpanOptions(ReaderOptions):
    """Keywords of the reader by start and end heads.

    Attributes
    ----------
    top_k
        Answers of each passage that take part in the vote; default 1.
    align_to_words
        Whether spans are widened to whole words (default), as the tokenizer cuts words; may hurt
        where words are not set apart by spaces and the tokenizer does not know them.
    handle_impossible_answer
        Whether a passage may hold no answer; default False. One whose no-answer score (the
        probability of its null span at [CLS]) exceeds that of its best span leaves the vote; none
        left: the empty answer.
    null_score_diff_threshold
        By how much, in natural logarithms, the no-answer score must exceed the best span's;
        default 0.0. For ``handle_impossible_answer=True`` only.
    stride
        Default 128, or half of `max_passage_tokens` if that is not more. A span found in several
        windows of a passage counts once, with its best score.
    max_answer_tokens, max_passage_tokens, max_question_tokens
        Default 32, 320 and 63.
    """

    top_k: int = 1
    align_to_words: bool = True
    handle_impossible_answer: bool = False
    null_score_diff_threshold: float = 0.0
    stride: int | None = _SPAN_STRIDE
    max_passage_tokens: int = 320

    def __post_init__(self) -> None:
        _require_int("max_passage_tokens", self.max_passage_tokens, 1)
        if self.stride == _SPAN_STRIDE and self.max_passage_tokens <= _SPAN_STRIDE:
            object.__setattr__(self, "stride", self.max_passage_tokens // 2)
        _require_int("top_k", self.top_k, 1)
        _require_number("null_score_diff_threshold", self.null_score_diff_threshold)
        for name in ("align_to_words", "handle_impossible_answer"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How sequences are drawn.

    Attributes
    ----------
    top_k
        Only so many of the likeliest tokens may be drawn; None: all.
    top_p
        Of these only the fewest likeliest whose probabilities add up to this share, above 0 and at
        most 1 (Holtzman et al. 2020). A share that is short of it by `NUCLEUS_SLACK` or less
        counts, so that rounding decides nothing where shares are equal, as in a half of two.
    temperature
        Logits are divided by it, above 0: below 1 likely tokens become likelier.
    min_tokens, max_tokens
        Bounds of the length without the final end token; with n tokens at most there are n steps,
        so a sequence of n tokens has no end token.
    min_ends
        A sequence is finished by its end token of this number; earlier ones stay in it.
    """

    top_k: int | None = None
    top_p: float = 1.0
    temperature: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 32
    min_ends: int = 1

    def __post_init__(self) -> None:
        require_truncation(self.top_k, self.top_p, self.temperature)
        _require_int("min_tokens", self.min_tokens, 0)
        _require_int("max_tokens", self.max_tokens, max(1, self.min_tokens))
        _require_int("min_ends", self.min_ends, 1)


def require_truncation(top_k: int | None, top_p: float, temperature: float) -> None:
    """Refuse what `SamplingOptions` does not take."""
    if top_k is not None:
        _require_int("top_k", top_k, 1)
    _require_number("top_p", top_p)
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: expected a share above 0 and at most 1, got {top_p}")
    _require_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature: expected a finite number above 0, got {temperature}")


def _require_lengths(least: object, most: object) -> None:
    _require_int("min_answer_tokens", least, 0)
    _require_int("max_answer_tokens", most, max(1, int(least)))  # type: ignore[call-overload]


def require_ratio(ratio: object) -> None:
    """Refuse what is no `no_answer_ratio`."""
    if ratio is None:
        return
    _require_number("no_answer_ratio", ratio)
    if ratio < 1:  # type: ignore[operator]
        raise InputError(f"no_answer_ratio: expected at least 1, got {ratio}")


def _require_number(name: str, value: object) -> None:
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise InputError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise InputError(f"{name}: expected a number that a float holds") from None
    if math.isnan(number):
        raise InputError(f"{name}: expected a number, got NaN")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _require_int(name: str, value: object, least: int) -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise InputError(f"{name}: expected an integer, got {type(value).__name__}")
    if int(value) < least:
        raise InputError(f"{name}: expected at least {least}, got {value}")
    if int(value) > _MOST:
        raise InputError(f"{name}: expected at most {_MOST}, got {value}")
