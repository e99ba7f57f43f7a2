"""The cloze reader: a word of the document for each blank in it.

Words are cut by jieba and vectors are learned by gensim (extra ``cloze``); segmented documents and
trained models need neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastmrc.cloze.documents import BLANK, ClozeDocument, read_cloze, read_cloze_answers
from fastmrc.cloze.questions import draw_questions

if TYPE_CHECKING:
    from fastmrc.cloze.reader import BlankAnswer, ClozeAnswer, ClozeReader, RankedWord

__all__ = [
    "BLANK",
    "BlankAnswer",
    "ClozeAnswer",
    "ClozeDocument",
    "ClozeReader",
    "RankedWord",
    "draw_questions",
    "read_cloze",
    "read_cloze_answers",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fastmrc.cloze import reader

        return getattr(reader, name)
    raise AttributeError(f"module 'fastmrc.cloze' has no attribute {name!r}")
