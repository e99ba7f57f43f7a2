"""Documents that share words with a question: passages that look like an answer and hold none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["NearDocuments"]

IntArray = NDArray[np.int32]


class NearDocuments:
    """Documents ranked for a question by BM25 over single tokens and neighbouring pairs.

    Pairs stand for words where a token is a character.

    Parameters
    ----------
    documents
        Token ids of each, int32 [n].
    """

    def __init__(self, documents: Sequence[IntArray]) -> None:
        import bm25s  # of the extra `train`

        self._index = bm25s.BM25()
        self._index.index([_terms(tokens) for tokens in documents], show_progress=False)

    def nearest(self, question: IntArray, count: int) -> IntArray:
        """Return the numbers of up to `count` documents that share a term with the question.

        Best first, ties by number; int32 [n].
        """
        terms = _terms(question)
        if not terms:  # bm25s takes no empty question
            return np.zeros(0, dtype=np.int32)
        scores: NDArray[np.float32] = self._index.get_scores(terms)
        order = np.argsort(-scores, kind="stable")[:count]
        return order[scores[order] > 0].astype(np.int32)


def _terms(tokens: IntArray) -> list[str]:
    single = [str(token) for token in tokens.tolist()]
    pairs = zip(single, single[1:], strict=False)
    return single + [f"{first} {second}" for first, second in pairs]
