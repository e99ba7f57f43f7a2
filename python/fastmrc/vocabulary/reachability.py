"""The rule: which tokens no text is ever cut into, found by probing the tokenizer."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from fastmrc.errors import UnsupportedModelError
from fastmrc.vocabulary.reasons import Reason
from fastmrc.vocabulary.wordpieces import WordPieces

__all__ = ["characters_of_words", "unreachable_tokens"]

# Stages that map each character by itself, or cut a text by the kinds of its characters.
_LOCAL_NORMALIZERS = ("BertNormalizer", "Lowercase", "NFD", "NFKD", "Nmt", "Strip", "StripAccents")
_LOCAL_PRE_TOKENIZERS = (
    "BertPreTokenizer",
    "CharDelimiterSplit",
    "Digits",
    "Punctuation",
    "Whitespace",
    "WhitespaceSplit",
)
_COMPOSING_NORMALIZERS = ("NFC", "NFKC")
# Planes 4 to 13 are empty, 15 and 16 private: no normaliser maps their characters to others.
_CODE_POINTS = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))
_LETTER = "a"
_PROBES_AT_ONCE = 64


def unreachable_tokens(pieces: WordPieces) -> dict[str, Reason]:
    """Return the tokens that no text is ever cut into, and why.

    Parameters
    ----------
    pieces
        Tokenizer whose normaliser maps characters one by one and whose words are cut by the
        kinds of their characters, as BERT's are.

    Returns
    -------
    dict
        Added and special tokens may be among them: they are found by other means.

    Raises
    ------
    UnsupportedModelError
        If it has another normaliser or pre-tokenizer.

    Notes
    -----
    A token stands for a piece of a word. One that is a whole word of one character needs that
    character to occur; any other needs all of its characters to occur in words of several. Both
    sets are found by asking normaliser and pre-tokenizer about every code point between letters.
    More may be in them than a text can join, so that in doubt a token stays.

    Dropping such tokens changes no text. Cutting takes the longest match at each place of a word,
    and whatever matches there, even if the word turns out to be unknown, is a piece of a word and
    hence stays; no token comes that could match instead.
    """
    _check_locality(pieces.parts)
    alphabet = set(chain.from_iterable(pieces.vocabulary))
    single, joined = characters_of_words(pieces, alphabet)
    reasons: dict[str, Reason] = {}
    for token in pieces.vocabulary:
        # Without a pre-tokenizer that cuts off "#", a word may itself begin with "##".
        as_word = set(token) <= (joined if len(token) > 1 else single)
        inside = token.startswith(pieces.prefix)
        body = token.removeprefix(pieces.prefix) if inside else token
        if as_word or (inside and body and set(body) <= joined):
            continue
        reasons[token] = _reason(body, single, joined)
    return reasons


def _reason(body: str, single: set[str], joined: set[str]) -> Reason:
    if not set(body) <= single:
        return "never_in_text"
    alone = set(body) - joined
    chinese = any(unicodedata.name(c, "").startswith("CJK ") for c in alone)
    return "chinese_stands_alone" if chinese else "other_stands_alone"


def _check_locality(parts: Mapping[str, Any]) -> None:
    for place, stage in enumerate(_stages(parts["normalizer"], "normalizers")):
        kind = stage["type"]
        one_character = kind == "Replace" and len(stage["pattern"].get("String", "")) == 1
        # What composing makes of several characters is a character that it leaves alone, but
        # only as the first stage does it see that character in a text as well.
        composing = kind in _COMPOSING_NORMALIZERS and place == 0
        if not (kind in _LOCAL_NORMALIZERS or one_character or composing):
            _refuse_stage("normalizer", kind)
    for stage in _stages(parts["pre_tokenizer"], "pretokenizers"):
        if stage["type"] not in _LOCAL_PRE_TOKENIZERS:
            _refuse_stage("pre_tokenizer", stage["type"])


def _stages(part: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for stage in part[key]:
            yield from _stages(stage, key)
    else:
        yield part


def _refuse_stage(part: str, kind: str) -> None:
    raise UnsupportedModelError(
        f"rule: 'simplified' cannot tell what a tokenizer with the {part} {kind} makes of every "
        "text; a corpus can be used instead"
    )


def characters_of_words(pieces: WordPieces, alphabet: set[str]) -> tuple[set[str], set[str]]:
    """Return the characters that occur in words, and in words of more than one.

    Parameters
    ----------
    pieces
        Tokenizer; its normaliser and pre-tokenizer are asked about every code point.
    alphabet
        Characters that matter; more may be in the result.

    Returns
    -------
    tuple of set
        Characters of all words, and of those of several characters.
    """
    single: set[str] = set()
    joined: set[str] = set()
    for word in chain.from_iterable(map(pieces.words, _probes(pieces, alphabet))):
        single.update(word)
        if len(word) > 1:
            joined.update(word)
    return single, joined


def _probes(pieces: WordPieces, alphabet: set[str]) -> Iterator[str]:
    """Yield texts that show what becomes of every character, if it may become one of `alphabet`."""

    # Twice, as some characters join only their own kind.
    def probe(character: str) -> str:
        return _LETTER + character + character + _LETTER

    named = json.dumps(pieces.parts["normalizer"], ensure_ascii=False)
    listed = alphabet.union(named, _LETTER)
    yield from map(probe, listed)
    others = (probe(chr(code)) for code in chain(*_CODE_POINTS) if chr(code) not in listed)
    while probes := list(islice(others, _PROBES_AT_ONCE)):
        found = set(pieces.normalize("".join(probes))) - {_LETTER}
        if not found.isdisjoint(alphabet):
            yield from probes
