"""The cloze reader: fills the blanks of documents with words of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fastmrc import ops
from fastmrc.cloze.documents import ClozeDocument
from fastmrc.cloze.encoder import ClozeEncoder, ClozeRow, IntArray
from fastmrc.cloze.model import load_cloze_encoder
from fastmrc.cuda.runtime import has_kernels, to_host
from fastmrc.encoders.batches import by_length
from fastmrc.errors import InputError

if TYPE_CHECKING:
    from fastmrc.data import StrPath

__all__ = ["BlankAnswer", "ClozeAnswer", "ClozeReader", "RankedWord"]

# Documents whose inputs are held at once, and after which the progress bar moves.
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class RankedWord:
    """A word that may fill a blank.

    Attributes
    ----------
    text
        As it stands in the document.
    score
        Its share of the attention, 0 to 1: the sum over its positions, and over those of the words
        that the encoder cannot tell from it (unknown ones, to a ``bilstm``).
    positions
        Where it stands, in words from 0.
    """

    text: str
    score: float
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlankAnswer:
    """What may fill one blank: its position in the document, and words, best first; none if the
    document has no other words."""

    position: int
    words: tuple[RankedWord, ...]

    @property
    def text(self) -> str:
        """The best word; empty if there is none."""
        return self.words[0].text if self.words else ""


@dataclass(frozen=True, slots=True)
class ClozeAnswer:
    """What may fill the blanks of a document.

    Attributes
    ----------
    document
        In words.
    blanks
        One or more, in the order of the document; each was filled for itself.
    """

    document: ClozeDocument
    blanks: tuple[BlankAnswer, ...]

    @property
    def text(self) -> str:
        """The best word of the first blank."""
        return self.blanks[0].text

    @property
    def words(self) -> tuple[RankedWord, ...]:
        """The words for the first blank, best first."""
        return self.blanks[0].words


class ClozeReader:
    """Chooses a word of the document for each blank, by the attention-sum over its positions.

    May be used by several threads.

    Parameters
    ----------
    encoder
        ``bilstm`` or ``transformer``, in evaluation mode.
    """

    def __init__(self, encoder: ClozeEncoder) -> None:
        self.encoder = encoder

    @classmethod
    def from_pretrained(
        cls, path: StrPath | None = None, *, device: torch.device | str | None = None
    ) -> ClozeReader:
        """Load a reader.

        Parameters
        ----------
        path
            Directory that ``fastmrc train --task cloze`` has made; None: the packaged model.
        device
            As torch names it; the CPU by default.

        Raises
        ------
        InputError
            If there is no such directory or it holds no cloze model.
        """
        return cls(load_cloze_encoder(path, device=device))

    def fill(
        self, document: str | Sequence[str] | ClozeDocument, *, top_words: int = 5
    ) -> ClozeAnswer:
        """Fill the blanks of a document.

        Parameters
        ----------
        document
            A text with one or more blanks ``XXXXX``, which is cut into words (extra ``cloze``), or
            its words.
        top_words
            Words to return for each blank, at least 1.

        Returns
        -------
        ClozeAnswer
            ``.text`` and ``.words`` for one blank, ``.blanks`` for several.

        Raises
        ------
        InputError
            If there is no blank, or an argument is wrong.
        """
        return self.fill_batch([document], top_words=top_words)[0]

    def fill_batch(
        self,
        documents: Sequence[str | Sequence[str] | ClozeDocument],
        *,
        top_words: int = 5,
        progress: bool = False,
    ) -> list[ClozeAnswer]:
        """Fill the blanks of several documents, in their order.

        Parameters
        ----------
        documents, top_words
            As for `fill`.
        progress
            Whether to show a progress bar on the standard error.
        """
        if isinstance(documents, str):
            raise InputError("documents: expected a sequence of documents, got one text")
        if isinstance(top_words, bool) or not isinstance(top_words, int) or top_words < 1:
            raise InputError(f"top_words: expected an integer of at least 1, got {top_words!r}")
        made = [ClozeDocument.of(document) for document in documents]
        answers: list[ClozeAnswer] = []
        with tqdm(total=len(made), disable=not progress, unit="document") as bar:
            for first in range(0, len(made), _CHUNK):
                chunk = made[first : first + _CHUNK]
                answers += self._fill_chunk(chunk, top_words, bar)
        return answers

    def _fill_chunk(
        self, documents: Sequence[ClozeDocument], top_words: int, bar: tqdm[None]
    ) -> list[ClozeAnswer]:
        rows = [self.encoder.rows(d.words, d.blanks) for d in documents]
        owner = [d for d, own in enumerate(rows) for _ in own]
        flat = [row for own in rows for row in own]
        # By document and blank: the positions of its rows and their logits.
        found: dict[tuple[int, int], list[tuple[IntArray, NDArray[np.float32]]]] = {}
        for places in by_length([len(row.tokens) for row in flat], device=self.encoder.device):
            batch = [flat[i] for i in places]
            logits = self._logits(batch)
            line = 0
            for i, row in zip(places, batch, strict=True):
                for blank in row.blanks.tolist():
                    own = logits[line, : len(row.positions)]
                    found.setdefault((owner[i], blank), []).append((row.positions, own))
                    line += 1
        bar.update(len(documents))
        return self._ranked(documents, found, top_words)

    @torch.inference_mode()
    def _logits(self, rows: Sequence[ClozeRow]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.encoder(rows).float().cpu().numpy()
        return logits

    def _ranked(
        self,
        documents: Sequence[ClozeDocument],
        found: dict[tuple[int, int], list[tuple[IntArray, NDArray[np.float32]]]],
        top_words: int,
    ) -> list[ClozeAnswer]:
        """Sum up the attention to each word, all blanks at once."""
        blanks = [(d, blank) for d, doc in enumerate(documents) for blank in doc.blanks]
        longest = max(len(document.words) for document in documents)
        logits = np.full((len(blanks), longest), -np.inf, np.float32)
        ids = np.zeros((len(blanks), longest), np.int32)
        words_of = [self.encoder.word_ids(document.words) for document in documents]
        for i, (d, blank) in enumerate(blanks):
            ids[i, : len(words_of[d])] = words_of[d]
            for positions, own in found[d, blank]:
                logits[i, positions] = own
        there: Any = logits
        if has_kernels(self.encoder.device):
            there = torch.from_numpy(logits).to(self.encoder.device)
        summed = ops.attention_sum(there, ids, min(top_words, longest))
        words, scores, _ = (to_host(array) for array in summed)
        answers: list[list[BlankAnswer]] = [[] for _ in documents]
        for i, (d, blank) in enumerate(blanks):
            ranked = tuple(
                _ranked_word(documents[d].words, ids[i] == word, logits[i], float(score))
                for word, score in zip(words[i], scores[i], strict=True)
                if word >= 0
            )
            answers[d].append(BlankAnswer(blank, ranked))
        return [ClozeAnswer(d, tuple(own)) for d, own in zip(documents, answers, strict=True)]


def _ranked_word(
    words: Sequence[str], same: NDArray[np.bool_], logits: NDArray[np.float32], score: float
) -> RankedWord:
    """Return the word at the positions that hold the same id. Words that an encoder cannot tell
    apart have one id; the text is that of the one with the highest logit."""
    positions = np.flatnonzero(same & (logits > -np.inf))
    text = words[positions[int(logits[positions].argmax())]]
    return RankedWord(text, score, tuple(i for i in positions.tolist() if words[i] == text))
