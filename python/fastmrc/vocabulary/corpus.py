"""Texts of a corpus cut into tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fastmrc.corpus import corpus_texts
from fastmrc.data import DataIssue, OnError, StrPath
from fastmrc.errors import InputError
from fastmrc.pretrained import LoadedModel
from fastmrc.text import TextCodec
from fastmrc.vocabulary.wordpieces import WordPieces

__all__ = [
    "CorpusCount",
    "Cut",
    "Cutter",
    "corpus_batches",
    "cut_corpus",
]

_BATCH = 256


@dataclass(frozen=True, slots=True)
class Cut:
    """A text, its token ids, and the characters [start, end) of each."""

    text: str
    ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]


@dataclass(slots=True)
class CorpusCount:
    """What was found in a corpus: texts, their tokens, and records that could not be used."""

    texts: int = 0
    tokens: int = 0
    skipped: int = 0


class Cutter:
    """Cuts texts in each way that fastmrc and other programs do with one tokenizer.

    Parameters
    ----------
    loaded
        Model whose tokenizer and normalization are used.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        names = dict.fromkeys(("none", loaded.normalization))
        self._codecs = [TextCodec(loaded.tokenizer, name) for name in names]
        # Here a text that looks like a special token is one.
        self._plain = WordPieces.of(loaded).backend

    def cut(self, texts: Sequence[str]) -> Iterator[list[Cut]]:
        """Yield the texts as cut in each way."""
        for codec in self._codecs:
            tokenized = codec.encode_passages(texts)
            yield [
                Cut(text, t.token_ids, t.starts, t.ends)
                for text, t in zip(texts, tokenized, strict=True)
            ]
        yield [
            Cut(text, np.array(e.ids, dtype=np.int32), *_offsets(e.offsets))
            for text, e in zip(
                texts, self._plain.encode_batch(texts, add_special_tokens=False), strict=True
            )
        ]


def _offsets(pairs: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    offsets = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return offsets[:, 0], offsets[:, 1]


def cut_corpus(
    full: LoadedModel, corpus: Sequence[StrPath], count: CorpusCount, on_error: OnError | None
) -> Iterator[Cut]:
    """Read a corpus and cut its texts in each way.

    Parameters
    ----------
    full
        Model whose tokenizer cuts.
    corpus
        Files, as `corpus_texts` takes them.
    count
        Counts up while the result is consumed; its tokens are those of fastmrc without
        normalization.
    on_error
        Called with each record that cannot be used, if not None.

    Yields
    ------
    Cut
        One for each text and way.

    Raises
    ------
    InputError
        If the corpus holds no text.
    OSError
        If a file cannot be read.
    """

    def skip(issue: DataIssue) -> None:
        count.skipped += 1
        if on_error is not None:
            on_error(issue)

    cutter = Cutter(full)
    for texts in corpus_batches(corpus, skip):
        count.texts += len(texts)
        for i, cuts in enumerate(cutter.cut(texts)):
            if i == 0:
                count.tokens += sum(len(cut.ids) for cut in cuts)
            yield from cuts
    if not count.tokens:
        files = ", ".join(f"'{path}'" for path in corpus)
        raise InputError(f"corpus: expected texts, got none that can be used in {files}")


def corpus_batches(corpus: Sequence[StrPath], on_error: OnError) -> Iterator[list[str]]:
    """Yield the texts of a corpus as `corpus_texts` does, in lists of a fair size for `Cutter`."""
    texts = corpus_texts(corpus, on_error)
    while batch := list(islice(texts, _BATCH)):
        yield batch
