"""Pairs of similar texts from texts without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmrc.similarity import SimilarityModel

__all__ = ["MinedPair", "mine_pairs"]


@dataclass(frozen=True, slots=True)
class MinedPair:
    """Two texts, each of which is nearest to the other, and their cosine."""

    text: str
    synonym: str
    score: float


def mine_pairs(
    texts: Sequence[str], model: SimilarityModel, min_cosine: float, *, progress: bool = False
) -> list[MinedPair]:
    """Find texts that are each other's nearest neighbours.

    Parameters
    ----------
    texts
        Equal ones count once.
    model
        Makes the vectors.
    min_cosine
        Pairs below it are left out.
    progress
        Whether to show progress bars on stderr.

    Returns
    -------
    list of MinedPair
        By falling cosine; the earlier text of a pair comes first in it.

    Notes
    -----
    The post on SimBERT (kexue.fm/archives/7427) trains on similar questions that a search engine
    found; here the model's own vectors do.
    """
    unique = list(dict.fromkeys(texts))
    if len(unique) < 2:
        return []
    vectors = model.encode(unique, progress=progress)
    # A text is not always the first to be found for itself: another may have the same vector.
    ids, scores = model.search(vectors, vectors, 2, progress=progress)
    own = ids[:, 0] == np.arange(len(unique))
    nearest, cosine = np.where(own, ids[:, 1], ids[:, 0]), np.where(own, scores[:, 1], scores[:, 0])
    first = np.arange(len(unique))
    kept = (nearest[nearest] == first) & (first < nearest) & (cosine >= min_cosine)
    order = first[kept][np.argsort(-cosine[kept], kind="stable")]
    return [MinedPair(unique[i], unique[nearest[i]], float(cosine[i])) for i in order.tolist()]
