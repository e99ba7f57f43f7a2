"""Options of a reader call, validated in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from fastmrc.errors import InputError

__all__ = ["Combine", "Finish", "Mode", "SearchOptions", "Vote"]

Mode = Literal["extractive", "generative"]
Vote = Literal["original", "mean", "max", "product", "weighted"]
Finish = Literal["original", "pool"]
Combine = Literal["step", "answer"]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Keywords of ``Seq2SeqReader.answer``; see there for their meaning."""

    beam_size: int = 3
    mode: Mode = "extractive"
    vote: Vote = "original"
    min_answer_tokens: int = 0
    max_answer_tokens: int = 32
    finish: Finish = "original"
    length_penalty: float = 1.0
    combine: Combine = "step"
    no_answer_threshold: float | None = None
    stride: int | None = None
    max_passage_tokens: int = 254
    max_question_tokens: int = 63
    look_ahead: int = 4

    def __post_init__(self) -> None:
        _require_choice("mode", self.mode, get_args(Mode))
        _require_choice("vote", self.vote, get_args(Vote))
        _require_choice("finish", self.finish, get_args(Finish))
        _require_choice("combine", self.combine, get_args(Combine))
        _require_int("beam_size", self.beam_size, 1)
        _require_int("min_answer_tokens", self.min_answer_tokens, 0)
        _require_int("max_answer_tokens", self.max_answer_tokens, max(1, self.min_answer_tokens))
        _require_int("max_passage_tokens", self.max_passage_tokens, 1)
        _require_int("max_question_tokens", self.max_question_tokens, 1)
        _require_int("look_ahead", self.look_ahead, 0)
        if self.stride is not None:
            _require_int("stride", self.stride, 0)
            if self.stride >= self.max_passage_tokens:
                raise InputError(
                    f"stride: expected less than max_passage_tokens={self.max_passage_tokens}, "
                    f"got {self.stride}"
                )
        if not math.isfinite(self.length_penalty):
            raise InputError(f"length_penalty: expected a finite number, got {self.length_penalty}")
        if self.no_answer_threshold is not None and math.isnan(self.no_answer_threshold):
            raise InputError("no_answer_threshold: expected a number, got NaN")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _require_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name}: expected an integer, got {type(value).__name__}")
    if int(value) < least:
        raise InputError(f"{name}: expected at least {least}, got {value}")
