"""Spans of texts as constraints, and where an output stands: `fastmrc.SpanIndex.from_text`.

A text is walked and searched as its tokenizer sees it: normalised, each character with the place it
has in the caller's text. What a token stands for, three kinds of tokenizers tell:

byte level
    Bytes, under the names that GPT-2 gave them. The text is the normalised passage.
Metaspace
    SentencePiece, BPE or Unigram: characters, ``▁`` for a space. The text is what the pre-tokenizer
    makes of the passage.
WordPiece
    Characters; ``##x`` goes on with a word, ``x`` begins one. The text is the words that the
    pre-tokenizer finds, with a space between them.

Where a tokenizer puts a space before every text, one space at the beginning stands for nothing.
"""

from __future__ import annotations

import json
import re
import unicodedata
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import PreTokenizedString, Regex
from tokenizers.pre_tokenizers import Split

from fastmrc import _C
from fastmrc.constraints import Automaton, SpanIndex, int_vector
from fastmrc.errors import InputError
from fastmrc.text import TextCodec
from fastmrc.types import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["NormalizedText", "Spelling", "TextSpanIndex", "TokenSpanIndex", "spelling_of"]

Kind = Literal["byte level", "Metaspace", "WordPiece"]
Parts = dict[str, Any]
T = TypeVar("T")

_SUPPORTED = "byte-level BPE, SentencePiece (Metaspace) BPE or Unigram, WordPiece"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CHARACTERS = Split(Regex("(?m)."), "isolated")  # (?m): Oniguruma's dot takes line ends, too
# Whose token, if it is that for unknown text, too, ends outputs and stands for no text.
_ROLES = ("bos", "eos", "sep", "pad", "cls", "mask")


def _bytes_by_name() -> dict[str, int]:
    """Return the byte of each character of the byte-level alphabet.

    That of GPT-2 (``bytes_to_unicode`` in its encoder.py): bytes that Latin-1 shows have the name
    it gives them, the others, in order, the characters from 256 on.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    names = {chr(byte): byte for byte in shown}
    return names | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _bytes_by_name()


@dataclass(frozen=True, slots=True)
class NormalizedText:
    """A text as its tokens spell it.

    Attributes
    ----------
    text
        The normalised characters.
    starts, ends
        int32, one per character: the half-open range it stands for in the caller's text.
    """

    text: str
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]

    def find(self, piece: str) -> Iterator[tuple[int, int]]:
        """Yield the ranges of all occurrences in the caller's text; overlapping ones count."""
        at = self.text.find(piece) if piece else -1
        while at >= 0:
            yield int(self.starts[at]), int(self.ends[at + len(piece) - 1])
            at = self.text.find(piece, at + 1)


class Spelling:
    """How a tokenizer sees a text, and what its tokens stand for.

    Reads the tokenizer once and keeps no reference to it.

    Parameters
    ----------
    tokenizer
        A fast tokenizer; of any kind, but only those of the kinds above spell.

    Attributes
    ----------
    kind
        None if what the tokens stand for is not known.
    unknown
        Id of the token that stands for any text; None if there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend: Any = tokenizer.backend_tokenizer
        parts: Parts = json.loads(backend.to_str())
        self._normalizer: Any = backend.normalizer
        self._pre_tokenizer: Any = backend.pre_tokenizer
        model, steps = parts["model"], _flat(parts["decoder"])
        types = [step["type"] for step in steps]
        self.kind = _kind(model, steps)
        self._described = f"a model {model['type']} with decoder {' + '.join(types) or 'none'}"
        self._prefix: str = model.get("continuing_subword_prefix") or ""
        self._space = _space(steps)
        self._adds_space = self.kind in ("byte level", "Metaspace") and _adds_space(parts)
        self._byte_tokens = "ByteFallback" in types
        # This decoder drops all spaces of the first token: "▁a▁b" would be "ab".
        self._drops_spaces = "Metaspace" in types and self._adds_space
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.unknown = _unknown_id(model, tokenizer, self._vocabulary)
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        self._special = special.union(tokenizer.all_special_ids)

    def read(self, name: str, text: str) -> NormalizedText:
        """Return a text as tokens spell it; InputError that calls it `name` if it is no text."""
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate
            raise InputError(f"{name}: expected text that UTF-8 can encode") from error
        if self.kind == "byte level":
            return self._read_characters(text)
        return self._read_metaspace(text) if self.kind == "Metaspace" else self._read_words(text)

    def read_output(self, text: str) -> str:
        """Return the text of an output as tokens spell it in a passage."""
        piece = self.read("output", text).text
        return piece.removeprefix(" ") if self._adds_space else piece

    def _read_characters(self, text: str) -> NormalizedText:
        if self._normalizer is None or self._normalizer.normalize_str(text) == text:
            places = np.arange(len(text) + 1, dtype=np.int32)
            return NormalizedText(text, places[:-1], places[1:])
        return _to_text(text, _splits(self._normalized(text), _CHARACTERS))

    def _read_metaspace(self, text: str) -> NormalizedText:
        pieces = self._normalized(text)
        if self._pre_tokenizer is not None:
            self._pre_tokenizer.pre_tokenize(pieces)
        read = _to_text(text, _splits(pieces, _CHARACTERS))
        spelt = read.text.replace(self._space, " ")
        is_space = np.array([character == " " for character in spelt], dtype=np.bool_)
        starts, ends, added = _place_spaces(is_space, read.starts, read.ends)
        first = int(self._adds_space and 0 in added)
        return NormalizedText(spelt[first:], starts[first:], ends[first:])

    def _read_words(self, text: str) -> NormalizedText:
        pieces = self._normalized(text)
        words = [word for word, _, _ in _splits(pieces, self._pre_tokenizer)]
        read = _to_text(text, _splits(pieces, _CHARACTERS))
        # Spaces stand for what lies between the words.
        at = np.cumsum([len(word) for word in words], dtype=np.int64)[:-1]
        starts = np.insert(read.starts, at, read.ends[at - 1])
        ends = np.insert(read.ends, at, read.starts[at])
        return NormalizedText(" ".join(words), starts, ends)

    def _normalized(self, text: str) -> PreTokenizedString:
        pieces = PreTokenizedString(text)
        if self._normalizer is not None:
            pieces.normalize(self._normalizer.normalize)
        return pieces

    def output_ids(self, output: Sequence[int] | NDArray[np.integer]) -> list[int]:
        """Return the tokens of an output without the special ones before and after the text."""
        values = output.tolist() if hasattr(output, "tolist") else output  # also from a GPU
        ids: list[int] = int_vector("output", values).tolist()
        ignored = self._special - {self.unknown}
        kept = [i for i, token in enumerate(ids) if token not in ignored]
        return ids[kept[0] : kept[-1] + 1] if kept else []

    def spell(self, ids: Sequence[int]) -> str | None:
        """Return the text of tokens as a passage has it; None if they are not those of a text."""
        first, following = self._bytes
        spelt = [first.get(token) for token in ids[:1]] + [following.get(t) for t in ids[1:]]
        known = [part for part in spelt if part is not None]
        try:
            return b"".join(known).decode() if len(known) == len(spelt) else None
        except UnicodeDecodeError:  # begins or ends inside a character
            return None

    @cached_property
    def spaces(self) -> NDArray[np.int32]:
        """Ids of the tokens that stand for spaces only, if the tokenizer puts some in."""
        if not self._adds_space:
            return np.zeros(0, np.int32)
        spaces = [token for token, text in self._bytes[1].items() if text and not text.strip(b" ")]
        return np.array(spaces, np.int32)

    @cached_property
    def native(self) -> tuple[_C.TokenSpellings, _C.TokenSpellings]:
        """What the first token of an output stands for and what the others do.

        Raises
        ------
        InputError
            If the tokenizer is of another kind.
        """
        first, following = self._bytes
        return _to_native(first), _to_native({i: text for i, text in following.items() if text})

    @cached_property
    def _bytes(self) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """The bytes of each token that is text, as the first of an output and after another."""
        if self.kind is None:
            raise InputError(
                f"tokenizer: expected one of these kinds for unit='text': {_SUPPORTED}; "
                f"got {self._described}"
            )
        first: dict[int, bytes] = {}
        following: dict[int, bytes] = {}
        no_text = self._special | {self.unknown}
        for token, token_id in self._vocabulary.items():
            if token_id in no_text:
                continue
            begin, later = self._spell_token(token)
            if begin is not None:
                first[token_id] = begin
            following[token_id] = later
        return first, following

    def _spell_token(self, token: str) -> tuple[bytes | None, bytes]:
        """Return the bytes of a token as the first, None if it cannot be, and after another."""
        if self.kind == "WordPiece":
            if token.startswith(self._prefix):
                return None, token.removeprefix(self._prefix).encode()
            return token.encode(), b" " + token.encode()
        text = self._spell_bytes(token) if self.kind == "byte level" else self._spell_piece(token)
        if self._drops_spaces and self._space in token[1:]:
            return None, text
        return text.removeprefix(b" ") if self._adds_space else text, text

    def _spell_bytes(self, token: str) -> bytes:
        # As the decoder does it: a token with a character that names no byte is text as it is.
        if all(character in _BYTES for character in token):
            return bytes(map(_BYTES.__getitem__, token))
        return token.encode()

    def _spell_piece(self, token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_tokens else None
        return token.replace(self._space, " ").encode() if byte is None else bytes.fromhex(byte[1])


def _unknown_id(
    model: Parts, tokenizer: PreTrainedTokenizerFast, vocabulary: Mapping[str, int]
) -> int | None:
    token, token_id = model.get("unk_token"), model.get("unk_id")
    if token is not None:
        token_id = vocabulary.get(token)
    others = {getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    return None if token_id in others else token_id


def _kind(model: Parts, decoder: list[Parts]) -> Kind | None:
    types = {step["type"] for step in decoder}
    if model["type"] == "WordPiece":
        return "WordPiece" if model["continuing_subword_prefix"] else None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if "ByteLevel" in types and types <= {"ByteLevel", "Fuse"}:
        return "byte level"
    if _space(decoder) and types <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        return "Metaspace"
    return None


def _flat(part: Parts | None) -> list[Parts]:
    """Return the steps of a normalizer, pre-tokenizer or decoder."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    steps = next(value for value in part.values() if isinstance(value, list))
    return [step for each in steps for step in _flat(each)]


def _space(decoder: list[Parts]) -> str:
    """Return what a decoder turns into a space; empty if nothing."""
    for step in decoder:
        if step["type"] == "Metaspace":
            return str(step["replacement"])
        if step["type"] == "Replace" and step["content"] == " ":
            return str(step["pattern"].get("String", ""))
    return ""


def _adds_space(parts: Parts) -> bool:
    """Tell whether the tokenizer puts a space before a text, or its decoder takes one away."""
    steps = _flat(parts["normalizer"]) + _flat(parts["pre_tokenizer"])
    decoding = [s for s in _flat(parts["decoder"]) if s["type"] in ("Metaspace", "Strip")]
    return any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        or (step["type"] == "ByteLevel" and step["add_prefix_space"])
        or (step["type"] == "Strip" and step.get("content") == " " and step["start"] > 0)
        for step in steps + decoding
    )


def _splits(pieces: PreTokenizedString, cutter: Any) -> list[tuple[str, tuple[int, int], Any]]:
    """Cut a text further; return its pieces and their places in the text before normalization."""
    if cutter is not None:
        cutter.pre_tokenize(pieces)
    return pieces.get_splits(offset_referential="original", offset_type="char")


def _to_text(text: str, characters: list[tuple[str, tuple[int, int], Any]]) -> NormalizedText:
    places = np.array([place for _, place, _ in characters], dtype=np.int32).reshape(-1, 2)
    starts, ends = places[:, 0].copy(), places[:, 1].copy()
    limits = np.append(starts[1:], np.int32(len(text)))
    # Accents that the tokenizer drops belong to the character before them.
    for i in np.flatnonzero(ends < limits).tolist():
        while ends[i] < limits[i] and unicodedata.category(text[ends[i]]) in ("Mn", "Me"):
            ends[i] += 1
    return NormalizedText("".join([character for character, _, _ in characters]), starts, ends)


def _place_spaces(
    is_space: NDArray[np.bool_], starts: NDArray[np.int32], ends: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.intp]]:
    """Give spaces that the tokenizer put in the place between their neighbours.

    It says that they stand for the character after them.

    Returns
    -------
    starts, ends, added
        The new places, and which of the items are such spaces.
    """
    starts, ends = starts.copy(), ends.copy()
    added = np.flatnonzero(is_space[:-1] & (starts[:-1] == starts[1:]))
    ends[added] = starts[added]
    starts[added] = np.where(added > 0, ends[added - 1], 0)
    return starts, ends, added


def _flatten(texts: Iterable[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    parts = list(texts)
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return np.frombuffer(bytearray().join(parts), dtype=np.uint8), offsets


def _to_native(spelt: Mapping[int, bytes]) -> _C.TokenSpellings:
    ids = sorted(spelt)
    return _C.TokenSpellings(np.array(ids, np.int32), *_flatten(spelt[i] for i in ids))


class _Cache(Generic[T]):
    """What was made of each tokenizer, as long as that lives and has the same tokens."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._made: weakref.WeakKeyDictionary[Any, tuple[object, T]] = weakref.WeakKeyDictionary()

    def __call__(self, tokenizer: PreTrainedTokenizerFast) -> T:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise TypeError(
                f"tokenizer: expected a fast tokenizer of transformers, "
                f"got {type(tokenizer).__name__}"
            )
        state = len(tokenizer), tuple(tokenizer.all_special_ids)
        known = self._made.get(tokenizer)
        if known is None or known[0] != state:
            known = self._made[tokenizer] = state, self._make(tokenizer)
        return known[1]


spelling_of = _Cache(Spelling)


def _make_codec(tokenizer: PreTrainedTokenizerFast) -> TextCodec:
    # A proxy, as a cache that keeps its keys alive would never forget them.
    return TextCodec(cast("PreTrainedTokenizerFast", weakref.proxy(tokenizer)), "none")


_codec_of = _Cache(_make_codec)


def _checked_passages(passages: Sequence[str]) -> list[str]:
    if isinstance(passages, str) or not isinstance(passages, Iterable):
        raise TypeError(f"passages: expected a list of strings, got {type(passages).__name__}")
    checked = list(passages)
    for p, passage in enumerate(checked):
        if not isinstance(passage, str):
            raise TypeError(f"passages[{p}]: expected a string, got {type(passage).__name__}")
    return checked


class _Citations:
    """Passages, searched for the text of an output."""

    def __init__(self, passages: list[str], spelling: Spelling) -> None:
        self._passages = passages
        self._spelling = spelling

    @cached_property
    def texts(self) -> list[NormalizedText]:
        """The passages as tokens spell them."""
        return [
            self._spelling.read(f"passages[{p}]", passage)
            for p, passage in enumerate(self._passages)
        ]

    def find(self, piece: str) -> list[Span]:
        """Return all occurrences of a text that is spelt as `texts` are."""
        return self.spans(
            (p, start, end) for p, text in enumerate(self.texts) for start, end in text.find(piece)
        )

    def spans(self, found: Iterable[tuple[int, int, int]]) -> list[Span]:
        """Return spans in order, once each, without white space at their ends."""
        spans = {
            (p, start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip()))
            for p, start, end in found
            for text in [self._passages[p][start:end]]
        }
        return [Span(*span) for span in sorted(spans) if span[1] < span[2]]

    def cut(self, span: Span) -> str:
        """Return the characters of a span."""
        return self._passages[span.passage][span.start : span.end]


class TextSpanIndex(Automaton):
    """Every tokenisation of every piece of some passages: ``SpanIndex.from_text(unit="text")``.

    A piece begins and ends at any character, also inside the tokens that the tokenizer would make
    of the passage, and lies within one passage. Special tokens are never admitted. A state inside a
    character (bytes) is not final, all others are.

    Parameters
    ----------
    passages, tokenizer
        As for `fastmrc.SpanIndex.from_text`.
    """

    _native: _C.TextIndex

    def __init__(self, passages: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> None:
        self._spelling = spelling_of(tokenizer)
        self._citations = _Citations(_checked_passages(passages), self._spelling)
        first, following = self._spelling.native
        texts = (text.text.encode() for text in self._citations.texts)
        self._native = _C.TextIndex(*_flatten(texts), first, following)

    def locate(self, output: str | Sequence[int] | NDArray[np.integer]) -> list[Span]:
        """Find where an output stands in the passages.

        Parameters
        ----------
        output
            Its token ids, of which special ones before and after the text are ignored; or its text,
            without special tokens.

        Returns
        -------
        list of fastmrc.Span
            All occurrences in order, as characters of the caller's passages, without white space at
            their ends; overlapping ones count. Empty for an output without text and for one that is
            no piece of a passage.
        """
        if isinstance(output, str):
            return self._citations.find(self._spelling.read_output(output))
        piece = self._spelling.spell(self._spelling.output_ids(output))
        return [] if piece is None else self._citations.find(piece)


class TokenSpanIndex(SpanIndex):
    """The pieces of some texts, in the tokens that the tokenizer makes of those:
    ``SpanIndex.from_text(unit="token")``.

    Parameters
    ----------
    passages, tokenizer
        As for `fastmrc.SpanIndex.from_text`.
    """

    def __init__(self, passages: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> None:
        self._spelling = spelling_of(tokenizer)
        checked = _checked_passages(passages)
        self._citations = _Citations(checked, self._spelling)
        tokens = _codec_of(tokenizer).encode_passages(checked)
        super().__init__([text.token_ids for text in tokens])
        self._places = [
            _place_spaces(np.isin(text.token_ids, self._spelling.spaces), text.starts, text.ends)
            for text in tokens
        ]

    def locate(self, output: str | Sequence[int] | NDArray[np.integer]) -> list[Span]:
        """Find where an output stands in the passages.

        Parameters
        ----------
        output
            Its token ids, of which special ones before and after the text are ignored, to be found
            as they are; or its text, without special tokens, to be found wherever it stands.

        Returns
        -------
        list of fastmrc.Span
            As `TextSpanIndex.locate`. The token for unknown text stands for what it stands for in
            the first occurrence.
        """
        if isinstance(output, str):
            return self._citations.find(self._spelling.read_output(output))
        ids = self._spelling.output_ids(output)
        spans = self._citations.spans(
            (p, int(self._places[p][0][i]), int(self._places[p][1][i + len(ids) - 1]))
            for p, i in self.occurrences(ids).tolist()
        )
        if self._spelling.unknown not in ids:
            return spans
        return [s for s in spans if self._citations.cut(s) == self._citations.cut(spans[0])]
