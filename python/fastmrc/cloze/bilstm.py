"""The original encoder: word vectors and bidirectional LSTMs on both sides of the blank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.cloze.encoder import ClozeEncoder, ClozeRow, IntArray, masked_logits
from fastmrc.cloze.words import is_word
from fastmrc.encoders.batches import padded
from fastmrc.errors import InputError

__all__ = ["UNKNOWN", "BiLSTMEncoder", "Match"]

Match = Literal["states", "embeddings"]
UNKNOWN = 0
"""Id of all words without a vector."""


class BiLSTMEncoder(ClozeEncoder):
    """Logits by the inner product of a query with the states of the words.

    The document is cut at the blank. Both sides run through one stack of bidirectional LSTMs over
    word vectors, which do not change but for the one that unknown words share; the query is the
    mean of the final states of the two sides. An empty side is one unknown word. Unknown words are
    one word: the attention to them is summed.

    Parameters
    ----------
    words
        The vocabulary; word i has the id i + 1.
    vectors
        float32 [len(words) + 1, dimension], that of unknown words first; or the dimension, for
        vectors that are loaded afterwards.
    hidden
        Size of a state in each direction.
    depth
        Layers.
    match
        What the query is compared with: the states of the top layer, or the word vectors, which
        needs ``2 * hidden`` to be their dimension.

    Raises
    ------
    InputError
        For sizes that do not fit.
    """

    kind = "bilstm"

    def __init__(
        self,
        words: Sequence[str],
        vectors: NDArray[np.float32] | int,
        *,
        hidden: int = 128,
        depth: int = 2,
        match: Match = "states",
    ) -> None:
        super().__init__()
        if isinstance(vectors, int):
            vectors = np.zeros((len(words) + 1, vectors), np.float32)
        if vectors.shape[0] != len(words) + 1:
            raise InputError(
                f"vectors: expected {len(words) + 1}, one per word and one for unknown words, got "
                f"{vectors.shape[0]}"
            )
        dimension = vectors.shape[1]
        if match not in get_args(Match):
            raise InputError(f"match: expected states or embeddings, got {match!r}")
        if match == "embeddings" and 2 * hidden != dimension:
            raise InputError(
                f"hidden: expected {dimension // 2} with match='embeddings', half the dimension of "
                f"the vectors, got {hidden}"
            )
        self.vocabulary = list(words)
        self._id_of = {word: i + 1 for i, word in enumerate(self.vocabulary)}
        self.match = match
        self.unknown = torch.nn.Parameter(torch.from_numpy(vectors[:1].copy()))
        self.known: torch.Tensor
        self.register_buffer("known", torch.from_numpy(vectors[1:].copy()))
        self.lstm = _BiLSTM(dimension, hidden, depth)

    def settings(self) -> dict[str, Any]:
        return {
            "encoder": self.kind,
            "dimension": self.unknown.shape[1],
            "hidden": self.lstm.hidden,
            "depth": self.lstm.depth,
            "match": self.match,
        }

    def word_ids(self, words: Sequence[str]) -> IntArray:
        return np.array([self._id_of.get(word, UNKNOWN) for word in words], np.int32)

    def crop(self, words: Sequence[str], centre: int) -> tuple[int, int]:
        return 0, len(words)

    def rows(self, words: Sequence[str], blanks: Sequence[int]) -> list[ClozeRow]:
        tokens = self.word_ids(words)
        tokens[list(blanks)] = UNKNOWN
        # Other blanks are unknown words that are not to be chosen.
        hidden = set(blanks)
        chosen = [i for i, word in enumerate(words) if is_word(word) and i not in hidden]
        positions = np.array(chosen, np.int32)
        columns = np.stack([positions, positions], axis=1)
        asked = [np.array([blank], np.int32) for blank in blanks]
        return [ClozeRow(at, positions, tokens, at, columns) for at in asked]

    def forward(self, rows: Sequence[ClozeRow]) -> torch.Tensor:
        sides = [side for row in rows for side in _sides(row)]
        lengths = torch.tensor([len(side) for side in sides])
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(side.astype(np.int64)) for side in sides], batch_first=True
        ).to(self.device)
        vectors = torch.nn.functional.embedding(ids, torch.cat([self.unknown, self.known]))
        states = self.lstm(vectors, lengths.to(self.device))
        # Forwards the state behind the last word, backwards that before the first.
        half = self.lstm.hidden
        last = states[torch.arange(len(sides)), lengths - 1, :half]
        final = torch.cat([last, states[:, 0, half:]], dim=1)
        query = final.view(len(rows), 2, -1).mean(dim=1)
        top = states if self.match == "states" else vectors
        scores = torch.einsum("rsth,rh->rst", top.reshape(len(rows), 2, *top.shape[1:]), query)
        return masked_logits(self._at_positions(scores.float(), rows), rows)

    def _at_positions(self, scores: torch.Tensor, rows: Sequence[ClozeRow]) -> torch.Tensor:
        """Return scores [rows, 2, longest side] at the positions, [rows, most positions]."""
        places = []
        for row in rows:
            blank = int(row.blank_columns[0])
            columns = row.word_columns[:, 0]
            right = columns > blank
            places.append(np.where(right, columns - blank - 1 + scores.shape[2], columns))
        return scores.flatten(1).gather(1, padded(places, 0, scores.device))


class _BiLSTM(torch.nn.Module):
    """Bidirectional LSTMs over padded sequences.

    Each direction is an LSTM of its own, which reads backwards what was turned round within its
    length: the padding is behind the words for both and changes nothing. On a CPU the backward pass
    of torch's packed sequences, which would do without padding, takes 18 times as long.
    """

    def __init__(self, inputs: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.depth = depth
        widths = [inputs] + [2 * hidden] * (depth - 1)
        lstms = [torch.nn.LSTM(width, hidden, batch_first=True) for width in widths * 2]
        self.forwards = torch.nn.ModuleList(lstms[:depth])
        self.backwards = torch.nn.ModuleList(lstms[depth:])

    def forward(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the top layer's states [sequences, longest, 2 * hidden], forwards first."""
        turned = lengths[:, None] - 1 - torch.arange(states.shape[1], device=lengths.device)
        turned = (turned % states.shape[1])[:, :, None]  # positions of padding: among each other
        # oneDNN has no backward pass of LSTMs in bfloat16.
        with torch.autocast(states.device.type, enabled=False):
            states = states.float()
            for forwards, backwards in zip(self.forwards, self.backwards, strict=True):
                left, _ = forwards(states)
                right, _ = backwards(states.gather(1, turned.expand_as(states)))
                right = right.gather(1, turned.expand_as(right))
                states = torch.cat([left, right], dim=2)
        return states


def _sides(row: ClozeRow) -> tuple[IntArray, IntArray]:
    """Return what is left and right of the blank; an empty side is one unknown word."""
    blank = int(row.blank_columns[0])
    empty = np.array([UNKNOWN], np.int32)
    left, right = row.tokens[:blank], row.tokens[blank + 1 :]
    return left if len(left) else empty, right if len(right) else empty
