"""Cloze questions made from plain texts by the rule of CMRC 2017.

A noun-like word that occurs at least twice is removed once (Cui et al., "Dataset for the First
Evaluation on Chinese Machine Reading Comprehension", 2018).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fastmrc.cloze.documents import BLANK, ClozeDocument, cut_text
from fastmrc.cloze.words import is_noun_like
from fastmrc.errors import InputError

__all__ = ["draw_blanks", "draw_questions"]


def draw_blanks(
    words: Sequence[str],
    count: int,
    rng: np.random.Generator,
    *,
    taken: Mapping[int, str] | None = None,
    distance: int = 1,
) -> dict[int, str]:
    """Draw positions whose words may be asked for, each by a blank of its own.

    Occurrences are equally likely, so frequent words are asked for more often. Each word asked for
    stays in the text at least once.

    Parameters
    ----------
    words
        Of the text.
    count
        Blanks wanted, `taken` included.
    rng
        Source of the draws.
    taken
        Blanks that are there already, with their answers.
    distance
        Least number of words from one blank to the next.

    Returns
    -------
    dict
        Answers by position, at most `count`; the blanks `taken` whose word is left among them.
    """
    left = Counter(word for i, word in enumerate(words) if word != BLANK)
    blanks = {i: word for i, word in (taken or {}).items() if left[word]}
    places = [i for i, word in enumerate(words) if left[word] > 1 and is_noun_like(word)]
    for i in rng.permutation(places).tolist():
        if len(blanks) >= count:
            break
        word = words[i]
        if left[word] < 2 or any(abs(i - other) < distance for other in blanks):
            continue
        left[word] -= 1
        blanks[i] = word
    return blanks


def draw_questions(
    texts: Sequence[str | Sequence[str]], *, per_text: int = 1, seed: int = 0
) -> Iterator[ClozeDocument]:
    """Make questions with one blank each.

    Parameters
    ----------
    texts
        Texts, which are cut into words, or sequences of words.
    per_text
        Questions wanted of each; fewer where fewer words occur twice.
    seed
        Of the draws.

    Yields
    ------
    ClozeDocument
        With ids ``text_n``, `text` and `n` counted from 0, and answers.

    Raises
    ------
    InputError
        If `per_text` is below 1.
    """
    if per_text < 1:
        raise InputError(f"per_text: expected at least 1, got {per_text}")
    for number, text in enumerate(texts):
        words = list(cut_text(text)) if isinstance(text, str) else list(text)
        rng = np.random.default_rng([seed, number])
        drawn = sorted(draw_blanks(words, per_text, rng).items())
        for n, (i, answer) in enumerate(drawn):
            blanked = (*words[:i], BLANK, *words[i + 1 :])
            yield ClozeDocument(f"{number}_{n}", blanked, answer)
