"""What both encoders of the cloze reader are to everyone above them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["ClozeEncoder", "ClozeRow", "masked_logits"]

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ClozeRow:
    """One input: a document, or a part of it.

    Attributes
    ----------
    blanks
        Positions in the document of the words asked for, int32 [m].
    positions
        Positions in the document of the words that may be chosen, int32 [n].
    tokens
        What the encoder reads, int32 [t].
    blank_columns, word_columns
        Where in `tokens` these words stand, int32 [m] and [n, 2]: first and last token of a word.
    """

    blanks: IntArray
    positions: IntArray
    tokens: IntArray
    blank_columns: IntArray
    word_columns: IntArray


class ClozeEncoder(torch.nn.Module):
    """Turns documents with blanks into logits of the words that may fill them."""

    kind: str
    """``"bilstm"`` or ``"transformer"``, as the settings of a model say it."""

    @abstractmethod
    def rows(self, words: Sequence[str], blanks: Sequence[int]) -> list[ClozeRow]:
        """Return inputs that together show each of the blanks, `BLANK` or not in `words`, every
        position where a word may be chosen, once."""

    @abstractmethod
    def crop(self, words: Sequence[str], centre: int) -> tuple[int, int]:
        """Return which words around one, [start, stop), an input holds."""

    @abstractmethod
    def word_ids(self, words: Sequence[str]) -> IntArray:
        """Return which positions hold the same word, int32 [len(words)]."""

    @abstractmethod
    def forward(self, rows: Sequence[ClozeRow]) -> torch.Tensor:
        """Return the logits of the positions of rows, float32 [blanks of all rows, most
        positions], -inf where a row has fewer."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what the model's ``fastmrc.json`` says of the encoder."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def masked_logits(logits: torch.Tensor, rows: Sequence[ClozeRow]) -> torch.Tensor:
    """Set what is beyond the positions of a row to -inf; logits [blanks of all rows, positions]."""
    counts = [len(row.positions) for row in rows for _ in row.blanks]
    limits = torch.tensor(counts, device=logits.device)
    columns = torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill(columns >= limits[:, None], -torch.inf)
