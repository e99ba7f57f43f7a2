"""Words of texts: cut by jieba, and which of them a cloze question may ask for."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from fastmrc.errors import InputError

__all__ = ["cut_words", "is_noun_like", "is_word"]

_CHINESE = re.compile("[\u4e00-\u9fff]{2,}\\Z")


def cut_words(text: str) -> list[str]:
    """Return the words of a text, white space left out.

    Raises
    ------
    InputError
        If jieba is not installed.
    """
    return [word for word in _jieba().cut(text) if word.strip()]


@functools.lru_cache(maxsize=65536)
def is_noun_like(word: str) -> bool:
    """Return whether the dictionary of jieba has a word as a noun or name, or, of two or more
    Chinese characters, not at all: names that it does not know."""
    tag = _jieba().posseg.dt.word_tag_tab.get(word)
    return bool(_CHINESE.match(word)) if tag is None else str(tag).startswith("n")


def is_word(word: str) -> bool:
    """Return whether a word holds a letter or digit, and so may be an answer."""
    return any(character.isalnum() for character in word)


@functools.cache
def _jieba() -> Any:
    try:
        import jieba
        import jieba.posseg
    except ImportError:
        raise InputError(
            "texts are cut into words by the package jieba: pip install 'fastmrc[cloze]', or give "
            "a sequence of words"
        ) from None
    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    jieba.posseg.dt.initialize()
    return jieba
