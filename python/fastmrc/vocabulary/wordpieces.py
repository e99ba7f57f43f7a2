"""A WordPiece tokenizer, taken apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmrc.errors import UnsupportedModelError
from fastmrc.pretrained import LoadedModel
from fastmrc.text import plain_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["WordPieces"]


@dataclass(frozen=True)
class WordPieces:
    """A WordPiece tokenizer, taken apart.

    Attributes
    ----------
    backend
        The tokenizer, without padding and truncation.
    parts
        Its JSON form.
    vocabulary
        Ids by token, added tokens included.
    """

    backend: Tokenizer
    parts: dict[str, Any]
    vocabulary: dict[str, int]

    @classmethod
    def of(cls, loaded: LoadedModel) -> WordPieces:
        """Take the tokenizer of a model; UnsupportedModelError if it is of another kind."""
        backend = plain_backend(loaded.tokenizer)
        parts = json.loads(backend.to_str())
        kind = parts["model"]["type"]
        if kind != "WordPiece":
            raise UnsupportedModelError(
                f"{loaded.source}: expected a WordPiece tokenizer, got one of kind {kind}"
            )
        return cls(backend, parts, loaded.tokenizer.get_vocab())

    @property
    def prefix(self) -> str:
        """What a token inside a word begins with."""
        return str(self.parts["model"]["continuing_subword_prefix"])

    @property
    def unknown(self) -> str:
        """Token of words that cannot be cut into others."""
        return str(self.parts["model"]["unk_token"])

    def normalize(self, text: str) -> str:
        """Return a text as its words are cut from it."""
        normalizer = self.backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def words(self, text: str) -> list[str]:
        """Return the normalised words of a text, which are then cut into tokens."""
        cutter = self.backend.pre_tokenizer
        text = self.normalize(text)
        return [text] if cutter is None else [w for w, _ in cutter.pre_tokenize_str(text)]

    def matches(self, word: str) -> list[str]:
        """Return the longest matches from the start of a word, up to where nothing matches."""
        if len(word) > self.parts["model"]["max_input_chars_per_word"]:
            return []
        found: list[str] = []
        start = 0
        while start < len(word):
            head = self.prefix if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if head + word[start:e] in self.vocabulary), None)
            if end is None:
                break
            found.append(head + word[start:end])
            start = end
        return found
