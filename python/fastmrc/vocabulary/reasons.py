"""Why tokens go, for programs and in words."""

from __future__ import annotations

from typing import Literal

__all__ = ["REASONS", "Reason"]

Reason = Literal[
    "never_in_text", "chinese_stands_alone", "other_stands_alone", "not_in_corpus", "no_token"
]

REASONS: dict[Reason, str] = {
    "never_in_text": "hold a character that normalised text never holds",
    "chinese_stands_alone": "join a Chinese character, which is a word by itself",
    "other_stands_alone": "join another character that is a word by itself",
    "not_in_corpus": "are not needed by the corpus",
    "no_token": "are rows without a token",
}
