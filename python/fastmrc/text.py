"""From text to tokens and back: normalization, tokenising with offsets, windows, spans."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from fastmrc.pretrained import Normalization

__all__ = [
    "SENTENCE_ENDS",
    "PairLayout",
    "TextCodec",
    "TokenizedText",
    "join_tokens",
    "plain_backend",
    "window_starts",
]

SENTENCE_ENDS = "。！？!?；;\n"  # noqa: RUF001
_CLAUSE_ENDS = "，,、 "  # noqa: RUF001
_CLOSING = "”’」』）》)]\"'"  # noqa: RUF001

# The original's passage normalization; one character for one, so that offsets stay right.
_ORIGINAL_NORMALIZATION = str.maketrans({" ": ",", "、": ",", "；": ",", "，": ","})  # noqa: RUF001

_CJK = "\u2e80-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
_SPACE_AT_CJK = re.compile(rf"(?<=[{_CJK}])\s+|\s+(?=[{_CJK}])")


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """Tokens of a text and the characters each stands for.

    Attributes
    ----------
    token_ids
        int32 [n], without special tokens.
    starts, ends
        int32 [n], half-open character ranges in the caller's text.
    words
        int32 [n], index of the word that a token belongs to, as the tokenizer cuts words; -1 for
        none.
    """

    token_ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    words: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.token_ids)

    def piece(self, start: int, stop: int) -> TokenizedText:
        """Return the tokens [start, stop)."""
        window = slice(start, stop)
        return TokenizedText(
            self.token_ids[window], self.starts[window], self.ends[window], self.words[window]
        )


@dataclass(frozen=True, slots=True)
class PairLayout:
    """How a tokenizer joins two texts: ``before + first + between + second + after``.

    Attributes
    ----------
    before, between, after
        Special tokens, int32.
    types
        Token type of each of the five parts.
    """

    before: NDArray[np.int32]
    between: NDArray[np.int32]
    after: NDArray[np.int32]
    types: tuple[int, int, int, int, int]

    @property
    def num_special(self) -> int:
        """Number of special tokens."""
        return len(self.before) + len(self.between) + len(self.after)

    def join(
        self, first: NDArray[np.int32], second: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the token ids and token types of an input, int32 [n] each."""
        parts = [self.before, first, self.between, second, self.after]
        lengths = [len(part) for part in parts]
        return np.concatenate(parts), np.repeat(np.array(self.types, dtype=np.int32), lengths)

    def second_at(self, first_tokens: int) -> int:
        """Return where the second text begins after a first one of so many tokens."""
        return len(self.before) + first_tokens + len(self.between)


class TextCodec:
    """Tokeniser of a model, for passages and questions.

    Strings that look like special tokens are plain text here. Safe to use from several threads.

    Parameters
    ----------
    tokenizer
        Fast tokenizer of the model.
    normalization
        ``"original"`` turns space, 、, ； and ， of passages into a comma before tokenising.
    """  # noqa: RUF002

    def __init__(self, tokenizer: PreTrainedTokenizerFast, normalization: Normalization) -> None:
        backend: Any = plain_backend(tokenizer)
        backend.encode_special_tokens = True  # "[SEP]" in a passage must not end it
        self._backend = backend
        self._normalize = normalization == "original"
        self._tokenizer = tokenizer
        self.unk_id: int | None = tokenizer.unk_token_id
        self.mask_id: int | None = tokenizer.mask_token_id
        # Whether a model with start and end heads is told which text a token is of.
        self.gives_token_types = "token_type_ids" in tokenizer.model_input_names

    @cached_property
    def cls_id(self) -> int:
        """Id of [CLS]; InputError if there is none."""
        return _special_id(self._tokenizer, "cls_token_id")

    @cached_property
    def sep_id(self) -> int:
        """Id of [SEP]; InputError if there is none."""
        return _special_id(self._tokenizer, "sep_token_id")

    def pair_layout(self) -> PairLayout:
        """Return how the tokenizer joins a question and a passage."""
        joined = self._backend.encode("0", "0")
        # Index of the text that each token belongs to, None for a special token.
        owners = joined.sequence_ids
        first, second = owners.index(0), owners.index(1)
        after = second + owners.count(1)
        cuts = [0, first, first + owners.count(0), second, after, len(owners)]
        ids, types = np.array(joined.ids, dtype=np.int32), joined.type_ids
        # A part without tokens has no type of its own.
        part_types = [types[cuts[i]] if cuts[i] < cuts[i + 1] else 0 for i in range(5)]
        return PairLayout(
            ids[cuts[0] : cuts[1]],
            ids[cuts[2] : cuts[3]],
            ids[cuts[4] : cuts[5]],
            (part_types[0], part_types[1], part_types[2], part_types[3], part_types[4]),
        )

    def encode_question(self, question: str) -> NDArray[np.int32]:
        """Return the token ids of a question, int32 [n]."""
        return self._encode("question", [question])[0].token_ids

    def encode_texts(self, texts: Sequence[str], max_tokens: int) -> list[NDArray[np.int32]]:
        """Return the token ids of texts, not normalized, int32 [n] each.

        One of more than `max_tokens` tokens is cut behind its last mark that ends a sentence, else
        behind its last mark between clauses, unless that leaves less than half; else anywhere.
        """
        return [
            tokens.token_ids[: _cut(text, tokens, 0, max_tokens)]
            for text, tokens in zip(texts, self._encode("texts", texts), strict=True)
        ]

    def cut_pieces(self, text: str, max_tokens: int) -> list[str]:
        """Return a text in pieces of at most `max_tokens` tokens, cut where `encode_texts` cuts;
        one without tokens is one piece."""
        (tokens,) = self._encode("texts", [text])
        cuts = [0]
        while cuts[-1] < len(tokens):
            cuts.append(_cut(text, tokens, cuts[-1], max_tokens))
        # Characters between tokens belong to the piece before them.
        places = [0, *(int(tokens.starts[cut]) for cut in cuts[1:-1]), len(text)]
        return [text[a:b] for a, b in pairwise(places)]

    def normalize(self, passage: str) -> str:
        """Return a passage as the model reads it, of the same length."""
        return passage.translate(_ORIGINAL_NORMALIZATION) if self._normalize else passage

    def encode_passages(self, passages: Sequence[str]) -> list[TokenizedText]:
        """Tokenise passages, normalized as the model was trained."""
        return self._encode("passages", [self.normalize(passage) for passage in passages])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without spaces next to Chinese characters."""
        text = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return _SPACE_AT_CJK.sub("", text).strip()

    def _encode(self, name: str, texts: Sequence[str]) -> list[TokenizedText]:
        try:
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        except TypeError as error:  # a lone surrogate has no UTF-8 form
            raise InputError(f"{name}: expected text that UTF-8 can encode") from error
        return [_tokenized(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of a tokenizer's backend, without padding and truncation."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def _tokenized(text: str, encoding: Any) -> TokenizedText:
    ids = np.array(encoding.ids, dtype=np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    starts, ends = offsets[:, 0].copy(), offsets[:, 1].copy()
    limits = np.append(starts[1:], np.int32(len(text)))
    # Accents that the tokenizer drops belong to the character before them.
    for i in np.flatnonzero(ends < limits).tolist():
        while ends[i] < limits[i] and unicodedata.category(text[ends[i]]) in ("Mn", "Me"):
            ends[i] += 1
    words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int32)
    return TokenizedText(ids, starts, ends, words)


def join_tokens(*parts: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    """Lay token ids end to end, int32 [n]."""
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def _cut(text: str, tokens: TokenizedText, begin: int, most: int) -> int:
    """Return where a piece of at most `most` tokens from `begin` ends."""
    stop = begin + most
    if len(tokens) <= stop:
        return len(tokens)
    last = int(tokens.starts[stop])
    for marks in (SENTENCE_ENDS, _CLAUSE_ENDS):
        at = max(text.rfind(mark, int(tokens.starts[begin]), last) for mark in marks) + 1
        while 0 < at < last and text[at] in _CLOSING:
            at += 1
        end = int(np.searchsorted(tokens.ends[:stop], at, side="right"))
        if end - begin >= most / 2:  # else too little would be left
            return end
    return stop


def window_starts(length: int, size: int, stride: int | None) -> Iterator[int]:
    """Yield where the windows over a passage begin.

    Parameters
    ----------
    length
        Tokens of the passage.
    size
        Tokens of a window.
    stride
        Tokens that neighbouring windows share; None: one window, the rest is cut off.
    """
    yield 0
    if stride is None:
        return
    start = 0
    while start + size < length:
        start += size - stride
        yield start


def _special_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    token_id = getattr(tokenizer, name)
    if token_id is None:
        raise InputError(f"tokenizer: expected a token for {name}, got none")
    return int(token_id)
