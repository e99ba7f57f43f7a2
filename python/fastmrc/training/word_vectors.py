"""Word vectors for the cloze reader's BiLSTM: skip-gram with negative sampling, by gensim."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError

__all__ = ["learn_vectors"]

_EPOCHS = 10


def learn_vectors(
    texts: Sequence[Sequence[str]], dimension: int, *, min_count: int = 2, seed: int = 0
) -> tuple[list[str], NDArray[np.float32]]:
    """Learn vectors of the words of texts.

    Mikolov et al., "Distributed Representations of Words and Phrases and their Compositionality",
    2013. On one thread, so that a seed gives the same vectors.

    Parameters
    ----------
    texts
        In words.
    dimension
        Of a vector.
    min_count
        Words that occur less often share one vector.
    seed
        Of what is drawn.

    Returns
    -------
    words, vectors
        The words, most frequent first, and float32 [len(words) + 1, dimension]: the mean of all
        vectors, for words that are not known, and theirs.

    Raises
    ------
    InputError
        If no word occurs `min_count` times.
    """
    from gensim.models import Word2Vec

    model = Word2Vec(
        vector_size=dimension, sg=1, min_count=min_count, seed=seed, workers=1, epochs=_EPOCHS
    )
    sentences = [list(text) for text in texts]
    model.build_vocab(sentences)
    if not len(model.wv):
        raise InputError(f"data: expected words that occur {min_count} times, got none")
    model.train(sentences, total_examples=len(sentences), epochs=_EPOCHS)
    known: NDArray[np.float32] = model.wv.vectors.astype(np.float32)
    return list(model.wv.index_to_key), np.concatenate([known.mean(axis=0)[None], known])
