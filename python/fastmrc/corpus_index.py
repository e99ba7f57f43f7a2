"""A file of texts that can be searched; its vectors are kept in a folder beside it.

A text is found by the best of its pieces: one vector for all of a long passage says little about
any of its sentences.

``FILE.index/`` holds for each model two files, named by hashes of the texts and of the model:
``NAME.vectors``, float32 [pieces, dimension], and ``NAME.owners``, int64 [pieces], the text that
each piece is of, both without a header. ``NAME.part`` holds the vectors until they are complete;
after an interruption they are gone on with. What belongs to other texts is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastmrc.corpus import corpus_texts, searched_texts
from fastmrc.data import DataIssue, StrPath
from fastmrc.errors import InputError
from fastmrc.retrieval import SearchHits, search_vectors
from fastmrc.similarity import SimilarityModel

__all__ = ["PIECE_TOKENS", "CorpusIndex", "index_directory", "open_corpus"]

PIECE_TOKENS = 40
"""Most tokens of a piece, about a sentence: with the packaged model shorter ones found more."""

# Pieces whose vectors are written together: no more are lost by an interruption.
_CHUNK = 1024
# Characters of a hash in a file's name.
_NAME = 16
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
            if wanted == len(self.owners) or all(len(places) == k for places in found):
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
    say: Callable[[str], None],
    progress: bool = False,
) -> CorpusIndex:
    """Read the texts of a file and their vectors, which are computed where none are kept.

    Parameters
    ----------
    path
        A text a line, passages in JSON lines, questions, whose passages count, or pairs.
    model
        Makes the vectors.
    keep
        Whether the vectors are kept beside the file.
    on_error
        Called with each record that cannot be used.
    say
        Called with the reason where the vectors cannot be kept, and the search goes on without; and
        before waiting for another process that writes them.
    progress
        Whether to show a progress bar on stderr.

    Raises
    ------
    InputError
        If it holds no text.
    OSError
        If the file cannot be read.
    """
    read = corpus_texts([path], on_error, searched_texts)
    texts = list(dict.fromkeys(text for text in read if text.strip()))
    if not texts:
        raise InputError(f"{os.fspath(path)}: expected texts to search, got none")
    if keep:
        files = _Files(index_directory(path), texts, model)
        try:
            if files.load() is None:
                with files.locked(say):
                    files.complete(texts, model, progress)
            loaded = files.load()
            if loaded is not None:
                return CorpusIndex(texts, *loaded)
        except OSError as error:
            say(f"{files.directory}: {error.strerror or error}; the vectors are not kept")
    pieces, owners = model.cut(texts, PIECE_TOKENS)
    return CorpusIndex(texts, owners, model.encode(pieces, progress=progress))


class _Files:
    """The files that keep the vectors of some texts by one model.

    Their names say what they belong to, so a file is right or it is not there: what others have
    mapped is never written to.
    """

    def __init__(self, directory: Path, texts: list[str], model: SimilarityModel) -> None:
        self.directory = directory
        self._texts = _hash(texts)
        name = f"{self._texts}-{_hash([model.fingerprint(), str(PIECE_TOKENS)])}"
        self._vectors = directory / f"{name}.vectors"
        self._owners = directory / f"{name}.owners"
        self._part = directory / f"{name}.part"
        self._lock = directory / f"{name}.lock"
        self._count, self._dimension = len(texts), model.dimension

    def load(self) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Return owners and vectors; None if they are not there, or damaged."""
        try:
            owners = np.fromfile(self._owners, dtype=np.int64)
            pieces, left = divmod(os.path.getsize(self._vectors), 4 * self._dimension)
        except OSError:
            return None
        if left or pieces == 0 or owners.shape != (pieces,):
            return None
        steps = np.diff(owners, prepend=-1)
        if steps[0] != 1 or not np.isin(steps, (0, 1)).all() or owners[-1] != self._count - 1:
            return None
        shape = (pieces, self._dimension)
        return owners, np.memmap(self._vectors, dtype=np.float32, mode="r", shape=shape)

    def complete(self, texts: list[str], model: SimilarityModel, progress: bool) -> None:
        """Compute and write the vectors that are not there yet."""
        if self.load() is not None:  # another process wrote them in the meantime
            return
        self._remove_others()
        pieces, owners = model.cut(texts, PIECE_TOKENS)
        self._owners.write_bytes(owners.tobytes())
        row = 4 * self._dimension
        with open(self._part, "ab") as file:
            done = min(file.tell() // row, len(pieces))
            file.truncate(done * row)
            with tqdm(total=len(pieces), initial=done, disable=not progress, unit="piece") as bar:
                for begin in range(done, len(pieces), _CHUNK):
                    chunk = pieces[begin : begin + _CHUNK]
                    file.write(model.encode(chunk).tobytes())
                    file.flush()
                    bar.update(len(chunk))
        self._part.replace(self._vectors)

    def _remove_others(self) -> None:
        for path in self.directory.iterdir():
            ours = path.suffix in (".vectors", ".owners", ".part", ".lock")
            if ours and not path.name.startswith(self._texts):
                path.unlink(missing_ok=True)

    @contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Keep the files for one process at a time; the lock goes with the process."""
        self.directory.mkdir(exist_ok=True)
        with open(self._lock, "w", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{self.directory}: another process writes it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _hash(parts: list[str]) -> str:
    """Return the first characters of one hash of several texts."""
    hashes = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        hashes.update(len(content).to_bytes(8, "little") + content)
    return hashes.hexdigest()[:_NAME]
