"""A file of texts that can be searched; its vectors are kept in a folder beside it.

A text is found by the best of its pieces: one vector for all of a long passage says little about
any of its sentences.

``FILE.index/`` holds ``vectors.npy``, float32 [pieces, dimension], ``owners.npy``, int64 [pieces],
the text that each piece is of, and ``index.json``: hashes of the file and of the model that the
vectors belong to, and how many are written. One that belongs to another file or model is made anew;
one that was interrupted is gone on with.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastmrc.corpus import corpus_texts, passage_texts
from fastmrc.data import DataIssue, StrPath
from fastmrc.errors import InputError
from fastmrc.model_files import write_json
from fastmrc.pretrained import SETTINGS_FILE, weight_files
from fastmrc.retrieval import SearchHits, search_vectors
from fastmrc.similarity import SimilarityModel

__all__ = ["PIECE_TOKENS", "CorpusIndex", "index_directory", "open_corpus"]

PIECE_TOKENS = 40
"""Most tokens of a piece, about a sentence: with the packaged model shorter ones found more."""

# Pieces whose vectors are written together: no more are lost by an interruption.
_CHUNK = 1024
_FORMAT = 1
# Pieces that are found for each text asked for, at first.
_PIECES_PER_TEXT = 4


@dataclass(frozen=True, slots=True)
class CorpusIndex:
    """A corpus that can be searched.

    Attributes
    ----------
    texts
        In the order of the file, each once, blank ones left out.
    owners
        int64 [pieces], the text that each piece is of, rising.
    vectors
        float32 [pieces, dimension], memory-mapped where they are kept.
    """

    texts: list[str]
    owners: NDArray[np.int64]
    vectors: NDArray[np.float32]

    def search(self, queries: NDArray[np.float32], k: int) -> SearchHits:
        """Find the `k` texts whose best piece has the largest inner product with each query.

        Parameters
        ----------
        queries
            float32 [n, dimension].
        k
            At least 1; more than there are texts: all of them.

        Returns
        -------
        SearchHits
            ids of texts and scores, [n, min(k, texts)], falling; equal ones by rising id.
        """
        k = min(k, len(self.texts))
        wanted = k
        while True:
            wanted = min(_PIECES_PER_TEXT * wanted, len(self.owners))
            hits = search_vectors(queries, self.vectors, wanted)
            found = [_first_of_each(self.owners[own], k) for own in hits.ids]
            if all(len(places) == k for places in found):
                break
        places = np.array(found, dtype=np.int64).reshape(-1, k)
        ids = self.owners[np.take_along_axis(hits.ids, places, axis=1)]
        return SearchHits(ids, np.take_along_axis(hits.scores, places, axis=1))


def _first_of_each(owners: NDArray[np.int64], k: int) -> list[int]:
    """Return the places of the first `k` different owners."""
    _, places = np.unique(owners, return_index=True)
    first: list[int] = np.sort(places)[:k].tolist()
    return first


def index_directory(path: StrPath) -> Path:
    """Return the folder that keeps the vectors of a file."""
    return Path(os.fspath(path) + ".index")


def open_corpus(
    path: StrPath,
    model: SimilarityModel,
    *,
    keep: bool = True,
    on_error: Callable[[DataIssue], None],
    on_unwritable: Callable[[str], None],
    progress: bool = False,
) -> CorpusIndex:
    """Read the texts of a file and their vectors, which are computed where none are kept.

    Parameters
    ----------
    path
        A text a line, passages in JSON lines, or questions, whose passages count.
    model
        Makes the vectors.
    keep
        Whether the vectors are kept beside the file.
    on_error
        Called with each record that cannot be used.
    on_unwritable
        Called with the reason where the vectors cannot be kept; the search goes on without.
    progress
        Whether to show a progress bar on stderr.

    Raises
    ------
    InputError
        If it holds no text.
    OSError
        If the file cannot be read.
    """
    read = corpus_texts([path], on_error, passage_texts)
    texts = list(dict.fromkeys(text for text in read if text.strip()))
    if not texts:
        raise InputError(f"{os.fspath(path)}: expected texts to search, got none")
    if keep:
        belongs = {
            "format": _FORMAT,
            "corpus": _digest([path]),
            "model": _model_digest(model),
            "pooling": model.pooling,
            "dtype": model.dtype,
            "texts": len(texts),
            "piece_tokens": PIECE_TOKENS,
        }
        directory = index_directory(path)
        try:
            with _locked(directory):
                _complete(directory, belongs, texts, model, progress)
            return CorpusIndex(texts, *_load(directory))
        except OSError as error:
            on_unwritable(f"{directory}: {error.strerror or error}; the vectors are not kept")
    pieces, owners = model.cut(texts, PIECE_TOKENS)
    return CorpusIndex(texts, owners, model.encode(pieces, progress=progress))


def _complete(
    directory: Path,
    belongs: dict[str, Any],
    texts: list[str],
    model: SimilarityModel,
    progress: bool,
) -> None:
    """Compute and write the vectors that are not there yet."""
    done, count = _written(directory, belongs)
    if 0 < done == count:
        return
    pieces, owners = model.cut(texts, PIECE_TOKENS)
    np.save(directory / "owners.npy", owners)
    vectors = np.lib.format.open_memmap(
        directory / "vectors.npy",
        mode="r+" if done else "w+",
        dtype=np.float32,
        shape=(len(pieces), model.dimension),
    )
    with tqdm(total=len(pieces), initial=done, disable=not progress, unit="piece") as bar:
        for begin in range(done, len(pieces), _CHUNK):
            chunk = pieces[begin : begin + _CHUNK]
            vectors[begin : begin + len(chunk)] = model.encode(chunk)
            vectors.flush()
            _note(directory, belongs, begin + len(chunk))
            bar.update(len(chunk))


def _written(directory: Path, belongs: dict[str, Any]) -> tuple[int, int]:
    """Return how many vectors of this file and model are there, and how many there will be."""
    try:
        noted = json.loads(_note_path(directory).read_text(encoding="utf-8"))
        owners, vectors = _load(directory)
    except (OSError, ValueError):
        return 0, 0
    if not isinstance(noted, dict) or {**noted, **belongs} != noted:
        return 0, 0
    done = noted.get("done")
    fits = vectors.ndim == 2 and len(vectors) == len(owners) and vectors.dtype == np.float32
    if not (fits and isinstance(done, int) and 0 < done <= len(vectors)):
        return 0, 0
    return done, len(vectors)


def _load(directory: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.load(directory / "owners.npy"), np.load(directory / "vectors.npy", mmap_mode="r")


def _note(directory: Path, belongs: dict[str, Any], done: int) -> None:
    partial = directory / "index.json.part"
    write_json(partial, belongs | {"done": done})
    partial.replace(_note_path(directory))


def _note_path(directory: Path) -> Path:
    return directory / "index.json"


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Wait until no other process writes the index."""
    directory.mkdir(exist_ok=True)
    with open(directory / ".lock", "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _model_digest(model: SimilarityModel) -> str:
    names = ["config.json", "tokenizer.json", SETTINGS_FILE]
    names += weight_files(model.directory, str(model.directory))
    return _digest([model.directory / name for name in names])


def _digest(paths: list[Any]) -> str:
    """Return one hash of the contents of files; a missing one counts as empty."""
    hashes = hashlib.sha256()
    for path in paths:
        if os.path.exists(path):
            with open(path, "rb") as file:
                hashes.update(hashlib.file_digest(file, "sha256").digest())
    return hashes.hexdigest()
